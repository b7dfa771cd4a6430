/* spawn: who a command runs as, with which environment and descriptors, and its exec.
 *
 * vfork, so that starting costs the same however much output the agent holds; the child shares our memory until exec and
 * only makes system calls. What goes wrong in it comes back through `failed` and is a result (exit 126 or 127 and a
 * text), never a hang. Every command leads its own session and process group, and carries its cookie (sweep.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "guest.h"

#define MAX_BASE_ENV 1024
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

extern char **environ;
static char *boot[MAX_BASE_ENV];
static unsigned boot_count;

void boot_env(const char *assignment) {
    if (boot_count < MAX_BASE_ENV) boot[boot_count++] = (char *)assignment;
}

/* --- identity: /etc/passwd and /etc/group, read as data of the guest's --- */

static char *read_table(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    if (fd < 0) return NULL;
    char *text = NULL;
    size_t have = 0, cap = 1024 * 1024;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (text = malloc(cap + 1))) {
        for (ssize_t n; have < cap && (n = read(fd, text + have, cap - have)) > 0;) have += (size_t)n;
        text[have] = 0;
    }
    close(fd);
    return text;
}

static int split(char *line, char **fields, int max) {
    int n = 0;
    while (n < max && line) fields[n++] = strsep(&line, ":");
    return n;
}

static bool number(const char *s, uint32_t *out) {
    char *end;
    errno = 0;
    unsigned long long v = strtoull(s, &end, 10);
    if (*s < '0' || *s > '9' || *end || errno || v >= WIRE_NO_UID) return false;
    *out = (uint32_t)v;
    return true;
}

static void find_groups(struct identity *who) {
    char *text = read_table("/etc/group"), *rest = text;
    for (char *line; rest && (line = strsep(&rest, "\n"));) {
        char *f[4];
        uint32_t gid;
        if (split(line, f, 4) < 4 || !number(f[2], &gid)) continue;
        char *members = f[3];
        for (char *name; (name = strsep(&members, ","));)
            if (!strcmp(name, who->name) && who->ngroups < 64) who->groups[who->ngroups++] = gid;
    }
    free(text);
}

bool identity_of(const struct user_spec *user, struct identity *out, char *why, size_t why_len) {
    memset(out, 0, sizeof *out);
    uint32_t wanted = user->kind == USER_ID ? user->uid : (uint32_t)geteuid();
    out->uid = wanted;
    out->gid = user->kind == USER_ID ? (gid_t)wanted : getegid();
    bool found = false;
    char *text = read_table("/etc/passwd"), *rest = text;
    for (char *line; rest && !found && (line = strsep(&rest, "\n"));) {
        char *f[7];
        uint32_t uid, gid;
        if (split(line, f, 7) < 7 || !number(f[2], &uid) || !number(f[3], &gid)) continue;
        if (user->kind == USER_NAME ? strcmp(f[0], user->name) != 0 : uid != wanted) continue;
        found = true;
        out->uid = uid;
        if (user->kind != USER_AGENT) out->gid = gid;
        snprintf(out->name, sizeof out->name, "%s", f[0]);
        snprintf(out->home, sizeof out->home, "%s", f[5]);
    }
    free(text);
    if (!found && user->kind == USER_NAME) {
        snprintf(why, why_len, "user '%.200s' is not in /etc/passwd", user->name);
        return false;
    }
    out->change = user->kind != USER_AGENT && (out->uid != geteuid() || out->gid != getegid());
    if (found && out->change) find_groups(out);
    return true;
}

/* --- environment: ours, --boot-env over it, what the user implies, then the request's --- */

static char *env_list[MAX_BASE_ENV * 2 + WIRE_MAX_STRINGS + 16];
static unsigned env_count;

static void env_put(char *assignment, bool replace) {
    size_t n = (size_t)(strchrnul(assignment, '=') - assignment);
    for (unsigned i = 0; i < env_count; i++)
        if (!strncmp(env_list[i], assignment, n) && env_list[i][n] == '=') {
            if (replace) env_list[i] = assignment;
            return;
        }
    if (env_count < sizeof env_list / sizeof *env_list - 1) env_list[env_count++] = assignment;
}

static const char *env_get(const char *name) {
    size_t n = strlen(name);
    for (unsigned i = 0; i < env_count; i++)
        if (!strncmp(env_list[i], name, n) && env_list[i][n] == '=') return env_list[i] + n + 1;
    return NULL;
}

static void env_build(const struct command *cmd, struct start_request *req, const struct identity *who) {
    static char home[280], user[80], logname[80], cookie[48];
    env_count = 0;
    for (unsigned i = 0; environ[i] && i < MAX_BASE_ENV; i++)
        if (strchr(environ[i], '=')) env_list[env_count++] = environ[i];
    for (unsigned i = 0; i < boot_count; i++) env_put(boot[i], true);
    if (who->name[0]) {
        snprintf(home, sizeof home, "HOME=%s", who->home[0] ? who->home : "/");
        snprintf(user, sizeof user, "USER=%s", who->name);
        snprintf(logname, sizeof logname, "LOGNAME=%s", who->name);
        env_put(home, who->change);
        env_put(user, who->change);
        env_put(logname, who->change);
    } else {
        env_put("HOME=/", who->change);
    }
    env_put("PATH=" DEFAULT_PATH, false);
    if (cmd->pty) env_put("TERM=xterm-256color", false);
    for (uint32_t i = 0; i < req->envc; i++) env_put(req->env[i], true);
    snprintf(cookie, sizeof cookie, "RORQUAL_CMD=%llu", (unsigned long long)cmd->cookie);
    env_put(cookie, true);
    env_list[env_count] = NULL;
}

