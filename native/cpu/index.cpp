// index.cpp: see index.h. Keys go by 64: unpacked once, turned so that lanes are keys, scored for every query.
//
// A lane adds its heads in ascending order, so scores need no sums across lanes and no row of them is kept.
// fp32 (RQ_EXACT, and RQ_PACKED at levels without VNNI): keys as [width][64], heads' queries broadcast.
// int8 (level avx512_bf16, RQ_PACKED): an e2m1 code doubled is an integer of at most 12. Where the scales of a key's
// (a query head's) blocks lie within 2^3 of each other they are shifted into the integers, and one integer dot product
// and one scale do: |q.k| <= 128 * 96 * 96 < 2^24 is exact in fp32. Keys and queries whose scales differ more go the
// fp32 way. Which way a score goes depends on its query and its key only.
// Bound: 2 * heads * width operations a key; each key is read once for up to RQ_INDEX_BLOCK queries.
#include "index.h"

#include "lanes.h"
#include "rows.h"

namespace {

using namespace RQ_NS;

enum { GROUP = 64 };  // keys scored at a time

#if defined(__AVX512VNNI__)
enum { HAS_VNNI = 1 };
#else
enum { HAS_VNNI = 0 };
#endif

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- the best so far -------------------------------------------------------------------------------------------------

// Order of torch.sort(descending, stable) as one number, smaller is better: NaN first, by value, ties to the lower entry.
inline uint64_t rank(float score, uint32_t entry) {
  const float v = score + 0.0f;  // -0 ties with 0
  uint32_t bits;
  memcpy(&bits, &v, 4);
  bits = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  if (score != score) bits = 0xFFFFFFFFu;
  return ((uint64_t)~bits << 32) | entry;
}

inline float score_of(uint64_t rank) {
  uint32_t bits = ~(uint32_t)(rank >> 32);
  bits = (bits & 0x80000000u) ? (bits & 0x7FFFFFFFu) : ~bits;
  float v;
  memcpy(&v, &bits, 4);
  return v;  // bits 0xFFFFFFFF: 0x7FFFFFFF, a NaN
}

// Leaves the k + 1 smallest of distinct numbers in front, the (k+1)-th of them at a[k].
void select(uint64_t *a, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const uint64_t x = a[low], y = a[low + (high - low) / 2], z = a[high];
    const uint64_t pivot = x < y ? (y < z ? y : (x < z ? z : x)) : (x < z ? x : (y < z ? z : y));
    int64_t i = low, j = high;
    while (i <= j) {
      while (a[i] < pivot) i++;
      while (a[j] > pivot) j--;
      if (i <= j) {
        const uint64_t t = a[i];
        a[i++] = a[j];
        a[j--] = t;
      }
    }
    if (k <= j)
      high = j;
    else if (k >= i)
      low = i;
    else
      break;
  }
}

// Ascending, by bytes; the numbers end in `a`.
void sort(uint32_t *a, uint32_t *other, int64_t n) {
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t at[256] = {0}, sum = 0;
    for (int64_t i = 0; i < n; i++) at[a[i] >> shift & 255]++;
    for (int b = 0; b < 256; b++) {
      const int64_t count = at[b];
      at[b] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; i++) other[at[a[i] >> shift & 255]++] = a[i];
    uint32_t *t = a;
    a = other;
    other = t;
  }
}

inline int64_t keep_of(int64_t top_k) { return 2 * top_k + GROUP; }

struct Best {  // candidates of one query
  uint64_t *ranks;  // [keep_of(top_k)]
  int64_t count, top_k;
  uint64_t worst;  // a candidate must rank before it
  float floor;     // and score above it, or be NaN; NaN: every score passes

  void begin(int64_t k) { count = 0, top_k = k, worst = UINT64_MAX, floor = NAN; }

  void cut() {
    if (count <= top_k) return;
    select(ranks, count, top_k - 1);
    count = top_k;
    worst = ranks[top_k - 1];
    floor = score_of(worst);
  }

