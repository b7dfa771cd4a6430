// gemm.cpp: see gemm.h. Compiled once per level.
//
// A sum is a vector of lanes that each add every VL-th product (RQ_DOT: pairs of bf16 products), k ascending in the
// type's order, then the lanes in the fixed tree of total(). Few rows take packed weights from registers as they are
// decoded (direct); more rows share a panel of decoded weights; fp32 and bf16 are read in place (tiles). All add the same
// numbers in the same order, the zeros that pad a row included.
#include "gemm.h"

#include "gemm_weights.h"

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t padded(int64_t k) { return (k + CHUNK - 1) / CHUNK * CHUNK; }

#if defined(__AVX512F__)
enum { TILE_ROWS = 6 };  // rows of x that share weights in registers, with four outputs each
#else
enum { TILE_ROWS = 3 };
#endif
enum { GROUP = 8, PANEL_BYTES = 1 << 17, ROWS_BYTES = 3 << 17 };

#if defined(RQ_DOT)
inline int64_t decoded(int64_t k) { return padded(k); }  // how much of a row decode() writes
#else
inline int64_t decoded(int64_t k) { return k; }
#endif

// Units from row to row: an odd number of cache lines, so that the rows of a tile do not meet in one set of L1.
inline int64_t pitch(int64_t k) { return padded(k) + 64 / (int64_t)sizeof(Unit); }

// Rows of x that are prepared together; weight rows that are decoded together.
inline int64_t block_rows(int64_t k) {
  const int64_t row = pitch(k) * (int64_t)sizeof(Unit);
  return least(96, (ROWS_BYTES / row + TILE_ROWS) / TILE_ROWS * TILE_ROWS);
}
inline int64_t panel_rows(int64_t k) {
  return least(64, (PANEL_BYTES / (pitch(k) * (int64_t)sizeof(Unit)) + GROUP) / GROUP * GROUP);
}

// Sums of four vectors; a lane's place in the tree is one, whatever stands beside it.
inline v4 total(vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return fold(_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE)));
#else
  return sum4(a, b, c, d);
#endif
}

inline void keep(v4 sums, float *to, int64_t valid) {
  if (valid >= 4)
    memcpy(to, &sums, sizeof sums);
  else
    for (int64_t i = 0; i < valid; i++) to[i] = sums[i];
}

// To L2: a core has few lines on their way to L1 (into L1 it is half as fast here, and no faster than without).
inline void fetch(const void *at, int64_t ahead) {
  __builtin_prefetch((const void *)((uintptr_t)at + (uintptr_t)ahead), 0, 2);
}

// What to fetch while byte j of rows in groups of G is read: FAR further in the row, at its end in the next group's row.
struct Ahead {
  enum { FAR = 2048 };
  int64_t turn, next;
  Ahead(int64_t bytes, int64_t group)
      : turn(bytes > FAR ? bytes - FAR : 0),
        next(bytes > FAR ? FAR + (group - 1) * bytes : FAR / bytes * group * bytes) {}
  int64_t at(int64_t j) const { return j + (j < turn ? (int64_t)FAR : next); }
};

inline vf piece(const float *p) { return load(p); }
inline vf piece(const float *p, int n) { return load_part(p, n); }
inline vf add(vf w, vf x, vf sum) { return fma(w, x, sum); }
inline int piece_size(const float *) { return VL; }

