// core.cpp: see core.h. Compiled once per level.
#include "core.h"

namespace {

using namespace RQ_NS;

void pack_entries(int32_t format, const float *x, int64_t count, int32_t width, int32_t rope, uint8_t *out) {
  const int64_t bytes = entry_bytes(format, width, rope);
  for (int64_t i = 0; i < count; i++) pack_entry(format, x + i * width, width, rope, out + i * bytes);
}

void unpack_entries(int32_t format, const uint8_t *rows, int64_t count, int32_t width, int32_t rope, float *x) {
  const int64_t bytes = entry_bytes(format, width, rope);
  for (int64_t i = 0; i < count; i++) unpack_entry(format, rows + i * bytes, width, rope, x + i * width);
}

void pack_keys(int32_t format, const float *x, int64_t count, int32_t width, uint8_t *out) {
  const int64_t bytes = key_bytes(format, width);
  for (int64_t i = 0; i < count; i++) pack_key(format, x + i * width, width, out + i * bytes);
}

void unpack_keys(int32_t format, const uint8_t *rows, int64_t count, int32_t width, float *x) {
  const int64_t bytes = key_bytes(format, width);
  for (int64_t i = 0; i < count; i++) unpack_key(format, rows + i * bytes, width, x + i * width);
}

void round_entries(int32_t format, float *x, int64_t count, int32_t width, int32_t rope) {
  for (int64_t i = 0; i < count; i++) round_entry(format, x + i * width, width, rope);
}

void round_keys(int32_t format, float *x, int64_t count, int32_t width) {
  for (int64_t i = 0; i < count; i++) round_key(format, x + i * width, width);
}

void rotate_rows(float *x, int64_t count, int32_t width) {
  for (int64_t i = 0; i < count; i++) hadamard(x + i * width, width);
}

void entries_to_bf16(const uint8_t *rows, int64_t count, int32_t width, int32_t rope, uint16_t *out) {
  const int64_t bytes = entry_bytes(RQ_PACKED, width, rope);
  for (int64_t i = 0; i < count; i++) entry_to_bf16(rows + i * bytes, width, rope, out + i * width);
}

}  // namespace

#define RQ_JOIN(a, b) a##b
#define RQ_NAME(level) RQ_JOIN(rq_core_, level)
const RqCore RQ_NAME(RQ_LEVEL) = {
    entry_bytes,   key_bytes,      pack_entries,    unpack_entries, pack_keys,
    unpack_keys,   round_entries,  round_keys,      rotate_rows,    entries_to_bf16,
    attend_scratch, attend,        attend_heads,    attend_parts,   attend_partial_bytes,
    attend_part,   attend_merge,   index_scratch,   index_topk,     index_partial_bytes,
    index_part,    index_merge,
};
