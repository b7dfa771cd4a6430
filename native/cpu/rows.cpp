// rows.cpp: see rows.h. Rounding follows model/quant.py operation by operation, so the bytes are its bytes.
#include "rows.h"

#include <math.h>
#include <string.h>

#include "lanes.h"

namespace {

const float FP8_FLOOR = 1e-4f, MAGIC = 12582912.0f;  // adding and subtracting s * MAGIC rounds to a multiple of s
const uint32_t FP4_FLOOR_BITS = 0x01C00000u;         // 6 * 2^-126

inline uint32_t bits_of(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  return b;
}

inline float float_of(uint32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}

inline int32_t blocks_of(int32_t n, int32_t block) { return (n + block - 1) / block; }

// Largest magnitude's bits; NaN and infinity compare above every number.
inline uint32_t top_bits(const float *x, int32_t n, uint32_t floor) {
  uint32_t top = floor;
  for (int32_t i = 0; i < n; i++) {
    const uint32_t b = bits_of(x[i]) & 0x7FFFFFFFu;
    top = b > top ? b : top;
  }
  return top;
}

inline uint32_t scale_byte(uint32_t top, uint32_t carry, uint32_t shift) {
  return top >= 0x7F800000u ? 255u : ((top + carry) >> 23) - shift;
}

// 2^(byte-127); 0 means 2^-127, 255 NaN.
inline float scale_of(uint32_t byte) {
  return float_of(byte == 0 ? 0x00400000u : byte == 255 ? 0x7FC00000u : byte << 23);
}

// 1/s; NaN for 255.
inline float inverse_of(uint32_t byte) { return float_of(byte == 255 ? 0x7FC00000u : (254 - byte) << 23); }

inline uint32_t e4m3_code(float y) {  // |y| <= 448 or NaN
  const uint32_t b = bits_of(y), sign = b >> 24 & 0x80u;
  const float power = float_of(b & 0x7F800000u), step = power * (MAGIC / 8);
  const float magic = step > MAGIC * 0.001953125f ? step : MAGIC * 0.001953125f;
  const float r = (float_of(b & 0x7FFFFFFFu) + magic) - magic;
  const uint32_t v = bits_of(r);
  const uint32_t code = r < 0.015625f ? (uint32_t)(int32_t)(r * 512.0f) : (v - (120u << 23)) >> 20;
  return y != y ? 0x7Fu : sign | code;
}

struct Table {  // value of every e4m3 code: a lookup is faster than its arithmetic without AVX-512
  float at[256];
  constexpr Table() : at() {
    for (int code = 0; code < 256; code++) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      float v = exponent ? (float)(8 + mantissa) : (float)mantissa;
      for (int e = exponent ? exponent : 1; e < 10; e++) v *= 0.5f;
      for (int e = 10; e < exponent; e++) v *= 2.0f;
      if ((code & 127) == 127) v = __builtin_nanf("");
      at[code] = code & 128 ? -v : v;
    }
  }
};
constexpr Table E4M3;

inline uint32_t e2m1_code(float y) {  // |y| <= 6 or NaN
  const uint32_t b = bits_of(y);
  const float power = float_of(b & 0x7F800000u), step = power * (MAGIC / 2);
  const float magic = step > MAGIC * 0.5f ? step : MAGIC * 0.5f;
  const float r = (float_of(b & 0x7FFFFFFFu) + magic) - magic;
  const uint32_t code = r <= 2.0f ? (uint32_t)(int32_t)(r * 2.0f) : r == 3.0f ? 5u : r == 4.0f ? 6u : 7u;
  return y != y ? 7u : code | (b >> 28 & 8u);
}

