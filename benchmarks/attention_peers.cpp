// attention_peers.cpp: other attention layers on this library's own tiles, for benchmarks/attention.py, which compiles it.
//
// V3.2's sparse MLA: index keys of 132 bytes (128 e4m3, fp32 scale), 64 heads, and rows of 656 bytes (512 e4m3 with 4 fp32
// scales, 64 bf16) of which the first 512 values are the value too. GQA with bf16 keys and values, 8 heads a KV head.
// The products, softmax and top-k are those of native/cpu/{attend,index}.cpp (included as PEER says), so a difference in
// time is one of the layers, not of the craft. Level avx512_bf16 only. One thread a call; sizes are the caller's.
#if PEER == 1
#include "../native/cpu/attend.cpp"

namespace {

struct Room {  // scratch of one call, 64-byte aligned: see peer_attend_bytes
  uint32_t *q, *pairs;
  float *sums, *top, *total, *most, *all, *keep, *add;
  uint16_t *half;
  const uint16_t *rows[RQ_PART];
  int64_t bytes;
  Room(void *at, int64_t c, int64_t width) {
    Cut cut{(char *)at, 0};
    q = cut.take<uint32_t>(c * width / 2), pairs = cut.take<uint32_t>(RQ_PART / 2 * width);
    sums = cut.take<float>(RQ_PART * c);
    top = cut.take<float>(c), total = cut.take<float>(c), most = cut.take<float>(c), all = cut.take<float>(c);
    keep = cut.take<float>(c), add = cut.take<float>(c);
    half = cut.take<uint16_t>(64 * width);
    bytes = cut.used;
  }
};

// Values of 128 e4m3 codes as bf16, scale 1.
void codes_to_bf16(const uint8_t *codes, uint16_t *out) {
  uint8_t row[128 + 8];
  memcpy(row, codes, 128);
  memset(row + 128, 127, 8);
  entry_to_bf16(row, 128, 0, out);
}

void mla_row(const uint8_t *row, uint16_t *out) {  // [576]
  for (int block = 0; block < 4; block++) {
    float scale;
    memcpy(&scale, row + 512 + 4 * block, 4);
    alignas(64) uint16_t values[128];
    codes_to_bf16(row + 128 * block, values);
    for (int i = 0; i < 128; i += 16) {
      const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i *)(values + i))), 16);
      const __m256bh b = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(scale)));
      memcpy(out + 128 * block + i, &b, 32);
    }
  }
  memcpy(out + 512, row + 528, 128);
}

// Averages: out [count][width] over the total of the weights (no sink).
void divide(const Room &r, int64_t count, int64_t width, float *out) {
  for (int64_t h = 0; h < count; h++)
    for (int64_t d = 0; d < width; d++) out[h * width + d] /= r.all[h];
}

}  // namespace

extern "C" {

int64_t peer_attend_bytes(int64_t columns, int64_t width) { return Room(nullptr, columns, width).bytes; }

// q [count][576] (a multiple of 16 heads), rows of 656 bytes, n picks; out [count][512].
void peer_mla(const float *q, int64_t count, const uint8_t *rows, const int32_t *picks, int64_t n, float *out, void *at) {
  Room r(at, count, 576);
  turn_q_pairs(q, count, 576, count, r.q);
  for (int64_t part = 0; part < n; part += RQ_PART) {
    const int64_t keys = n - part < RQ_PART ? n - part : RQ_PART;
    for (int64_t k = 0; k < keys; k += 64) {
      const int64_t some = keys - k < 64 ? keys - k : 64;
      for (int64_t i = 0; i < some; i++) {
        mla_row(rows + (int64_t)picks[part + k + i] * 656, r.half + i * 576);
        r.rows[i] = r.half + i * 576;
      }
      for (int64_t i = 0; i < some; i += 2)
        pair_rows(r.rows[i], i + 1 < some ? r.rows[i + 1] : nullptr, 512, RQ_PART / 2 * 64, r.pairs + (k + i) / 2 * 64);
      qk_bf16(r.q, count, 288, r.rows, some, r.sums + k * count);
    }
    soften_bf16(r.sums, count, keys, r.top, r.total);
    weigh_parts(count, part == 0, r.top, r.total, r.most, r.all, r.keep, r.add);
    pv_bf16((const uint32_t *)r.sums, count, r.pairs, (keys + 1) / 2, part == 0, r.keep, r.add, count, out, 512);
  }
  divide(r, count, 512, out);
}

// One KV head: q [8][128], keys and values bf16 [n][128], read `times` over; out [8][128].
void peer_gqa(const float *q, const uint16_t *keys, const uint16_t *values, int64_t n, int64_t times, float *out, void *at) {
  Room r(at, 16, 128);
  turn_q_pairs(q, 8, 128, 8, r.q);
  int first = 1;
  for (int64_t t = 0; t < times; t++)
    for (int64_t part = 0; part < n; part += RQ_PART) {
      const int64_t some = n - part < RQ_PART ? n - part : RQ_PART;
      for (int64_t i = 0; i < some; i++) r.rows[i] = keys + (part + i) * 128;
      qk_bf16(r.q, 8, 64, r.rows, some, r.sums);
      soften_bf16_8(r.sums, some, r.top, r.total);
      for (int64_t i = 0; i < some; i += 2)
        pair_rows(values + (part + i) * 128, i + 1 < some ? values + (part + i + 1) * 128 : nullptr, 128,
                  RQ_PART / 2 * 64, r.pairs + i / 2 * 64);
      weigh_parts(8, first, r.top, r.total, r.most, r.all, r.keep, r.add);
      pv_bf16((const uint32_t *)r.sums, 8, r.pairs, (some + 1) / 2, first, r.keep, r.add, 8, out, 128);
      first = 0;
    }
  divide(r, 8, 128, out);
}

}  // extern "C"

