// gemm_weights.h: how gemm.cpp reads weights: codes of a matrix's rows as vectors of the level of this object.
//
// Levels with vdpbf16ps (RQ_DOT) decode 32 weights to a vector of bf16, in an order of k that suits the type; x is laid
// in the same order (prepare). Other levels decode VL weights to fp32 in ascending order.
// Nothing is read beyond a row's codes and scales, whatever k is. Everything has internal linkage (see simd.h).
#pragma once
#include <stdint.h>
#include <string.h>

#include "rorqual_cpu.h"
#include "simd.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define RQ_DOT 1
#endif

namespace {

enum { CHUNK = 64 };  // rows of x and of decoded weights are padded with zeros to multiples of this

inline int64_t row_bytes(const RqMatrix &w, int64_t k) {
  return w.type == RQ_F32 ? 4 * k : w.type == RQ_BF16 ? 2 * k : w.type == RQ_FP8 ? k : (k + 1) / 2;
}

inline const uint8_t *row_at(const RqMatrix &w, int64_t k, int64_t o) {
  return (const uint8_t *)w.data + o * row_bytes(w, k);
}

// Scales of row o; null for types without.
inline const uint8_t *scales_at(const RqMatrix &w, int64_t k, int64_t o) {
  if (w.type < RQ_FP8) return nullptr;
  return w.scale + (w.type == RQ_FP8 ? o / w.block : o) * ((k + w.block - 1) / w.block);
}

inline uint16_t round_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((bits >> 16) | 0x40);  // NaN stays one
  return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

#if defined(RQ_DOT)

typedef uint16_t Unit;  // of x and of decoded weights

// bf16 bits of an e4m3 magnitude (0..127) times 2^(scale - 127).
constexpr uint16_t e4m3_bits(int code, int scale) {
  if (scale == 255 || code == 127) return 0x7FC0;
  int exponent = (code >> 3) - 7, fraction = code & 7;
  if (code < 8) {
    if (!code) return 0;
    exponent = -6;
    while (!(fraction & 8)) fraction <<= 1, exponent--;
    fraction &= 7;
  }
  exponent += scale;  // biased: scale - 127 + 127
  return exponent >= 255 ? 0x7F80 : exponent < 1 ? 0 : (uint16_t)(exponent << 7 | fraction << 4);
}

struct alignas(64) Fp8Codes {  // of each scale: the high, then the low bytes of the 128 magnitudes
  uint8_t high[256][128], low[256][128];
  constexpr Fp8Codes() : high(), low() {
    for (int scale = 0; scale < 256; scale++)
      for (int code = 0; code < 128; code++) {
        const uint16_t bits = e4m3_bits(code, scale);
        high[scale][code] = (uint8_t)(bits >> 8);
        low[scale][code] = (uint8_t)bits;
      }
  }
};

constexpr Fp8Codes fp8_codes{};

struct Pair {
  __m512i a, b;  // two times 32 bf16
};

struct Fp8Table {  // of one scale, in registers
  __m512i high0, high1, low0, low1;
  explicit Fp8Table(uint8_t scale)
      : high0(_mm512_load_si512(fp8_codes.high[scale])),
        high1(_mm512_load_si512(fp8_codes.high[scale] + 64)),
        low0(_mm512_load_si512(fp8_codes.low[scale])),
        low1(_mm512_load_si512(fp8_codes.low[scale] + 64)) {}
};

inline Pair fp8_pair(__m512i codes, __m512i high, __m512i low) {
  high = _mm512_ternarylogic_epi32(codes, high, _mm512_set1_epi8((char)0x80), 0xEC);  // (codes & sign) | high
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// 64 e4m3 weights of one scale; order of k: 0-7 16-23 32-39 48-55, and the others.
inline Pair fp8_decode(__m512i codes, const Fp8Table &t) {
  return fp8_pair(codes, _mm512_permutex2var_epi8(t.high0, codes, t.high1),
                  _mm512_permutex2var_epi8(t.low0, codes, t.low1));
}

// The same with a scale for each half.
inline Pair fp8_decode(__m512i codes, const Fp8Table &t, const Fp8Table &u) {
  const __mmask64 second = 0xFFFFFFFF00000000ull;
  const __m512i high = _mm512_mask_blend_epi8(second, _mm512_permutex2var_epi8(t.high0, codes, t.high1),
                                              _mm512_permutex2var_epi8(u.high0, codes, u.high1));
  const __m512i low = _mm512_mask_blend_epi8(second, _mm512_permutex2var_epi8(t.low0, codes, t.low1),
                                             _mm512_permutex2var_epi8(u.low0, codes, u.low1));
  return fp8_pair(codes, high, low);
}

// bf16 bits of an e2m1 magnitude (0..7) times 2^(scale - 127).
constexpr uint16_t e2m1_bits(int code, int scale) {
  if (scale == 255) return 0x7FC0;
  if (!code) return 0;
  const int exponent = (code < 2 ? -1 : (code >> 1) - 1) + scale;
  return exponent >= 255 ? 0x7F80 : exponent < 1 ? 0 : (uint16_t)(exponent << 7 | (code < 2 ? 0 : (code & 1) << 6));
}

struct alignas(64) Fp4Codes {  // of each scale: the 16 values, twice
  uint16_t values[256][32];
  constexpr Fp4Codes() : values() {
    for (int scale = 0; scale < 256; scale++)
      for (int i = 0; i < 32; i++)
        values[scale][i] = (uint16_t)(e2m1_bits(i & 7, scale) | (i & 8 ? 0x8000 : 0));
  }
};

constexpr Fp4Codes fp4_codes{};

// 32 e2m1 weights; order of k: 0-3 16-19 4-7 20-23 8-11 24-27 12-15 28-31.
inline __m512i fp4_decode(__m128i bytes, uint8_t scale) {
  // Each lane has all 16 bytes and shifts its own nibbles to words, whose low 5 bits choose a value; bit 4 is chance.
  const __m512i shifts = _mm512_set_epi64(0x3C3C383834343030ll, 0x3C3C383834343030ll, 0x2C2C282824242020ll, 0x2C2C282824242020ll,
                                          0x1C1C181814141010ll, 0x1C1C181814141010ll, 0x0C0C080804040000ll, 0x0C0C080804040000ll);
  const __m512i codes = _mm512_multishift_epi64_epi8(shifts, _mm512_broadcast_i32x4(bytes));
  return _mm512_permutexvar_epi16(codes, _mm512_load_si512(fp4_codes.values[scale]));
}

// out[kp] = bf16 of x[k], zeros after, in the order of k of the type's pairs.
inline void prepare(int type, const float *x, int64_t k, int64_t kp, Unit *out) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; i++) {
    const int fp8 = i + i / 8 * 8, fp4 = i / 8 * 4 + i % 4 + i % 8 / 4 * 16;
    order[0][i] = (uint16_t)(type == RQ_FP8 ? fp8 : type == RQ_FP4 ? fp4 : i);
    order[1][i] = (uint16_t)(type == RQ_FP8 ? fp8 + 8 : type == RQ_FP4 ? fp4 + 32 : i + 32);
  }
  const __m512i order_a = _mm512_load_si512(order[0]), order_b = _mm512_load_si512(order[1]);
  for (int64_t j = 0; j < kp; j += CHUNK) {
    __m512 part[4];
    for (int i = 0; i < 4; i++) {
      const int64_t left = k - j - 16 * i;
      part[i] = left >= 16 ? load(x + j + 16 * i) : left > 0 ? load_part(x + j + 16 * i, (int)left) : zero();
    }
    const __m512i low = (__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]), high = (__m512i)_mm512_cvtne2ps_pbh(part[3], part[2]);
    _mm512_storeu_si512(out + j, _mm512_permutex2var_epi16(low, order_a, high));
    _mm512_storeu_si512(out + j + 32, _mm512_permutex2var_epi16(low, order_b, high));
  }
}

