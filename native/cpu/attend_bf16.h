// attend_bf16.h: the bf16 tiles of attend.cpp (level avx512_bf16): pairs of dims in QK, pairs of keys in PV, fp32 sums.
//
// A lane adds pair by pair in ascending order whatever the tile, so a result does not depend on the tile it came from.
// Letters: C columns (heads), V vectors of columns or dims, R rows or heads of a tile.
#pragma once
#include "attend.h"
#include "lanes.h"
#include "rows.h"

#if defined(__AVX512BF16__)

namespace {

using namespace RQ_NS;

inline __m512i broadcast_pair(const void *p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}

inline __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

inline uint16_t bf16_of(float x) {
  const __m128bh b = _mm_cvtneps_pbh(_mm_set_ss(x));
  uint16_t out;
  memcpy(&out, &b, 2);
  return out;
}

// q as pairs of dims [D/2][C].
void turn_q_pairs(const float *q, int64_t count, int64_t width, int64_t c, uint32_t *out) {
  for (int64_t d = 0; d < width; d += 2)
    for (int64_t h = 0; h < c; h++) {
      const float *x = q + h * width + d;
      const uint32_t low = h < count ? bf16_of(x[0]) : 0, high = h < count && d + 1 < width ? bf16_of(x[1]) : 0;
      out[d / 2 * c + h] = low | high << 16;
    }
}

// bf16 [wide] of a row, zeros from width on.
inline void row_to_bf16(const RqAttend &job, const void *row, int own, int64_t wide, uint16_t *out) {
  if (own) {
    const float *x = (const float *)row;
    int64_t d = 0;
    for (; d + 16 <= job.width; d += 16) {
      const __m256bh b = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + d));
      memcpy(out + d, &b, 32);
    }
    for (; d < job.width; d++) out[d] = bf16_of(x[d]);
  } else {
    entry_to_bf16((const uint8_t *)row, job.width, job.rope, out);
  }
  for (int64_t d = job.width; d < wide; d++) out[d] = 0;
}

// Rows a and b (bf16 [wide]; null: zeros) to pairs, in panels of 64 dims `panel` apart.
inline void pair_rows(const uint16_t *a, const uint16_t *b, int64_t wide, int64_t panel, uint32_t *out) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < wide; d += 64) {
    const __m512i a0 = _mm512_loadu_si512(a + d), a1 = _mm512_loadu_si512(a + d + 32);
    const __m512i b0 = b ? _mm512_loadu_si512(b + d) : _mm512_setzero_si512();
    const __m512i b1 = b ? _mm512_loadu_si512(b + d + 32) : _mm512_setzero_si512();
    uint32_t *to = out + d / 64 * panel;
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a0, low, b0));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a0, high, b0));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a1, low, b1));
    _mm512_storeu_si512(to + 48, _mm512_permutex2var_epi16(a1, high, b1));
  }
}

template <int V, int R>
inline void dots_bf16(const uint32_t *q, int64_t c, int64_t half, const uint16_t *const *rows, float *sums) {
  __m512 acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[r][v] = _mm512_setzero_ps();
  for (int64_t d = 0; d < half; d++) {
    __m512i x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) x[v] = _mm512_loadu_si512(q + d * c + v * 16);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const __m512i k = broadcast_pair(rows[r] + 2 * d);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = dot_pairs(acc[r][v], x[v], k);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) _mm512_storeu_ps(sums + r * c + v * 16, acc[r][v]);
}

inline __m256 dot_pairs_8(__m256 acc, __m256i a, const uint16_t *p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return _mm256_dpbf16_ps(acc, (__m256bh)a, (__m256bh)_mm256_set1_epi32(pair));
}

template <int R>
inline void dots_bf16_8(const uint32_t *q, int64_t half, const uint16_t *const *rows, float *sums) {  // 8 columns
  __m256 acc[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) acc[r] = _mm256_setzero_ps();
  int64_t d = 0;
  for (; d + 4 <= half; d += 4) {  // four at a time: R addresses do not fit the registers beside the rest
    __m256i x[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) x[u] = _mm256_loadu_si256((const __m256i *)(q + (d + u) * 8));
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const uint16_t *row = rows[r] + 2 * d;
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) acc[r] = dot_pairs_8(acc[r], x[u], row + 2 * u);
    }
  }
  for (; d < half; d++) {
    const __m256i x = _mm256_loadu_si256((const __m256i *)(q + d * 8));
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) acc[r] = dot_pairs_8(acc[r], x, rows[r] + 2 * d);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) _mm256_storeu_ps(sums + r * 8, acc[r]);
}

template <int V, int R>
inline void dots_bf16_rows(const uint32_t *q, int64_t c, int64_t half, const uint16_t *const *rows, int64_t n,
                           float *sums) {
  int64_t k = 0;
  for (; k + R <= n; k += R) dots_bf16<V, R>(q, c, half, rows + k, sums + k * c);
  for (; k + 2 <= n; k += 2) dots_bf16<V, 2>(q, c, half, rows + k, sums + k * c);
  for (; k < n; k++) dots_bf16<V, 1>(q, c, half, rows + k, sums + k * c);
}

