/* rorqual-guest: the agent inside a sandbox. PID 1 of its container, or any process with --socket in tests.
 *
 * usage: rorqual-guest (--listen-fd N | --socket PATH | --vsock PORT | --ports N) [--own-kernel] [--boot-env NAME=VALUE]...
 *        [--machine and its options, see boot.c]
 *        rorqual-guest --relay PATH
 *
 * Owns arguments, the listening socket, signals, the epoll loop. As PID 1 (or subreaper, elsewhere) it reaps every
 * orphan. SIGTERM from outside the namespace kills all commands and exits 0; SIGTERM from a process inside is ignored,
 * so a command cannot end its sandbox with `kill 1`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC 4u
#endif

uint8_t boot_id[16];
int null_fd = -1;
static int epoll_fd = -1;

int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000ll + t.tv_nsec;
}

void source_watch(struct source *s, uint32_t events) {
    if (s->fd < 0 || s->events == events) return;
    struct epoll_event e = {.events = events, .data.ptr = s};
    int op = !s->events ? EPOLL_CTL_ADD : events ? EPOLL_CTL_MOD : EPOLL_CTL_DEL;
    if (epoll_ctl(epoll_fd, op, s->fd, &e) == 0) s->events = events;
}

void source_close(struct source *s) {
    if (s->fd < 0) return;
    source_watch(s, 0);
    close(s->fd);
    s->fd = -1;
}

static void die(const char *what) {
    fprintf(stderr, "rorqual-guest: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int listen_at(const char *path) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof a.sun_path) {
        errno = ENAMETOOLONG;
        die(path);
    }
    strcpy(a.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unlink(path);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 64)) die(path);
    return fd;
}

/* Ready-made descriptors only: a closed 0, 1 or 2 would be handed out to a socket and then to a command. */
static void fill_std_fds(void) {
    int fd;
    do fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd < 3);
    if (fd < 0) die("/dev/null");
    close(fd);
}

static void on_signal(int fd) {
    struct signalfd_siginfo s;
    bool child = false, stop = false;
    while (read(fd, &s, sizeof s) == sizeof s) {
        if (s.ssi_signo == SIGCHLD) child = true;
        else if (getpid() != 1 || s.ssi_pid == 0) stop = true;
    }
    if (stop) {
        sweep_all();
        exit(0);
    }
    if (!child) return;
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        if (!command_exited(pid, status)) files_worker_exited(pid, status);
}

static void on_listen(int fd) {
    for (;;) {
        int c = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (c < 0) return;
        if (peer_is_host(c)) conn_accept(c);
        else close(c);
    }
}

int main(int argc, char **argv) {
    int listen_fd = -1;
    uint32_t port = 0, ports = 0;
    const char *path = NULL;
    for (int i = 1, used; i < argc; i++) {
        if (!strcmp(argv[i], "--listen-fd") && i + 1 < argc) listen_fd = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--socket") && i + 1 < argc) path = argv[++i];
        else if (!strcmp(argv[i], "--vsock") && i + 1 < argc) port = (uint32_t)strtoul(argv[++i], NULL, 10);
        else if (!strcmp(argv[i], "--ports") && i + 1 < argc) ports = (uint32_t)strtoul(argv[++i], NULL, 10);
        else if ((used = boot_option(argc - i, argv + i)) > 0) i += used - 1;
        else if (!strcmp(argv[i], "--relay") && i + 1 < argc && argc == 3) return relay(argv[++i]);
        else if (!strcmp(argv[i], "--own-kernel")) owns_kernel = true;
        else if (!strcmp(argv[i], "--boot-env") && i + 1 < argc && strchr(argv[i + 1], '=')) boot_env(argv[++i]);
        else if (!strcmp(argv[i], "--version")) return puts(AGENT_VERSION) < 0;
        else {
            fprintf(stderr, "usage: rorqual-guest (--listen-fd N | --socket PATH | --vsock PORT | --ports N) [--own-kernel] "
                            "[--boot-env NAME=VALUE]...\n");
            return 2;
        }
    }
    if ((listen_fd >= 0) + (path != NULL) + (port != 0) + (ports != 0) != 1) {
        fprintf(stderr, "rorqual-guest: give exactly one of --listen-fd N, --socket PATH, --vsock PORT, --ports N\n");
        return 2;
    }
    if (boot_machine) {
        owns_kernel = true;
        machine_boot();
    }
    fill_std_fds();
    syscall(SYS_close_range, 3u, ~0u, CLOSE_RANGE_CLOEXEC); /* whatever the runtime left open is not for commands */
    signal(SIGPIPE, SIG_IGN);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_SETMASK, &set, NULL);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_DUMPABLE, 0); /* commands of our own uid must not read or trace us */
    struct rlimit nofile;
    if (getrlimit(RLIMIT_NOFILE, &nofile) == 0) {
        nofile.rlim_cur = nofile.rlim_max;
        setrlimit(RLIMIT_NOFILE, &nofile);
    }
    if (getrandom(boot_id, sizeof boot_id, 0) != sizeof boot_id) die("getrandom");
    null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0 || null_fd < 0) die("epoll");
    if (path) listen_fd = listen_at(path);
    if (port && (listen_fd = vsock_listen(port)) < 0) die("vsock");
    int one = 1, type = 0;
    socklen_t size = sizeof type;
    if (ports) {
        if (!ports_open(ports)) die("virtio-serial ports");
    } else if (!path && (getsockopt(listen_fd, SOL_SOCKET, SO_ACCEPTCONN, &type, &size) || type != one)) {
        fprintf(stderr, "rorqual-guest: fd %d is not a listening socket\n", listen_fd);
        return 1;
    }
    if (listen_fd >= 0) {
        fcntl(listen_fd, F_SETFD, FD_CLOEXEC);
        fcntl(listen_fd, F_SETFL, fcntl(listen_fd, F_GETFL) | O_NONBLOCK);
    }
    struct source listener = {.kind = SRC_LISTEN, .fd = listen_fd};
    struct source signals = {.kind = SRC_SIGNAL, .fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK)};
    if (signals.fd < 0) die("signalfd");
    source_watch(&listener, EPOLLIN);
    source_watch(&signals, EPOLLIN);

    for (;;) {
        command_run_due(now_ns());
        for (struct conn *c = conns; c; c = c->next)
            if (!c->dead) conn_pump(c);
        conn_reap();
        tcp_reap();
        command_reap();
        int64_t due = command_next_due();
        int wait = -1;
        if (due != INT64_MAX) {
            int64_t ms = (due - now_ns() + 999999) / 1000000;
            wait = ms < 0 ? 0 : ms > 3600000 ? 3600000 : (int)ms;
        }
        struct epoll_event events[64];
        int n = epoll_wait(epoll_fd, events, 64, wait);
        for (int i = 0; i < n; i++) {
            struct source *s = events[i].data.ptr;
            if (s->fd < 0) continue; /* closed earlier in this batch; its owner is freed only after the batch */
            switch (s->kind) {
                case SRC_LISTEN: on_listen(s->fd); break;
                case SRC_SIGNAL: on_signal(s->fd); break;
                case SRC_TCP: tcp_event(s->owner, events[i].events); break;
                case SRC_PORT: ports_event(s->owner); break;
                case SRC_CONN: conn_event(s->owner, events[i].events); break;
                default: command_event(s->owner, s->kind); break;
            }
        }
    }
}
