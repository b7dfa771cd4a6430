// team.h: threads that share the tasks of one phase after another; compiled once, for all levels.
//
// A phase is a function and a count of tasks. The caller takes tasks too and returns when all are done. A thread that
// is not running when a phase begins costs nothing: the others do its share. Between phases threads spin for some tens
// of microseconds, then sleep, so an idle team costs nothing and a busy machine is not fought for its cores.
#pragma once
#include <stdint.h>

struct Team;
typedef void (*TeamTask)(void *arg, int32_t task, int32_t slot);

Team *team_create(int32_t threads);  // null when they cannot be made; the caller is one of them
void team_destroy(Team *team);
int32_t team_threads(const Team *team);

// Runs task 0..tasks-1, each once, on the caller (slot 0) and up to limit - 1 others (slots below limit). One caller at a
// time. `team` null: the caller alone.
void team_run(Team *team, int32_t limit, TeamTask run, void *arg, int32_t tasks);