#if defined(RQ_DOT)
inline __m512i piece(const uint16_t *p) { return _mm512_loadu_si512(p); }
inline __m512i piece(const uint16_t *p, int n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }
inline __m512 add(__m512i w, __m512i x, __m512 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
inline int piece_size(const uint16_t *) { return 32; }
#endif

// y[r][i] = w[i] . x[r] for G weight rows (the first `valid` of them wanted) and R rows. `ahead`: fetch, too, or null.
template <int G, int R, class T>
inline void tile(const T *const *w, const T *x, int64_t x_step, int64_t k, const Ahead *ahead, float *y, int64_t y_step,
                 int64_t valid) {
  vf acc[R][G];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < G; i++) acc[r][i] = zero();
  const int size = piece_size(x);
  int64_t j = 0;
  for (; j + size <= k; j += size) {
    if (ahead) {
      const int64_t next = ahead->at(j * (int64_t)sizeof(T));
#pragma GCC unroll 8
      for (int i = 0; i < G; i++) fetch(w[i], next);
    }
    decltype(piece(x)) wv[G];
#pragma GCC unroll 8
    for (int i = 0; i < G; i++) wv[i] = piece(w[i] + j);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const auto xv = piece(x + r * x_step + j);
#pragma GCC unroll 8
      for (int i = 0; i < G; i++) acc[r][i] = add(wv[i], xv, acc[r][i]);
    }
  }
  if (j < k) {
    const int n = (int)(k - j);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const auto xv = piece(x + r * x_step + j, n);
#pragma GCC unroll 8
      for (int i = 0; i < G; i++) acc[r][i] = add(piece(w[i] + j, n), xv, acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < G; i += 4)
      keep(total(acc[r][i], acc[r][i + 1], acc[r][i + 2], acc[r][i + 3]), y + r * y_step + i, valid - i);
}

#if defined(RQ_DOT)

// Packed rows that lie one after another; FP8: with one row of scales.
struct Packed {
  const uint8_t *codes, *scales;
  int64_t step, scale_step;
  Packed(const RqMatrix &w, int64_t k, int64_t o)
      : codes(row_at(w, k, o)), scales(scales_at(w, k, o)), step(row_bytes(w, k)), scale_step((k + 31) / 32) {}
};

// use(i, j, v): 32 weights of row i from j on, for G rows, j ascending.
template <int BLOCK, int G, class Use>
inline void walk_fp8(const Packed &p, int64_t k, const Use &use) {
  const Ahead ahead(p.step, G);
  for (int64_t block = 0; block < k; block += BLOCK < CHUNK ? (int)CHUNK : BLOCK) {
    const uint8_t *scale = p.scales + block / BLOCK;
    const Fp8Table first(*scale), second(scale[BLOCK < CHUNK && block + BLOCK < k]);  // the same one if there is no next
    const int64_t end = least(k, block + (BLOCK < CHUNK ? (int)CHUNK : BLOCK));
    for (int64_t j = block; j < end; j += CHUNK) {
      const __mmask64 valid = k - j < CHUNK ? (1ull << (k - j)) - 1 : ~0ull;
      const uint8_t *at = p.codes + j;
      const int64_t next = ahead.at(j) - j;
#pragma GCC unroll 8
      for (int i = 0; i < G; i++) {
        fetch(at + i * p.step, next);
        const __m512i codes = _mm512_maskz_loadu_epi8(valid, at + i * p.step);
        const Pair pair = BLOCK < CHUNK ? fp8_decode(codes, first, second) : fp8_decode(codes, first);
        use(i, j, pair.a);
        use(i, j + 32, pair.b);
      }
    }
  }
}

// The same for FP4.
template <int G, class Use>
inline void walk_fp4(const Packed &p, int64_t k, const Use &use) {
  const Ahead ahead(p.step, G);
  const uint8_t *at = p.codes, *scale = p.scales;
  int64_t j = 0;
  for (; j + 32 <= k; j += 32, at += 16, scale++) {
    if (!(j & 96)) {
      const int64_t next = ahead.at(j / 2) - j / 2;
#pragma GCC unroll 8
      for (int i = 0; i < G; i++) fetch(at + i * p.step, next);
    }
#pragma GCC unroll 8
    for (int i = 0; i < G; i++)
      use(i, j, fp4_decode(_mm_loadu_si128((const __m128i *)(at + i * p.step)), scale[i * p.scale_step]));
  }
  if (j < k) {
    const __mmask16 valid = (__mmask16)((1u << ((k - j) / 2)) - 1);
#pragma GCC unroll 8
    for (int i = 0; i < G; i++)
      use(i, j, fp4_decode(_mm_maskz_loadu_epi8(valid, at + i * p.step), scale[i * p.scale_step]));
  }
  if (k % CHUNK && k % CHUNK <= 32)  // the second half of the last chunk
#pragma GCC unroll 8
    for (int i = 0; i < G; i++) use(i, k / CHUNK * CHUNK + 32, _mm512_setzero_si512());
}

