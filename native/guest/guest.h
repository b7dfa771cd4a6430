/* guest: the pieces of the agent and who owns what.
 *
 *   main.c     arguments, sockets, signals, the epoll loop, timers
 *   boot.c     a machine's way from its first process to a root for commands
 *   ports.c    clients on the virtio-serial ports of a machine
 *   conn.c     one client connection: bytes in, frames dispatched, bytes out
 *   command.c  the command table: start, output rings, subscriptions, end
 *   spawn.c    user, environment, descriptors, exec
 *   sweep.c    which processes belong to a command, and their death
 *   files.c    file calls
 *   tcp.c      connections of the host to ports of the sandbox
 *   refresh.c  a restored machine gets its own entropy, names and clock
 *   relay.c    one client's bytes, for a runtime that hands no socket in
 *   vsock.c    the listening socket of a machine
 *   wire.c     the protocol's bytes (pure)
 *
 * One thread, one epoll loop, nothing blocks it: every descriptor that can wait is non-blocking, a recursive remove
 * runs in a forked child. Memory is bounded by the limits below.
 */
#ifndef RORQUAL_GUEST_H
#define RORQUAL_GUEST_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "wire.h"

#define AGENT_VERSION "rorqual-guest/0.1.0"

#define MAX_CONNS 32u
#define MAX_RUNNING 512u                /* commands at once */
#define MAX_ENDED 256u                  /* ended commands kept for a later attach, oldest dropped first */
#define MAX_SUBS 1024u                  /* attachments per connection */
#define MAX_STREAMS 256u                /* connections to ports, of all clients */
#define MAX_HANDLES 16u                 /* open files per connection */
#define RING_MIN (4u * 1024)
#define RING_MAX (1024u * 1024)         /* kept output per stream */
#define RING_BUDGET (48u * 1024 * 1024) /* kept output of all commands */
#define OUT_HIGH (256u * 1024)          /* stop producing for a connection above this many unsent bytes */
#define OUT_CEILING (2u * 1024 * 1024)  /* close a connection that makes us hold more */
#define DATA_CHUNK (32u * 1024)
#define DRAIN_QUIET_NS 100000000ll      /* after the main process: this long without new output ends the command */
#define DRAIN_TOTAL_NS 1000000000ll     /* and at most this long, however chatty the background children are */
#define DRAIN_STALL_NS 5000000000ll     /* a client that takes nothing cannot hold an ended command longer */
#define SWEEP_RETRY_NS 20000000ll
#define SWEEP_RETRIES 250

enum source_kind { SRC_LISTEN, SRC_SIGNAL, SRC_CONN, SRC_STDOUT, SRC_STDERR, SRC_STDIN, SRC_PORT, SRC_TCP };

struct source { /* what an epoll event points at; first member of nothing, embedded where a descriptor lives */
    enum source_kind kind;
    int fd;          /* -1: closed */
    uint32_t events; /* registered mask, 0: not registered */
    void *owner;
};

struct conn;
struct command;
struct tcp;

struct stream { /* one output of a command. Offsets count bytes since the start. */
    struct source src;
    uint8_t *ring;
    size_t cap;
    uint64_t first, kept, total; /* ring holds [first, kept); total also counts what was dropped */
    bool full;                   /* waiting for a slow client */
};

struct sub { /* one attachment of a connection to a command */
    struct sub *next_in_conn, *next_in_command;
    struct conn *conn;
    struct command *cmd;
    uint32_t id; /* request id of the START or ATTACH, and of all frames of this attachment */
    uint64_t pos[2], credit;
    bool lost; /* some kept bytes were gone before this attachment could have them */
};

struct command {
    struct command *next;
    uint64_t serial, cookie; /* cookie: boot nonce << 32 | serial; see sweep.c */
    pid_t pid;
    struct stream out[2];
    struct sub *subs;
    struct source in;
    uint8_t *in_data; /* a STDIN chunk being written */
    uint32_t in_len, in_off, in_id;
    bool in_eof, in_closed;
    uint64_t in_total; /* bytes taken so far */
    struct conn *in_conn; /* who waits for the chunk, or NULL */
    uint64_t max_output;
    int64_t started, ended, deadline, quiet_until, drain_until, sweep_at;
    int sweeps_left, status;
    bool pty, exited, done, timed_out, cut, dead;
    char *title, *tag, *error; /* title: argv joined by NUL, cut */
    uint32_t title_len;
};

