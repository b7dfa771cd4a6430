// call.h: what the parts of the forward call share: its working memory, its tokens and how work is spread over threads.
//
// A call's tokens go through all layers in blocks of at most RqForward.block_tokens: rows of a block are the tokens of
// its runs, one run a segment. A phase is spread by outputs, tokens or experts; what a row becomes depends on that row
// alone, whatever the cut. Sums run in one order: over k as gemm.h says, over streams, experts and pooled rows ascending.
// Letters: T rows of a block, N streams, d hidden, H heads, c head width, m ratio, W window, K experts a token.
#pragma once
#include <math.h>
#include <string.h>

#include "attend.h"
#include "gemm.h"
#include "index.h"
#include "rorqual_cpu.h"
#include "rows.h"
#include "simd.h"
#include "team.h"

namespace RQ_NS {

struct Run {  // consecutive tokens of one segment within a block
  const RqSegment *segment;
  int64_t first, count;  // rows of the block
  int64_t offset;        // of its first token in the segment
  int64_t position() const { return segment->position + offset; }
};

struct Product {  // y[row] = w x[row] for all rows of the block
  const RqMatrix *w;
  int64_t outputs, k;
  const float *x;
  int64_t x_step;
  float *y;
  int64_t y_step;
  int64_t unit;  // outputs that stay together
};

struct Piece {  // of the attention of a run: queries [first, first + count), or part `part` of query `first`
  int32_t run, first, count, part;
};

enum Sublayer { NOTHING, ATTENTION, EXPERTS };  // what goes into the streams before the next site

struct Arena {  // cuts 64-byte aligned pieces off the scratch; base null only counts
  char *base;
  int64_t used;
  template <typename T>
  T *take(int64_t count) {
    char *at = base + used;
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return base ? (T *)at : nullptr;
  }
};

struct Shape {  // how much working memory a call needs
  int64_t rows, runs;
  int64_t part_queries, parts, index_parts;  // queries that may be cut in parts, and parts of each
};

struct Rows {
  const float *data;
  int64_t step, count;
};

struct Scratch {
  Run *runs;
  int64_t *tokens, *positions, *seen;
  int32_t *wanted;  // rows that go to the head
  float *streams, *x, *y, *mix, *post, *comb, *turn;
  // attention
  float *q_r, *q, *kv, *rows, *index_rows, *index_q, *index_w, *heads, *inner;
  int32_t *picks, *pick_counts;
  const void **window_rows;
  RqAttend *attends;
  RqIndex *indexes;
  Piece *pieces;
  char *partials;
  // experts
  float *scores, *weights, *gathered, *inner1, *inner3, *expert_out, *shared1, *shared3;
  int32_t *experts, *place, *starts, *next, *used;
  RqMatrix *resolved;
  char *slots;  // per thread
  int64_t slot_bytes, part_bytes, index_part_bytes;
};

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum { MIN_WORK = 1 << 16 };  // multiply-adds below which a task is not worth a thread (about 2 us)

// Work of a product: fetching a weight costs as much as using it for some rows.
inline int64_t work_of(int64_t outputs, int64_t k, int64_t rows) { return outputs * k * (rows + 3); }

struct Call {
  const RqForward &f;
  const RqModel &m;
  Team *team;
  int32_t threads;
  int64_t entry_size, key_size;
  Shape shape;
  Scratch s;
  int64_t count, run_count;  // of the block

  void lay(Arena &arena);
  void *slot(int32_t thread) const { return s.slots + thread * s.slot_bytes; }
  const float *turn(int64_t row, int compressed) const { return s.turn + (2 * row + compressed) * m.rope_dim; }

  // body(task, thread) for every task.
  template <typename Body>
  void each(int64_t tasks, const Body &body) {
    struct Trampoline {
      static void go(void *arg, int32_t task, int32_t thread) { (*(const Body *)arg)((int64_t)task, thread); }
    };
    team_run(team, threads, Trampoline::go, (void *)&body, (int32_t)tasks);
  }

  // The same, on the caller alone where `work` multiply-adds are not worth waking others.
  template <typename Body>
  void run(int64_t tasks, int64_t work, const Body &body) {
    if (threads > 1 && work >= 2 * MIN_WORK) return each(tasks, body);
    for (int64_t task = 0; task < tasks; task++) body(task, 0);
  }

  // How many tasks `work` multiply-adds make, at most `most`.
  int64_t tasks_of(int64_t work, int64_t most) const {
    if (threads == 1) return 1;
    return larger(1, smaller(smaller(work / MIN_WORK, (int64_t)4 * threads), most));
  }

