// library.cpp: the entry points: level dispatch, validation (check.h), and the team of threads (team.h).
//
// Compiled for the portable level; only the objects of the chosen level hold wider instructions.
#include <string.h>

#include "check.h"
#include "core.h"
#include "forward.h"
#include "levels.h"
#include "team.h"

static_assert(sizeof(RqMatrix) == 24 && sizeof(RqModel) == 200 && sizeof(RqCompressor) == 64 && sizeof(RqLayer) == 512 &&
                  sizeof(RqLayerCache) == 64 && sizeof(RqSegment) == 56 && sizeof(RqForward) == 112 &&
                  sizeof(RqMtp) == 112,
              "src/rorqual/kernels/cpu.py mirrors these structures");
static_assert(sizeof(RqStepModel) == 168 && sizeof(RqStepLayer) == 288 && sizeof(RqLayerState) == 80 && sizeof(RqStep) == 88,
              "src/rorqual/kernels/cpu.py mirrors these structures");

namespace {

const RqKernels *kernels(int32_t level) {
  switch (level) {
#if defined(__x86_64__)
    case 1: return &rq_kernels_avx2;
    case 2: return &rq_kernels_avx512;
    case 3: return &rq_kernels_avx512_bf16;
#endif
    default: return &rq_kernels_portable;
  }
}

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

struct Plan {
  const RqStep *step;
  const RqKernels *kernels;
  const int64_t *rows;
  int64_t count, block, slot_bytes;
  char *slots;
};

void run_block(void *arg, int32_t task, int32_t slot) {
  const Plan *plan = (const Plan *)arg;
  const int64_t first = task * plan->block, left = plan->count - first;
  plan->kernels->block(plan->step, plan->rows + first, left < plan->block ? left : plan->block,
                       plan->slots + slot * plan->slot_bytes);
}

// Rows per block: even over the threads, at most RQ_BLOCK_ROWS. Does not touch any row's result.
int64_t block_rows(int64_t rows, int32_t threads) {
  const int64_t rounds = (rows + (int64_t)threads * RQ_BLOCK_ROWS - 1) / ((int64_t)threads * RQ_BLOCK_ROWS);
  const int64_t blocks = rounds * threads;
  return (rows + blocks - 1) / blocks;
}

int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

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

int32_t wrong(const RqStep *step, int64_t row) {
  const RqStepModel *model = step->model;
  if (step->counts && (step->counts[row] < 0 || step->counts[row] > 1)) return 1;
  if (step->tokens[row] < 0 || step->tokens[row] >= model->vocab || step->positions[row] < 0) return 1;
  for (int32_t l = 0; l < model->layers; l++) {
    const int64_t *table = step->layers[l].tid2eid;
    for (int32_t k = 0; table && k < model->per_token; k++) {
      const int64_t expert = table[step->tokens[row] * model->per_token + k];
      if (expert < 0 || expert >= model->experts) return 1;
    }
  }
  return 0;
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

int64_t rq_scratch_bytes(const RqStepModel *model, int64_t max_entries, int64_t batch, int32_t threads) {
  // Not block_rows(batch): fewer busy rows can make larger blocks (33 rows: 9 each; 32 of them: 16 each).
  const int64_t most = batch < RQ_BLOCK_ROWS ? batch : (int64_t)RQ_BLOCK_ROWS;
  return align(batch * 8) + (1 > threads ? 1 : threads) * rq_slot_bytes(model, max_entries, most);
}

int64_t rq_step(const RqStep *step, void *pool) {
  for (int64_t row = 0; row < step->batch; row++)
    if (wrong(step, row)) return -1 - row;
  int64_t *rows = (int64_t *)step->scratch, count = 0;
  for (int64_t row = 0; row < step->batch; row++) {
    if (!step->counts || step->counts[row])
      rows[count++] = row;
    else
      memset(step->logits + row * step->model->vocab, 0, (size_t)step->model->vocab * sizeof(float));
  }
  if (!count) return 0;
  const int64_t block = block_rows(count, step->threads);
  Plan plan{step, kernels(step->level), rows, count, block,
            rq_slot_bytes(step->model, step->max_entries, block),
            (char *)step->scratch + align(step->batch * 8)};
  team_run((Team *)pool, step->threads, run_block, &plan, (int32_t)((count + block - 1) / block));
  return 0;
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
