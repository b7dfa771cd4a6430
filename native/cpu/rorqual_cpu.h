// rorqual_cpu.h: the whole boundary of librorqual_cpu.so. Plain C ABI: pointers and sizes, no torch, no exceptions.
//
// One call runs one decode step of a V4 model (spec/model.md 2 to 5; the reference is rorqual/model in torch): one
// token for each busy row of a batch whose rows stand at different positions. Weights and state are the caller's
// fp32 tensors, used in place: weights row-major [out][in], state as in model/state.py.
// The caller keeps every pointer alive for the call and lets one call at a time use a scratch buffer and a pool.
// src/rorqual/kernels/cpu.py mirrors these structs field by field; RQ_ABI changes with them.
#pragma once
#include <stdint.h>

#define RQ_ABI 1
#define RQ_API __attribute__((visibility("default")))

typedef struct {
  int32_t abi, layers, hidden, vocab, heads, head_dim, rope_dim, q_rank, groups, o_rank, window;
  int32_t index_heads, index_dim, index_topk, experts, per_token, expert_width, shared_width, streams, iters;
  float hc_eps, norm_eps, route_scale, limit, head_scale, index_scale;  // head_scale = head_dim^-1/2
  const float *freqs[2];  // rotation angles per position [rope_dim/2]: window-only layers, compressed layers
  const float *embed, *mix_fn, *mix_base, *mix_scale, *norm, *head;
} RqModel;

typedef struct {  // an mHC site
  const float *fn, *base, *scale;
} RqSite;

typedef struct {
  const float *wkv, *wgate, *ape, *norm;
} RqCompressor;

typedef struct {
  int32_t ratio;    // 0: window only
  int32_t overlap;  // 1: CSA (overlapping compressor, indexer)
  RqSite attn_site;
  const float *attn_norm, *wq_a, *q_norm, *wq_b, *wkv, *kv_norm, *wo_a, *wo_b, *sink;
  RqCompressor main;
  const float *index_wq_b, *index_proj;
  RqCompressor index;
  RqSite ffn_site;
  const float *ffn_norm, *gate, *bias;  // bias null: a hash layer
  const int64_t *tid2eid;               // [vocab][per_token], null: a score layer
  const float *w1, *w3, *w2, *shared1, *shared3, *shared2;
} RqLayer;

typedef struct {  // rows of sequence b start at data + b * stride (floats)
  float *data;
  int64_t stride;
} RqRows;

typedef struct {
  RqRows window;   // last window-1 rows [head_dim], oldest first
  RqRows tail;     // last coff*ratio-1 rows [2*coff*head_dim]: values, scores
  RqRows entries;  // [capacity][head_dim]
  RqRows index_tail, index_keys;
} RqLayerState;

typedef struct {
  const RqModel *model;
  const RqLayer *layers;
  const RqLayerState *state;
  const int64_t *tokens, *positions;
  const int64_t *counts;  // 0 or 1 per row; null: every row is busy
  int64_t batch;
  float *logits;  // [batch][vocab]; rows with count 0 become zeros
  void *scratch;  // rq_scratch_bytes(), 64-byte aligned
  int64_t max_entries;  // most entries a row may see after this step, over all layers
  int32_t threads;
  int32_t level;  // one of rq_level_name()
} RqStep;

#ifdef __cplusplus
extern "C" {
#endif
RQ_API int32_t rq_abi(void);
RQ_API int32_t rq_level_count(void);
RQ_API const char *rq_level_name(int32_t level);  // "portable", "avx2", "avx512", ascending
RQ_API int32_t rq_level_runs(int32_t level);      // can this CPU (and OS) run it?
RQ_API int64_t rq_scratch_bytes(const RqModel *model, int64_t max_entries, int64_t batch, int32_t threads);
// 0, or -1 - row when that row's token, count or hash table entry is out of range: then nothing has changed.
RQ_API int64_t rq_step(const RqStep *step, void *pool);
RQ_API void *rq_pool_create(int32_t threads);  // null when threads cannot be made
RQ_API void rq_pool_destroy(void *pool);
#ifdef __cplusplus
}
#endif
