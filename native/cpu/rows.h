// rows.h: one row of the cache to and from its bytes (spec/model.md 2.3, 2.6, 3.1); the reference is model/quant.py.
//
// Packed entry (window or compressed): [width-rope e4m3][rope bf16][a ue8m0 per 64 of the first part][zeros to 8 scales]:
// 584 bytes at 512 with 64 rotating dims. Packed index key: [width/2 e2m1 pairs, low nibble first][a ue8m0 per 32]: 68
// bytes at 128. RQ_EXACT rows are fp32. A block that holds a NaN or an infinity becomes NaN as a whole.
// Compiled once per level: every function lives in the level's namespace RQ_NS. No function allocates.
#pragma once
#include <stdint.h>

#include "rorqual_cpu.h"

namespace RQ_NS {

int64_t entry_bytes(int32_t format, int32_t width, int32_t rope);
int64_t key_bytes(int32_t format, int32_t width);

// x fp32 [width] <-> entry_bytes() / key_bytes() bytes. `out` must not overlap x.
void pack_entry(int32_t format, const float *x, int32_t width, int32_t rope, uint8_t *out);
void unpack_entry(int32_t format, const uint8_t *row, int32_t width, int32_t rope, float *x);
void pack_key(int32_t format, const float *x, int32_t width, uint8_t *out);  // packed: no Hadamard in here
void unpack_key(int32_t format, const uint8_t *row, int32_t width, float *x);

// x becomes what unpack(pack(x)) would give. Nothing happens in RQ_EXACT.
void round_entry(int32_t format, float *x, int32_t width, int32_t rope);
void round_key(int32_t format, float *x, int32_t width);

// x [width] times H/sqrt(width) (Sylvester), in place; width a power of two up to RQ_MAX_KEY.
void hadamard(float *x, int32_t width);

// bf16 [width] of a packed entry, exact unless a scale byte is out of what pack_entry writes (subnormals become 0).
void entry_to_bf16(const uint8_t *row, int32_t width, int32_t rope, uint16_t *out);

}  // namespace RQ_NS

enum { RQ_MAX_KEY = 512, RQ_FP8_BLOCK = 64, RQ_FP4_BLOCK = 32 };
