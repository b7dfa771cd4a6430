// team_stress.cpp: many phases over a team; every task must run once, with its own phase's argument.
// usage: team_stress THREADS PHASES. test_forward.py builds it; with -fsanitize=thread it also looks for races.
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "team.h"

static int hits[64];

static void add(void *arg, int32_t task, int32_t) { hits[task] += *(const int *)arg; }

int main(int, char **argv) {
  const int threads = atoi(argv[1]), phases = atoi(argv[2]);
  Team *team = team_create(threads);
  if (!team) return 2;
  unsigned random = 1;
  for (int phase = 0; phase < phases; phase++) {
    random = random * 1103515245u + 12345u;
    int value = 1 + phase % 7;
    const int tasks = (int)(random >> 16) % 64, limit = (random >> 24) % 4 ? threads : 1 + (int)(random >> 26) % threads;
    for (int i = 0; i < 64; i++) hits[i] = 0;
    team_run(team, limit, add, &value, tasks);
    for (int i = 0; i < 64; i++)
      if (hits[i] != (i < tasks ? value : 0)) {
        printf("phase %d, task %d of %d: %d\n", phase, i, tasks, hits[i]);
        return 1;
      }
    if (random >> 20 == 0) usleep(300);  // long enough for threads to fall asleep
  }
  team_destroy(team);
  puts("ok");
  return 0;
}
