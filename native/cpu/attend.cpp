// attend.cpp: see attend.h. Two small GEMMs a part, columns = heads.
//
// QK: sums[key][head], lanes = heads, each row's values broadcast. So the softmax over keys needs no sums across lanes.
// PV: sums[head][dim], lanes = dims, each weight broadcast. A lane adds over dims, then over keys, in ascending order.
// bf16 (level avx512_bf16, RQ_PACKED): the same shapes over pairs, a pair of dims in QK, of keys in PV: rows are turned to
// bf16 once, 64 at a time, and once more into pairs of rows for PV.
// Bound: 4 * heads * width FLOP a key; rows of 584 bytes are read once.
// Letters: C columns (heads padded to full vectors), D width, K keys of a part.
#include "attend.h"

#include "attend_bf16.h"
#include "lanes.h"
#include "rows.h"

namespace {

using namespace RQ_NS;

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if defined(__AVX512BF16__)
enum { HAS_BF16 = 1 };
#else
enum { HAS_BF16 = 0 };
#endif
enum { KEPT_BYTES = 512 << 10 };  // unpacked rows kept for the next queries: half an L2 cache

struct Place {  // scratch of one call
  float *q;               // [D][C], or uint32 pairs [D/2][C]
  float *sums;            // [RQ_PART][C]; weights replace them, bf16 pairs in the first half
  char *tile;             // rows unpacked for one query: fp32 [RQ_PART][D] or bf16 [64][D64]
  uint32_t *pairs;        // [D64/64][RQ_PART/2][64]: two rows' bf16
  char *slots;            // rows kept for the next queries of a block, window rows in the first `ring` slots
  int64_t *tags;          // [slot_count] which row is in a slot
  int64_t *stamps;        // [slot_count] when it was last asked for
  int64_t slot_count, ring, row_bytes, now;
  bool keeps;             // slots are in use
  float *top, *total;     // [C] of the part
  float *most, *all;      // [C] so far
  float *keep, *add;      // [C] factors of what is there and of the part
  const void **rows;      // [RQ_PART]
  int64_t *numbers;       // [RQ_PART] which rows they are: entry, or ~ index in window_rows
  uint8_t *own;           // [RQ_PART] 1: fp32
  int64_t bytes;

  Place(const RqAttend &job, void *scratch) {
    Cut cut{(char *)scratch, 0};
    const int64_t c = up(job.heads, 16), d = job.width, wide = up(d, 64);
    const bool bf16 = HAS_BF16 && job.format == RQ_PACKED;
    q = cut.take<float>(c * (bf16 ? (d + 1) / 2 : d));
    sums = cut.take<float>(RQ_PART * c);
    row_bytes = bf16 ? 2 * wide : up(4 * d, 64);
    const int64_t unpacks = job.format == RQ_PACKED;
    tile = cut.take<char>(unpacks * (bf16 ? 64 : RQ_PART) * row_bytes);
    pairs = cut.take<uint32_t>(bf16 ? RQ_PART / 2 * wide : 0);
    for (slot_count = 1024; slot_count * row_bytes > KEPT_BYTES; slot_count /= 2) continue;
    for (ring = slot_count / 2; ring > 1 && ring / 2 >= job.window; ring /= 2) continue;
    slots = cut.take<char>(unpacks * slot_count * row_bytes);
    tags = cut.take<int64_t>(unpacks * slot_count), stamps = cut.take<int64_t>(unpacks * slot_count);
    now = 0, keeps = false;
    top = cut.take<float>(c), total = cut.take<float>(c), most = cut.take<float>(c), all = cut.take<float>(c);
    keep = cut.take<float>(c), add = cut.take<float>(c);
    rows = cut.take<const void *>(RQ_PART);
    numbers = cut.take<int64_t>(RQ_PART);
    own = cut.take<uint8_t>(RQ_PART);
    bytes = cut.used;
  }

  void keep_rows(const RqAttend &job) {  // from here on: the queries come one after another
    keeps = job.format == RQ_PACKED;
    for (int64_t i = 0; keeps && i < slot_count; i++) tags[i] = INT64_MIN, stamps[i] = 0;
  }