void qk_bf16(const uint32_t *q, int64_t c, int64_t half, const uint16_t *const *rows, int64_t n, float *sums) {
  int64_t k = 0, at = 0;
  if (c == 8) {
    for (; k + 12 <= n; k += 12) dots_bf16_8<12>(q, half, rows + k, sums + k * 8);
    for (; k + 4 <= n; k += 4) dots_bf16_8<4>(q, half, rows + k, sums + k * 8);
    for (; k < n; k++) dots_bf16_8<1>(q, half, rows + k, sums + k * 8);
    return;
  }
  for (; at + 64 <= c; at += 64) dots_bf16_rows<4, 6>(q + at, c, half, rows, n, sums + at);
  for (; at + 32 <= c; at += 32) dots_bf16_rows<2, 8>(q + at, c, half, rows, n, sums + at);
  for (; at < c; at += 16) dots_bf16_rows<1, 8>(q + at, c, half, rows, n, sums + at);
}

// As soften<16>, leaving the weights rounded to bf16, a pair of keys in a word [ceil(n/2)][C]; totals are of the rounded.
void soften_bf16(float *sums, int64_t c, int64_t n, float *top, float *total) {
  const __m512i mask = _mm512_set1_epi32((int)0xFFFF0000u);
  for (int64_t at = 0; at < c; at += 16) {
    F<16> m = Lanes<16>::splat(-INFINITY), t = Lanes<16>::splat(0.0f);
    for (int64_t k = 0; k < n; k++) m = larger_lanes<16>(load<16>(sums + k * c + at), m);
    const F<16> base = m == -INFINITY ? Lanes<16>::splat(0.0f) : m;
    for (int64_t k = 0; k < n; k += 2) {
      const F<16> a = exp_lanes<16>(load<16>(sums + k * c + at) - base);
      const F<16> b = k + 1 < n ? exp_lanes<16>(load<16>(sums + (k + 1) * c + at) - base) : Lanes<16>::splat(0.0f);
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b)), 16);
      const __m512i pair = _mm512_or_si512(low, high);
      t = t + (F<16>)_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
      t = t + (F<16>)_mm512_castsi512_ps(_mm512_and_si512(pair, mask));
      _mm512_storeu_si512((uint32_t *)sums + k / 2 * c + at, pair);
    }
    store<16>(top + at, m);
    store<16>(total + at, t);
  }
}

// The same for 8 columns, two keys in a vector.
void soften_bf16_8(float *sums, int64_t n, float *top, float *total) {
  F<8> m = Lanes<8>::splat(-INFINITY), t = Lanes<8>::splat(0.0f);
  for (int64_t k = 0; k < n; k++) m = larger_lanes<8>(load<8>(sums + k * 8), m);
  const F<8> base = m == -INFINITY ? Lanes<8>::splat(0.0f) : m;
  const __m512 both = _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd((__m256)base)));
  for (int64_t k = 0; k < n; k += 2) {
    const __m512 x = k + 1 < n ? _mm512_loadu_ps(sums + k * 8)
                               : _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), 0xFF, sums + k * 8);
    const F<16> e = exp_lanes<16>((F<16>)_mm512_sub_ps(x, both));
    const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)e);
    const __m128i a = _mm256_castsi256_si128(half), b = _mm256_extracti128_si256(half, 1);
    t = t + (F<8>)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
    t = t + (F<8>)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16));
    const __m256i pair = _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
    _mm256_storeu_si256((__m256i *)((uint32_t *)sums + k / 2 * 8), pair);
  }
  store<8>(top, m);
  store<8>(total, t);
}

template <int V, int R>
inline void blend_bf16(const uint32_t *weights, int64_t c, const uint32_t *pairs, int64_t n, int first,
                       const float *keep, const float *add, float *out, int64_t width, int64_t left) {
  __m512 acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < n; k++) {
    __m512i x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) x[v] = _mm512_loadu_si512(pairs + k * 64 + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512i w = broadcast_pair(weights + k * c + r);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = dot_pairs(acc[r][v], x[v], w);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const int64_t lanes = left - v * 16;
      if (lanes <= 0) continue;
      const __mmask16 mask = lanes >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << lanes) - 1);
      float *to = out + r * width + v * 16;
      __m512 sum = _mm512_mul_ps(acc[r][v], _mm512_set1_ps(add[r]));
      if (!first) sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, to), _mm512_set1_ps(keep[r]), sum);
      _mm512_mask_storeu_ps(to, mask, sum);
    }
}

void pv_bf16(const uint32_t *weights, int64_t c, const uint32_t *pairs, int64_t n, int first, const float *keep,
             const float *add, int64_t heads, float *out, int64_t width) {
  for (int64_t at = 0; at < width; at += 64) {
    const uint32_t *panel = pairs + at / 64 * (RQ_PART / 2 * 64);
    int64_t h = 0;
    for (; h + 6 <= heads && h + 8 != heads; h += 6)
      blend_bf16<4, 6>(weights + h, c, panel, n, first, keep + h, add + h, out + h * width + at, width, width - at);
    for (; h + 4 <= heads; h += 4)
      blend_bf16<4, 4>(weights + h, c, panel, n, first, keep + h, add + h, out + h * width + at, width, width - at);
    for (; h + 2 <= heads; h += 2)
      blend_bf16<4, 2>(weights + h, c, panel, n, first, keep + h, add + h, out + h * width + at, width, width - at);
    for (; h < heads; h++)
      blend_bf16<4, 1>(weights + h, c, panel, n, first, keep + h, add + h, out + h * width + at, width, width - at);
  }
}

}  // namespace

#endif