const float E2M1[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

inline uint16_t to_bf16(float x) {  // nearest, ties to even
  const uint32_t b = bits_of(x);
  if ((b & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(b >> 16 | 0x40u);
  return (uint16_t)((b + 0x7FFFu + (b >> 16 & 1u)) >> 16);
}

inline float from_bf16(const uint8_t *p) { return float_of((uint32_t)p[0] << 16 | (uint32_t)p[1] << 24); }

}  // namespace

namespace RQ_NS {

int64_t entry_bytes(int32_t format, int32_t width, int32_t rope) {
  if (format == RQ_EXACT) return (int64_t)width * 4;
  const int32_t nope = width - rope;
  return nope + 2 * (int64_t)rope + (blocks_of(nope, RQ_FP8_BLOCK) + 7) / 8 * 8;
}

int64_t key_bytes(int32_t format, int32_t width) {
  return format == RQ_EXACT ? (int64_t)width * 4 : (width + 1) / 2 + blocks_of(width, RQ_FP4_BLOCK);
}

void pack_entry(int32_t format, const float *x, int32_t width, int32_t rope, uint8_t *out) {
  if (format == RQ_EXACT) {
    memcpy(out, x, (size_t)width * 4);
    return;
  }
  const int32_t nope = width - rope;
  uint8_t *pair = out + nope, *scales = pair + 2 * (int64_t)rope;
  memset(scales, 0, (size_t)(entry_bytes(format, width, rope) - nope - 2 * rope));
  for (int32_t at = 0, n = 0; at < nope; at += RQ_FP8_BLOCK, n++) {
    const int32_t count = nope - at < RQ_FP8_BLOCK ? nope - at : RQ_FP8_BLOCK;
    const uint32_t byte = scale_byte(top_bits(x + at, count, bits_of(FP8_FLOOR)), 0x1FFFFFu, 8);
    const float inverse = inverse_of(byte);
    for (int32_t i = 0; i < count; i++) out[at + i] = (uint8_t)e4m3_code(x[at + i] * inverse);
    scales[n] = (uint8_t)byte;
  }
  for (int32_t i = 0; i < rope; i++) {
    const uint16_t b = to_bf16(x[nope + i]);
    pair[2 * i] = (uint8_t)b, pair[2 * i + 1] = (uint8_t)(b >> 8);
  }
}

void unpack_entry(int32_t format, const uint8_t *row, int32_t width, int32_t rope, float *x) {
  if (format == RQ_EXACT) {
    memcpy(x, row, (size_t)width * 4);
    return;
  }
  const int32_t nope = width - rope;
  const uint8_t *pair = row + nope, *scales = pair + 2 * (int64_t)rope;
  for (int32_t at = 0, n = 0; at < nope; at += RQ_FP8_BLOCK, n++) {
    const int32_t count = nope - at < RQ_FP8_BLOCK ? nope - at : RQ_FP8_BLOCK;
    const float scale = scale_of(scales[n]);
    for (int32_t i = 0; i < count; i++) x[at + i] = E4M3.at[row[at + i]] * scale;
  }
  for (int32_t i = 0; i < rope; i++) x[nope + i] = from_bf16(pair + 2 * i);
}

void pack_key(int32_t format, const float *x, int32_t width, uint8_t *out) {
  if (format == RQ_EXACT) {
    memcpy(out, x, (size_t)width * 4);
    return;
  }
  uint8_t *scales = out + (width + 1) / 2;
  for (int32_t at = 0, n = 0; at < width; at += RQ_FP4_BLOCK, n++) {
    const int32_t count = width - at < RQ_FP4_BLOCK ? width - at : RQ_FP4_BLOCK;
    const uint32_t byte = scale_byte(top_bits(x + at, count, FP4_FLOOR_BITS), 0x3FFFFFu, 2);
    const float inverse = inverse_of(byte);
    for (int32_t i = 0; i < count; i += 2) {
      const uint32_t low = e2m1_code(x[at + i] * inverse), high = i + 1 < count ? e2m1_code(x[at + i + 1] * inverse) : 0;
      out[(at + i) / 2] = (uint8_t)(low | high << 4);
    }
    scales[n] = (uint8_t)byte;
  }
}

void unpack_key(int32_t format, const uint8_t *row, int32_t width, float *x) {
  if (format == RQ_EXACT) {
    memcpy(x, row, (size_t)width * 4);
    return;
  }
  const uint8_t *scales = row + (width + 1) / 2;
  for (int32_t at = 0, n = 0; at < width; at += RQ_FP4_BLOCK, n++) {
    const int32_t count = width - at < RQ_FP4_BLOCK ? width - at : RQ_FP4_BLOCK;
    const float scale = scale_of(scales[n]);
    for (int32_t i = at; i < at + count; i++) x[i] = E2M1[row[i / 2] >> (i % 2 * 4) & 15] * scale;
  }
}

void round_entry(int32_t format, float *x, int32_t width, int32_t rope) {
  if (format == RQ_EXACT) return;
  const int32_t nope = width - rope;
  for (int32_t at = 0; at < nope; at += RQ_FP8_BLOCK) {
    const int32_t count = nope - at < RQ_FP8_BLOCK ? nope - at : RQ_FP8_BLOCK;
    const uint32_t byte = scale_byte(top_bits(x + at, count, bits_of(FP8_FLOOR)), 0x1FFFFFu, 8);
    const float inverse = inverse_of(byte), scale = scale_of(byte);
    for (int32_t i = 0; i < count; i++) x[at + i] = E4M3.at[e4m3_code(x[at + i] * inverse)] * scale;
  }
  for (int32_t i = nope; i < width; i++) x[i] = float_of((uint32_t)to_bf16(x[i]) << 16);
}

void round_key(int32_t format, float *x, int32_t width) {
  if (format == RQ_EXACT) return;
  for (int32_t at = 0; at < width; at += RQ_FP4_BLOCK) {
    const int32_t count = width - at < RQ_FP4_BLOCK ? width - at : RQ_FP4_BLOCK;
    const uint32_t byte = scale_byte(top_bits(x + at, count, FP4_FLOOR_BITS), 0x3FFFFFu, 2);
    const float inverse = inverse_of(byte), scale = scale_of(byte);
    for (int32_t i = 0; i < count; i++) x[at + i] = E2M1[e2m1_code(x[at + i] * inverse)] * scale;
  }
}

void hadamard(float *x, int32_t width) {
  for (int32_t half = 1; half < width; half *= 2)
    for (int32_t at = 0; at < width; at += 2 * half)
      for (int32_t i = at; i < at + half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b, x[i + half] = a - b;
      }
  const float scale = (float)(1.0 / sqrt((double)width));
  for (int32_t i = 0; i < width; i++) x[i] *= scale;
}

void entry_to_bf16(const uint8_t *row, int32_t width, int32_t rope, uint16_t *out) {
  const int32_t nope = width - rope;
  const uint8_t *pair = row + nope, *scales = pair + 2 * (int64_t)rope;
  int32_t at = 0;
  for (int32_t n = 0; at < nope; n++) {
    const int32_t end = nope - at < RQ_FP8_BLOCK ? nope : at + RQ_FP8_BLOCK;
    const uint32_t byte = scales[n];
#if defined(__AVX512BW__)
    // 2^-9 * 2^(byte-127) to 448 * 2^(byte-127) are normal bf16 numbers: the scale goes into the exponent by an addition.
    if (byte > 9 && byte < 240) {
      const __m512i low = _mm512_set1_epi16(0x7F), nan = _mm512_set1_epi16(0x7FC0), bias = _mm512_set1_epi16(120 << 7);
      const __m512i small = _mm512_castsi128_si512(  // m * 2^-9, m = 0..7
          _mm_setr_epi16(0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60));
      const __m512i by = _mm512_set1_epi16((short)(((int32_t)byte - 127) * 128));
      for (; at < end; at += 32) {
        const int32_t n = end - at < 32 ? end - at : 32;
        const __m256i raw = n == 32 ? _mm256_loadu_si256((const __m256i *)(row + at))
                                    : _mm256_maskz_loadu_epi8((__mmask32)((1u << n) - 1), row + at);
        const __m512i code = _mm512_cvtepu8_epi16(raw), magnitude = _mm512_and_si512(code, low);
        const __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
        __m512i v = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), bias);
        v = _mm512_mask_permutexvar_epi16(v, subnormal, magnitude, small);
        v = _mm512_mask_add_epi16(v, _mm512_test_epi16_mask(magnitude, magnitude), v, by);
        v = _mm512_mask_mov_epi16(v, _mm512_cmpeq_epi16_mask(magnitude, low), nan);
        v = _mm512_or_si512(v, _mm512_slli_epi16(_mm512_andnot_si512(low, code), 8));
        if (n == 32)
          _mm512_storeu_si512(out + at, v);
        else
          _mm512_mask_storeu_epi16(out + at, (__mmask32)((1u << n) - 1), v);
      }
      at = end;
      continue;
    }
#endif
    const float scale = scale_of(byte);
    for (; at < end; at++) out[at] = to_bf16(E4M3.at[row[at]] * scale);
  }
  memcpy(out + nope, pair, (size_t)rope * 2);  // little-endian, as every level of this library
}

}  // namespace RQ_NS
