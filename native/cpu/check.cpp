// check.cpp: see check.h. Pointers to weights are taken on trust but for null; numbers and ids are not.
#include "check.h"

#include "rows.h"

namespace {

const int64_t MOST_POSITIONS = (int64_t)1 << 31;  // entries, keys and picks are counted in int32

bool in(int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; }

bool good(const RqMatrix &w, int64_t k, bool table = false) {  // k: columns; table: rows of it are looked up
  if (!w.data) return false;
  switch (w.type) {
    case RQ_F32:
    case RQ_BF16: return true;
    case RQ_FP8: return !table && w.scale && (w.block == 128 || w.block == 32);
    case RQ_FP4: return !table && w.scale && w.block == 32 && k % 2 == 0;
    default: return false;
  }
}

bool good(const RqSite &site) { return site.fn && site.base && site.scale; }

bool good(const RqCompressor &c, int64_t k) { return good(c.wkv, k) && good(c.wgate, k) && c.ape && c.norm; }

bool good(const RqModel &m, const RqLayer &layer, bool resolves) {
  if (!good(layer.attn_site) || !good(layer.ffn_site)) return false;
  if (!layer.attn_norm || !layer.q_norm || !layer.kv_norm || !layer.sink || !layer.ffn_norm) return false;
  const int64_t d = m.hidden, group = (int64_t)m.heads / m.groups * m.head_dim, inner = (int64_t)m.groups * m.o_rank;
  if (!good(layer.wq_a, d) || !good(layer.wq_b, m.q_rank) || !good(layer.wkv, d)) return false;
  if (!good(layer.wo_a, group) || !good(layer.wo_b, inner)) return false;
  if (layer.ratio < 0 || layer.ratio > RQ_PAGE_TOKENS || (layer.ratio && RQ_PAGE_TOKENS % layer.ratio)) return false;
  if (layer.overlap && !layer.ratio) return false;
  if (layer.ratio && !good(layer.main, d)) return false;
  if (layer.overlap && !(good(layer.index, d) && good(layer.index_wq_b, m.q_rank) && good(layer.index_proj, d)))
    return false;
  if (!good(layer.gate, d) || (!layer.bias && !layer.tid2eid) || (!layer.experts && !resolves)) return false;
  if (m.shared_width && !(good(layer.shared1, d) && good(layer.shared3, d) && good(layer.shared2, m.shared_width))) return false;
  for (int64_t i = 0; layer.experts && i < 3 * (int64_t)m.experts; i++)
    if (!good(layer.experts[i], i % 3 == 2 ? m.expert_width : d)) return false;
  return true;
}

// Rings that hold what the next token needs, and pages that are there.
bool good(const RqModel &m, const RqLayer &layer, const RqLayerCache &cache) {
  if (cache.window_rows < m.window || cache.window_at < 0) return false;
  if (!layer.ratio) return true;
  if (cache.tail_rows < (layer.overlap ? 2 : 1) * layer.ratio || cache.tail_at < 0 || !cache.entries) return false;
  return !layer.overlap || (cache.keys && cache.index_tail_at >= 0);
}

bool good(const RqForward &call, const RqSegment &segment, const RqMtp *mtp) {
  const RqModel &m = *call.model;
  if (!segment.tokens || !segment.slab || segment.count < 1 || segment.position < 0) return false;
  if (segment.position > MOST_POSITIONS || segment.count > MOST_POSITIONS - segment.position) return false;
  if (!in(segment.logits, 0, 2) || segment.hidden < 0 || segment.hidden > segment.count) return false;
  if ((segment.logits && !call.logits) || (segment.hidden && !call.hidden)) return false;
  bool paged = false;
  for (int32_t l = 0; l < m.layers; l++) paged |= call.layers[l].ratio > 0;
  if (paged && !mtp) {
    const int64_t count = (segment.position + segment.count + RQ_PAGE_TOKENS - 1) / RQ_PAGE_TOKENS;
    if (!segment.pages) return false;
    for (int64_t i = 0; i < count; i++)
      if (!in(segment.pages[i], 0, call.pages - 1)) return false;
  }
  for (int64_t i = 0; i < segment.count; i++)
    if (!in(segment.tokens[i], 0, m.vocab - 1)) return false;
  const int32_t layers = mtp ? 1 : m.layers;
  for (int32_t l = 0; l < layers; l++) {
    const RqLayer &layer = mtp ? *mtp->layer : call.layers[l];
    for (int64_t i = 0; layer.tid2eid && i < segment.count; i++)
      for (int64_t k = 0; k < m.per_token; k++)
        if (!in(layer.tid2eid[segment.tokens[i] * m.per_token + k], 0, m.experts - 1)) return false;
  }
  return true;
}

}  // namespace

int32_t rq_check_model(const RqForward *call) {
  const RqModel *m = call->model;
  if (!m || !call->layers || !in(m->layers, 1, 1 << 16) || !in(m->hidden, 1, 1 << 20) || !in(m->vocab, 1, 1 << 26))
    return 0;
  if (!in(m->heads, 1, 4096) || !in(m->head_dim, 2, 1024) || m->head_dim % 2 || !in(m->q_rank, 1, 1 << 20)) return 0;
  if (!in(m->rope_dim, 0, m->head_dim) || m->rope_dim % 2 || !in(m->window, 1, 1 << 20)) return 0;
  if (!in(m->groups, 1, m->heads) || m->heads % m->groups || !in(m->o_rank, 1, 1 << 20)) return 0;
  if (!in(m->index_heads, 1, 4096) || !in(m->index_dim, 1, RQ_MAX_KEY) || m->rope_dim > m->index_dim) return 0;
  if (!in(m->index_topk, 1, 1 << 20) || !in(m->experts, 1, 1 << 16) || !in(m->per_token, 1, m->experts)) return 0;
  if (!in(m->expert_width, 1, 1 << 20) || !in(m->shared_width, 0, 1 << 20) || !in(m->streams, 1, 16)) return 0;
  if (m->iters < 0 || !in(call->cache_format, RQ_EXACT, RQ_PACKED) || !in(call->threads, 1, 1024)) return 0;
  if (call->cache_format == RQ_PACKED && (m->index_dim & (m->index_dim - 1) || m->index_dim % 32)) return 0;
  return call->block_tokens >= 1 && call->block_tokens <= 1 << 16 && call->segment_count >= 0;
}

int64_t rq_check(const RqForward *call, const RqMtp *mtp) {
  const int64_t itself = -1 - (call->segment_count > 0 ? call->segment_count : 0);
  if (!rq_check_model(call) || !call->caches || !call->segments || call->pages < 0 || !call->scratch) return itself;
  const RqModel &m = *call->model;
  if (!m.freqs[0] || !m.freqs[1] || !good(m.embed, m.hidden, true) || !good(m.head, m.hidden) || !good(m.mix) || !m.norm) return itself;
  for (int32_t l = 0; l < m.layers; l++)
    if (!good(m, call->layers[l], call->resolve) || !good(m, call->layers[l], call->caches[l])) return itself;
  if (mtp) {
    if (!mtp->layer || !mtp->cache || !mtp->enorm || !mtp->hnorm || !mtp->norm || !good(mtp->mix)) return itself;
    if (!good(mtp->e_proj, m.hidden) || !good(mtp->h_proj, m.hidden) || mtp->layer->ratio) return itself;
    if (!good(m, *mtp->layer, call->resolve) || !good(m, *mtp->layer, *mtp->cache)) return itself;
  }
  for (int64_t i = 0; i < call->segment_count; i++)
    if (!good(*call, call->segments[i], mtp)) return -1 - i;
  return 0;
}