#else  // fp32 products

typedef float Unit;

inline float ue8m0(uint8_t scale) {
  const uint32_t bits = scale == 255 ? 0x7FC00000u : scale ? (uint32_t)scale << 23 : 0x00400000u;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

#if !defined(__AVX2__)
struct Floats {
  float e4m3[256], e2m1[16];
  constexpr Floats() : e4m3(), e2m1() {
    for (int code = 0; code < 128; code++) {
      float value = (code < 8 ? (float)code : (float)(8 + (code & 7))) / 512.0f;
      for (int e = 1; e < code >> 3; e++) value *= 2.0f;
      e4m3[code] = code == 127 ? __builtin_nanf("") : value;
      e4m3[code + 128] = -e4m3[code];
    }
    const float magnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    for (int code = 0; code < 8; code++) e2m1[code] = magnitudes[code], e2m1[code + 8] = -magnitudes[code];
  }
};

constexpr Floats floats{};
#endif

// VL weights from code pointer p; FP4: p is the byte of an even element.
inline vf bf16_values(const uint8_t *p) {
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
#elif defined(__AVX2__)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
#else
  uint16_t codes[VL];
  memcpy(codes, p, sizeof codes);
  const v4i bits = v4i{codes[0], codes[1], codes[2], codes[3]} << 16;
  vf values;
  memcpy(&values, &bits, sizeof values);
  return values;
#endif
}

inline vf fp8_values(const uint8_t *p) {
#if defined(__AVX512F__)
  // Not by a shift and a product with 2^120: that makes the subnormals denormals of fp32, slow or flushed.
  const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
  const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi32(127));
  const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(1.0f / 512.0f));
  __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8)), _mm512_castps_si512(small));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(127)), _mm512_set1_epi32(0x7FC00000));
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_slli_epi32(codes, 24), bits, _mm512_set1_epi32((int)0x80000000), 0xEC));
#elif defined(__AVX2__)
  const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
  const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi32(127));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(1.0f / 512.0f));
  __m256i bits = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
  bits = _mm256_blendv_epi8(bits, _mm256_castps_si256(small), _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude));
  bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7FC00000), _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(127)));
  return _mm256_castsi256_ps(
      _mm256_or_si256(bits, _mm256_and_si256(_mm256_slli_epi32(codes, 24), _mm256_set1_epi32((int)0x80000000))));