  // Where to unpack row `number` (below 0: of the window), or its place when it is there (*there). Falls back to `other`
  // when its slot holds a row that was asked for since `now` last changed.
  char *place_of(int64_t number, char *other, bool *there) {
    *there = false;
    if (!keeps) return other;
    const int64_t i = number < 0 ? ~number & (ring - 1) : ring + (number & (slot_count / 2 - 1));
    if (tags[i] == number)
      *there = true;
    else if (stamps[i] == now)
      return other;
    tags[i] = number, stamps[i] = now;
    return slots + i * row_bytes;
  }
};

// How many entries query t attends to, and its picks or null.
inline int64_t listed(const RqAttend &job, int64_t t, const int32_t **picks) {
  *picks = nullptr;
  if (!job.page_rows || !job.seen) return 0;
  if (!job.picks || job.pick_counts[t] < 0) return job.seen[t];
  *picks = job.picks + t * job.picks_step;
  return job.pick_counts[t];
}

inline int64_t parts_of(const RqAttend &job, int64_t t) {
  const int32_t *picks;
  return (job.window + listed(job, t, &picks) + RQ_PART - 1) / RQ_PART;
}

// Rows of a part: numbers [256 part, 256 part + 256) of the list that is the window, then the entries.
int64_t gather(const RqAttend &job, int64_t t, int64_t part, Place &p) {
  const int32_t *picks;
  const int64_t total = job.window + listed(job, t, &picks);
  const int64_t begin = part * RQ_PART, end = begin + RQ_PART < total ? begin + RQ_PART : total;
  const int64_t row_bytes = entry_bytes(job.format, job.width, job.rope);
  int64_t n = 0, at = begin;
  for (; at < end && at < job.window; at++) {
    const void *row = job.window_rows[t + at];
    if (!row) continue;
    p.own[n] = job.format == RQ_EXACT || t + at >= job.window_own;
    p.numbers[n] = ~(t + at);
    p.rows[n++] = row;
  }
  for (; at < end; at++) {
    const int64_t e = picks ? picks[at - job.window] : at - job.window;
    p.own[n] = job.format == RQ_EXACT;
    p.numbers[n] = e;
    p.rows[n++] = job.entries + job.pages[e / job.page_rows] * job.page_bytes + e % job.page_rows * row_bytes;
  }
  return n;
}

// --- fp32 ------------------------------------------------------------------------------------------------------------

// q [D][C] from heads [first, first + count) of a query; columns above are zero.
void turn_q(const float *q, int64_t count, int64_t width, int64_t c, float *out) {
  for (int64_t d = 0; d < width; d++) {
    for (int64_t h = 0; h < count; h++) out[d * c + h] = q[h * width + d];
    for (int64_t h = count; h < c; h++) out[d * c + h] = 0.0f;
  }
}

// What a part's sums are worth: factors of the sums so far (keep) and of the part (add). First: there is nothing so far.
void weigh_parts(int64_t c, int first, const float *top, const float *total, float *most, float *all, float *keep,
                 float *add) {
  for (int64_t h = 0; h < c; h += 4) {
    const F<4> part = load<4>(top + h), before = first ? part : load<4>(most + h);
    const F<4> both = larger_lanes<4>(part, before), base = both == -INFINITY ? Lanes<4>::splat(0.0f) : both;
    const F<4> a = exp_lanes<4>(before - base), b = exp_lanes<4>(part - base), sum = load<4>(total + h);
    store<4>(keep + h, a);
    store<4>(add + h, b);
    store<4>(all + h, first ? sum * b : Lanes<4>::fma(load<4>(all + h), a, sum * b));
    store<4>(most + h, both);
  }
}

// Factor that turns the sums into the average, the sink counted: left in `keep`.
void weigh_sink(const RqAttend &job, int64_t first, int64_t count, Place &p) {
  for (int64_t h = 0; h < count; h++) p.add[h] = job.sink[first + h];
  for (int64_t h = 0; h < count; h += 4) {
    const F<4> sink = load<4>(p.add + h), before = load<4>(p.most + h), both = larger_lanes<4>(sink, before);
    const F<4> base = both == -INFINITY ? Lanes<4>::splat(0.0f) : both, scale = exp_lanes<4>(before - base);
    store<4>(p.keep + h, scale / Lanes<4>::fma(load<4>(p.all + h), scale, exp_lanes<4>(sink - base)));
  }
}

// Column maxima, weights e^(sum - max) in place, and their totals.
template <int N>
void soften(float *sums, int64_t c, int64_t n, float *top, float *total) {
  for (int64_t at = 0; at < c; at += N) {
    F<N> m = Lanes<N>::splat(-INFINITY), t = Lanes<N>::splat(0.0f);
    for (int64_t k = 0; k < n; k++) m = larger_lanes<N>(load<N>(sums + k * c + at), m);
    const F<N> base = m == -INFINITY ? Lanes<N>::splat(0.0f) : m;
    for (int64_t k = 0; k < n; k++) {
      const F<N> e = exp_lanes<N>(load<N>(sums + k * c + at) - base);
      t = t + e;
      store<N>(sums + k * c + at, e);
    }
    store<N>(top + at, m);
    store<N>(total + at, t);
  }
}

// out[head][dims] = out * keep + add * sum_k weight * row, for R heads and V vectors of dims (or `lanes` of one).
template <int N, int V, int R>
inline void blend(const float *weights, int64_t c, const float *const *rows, int64_t n, int64_t at, int lanes, int first,
                  const float *keep, const float *add, float *out, int64_t width) {
  F<N> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[r][v] = Lanes<N>::splat(0.0f);
  for (int64_t k = 0; k < n; k++) {
    F<N> x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) x[v] = lanes == N ? load<N>(rows[k] + at + v * N) : load_part<N>(rows[k] + at, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const F<N> w = Lanes<N>::splat(weights[k * c + r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = Lanes<N>::fma(w, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      float *to = out + r * width + at + v * N;
      F<N> sum = acc[r][v] * Lanes<N>::splat(add[r]);
      if (lanes == N) {
        if (!first) sum = Lanes<N>::fma(load<N>(to), Lanes<N>::splat(keep[r]), sum);
        store<N>(to, sum);
      } else {
        if (!first) sum = Lanes<N>::fma(load_part<N>(to, lanes), Lanes<N>::splat(keep[r]), sum);
        memcpy(to, &sum, (size_t)lanes * sizeof(float));
      }
    }
}

template <int N, int V>
inline void blend_heads(const float *weights, int64_t c, const float *const *rows, int64_t n, int64_t at, int lanes,
                        int first, const float *keep, const float *add, int64_t heads, float *out, int64_t width) {
  int64_t h = 0;
  for (; h + TILE_R <= heads; h += TILE_R)
    blend<N, V, TILE_R>(weights + h, c, rows, n, at, lanes, first, keep + h, add + h, out + h * width, width);
  for (; h < heads; h++)
    blend<N, V, 1>(weights + h, c, rows, n, at, lanes, first, keep + h, add + h, out + h * width, width);
}

void pv(const float *weights, int64_t c, const float *const *rows, int64_t n, int first, const float *keep,
        const float *add, int64_t heads, float *out, int64_t width) {
  int64_t at = 0;
  for (; at + TILE_V * WIDE <= width; at += TILE_V * WIDE)
    blend_heads<WIDE, TILE_V>(weights, c, rows, n, at, WIDE, first, keep, add, heads, out, width);
  for (; at < width; at += WIDE)
    blend_heads<WIDE, 1>(weights, c, rows, n, at, width - at < WIDE ? (int)(width - at) : (int)WIDE, first, keep, add,
                         heads, out, width);
}

// --- bf16 ------------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

// Sums and weights of a part, rows left as pairs for pv_bf16.
void part_bf16(const RqAttend &job, Place &p, int64_t c, int64_t n) {
  const int64_t wide = up(job.width, 64), panel = RQ_PART / 2 * 64;
  for (int64_t first = 0; first < n; first += 64) {
    const int64_t count = n - first < 64 ? n - first : 64;
    const uint16_t *rows[64];
    p.now++;
    for (int64_t i = 0; i < count; i++) {
      bool there;
      uint16_t *row = (uint16_t *)p.place_of(p.numbers[first + i], p.tile + i * p.row_bytes, &there);
      if (!there) row_to_bf16(job, p.rows[first + i], p.own[first + i], wide, row);
      rows[i] = row;
    }
    for (int64_t i = 0; i < count; i += 2)
      pair_rows(rows[i], i + 1 < count ? rows[i + 1] : nullptr, wide, panel, p.pairs + (first + i) / 2 * 64);
    qk_bf16((const uint32_t *)p.q, c, (job.width + 1) / 2, rows, count, p.sums + first * c);
  }
  if (c == 8)
    soften_bf16_8(p.sums, n, p.top, p.total);
  else
    soften_bf16(p.sums, c, n, p.top, p.total);
}

#endif

// --- one query -------------------------------------------------------------------------------------------------------

struct Heads {
  int64_t first, count, c;  // columns: count padded to what the vectors take
};

inline bool in_bf16(const RqAttend &job) { return HAS_BF16 && job.format == RQ_PACKED; }

Heads columns(const RqAttend &job, int64_t first, int64_t count) {
  const int64_t few = in_bf16(job) ? 8 : 4;
  const int64_t lanes = count > 8 ? (int64_t)WIDE : count > few && WIDE >= 8 ? 8 : few;
  return Heads{first, count, up(count, lanes)};
}

void turn(const RqAttend &job, int64_t t, const Heads &h, Place &p) {
  const float *q = job.q + t * job.q_step + h.first * job.width;
#if defined(__AVX512BF16__)
  if (in_bf16(job)) {
    turn_q_pairs(q, h.count, job.width, h.c, (uint32_t *)p.q);
    return;
  }
#endif
  turn_q(q, h.count, job.width, h.c, p.q);
}

// Sums, weights, column maxima and totals of a part; returns its keys.
int64_t score_part(const RqAttend &job, int64_t t, int64_t part, const Heads &h, Place &p) {
  const int64_t n = gather(job, t, part, p);
  if (!n) return 0;
#if defined(__AVX512BF16__)
  if (in_bf16(job)) {
    part_bf16(job, p, h.c, n);
    return n;
  }
#endif
  p.now++;
  for (int64_t k = 0; k < n; k++)
    if (!p.own[k]) {
      bool there;
      char *row = p.place_of(p.numbers[k], p.tile + k * p.row_bytes, &there);
      if (!there) unpack_entry(job.format, (const uint8_t *)p.rows[k], job.width, job.rope, (float *)row);
      p.rows[k] = row;
    }
  const float *const *rows = (const float *const *)p.rows;
  if (h.c % WIDE == 0) {
    dots_all<WIDE>(p.q, h.c, job.width, rows, n, p.sums);
    soften<WIDE>(p.sums, h.c, n, p.top, p.total);
  } else if (h.c % 8 == 0) {
    dots_all<(WIDE < 8 ? 4 : 8)>(p.q, h.c, job.width, rows, n, p.sums);
    soften<(WIDE < 8 ? 4 : 8)>(p.sums, h.c, n, p.top, p.total);
  } else {
    dots_all<4>(p.q, h.c, job.width, rows, n, p.sums);
    soften<4>(p.sums, h.c, n, p.top, p.total);
  }
  return n;
}

void add_part(const RqAttend &job, int64_t n, int first, const Heads &h, const Place &p, float *out) {
#if defined(__AVX512BF16__)
  if (in_bf16(job)) {
    pv_bf16((const uint32_t *)p.sums, h.c, p.pairs, (n + 1) / 2, first, p.keep, p.add, h.count, out, job.width);
    return;
  }
#endif
  pv(p.sums, h.c, (const float *const *)p.rows, n, first, p.keep, p.add, h.count, out, job.width);
}

void finish(const RqAttend &job, int64_t t, const Heads &h, int first, Place &p) {
  float *out = job.out + t * job.out_step + h.first * job.width;
  if (first) {  // not one key
    memset(out, 0, (size_t)(h.count * job.width) * sizeof(float));
    return;
  }
  weigh_sink(job, h.first, h.count, p);
  for (int64_t i = 0; i < h.count; i++)
    for (int64_t d = 0; d < job.width; d++) out[i * job.width + d] *= p.keep[i];
}

// Heads `h` of a query from keys to out.
void whole(const RqAttend &job, int64_t t, const Heads &h, Place &p) {
  turn(job, t, h, p);
  float *out = job.out + t * job.out_step + h.first * job.width;
  const int64_t parts = parts_of(job, t);
  int first = 1;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t n = score_part(job, t, part, h, p);
    if (!n) continue;
    weigh_parts(h.c, first, p.top, p.total, p.most, p.all, p.keep, p.add);
    add_part(job, n, first, h, p, out);
    first = 0;
  }
  finish(job, t, h, first, p);
}

struct Partial {  // what attend_part leaves: top [C16], total [C16], sums [heads][width]
  float *top, *total, *sums;
  int64_t c;
  Partial(const RqAttend &job, void *partials, int64_t part) : c(up(job.heads, 16)) {
    top = (float *)((char *)partials + part * attend_partial_bytes(&job));
    total = top + c;
    sums = total + c;
  }
};

}  // namespace

namespace RQ_NS {

int64_t attend_scratch(const RqAttend *job) { return Place(*job, nullptr).bytes; }

void attend_heads(const RqAttend *job, int64_t query, int32_t heads_first, int32_t heads_count, void *scratch) {
  Place p(*job, scratch);
  whole(*job, query, columns(*job, heads_first, heads_count), p);
}

void attend(const RqAttend *job, int64_t first, int64_t count, void *scratch) {
  Place p(*job, scratch);
  if (count > 1) p.keep_rows(*job);
  for (int64_t t = first; t < first + count; t++) whole(*job, t, columns(*job, 0, job->heads), p);
}

int64_t attend_parts(const RqAttend *job, int64_t query) { return parts_of(*job, query); }

int64_t attend_partial_bytes(const RqAttend *job) {
  return (2 * up(job->heads, 16) + up((int64_t)job->heads * job->width, 16)) * (int64_t)sizeof(float);
}

void attend_part(const RqAttend *job, int64_t query, int64_t part, void *partials, void *scratch) {
  Place p(*job, scratch);
  const Heads h = columns(*job, 0, job->heads);
  Partial to(*job, partials, part);
  turn(*job, query, h, p);
  const int64_t n = score_part(*job, query, part, h, p);
  for (int64_t i = 0; i < to.c; i++) to.top[i] = NAN, to.total[i] = -1.0f;  // total -1: no keys
  if (!n) return;
  memcpy(to.top, p.top, (size_t)h.c * sizeof(float));
  memcpy(to.total, p.total, (size_t)h.c * sizeof(float));
  for (int64_t i = 0; i < h.c; i++) p.add[i] = 1.0f;
  add_part(*job, n, 1, h, p, to.sums);
}

void attend_merge(const RqAttend *job, int64_t query, const void *partials, int64_t parts, void *scratch) {
  Place p(*job, scratch);
  const Heads h = columns(*job, 0, job->heads);
  const int64_t width = job->width;
  float *out = job->out + query * job->out_step;
  int first = 1;
  for (int64_t part = 0; part < parts; part++) {
    const Partial from(*job, (void *)partials, part);
    if (from.total[0] == -1.0f) continue;
    weigh_parts(h.c, first, from.top, from.total, p.most, p.all, p.keep, p.add);
    for (int64_t i = 0; i < h.count; i++) {
      const F<WIDE> keep = Lanes<WIDE>::splat(p.keep[i]), add = Lanes<WIDE>::splat(p.add[i]);
      for (int64_t d = 0; d < width; d += WIDE) {  // as the ends of blend and blend_bf16
        const int lanes = width - d < WIDE ? (int)(width - d) : (int)WIDE;
        float *to = out + i * width + d;
        F<WIDE> sum = load_part<WIDE>(from.sums + i * width + d, lanes) * add;
        if (!first) sum = Lanes<WIDE>::fma(load_part<WIDE>(to, lanes), keep, sum);
        memcpy(to, &sum, (size_t)lanes * sizeof(float));
      }
    }
    first = 0;
  }
  finish(*job, query, h, first, p);
}

}  // namespace RQ_NS
