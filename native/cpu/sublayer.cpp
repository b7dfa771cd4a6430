// sublayer.cpp: the attention sublayer of a block of tokens: projections, compressor, index, attention core, output.
//
// Order (spec/model.md 2.8): per-token rows; entries and keys that the block completes, into their pages; scores and
// picks; attention; then the rings. An entry is visible to the token that completes it. Rows of the block are read from
// scratch, older ones from the rings, so a block may be longer than a ring. The reference is rorqual/model/attention.py.
#include "call.h"

namespace RQ_NS {

namespace {

// One compressor of one layer, and where its rows are.
struct Pooling {
  const RqCompressor *weights;
  int64_t width, cols, span;  // cols = coff * width, span = coff * ratio rows
  const float *rows;          // of the block [T][2 * cols]: values, scores
  int64_t tail_at, tail_rows;
};

// Entry w of a run, fp32 [width]: per channel softmax over the pooled rows, norm, RoPE at its block's first position.
// Positions below 0 have score -inf: they are left out.
void pool_entry(const Call &call, const RqLayer &layer, const Pooling &p, const Run &run, int64_t w, float *temp,
                float *entry) {
  const int64_t width = p.width, position = run.position();
  float *top = temp, *total = top + width, *value = total + width, *turn = value + width;
  for (int64_t i = 0; i < width; i++) top[i] = -INFINITY, total[i] = 0.0f, value[i] = 0.0f;
  for (int pass = 0; pass < 2; pass++)
    for (int64_t j = 0; j < p.span; j++) {
      const int64_t at = (w + 1) * layer.ratio - p.span + j;
      if (at < 0) continue;
      const float *row = at >= position
                             ? p.rows + (run.first + at - position) * 2 * p.cols
                             : (const float *)(run.segment->slab + p.tail_at) + at % p.tail_rows * 2 * p.cols;
      const int64_t half = layer.overlap && j >= layer.ratio ? width : 0;  // first half pools into the next block
      const float *v = row + half, *z = row + p.cols + half;
      if (!pass)
        for (int64_t i = 0; i < width; i++) top[i] = z[i] > top[i] ? z[i] : top[i];
      else
        for (int64_t i = 0; i < width; i++) {
          const float e = exp1(z[i] - top[i]);
          total[i] = total[i] + e;
          value[i] = value[i] + e * v[i];
        }
    }
  for (int64_t i = 0; i < width; i++) entry[i] = value[i] / total[i];
  rms_scale(entry, width, call.m.norm_eps, p.weights->norm);
  angles(call.m.freqs[1], call.m.rope_dim / 2, w * layer.ratio, turn);
  rotate(entry, width, call.m.rope_dim / 2, turn, 1.0f);
}

// The last rows of a run into a ring: row(i) is the run's i-th.
template <typename Put>
void into_ring(const Run &run, uint8_t *ring, int64_t capacity, int64_t row_bytes, const Put &put) {
  for (int64_t i = larger(0, run.count - capacity); i < run.count; i++)
    put(i, ring + (run.position() + i) % capacity * row_bytes);
}

}  // namespace

void Call::attention(const RqLayer &layer, const RqLayerCache &cache) {
  const int64_t d = m.hidden, c = m.head_dim, h = m.heads, wide = m.index_dim, top_k = m.index_topk;
  const int half = m.rope_dim / 2, compressed = layer.ratio > 0, format = f.cache_format;
  const int64_t coff = layer.overlap ? 2 : 1, cols = coff * c, index_cols = coff * wide;
  bool choose = false;  // does any query see more than it may pick?
  for (int64_t r = 0; r < count; r++) {
    s.seen[r] = compressed ? (s.positions[r] + 1) / layer.ratio : 0;
    choose |= layer.overlap && s.seen[r] > top_k;
  }
  Product first[8] = {{&layer.wq_a, m.q_rank, d, s.x, d, s.q_r, m.q_rank, 4}, {&layer.wkv, c, d, s.x, d, s.kv, c, 4}};
  int n = 2;
  if (compressed) {
    first[n++] = {&layer.main.wkv, cols, d, s.x, d, s.rows, 2 * cols, 4};
    first[n++] = {&layer.main.wgate, cols, d, s.x, d, s.rows + cols, 2 * cols, 4};
  }
  if (layer.overlap) {
    first[n++] = {&layer.index.wkv, index_cols, d, s.x, d, s.index_rows, 2 * index_cols, 4};
    first[n++] = {&layer.index.wgate, index_cols, d, s.x, d, s.index_rows + index_cols, 2 * index_cols, 4};
  }
  if (choose) first[n++] = {&layer.index_proj, m.index_heads, d, s.x, d, s.index_w, m.index_heads, 4};
  multiply(first, n, count);

  each_rows(count, 4 * (m.q_rank + c + cols), [&](int64_t at, int64_t rows, int32_t) {
    for (int64_t r = at; r < at + rows; r++) {
      rms_scale(s.q_r + r * m.q_rank, m.q_rank, m.norm_eps, layer.q_norm);
      float *kv = s.kv + r * c;
      rms_scale(kv, c, m.norm_eps, layer.kv_norm);
      rotate(kv, c, half, turn(r, compressed), 1.0f);
      round_entry(format, kv, (int32_t)c, m.rope_dim);
      if (!compressed) continue;
      const int64_t place = s.positions[r] % layer.ratio;
      float *scores = s.rows + r * 2 * cols + cols;
      for (int64_t i = 0; i < cols; i++) scores[i] = scores[i] + layer.main.ape[place * cols + i];
      if (!layer.overlap) continue;
      scores = s.index_rows + r * 2 * index_cols + index_cols;
      for (int64_t i = 0; i < index_cols; i++) scores[i] = scores[i] + layer.index.ape[place * index_cols + i];
      if (choose)
        for (int64_t i = 0; i < m.index_heads; i++) s.index_w[r * m.index_heads + i] *= m.index_scale;
    }
  });

  // Queries, and beside them the entries and keys that the block completes.
  const Pooling poolings[2] = {
      {&layer.main, c, cols, coff * layer.ratio, s.rows, cache.tail_at, cache.tail_rows},
      {&layer.index, wide, index_cols, coff * layer.ratio, s.index_rows, cache.index_tail_at, cache.tail_rows}};
  int64_t pieces = 0;
  for (int64_t r = 0; compressed && r < run_count; r++) {
    const Run &run = s.runs[r];
    const int64_t made = (run.position() + run.count) / layer.ratio - run.position() / layer.ratio;
    if (run.segment->frozen) continue;
    for (int kind = 0; kind < (layer.overlap ? 2 : 1); kind++) {
      const int64_t some = larger(1, MIN_WORK / 4 / (poolings[kind].span * poolings[kind].width));
      for (int64_t e = 0; e < made; e += some)
        s.pieces[pieces++] = {(int32_t)r, (int32_t)e, (int32_t)smaller(some, made - e), kind};
    }
  }
  const auto entries = [&](int64_t i, int32_t thread) {
    const Piece &piece = s.pieces[i];
    const Run &run = s.runs[piece.run];
    const Pooling &p = poolings[piece.part];
    float *entry = (float *)slot(thread), *temp = entry + up(p.width, 16) * 16;
    for (int64_t e = piece.first; e < piece.first + piece.count; e++) {
      const int64_t w = run.position() / layer.ratio + e, per_page = RQ_PAGE_TOKENS / layer.ratio;
      const int64_t page = run.segment->pages[w / per_page];
      pool_entry(*this, layer, p, run, w, temp, entry);
      if (!piece.part) {
        uint8_t *to = cache.entries + page * cache.entries_page + w % per_page * entry_size;
        pack_entry(format, entry, (int32_t)c, m.rope_dim, to);
      } else {
        if (format == RQ_PACKED) hadamard(entry, (int32_t)wide);
        pack_key(format, entry, (int32_t)wide, cache.keys + page * cache.keys_page + w % per_page * key_size);
      }
    }
  };
  const Product queries[2] = {{&layer.wq_b, h * c, m.q_rank, s.q_r, m.q_rank, s.q, h * c, c},
                              {&layer.index_wq_b, (int64_t)m.index_heads * wide, m.q_rank, s.q_r, m.q_rank, s.index_q,
                               (int64_t)m.index_heads * wide, wide}};
  multiply(queries, choose ? 2 : 1, count,
           [&](int which, int64_t from, int64_t outputs) {
             const int64_t width = which ? wide : c, all = which ? m.index_heads * wide : h * c;
             for (int64_t r = 0; r < count; r++)
               for (int64_t i = from; i < from + outputs; i += width) {
                 float *q = (which ? s.index_q : s.q) + r * all + i;
                 if (!which) rms_scale(q, c, m.norm_eps, nullptr);
                 rotate(q, width, half, turn(r, compressed), 1.0f);
                 if (!which)
                   for (int64_t k = 0; k < c; k++) q[k] *= m.head_scale;
               }
           },
           pieces, pieces * (MIN_WORK / 4), entries);

  if (choose) pick(layer, cache);
  core(layer, cache);

  const int64_t group = h / m.groups * c, inner = (int64_t)m.groups * m.o_rank;
  const int64_t work = work_of(inner, group, count);
  const int64_t cuts = up(tasks_of(work, INT64_MAX), m.groups);  // of a group's outputs
  const int64_t piece = up(up(m.o_rank, cuts), 4) * 4, per_group = up(m.o_rank, piece);
  const auto rings = [&](int64_t r) {
    const Run &run = s.runs[r];
    into_ring(run, run.segment->slab + cache.window_at, cache.window_rows, entry_size, [&](int64_t i, uint8_t *to) {
      pack_entry(format, s.kv + (run.first + i) * c, (int32_t)c, m.rope_dim, to);
    });
    for (int kind = 0; compressed && kind < (layer.overlap ? 2 : 1); kind++) {
      const Pooling &p = poolings[kind];
      const size_t bytes = (size_t)(2 * p.cols) * sizeof(float);
      into_ring(run, run.segment->slab + p.tail_at, p.tail_rows, (int64_t)bytes, [&](int64_t i, uint8_t *to) {
        memcpy(to, p.rows + (run.first + i) * 2 * p.cols, bytes);
      });
    }
  };
  const auto low_rank = [&](int64_t task, int32_t thread) {
    const int64_t g = task / per_group, from = task % per_group * piece;
    const Product p = {&layer.wo_a, inner, group, s.heads + g * group, h * c, s.inner, inner, 4};
    product(p, count, g * m.o_rank + from, smaller(piece, m.o_rank - from), thread);
  };
  const int64_t products = per_group * m.groups;
  this->run(products + run_count, work, [&](int64_t task, int32_t thread) {
    if (task < products)
      low_rank(task, thread);
    else
      rings(task - products);
  });
  const Product out = {&layer.wo_b, d, inner, s.inner, inner, s.y, d, 4};
  multiply(&out, 1, count);
}

// Picks of every query whose run sees more than index_topk entries.
void Call::pick(const RqLayer &layer, const RqLayerCache &cache) {
  const int64_t top_k = m.index_topk, long_run = 4096;
  int64_t pieces = 0, queries = 0, most = 0;
  for (int64_t r = 0; r < run_count; r++) {
    const Run &run = s.runs[r];
    RqIndex &job = s.indexes[r];
    memset(&job, 0, sizeof job);
    job.heads = m.index_heads, job.width = m.index_dim, job.format = f.cache_format, job.top_k = m.index_topk;
    job.page_rows = RQ_PAGE_TOKENS / layer.ratio;
    job.queries = run.count;
    job.q_step = (int64_t)m.index_heads * m.index_dim, job.weights_step = m.index_heads, job.picks_step = top_k;
    job.q = s.index_q + run.first * job.q_step, job.weights = s.index_w + run.first * job.weights_step;
    job.keys = cache.keys, job.page_bytes = cache.keys_page, job.pages = run.segment->pages;
    job.seen = s.seen + run.first, job.picks = s.picks + run.first * top_k;
    job.pick_counts = s.pick_counts + run.first;
    const int64_t last = s.seen[run.first + run.count - 1];
    if (last <= top_k) continue;
    queries += run.count, most = larger(most, last);
    const int64_t cut = threads > 1 && run.count < RQ_INDEX_BLOCK * 2 * threads ? up(run.count, 2 * threads) : 0;
    const int64_t step = smaller(cut ? cut : (int64_t)RQ_INDEX_BLOCK, RQ_INDEX_BLOCK);
    for (int64_t q = 0; q < run.count; q += step)
      s.pieces[pieces++] = {(int32_t)r, (int32_t)q, (int32_t)smaller(step, run.count - q), -1};
  }
  if (threads > 1 && count <= shape.part_queries && most >= long_run) {  // few queries: cut their keys
    const int64_t cuts = shape.index_parts;
    each(pieces * cuts, [&](int64_t task, int32_t thread) {
      const Piece &piece = s.pieces[task / cuts];
      const RqIndex &job = s.indexes[piece.run];
      for (int64_t q = piece.first; q < piece.first + piece.count; q++) {
        const int64_t span = up(up(job.seen[q], cuts), 64) * 64, part = task % cuts;
        char *best = s.partials + ((s.runs[piece.run].first + q) * cuts + part) * s.index_part_bytes;
        index_part(&job, q, part * span, smaller((part + 1) * span, job.seen[q]), best, slot(thread));
      }
    });
    each(pieces, [&](int64_t task, int32_t thread) {
      const Piece &piece = s.pieces[task];
      for (int64_t q = piece.first; q < piece.first + piece.count; q++)
        index_merge(&s.indexes[piece.run], q,
                    s.partials + (s.runs[piece.run].first + q) * cuts * s.index_part_bytes, cuts, slot(thread));
    });
    return;
  }
  const auto body = [&](int64_t task, int32_t thread) {
    const Piece &piece = s.pieces[task];
    index_topk(&s.indexes[piece.run], piece.first, piece.count, slot(thread));
  };
  run(pieces, queries * most * m.index_heads * m.index_dim, body);
}

// The attention core of all rows, s.q to s.heads, rotated back.
void Call::core(const RqLayer &layer, const RqLayerCache &cache) {
  const int64_t c = m.head_dim, h = m.heads, top_k = m.index_topk, window = m.window;
  const int half = m.rope_dim / 2, compressed = layer.ratio > 0;
  const void **pointers = s.window_rows;
  int64_t pieces = 0, most_parts = 0, work = 0;
  for (int64_t r = 0; r < run_count; r++) {
    const Run &run = s.runs[r];
    RqAttend &job = s.attends[r];
    memset(&job, 0, sizeof job);
    job.heads = m.heads, job.width = m.head_dim, job.rope = m.rope_dim, job.window = m.window;
    job.format = f.cache_format;
    job.queries = run.count;
    job.q_step = h * c, job.out_step = h * c;
    job.q = s.q + run.first * h * c, job.out = s.heads + run.first * h * c;
    job.sink = layer.sink;
    job.window_rows = pointers, job.window_own = window - 1;
    const uint8_t *ring = run.segment->slab + cache.window_at;
    for (int64_t at = run.position() - window + 1; at < run.position(); at++)
      *pointers++ = at < 0 ? nullptr : ring + at % cache.window_rows * entry_size;
    for (int64_t i = 0; i < run.count; i++) *pointers++ = s.kv + (run.first + i) * c;
    const int64_t last = s.seen[run.first + run.count - 1];
    if (compressed) {
      job.page_rows = RQ_PAGE_TOKENS / layer.ratio;
      job.entries = cache.entries, job.page_bytes = cache.entries_page, job.pages = run.segment->pages;
      job.seen = s.seen + run.first;
      if (layer.overlap && last > top_k) {
        job.picks = s.picks + run.first * top_k, job.picks_step = top_k;
        job.pick_counts = s.pick_counts + run.first;
      }
    }
    work += run.count * (window + (layer.overlap ? smaller(last, top_k) : last)) * h * c * 2;
  }
  const auto back = [&](int64_t row, int64_t from, int64_t heads) {
    for (int64_t i = from; i < from + heads; i++)
      rotate(s.heads + (row * h + i) * c, c, half, turn(row, compressed), -1.0f);
  };
  const int64_t tasks = tasks_of(work, INT64_MAX);
  const bool cut = tasks > 1 && count <= shape.part_queries;  // too few queries for the threads: cut each of them
  const int64_t step = tasks == 1 ? count : larger(1, smaller(64, up(count, tasks)));
  for (int64_t r = 0; r < run_count; r++) {
    const RqAttend &job = s.attends[r];
    for (int64_t q = 0; q < job.queries; q += cut ? 1 : step) {
      const int64_t parts = cut ? attend_parts(&job, q) : 1;
      if (cut && parts > 1 && parts <= shape.parts)
        for (int64_t part = 0; part < parts; part++)
          s.pieces[pieces++] = {(int32_t)r, (int32_t)q, 0, (int32_t)part};
      else if (cut && h >= 16)
        for (int64_t head = 0; head < h; head += 8)
          s.pieces[pieces++] = {(int32_t)r, (int32_t)q, -1, (int32_t)head};
      else
        s.pieces[pieces++] = {(int32_t)r, (int32_t)q, (int32_t)smaller(cut ? 1 : step, job.queries - q), 0};
      if (cut && parts <= shape.parts) most_parts = larger(most_parts, parts);
    }
  }
  const auto body = [&](int64_t task, int32_t thread) {
    const Piece &piece = s.pieces[task];
    const RqAttend &job = s.attends[piece.run];
    const int64_t row = s.runs[piece.run].first + piece.first;
    if (piece.count > 0) {
      attend(&job, piece.first, piece.count, slot(thread));
      for (int64_t i = 0; i < piece.count; i++) back(row + i, 0, h);
    } else if (piece.count < 0) {
      const int64_t heads = smaller(8, h - piece.part);
      attend_heads(&job, piece.first, piece.part, (int32_t)heads, slot(thread));
      back(row, piece.part, heads);
    } else {
      attend_part(&job, piece.first, piece.part, s.partials + row * shape.parts * s.part_bytes, slot(thread));
    }
  };
  run(pieces, work, body);
  for (int64_t r = 0; most_parts > 1 && r < run_count; r++)
    for (int64_t q = 0; q < s.attends[r].queries; q++) {
      const int64_t row = s.runs[r].first + q, parts = attend_parts(&s.attends[r], q);
      if (parts < 2 || parts > shape.parts) continue;
      attend_merge(&s.attends[r], q, s.partials + row * shape.parts * s.part_bytes, parts, slot(0));
      back(row, 0, h);
    }
}

}  // namespace RQ_NS
