// attend.h: the attention core of one sequence: one softmax over window rows, entries and sink (spec/model.md 2.5).
//
//   l = q . k;  out = sum e^(l - max) k / (sum e^(l - max) + e^(sink - max)),  k over window rows, then entries ascending
//
// Keys are the values and all heads share them. A query's keys are cut into parts of RQ_PART: the window, then its list
// of entries from the front. A part's sum depends on the query and the part only, and parts are added in ascending
// order: so a query's bits do not depend on what block, thread or call it is in. RQ_EXACT: fp32 throughout. RQ_PACKED:
// at level avx512_bf16 q, keys and weights are bf16 and sums fp32; fp32 at the others.
// Nothing here allocates, locks or makes threads: the caller spreads calls over threads, a scratch for each.
#pragma once
#include <stdint.h>

#include "rorqual_cpu.h"

enum { RQ_PART = 256 };  // keys of a part

typedef struct {
  int32_t heads, width, rope, window;  // width <= 1024, a multiple of 2; rope <= width
  int32_t format;                      // RQ_EXACT or RQ_PACKED
  int32_t page_rows;                   // entries of a page: 128 / ratio; 0: no entries
  int64_t queries;                     // consecutive positions
  const float *q;                      // [queries][heads][width], rotated and scaled by width^-1/2
  int64_t q_step;                      // floats from one query to the next
  float *out;                          // [queries][heads][width], not yet rotated back
  int64_t out_step;
  const float *sink;                   // [heads]
  // Window: the row of position (first query's position - window + 1 + i) is window_rows[i], i < window - 1 + queries;
  // null where the position is below 0. Rows with i < window_own are in `format`, the others are fp32 [width] (in
  // RQ_PACKED they hold values that round_entry has rounded). window_own 0: all fp32; INT64_MAX: none.
  const void *const *window_rows;
  int64_t window_own;
  // Entries: entry e is row e % page_rows of page pages[e / page_rows], at entries + page * page_bytes + row * entry bytes.
  const uint8_t *entries;
  int64_t page_bytes;
  const int32_t *pages;
  const int64_t *seen;         // [queries]: query t may see entries [0, seen[t]); null: none
  const int32_t *picks;        // [queries][picks_step] ascending entries, or null: every query takes all it may see
  int64_t picks_step;
  const int32_t *pick_counts;  // [queries]: how many picks; negative: this query takes all it may see
} RqAttend;

namespace RQ_NS {

// Bytes of scratch for any of the calls below, 64-byte aligned; depends on heads, width, window and format only.
int64_t attend_scratch(const RqAttend *job);

// Queries [first, first + count) from keys to out. The simplest way; use it whenever there are queries for all threads.
void attend(const RqAttend *job, int64_t first, int64_t count, void *scratch);

// The same for some heads of one query: bits are those of attend(). heads_first and heads_count: multiples of 8 (or the
// last head) keep vectors full.
void attend_heads(const RqAttend *job, int64_t query, int32_t heads_first, int32_t heads_count, void *scratch);

// One query over several threads: part sums into `partials` (attend_partial_bytes() each, at index `part`), in any order
// by any thread; then attend_merge() once all are there. Bits are those of attend().
int64_t attend_parts(const RqAttend *job, int64_t query);
int64_t attend_partial_bytes(const RqAttend *job);
void attend_part(const RqAttend *job, int64_t query, int64_t part, void *partials, void *scratch);
void attend_merge(const RqAttend *job, int64_t query, const void *partials, int64_t parts, void *scratch);

}  // namespace RQ_NS