enum handle_kind { H_NONE, H_READ, H_WRITE, H_DIR };
struct handle {
    enum handle_kind kind;
    int fd;
    void *dir;
    uint64_t left;          /* READ: bytes still wanted */
    char *path, *temp;      /* WRITE: target and temporary (NULL: append) */
};

struct conn {
    struct conn *next;
    struct source src;
    struct buffer in, out;
    struct sub *subs;
    uint32_t sub_count;
    struct tcp *streams;
    struct handle handles[MAX_HANDLES];
    bool greeted, closing, dead; /* closing: flush, then close */
};

struct identity { /* who a command runs as */
    uid_t uid;
    gid_t gid;
    bool change;
    char name[64], home[256];
    gid_t groups[64];
    int ngroups;
};

/* main.c */
extern struct conn *conns;
extern uint8_t boot_id[16];
extern int null_fd;
int64_t now_ns(void);
void source_watch(struct source *s, uint32_t events); /* 0 stops watching */
void source_close(struct source *s);

/* boot.c */
extern bool boot_machine;
int boot_option(int left, char **argv);
void machine_boot(void);

/* ports.c */
unsigned ports_open(unsigned wanted); /* how many there are; waits for the driver */
void ports_event(void *owner);

/* conn.c */
void conn_accept(int fd);
void conn_event(struct conn *c, uint32_t events);
void conn_pump(struct conn *c); /* move output of its commands into its buffer, and its buffer to the socket */
void conn_close(struct conn *c);
void conn_reap(void); /* free the dead; call outside event handling */
void reply_empty(struct conn *c, uint32_t id);
void reply_u8(struct conn *c, uint32_t id, uint8_t v);
void reply_error(struct conn *c, uint32_t id, int err, const char *text);
void conn_fault(struct conn *c, const char *why); /* the client broke the protocol: say so, close */

/* command.c */
extern struct command *commands;
void command_start(struct conn *c, uint32_t id, struct reader *r);
void command_attach(struct conn *c, uint32_t id, struct reader *r);
void command_resume(struct conn *c, uint32_t id, struct reader *r);
void command_list(struct conn *c, uint32_t id, struct reader *r);
void command_kill(struct conn *c, uint32_t id, struct reader *r);
void command_stdin(struct conn *c, uint32_t id, struct reader *r);
void command_stdin_at(struct conn *c, uint32_t id, struct reader *r);
void command_resize(struct conn *c, uint32_t id, struct reader *r);
void command_event(struct command *cmd, enum source_kind kind);
bool command_exited(pid_t pid, int status); /* false: not a command of ours */
void command_forget_conn(struct conn *c);
void sub_free(struct sub *s);
bool sub_pump(struct sub *s); /* put at most one frame into the connection's buffer; true if it did. May free s */
void command_run_due(int64_t now); /* timeouts, sweeps, drains */
int64_t command_next_due(void);    /* INT64_MAX: nothing is timed */
void command_reap(void);

bool may_attach(struct conn *c, uint32_t id); /* false: it was told why not */

/* spawn.c */
bool identity_of(const struct user_spec *user, struct identity *out, char *why, size_t why_len);
bool spawn(struct command *cmd, struct start_request *req, char *why, size_t why_len);
void boot_env(const char *assignment); /* adds to, or replaces in, the environment every command starts from */

/* sweep.c */
int sweep(const struct command *cmd, int sig);  /* signal every live process of the command; 0: nothing was hit */
void sweep_all(void);                           /* kill every process any command left behind */

/* files.c */
void files_call(struct conn *c, const struct frame *f, struct reader *r);
bool files_worker_exited(pid_t pid, int status);
void files_forget_conn(struct conn *c);

/* tcp.c */
void tcp_open(struct conn *c, uint32_t id, struct reader *r);
void tcp_send(struct conn *c, uint32_t id, struct reader *r);
void tcp_credit(struct conn *c, uint32_t id, struct reader *r);
void tcp_close(struct conn *c, uint32_t id, struct reader *r);
void tcp_event(struct tcp *t, uint32_t events);
void tcp_pump(struct conn *c); /* after its buffer has changed: read again, or no longer */
bool tcp_has(struct conn *c, uint32_t id);
void tcp_forget_conn(struct conn *c);
void tcp_reap(void);

/* refresh.c */
extern bool owns_kernel; /* we are a machine's agent: its clock and host name are ours to set */
void refresh(struct conn *c, uint32_t id, struct reader *r);

/* relay.c */
int relay(const char *path);

/* vsock.c */
int vsock_listen(uint32_t port); /* -1: errno */
bool peer_is_host(int fd);       /* false: a process of this guest that found the port */

#endif
