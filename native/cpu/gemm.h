// gemm.h: y[r][o] = w[first + o] . x[r] for weights of every type, read where they lie; the same bits for any cut.
//
// RQ_F32: fp32 products and sums. Others: x is rounded to bf16 (nearest, ties to even), a weight is its code times its
// block's scale as bf16, products are exact and sums fp32. A weight whose magnitude is below 2^-126 may count as 0, one
// of 2^128 and more is infinite, scale byte 255 and the e4m3 codes 127 and 255 are NaN (spec/model.md 3.1, 5).
// An output adds over k in an order that depends on k, type and level alone: not on rows, first, outputs or threads.
// Bound: one row: each byte of the weight is read once, at the memory's rate; many rows: the multiply-adds.
#pragma once
#include "rorqual_cpu.h"

typedef struct {
  int64_t (*scratch)(int64_t k);
  void (*matmul)(const RqMatrix *w, int64_t k, int64_t first, int64_t outputs, const float *x, int64_t x_step,
                 int64_t rows, float *y, int64_t y_step, void *scratch);
} RqGemm;  // the two functions below, of one level; kernels/matmul.py mirrors it

#ifdef RQ_NS
namespace RQ_NS {

// Bytes of scratch that a product over k needs, for any type and any number of rows.
int64_t matmul_scratch(int64_t k);

// y[r * y_step + o] = w[first + o] . x[r * x_step ...], o in [0, outputs), r in [0, rows). RQ_FP4 needs an even k.
// first may lie inside a block of scales; scratch is aligned to 64 bytes.
void matmul(const RqMatrix *w, int64_t k, int64_t first, int64_t outputs, const float *x, int64_t x_step, int64_t rows,
            float *y, int64_t y_step, void *scratch);

}  // namespace RQ_NS
#endif

#ifdef __cplusplus
extern "C" {
#endif
RQ_API const RqGemm *rq_gemm(int32_t level);  // null: no such level; rq_level_runs() says whether this CPU runs it
#ifdef __cplusplus
}
#endif
