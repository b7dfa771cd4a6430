// library.cpp: the entry points: level dispatch, validation (check.h), and the team of threads (team.h).
//
// Compiled for the portable level; only the objects of the chosen level hold wider instructions.
#include "check.h"
#include "core.h"
#include "forward.h"
#include "team.h"

static_assert(sizeof(RqMatrix) == 24 && sizeof(RqModel) == 200 && sizeof(RqCompressor) == 64 && sizeof(RqLayer) == 512 &&
                  sizeof(RqLayerCache) == 64 && sizeof(RqSegment) == 56 && sizeof(RqForward) == 112 &&
                  sizeof(RqMtp) == 112,
              "src/rorqual/kernels/cpu.py mirrors these structures");
namespace {

const RqForwardKernels *forward_kernels(int32_t level) {
  switch (level) {
#if defined(__x86_64__)
    case 1: return &rq_forward_avx2;
    case 2: return &rq_forward_avx512;
    case 3: return &rq_forward_avx512_bf16;
#endif
    default: return &rq_forward_portable;
  }
}

// rq_check(), and whether the scratch is large enough.
int64_t check_call(const RqForward *call, const RqMtp *mtp) {
  if (!rq_level_runs(call->level)) return -1 - call->segment_count;
  const int64_t wrong = rq_check(call, mtp);
  if (wrong) return wrong;
  int64_t tokens = 0, positions = 0;
  for (int64_t i = 0; i < call->segment_count; i++) {
    const int64_t end = call->segments[i].position + call->segments[i].count;
    tokens += call->segments[i].count;
    positions = end > positions ? end : positions;
  }
  const bool fits = call->scratch_bytes >= forward_kernels(call->level)->scratch(call, tokens, positions);
  return fits ? 0 : -1 - call->segment_count;
}

}  // namespace

extern "C" {

int32_t rq_abi(void) { return RQ_ABI; }

#if defined(__x86_64__)
int32_t rq_level_count(void) { return 4; }
const char *rq_level_name(int32_t level) {
  return level == 0   ? "portable"
         : level == 1 ? "avx2"
         : level == 2 ? "avx512"
         : level == 3 ? "avx512_bf16"
                      : nullptr;
}
int32_t rq_level_runs(int32_t level) {
  __builtin_cpu_init();  // asks the OS, too: xgetbv
  const int32_t v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const int32_t v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const int32_t bf16 = v4 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                       __builtin_cpu_supports("avx512vbmi");
  return level == 0 ? 1 : level == 1 ? v3 : level == 2 ? v4 : level == 3 ? bf16 : 0;
}
#else
int32_t rq_level_count(void) { return 1; }
const char *rq_level_name(int32_t level) { return level == 0 ? "portable" : nullptr; }
int32_t rq_level_runs(int32_t level) { return level == 0; }
#endif

const RqCore *rq_core(int32_t level) {
  switch (level) {
    case 0: return &rq_core_portable;
#if defined(__x86_64__)
    case 1: return &rq_core_avx2;
    case 2: return &rq_core_avx512;
    case 3: return &rq_core_avx512_bf16;
#endif
    default: return nullptr;
  }
}

int64_t rq_forward_scratch(const RqForward *call, int64_t tokens, int64_t positions) {
  if (!rq_check_model(call) || !rq_level_runs(call->level)) return -1;
  return forward_kernels(call->level)->scratch(call, tokens, positions);
}

int64_t rq_forward(const RqForward *call, void *pool) {
  const int64_t wrong = check_call(call, nullptr);
  return wrong ? wrong : forward_kernels(call->level)->forward(call, (Team *)pool);
}

int64_t rq_mtp(const RqForward *call, const RqMtp *mtp, const float *streams, void *pool) {
  const int64_t wrong = mtp && streams ? check_call(call, mtp) : -1 - call->segment_count;
  return wrong ? wrong : forward_kernels(call->level)->mtp(call, mtp, streams, (Team *)pool);
}

void *rq_pool_create(int32_t threads) { return team_create(threads); }

void rq_pool_destroy(void *pool) { team_destroy((Team *)pool); }

}  // extern "C"
