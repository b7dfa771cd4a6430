// rorqual_cpu.h: the whole boundary of librorqual_cpu.so. Plain C ABI: pointers and sizes, no torch, no exceptions.
//
// rq_forward runs a whole call of a V4 model (spec/model.md 2 to 5): any mix of prefill chunks and decode tokens of many
// sequences, over a pool of cache pages. Weights are read in place, as they lie in a checkpoint (RqMatrix).
// The caller keeps every pointer alive for the call and lets one call at a time use a scratch buffer and a pool.
// src/rorqual/kernels/cpu.py mirrors these structs field by field; RQ_ABI changes with them.
#pragma once
#include <stdint.h>

#define RQ_ABI 3
#define RQ_API __attribute__((visibility("default")))

enum { RQ_F32 = 0, RQ_BF16 = 1, RQ_FP8 = 2, RQ_FP4 = 3 };  // types of a matrix
enum { RQ_EXACT = 0, RQ_PACKED = 1 };                      // cache formats: fp32 rows; 584-byte rows and 68-byte keys
enum { RQ_PAGE_TOKENS = 128 };

typedef struct {         // a weight, row-major [outputs][k]; data null: the layer has none
  const void *data;      // RQ_FP8: e4m3; RQ_FP4: e2m1 pairs, low nibble first
  const uint8_t *scale;  // ue8m0: RQ_FP8 one a block x block square, [ceil(outputs/block)][ceil(k/block)];
                         // RQ_FP4 one a block along k, [outputs][k/block]; else null
  int32_t type;
  int32_t block;  // RQ_FP8: 128 or 32; RQ_FP4: 32; else 0
} RqMatrix;

typedef struct {  // an mHC site, or the mix before the head
  const float *fn, *base, *scale;
} RqSite;

typedef struct {
  int32_t layers, hidden, vocab, heads, head_dim, rope_dim, q_rank, groups, o_rank, window;
  int32_t index_heads, index_dim, index_topk, experts, per_token, expert_width, shared_width, streams, iters;
  float hc_eps, norm_eps, route_scale, limit;  // limit 0: no clamp of the SwiGLU inputs
  float head_scale, index_scale;               // head_dim^-1/2, (index_dim * index_heads)^-1/2
  int32_t reserved;
  const float *freqs[2];  // rotation angles per position [rope_dim/2]: window-only layers, compressed layers
  RqMatrix embed, head;   // [vocab][hidden]
  RqSite mix;
  const float *norm;
} RqModel;

typedef struct {
  RqMatrix wkv, wgate;      // [coff*width][hidden]
  const float *ape, *norm;  // [ratio][coff*width], [width]
} RqCompressor;

typedef struct {
  int32_t ratio;    // 0: window only; else a divisor of RQ_PAGE_TOKENS
  int32_t overlap;  // 1: CSA (overlapping compressor, coff 2, and an indexer); 0: coff 1
  RqSite attn_site;
  const float *attn_norm, *q_norm, *kv_norm, *sink;
  RqMatrix wq_a, wq_b, wkv, wo_a, wo_b;
  RqCompressor main;
  RqMatrix index_wq_b, index_proj;
  RqCompressor index;
  RqSite ffn_site;
  const float *ffn_norm, *bias;  // bias null: a hash layer
  const int64_t *tid2eid;        // [vocab][per_token], null: a score layer
  RqMatrix gate;
  const RqMatrix *experts;           // [experts][3]: w1, w3, w2; null: RqForward.resolve gives them
  RqMatrix shared1, shared3, shared2;  // data null: no shared expert
} RqLayer;

typedef struct {              // where layer l's rows lie in the pool: those of page p start at base + p * *_page
  uint8_t *entries;           // [128/ratio] rows of entry bytes
  int64_t entries_page;
  uint8_t *keys;              // CSA: [128/ratio] rows of key bytes
  int64_t keys_page;
  int64_t window_at, tail_at, index_tail_at;  // byte offsets of the rings inside a sequence's slab
  int32_t window_rows, tail_rows;             // capacities; the row of position p is at index p % rows
} RqLayerCache;

typedef struct {          // one sequence's part of a call
  const int64_t *tokens;  // [count], 1..: decode 1, drafts k, prefill a chunk
  int64_t count;
  int64_t position;       // of tokens[0]
  const int32_t *pages;   // block table: the page of tokens [128 i, 128 i + 128); ceil((position+count)/128) of them
  uint8_t *slab;          // the sequence's rings
  int32_t logits;         // rows of logits: 0 none, 1 the last token's, 2 every token's
  int32_t hidden;         // rows of residual streams: those of the last `hidden` tokens, 0 to count
  int32_t frozen;         // 1: entries and keys of these tokens lie in the pages already: rings are written, pages are not
  int32_t reserved;
} RqSegment;

// Gives out[i][0..2] = w1, w3, w2 of expert ids[i] (ascending, distinct), valid until the next call of it. Called by one
// thread, once per layer and block of tokens. Not 0 (it must be above 0): the call stops and returns it.
typedef int32_t (*RqResolve)(void *context, int32_t layer, const int32_t *ids, int32_t count, RqMatrix *out);

typedef struct {
  const RqModel *model;
  const RqLayer *layers;
  const RqLayerCache *caches;  // [layers]
  const RqSegment *segments;
  int64_t segment_count;
  int64_t pages;        // in the pool: ids of a block table are below
  float *logits;        // rows [vocab] in segment order
  float *hidden;        // rows [streams][hidden] in segment order, before the last mix; null when no segment asks
  void *scratch;        // rq_forward_scratch() bytes, 64-byte aligned
  int64_t scratch_bytes;
  RqResolve resolve;    // null: every layer has its experts
  void *context;
  int32_t cache_format;
  int32_t block_tokens;  // most tokens that go through the layers together; touches no result
  int32_t threads;
  int32_t level;  // one of rq_level_name()
} RqForward;

typedef struct {  // the MTP head (spec/model.md 6.1): a block of ratio 0 with the projections in front of it
  const RqLayer *layer;
  const RqLayerCache *cache;
  const float *enorm, *hnorm;
  RqMatrix e_proj, h_proj;  // [hidden][hidden]
  RqSite mix;
  const float *norm;
} RqMtp;

#ifdef __cplusplus
extern "C" {
#endif
RQ_API int32_t rq_abi(void);
RQ_API int32_t rq_level_count(void);
RQ_API const char *rq_level_name(int32_t level);  // "portable", "avx2", "avx512", "avx512_bf16", ascending
RQ_API int32_t rq_level_runs(int32_t level);      // can this CPU (and OS) run it?
// Bytes of scratch for a call of at most `tokens` tokens, of which no position reaches `positions`.
RQ_API int64_t rq_forward_scratch(const RqForward *call, int64_t tokens, int64_t positions);
// 0; -1 - segment when that segment's input is out of range (then nothing has changed); above 0: what resolve returned
// (then the rows of this call's positions mean nothing, and the caller rewinds to where the segments began).
RQ_API int64_t rq_forward(const RqForward *call, void *pool);
// The MTP head at the positions of a call: its tokens are those that follow them, streams [tokens][streams][hidden] their
// residual streams, in segment order. call->layers and caches are the model's, resolve's layer is model->layers.
RQ_API int64_t rq_mtp(const RqForward *call, const RqMtp *mtp, const float *streams, void *pool);
RQ_API void *rq_pool_create(int32_t threads);  // null when threads cannot be made
RQ_API void rq_pool_destroy(void *pool);
#ifdef __cplusplus
}
#endif
