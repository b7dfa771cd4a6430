/* sweep: which processes belong to a command, and their death.
 *
 * A process belongs to a command if any of these holds:
 *   - its process group or session is the command's (while the main process lives: afterwards the number may be reused);
 *   - its RLIMIT_LOCKS is the command's cookie. The kernel has ignored that limit since Linux 2.4.25, but still hands it
 *     down through fork, exec and setsid, and it survives `env -i`;
 *   - its environment carries RORQUAL_CMD=<cookie> (for kernels, like gVisor's, that do not hand the limit down);
 *   - its parent belongs (a process that changed both is still caught while its parent lives).
 * What escapes: a process that deliberately sets another limit, clears its environment, leaves the session and
 * outlives its parent. The sandbox's own end catches that one.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

#define MAX_SCAN 65536

struct proc {
    pid_t pid, ppid, group, session;
    char state;
    bool mine;
};

static ssize_t slurp(pid_t pid, const char *name, char *into, size_t cap) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    size_t have = 0;
    for (ssize_t n; have < cap - 1 && (n = read(fd, into + have, cap - 1 - have)) > 0;) have += (size_t)n;
    close(fd);
    into[have] = 0;
    return (ssize_t)have;
}

static bool read_stat(pid_t pid, struct proc *out) {
    char text[512];
    if (slurp(pid, "stat", text, sizeof text) <= 0) return false;
    char *after = strrchr(text, ')'); /* the name may contain anything, a ')' too */
    int ppid, group, session;
    if (!after || sscanf(after + 1, " %c %d %d %d", &out->state, &ppid, &group, &session) != 4) return false;
    out->pid = pid;
    out->ppid = ppid;
    out->group = group;
    out->session = session;
    return true;
}

/* `cookie` 0: any cookie of this boot. */
static bool cookie_matches(uint64_t seen, uint64_t cookie, uint64_t any) {
    return cookie ? seen == cookie : (seen >> 32) == (any >> 32);
}

static bool carries(pid_t pid, uint64_t cookie, uint64_t any) {
    static char text[256 * 1024];
    if (slurp(pid, "limits", text, 8192) > 0) {
        char *line = strstr(text, "Max file locks");
        if (line && cookie_matches(strtoull(line + strlen("Max file locks"), NULL, 10), cookie, any)) return true;
    }
    ssize_t n = slurp(pid, "environ", text, sizeof text);
    for (char *at = text; n > 0 && at < text + n; at += strlen(at) + 1)
        if (!strncmp(at, "RORQUAL_CMD=", 12) && cookie_matches(strtoull(at + 12, NULL, 10), cookie, any)) return true;
    return false;
}

/* Marks and counts the live members; fills `list`, returns its length. */
static size_t scan(const struct command *cmd, struct proc *list, int *alive) {
    DIR *dir = opendir("/proc");
    size_t n = 0;
    *alive = 0;
    if (!dir) return 0;
    uint64_t any = commands ? commands->cookie : 0;
    pid_t self = getpid();
    for (struct dirent *e; (e = readdir(dir)) && n < MAX_SCAN;) {
        if (!isdigit((unsigned char)e->d_name[0])) continue;
        pid_t pid = atoi(e->d_name);
        struct proc p;
        if (pid == self || !read_stat(pid, &p) || p.state == 'Z' || p.state == 'X') continue;
        p.mine = (cmd && !cmd->exited && (p.group == cmd->pid || p.session == cmd->pid)) ||
                 carries(pid, cmd ? cmd->cookie : 0, any);
        list[n++] = p;
    }
    closedir(dir);
    for (bool grew = true; grew;) { /* children of members are members */
        grew = false;
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; !list[i].mine && j < n; j++)
                if (list[j].mine && list[j].pid == list[i].ppid) list[i].mine = grew = true;
    }
    for (size_t i = 0; i < n; i++) *alive += list[i].mine;
    return n;
}

static struct proc *space(void) {
    static struct proc *list; /* 1.3 MiB of address space, touched as far as it is used */
    if (!list) list = malloc(MAX_SCAN * sizeof *list);
    return list;
}

static void signal_members(const struct proc *list, size_t n, int sig) {
    for (size_t i = 0; i < n; i++)
        if (list[i].mine) kill(list[i].pid, sig);
}

int sweep(const struct command *cmd, int sig) {
    struct proc *list = space();
    int alive = 0, total = 0;
    if (!list) return cmd->exited ? 0 : kill(-cmd->pid, sig) == 0;
    if (sig != SIGKILL) {
        size_t n = scan(cmd, list, &alive);
        signal_members(list, n, sig);
        return alive;
    }
    /* Counted here: on another CPU the group may be dead, and passed over as zombies, before the first scan. */
    if (!cmd->exited && kill(-cmd->pid, SIGKILL) == 0) total = 1;
    for (int pass = 0; pass < 4; pass++) { /* what is still dying then is looked at again by the caller's timer */
        size_t n = scan(cmd, list, &alive);
        if (alive == 0) break;
        total += alive;
        /* Something forks as fast as we kill: stop all first, so that their number only falls. */
        if (pass % 3 == 1) signal_members(list, n, SIGSTOP);
        else signal_members(list, n, SIGKILL);
    }
    return total;
}

void sweep_all(void) {
    if (getpid() == 1) {
        kill(-1, SIGKILL); /* everything in our namespace; our exit would do it too */
        return;
    }
    struct proc *list = space();
    for (int pass = 0, alive = 1; list && commands && alive && pass < 16; pass++) {
        size_t n = scan(NULL, list, &alive);
        signal_members(list, n, SIGKILL);
    }
}
