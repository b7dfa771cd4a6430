// step.cpp: one decode step of a V4 model for a block of rows; compiled once per instruction level (simd.h).
//
// Follows rorqual/model/{block,attention,compressor,indexer,moe,hyper_connections}.py, which are the reference.
// A row's arithmetic has one order, whatever block it is in: sums over k run in lane order (simd.h), sums over
// heads, keys, experts and streams in ascending or slot order. No allocation, exceptions or globals.
// Letters: R rows of the block, d hidden, H heads, c head width, m ratio, W window, J keys of a query, S entries.
// Bound: a weight that the block uses is read once per block; a row of its own reads all it uses.
#include "levels.h"

#include <math.h>

#include "simd.h"

namespace {

struct Arena {  // cuts 64-byte aligned pieces off a slot; base null only counts
  char *base;
  int64_t used;
  template <typename T>
  T *take(int64_t count) {
    char *at = base + used;
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return base ? (T *)at : nullptr;
  }
};

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

const int64_t KEY_CHUNK = 64;  // index keys scored at a time

struct Block {  // working memory of one block
  float *streams, *merged, *x, *y, *mix, *post, *comb, *q_r, *q, *kv, *heads, *inner;
  float *rows, *index_rows, *index_q, *index_w, *turn, *pool;
  float *scores, *inner1, *inner3, *expert_out, *weights, *shared1, *shared3;
  float *probs, *head_scale, *dots;
  uint64_t *order, *order_copy;
  int32_t *picks, *list;
  const float **keys, **in;
  float **out;

