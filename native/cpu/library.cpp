// library.cpp: the entry points: level dispatch, validation, and the threads over which rows are spread.
//
// Compiled for the portable level; only the object of the chosen level holds wider instructions. The pool is the
// caller's: its threads sleep between steps, nothing spins, and a step does not wait for a thread that never woke.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "levels.h"

static_assert(sizeof(RqMatrix) == 24 && sizeof(RqModel) == 200 && sizeof(RqCompressor) == 64 && sizeof(RqLayer) == 512 &&
                  sizeof(RqLayerCache) == 64 && sizeof(RqSegment) == 56 && sizeof(RqForward) == 120 &&
                  sizeof(RqMtp) == 96,
              "src/rorqual/kernels/cpu.py mirrors these structures");
static_assert(sizeof(RqStepModel) == 168 && sizeof(RqStepLayer) == 288 && sizeof(RqLayerState) == 80 && sizeof(RqStep) == 88,
              "src/rorqual/kernels/cpu.py mirrors these structures");

namespace {

struct Job {
  void (*run)(void *arg, int64_t task, int32_t slot);
  void *arg;
  int64_t next, tasks;
};

struct Pool {
  pthread_mutex_t lock;
  pthread_cond_t wake, idle;
  Job *job;      // null: nothing to join
  int64_t turn;  // number of the job
  int32_t threads, limit, active, stop;
  pthread_t *ids;
};

struct Worker {
  Pool *pool;
  int32_t slot;
};

void work(Job *job, int32_t slot) {
  for (;;) {
    const int64_t task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (task >= job->tasks) return;
    job->run(job->arg, task, slot);
  }
}

void *serve(void *arg) {
  Worker self = *(Worker *)arg;
  free(arg);
  Pool *pool = self.pool;
  int64_t seen = 0;
  pthread_mutex_lock(&pool->lock);
  for (;;) {
    while (!pool->stop && (!pool->job || pool->turn == seen || self.slot >= pool->limit))
      pthread_cond_wait(&pool->wake, &pool->lock);
    if (pool->stop) break;
    Job *job = pool->job;
    seen = pool->turn;
    pool->active++;
    pthread_mutex_unlock(&pool->lock);
    work(job, self.slot);
    pthread_mutex_lock(&pool->lock);
    if (!--pool->active) pthread_cond_signal(&pool->idle);
  }
  pthread_mutex_unlock(&pool->lock);
  return nullptr;
}

// Runs the tasks on the calling thread (slot 0) and up to limit - 1 of the pool's.
void spread(Pool *pool, Job *job, int32_t limit) {
  if (pool && limit > 1 && job->tasks > 1) {
    pthread_mutex_lock(&pool->lock);
    pool->job = job;
    pool->turn++;
    pool->limit = limit;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    work(job, 0);
    pthread_mutex_lock(&pool->lock);
    pool->job = nullptr;  // a thread that wakes up only now finds nothing
    while (pool->active) pthread_cond_wait(&pool->idle, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
  } else {
    work(job, 0);
  }
}

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

struct Plan {
  const RqStep *step;
  const RqKernels *kernels;
  const int64_t *rows;
  int64_t count, block, slot_bytes;
  char *slots;
};

void run_block(void *arg, int64_t task, int32_t slot) {
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
  Job job{run_block, &plan, 0, (count + block - 1) / block};
  spread((Pool *)pool, &job, step->threads);
  return 0;
}

void *rq_pool_create(int32_t threads) {
  Pool *pool = (Pool *)calloc(1, sizeof(Pool));
  if (!pool) return nullptr;
  pool->ids = (pthread_t *)calloc((size_t)(threads > 1 ? threads : 1), sizeof(pthread_t));
  pthread_mutex_init(&pool->lock, nullptr);
  pthread_cond_init(&pool->wake, nullptr);
  pthread_cond_init(&pool->idle, nullptr);
  for (int32_t slot = 1; pool->ids && slot < threads; slot++) {
    Worker *worker = (Worker *)malloc(sizeof(Worker));
    if (!worker) break;
    *worker = Worker{pool, slot};
    if (pthread_create(&pool->ids[pool->threads], nullptr, serve, worker)) {
      free(worker);
      break;
    }
    pool->threads++;
  }
  if (pool->ids && pool->threads == threads - 1) return pool;
  rq_pool_destroy(pool);
  return nullptr;
}

void rq_pool_destroy(void *handle) {
  Pool *pool = (Pool *)handle;
  if (!pool) return;
  pthread_mutex_lock(&pool->lock);
  pool->stop = 1;
  pthread_cond_broadcast(&pool->wake);
  pthread_mutex_unlock(&pool->lock);
  for (int32_t i = 0; i < pool->threads; i++) pthread_join(pool->ids[i], nullptr);
  pthread_cond_destroy(&pool->wake);
  pthread_cond_destroy(&pool->idle);
  pthread_mutex_destroy(&pool->lock);
  free(pool->ids);
  free(pool);
}

}  // extern "C"