template <int G, class Use>
inline void walk(const RqMatrix &w, int64_t k, int64_t o, const Use &use) {
  const Packed p(w, k, o);
  if (w.type == RQ_FP4) return walk_fp4<G>(p, k, use);
  w.block == 32 ? walk_fp8<32, G>(p, k, use) : walk_fp8<128, G>(p, k, use);
}

// Whether walk() may take the G rows from o on together, of `left`.
template <int G>
inline bool together(const RqMatrix &w, int64_t o, int64_t left) {
  return left >= G && (w.type != RQ_FP8 || o % w.block + G <= w.block);
}

// G packed rows times R prepared ones.
template <int G, int R>
inline void direct_rows(const RqMatrix &w, int64_t k, int64_t o, const Unit *const *x, float *const *y) {
  __m512 acc[R][G < 4 ? 4 : G];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < (G < 4 ? 4 : G); i++) acc[r][i] = zero();
  walk<G>(w, k, o, [&](int i, int64_t j, __m512i v) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r][i] = add(v, piece(x[r] + j), acc[r][i]);
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < G; i += 4)
      keep(total(acc[r][i], acc[r][i + 1], acc[r][i + 2], acc[r][i + 3]), y[r] + i, G);
}

// G packed rows times `rows` prepared ones, R at a time; those that are missing are the last one again.
template <int G, int R>
inline void direct_blocks(const RqMatrix &w, int64_t k, int64_t o, const Unit *x, int64_t rows, float *y, int64_t y_step) {
  for (int64_t r = 0; r < rows; r += R) {
    const Unit *from[R];
    float *to[R];
    for (int i = R - 1; i >= 0; i--) {
      from[i] = x + least(r + i, rows - 1) * pitch(k);
      to[i] = y + least(r + i, rows - 1) * y_step;
    }
    direct_rows<G, R>(w, k, o, from, to);
  }
}

template <int G, int R>
void direct(const RqMatrix &w, int64_t k, int64_t first, int64_t outputs, const Unit *x, int64_t rows, float *y,
            int64_t y_step) {
  for (int64_t o = 0; o < outputs;) {
    const bool all = together<G>(w, first + o, outputs - o);
    all ? direct_blocks<G, R>(w, k, first + o, x, rows, y + o, y_step)
        : direct_blocks<1, R>(w, k, first + o, x, rows, y + o, y_step);
    o += all ? G : 1;
  }
}

// Few rows: a panel would cost more than it saves. rows <= MOST_DIRECT.
enum { MOST_DIRECT = 8 };
void direct(const RqMatrix &w, int64_t k, int64_t first, int64_t outputs, const Unit *x, int64_t rows, float *y,
            int64_t y_step) {
  switch (rows) {
    case 1: return direct<8, 1>(w, k, first, outputs, x, rows, y, y_step);
    case 2: return direct<8, 2>(w, k, first, outputs, x, rows, y, y_step);
    case 3:
    case 4:
    case 7:
    case 8: return direct<4, 4>(w, k, first, outputs, x, rows, y, y_step);
    default: return direct<4, 6>(w, k, first, outputs, x, rows, y, y_step);
  }
}

// Packed weights as bf16, [outputs][pitch(k)].
void decode(const RqMatrix &w, int64_t k, int64_t first, int64_t outputs, Unit *panel) {
  const int64_t kp = pitch(k);
  const auto put = [&](int i, int64_t j, __m512i v) { _mm512_storeu_si512(panel + i * kp + j, v); };
  for (int64_t o = 0; o < outputs;) {
    const bool all = together<4>(w, first + o, outputs - o);
    all ? walk<4>(w, k, first + o, put) : walk<1>(w, k, first + o, put);
    o += all ? 4 : 1;
    panel += (all ? 4 : 1) * kp;
  }
}

#else  // fp32 products