  void lay(Arena &a, const RqStepModel &m, int64_t max_entries, int64_t r) {
    const int64_t n = m.streams, d = m.hidden, wide = larger(m.head_dim, m.index_dim);
    const int64_t slots = r * m.per_token, most_keys = m.window + max_entries + 8;
    streams = a.take<float>(r * n * d);
    merged = a.take<float>(r * n * d);
    x = a.take<float>(r * d);
    y = a.take<float>(r * d);
    mix = a.take<float>(r * (2 + n) * n);
    post = a.take<float>(r * n);
    comb = a.take<float>(r * n * n);
    q_r = a.take<float>(r * m.q_rank);
    q = a.take<float>(r * m.heads * m.head_dim);
    kv = a.take<float>(r * m.head_dim);
    heads = a.take<float>(r * m.heads * m.head_dim);
    inner = a.take<float>(r * m.groups * m.o_rank);
    rows = a.take<float>(r * 4 * m.head_dim);
    index_rows = a.take<float>(r * 4 * m.index_dim);
    index_q = a.take<float>(r * m.index_heads * m.index_dim);
    index_w = a.take<float>(r * m.index_heads);
    turn = a.take<float>(r * 2 * m.rope_dim + m.rope_dim);
    pool = a.take<float>(3 * wide);
    scores = a.take<float>(r * m.experts);
    inner1 = a.take<float>(slots * m.expert_width);
    inner3 = a.take<float>(slots * m.expert_width);
    expert_out = a.take<float>(slots * d);
    weights = a.take<float>(slots);
    shared1 = a.take<float>(r * m.shared_width);
    shared3 = a.take<float>(r * m.shared_width);
    probs = a.take<float>((int64_t)m.heads * most_keys);
    head_scale = a.take<float>(m.heads);
    dots = a.take<float>(KEY_CHUNK * m.index_heads);
    order = a.take<uint64_t>(max_entries);
    order_copy = a.take<uint64_t>(max_entries);
    picks = a.take<int32_t>(slots);
    list = a.take<int32_t>(slots);
    keys = a.take<const float *>(most_keys);
    const int64_t pointers = larger(larger(slots, r), larger(larger(m.heads, m.index_heads), KEY_CHUNK));
    in = a.take<const float *>(pointers);
    out = a.take<float *>(pointers);
  }
};

inline float sigmoid(float x) { return 1.0f / (1.0f + exp1(-x)); }

inline void rms_scale(float *x, int n, float eps, const float *weight) {
  const float scale = 1.0f / sqrtf(square(x, n) / (float)n + eps);
  if (weight)
    for (int i = 0; i < n; i++) x[i] = weight[i] * (x[i] * scale);
  else
    for (int i = 0; i < n; i++) x[i] = x[i] * scale;
}

// cos and sin of position * freqs, [rope_dim/2] each.
void angles(const float *freqs, int half, int64_t position, float *turn) {
  for (int i = 0; i < half; i++) {
    const float angle = (float)position * freqs[i];
    turn[i] = cosf(angle);
    turn[half + i] = sinf(angle);
  }
}

// Rotates the pairs of the last rope_dim of x[width]; sign -1 rotates back.
inline void rotate(float *x, int width, int half, const float *turn, float sign) {
  float *pair = x + width - 2 * half;
  for (int i = 0; i < half; i++) {
    const float a = pair[2 * i], b = pair[2 * i + 1], c = turn[i], s = sign * turn[half + i];
    pair[2 * i] = a * c - b * s;
    pair[2 * i + 1] = b * c + a * s;
  }
}

// Order that torch.sort(descending, stable) uses: NaN first, then by value; ties to the smaller index. As one number,
// smaller is better.
inline uint64_t rank(float score, uint32_t index) {
  float v = score + 0.0f;  // -0 ties with 0
  uint32_t bits;
  memcpy(&bits, &v, 4);
  bits = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  if (score != score) bits = 0xFFFFFFFFu;
  return ((uint64_t)~bits << 32) | index;
}

// The k-th smallest (0-based) of distinct numbers; reorders them.
uint64_t kth(uint64_t *a, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const int64_t mid = low + (high - low) / 2;
    uint64_t x = a[low], y = a[mid], z = a[high];
    const uint64_t pivot = x < y ? (y < z ? y : (x < z ? z : x)) : (x < z ? x : (y < z ? z : y));
    int64_t i = low, j = high;
    while (i <= j) {
      while (a[i] < pivot) i++;
      while (a[j] > pivot) j--;
      if (i <= j) {
        uint64_t t = a[i];
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
  return a[k];
}

struct Run {
  const RqStep &step;
  const RqStepModel &m;
  const int64_t *ids;  // row numbers in the batch
  int64_t count;
  Block s;

  int64_t position(int64_t r) const { return step.positions[ids[r]]; }
  const float *turn(int64_t r, int compressed) const { return s.turn + (2 * r + compressed) * m.rope_dim; }

  void lin(const float *weight, int64_t outputs, int k, const float *x, int64_t x_step, float *out, int64_t out_step) {
    for (int64_t r = 0; r < count; r++) s.in[r] = x + r * x_step, s.out[r] = out + r * out_step;
    linear(weight, outputs, k, s.in, count, s.out);
  }

  // mHC, in: mix = (vec(X) fn^T) / rms(vec(X)), scaled; leaves it in s.mix (spec/model.md 4).
  void mix(const float *fn, int outputs) {
    const int wide = m.streams * m.hidden;
    lin(fn, outputs, wide, s.streams, wide, s.mix, outputs);
    for (int64_t r = 0; r < count; r++) {
      const float scale = 1.0f / sqrtf(square(s.streams + r * wide, wide) / (float)wide + m.norm_eps);
      for (int i = 0; i < outputs; i++) s.mix[r * outputs + i] *= scale;
    }
  }

  // x = norm(sum_i pre_i X_i)
  void collect(int64_t r, const float *pre, const float *norm) {
    const int d = m.hidden;
    const float *stream = s.streams + r * m.streams * d;
    float *x = s.x + r * d;
    for (int i = 0; i < d; i++) x[i] = pre[0] * stream[i];
    for (int n = 1; n < m.streams; n++)
      for (int i = 0; i < d; i++) x[i] = x[i] + pre[n] * stream[n * d + i];
    rms_scale(x, d, m.norm_eps, norm);
  }

  void enter(const RqSite &site, const float *norm) {
    const int n = m.streams, outputs = (2 + n) * n;
    mix(site.fn, outputs);
    for (int64_t r = 0; r < count; r++) {
      float *mixed = s.mix + r * outputs, *post = s.post + r * n, *comb = s.comb + r * n * n;
      for (int i = 0; i < n; i++) {
        mixed[i] = sigmoid(site.scale[0] * mixed[i] + site.base[i]) + m.hc_eps;
        post[i] = 2.0f * sigmoid(site.scale[1] * mixed[n + i] + site.base[n + i]);
      }
      for (int i = 0; i < n; i++) {
        float *row = comb + i * n, top = -INFINITY, total = 0.0f;
        for (int j = 0; j < n; j++) {
          row[j] = site.scale[2] * mixed[2 * n + i * n + j] + site.base[2 * n + i * n + j];
          top = row[j] > top ? row[j] : top;
        }
        for (int j = 0; j < n; j++) total += row[j] = exp1(row[j] - top);
        for (int j = 0; j < n; j++) row[j] = row[j] / total + m.hc_eps;
      }
      for (int pass = 0; pass < m.iters; pass++) {
        if (pass)
          for (int i = 0; i < n; i++) {
            float total = 0.0f;
            for (int j = 0; j < n; j++) total += comb[i * n + j];
            for (int j = 0; j < n; j++) comb[i * n + j] /= total + m.hc_eps;
          }
        for (int j = 0; j < n; j++) {
          float total = 0.0f;
          for (int i = 0; i < n; i++) total += comb[i * n + j];
          for (int i = 0; i < n; i++) comb[i * n + j] /= total + m.hc_eps;
        }
      }
      collect(r, mixed, norm);
    }
  }

  // mHC, out: X'_k = post_k F + sum_j comb[j][k] X_j
  void merge() {
    const int n = m.streams, d = m.hidden;
    for (int64_t r = 0; r < count; r++)
      for (int k = 0; k < n; k++) {
        const float *from = s.streams + r * n * d, *y = s.y + r * d;
        float *to = s.merged + (r * n + k) * d;
        const float post = s.post[r * n + k];
        for (int i = 0; i < d; i++) to[i] = post * y[i];
        for (int j = 0; j < n; j++) {
          const float share = s.comb[(r * n + j) * n + k];
          for (int i = 0; i < d; i++) to[i] = to[i] + share * from[j * d + i];
        }
      }
    float *t = s.streams;
    s.streams = s.merged;
    s.merged = t;
  }

  // Drops the oldest of `keep` rows and appends one.
  static void push(float *rows, int64_t keep, int64_t width, const float *row) {
    if (keep <= 0) return;
    memmove(rows, rows + width, (size_t)((keep - 1) * width) * sizeof(float));
    memcpy(rows + (keep - 1) * width, row, (size_t)width * sizeof(float));
  }

  // The entry that the row's token completes: per channel softmax over the pooled rows, norm, RoPE at its block's start.
  void pool_entry(const RqStepLayer &layer, const RqStepCompressor &c, const float *tail, const float *last, int width,
                  int64_t block, float *entry) {
    const int coff = layer.overlap ? 2 : 1, span = coff * layer.ratio, cols = coff * width;
    float *top = s.pool, *total = top + width, *value = total + width;
    for (int i = 0; i < width; i++) top[i] = -INFINITY, total[i] = 0.0f, value[i] = 0.0f;
    for (int pass = 0; pass < 2; pass++)
      for (int j = 0; j < span; j++) {
        const float *row = j < span - 1 ? tail + (int64_t)j * 2 * cols : last;
        const int half = layer.overlap && j >= layer.ratio ? width : 0;  // first half pools into the next block
        const float *v = row + half, *z = row + cols + half;
        if (!pass)
          for (int i = 0; i < width; i++) top[i] = z[i] > top[i] ? z[i] : top[i];
        else
          for (int i = 0; i < width; i++) {
            const float e = exp1(z[i] - top[i]);
            total[i] = total[i] + e;
            value[i] = value[i] + e * v[i];
          }
      }
    for (int i = 0; i < width; i++) entry[i] = value[i] / total[i];
    rms_scale(entry, width, m.norm_eps, c.norm);
    float *turn = s.turn + 2 * count * m.rope_dim;
    angles(m.freqs[1], m.rope_dim / 2, block * layer.ratio, turn);
    rotate(entry, width, m.rope_dim / 2, turn, 1.0f);
  }

  // Per-token rows of a compressor, its entry where a block ends, and the tail moved on by one.
  void compress(const RqStepLayer &layer, const RqStepCompressor &c, int width, float *rows, const RqRows &tail,
                const RqRows &entries) {
    const int cols = (layer.overlap ? 2 : 1) * width;
    lin(c.wkv, cols, m.hidden, s.x, m.hidden, rows, 2 * cols);
    lin(c.wgate, cols, m.hidden, s.x, m.hidden, rows + cols, 2 * cols);
    const int64_t keep = (int64_t)(layer.overlap ? 2 : 1) * layer.ratio - 1;
    for (int64_t r = 0; r < count; r++) {
      float *row = rows + r * 2 * cols, *held = tail.data + ids[r] * tail.stride;
      const float *ape = c.ape + position(r) % layer.ratio * cols;
      for (int i = 0; i < cols; i++) row[cols + i] = row[cols + i] + ape[i];
      const int64_t block = position(r) / layer.ratio;
      if ((position(r) + 1) % layer.ratio == 0)
        pool_entry(layer, c, held, row, width, block, entries.data + ids[r] * entries.stride + block * width);
      push(held, keep, 2 * cols, row);
    }
  }

  // Appends pointers to the entries that row r attends to, ascending, from keys[j]; returns the new j.
  int64_t choose(const RqStepLayer &layer, const RqLayerState &state, int64_t r, int64_t j) {
    const int64_t seen = (position(r) + 1) / layer.ratio;
    const float *entries = state.entries.data + ids[r] * state.entries.stride;
    if (!layer.overlap || seen <= m.index_topk) {
      for (int64_t e = 0; e < seen; e++) s.keys[j++] = entries + e * m.head_dim;
      return j;
    }
    const int hi = m.index_heads, wide = m.index_dim;
    const float *x[1] = {s.q_r + r * m.q_rank};
    float *q = s.index_q, *w = s.index_w, *to[1] = {q};
    linear(layer.index_wq_b, (int64_t)hi * wide, m.q_rank, x, 1, to);
    for (int h = 0; h < hi; h++) rotate(q + h * wide, wide, m.rope_dim / 2, turn(r, 1), 1.0f);
    x[0] = s.x + r * m.hidden, to[0] = w;
    linear(layer.index_proj, hi, m.hidden, x, 1, to);
    for (int h = 0; h < hi; h++) w[h] *= m.index_scale;
    const float *keys = state.index_keys.data + ids[r] * state.index_keys.stride;
    for (int64_t e = 0; e < seen; e += KEY_CHUNK) {
      const int64_t n = seen - e < KEY_CHUNK ? seen - e : KEY_CHUNK;
      for (int64_t i = 0; i < n; i++) s.in[i] = keys + (e + i) * wide, s.out[i] = s.dots + i * hi;
      linear(q, hi, wide, s.in, n, s.out);
      for (int64_t i = 0; i < n; i++) {
        float total = 0.0f;
        for (int h = 0; h < hi; h++) {
          const float dot = s.dots[i * hi + h];
          total = total + w[h] * (dot < 0.0f ? 0.0f : dot);  // NaN stays
        }
        s.order[e + i] = rank(total, (uint32_t)(e + i));
      }
    }
    memcpy(s.order_copy, s.order, (size_t)seen * sizeof(uint64_t));
    const uint64_t last = kth(s.order_copy, seen, m.index_topk - 1);
    for (int64_t e = 0; e < seen; e++)
      if (s.order[e] <= last) s.keys[j++] = entries + e * m.head_dim;
    return j;
  }

  // One softmax over window, entries and sink; keys are the values (spec/model.md 2.5). Writes s.heads of row r.
  void attend(const RqStepLayer &layer, const RqLayerState &state, int64_t r) {
    const int c = m.head_dim, h = m.heads;
    const int64_t keep = m.window - 1, held = position(r) < keep ? position(r) : keep;
    float *window = state.window.data + ids[r] * state.window.stride;
    int64_t j = 0;
    for (int64_t i = keep - held; i < keep; i++) s.keys[j++] = window + i * c;
    s.keys[j++] = s.kv + r * c;
    if (layer.ratio) j = choose(layer, state, r, j);
    const int64_t step_out = (j + 3) / 4 * 4;
    for (int i = 0; i < h; i++) s.in[i] = s.q + (r * h + i) * c, s.out[i] = s.probs + i * step_out;
    linear_rows(s.keys, j, c, s.in, h, s.out);
    for (int i = 0; i < h; i++) {
      float *p = s.out[i], top = layer.sink[i];
      for (int64_t k = 0; k < j; k++) top = p[k] > top ? p[k] : top;
      for (int64_t k = 0; k < j; k++) p[k] = exp1(p[k] - top);
      s.head_scale[i] = 1.0f / (sum(p, (int)j) + exp1(layer.sink[i] - top));
    }
    for (int i = 0; i < h; i++) s.in[i] = s.probs + i * step_out, s.out[i] = s.heads + (r * h + i) * c;
    weigh(s.in, s.head_scale, h, s.keys, j, c, s.out);
    push(window, keep, c, s.kv + r * c);
  }

  void attention(const RqStepLayer &layer, const RqLayerState &state) {
    const int c = m.head_dim, h = m.heads, half = m.rope_dim / 2, compressed = layer.ratio > 0;
    lin(layer.wq_a, m.q_rank, m.hidden, s.x, m.hidden, s.q_r, m.q_rank);
    for (int64_t r = 0; r < count; r++) rms_scale(s.q_r + r * m.q_rank, m.q_rank, m.norm_eps, layer.q_norm);
    lin(layer.wq_b, (int64_t)h * c, m.q_rank, s.q_r, m.q_rank, s.q, (int64_t)h * c);
    lin(layer.wkv, c, m.hidden, s.x, m.hidden, s.kv, c);
    for (int64_t r = 0; r < count; r++) {
      for (int i = 0; i < h; i++) {
        float *q = s.q + (r * h + i) * c;
        rms_scale(q, c, m.norm_eps, nullptr);
        rotate(q, c, half, turn(r, compressed), 1.0f);
        for (int k = 0; k < c; k++) q[k] *= m.head_scale;
      }
      rms_scale(s.kv + r * c, c, m.norm_eps, layer.kv_norm);
      rotate(s.kv + r * c, c, half, turn(r, compressed), 1.0f);
    }
    if (layer.ratio) compress(layer, layer.main, c, s.rows, state.tail, state.entries);
    if (layer.overlap) compress(layer, layer.index, m.index_dim, s.index_rows, state.index_tail, state.index_keys);
    for (int64_t r = 0; r < count; r++) {
      attend(layer, state, r);
      for (int i = 0; i < h; i++) rotate(s.heads + (r * h + i) * c, c, half, turn(r, compressed), -1.0f);
    }
    const int64_t group = (int64_t)h / m.groups * c, inner = (int64_t)m.groups * m.o_rank;
    for (int g = 0; g < m.groups; g++)
      lin(layer.wo_a + g * m.o_rank * group, m.o_rank, (int)group, s.heads + g * group, (int64_t)h * c,
          s.inner + g * m.o_rank, inner);
    lin(layer.wo_b, m.hidden, (int)inner, s.inner, inner, s.y, m.hidden);
  }

  // gate = silu(min(gate, limit)) * clip(up); NaN passes the clamps.
  void swiglu(float *gate, const float *up, int64_t n) {
    const float limit = m.limit > 0.0f ? m.limit : INFINITY;
    for (int64_t i = 0; i < n; i++) {
      float g = gate[i], u = up[i];
      g = g > limit ? limit : g;
      u = u > limit ? limit : u;
      u = u < -limit ? -limit : u;
      gate[i] = g / (1.0f + exp1(-g)) * u;
    }
  }

  void route(const RqStepLayer &layer, int64_t r) {
    const int k = m.per_token;
    float *scores = s.scores + r * m.experts, *weights = s.weights + r * k, total = 0.0f;
    int32_t *picks = s.picks + r * k;
    for (int e = 0; e < m.experts; e++) {
      const float z = scores[e];
      scores[e] = sqrtf(z > 20.0f ? z : log1pf(expf(z)));
    }
    if (layer.tid2eid) {
      const int64_t *row = layer.tid2eid + step.tokens[ids[r]] * k;
      for (int i = 0; i < k; i++) picks[i] = (int32_t)row[i];
    } else {
      uint64_t before = 0;  // ranks are distinct: the next best is the smallest above the last
      for (int i = 0; i < k; i++) {
        uint64_t best = UINT64_MAX;
        for (int e = 0; e < m.experts; e++) {
          const uint64_t at = rank(scores[e] + layer.bias[e], (uint32_t)e);
          if ((!i || at > before) && at < best) best = at;
        }
        picks[i] = (int32_t)(uint32_t)best;
        before = best;
      }
    }
    for (int i = 0; i < k; i++) total = total + (weights[i] = scores[picks[i]]);
    for (int i = 0; i < k; i++) weights[i] = weights[i] / (total + 1e-20f) * m.route_scale;
  }

  void experts(const RqStepLayer &layer) {
    const int d = m.hidden, f = m.expert_width, k = m.per_token;
    lin(layer.gate, m.experts, d, s.x, d, s.scores, m.experts);
    for (int64_t r = 0; r < count; r++) route(layer, r);
    for (int e = 0; e < m.experts; e++) {
      int64_t n = 0;
      for (int64_t i = 0; i < count * k; i++)
        if (s.picks[i] == e) s.list[n++] = (int32_t)i;
      if (!n) continue;
      const int64_t at = (int64_t)e * f * d;
      for (int64_t i = 0; i < n; i++) s.in[i] = s.x + s.list[i] / k * d, s.out[i] = s.inner1 + i * f;
      linear(layer.w1 + at, f, d, s.in, n, s.out);
      for (int64_t i = 0; i < n; i++) s.out[i] = s.inner3 + i * f;
      linear(layer.w3 + at, f, d, s.in, n, s.out);
      swiglu(s.inner1, s.inner3, n * f);
      for (int64_t i = 0; i < n; i++) s.in[i] = s.inner1 + i * f, s.out[i] = s.expert_out + (int64_t)s.list[i] * d;
      linear(layer.w2 + at, d, f, s.in, n, s.out);
    }
    if (m.shared_width) {
      const int w = m.shared_width;
      lin(layer.shared1, w, d, s.x, d, s.shared1, w);
      lin(layer.shared3, w, d, s.x, d, s.shared3, w);
      swiglu(s.shared1, s.shared3, count * w);
      lin(layer.shared2, d, w, s.shared1, w, s.y, d);
    }
    for (int64_t r = 0; r < count; r++) {
      float *y = s.y + r * d;
      if (!m.shared_width)
        for (int i = 0; i < d; i++) y[i] = 0.0f;
      for (int n = 0; n < k; n++) {
        const float weight = s.weights[r * k + n], *from = s.expert_out + (r * k + n) * d;
        for (int i = 0; i < d; i++) y[i] = y[i] + weight * from[i];
      }
    }
  }

  void all() {
    const int n = m.streams, d = m.hidden;
    for (int64_t r = 0; r < count; r++) {
      const float *row = m.embed + step.tokens[ids[r]] * d;
      for (int i = 0; i < n; i++) memcpy(s.streams + (r * n + i) * d, row, (size_t)d * sizeof(float));
      for (int kind = 0; kind < 2; kind++)
        angles(m.freqs[kind], m.rope_dim / 2, position(r), s.turn + (2 * r + kind) * m.rope_dim);
    }
    for (int l = 0; l < m.layers; l++) {
      const RqStepLayer &layer = step.layers[l];
      enter(layer.attn_site, layer.attn_norm);
      attention(layer, step.state[l]);
      merge();
      enter(layer.ffn_site, layer.ffn_norm);
      experts(layer);
      merge();
    }
    mix(m.mix_fn, n);
    for (int64_t r = 0; r < count; r++) {
      float *pre = s.mix + r * n;
      for (int i = 0; i < n; i++) pre[i] = sigmoid(m.mix_scale[0] * pre[i] + m.mix_base[i]) + m.hc_eps;
      collect(r, pre, m.norm);
    }
    for (int64_t r = 0; r < count; r++) s.in[r] = s.x + r * d, s.out[r] = step.logits + ids[r] * m.vocab;
    linear(m.head, m.vocab, d, s.in, count, s.out);
  }
};

void block(const RqStep *step, const int64_t *rows, int64_t count, char *slot) {
  Run run{*step, *step->model, rows, count, {}};
  Arena arena{slot, 0};
  run.s.lay(arena, *step->model, step->max_entries, count);
  run.all();
}

}  // namespace

#define RQ_JOIN(a, b) a##b
#define RQ_NAME(level) RQ_JOIN(rq_kernels_, level)
extern const RqKernels RQ_NAME(RQ_LEVEL);
const RqKernels RQ_NAME(RQ_LEVEL) = {block};

#if defined(RQ_FIRST)  // the level that also tells how much memory a block needs
int64_t rq_slot_bytes(const RqStepModel *model, int64_t max_entries, int64_t rows) {
  Arena arena{nullptr, 0};
  Block block;
  block.lay(arena, *model, max_entries, rows);
  return arena.used;
}
#endif
