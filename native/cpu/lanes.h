// lanes.h: vectors of 4, 8 and 16 floats, as wide as the level of this object has them, for attend.cpp and index.cpp.
//
// A lane's arithmetic is the same whatever the width of its vector, so a result does not depend on what it shares a
// vector with. Everything has internal linkage (see simd.h).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

template <int N>
struct Lanes;

template <>
struct Lanes<4> {
  typedef float f __attribute__((vector_size(16)));
  typedef int32_t i __attribute__((vector_size(16)));
  static inline f splat(float a) { return f{a, a, a, a}; }
  static inline f fma(f a, f b, f c) {
#if defined(__FMA__)
    return (f)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#else
    return a * b + c;
#endif
  }
};

#if defined(__AVX2__)
template <>
struct Lanes<8> {
  typedef float f __attribute__((vector_size(32)));
  typedef int32_t i __attribute__((vector_size(32)));
  static inline f splat(float a) { return (f)_mm256_set1_ps(a); }
  static inline f fma(f a, f b, f c) { return (f)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
};
#endif

#if defined(__AVX512F__)
template <>
struct Lanes<16> {
  typedef float f __attribute__((vector_size(64)));
  typedef int32_t i __attribute__((vector_size(64)));
  static inline f splat(float a) { return (f)_mm512_set1_ps(a); }
  static inline f fma(f a, f b, f c) { return (f)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
};
enum { WIDE = 16, TILE_V = 4, TILE_R = 6 };  // widest vector; vectors and rows of a tile of sums in registers
#elif defined(__AVX2__)
enum { WIDE = 8, TILE_V = 2, TILE_R = 6 };
#else
enum { WIDE = 4, TILE_V = 2, TILE_R = 4 };
#endif

template <int N>
using F = typename Lanes<N>::f;

template <int N>
inline F<N> load(const float *p) {
  F<N> a;
  memcpy(&a, p, sizeof a);
  return a;
}

template <int N>
inline void store(float *p, F<N> a) {
  memcpy(p, &a, sizeof a);
}

template <int N>
inline F<N> load_part(const float *p, int n) {  // the first n lanes, zeros above; reads no more
  F<N> a = Lanes<N>::splat(0.0f);
  memcpy(&a, p, (size_t)n * sizeof(float));
  return a;
}

template <int N>
inline F<N> larger_lanes(F<N> a, F<N> b) {  // b where a is NaN
  return a > b ? a : b;
}

// e^x for x <= 0 to about an ulp: range reduction and polynomial of Cephes. NaN stays NaN, below -87.3 gives 0.
template <int N>
inline F<N> exp_lanes(F<N> x) {
  typedef Lanes<N> L;
  typedef typename L::i I;
  const F<N> low = L::splat(-87.3f), magic = L::splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F<N> c = x < low ? low : x;
  const F<N> z = L::fma(c, L::splat(1.44269504088896341f), magic), n = z - magic;
  F<N> r = L::fma(n, L::splat(-0.693359375f), c);
  r = L::fma(n, L::splat(2.12194440e-4f), r);
  F<N> p = L::splat(1.9875691500e-4f);
  p = L::fma(p, r, L::splat(1.3981999507e-3f));
  p = L::fma(p, r, L::splat(8.3334519073e-3f));
  p = L::fma(p, r, L::splat(4.1665795894e-2f));
  p = L::fma(p, r, L::splat(1.6666665459e-1f));
  p = L::fma(p, r, L::splat(5.0000001201e-1f));
  p = L::fma(p, r * r, r) + L::splat(1.0f);
  I bits;
  memcpy(&bits, &z, sizeof bits);
  bits = (bits - (0x4B400000 - 127)) << 23;
  F<N> scale;
  memcpy(&scale, &bits, sizeof scale);
  const F<N> y = p * scale;
  return x < low ? L::splat(0.0f) : y;
}

// sums[row][C] = columns . row, for R rows and V vectors of columns; columns is [width][C], a lane adds dim by dim.
template <int N, int V, int R>
inline void dots(const float *columns, int64_t c, int64_t width, const float *const *rows, float *sums) {
  F<N> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[r][v] = Lanes<N>::splat(0.0f);
  for (int64_t d = 0; d < width; d++) {
    F<N> x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) x[v] = load<N>(columns + d * c + v * N);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const F<N> k = Lanes<N>::splat(rows[r][d]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = Lanes<N>::fma(k, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store<N>(sums + r * c + v * N, acc[r][v]);
}

template <int N, int V>
inline void dots_rows(const float *columns, int64_t c, int64_t width, const float *const *rows, int64_t n, float *sums) {
  int64_t k = 0;
  for (; k + TILE_R <= n; k += TILE_R) dots<N, V, TILE_R>(columns, c, width, rows + k, sums + k * c);
  for (; k < n; k++) dots<N, V, 1>(columns, c, width, rows + k, sums + k * c);
}

template <int N>
inline void dots_all(const float *columns, int64_t c, int64_t width, const float *const *rows, int64_t n, float *sums) {
  int64_t at = 0;
  for (; at + TILE_V * N <= c; at += TILE_V * N) dots_rows<N, TILE_V>(columns + at, c, width, rows, n, sums + at);
  for (; at < c; at += N) dots_rows<N, 1>(columns + at, c, width, rows, n, sums + at);
}

struct Cut {  // cuts 64-byte aligned pieces off a scratch buffer; base null only counts
  char *base;
  int64_t used;
  template <typename T>
  T *take(int64_t count) {
    char *at = base + used;
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return base ? (T *)at : nullptr;
  }
};

}  // namespace
