// forward.cpp: a whole call at one instruction level: blocks of tokens through embedding, layers and head; the MTP head.
//
// Segments are laid end to end and cut into blocks; a segment that goes on in the next block finds its past in the rings
// and pages, as in the next call. The parts are mixing.cpp, sublayer.cpp and experts.cpp. No allocation, no exceptions.
#include "forward.h"

#include "call.h"

namespace RQ_NS {

namespace {

enum { CUT_QUERIES = 8, MOST_CUTS = 32 };  // queries of a block that are still cut over threads; cuts of an index

Call make(const RqForward *f, Team *team, int64_t tokens, int64_t positions) {
  const RqModel &m = *f->model;
  Shape shape = {smaller(larger(1, f->block_tokens), larger(1, tokens)), 0, 0, 0, 0};
  shape.runs = smaller(shape.rows, f->segment_count);
  if (f->threads > 1) {
    int64_t keys = 0;  // most entries of a query
    for (int32_t l = 0; l < m.layers; l++) {
      const RqLayer &layer = f->layers[l];
      if (layer.ratio) {
        const int64_t seen = positions / layer.ratio;
        keys = larger(keys, layer.overlap ? smaller(seen, m.index_topk) : seen);
      }
    }
    shape.part_queries = smaller(shape.rows, smaller(CUT_QUERIES, 2 * f->threads));
    shape.parts = up(m.window, RQ_PART) + up(keys, RQ_PART) + 1;
    shape.index_parts = smaller(MOST_CUTS, 4 * f->threads);
  }
  return Call{*f, m, team, f->threads, entry_bytes(f->cache_format, m.head_dim, m.rope_dim),
              key_bytes(f->cache_format, m.index_dim), shape, {}, 0, 0};
}

// The matrix's row as fp32 [k]; the boundary lets only RQ_F32 and RQ_BF16 through.
void row_of(const RqMatrix &table, int64_t row, int64_t k, float *out) {
  if (table.type == RQ_F32) {
    memcpy(out, (const float *)table.data + row * k, (size_t)k * sizeof(float));
    return;
  }
  const uint16_t *from = (const uint16_t *)table.data + row * k;
  for (int64_t i = 0; i < k; i++) {
    const uint32_t bits = (uint32_t)from[i] << 16;
    memcpy(out + i, &bits, sizeof bits);
  }
}

// A call's place in its segments, and in its outputs.
struct Cursor {
  int64_t segment, offset;
  float *logits, *hidden;
};

// Fills runs, tokens, positions and the angles of the next block.
void next_block(Call &call, Cursor &at) {
  Scratch &s = call.s;
  const RqForward &f = call.f;
  call.count = call.run_count = 0;
  while (at.segment < f.segment_count && call.count < call.shape.rows) {
    const RqSegment &segment = f.segments[at.segment];
    const int64_t rows = smaller(segment.count - at.offset, call.shape.rows - call.count);
    s.runs[call.run_count++] = Run{&segment, call.count, rows, at.offset};
    for (int64_t i = 0; i < rows; i++) {
      s.tokens[call.count + i] = segment.tokens[at.offset + i];
      s.positions[call.count + i] = segment.position + at.offset + i;
    }
    call.count += rows, at.offset += rows;
    if (at.offset == segment.count) at.segment++, at.offset = 0;
  }
  const int half = call.m.rope_dim / 2;
  call.each_rows(call.count, 256 * half, [&](int64_t first, int64_t rows, int32_t) {
    for (int64_t r = first; r < first + rows; r++)
      for (int kind = 0; kind < 2; kind++)
        angles(call.m.freqs[kind], half, s.positions[r], s.turn + (2 * r + kind) * call.m.rope_dim);
  });
}

// Streams and logits of the rows that were asked for.
void outputs(Call &call, Cursor &at, const RqSite &mix, const float *norm) {
  Scratch &s = call.s;
  const int64_t wide = (int64_t)call.m.streams * call.m.hidden, vocab = call.m.vocab;
  int64_t wanted = 0;
  for (int64_t r = 0; r < call.run_count; r++) {
    const Run &run = s.runs[r];
    const int64_t total = run.segment->count, want = run.segment->logits;
    for (int64_t i = 0; i < run.count; i++) {
      const int64_t token = run.offset + i;
      if (token >= total - run.segment->hidden) {
        memcpy(at.hidden, s.streams + (run.first + i) * wide, (size_t)wide * sizeof(float));
        at.hidden += wide;
      }
      if (want == 2 || (want == 1 && token == total - 1)) s.wanted[wanted++] = (int32_t)(run.first + i);
    }
  }
  if (!wanted) return;
  call.leave(mix, norm, wanted);
  const Product head = {&call.m.head, vocab, call.m.hidden, s.x, call.m.hidden, at.logits, vocab, 4};
  call.multiply(&head, 1, wanted);
  at.logits += wanted * vocab;
}

// `count` blocks over the streams; number: of the first, for resolve.
int64_t blocks(Call &call, const RqLayer *layers, const RqLayerCache *caches, int32_t count, int32_t number) {
  for (int32_t l = 0; l < count; l++) {
    const RqLayer &layer = layers[l];
    call.enter(l ? EXPERTS : NOTHING, layer.attn_site, layer.attn_norm);
    call.attention(layer, caches[l]);
    call.enter(ATTENTION, layer.ffn_site, layer.ffn_norm);
    const int64_t failed = call.moe(layer, number + l);
    if (failed) return failed;
  }
  const int64_t wide = (int64_t)call.m.streams * call.m.hidden;
  call.each_rows(call.count, wide * (call.m.streams + 1),
                 [&](int64_t from, int64_t rows, int32_t) { call.merge(EXPERTS, from, rows); });
  return 0;
}

int64_t total(const RqForward *f, int64_t *positions) {
  int64_t tokens = 0;
  *positions = 0;
  for (int64_t i = 0; i < f->segment_count; i++) {
    tokens += f->segments[i].count;
    *positions = larger(*positions, f->segments[i].position + f->segments[i].count);
  }
  return tokens;
}

int64_t bytes(const RqForward *f, int64_t tokens, int64_t positions) {
  Call call = make(f, nullptr, tokens, positions);
  Arena arena{nullptr, 0};
  call.lay(arena);
  return arena.used;
}

int64_t forward(const RqForward *f, Team *team) {
  int64_t positions;
  const int64_t tokens = total(f, &positions);
  Call call = make(f, team, tokens, positions);
  Arena arena{(char *)f->scratch, 0};
  call.lay(arena);
  Cursor at = {0, 0, f->logits, f->hidden};
  const int64_t d = call.m.hidden, n = call.m.streams;
  while (at.segment < f->segment_count) {
    next_block(call, at);
    call.each_rows(call.count, n * d, [&](int64_t first, int64_t rows, int32_t) {
      for (int64_t r = first; r < first + rows; r++)
        for (int64_t i = 0; i < n; i++)
          row_of(call.m.embed, call.s.tokens[r], d, call.s.streams + (r * n + i) * d);
    });
    const int64_t failed = blocks(call, f->layers, f->caches, call.m.layers, 0);
    if (failed) return failed;
    outputs(call, at, call.m.mix, call.m.norm);
  }
  return 0;
}

// x = e_proj(enorm(embed(token))) + h_proj(hnorm(X_n)) for every stream n.
int64_t mtp(const RqForward *f, const RqMtp *head, const float *streams, Team *team) {
  int64_t positions;
  const int64_t tokens = total(f, &positions);
  Call call = make(f, team, tokens, positions);
  Arena arena{(char *)f->scratch, 0};
  call.lay(arena);
  Cursor at = {0, 0, f->logits, f->hidden};
  Scratch &s = call.s;
  const int64_t d = call.m.hidden, n = call.m.streams;
  while (at.segment < f->segment_count) {
    next_block(call, at);
    const int64_t rows = call.count;
    call.each_rows(rows, 8 * (n + 1) * d, [&](int64_t first, int64_t some, int32_t) {
      for (int64_t r = first; r < first + some; r++) {
        row_of(call.m.embed, s.tokens[r], d, s.x + r * d);
        rms_scale(s.x + r * d, d, call.m.norm_eps, head->enorm);
        for (int64_t i = r * n; i < (r + 1) * n; i++) {
          memcpy(s.gathered + i * d, streams + i * d, (size_t)d * sizeof(float));
          rms_scale(s.gathered + i * d, d, call.m.norm_eps, head->hnorm);
        }
      }
    });
    streams += rows * n * d;
    const Product token = {&head->e_proj, d, d, s.x, d, s.y, d, 4};
    const Product past = {&head->h_proj, d, d, s.gathered, d, s.streams, d, 4};
    call.multiply(&token, 1, rows);
    call.multiply(&past, 1, rows * n);
    call.each_rows(rows, n * d, [&](int64_t first, int64_t some, int32_t) {
      for (int64_t i = first * n; i < (first + some) * n; i++)
        for (int64_t k = 0; k < d; k++) s.streams[i * d + k] = s.y[i / n * d + k] + s.streams[i * d + k];
    });
    const int64_t failed = blocks(call, head->layer, head->cache, 1, call.m.layers);
    if (failed) return failed;
    outputs(call, at, head->mix, head->norm);
  }
  return 0;
}

}  // namespace

void Call::lay(Arena &a) {
  const int64_t t = shape.rows, n = m.streams, d = m.hidden, c = m.head_dim, h = m.heads, wide = m.index_dim;
  const int64_t slots = t * m.per_token, per_row = shape.part_queries;
  s.runs = a.take<Run>(shape.runs);
  s.tokens = a.take<int64_t>(t);
  s.positions = a.take<int64_t>(t);
  s.seen = a.take<int64_t>(t);
  s.wanted = a.take<int32_t>(t);
  s.streams = a.take<float>(t * n * d);
  s.x = a.take<float>(t * d);
  s.y = a.take<float>(t * d);
  s.mix = a.take<float>(t * (2 + n) * n);
  s.post = a.take<float>(t * n);
  s.comb = a.take<float>(t * n * n);
  s.turn = a.take<float>(t * 2 * m.rope_dim);
  const int64_t shared = a.used;  // attention and experts take turns with what follows
  s.q_r = a.take<float>(t * m.q_rank);
  s.q = a.take<float>(t * h * c);
  s.kv = a.take<float>(t * c);
  s.rows = a.take<float>(t * 4 * c);
  s.index_rows = a.take<float>(t * 4 * wide);
  s.index_q = a.take<float>(t * m.index_heads * wide);
  s.index_w = a.take<float>(t * m.index_heads);
  s.heads = a.take<float>(t * h * c);
  s.inner = a.take<float>(t * m.groups * m.o_rank);
  s.picks = a.take<int32_t>(t * m.index_topk);
  s.pick_counts = a.take<int32_t>(t);
  s.window_rows = a.take<const void *>(shape.runs * (m.window - 1) + t);
  s.attends = a.take<RqAttend>(shape.runs);
  s.indexes = a.take<RqIndex>(shape.runs);
  // Entry pieces: at most one an entry and kind; attention: one a query, or parts or heads of a few queries.
  s.pieces = a.take<Piece>(larger(2 * t + 2 * shape.runs, t + per_row * larger(shape.parts, up(h, 8))));
  RqAttend core = {};
  core.heads = m.heads, core.width = m.head_dim, core.rope = m.rope_dim, core.window = m.window;
  core.format = f.cache_format;
  RqIndex index = {};
  index.heads = m.index_heads, index.width = m.index_dim, index.format = f.cache_format, index.top_k = m.index_topk;
  s.part_bytes = up(attend_partial_bytes(&core), 64) * 64;
  s.index_part_bytes = index_partial_bytes(&index);
  s.partials = a.take<char>(per_row * larger(shape.parts * s.part_bytes, shape.index_parts * s.index_part_bytes));
  const int64_t end = a.used;
  a.used = shared;
  s.scores = a.take<float>(t * m.experts);
  s.weights = a.take<float>(slots);
  s.gathered = a.take<float>(larger(slots, t * n) * d);
  s.inner1 = a.take<float>(slots * m.expert_width);
  s.inner3 = a.take<float>(slots * m.expert_width);
  s.expert_out = a.take<float>(slots * d);
  s.shared1 = a.take<float>(t * m.shared_width);
  s.shared3 = a.take<float>(t * m.shared_width);
  s.experts = a.take<int32_t>(slots);
  s.place = a.take<int32_t>(slots);
  s.starts = a.take<int32_t>(m.experts + 1);
  s.next = a.take<int32_t>(m.experts);
  s.used = a.take<int32_t>(m.experts);
  s.resolved = a.take<RqMatrix>(3 * m.experts);
  a.used = larger(a.used, end);
  const int64_t widest = larger(larger(larger(d * n, h / m.groups * c), larger(m.q_rank, m.groups * m.o_rank)),
                                larger(m.expert_width, m.shared_width));
  const int64_t pooling = (up(larger(c, wide), 16) * 16 * 4 + 2 * m.rope_dim) * (int64_t)sizeof(float);
  s.slot_bytes = up(larger(larger(attend_scratch(&core), index_scratch(&index)), larger(pooling, matmul_scratch(widest))),
                    64) * 64;
  s.slots = a.take<char>(threads * s.slot_bytes);
}

}  // namespace RQ_NS

#define RQ_JOIN(a, b) a##b
#define RQ_NAME(level) RQ_JOIN(rq_forward_, level)
extern const RqForwardKernels RQ_NAME(RQ_LEVEL);
const RqForwardKernels RQ_NAME(RQ_LEVEL) = {RQ_NS::bytes, RQ_NS::forward, RQ_NS::mtp};
