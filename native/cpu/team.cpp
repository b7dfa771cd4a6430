// team.cpp: see team.h. One atomic word holds the phase's number and its next task; taking a task is one exchange.
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include <atomic>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

const uint32_t CLOSED = 0xFFFFFFFFu;  // in the place of the next task: the phase's fields are being written
const int32_t SPIN = 3000;            // looks before a thread sleeps; a look takes 10 to 40 ns
const int32_t YIELDS = 20;            // the caller's, before it sleeps over a task that another thread has begun

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace

struct Team {
  alignas(64) std::atomic<uint64_t> word{CLOSED};  // phase << 32 | next task
  alignas(64) std::atomic<int32_t> done{0};
  alignas(64) std::atomic<TeamTask> run{nullptr};
  std::atomic<void *> arg{nullptr};
  std::atomic<int32_t> tasks{0}, limit{0};
  alignas(64) std::atomic<int32_t> asleep{0};  // threads that sleep and have not been called
  std::atomic<int32_t> stop{0}, caller_asleep{0};
  pthread_mutex_t lock;
  pthread_cond_t wake, finished;
  int32_t threads = 1, started = 0;
  pthread_t *ids = nullptr;
};

namespace {

struct Worker {
  Team *team;
  int32_t slot;
};

bool waiting(const Team *team, int32_t slot) {  // is there a task for this slot?
  const uint64_t word = team->word.load(std::memory_order_seq_cst);
  const uint32_t next = (uint32_t)word;
  return next != CLOSED && (int32_t)next < team->tasks.load(std::memory_order_relaxed) &&
         slot < team->limit.load(std::memory_order_relaxed);
}

// Takes and runs one task. False: none was there.
bool take(Team *team, int32_t slot) {
  uint64_t word = team->word.load(std::memory_order_acquire);
  for (;;) {
    const uint32_t next = (uint32_t)word;
    if (next == CLOSED) return false;
    // A field may be a later phase's by now: whoever sees it (acquire) sees the closed word too, and the exchange fails.
    const TeamTask run = team->run.load(std::memory_order_acquire);
    void *arg = team->arg.load(std::memory_order_acquire);
    const int32_t tasks = team->tasks.load(std::memory_order_acquire);
    if ((int32_t)next >= tasks || slot >= team->limit.load(std::memory_order_acquire)) return false;
    if (!team->word.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    run(arg, (int32_t)next, slot);
    if (team->done.fetch_add(1, std::memory_order_seq_cst) + 1 == tasks &&
        team->caller_asleep.load(std::memory_order_seq_cst)) {
      pthread_mutex_lock(&team->lock);
      pthread_cond_signal(&team->finished);
      pthread_mutex_unlock(&team->lock);
    }
    return true;
  }
}

void *serve(void *arg) {
  const Worker self = *(Worker *)arg;
  free(arg);
  Team *team = self.team;
  int32_t idle = 0;
  while (!team->stop.load(std::memory_order_relaxed)) {
    if (take(team, self.slot)) {
      idle = 0;
    } else if (++idle < SPIN) {
      relax();
    } else {
      pthread_mutex_lock(&team->lock);
      while (!team->stop.load(std::memory_order_relaxed)) {
        team->asleep.fetch_add(1, std::memory_order_seq_cst);
        if (waiting(team, self.slot)) break;
        pthread_cond_wait(&team->wake, &team->lock);
        if (waiting(team, self.slot)) break;
      }
      pthread_mutex_unlock(&team->lock);
      idle = 0;
    }
  }
  return nullptr;
}

}  // namespace

int32_t team_threads(const Team *team) { return team ? team->started + 1 : 1; }

void team_run(Team *team, int32_t limit, TeamTask run, void *arg, int32_t tasks) {
  if (!team || limit < 2 || tasks < 2 || !team->started) {
    for (int32_t task = 0; task < tasks; task++) run(arg, task, 0);
    return;
  }
  const uint64_t phase = ((team->word.load(std::memory_order_relaxed) >> 32) + 1) << 32;
  team->word.store(phase | CLOSED, std::memory_order_relaxed);
  team->done.store(0, std::memory_order_release);
  team->run.store(run, std::memory_order_release);
  team->arg.store(arg, std::memory_order_release);
  team->tasks.store(tasks, std::memory_order_release);
  team->limit.store(limit, std::memory_order_release);
  team->word.store(phase, std::memory_order_seq_cst);
  if (team->asleep.load(std::memory_order_seq_cst)) {
    pthread_mutex_lock(&team->lock);
    team->asleep.store(0, std::memory_order_relaxed);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->lock);
  }
  while (take(team, 0)) continue;
  for (int32_t look = 0; team->done.load(std::memory_order_acquire) != tasks; look++) {
    if (look < SPIN) {
      relax();
    } else if (look < SPIN + YIELDS) {
      sched_yield();
    } else {
      pthread_mutex_lock(&team->lock);
      team->caller_asleep.store(1, std::memory_order_seq_cst);
      while (team->done.load(std::memory_order_seq_cst) != tasks) pthread_cond_wait(&team->finished, &team->lock);
      team->caller_asleep.store(0, std::memory_order_relaxed);
      pthread_mutex_unlock(&team->lock);
    }
  }
}

Team *team_create(int32_t threads) {
  void *memory = nullptr;
  if (posix_memalign(&memory, alignof(Team), sizeof(Team))) return nullptr;
  Team *team = new (memory) Team;  // in place: the library needs no C++ runtime
  pthread_mutex_init(&team->lock, nullptr);
  pthread_cond_init(&team->wake, nullptr);
  pthread_cond_init(&team->finished, nullptr);
  team->threads = threads > 1 ? threads : 1;
  team->ids = (pthread_t *)calloc((size_t)team->threads, sizeof(pthread_t));
  for (int32_t slot = 1; team->ids && slot < threads; slot++) {
    Worker *worker = (Worker *)malloc(sizeof(Worker));
    if (!worker) break;
    *worker = Worker{team, slot};
    if (pthread_create(&team->ids[team->started], nullptr, serve, worker)) {
      free(worker);
      break;
    }
    team->started++;
  }
  if (team->ids && team->started == team->threads - 1) return team;
  team_destroy(team);
  return nullptr;
}

void team_destroy(Team *team) {
  if (!team) return;
  pthread_mutex_lock(&team->lock);
  team->stop.store(1, std::memory_order_seq_cst);
  pthread_cond_broadcast(&team->wake);
  pthread_mutex_unlock(&team->lock);
  for (int32_t i = 0; i < team->started; i++) pthread_join(team->ids[i], nullptr);
  pthread_cond_destroy(&team->finished);
  pthread_cond_destroy(&team->wake);
  pthread_mutex_destroy(&team->lock);
  free(team->ids);
  team->~Team();
  free(team);
}