#else
  return vf{floats.e4m3[p[0]], floats.e4m3[p[1]], floats.e4m3[p[2]], floats.e4m3[p[3]]};
#endif
}

inline vf fp4_values(const uint8_t *p) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p));
  return _mm512_permutexvar_ps(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), table);
#elif defined(__AVX2__)
  int32_t four;
  memcpy(&four, p, 4);
  const __m256 table = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  const __m256i codes = _mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 28));  // a code in the low 4 bits of each
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28), _mm256_set1_epi32((int)0x80000000));
  return _mm256_or_ps(_mm256_permutevar8x32_ps(table, codes), _mm256_castsi256_ps(sign));
#else
  return vf{floats.e2m1[p[0] & 15], floats.e2m1[p[0] >> 4], floats.e2m1[p[1] & 15], floats.e2m1[p[1] >> 4]};
#endif
}

template <int TYPE>
inline vf values(const uint8_t *p) {
  return TYPE == RQ_BF16 ? bf16_values(p) : TYPE == RQ_FP8 ? fp8_values(p) : fp4_values(p);
}

template <int TYPE>
inline int64_t code_bytes(int64_t n) {
  return TYPE == RQ_BF16 ? 2 * n : TYPE == RQ_FP8 ? n : (n + 1) / 2;
}

// The first n < VL weights, zeros after.
template <int TYPE>
inline vf values_part(const uint8_t *p, int n) {
  uint8_t codes[2 * VL] = {};
  memcpy(codes, p, (size_t)code_bytes<TYPE>(n));
  return values<TYPE>(codes);
}

// out[kp] = x[k] rounded to bf16, zeros after.
inline void prepare(int, const float *x, int64_t k, int64_t kp, Unit *out) {
  for (int64_t j = 0; j < k; j++) {
    const uint32_t bits = (uint32_t)round_bf16(x[j]) << 16;
    memcpy(out + j, &bits, 4);
  }
  memset(out + k, 0, (size_t)(kp - k) * sizeof(Unit));
}

#endif

}  // namespace