/* --- the child --- */

enum stage { ST_OK, ST_IDENTITY, ST_TERMINAL, ST_GROUPS, ST_USER, ST_CWD, ST_EXEC };
struct failure {
    enum stage stage;
    int err;
};

struct plan {
    struct command *cmd;
    struct start_request *req;
    const struct identity *who;
    int fd0, fd1, fd2; /* what becomes 0, 1, 2 */
    const char *cwd, *path;
    bool oom_reset, bad_identity;
};

/* Like execvpe, without allocating; leaves the errno that explains most. */
static void exec_search(const struct plan *p) {
    char **argv = p->req->argv + 1, file[WIRE_MAX_PATH + 1];
    if (strchr(argv[0], '/')) {
        execve(argv[0], argv, env_list);
        if (errno == ENOEXEC) { /* a script without #!: what every shell does */
            p->req->argv[0] = "sh";
            execve("/bin/sh", p->req->argv, env_list);
        }
        return;
    }
    bool denied = false;
    for (const char *at = p->path;;) {
        const char *end = strchrnul(at, ':');
        int n = snprintf(file, sizeof file, "%.*s%s%s", (int)(end - at), at, end == at ? "./" : "/", argv[0]);
        if (n > 0 && (size_t)n < sizeof file) {
            execve(file, argv, env_list);
            if (errno == ENOEXEC) {
                p->req->argv[0] = "sh";
                argv[0] = file;
                execve("/bin/sh", p->req->argv, env_list);
                return;
            }
            if (errno == EACCES) denied = true;
            else if (errno != ENOENT && errno != ENOTDIR) return;
        }
        if (!*end) break;
        at = end + 1;
    }
    errno = denied ? EACCES : ENOENT;
}

static void child_fail(volatile struct failure *failed, enum stage stage) {
    failed->err = errno;
    failed->stage = stage;
    _exit(stage == ST_EXEC && (failed->err == ENOENT || failed->err == ENOTDIR) ? 127 : 126);
}

static void child(const struct plan *p, volatile struct failure *failed) {
    if (p->bad_identity) child_fail(failed, ST_IDENTITY);
    setsid();
    struct rlimit cookie = {p->cmd->cookie, p->cmd->cookie}, core = {0, 0}, files;
    setrlimit(RLIMIT_LOCKS, &cookie);
    setrlimit(RLIMIT_CORE, &core);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max < 65536 ? files.rlim_max : 65536;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (p->oom_reset) { /* our own protection from the OOM killer is not theirs */
        int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
        if (fd >= 0 && write(fd, "0", 1) < 0) {}
        if (fd >= 0) close(fd);
    }
    umask(022);
    if (p->cmd->pty && ioctl(p->fd0, TIOCSCTTY, 0)) child_fail(failed, ST_TERMINAL);
    /* all three are above 2 (main.c fills 0, 1, 2), so no dup2 overwrites a source */
    if (dup2(p->fd0, 0) < 0 || dup2(p->fd1, 1) < 0 || dup2(p->fd2, 2) < 0) child_fail(failed, ST_TERMINAL);
    if (p->who->change) {
        if (setgroups((size_t)p->who->ngroups, p->who->groups) || setresgid(p->who->gid, p->who->gid, p->who->gid))
            child_fail(failed, ST_GROUPS);
        if (setresuid(p->who->uid, p->who->uid, p->who->uid)) child_fail(failed, ST_USER);
    }
    if (p->cwd[0] && chdir(p->cwd)) child_fail(failed, ST_CWD);
    signal(SIGPIPE, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    exec_search(p);
    child_fail(failed, ST_EXEC);
}

/* --- descriptors --- */

static bool open_pipes(struct command *cmd, bool want_stdin, int theirs[3]) {
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
    if (want_stdin ? pipe2(in, O_CLOEXEC) : (in[0] = fcntl(null_fd, F_DUPFD_CLOEXEC, 3)) < 0) goto bad;
    if (pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC)) goto bad;
    /* only our ends are non-blocking: a shared description would make the command's own writes fail */
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    fcntl(err[0], F_SETFL, O_NONBLOCK);
    if (want_stdin) fcntl(in[1], F_SETFL, O_WRONLY | O_NONBLOCK);
    cmd->in.fd = in[1];
    cmd->out[0].src.fd = out[0];
    cmd->out[1].src.fd = err[0];
    theirs[0] = in[0];
    theirs[1] = out[1];
    theirs[2] = err[1];
    return true;
bad:;
    int saved = errno, all[6] = {in[0], in[1], out[0], out[1], err[0], err[1]};
    for (int i = 0; i < 6; i++)
        if (all[i] >= 0) close(all[i]);
    errno = saved;
    return false;
}

