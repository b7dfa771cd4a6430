// levels.h: what step.cpp offers to library.cpp, once per instruction level.
#pragma once
#include "rorqual_cpu.h"

typedef struct {
  // Runs rows[0..count) of the step; slot is this thread's part of the scratch buffer.
  void (*block)(const RqStep *step, const int64_t *rows, int64_t count, char *slot);
} RqKernels;

enum { RQ_BLOCK_ROWS = 32 };  // most rows that go through the layers together

int64_t rq_slot_bytes(const RqStepModel *model, int64_t max_entries, int64_t rows);

extern const RqKernels rq_kernels_portable;
#if defined(__x86_64__)
extern const RqKernels rq_kernels_avx2;
extern const RqKernels rq_kernels_avx512;
extern const RqKernels rq_kernels_avx512_bf16;
#endif