// Weights as fp32 in pieces of VL, j ascending: use(i, j, values, how many of them count).
template <int TYPE, int G, class Use>
inline void walk(const RqMatrix &w, int64_t k, int64_t o, int64_t valid, const Use &use) {
  const uint8_t *rows[G], *scales[G];
  for (int i = 0; i < G; i++) {
    const int64_t row = o + (i < valid ? i : valid - 1);
    rows[i] = row_at(w, k, row);
    scales[i] = scales_at(w, k, row);
  }
  const int shift = TYPE == RQ_FP8 && w.block == 128 ? 7 : 5;
  for (int64_t block = 0; block < k; block += 32) {
    const int64_t end = least(k, block + 32);
#pragma GCC unroll 8
    for (int i = 0; i < G; i++) {
      const vf scale = splat(TYPE == RQ_BF16 ? 1.0f : ue8m0(scales[i][block >> shift]));
      int64_t j = block;
      for (; j + VL <= end; j += VL) {
        const vf v = values<TYPE>(rows[i] + code_bytes<TYPE>(j));
        use(i, j, TYPE == RQ_BF16 ? v : v * scale, (int)VL);
      }
      if (j < end) {
        const vf v = values_part<TYPE>(rows[i] + code_bytes<TYPE>(j), (int)(end - j));
        use(i, j, TYPE == RQ_BF16 ? v : v * scale, (int)(end - j));
      }
    }
  }
}

template <int TYPE>
void direct(const RqMatrix &w, int64_t k, int64_t first, int64_t outputs, const Unit *x, float *y) {
  for (int64_t o = 0; o < outputs; o += GROUP) {
    const int64_t n = least(GROUP, outputs - o);
    vf acc[GROUP];
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i++) acc[i] = zero();
    walk<TYPE, GROUP>(w, k, first + o, n,
                      [&](int i, int64_t j, vf values, int) { acc[i] = fma(values, load(x + j), acc[i]); });
    keep(total(acc[0], acc[1], acc[2], acc[3]), y + o, n);
    keep(total(acc[4], acc[5], acc[6], acc[7]), y + o + 4, n - 4);
  }
}

template <int TYPE>
void decode(const RqMatrix &w, int64_t k, int64_t first, int64_t outputs, Unit *panel) {
  for (int64_t o = 0; o < outputs; o++)
    walk<TYPE, 1>(w, k, first + o, 1, [&](int, int64_t j, vf values, int) { store(panel + o * pitch(k) + j, values); });
}

enum { MOST_DIRECT = 1 };
void direct(const RqMatrix &w, int64_t k, int64_t first, int64_t outputs, const Unit *x, int64_t, float *y, int64_t) {
  if (w.type == RQ_BF16) return direct<RQ_BF16>(w, k, first, outputs, x, y);
  w.type == RQ_FP8 ? direct<RQ_FP8>(w, k, first, outputs, x, y) : direct<RQ_FP4>(w, k, first, outputs, x, y);
}

void decode(const RqMatrix &w, int64_t k, int64_t first, int64_t outputs, Unit *panel) {
  if (w.type == RQ_BF16) return decode<RQ_BF16>(w, k, first, outputs, panel);
  w.type == RQ_FP8 ? decode<RQ_FP8>(w, k, first, outputs, panel) : decode<RQ_FP4>(w, k, first, outputs, panel);
}

#endif

template <int R, class T>
inline void tile_group(const T *const *w, const T *x, int64_t x_step, int64_t k, const Ahead *ahead, float *y,
                       int64_t y_step, int64_t valid) {
  if (R <= TILE_ROWS / 2) return tile<GROUP, R>(w, x, x_step, k, ahead, y, y_step, valid);
  tile<4, R>(w, x, x_step, k, ahead, y, y_step, valid);
  if (valid > 4) tile<4, R>(w + 4, x, x_step, k, ahead, y + 4, y_step, valid - 4);
}