/* For a kernel without TIOCGPTPEER (gVisor's of 2022). */
static int pty_by_name(int master) {
    unsigned n;
    char name[32];
    if (ioctl(master, TIOCGPTN, &n)) return -1;
    snprintf(name, sizeof name, "/dev/pts/%u", n);
    return open(name, O_RDWR | O_NOCTTY | O_CLOEXEC | O_NOFOLLOW);
}

static bool open_terminal(struct command *cmd, const struct start_request *req, const struct identity *who, int theirs[3]) {
    int unlock = 0, slave = -1, twin = -1, master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (master < 0) return false;
    if (ioctl(master, TIOCSPTLCK, &unlock) ||
        ((slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0 && (slave = pty_by_name(master)) < 0) ||
        (twin = fcntl(master, F_DUPFD_CLOEXEC, 3)) < 0) {
        int saved = errno;
        close(master);
        if (slave >= 0) close(slave);
        errno = saved;
        return false;
    }
    struct winsize size = {.ws_row = req->rows, .ws_col = req->cols};
    ioctl(master, TIOCSWINSZ, &size);
    if (who->change && fchown(slave, who->uid, (gid_t)-1)) {} /* the descriptor works all the same */
    cmd->out[0].src.fd = master;
    cmd->in.fd = twin; /* its own descriptor: reading and writing are watched separately */
    theirs[0] = theirs[1] = theirs[2] = slave;
    return true;
}

static bool oom_protected(void) {
    char text[16] = "";
    int fd = open("/proc/self/oom_score_adj", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    return n > 0 && text[0] == '-';
}

static void explain(const struct plan *p, const struct failure *f, char *why, size_t len) {
    const char *text = strerror(f->err), *name = p->req->argv[1];
    switch (f->stage) {
        case ST_CWD: snprintf(why, len, "cannot enter working directory '%.200s': %s", p->cwd, text); break;
        case ST_GROUPS: case ST_USER:
            snprintf(why, len, "cannot become uid %u, gid %u: %s", (unsigned)p->who->uid, (unsigned)p->who->gid, text);
            break;
        case ST_TERMINAL: snprintf(why, len, "cannot set up the command's descriptors: %s", text); break;
        case ST_IDENTITY: break; /* already explained */
        default:
            if (f->err == ENOENT && !strchr(name, '/')) snprintf(why, len, "'%.200s' was not found in PATH", name);
            else snprintf(why, len, "cannot run '%.200s': %s", name, text);
    }
}

bool spawn(struct command *cmd, struct start_request *req, char *why, size_t why_len) {
    static int protected_before = -1;
    if (protected_before < 0) protected_before = oom_protected();
    struct identity who;
    struct plan p = {.cmd = cmd, .req = req, .who = &who, .oom_reset = protected_before};
    why[0] = 0;
    p.bad_identity = !identity_of(&req->user, &who, why, why_len);
    env_build(cmd, req, &who);
    p.path = env_get("PATH");
    if (req->cwd[0]) p.cwd = req->cwd;
    else { /* home if it is there, else the root: never a reason to fail */
        struct stat st;
        p.cwd = env_get("HOME");
        if (!p.cwd || stat(p.cwd, &st) || !S_ISDIR(st.st_mode)) p.cwd = "/";
    }
    int theirs[3];
    volatile struct failure failed = {ST_OK, 0};
    bool fds = cmd->pty ? open_terminal(cmd, req, &who, theirs) : open_pipes(cmd, req->flags & START_STDIN, theirs);
    if (!fds) {
        if (!p.bad_identity)
            snprintf(why, why_len, "cannot open %s: %s", cmd->pty ? "a terminal" : "pipes", strerror(errno));
        p.bad_identity = true; /* the child only lends its number to the result */
        theirs[0] = theirs[1] = theirs[2] = -1;
    }
    p.fd0 = theirs[0];
    p.fd1 = theirs[1];
    p.fd2 = theirs[2];
    pid_t pid = vfork();
    if (pid == 0) {
        child(&p, &failed);
        _exit(126);
    }
    int err = errno;
    for (int i = 0; i < 3; i++)
        if (theirs[i] >= 0 && (i == 0 || theirs[i] != theirs[0])) close(theirs[i]);
    cmd->pid = pid;
    if (pid > 0 && failed.stage == ST_OK) return true;
    if (pid > 0) {
        struct failure f = {failed.stage, failed.err};
        explain(&p, &f, why, why_len);
        waitpid(pid, &cmd->status, 0);
    } else {
        snprintf(why, why_len, "cannot fork: %s", strerror(err));
        cmd->status = 126 << 8;
        static pid_t none; /* no number to name it by: outside the range of real ones */
        cmd->pid = 0x40000000 + none++ % 0x1000000;
    }
    for (int i = 0; i < 2; i++) source_close(&cmd->out[i].src);
    source_close(&cmd->in);
    return false;
}