  inline void push(float score, int64_t entry) {
    const uint64_t r = rank(score, (uint32_t)entry);
    if (r < worst) ranks[count++] = r;
  }

  void take(const float *scores, int64_t first, int64_t n) {  // n <= GROUP
#if defined(__AVX512F__)
    const __m512 low = _mm512_set1_ps(floor);
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 valid = n - i >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << (n - i)) - 1);
      uint32_t mask = _mm512_mask_cmp_ps_mask(valid, _mm512_loadu_ps(scores + i), low, _CMP_NLE_UQ);
      for (; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        push(scores[i + lane], first + i + lane);
      }
    }
#else
    for (int64_t i = 0; i < n; i++)
      if (!(scores[i] <= floor)) push(scores[i], first + i);
#endif
    if (count + GROUP > keep_of(top_k)) cut();
  }
};

// --- keys and queries ------------------------------------------------------------------------------------------------

struct Query {
  float *q;          // [heads][width], rotated and rounded
  const float **at;  // [heads], its rows
  const float *weights;
  int8_t *codes;    // int8: [heads][width], doubled codes shifted to one scale, in the order of the key tile
  int32_t *offset;  // int8: [heads], -128 * sum of codes
  float *scaled;    // int8: [heads], weight times the head's scale
  int32_t narrow;   // int8 serves
  Best best;

  void lay(Cut &cut, const RqIndex &job) {
    q = cut.take<float>((int64_t)job.heads * job.width);
    at = cut.take<const float *>(job.heads);
    const int64_t n = HAS_VNNI && job.format == RQ_PACKED ? job.heads : 0;
    codes = cut.take<int8_t>(n * job.width);
    offset = cut.take<int32_t>(n);
    scaled = cut.take<float>(n);
    best.ranks = cut.take<uint64_t>(keep_of(job.top_k));
  }
};

struct Place {
  Query queries[RQ_INDEX_BLOCK];
  float *columns;  // fp32 keys [width][GROUP]
  float *sums;     // [heads][GROUP]
  float *row;      // [width]
  uint8_t *bytes8;  // int8: [width/4][GROUP][4], doubled codes shifted, plus 128
  float *scale;     // int8: [GROUP] of the keys
  float *scores, *other;  // [GROUP]
  uint32_t *order;        // [top_k]
  uint8_t *packed;        // one key's bytes
  int64_t bytes;

  Place(const RqIndex &job, void *scratch, int64_t queries_here) {
    Cut cut{(char *)scratch, 0};
    columns = cut.take<float>((int64_t)job.width * GROUP);
    sums = cut.take<float>((int64_t)job.heads * GROUP);
    row = cut.take<float>(job.width);
    bytes8 = cut.take<uint8_t>(HAS_VNNI && job.format == RQ_PACKED ? (int64_t)job.width * GROUP : 0);
    scale = cut.take<float>(GROUP);
    scores = cut.take<float>(GROUP);
    other = cut.take<float>(GROUP);
    order = cut.take<uint32_t>(job.top_k);
    packed = cut.take<uint8_t>(key_bytes(job.format, job.width));
    for (int64_t i = 0; i < queries_here; i++) queries[i].lay(cut, job);
    bytes = cut.used;
  }
};

// Dims that the int8 tile takes at a time: 128, or all of a narrower key.
inline int32_t part_of(int32_t width) { return width < 128 ? width : 128; }

inline bool in_int8(const RqIndex &job) {
  const int32_t width = job.width;
  return HAS_VNNI && job.format == RQ_PACKED && (width % 128 == 0 || width == 64 || width == 32);
}

const int8_t DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Scale bytes that int8 takes: a scale times a weight must not leave the normal numbers, or the two ways would differ.
enum { SCALE_LOW = 64, SCALE_HIGH = 190 };