  // body(first, count, thread) over rows [0, rows) in even pieces; `work` multiply-adds a row.
  template <typename Body>
  void each_rows(int64_t rows, int64_t work, const Body &body) {
    const int64_t tasks = tasks_of(rows * work, rows);
    each(tasks, [&](int64_t task, int32_t thread) {
      const int64_t first = rows * task / tasks, end = rows * (task + 1) / tasks;
      if (end > first) body(first, end - first, thread);
    });
  }

  void product(const Product &p, int64_t rows, int64_t first, int64_t outputs, int32_t thread) {
    matmul(p.w, p.k, first, outputs, p.x, p.x_step, rows, p.y + first, p.y_step, slot(thread));
  }

  // All products over `rows` rows, cut by outputs; after(product, first output, outputs) where a piece is done.
  // extra(i, thread), i in [0, extras), runs beside them: extra_work multiply-adds in all.
  template <typename After, typename Extra>
  void multiply(const Product *list, int n, int64_t rows, const After &after, int64_t extras, int64_t extra_work,
                const Extra &extra) {
    int64_t work = 0, chunk[8], start[9];
    for (int i = 0; i < n; i++) work += work_of(list[i].outputs, list[i].k, rows);
    const int64_t tasks = tasks_of(work, INT64_MAX);
    start[0] = 0;
    for (int i = 0; i < n; i++) {
      const Product &p = list[i];
      const int64_t wanted = tasks == 1 ? p.outputs : up(work / tasks, larger(1, work_of(1, p.k, rows)));
      chunk[i] = larger(1, up(smaller(wanted, p.outputs), p.unit)) * p.unit;
      start[i + 1] = start[i] + up(p.outputs, chunk[i]);
    }
    const int64_t total = start[n] + extras;
    const auto body = [&](int64_t task, int32_t thread) {
      if (task >= start[n]) return extra(task - start[n], thread);
      int i = 0;
      while (task >= start[i + 1]) i++;
      const int64_t first = (task - start[i]) * chunk[i], outputs = smaller(chunk[i], list[i].outputs - first);
      product(list[i], rows, first, outputs, thread);
      after(i, first, outputs);
    };
    run(total, work + extra_work, body);
  }

  void multiply(const Product *list, int n, int64_t rows) {
    multiply(list, n, rows, [](int, int64_t, int64_t) {}, 0, 0, [](int64_t, int32_t) {});
  }

  void attention(const RqLayer &layer, const RqLayerCache &cache);  // x to y
  void pick(const RqLayer &layer, const RqLayerCache &cache);
  void core(const RqLayer &layer, const RqLayerCache &cache);
  int64_t moe(const RqLayer &layer, int32_t number);                // x to what merge() adds up; resolve's error
  void gated(const RqMatrix *w1, const RqMatrix *w3, int64_t width, const Rows &x, float *inner1, float *inner3,
             int64_t first, int64_t outputs, int32_t thread);
  void merge(Sublayer from, int64_t first, int64_t rows);
  void collect(int64_t row, const float *streams, const float *pre, const float *norm);
  void enter(Sublayer from, const RqSite &site, const float *norm);
  void leave(const RqSite &mix, const float *norm, int64_t wanted);
};

inline float sigmoid(float x) { return 1.0f / (1.0f + exp1(-x)); }

inline void rms_scale(float *x, int64_t n, float eps, const float *weight) {
  const float scale = 1.0f / sqrtf(square(x, (int)n) / (float)n + eps);
  if (weight)
    for (int64_t i = 0; i < n; i++) x[i] = weight[i] * (x[i] * scale);
  else
    for (int64_t i = 0; i < n; i++) x[i] = x[i] * scale;
}

// cos and sin of position * freqs, [rope_dim/2] each.
inline void angles(const float *freqs, int half, int64_t position, float *turn) {
  for (int i = 0; i < half; i++) {
    const float angle = (float)position * freqs[i];
    turn[i] = cosf(angle);
    turn[half + i] = sinf(angle);
  }
}

// Rotates the pairs of the last 2 half dims of x[width]; sign -1 rotates back.
inline void rotate(float *x, int64_t width, int half, const float *turn, float sign) {
  float *pair = x + width - 2 * half;
  for (int i = 0; i < half; i++) {
    const float a = pair[2 * i], b = pair[2 * i + 1], c = turn[i], s = sign * turn[half + i];
    pair[2 * i] = a * c - b * s;
    pair[2 * i + 1] = b * c + a * s;
  }
}

}  // namespace RQ_NS
