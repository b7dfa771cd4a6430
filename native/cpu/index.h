// index.h: the lightning indexer's scores and top-k over the keys of one sequence (spec/model.md 2.6).
//
//   I[t,s] = sum_h w[t,h] * relu(q[t,h] . k[s]),  s < seen[t];  heads ascending, fp32
//
// No score row: candidates pass a threshold into a buffer of twice top_k, cut back to top_k when full. Order: NaN
// first, then by value, ties to the lower entry (as torch.sort(descending, stable)); picks come out ascending. The set
// does not depend on how keys are spread over threads or queries over blocks: ranks are distinct, scores are fixed.
// RQ_PACKED: dots of e2m1 codes are exact whatever the level (integers, or fp32 that holds them), q is rotated and
// rounded to FP4 in here.
#pragma once
#include <stdint.h>

#include "rorqual_cpu.h"

typedef struct {
  int32_t heads, width;  // width <= RQ_MAX_KEY; RQ_PACKED: a power of two and a multiple of 32
  int32_t format, top_k, page_rows;
  int64_t queries;
  const float *q;        // [queries][heads][width], rotated by RoPE only
  int64_t q_step;        // floats from one query to the next
  const float *weights;  // [queries][heads], scaled
  int64_t weights_step;
  const uint8_t *keys;   // as RqAttend.entries
  int64_t page_bytes;
  const int32_t *pages;
  const int64_t *seen;   // [queries], not descending
  int32_t *picks;        // out [queries][picks_step], ascending; picks_step >= top_k
  int64_t picks_step;
  int32_t *pick_counts;  // out: min(seen, top_k)
} RqIndex;

enum { RQ_INDEX_BLOCK = 16 };  // queries that share one unpacking of keys

namespace RQ_NS {

// Bytes of scratch for index_topk / index_part, 64-byte aligned; depends on heads, width, top_k and format only.
int64_t index_scratch(const RqIndex *job);

// Queries [first, first + count): picks and pick_counts. A query with seen <= top_k is not scored: all are picked.
void index_topk(const RqIndex *job, int64_t first, int64_t count, void *scratch);

// One query over several threads: its keys [begin, end), begin a multiple of 64 or 0, give their best top_k into `best`
// (index_partial_bytes()); then index_merge() over all of them, which are index_partial_bytes() apart. Any cut into
// ranges gives the same picks. Ranges may lie beyond seen: they give nothing.
int64_t index_partial_bytes(const RqIndex *job);
void index_part(const RqIndex *job, int64_t query, int64_t begin, int64_t end, void *best, void *scratch);
void index_merge(const RqIndex *job, int64_t query, const void *partials, int64_t parts, void *scratch);

}  // namespace RQ_NS