// y[r][o] = w[o] . x[r] for rows that are ready for use: fp32, or units in the same order of k.
template <class T>
void tiles(const T *w, int64_t w_step, int64_t outputs, const T *x, int64_t x_step, int64_t rows, int64_t k, float *y,
           int64_t y_step) {
  const Ahead far(w_step * (int64_t)sizeof(T), rows <= TILE_ROWS / 2 ? GROUP : 4);
  for (int64_t o = 0; o < outputs; o += GROUP) {
    const int64_t valid = least(GROUP, outputs - o);
    const T *group[GROUP];
    for (int i = 0; i < GROUP; i++) group[i] = w + (o + (i < valid ? i : valid - 1)) * w_step;
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const T *from = x + r * x_step;
      const Ahead *ahead = r ? nullptr : &far;
      float *to = y + r * y_step + o;
      switch (least(TILE_ROWS, rows - r)) {
        case 1: tile_group<1>(group, from, x_step, k, ahead, to, y_step, valid); break;
        case 2: tile_group<2>(group, from, x_step, k, ahead, to, y_step, valid); break;
        case 3: tile_group<3>(group, from, x_step, k, ahead, to, y_step, valid); break;
#if defined(__AVX512F__)
        case 4: tile_group<4>(group, from, x_step, k, ahead, to, y_step, valid); break;
        case 5: tile_group<5>(group, from, x_step, k, ahead, to, y_step, valid); break;
        case 6: tile_group<6>(group, from, x_step, k, ahead, to, y_step, valid); break;
#endif
      }
    }
  }
}

}  // namespace

namespace RQ_NS {

int64_t matmul_scratch(int64_t k) { return (block_rows(k) + panel_rows(k)) * pitch(k) * (int64_t)sizeof(Unit); }

void matmul(const RqMatrix *w, int64_t k, int64_t first, int64_t outputs, const float *x, int64_t x_step, int64_t rows,
            float *y, int64_t y_step, void *scratch) {
  const int64_t step = pitch(k), deep = panel_rows(k), units = block_rows(k) * step;
  Unit *prepared = (Unit *)scratch, *panel = prepared + units;
  if (w->type == RQ_F32) {
    const float *weights = (const float *)w->data + first * k;
    if (rows <= TILE_ROWS) return tiles(weights, k, outputs, x, x_step, rows, k, y, y_step);
    // Copied to rows an odd number of cache lines apart, as pitch() says.
    const int64_t wide = (k + 31) / 32 * 32 + 16, block = units * (int64_t)sizeof(Unit) / (wide * 4);
    float *copy = (float *)scratch;
    for (int64_t r = 0; r < rows; r += block) {
      const int64_t n = least(block, rows - r);
      for (int64_t i = 0; i < n; i++) memcpy(copy + i * wide, x + (r + i) * x_step, (size_t)k * sizeof(float));
      tiles(weights, k, outputs, (const float *)copy, wide, n, k, y + r * y_step, y_step);
    }
    return;
  }
  for (int64_t r = 0; r < rows; r += block_rows(k)) {
    const int64_t n = least(block_rows(k), rows - r);
    float *to = y + r * y_step;
    for (int64_t i = 0; i < n; i++) prepare(w->type, x + (r + i) * x_step, k, padded(k), prepared + i * step);
#if defined(RQ_DOT)
    if (w->type == RQ_BF16) {
      tiles((const Unit *)w->data + first * k, k, outputs, (const Unit *)prepared, step, n, k, to, y_step);
      continue;
    }
#endif
    if (n <= MOST_DIRECT) {
      direct(*w, k, first, outputs, prepared, n, to, y_step);
      continue;
    }
    for (int64_t o = 0; o < outputs; o += deep) {
      const int64_t m = least(deep, outputs - o);
      decode(*w, k, first + o, m, panel);
      tiles((const Unit *)panel, step, m, (const Unit *)prepared, step, n, decoded(k), to + o, y_step);
    }
  }
}

}  // namespace RQ_NS

#define RQ_JOIN(a, b) a##b
#define RQ_NAME(level) RQ_JOIN(rq_gemm_, level)
extern const RqGemm RQ_NAME(RQ_LEVEL);
const RqGemm RQ_NAME(RQ_LEVEL) = {RQ_NS::matmul_scratch, RQ_NS::matmul};

#if defined(RQ_FIRST)
#if defined(__x86_64__)
extern const RqGemm rq_gemm_avx2, rq_gemm_avx512, rq_gemm_avx512_bf16;
#endif

extern "C" const RqGemm *rq_gemm(int32_t level) {
  switch (level) {
    case 0: return &rq_gemm_portable;
#if defined(__x86_64__)
    case 1: return &rq_gemm_avx2;
    case 2: return &rq_gemm_avx512;
    case 3: return &rq_gemm_avx512_bf16;
#endif
    default: return nullptr;
  }
}
#endif