// Scale byte that a row's blocks share after shifting each by at most 3, or -1. A block of zeros fits any.
int32_t shared_scale(const uint8_t *scales, int32_t blocks, const uint8_t *pairs, int32_t *shift) {
  int32_t low = 255, high = -1;
  uint32_t used = 0;
  for (int32_t b = 0; b < blocks; b++) {
    uint8_t any = 0;
    for (int32_t i = 0; i < 16; i++) any |= pairs[b * 16 + i] & 0x77;
    if (scales[b] == 255 || scales[b] == 0) return -1;
    if (!any) continue;
    used |= 1u << b;
    low = scales[b] < low ? scales[b] : low;
    high = scales[b] > high ? scales[b] : high;
  }
  if (high < 0) low = high = 127;
  if (high - low > 3 || low < SCALE_LOW || low > SCALE_HIGH) return -1;
  for (int32_t b = 0; b < blocks; b++) shift[b] = used >> b & 1 ? scales[b] - low : 0;
  return low;
}

inline float power(int32_t exponent) {  // 2^exponent, -126..127
  const uint32_t bits = (uint32_t)(exponent + 127) << 23;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

// Place of dim d in a row of the int8 tile: `part` dims at a time, the even ones, then the odd ones.
inline int32_t tile_place(int32_t d, int32_t part) { return d / part * part + d % 2 * (part / 2) + d % part / 2; }

void prepare(const RqIndex &job, int64_t t, Place &p, Query &query) {
  const float *q = job.q + t * job.q_step;
  query.weights = job.weights + t * job.weights_step;
  query.narrow = in_int8(job);
  query.best.begin(job.top_k);
  for (int32_t h = 0; h < job.heads; h++) {
    float *x = query.q + (int64_t)h * job.width;
    query.at[h] = x;
    memcpy(x, q + (int64_t)h * job.width, (size_t)job.width * sizeof(float));
    if (job.format == RQ_EXACT) continue;
    hadamard(x, job.width);
    if (!in_int8(job)) {
      round_key(job.format, x, job.width);
      continue;
    }
    pack_key(job.format, x, job.width, p.packed);
    unpack_key(job.format, p.packed, job.width, x);
    int32_t shift[RQ_MAX_KEY / RQ_FP4_BLOCK], sum = 0;
    const int32_t low = shared_scale(p.packed + job.width / 2, job.width / RQ_FP4_BLOCK, p.packed, shift);
    if (low < 0) {
      query.narrow = 0;
      continue;
    }
    int8_t *codes = query.codes + (int64_t)h * job.width;
    for (int32_t d = 0; d < job.width; d++) {
      const int32_t code = DOUBLED[p.packed[d / 2] >> (d % 2 * 4) & 15] * (1 << shift[d / RQ_FP4_BLOCK]);
      codes[tile_place(d, part_of(job.width))] = (int8_t)code;
      sum += code;
    }
    query.offset[h] = -128 * sum;
    query.scaled[h] = query.weights[h] * power(low - 127 - 1);
  }
}

// Addresses of keys [first, first + n).
inline void locate(const RqIndex &job, int64_t first, int64_t n, const uint8_t **at) {
  const int64_t row_bytes = key_bytes(job.format, job.width);
  int64_t page = first / job.page_rows, row = first % job.page_rows;
  for (int64_t i = 0; i < n; i++) {
    at[i] = job.keys + job.pages[page] * job.page_bytes + row * row_bytes;
    if (++row == job.page_rows) row = 0, page++;
  }
}

// Keys as columns; those from n on are zeros.
void unpack_columns(const RqIndex &job, const uint8_t *const *at, int64_t n, Place &p) {
  for (int64_t i = 0; i < GROUP; i++) {
    if (i < n) {
      const float *x = (const float *)at[i];
      if (job.format == RQ_PACKED) {
        unpack_key(job.format, at[i], job.width, p.row);
        x = p.row;
      }
      for (int32_t d = 0; d < job.width; d++) p.columns[d * GROUP + i] = x[d];
    } else {
      for (int32_t d = 0; d < job.width; d++) p.columns[d * GROUP + i] = 0.0f;
    }
  }
}

// scores[key] = sum over heads of weight * relu(sum).
void score_columns(const RqIndex &job, const Query &query, const Place &p, float *scores) {
  dots_all<WIDE>(p.columns, GROUP, job.width, query.at, job.heads, p.sums);
  for (int64_t at = 0; at < GROUP; at += WIDE) {
    F<WIDE> total = Lanes<WIDE>::splat(0.0f);
    for (int32_t h = 0; h < job.heads; h++) {
      const F<WIDE> dot = load<WIDE>(p.sums + h * GROUP + at);
      const F<WIDE> relu = dot < 0.0f ? Lanes<WIDE>::splat(0.0f) : dot;  // NaN stays
      total = Lanes<WIDE>::fma(Lanes<WIDE>::splat(query.weights[h]), relu, total);
    }
    store<WIDE>(scores + at, total);
  }
}

#if defined(__AVX512VNNI__)

inline void transpose16(__m512i *r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

// The int8 tile of n keys and their scales; returns which of them (bits) need the fp32 way.
uint64_t unpack_int8(const RqIndex &job, const uint8_t *const *at, int64_t n, Place &p) {
  const int32_t blocks = job.width / RQ_FP4_BLOCK, dims = part_of(job.width), parts = job.width / dims;
  const int32_t words = dims / 8, scaled = dims / RQ_FP4_BLOCK;  // 4-byte words of pairs and scales of a part
  const __mmask16 inside = (__mmask16)((1u << words) - 1);
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)DOUBLED));
  const __m512i nibble = _mm512_set1_epi8(15), offset = _mm512_set1_epi8((char)128);
  uint64_t wide = 0;
  for (int64_t i = 0; i < GROUP; i += 16) {
    // Scales: most keys' blocks lie within 2^3 as they are. The others are looked at one by one: zeros fit any scale.
    alignas(64) int32_t shifts[RQ_MAX_KEY / RQ_FP4_BLOCK][16], lows[16];
    const __m512i byte = _mm512_set1_epi32(255);
    __m512i low = byte, high = _mm512_setzero_si512();
    for (int32_t part = 0; part < parts; part++) {
      alignas(64) int32_t four[16];
      for (int64_t k = 0; k < 16; k++) {
        four[k] = 0x7F7F7F7F;
        if (i + k < n) memcpy(four + k, at[i + k] + job.width / 2 + part * scaled, (size_t)scaled);
      }
      __m512i scales = _mm512_load_si512(four);
      for (int b = 0; b < scaled; b++, scales = _mm512_srli_epi32(scales, 8)) {
        const __m512i one = _mm512_and_si512(scales, byte);
        low = _mm512_min_epi32(low, one), high = _mm512_max_epi32(high, one);
        _mm512_store_si512(shifts[part * scaled + b], one);
      }
    }
    uint32_t odd_ones = _mm512_cmpgt_epi32_mask(_mm512_sub_epi32(high, low), _mm512_set1_epi32(3)) |
                        _mm512_cmplt_epi32_mask(low, _mm512_set1_epi32(SCALE_LOW)) |
                        _mm512_cmpgt_epi32_mask(low, _mm512_set1_epi32(SCALE_HIGH));
    __m512i any = _mm512_setzero_si512();
    for (int32_t b = 0; b < blocks; b++) {
      const __m512i shift = _mm512_sub_epi32(_mm512_load_si512(shifts[b]), low);
      _mm512_store_si512(shifts[b], shift);
      any = _mm512_or_si512(any, shift);
    }
    _mm512_store_si512(lows, low);
    for (; odd_ones; odd_ones &= odd_ones - 1) {
      const int k = __builtin_ctz(odd_ones);
      int32_t shift[RQ_MAX_KEY / RQ_FP4_BLOCK];
      lows[k] = shared_scale(at[i + k] + job.width / 2, blocks, at[i + k], shift);
      if (lows[k] < 0) {
        wide |= 1ull << (i + k);
        lows[k] = 127;
        for (int32_t b = 0; b < blocks; b++) shift[b] = 0;
      }
      for (int32_t b = 0; b < blocks; b++) shifts[b][k] = shift[b];
      any = _mm512_set1_epi32(1);
    }
    const __m512i exponent = _mm512_sub_epi32(_mm512_load_si512(lows), _mm512_set1_epi32(1));
    _mm512_storeu_ps(p.scale + i, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
    const bool shifted = _mm512_test_epi32_mask(any, any);
    for (int32_t part = 0; part < parts; part++) {
      __m512i r[16];
      for (int64_t k = 0; k < 16; k++)
        r[k] = i + k < n ? _mm512_maskz_loadu_epi32(inside, at[i + k] + part * 64) : _mm512_setzero_si512();
      transpose16(r);
      for (int32_t d = 0; d < words; d++) {
        __m512i even = _mm512_shuffle_epi8(table, _mm512_and_si512(r[d], nibble));
        __m512i odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(r[d], 4), nibble));
        if (shifted) {
          const __m512i shift = _mm512_load_si512(shifts[part * scaled + d / 4]);
          const __m512i ones = _mm512_set1_epi32(0x01010101);  // bits that a shift pulls in from the byte below
          const __m512i mask = _mm512_sub_epi8(_mm512_setzero_si512(), _mm512_sllv_epi32(ones, shift));
          even = _mm512_and_si512(_mm512_sllv_epi32(even, shift), mask);
          odd = _mm512_and_si512(_mm512_sllv_epi32(odd, shift), mask);
        }
        uint8_t *to = p.bytes8 + ((part * dims / 4 + d) * GROUP + i) * 4;
        _mm512_storeu_si512(to, _mm512_add_epi8(even, offset));
        _mm512_storeu_si512(to + (int64_t)words * GROUP * 4, _mm512_add_epi8(odd, offset));
      }
    }
  }
  return wide;
}

