// forward.h: what forward.cpp offers to library.cpp, once per instruction level. Inputs have been checked (check.h).
#pragma once
#include "rorqual_cpu.h"
#include "team.h"

typedef struct {
  int64_t (*scratch)(const RqForward *call, int64_t tokens, int64_t positions);
  int64_t (*forward)(const RqForward *call, Team *team);  // 0, or what resolve returned
  int64_t (*mtp)(const RqForward *call, const RqMtp *mtp, const float *streams, Team *team);
} RqForwardKernels;

extern const RqForwardKernels rq_forward_portable;
#if defined(__x86_64__)
extern const RqForwardKernels rq_forward_avx2;
extern const RqForwardKernels rq_forward_avx512;
extern const RqForwardKernels rq_forward_avx512_bf16;
#endif