#else
#include "../native/cpu/index.cpp"

namespace {

// R heads, 64 keys: total += weight * relu(dot); keys as pairs of dims [64][GROUP], queries [heads][64].
template <int R>
inline void add_heads_bf16(const uint32_t *keys, const uint32_t *q, const float *weights, __m512 *total) {
  __m512 acc[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++) acc[r][v] = _mm512_setzero_ps();
  for (int d = 0; d < 64; d++) {
    __m512i x[4];
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++) x[v] = _mm512_loadu_si512(keys + d * GROUP + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512i pair = _mm512_set1_epi32((int)q[r * 64 + d]);
#pragma GCC unroll 8
      for (int v = 0; v < 4; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], (__m512bh)x[v], (__m512bh)pair);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++)
      total[v] = _mm512_fmadd_ps(_mm512_set1_ps(weights[r]), _mm512_max_ps(acc[r][v], _mm512_setzero_ps()), total[v]);
}

}  // namespace

extern "C" {

int64_t peer_index_bytes(int64_t top_k) { return keep_of(top_k) * 8 + 64 * GROUP * 4 + 128; }

// Best top_k of keys [begin, end) (a multiple of 64 each) of 132 bytes, as ranks; q bf16 pairs [heads][64], heads a
// multiple of 4. Returns how many.
int64_t peer_index(const uint32_t *q, const float *weights, int64_t heads, const uint8_t *keys, int64_t begin, int64_t end,
                   int64_t top_k, uint64_t *ranks, void *at) {
  Cut cut{(char *)at, 0};
  uint32_t *tile = cut.take<uint32_t>(64 * GROUP);
  Best best;
  best.ranks = cut.take<uint64_t>(keep_of(top_k));
  best.begin(top_k);
  for (int64_t first = begin; first < end; first += GROUP) {
    alignas(64) float scale[GROUP], scores[GROUP];
    for (int64_t i = 0; i < GROUP; i += 16) {
      alignas(64) uint16_t values[16][128];
      for (int64_t k = 0; k < 16; k++) {
        uint8_t row[128 + 8];
        memcpy(row, keys + (first + i + k) * 132, 128);
        memset(row + 128, 127, 8);
        memcpy(scale + i + k, keys + (first + i + k) * 132 + 128, 4);
        entry_to_bf16(row, 128, 0, values[k]);
      }
      for (int part = 0; part < 4; part++) {
        __m512i r[16];
        for (int k = 0; k < 16; k++) r[k] = _mm512_load_si512(values[k] + part * 32);
        transpose16(r);
        for (int d = 0; d < 16; d++) _mm512_store_si512(tile + (part * 16 + d) * GROUP + i, r[d]);
      }
    }
    __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t h = 0; h + 4 <= heads; h += 4) add_heads_bf16<4>(tile, q + h * 64, weights + h, total);
    for (int v = 0; v < 4; v++) _mm512_store_ps(scores + v * 16, _mm512_mul_ps(total[v], _mm512_load_ps(scale + v * 16)));
    best.take(scores, first, GROUP);
  }
  best.cut();
  memcpy(ranks, best.ranks, (size_t)best.count * 8);
  return best.count;
}

}  // extern "C"
#endif