// R heads: total[v] += scaled * relu(dot) for 64 keys in four vectors.
template <int R>
inline void add_heads(const uint8_t *keys, const Query &query, int32_t width, int32_t h, __m512 *total) {
  __m512i acc[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++) acc[r][v] = _mm512_set1_epi32(query.offset[h + r]);
  const int8_t *codes = query.codes + (int64_t)h * width;
  for (int32_t d = 0; d < width / 4; d++) {
    __m512i x[4];
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++) x[v] = _mm512_loadu_si512(keys + (d * GROUP + v * 16) * 4);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int32_t four;
      memcpy(&four, codes + r * width + d * 4, 4);
      const __m512i q = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int v = 0; v < 4; v++) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], x[v], q);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++) {
      const __m512 relu = _mm512_cvtepi32_ps(_mm512_max_epi32(acc[r][v], _mm512_setzero_si512()));
      total[v] = _mm512_fmadd_ps(_mm512_set1_ps(query.scaled[h + r]), relu, total[v]);
    }
}

void score_int8(const RqIndex &job, const Query &query, const Place &p, float *scores) {
  __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int32_t h = 0;
  for (; h + 4 <= job.heads; h += 4) add_heads<4>(p.bytes8, query, job.width, h, total);
  for (; h < job.heads; h++) add_heads<1>(p.bytes8, query, job.width, h, total);
  for (int v = 0; v < 4; v++)
    _mm512_storeu_ps(scores + v * 16, _mm512_mul_ps(total[v], _mm512_loadu_ps(p.scale + v * 16)));
}

