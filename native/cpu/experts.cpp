// experts.cpp: the MoE sublayer of a block of tokens, sorted by expert; shared expert beside the router.
//
//   s = sqrt(softplus(x gate^T)); experts = top-k of s + bias, or tid2eid[token]; weights = s / sum(s) * route_scale
//   expert(x) = w2 (silu(min(w1 x, c)) * clip(w3 x, -c, c))                                (spec/model.md 5)
// The reference is rorqual/model/moe.py. A token's experts are added up in the order it picked them (Call::merge).
#include "call.h"

namespace RQ_NS {

namespace {

// gate = silu(min(gate, limit)) * clip(up); NaN passes the clamps.
void swiglu(float *gate, const float *up, int64_t n, float clamp) {
  const float limit = clamp > 0.0f ? clamp : INFINITY;
  for (int64_t i = 0; i < n; i++) {
    float g = gate[i], u = up[i];
    g = g > limit ? limit : g;
    u = u > limit ? limit : u;
    u = u < -limit ? -limit : u;
    gate[i] = g / (1.0f + exp1(-g)) * u;
  }
}

// Order of torch.topk for distinct scores, NaN first; ties to the smaller index. Smaller is better.
inline uint64_t rank(float score, uint32_t index) {
  float v = score + 0.0f;  // -0 ties with 0
  uint32_t bits;
  memcpy(&bits, &v, 4);
  bits = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  if (score != score) bits = 0xFFFFFFFFu;
  return ((uint64_t)~bits << 32) | index;
}

// Experts and weights of row r.
void route(Call &call, const RqLayer &layer, int64_t r) {
  const RqModel &m = call.m;
  const int64_t k = m.per_token;
  float *scores = call.s.scores + r * m.experts, *weights = call.s.weights + r * k, total = 0.0f;
  int32_t *picks = call.s.experts + r * k;
  for (int64_t e = 0; e < m.experts; e++) {
    const float z = scores[e];
    scores[e] = sqrtf(z > 20.0f ? z : log1pf(expf(z)));
  }
  if (layer.tid2eid) {
    const int64_t *row = layer.tid2eid + call.s.tokens[r] * k;
    for (int64_t i = 0; i < k; i++) picks[i] = (int32_t)row[i];
  } else {
    uint64_t before = 0;  // ranks are distinct: the next best is the smallest above the last
    for (int64_t i = 0; i < k; i++) {
      uint64_t best = UINT64_MAX;
      for (int64_t e = 0; e < m.experts; e++) {
        const uint64_t at = rank(scores[e] + layer.bias[e], (uint32_t)e);
        if ((!i || at > before) && at < best) best = at;
      }
      picks[i] = (int32_t)(uint32_t)best;
      before = best;
    }
  }
  for (int64_t i = 0; i < k; i++) total = total + (weights[i] = scores[picks[i]]);
  for (int64_t i = 0; i < k; i++) weights[i] = weights[i] / (total + 1e-20f) * m.route_scale;
}

}  // namespace

// w1 and w3 of rows x, outputs [first, first + outputs), and SwiGLU in place of inner1.
void Call::gated(const RqMatrix *w1, const RqMatrix *w3, int64_t width, const Rows &x, float *inner1, float *inner3,
                 int64_t first, int64_t outputs, int32_t thread) {
  product(Product{w1, width, m.hidden, x.data, x.step, inner1, width, 1}, x.count, first, outputs, thread);
  product(Product{w3, width, m.hidden, x.data, x.step, inner3, width, 1}, x.count, first, outputs, thread);
  for (int64_t r = 0; r < x.count; r++)
    swiglu(inner1 + r * width + first, inner3 + r * width + first, outputs, m.limit);
}

int64_t Call::moe(const RqLayer &layer, int32_t number) {
  const int64_t d = m.hidden, width = m.expert_width, shared = m.shared_width, k = m.per_token;
  const Product gate = {&layer.gate, m.experts, d, s.x, d, s.scores, m.experts, 4};
  const int64_t shared_cuts = shared ? tasks_of(work_of(2 * shared, d, count), up(shared, 16)) : 0;
  const int64_t shared_step = shared ? up(up(shared, shared_cuts), 16) * 16 : 1;
  const Rows all = {s.x, d, count};
  multiply(&gate, 1, count, [](int, int64_t, int64_t) {}, up(shared, shared_step), work_of(2 * shared, d, count),
           [&](int64_t i, int32_t thread) {
             gated(&layer.shared1, &layer.shared3, shared, all, s.shared1, s.shared3, i * shared_step,
                   smaller(shared_step, shared - i * shared_step), thread);
           });
  each_rows(count, 64 * m.experts, [&](int64_t first, int64_t rows, int32_t) {
    for (int64_t r = first; r < first + rows; r++) route(*this, layer, r);
  });

  // Slots (token, pick) in order of their expert: expert e's lie from starts[e] on; slot i went to place[i].
  const int64_t slots = count * k;
  int64_t used = 0;
  for (int64_t e = 0; e <= m.experts; e++) s.starts[e] = 0;
  for (int64_t i = 0; i < slots; i++) s.starts[s.experts[i] + 1]++;
  for (int64_t e = 0; e < m.experts; e++) {
    if (s.starts[e + 1]) s.used[used++] = (int32_t)e;
    s.starts[e + 1] += s.starts[e];
  }
  for (int64_t e = 0; e < m.experts; e++) s.next[e] = s.starts[e];
  for (int64_t i = 0; i < slots; i++) {
    const int32_t place = s.next[s.experts[i]]++;
    s.place[i] = place;
  }
  each_rows(slots, d, [&](int64_t first, int64_t rows, int32_t) {
    for (int64_t i = first; i < first + rows; i++)
      memcpy(s.gathered + s.place[i] * d, s.x + i / k * d, (size_t)d * sizeof(float));
  });

  const RqMatrix *matrices = layer.experts;
  if (!matrices) {
    const int32_t failed = f.resolve(f.context, number, s.used, (int32_t)used, s.resolved);
    if (failed) return failed > 0 ? failed : 1;
    matrices = s.resolved;
  }
  const auto expert = [&](int64_t i) { return matrices + 3 * (layer.experts ? s.used[i] : i); };
  // Even pieces of every expert's outputs: as many as the threads can use.
  const int64_t work = used * work_of(width, d, up(slots, used));
  const int64_t in_tasks = tasks_of(2 * work, INT64_MAX), out_tasks = tasks_of(work, INT64_MAX);
  const int64_t in_step = up(up(width, up(in_tasks, used)), 16) * 16, in_cuts = up(width, in_step);
  const int64_t out_step = up(up(d, up(out_tasks, used)), 16) * 16, out_cuts = up(d, out_step);
  const auto inner = [&](int64_t task, int32_t thread) {
    const int64_t i = task / in_cuts, first = task % in_cuts * in_step, e = s.used[i];
    const int64_t at = s.starts[e];
    const Rows x = {s.gathered + at * d, d, s.starts[e + 1] - at};
    gated(expert(i), expert(i) + 1, width, x, s.inner1 + at * width, s.inner3 + at * width, first,
          smaller(in_step, width - first), thread);
  };
  const auto outer = [&](int64_t task, int32_t thread) {
    const int64_t i = task / out_cuts, first = task % out_cuts * out_step, e = s.used[i];
    const int64_t at = s.starts[e];
    const Product p = {expert(i) + 2, d, width, s.inner1 + at * width, width, s.expert_out + at * d, d, 1};
    product(p, s.starts[e + 1] - at, first, smaller(out_step, d - first), thread);
  };
  run(used * in_cuts, 2 * work, inner);
  const Product out = {&layer.shared2, d, shared, s.shared1, shared, s.y, d, 4};
  multiply(&out, shared ? 1 : 0, count, [](int, int64_t, int64_t) {}, used * out_cuts, work, outer);
  return 0;
}

}  // namespace RQ_NS
