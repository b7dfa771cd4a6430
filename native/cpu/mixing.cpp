// mixing.cpp: mHC, the residual of several streams: into a sublayer, out of it, and the last mix before the head.
//
//   mix = (vec(X) fn^T) / rms(vec(X));  pre = sigmoid(.)+eps, post = 2 sigmoid(.), comb = Sinkhorn(softmax(.))
//   x = norm(sum_i pre_i X_i);  X'_k = post_k F(x) + sum_j comb[j][k] X_j           (spec/model.md 4)
// The reference is rorqual/model/hyper_connections.py. Streams ascending; a stream's new value takes the old of all.
#include "call.h"

namespace RQ_NS {

namespace {

const int MOST_STREAMS = 16;  // RqModel.streams is checked against it at the boundary

void sinkhorn(float *comb, int n, int iters, float eps) {
  for (int pass = 0; pass < iters; pass++) {
    if (pass)
      for (int i = 0; i < n; i++) {
        float total = 0.0f;
        for (int j = 0; j < n; j++) total += comb[i * n + j];
        for (int j = 0; j < n; j++) comb[i * n + j] /= total + eps;
      }
    for (int j = 0; j < n; j++) {
      float total = 0.0f;
      for (int i = 0; i < n; i++) total += comb[i * n + j];
      for (int i = 0; i < n; i++) comb[i * n + j] /= total + eps;
    }
  }
}

}  // namespace

// The sublayer's output into the streams of rows [first, first + rows).
void Call::merge(Sublayer from, int64_t first, int64_t rows) {
  const int n = m.streams;
  const int64_t d = m.hidden, k = m.per_token;
  for (int64_t r = first; r < first + rows; r++) {
    float *y = s.y + r * d, *streams = s.streams + r * n * d;
    if (from == EXPERTS) {  // shared expert (or nothing), then the routed ones in the order they were picked
      if (!m.shared_width)
        for (int64_t i = 0; i < d; i++) y[i] = 0.0f;
      for (int64_t e = 0; e < k; e++) {
        const float weight = s.weights[r * k + e], *out = s.expert_out + s.place[r * k + e] * d;
        for (int64_t i = 0; i < d; i++) y[i] = y[i] + weight * out[i];
      }
    }
    const float *post = s.post + r * n, *comb = s.comb + r * n * n;
    enum { STEP = 64 };  // values of all streams that are read before any is written
    float next[MOST_STREAMS][STEP];
    for (int64_t at = 0; at < d; at += STEP) {
      const int64_t width = smaller(STEP, d - at);
      for (int to = 0; to < n; to++) {
        for (int64_t i = 0; i < width; i++) next[to][i] = post[to] * y[at + i];
        for (int j = 0; j < n; j++) {
          const float share = comb[j * n + to], *old = streams + j * d + at;
          for (int64_t i = 0; i < width; i++) next[to][i] = next[to][i] + share * old[i];
        }
      }
      for (int to = 0; to < n; to++) memcpy(streams + to * d + at, next[to], (size_t)width * sizeof(float));
    }
  }
}

// x[row] = norm(sum_i pre_i X_i)
void Call::collect(int64_t row, const float *streams, const float *pre, const float *norm) {
  const int64_t d = m.hidden;
  float *x = s.x + row * d;
  for (int64_t i = 0; i < d; i++) x[i] = pre[0] * streams[i];
  for (int n = 1; n < m.streams; n++)
    for (int64_t i = 0; i < d; i++) x[i] = x[i] + pre[n] * streams[n * d + i];
  rms_scale(x, d, m.norm_eps, norm);
}

// Merges the last sublayer's output, then x, post and comb of the next one, for all rows.
void Call::enter(Sublayer from, const RqSite &site, const float *norm) {
  const int n = m.streams, outputs = (2 + n) * n;
  const int64_t d = m.hidden, wide = n * d;
  const RqMatrix fn = {site.fn, nullptr, RQ_F32, 0};
  const Product mix = {&fn, outputs, wide, s.streams, wide, s.mix, outputs, 4};
  const auto finish = [&](int64_t r) {
    const float *streams = s.streams + r * wide;
    float *mixed = s.mix + r * outputs, *post = s.post + r * n, *comb = s.comb + r * n * n;
    const float scale = 1.0f / sqrtf(square(streams, (int)wide) / (float)wide + m.norm_eps);
    for (int i = 0; i < outputs; i++) mixed[i] *= scale;
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
    sinkhorn(comb, n, m.iters, m.hc_eps);
    collect(r, streams, mixed, norm);
  };
  const int64_t work = outputs * wide;
  if (count >= 2 * threads || work_of(outputs, wide, count) < 2 * MIN_WORK) {
    each_rows(count, work + 4 * wide, [&](int64_t first, int64_t rows, int32_t thread) {
      if (from != NOTHING) merge(from, first, rows);
      Product part = mix;
      part.x += first * wide, part.y += first * outputs;
      product(part, rows, 0, outputs, thread);
      for (int64_t r = first; r < first + rows; r++) finish(r);
    });
    return;
  }
  if (from != NOTHING) merge(from, 0, count);
  multiply(&mix, 1, count);
  for (int64_t r = 0; r < count; r++) finish(r);
}

// x[i] = norm of the last mix of row s.wanted[i], i < wanted: what the head multiplies.
void Call::leave(const RqSite &last, const float *norm, int64_t wanted) {
  const int n = m.streams;
  const int64_t wide = (int64_t)n * m.hidden;
  const RqMatrix fn = {last.fn, nullptr, RQ_F32, 0};
  each_rows(wanted, n * wide, [&](int64_t first, int64_t rows, int32_t thread) {
    for (int64_t i = first; i < first + rows; i++) {
      const float *streams = s.streams + s.wanted[i] * wide;
      float *pre = s.mix + i * n;
      product(Product{&fn, n, wide, streams, wide, pre, n, 1}, 1, 0, n, thread);
      const float scale = 1.0f / sqrtf(square(streams, (int)wide) / (float)wide + m.norm_eps);
      for (int k = 0; k < n; k++) pre[k] = sigmoid(last.scale[0] * (pre[k] * scale) + last.base[k]) + m.hc_eps;
      collect(i, streams, pre, norm);
    }
  });
}

}  // namespace RQ_NS