#endif

// Scores keys [begin, end) for queries [0, count) of the block, each up to its seen[].
void scan(const RqIndex &job, Place &p, int64_t count, const int64_t *seen, int64_t begin, int64_t end) {
  const uint8_t *at[GROUP];
  for (int64_t first = begin; first < end; first += GROUP) {
    const int64_t n = least(end - first, GROUP);
    locate(job, first, n, at);
    int32_t columns = 0;
#if defined(__AVX512VNNI__)
    uint64_t wide = in_int8(job) ? unpack_int8(job, at, n, p) : 0;
#endif
    for (int64_t t = 0; t < count; t++) {
      Query &query = p.queries[t];
      const int64_t visible = least(seen[t] - first, n);
      if (visible <= 0) continue;
#if defined(__AVX512VNNI__)
      if (query.narrow) {
        score_int8(job, query, p, p.scores);
        if (visible < 64 ? wide << (64 - visible) : wide) {
          if (!columns) unpack_columns(job, at, n, p), columns = 1;
          score_columns(job, query, p, p.other);
          for (int64_t i = 0; i < visible; i++)
            if (wide >> i & 1) p.scores[i] = p.other[i];
        }
        query.best.take(p.scores, first, visible);
        continue;
      }
#endif
      if (!columns) unpack_columns(job, at, n, p), columns = 1;
      score_columns(job, query, p, p.scores);
      query.best.take(p.scores, first, visible);
    }
  }
}

