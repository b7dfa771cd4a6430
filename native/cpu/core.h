// core.h: the cache-row, attention and index kernels of a level as one table, for tests, benchmarks and Python's faces.
//
// The forward call uses the functions of its level directly; rq_core(level) hands out the same ones from outside.
// src/rorqual/kernels/packed.py mirrors the table and the two jobs, and checks shapes before any pointer crosses.
#pragma once
#include "attend.h"
#include "index.h"
#include "rows.h"

typedef struct {
  int64_t (*entry_bytes)(int32_t format, int32_t width, int32_t rope);
  int64_t (*key_bytes)(int32_t format, int32_t width);
  // count rows, fp32 [count][width] and bytes [count][row bytes]
  void (*pack_entries)(int32_t format, const float *x, int64_t count, int32_t width, int32_t rope, uint8_t *out);
  void (*unpack_entries)(int32_t format, const uint8_t *rows, int64_t count, int32_t width, int32_t rope, float *x);
  void (*pack_keys)(int32_t format, const float *x, int64_t count, int32_t width, uint8_t *out);
  void (*unpack_keys)(int32_t format, const uint8_t *rows, int64_t count, int32_t width, float *x);
  void (*round_entries)(int32_t format, float *x, int64_t count, int32_t width, int32_t rope);
  void (*round_keys)(int32_t format, float *x, int64_t count, int32_t width);
  void (*hadamard)(float *x, int64_t count, int32_t width);
  void (*entries_to_bf16)(const uint8_t *rows, int64_t count, int32_t width, int32_t rope, uint16_t *out);
  int64_t (*attend_scratch)(const RqAttend *job);
  void (*attend)(const RqAttend *job, int64_t first, int64_t count, void *scratch);
  void (*attend_heads)(const RqAttend *job, int64_t query, int32_t heads_first, int32_t heads_count, void *scratch);
  int64_t (*attend_parts)(const RqAttend *job, int64_t query);
  int64_t (*attend_partial_bytes)(const RqAttend *job);
  void (*attend_part)(const RqAttend *job, int64_t query, int64_t part, void *partials, void *scratch);
  void (*attend_merge)(const RqAttend *job, int64_t query, const void *partials, int64_t parts, void *scratch);
  int64_t (*index_scratch)(const RqIndex *job);
  void (*index_topk)(const RqIndex *job, int64_t first, int64_t count, void *scratch);
  int64_t (*index_partial_bytes)(const RqIndex *job);
  void (*index_part)(const RqIndex *job, int64_t query, int64_t begin, int64_t end, void *best, void *scratch);
  void (*index_merge)(const RqIndex *job, int64_t query, const void *partials, int64_t parts, void *scratch);
} RqCore;

extern const RqCore rq_core_portable;
#if defined(__x86_64__)
extern const RqCore rq_core_avx2;
extern const RqCore rq_core_avx512;
extern const RqCore rq_core_avx512_bf16;
#endif

#ifdef __cplusplus
extern "C" {
#endif
RQ_API const RqCore *rq_core(int32_t level);  // null: no such level; rq_level_runs() says whether this CPU runs it
#ifdef __cplusplus
}
#endif
