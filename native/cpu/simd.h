// simd.h: the few vector operations that the forward call needs, at the instruction level this object is compiled for.
//
// Portable first (GCC/Clang vector extensions, 4 lanes), AVX2+FMA and AVX-512 beside it. Everything has internal
// linkage: a symbol shared between objects of different levels could bring AVX-512 code to a CPU without it.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

#if defined(__AVX512F__)
enum { VL = 16 };  // lanes
typedef __m512 vf;
inline vf zero() { return _mm512_setzero_ps(); }
inline vf splat(float a) { return _mm512_set1_ps(a); }
inline vf load(const float *p) { return _mm512_loadu_ps(p); }
inline vf load_part(const float *p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline void store(float *p, vf a) { _mm512_storeu_ps(p, a); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline v4 fold(vf a) {
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a),
                              _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
  return (v4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#elif defined(__AVX2__)
enum { VL = 8 };
typedef __m256 vf;
inline vf zero() { return _mm256_setzero_ps(); }
inline vf splat(float a) { return _mm256_set1_ps(a); }
inline vf load(const float *p) { return _mm256_loadu_ps(p); }
inline vf load_part(const float *p, int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
inline void store(float *p, vf a) { _mm256_storeu_ps(p, a); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline v4 fold(vf a) { return (v4)_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
#else
enum { VL = 4 };
typedef v4 vf;
inline vf zero() { return vf{0, 0, 0, 0}; }
inline vf splat(float a) { return vf{a, a, a, a}; }
inline vf load(const float *p) {
  vf a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline vf load_part(const float *p, int n) {
  vf a = zero();
  for (int i = 0; i < n; i++) a[i] = p[i];
  return a;
}
inline void store(float *p, vf a) { memcpy(p, &a, sizeof a); }
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline v4 fold(vf a) { return a; }
#endif

inline v4 shuffle(v4 a, v4 b, v4i lanes) { return __builtin_shuffle(a, b, lanes); }

// Sums of four vectors. Every dot product ends here, alone or in company, so its order of additions is one.
inline v4 sum4(vf a, vf b, vf c, vf d) {
  v4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
  v4 ab_low = shuffle(fa, fb, v4i{0, 4, 1, 5}), ab_high = shuffle(fa, fb, v4i{2, 6, 3, 7});
  v4 cd_low = shuffle(fc, fd, v4i{0, 4, 1, 5}), cd_high = shuffle(fc, fd, v4i{2, 6, 3, 7});
  v4 first = shuffle(ab_low, cd_low, v4i{0, 1, 4, 5}), second = shuffle(ab_low, cd_low, v4i{2, 3, 6, 7});
  v4 third = shuffle(ab_high, cd_high, v4i{0, 1, 4, 5}), fourth = shuffle(ab_high, cd_high, v4i{2, 3, 6, 7});
  return (first + second) + (third + fourth);
}

// e^x to about an ulp (Cephes' range reduction and polynomial), without branches so that loops of it vectorise.
// NaN stays NaN, -inf gives 0; above 88 it stays at e^88, enough for a denominator.
inline float exp1(float x) {
  float c = x < -87.3f ? -87.3f : x;
  c = c > 88.0f ? 88.0f : c;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float z = c * 1.44269504088896341f + magic;
  float n = z - magic;
  float r = c - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  int32_t bits;
  memcpy(&bits, &z, 4);
  bits = (int32_t)((uint32_t)(bits - 0x4B400000 + 127) << 23);
  float scale;
  memcpy(&scale, &bits, 4);
  float y = p * scale;
  return x < -87.3f ? 0.0f : y;
}

inline float square(const float *x, int n) {
  vf a = zero();
  int i = 0;
  for (; i + VL <= n; i += VL) {
    vf v = load(x + i);
    a = fma(v, v, a);
  }
  if (i < n) {
    vf v = load_part(x + i, n - i);
    a = fma(v, v, a);
  }
  return sum4(a, zero(), zero(), zero())[0];
}

}  // namespace