void write_all(const RqIndex &job, int64_t t) {
  for (int64_t i = 0; i < job.seen[t]; i++) job.picks[t * job.picks_step + i] = (int32_t)i;
  job.pick_counts[t] = (int32_t)job.seen[t];
}

void write_picks(const RqIndex &job, int64_t t, const uint64_t *ranks, int64_t n, uint32_t *order) {
  uint32_t *picks = (uint32_t *)(job.picks + t * job.picks_step);
  for (int64_t i = 0; i < n; i++) picks[i] = (uint32_t)ranks[i];
  sort(picks, order, n);
  job.pick_counts[t] = (int32_t)n;
}

}  // namespace

namespace RQ_NS {

int64_t index_scratch(const RqIndex *job) { return Place(*job, nullptr, RQ_INDEX_BLOCK).bytes; }

void index_topk(const RqIndex *job, int64_t first, int64_t count, void *scratch) {
  Place p(*job, scratch, RQ_INDEX_BLOCK);
  int64_t scored[RQ_INDEX_BLOCK], seen[RQ_INDEX_BLOCK], n = 0, most = 0;
  for (int64_t t = first; t < first + count; t++) {
    if (job->seen[t] <= job->top_k) {
      write_all(*job, t);
    } else {
      prepare(*job, t, p, p.queries[n]);
      seen[n] = job->seen[t];
      most = seen[n] > most ? seen[n] : most;
      scored[n++] = t;
    }
    if (n && (n == RQ_INDEX_BLOCK || t + 1 == first + count)) {
      scan(*job, p, n, seen, 0, most);
      for (int64_t i = 0; i < n; i++) {
        p.queries[i].best.cut();
        write_picks(*job, scored[i], p.queries[i].best.ranks, p.queries[i].best.count, p.order);
      }
      n = most = 0;
    }
  }
}

int64_t index_partial_bytes(const RqIndex *job) { return (8 * (1 + (int64_t)job->top_k) + 63) / 64 * 64; }

void index_part(const RqIndex *job, int64_t query, int64_t begin, int64_t end, void *best, void *scratch) {
  Place p(*job, scratch, RQ_INDEX_BLOCK);
  int64_t *count = (int64_t *)best;
  const int64_t seen = job->seen[query];
  *count = 0;
  end = least(end, seen);
  if (seen <= job->top_k || begin >= end) return;
  prepare(*job, query, p, p.queries[0]);
  scan(*job, p, 1, &seen, begin, end);
  p.queries[0].best.cut();
  *count = p.queries[0].best.count;
  memcpy(count + 1, p.queries[0].best.ranks, (size_t)*count * sizeof(uint64_t));
}

void index_merge(const RqIndex *job, int64_t query, const void *partials, int64_t parts, void *scratch) {
  if (job->seen[query] <= job->top_k) {
    write_all(*job, query);
    return;
  }
  Place p(*job, scratch, RQ_INDEX_BLOCK);
  Best best = p.queries[0].best;
  best.begin(job->top_k);
  for (int64_t part = 0; part < parts; part++) {
    const uint64_t *from = (const uint64_t *)((const char *)partials + part * index_partial_bytes(job));
    for (int64_t i = 0; i < (int64_t)from[0]; i++) {
      if (from[1 + i] < best.worst) best.ranks[best.count++] = from[1 + i];
      if (best.count + GROUP > keep_of(best.top_k)) best.cut();
    }
  }
  best.cut();
  write_picks(*job, query, best.ranks, best.count, p.order);
}

}  // namespace RQ_NS
