/* command: the table of commands, their output rings, who is attached, how they end.
 *
 * A command belongs to the agent, not to a connection. Output goes into one ring per stream. While clients are attached
 * nothing unsent is overwritten: the slowest one holds the command back through its pipe. With nobody attached the
 * oldest bytes make room. Past max_output everything is read and dropped, so nothing can wedge or swell the agent.
 *
 * The end: the main process has exited and its pipes are empty and closed, or DRAIN_QUIET_NS passed without new output
 * (background children may hold a pipe for ever; theirs is then read and dropped, so that they live on).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"

struct command *commands; /* newest first */
static uint64_t last_serial;
static size_t ring_bytes;
static unsigned running_count;

static struct command *command_of(uint32_t pid) {
    struct command *cmd = commands;
    while (cmd && (cmd->dead || cmd->pid != (pid_t)pid)) cmd = cmd->next;
    return cmd;
}

static void command_drop(struct command *cmd) {
    cmd->dead = true;
    for (int i = 0; i < 2; i++) {
        source_close(&cmd->out[i].src);
        ring_bytes -= cmd->out[i].cap;
        free(cmd->out[i].ring);
        cmd->out[i].ring = NULL;
        cmd->out[i].cap = 0;
    }
    source_close(&cmd->in);
}

void command_reap(void) {
    for (struct command **at = &commands; *at;) {
        struct command *cmd = *at;
        if (!cmd->dead) {
            at = &cmd->next;
            continue;
        }
        *at = cmd->next;
        free(cmd->in_data);
        free(cmd->title);
        free(cmd->tag);
        free(cmd->error);
        free(cmd);
    }
}

/* Drop the oldest ended command nobody is attached to. */
static bool evict_one(bool with_ring) {
    struct command *oldest = NULL;
    for (struct command *cmd = commands; cmd; cmd = cmd->next)
        if (cmd->done && !cmd->dead && !cmd->subs && (!with_ring || cmd->out[0].cap || cmd->out[1].cap)) oldest = cmd;
    if (oldest) command_drop(oldest);
    return oldest != NULL;
}

static void evict(void) {
    unsigned ended = 0;
    for (struct command *cmd = commands; cmd; cmd = cmd->next) ended += cmd->done && !cmd->dead;
    while (ended > MAX_ENDED && evict_one(false)) ended--;
}

/* --- output rings --- */

static uint64_t unsent(const struct command *cmd, int i) {
    const struct stream *st = &cmd->out[i];
    uint64_t low = st->kept;
    for (struct sub *s = cmd->subs; s; s = s->next_in_command) {
        uint64_t pos = s->pos[i] < st->first ? st->first : s->pos[i];
        if (pos < low) low = pos;
    }
    return st->kept - low;
}

static void ring_grow(struct stream *st, uint64_t want) {
    if (want > RING_MAX) want = RING_MAX;
    if (st->cap >= want) return;
    size_t cap = st->cap ? st->cap : RING_MIN;
    while (cap < want) cap *= 2;
    while (ring_bytes + cap - st->cap > RING_BUDGET && evict_one(true)) {}
    if (ring_bytes + cap - st->cap > RING_BUDGET) {
        if (st->cap) return;
        cap = RING_MIN; /* the first page is always granted: MAX_RUNNING bounds it */
    }
    uint8_t *ring = malloc(cap);
    if (!ring) return;
    for (uint64_t at = st->first; at < st->kept;) { /* same offsets, new modulus */
        size_t from = at % st->cap, to = at % cap, n = st->kept - at;
        if (n > st->cap - from) n = st->cap - from;
        if (n > cap - to) n = cap - to;
        memcpy(ring + to, st->ring + from, n);
        at += n;
    }
    free(st->ring);
    ring_bytes += cap - st->cap;
    st->ring = ring;
    st->cap = cap;
}

static void ring_put(struct stream *st, const uint8_t *bytes, size_t n) {
    while (n) {
        size_t to = st->kept % st->cap, part = n < st->cap - to ? n : st->cap - to;
        memcpy(st->ring + to, bytes, part);
        st->kept += part;
        bytes += part;
        n -= part;
    }
    if (st->kept - st->first > st->cap) st->first = st->kept - st->cap;
}

/* Read away and forget. Returns like read(2). */
static ssize_t discard(struct command *cmd, int fd) {
    static uint8_t sink[64 * 1024];
    if (!cmd->pty) {
        ssize_t n = splice(fd, NULL, null_fd, NULL, 1 << 20, SPLICE_F_NONBLOCK);
        if (n >= 0 || errno != EINVAL) return n;
    }
    return read(fd, sink, sizeof sink);
}

enum got { GOT_DATA, GOT_NOTHING, GOT_EOF, GOT_FULL };

static enum got stream_read(struct command *cmd, int i) {
    static uint8_t bytes[64 * 1024];
    struct stream *st = &cmd->out[i];
    if (st->src.fd < 0) return GOT_EOF;
    ssize_t n;
    if (cmd->done || st->kept >= cmd->max_output) {
        n = discard(cmd, st->src.fd);
        if (n > 0 && !cmd->done) st->total += (uint64_t)n;
    } else {
        int ready = 0;
        ioctl(st->src.fd, FIONREAD, &ready);
        uint64_t want = ready < 1 ? 1 : (unsigned)ready > sizeof bytes ? sizeof bytes : (unsigned)ready;
        if (want > cmd->max_output - st->kept) want = cmd->max_output - st->kept;
        ring_grow(st, st->kept - st->first + want);
        if (st->cap == 0) { /* no memory even for one page: give the output up, not the command */
            cmd->cut = true;
            n = discard(cmd, st->src.fd);
            if (n > 0) st->total += (uint64_t)n;
        } else {
            uint64_t room = st->cap - unsent(cmd, i);
            if (room == 0) {
                st->full = true;
                source_watch(&st->src, 0);
                return GOT_FULL;
            }
            n = read(st->src.fd, bytes, want < room ? want : room);
            if (n > 0) {
                st->total += (uint64_t)n;
                ring_put(st, bytes, (size_t)n);
            }
        }
    }
    if (n > 0) return GOT_DATA;
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return GOT_NOTHING;
    source_close(&st->src); /* 0, or EIO: the last writer of a terminal is gone */
    return GOT_EOF;
}

static void stream_resume(struct command *cmd, int i) {
    struct stream *st = &cmd->out[i];
    if (!st->full) return;
    st->full = false;
    source_watch(&st->src, EPOLLIN);
    if (cmd->exited && !cmd->done) {
        int64_t now = now_ns();
        cmd->quiet_until = now + DRAIN_QUIET_NS;
        cmd->drain_until = now + DRAIN_TOTAL_NS;
    }
}

/* --- stdin --- */

static void stdin_settle(struct command *cmd, int err) {
    struct conn *c = cmd->in_conn;
    free(cmd->in_data);
    cmd->in_data = NULL;
    cmd->in_conn = NULL;
    if (!c) return;
    if (err) reply_error(c, cmd->in_id, err, "the command does not read its stdin any more");
    else reply_empty(c, cmd->in_id);
}

static void stdin_write(struct command *cmd) {
    while (cmd->in_off < cmd->in_len) {
        ssize_t n = write(cmd->in.fd, cmd->in_data + cmd->in_off, cmd->in_len - cmd->in_off);
        if (n >= 0) {
            cmd->in_off += (uint32_t)n;
            continue;
        }
        if (errno == EINTR) continue;
        if (errno == EAGAIN) {
            source_watch(&cmd->in, EPOLLOUT);
            return;
        }
        int err = errno;
        source_close(&cmd->in);
        stdin_settle(cmd, err);
        return;
    }
    source_watch(&cmd->in, 0);
    if (cmd->in_eof) source_close(&cmd->in);
    stdin_settle(cmd, 0);
}

void command_stdin(struct conn *c, uint32_t id, struct reader *r) {
    uint32_t pid = rd_u32(r);
    uint8_t eof = rd_u8(r);
    uint32_t len;
    uint8_t *data = rd_rest(r, &len);
    if (r->bad || eof > 1) {
        conn_fault(c, "malformed STDIN");
        return;
    }
    struct command *cmd = command_of(pid);
    if (!cmd) reply_error(c, id, ESRCH, "no such command");
    else if (cmd->in.fd < 0) reply_error(c, id, EPIPE, "stdin of this command is not open");
    else if (cmd->in_data) reply_error(c, id, EBUSY, "another write to this command's stdin is under way");
    else {
        cmd->in_data = malloc(len + 1u);
        if (!cmd->in_data) {
            reply_error(c, id, ENOMEM, "out of memory");
            return;
        }
        if (len) memcpy(cmd->in_data, data, len);
        cmd->in_total += len;
        if (eof) cmd->in_closed = true;
        if (eof && cmd->pty) cmd->in_data[len++] = 4; /* ^D: a terminal is not closed, it is told */
        cmd->in_len = len;
        cmd->in_off = 0;
        cmd->in_eof = eof && !cmd->pty;
        cmd->in_conn = c;
        cmd->in_id = id;
        stdin_write(cmd);
    }
}

/* --- the end --- */

static void finish(struct command *cmd) {
    if (cmd->done) return;
    cmd->done = true;
    running_count--;
    if (cmd->in_data) stdin_settle(cmd, EPIPE);
    source_close(&cmd->in);
    for (int i = 0; i < 2; i++) {
        struct stream *st = &cmd->out[i];
        if (st->full) cmd->cut = true;
        st->full = false;
        if (cmd->pty) source_close(&st->src); /* the terminal is gone, as when its window is closed */
        else source_watch(&st->src, EPOLLIN); /* background children: read and drop */
    }
    evict();
}

static void drain(struct command *cmd) {
    bool open = false, full = false;
    for (int i = 0; i < 2; i++) {
        enum got got;
        /* 1 MiB is the largest pipe an unprivileged child can make; a chatty survivor must not hold the loop */
        for (int spins = 0; (got = stream_read(cmd, i)) == GOT_DATA && spins < 64; spins++) {}
        if (got != GOT_EOF) open = true;
        if (got == GOT_FULL) full = true;
    }
    if (!open) {
        finish(cmd);
        return;
    }
    int64_t now = now_ns();
    cmd->quiet_until = now + (full ? DRAIN_STALL_NS : DRAIN_QUIET_NS);
    cmd->drain_until = now + (full ? DRAIN_STALL_NS : DRAIN_TOTAL_NS);
}

bool command_exited(pid_t pid, int status) {
    struct command *cmd = commands;
    while (cmd && (cmd->dead || cmd->exited || cmd->pid != pid)) cmd = cmd->next;
    if (!cmd) return false;
    cmd->exited = true;
    cmd->status = status;
    cmd->ended = now_ns();
    drain(cmd);
    return true;
}

void command_event(struct command *cmd, enum source_kind kind) {
    if (cmd->dead) return;
    if (kind == SRC_STDIN) {
        if (cmd->in_data) stdin_write(cmd);
        return;
    }
    enum got got = stream_read(cmd, kind == SRC_STDERR);
    if (!cmd->exited || cmd->done) return;
    if (got == GOT_DATA) cmd->quiet_until = now_ns() + DRAIN_QUIET_NS;
    if (got == GOT_FULL) cmd->quiet_until = cmd->drain_until = now_ns() + DRAIN_STALL_NS;
    if (cmd->out[0].src.fd < 0 && cmd->out[1].src.fd < 0) finish(cmd);
}

static void kill_hard(struct command *cmd) {
    cmd->sweeps_left = SWEEP_RETRIES;
    cmd->sweep_at = now_ns() + SWEEP_RETRY_NS;
}

void command_run_due(int64_t now) {
    for (struct command *cmd = commands; cmd; cmd = cmd->next) {
        if (cmd->dead) continue;
        if (!cmd->exited && cmd->deadline && cmd->deadline <= now) {
            cmd->deadline = 0;
            cmd->timed_out = true;
            sweep(cmd, SIGKILL);
            kill_hard(cmd);
        }
        if (cmd->sweeps_left && cmd->sweep_at <= now) {
            cmd->sweep_at = now + SWEEP_RETRY_NS;
            cmd->sweeps_left = sweep(cmd, SIGKILL) ? cmd->sweeps_left - 1 : 0;
        }
        if (cmd->exited && !cmd->done && (cmd->quiet_until <= now || cmd->drain_until <= now)) finish(cmd);
    }
}

int64_t command_next_due(void) {
    int64_t due = INT64_MAX;
    for (struct command *cmd = commands; cmd; cmd = cmd->next) {
        if (cmd->dead) continue;
        if (!cmd->exited && cmd->deadline && cmd->deadline < due) due = cmd->deadline;
        if (cmd->sweeps_left && cmd->sweep_at < due) due = cmd->sweep_at;
        if (cmd->exited && !cmd->done) {
            int64_t end = cmd->quiet_until < cmd->drain_until ? cmd->quiet_until : cmd->drain_until;
            if (end < due) due = end;
        }
    }
    return due;
}

/* --- attachments --- */

static struct sub *sub_new(struct conn *c, struct command *cmd, uint32_t id, uint32_t credit) {
    struct sub *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    *s = (struct sub){.conn = c, .cmd = cmd, .id = id, .credit = credit};
    s->next_in_conn = c->subs;
    c->subs = s;
    c->sub_count++;
    s->next_in_command = cmd->subs;
    cmd->subs = s;
    return s;
}

void sub_free(struct sub *s) {
    struct sub **at = &s->conn->subs;
    while (*at != s) at = &(*at)->next_in_conn;
    *at = s->next_in_conn;
    s->conn->sub_count--;
    at = &s->cmd->subs;
    while (*at != s) at = &(*at)->next_in_command;
    *at = s->next_in_command;
    for (int i = 0; i < 2; i++) stream_resume(s->cmd, i); /* the slowest reader may have been this one */
    free(s);
}

static int exit_code(const struct command *cmd) {
    return WIFSIGNALED(cmd->status) ? 128 + WTERMSIG(cmd->status) : WEXITSTATUS(cmd->status);
}

bool sub_pump(struct sub *s) {
    struct command *cmd = s->cmd;
    struct buffer *out = &s->conn->out;
    for (int i = 0; i < 2; i++) {
        struct stream *st = &cmd->out[i];
        if (s->pos[i] < st->first) {
            s->pos[i] = st->first;
            s->lost = true;
        }
        uint64_t n = st->kept - s->pos[i];
        if (n > DATA_CHUNK) n = DATA_CHUNK;
        if (n > s->credit) n = s->credit;
        if (n == 0) continue;
        size_t mark = buf_begin(out, F_DATA, s->id), from = s->pos[i] % st->cap;
        size_t part = n < st->cap - from ? n : st->cap - from;
        buf_u8(out, (uint8_t)i);
        buf_put(out, st->ring + from, part);
        buf_put(out, st->ring, n - part);
        buf_end(out, mark);
        s->pos[i] += n;
        s->credit -= n;
        stream_resume(cmd, i);
        return true;
    }
    if (!cmd->done || s->pos[0] != cmd->out[0].kept || s->pos[1] != cmd->out[1].kept) return false;
    bool cut = cmd->cut || s->lost;
    for (int i = 0; i < 2; i++) cut = cut || cmd->out[i].total > cmd->out[i].kept;
    size_t mark = buf_begin(out, F_EXIT, s->id);
    buf_u32(out, (uint32_t)exit_code(cmd));
    buf_u32(out, WIFSIGNALED(cmd->status) ? (uint32_t)WTERMSIG(cmd->status) : 0);
    buf_u8(out, (uint8_t)((cmd->timed_out ? 1 : 0) | (cut ? 2 : 0)));
    buf_u64(out, cmd->out[0].total);
    buf_u64(out, cmd->out[1].total);
    buf_u64(out, (uint64_t)(cmd->ended - cmd->started));
    buf_str(out, cmd->error ? cmd->error : "", 1024);
    buf_end(out, mark);
    sub_free(s);
    return true;
}

void command_forget_conn(struct conn *c) {
    for (struct command *cmd = commands; cmd; cmd = cmd->next)
        if (cmd->in_conn == c) cmd->in_conn = NULL;
}

/* --- calls --- */

static void reply_started(struct conn *c, uint32_t id, const struct command *cmd) {
    size_t mark = buf_begin(&c->out, F_STARTED, id);
    buf_u32(&c->out, (uint32_t)cmd->pid);
    buf_u8(&c->out, cmd->pty);
    buf_u64(&c->out, cmd->max_output);
    buf_end(&c->out, mark);
}

bool may_attach(struct conn *c, uint32_t id) {
    if (c->sub_count >= MAX_SUBS) {
        reply_error(c, id, EMFILE, "too many attachments on this connection (1024)");
        return false;
    }
    for (struct sub *s = c->subs; s; s = s->next_in_conn)
        if (s->id == id) {
            conn_fault(c, "request id is in use by an attachment");
            return false;
        }
    if (tcp_has(c, id)) {
        conn_fault(c, "request id is in use by a connection to a port");
        return false;
    }
    return true;
}

void command_start(struct conn *c, uint32_t id, struct reader *r) {
    static struct start_request req;
    if (!wire_start(r, &req)) {
        conn_fault(c, "malformed START");
        return;
    }
    if (!may_attach(c, id)) return;
    if (running_count >= MAX_RUNNING) {
        reply_error(c, id, EAGAIN, "512 commands are running already; wait for one to end or kill it");
        return;
    }
    struct command *cmd = calloc(1, sizeof *cmd);
    struct sub *s = cmd ? sub_new(c, cmd, id, req.credit) : NULL;
    if (!s) {
        free(cmd);
        reply_error(c, id, ENOMEM, "out of memory");
        return;
    }
    cmd->serial = ++last_serial;
    static uint32_t nonce; /* one for all our commands: a refresh draws a new boot id */
    if (!nonce) nonce = (uint32_t)(boot_id[0] | boot_id[1] << 8 | boot_id[2] << 16) | 0x40000000u;
    cmd->cookie = (uint64_t)nonce << 32 | (uint32_t)cmd->serial;
    cmd->max_output = req.max_output;
    cmd->pty = req.flags & START_PTY;
    for (int i = 0; i < 2; i++)
        cmd->out[i].src = (struct source){.kind = i ? SRC_STDERR : SRC_STDOUT, .fd = -1, .owner = cmd};
    cmd->in = (struct source){.kind = SRC_STDIN, .fd = -1, .owner = cmd};
    cmd->started = now_ns();
    if (req.timeout_ms) {
        uint64_t ms = req.timeout_ms > 4000000000000ull ? 4000000000000ull : req.timeout_ms;
        cmd->deadline = cmd->started + (int64_t)ms * 1000000;
    }
    cmd->tag = strdup(req.tag);
    cmd->title = malloc(256);
    for (uint32_t i = 1; cmd->title && i <= req.argc && cmd->title_len < 256; i++) {
        size_t n = strlen(req.argv[i]) + (i < req.argc), room = 256 - cmd->title_len;
        if (n > room) n = room;
        memcpy(cmd->title + cmd->title_len, req.argv[i], n);
        cmd->title_len += (uint32_t)n;
    }
    char why[600];
    bool ok = spawn(cmd, &req, why, sizeof why);
    for (struct command *old = commands; old; old = old->next)
        if (old->pid == cmd->pid) old->pid = -1; /* the number came round: the old record cannot be named any more */
    cmd->next = commands;
    commands = cmd;
    running_count++;
    reply_started(c, id, cmd);
    if (ok) {
        for (int i = 0; i < 2; i++) source_watch(&cmd->out[i].src, EPOLLIN);
        return;
    }
    cmd->error = strdup(why);
    struct stream *st = &cmd->out[!cmd->pty];
    char line[640];
    size_t n = (size_t)snprintf(line, sizeof line, "rorqual-guest: %s\n", why);
    if (n > cmd->max_output) n = cmd->max_output;
    ring_grow(st, n);
    if (st->cap) ring_put(st, (uint8_t *)line, n);
    st->total = st->kept;
    cmd->exited = true;
    cmd->ended = now_ns();
    finish(cmd);
}

void command_attach(struct conn *c, uint32_t id, struct reader *r) {
    uint32_t pid = rd_u32(r), credit = rd_u32(r);
    if (!rd_done(r)) {
        conn_fault(c, "malformed ATTACH");
        return;
    }
    if (!may_attach(c, id)) return;
    struct command *cmd = command_of(pid);
    if (!cmd) reply_error(c, id, ESRCH, "no such command (256 ended ones are kept)");
    else if (!sub_new(c, cmd, id, credit)) reply_error(c, id, ENOMEM, "out of memory");
    else reply_started(c, id, cmd);
}

/* An attachment that goes on where one of a lost connection ended: the client has so many bytes of each stream. */
void command_resume(struct conn *c, uint32_t id, struct reader *r) {
    uint32_t pid = rd_u32(r), credit = rd_u32(r);
    uint64_t have[2] = {rd_u64(r), 0};
    have[1] = rd_u64(r);
    if (!rd_done(r)) {
        conn_fault(c, "malformed RESUME");
        return;
    }
    if (!may_attach(c, id)) return;
    struct command *cmd = command_of(pid);
    if (!cmd) {
        reply_error(c, id, ESRCH, "no such command (256 ended ones are kept)");
        return;
    }
    if (have[0] > cmd->out[0].kept || have[1] > cmd->out[1].kept) {
        reply_error(c, id, EINVAL, "the command has not written as much as the client has");
        return;
    }
    struct sub *s = sub_new(c, cmd, id, credit);
    if (!s) {
        reply_error(c, id, ENOMEM, "out of memory");
        return;
    }
    memcpy(s->pos, have, sizeof have);
    reply_started(c, id, cmd);
}

void command_list(struct conn *c, uint32_t id, struct reader *r) {
    uint64_t after = rd_u64(r);
    if (!rd_done(r)) {
        conn_fault(c, "malformed LIST");
        return;
    }
    size_t mark = buf_begin(&c->out, F_RESULT, id), start = c->out.len - c->out.off;
    int64_t now = now_ns();
    for (;;) { /* ascending serials out of a list that runs the other way: at most a few hundred records */
        struct command *next = NULL;
        for (struct command *cmd = commands; cmd && cmd->serial > after; cmd = cmd->next)
            if (!cmd->dead && cmd->pid > 0) next = cmd;
        if (!next || c->out.len - c->out.off - start > 64 * 1024) {
            buf_u64(&c->out, next ? after : 0);
            break;
        }
        after = next->serial;
        buf_u64(&c->out, next->serial);
        buf_u32(&c->out, (uint32_t)next->pid);
        buf_u8(&c->out, (uint8_t)((next->done ? 0 : 1) | (next->pty ? 2 : 0)));
        buf_u64(&c->out, (uint64_t)(now - next->started));
        buf_u32(&c->out, next->done ? (uint32_t)exit_code(next) : 0);
        buf_str(&c->out, next->tag ? next->tag : "", WIRE_MAX_TAG);
        buf_u32(&c->out, next->title_len);
        buf_put(&c->out, next->title, next->title_len);
    }
    buf_end(&c->out, mark);
}

void command_kill(struct conn *c, uint32_t id, struct reader *r) {
    uint32_t pid = rd_u32(r), sig = rd_u32(r);
    if (!rd_done(r) || sig < 1 || sig > 64) {
        conn_fault(c, "malformed KILL");
        return;
    }
    struct command *cmd = command_of(pid);
    if (!cmd) {
        reply_error(c, id, ESRCH, "no such command");
        return;
    }
    bool hit;
    if (sig == SIGKILL) {
        hit = sweep(cmd, SIGKILL) > 0;
        kill_hard(cmd);
    } else if (!cmd->exited) {
        hit = kill(-cmd->pid, (int)sig) == 0;
    } else {
        hit = sweep(cmd, (int)sig) > 0;
    }
    reply_u8(c, id, hit);
}

void command_stdin_at(struct conn *c, uint32_t id, struct reader *r) {
    uint32_t pid = rd_u32(r);
    if (!rd_done(r)) {
        conn_fault(c, "malformed STDIN_AT");
        return;
    }
    struct command *cmd = command_of(pid);
    if (!cmd || cmd->done) {
        reply_error(c, id, ESRCH, "no such command");
        return;
    }
    size_t mark = buf_begin(&c->out, F_RESULT, id);
    buf_u64(&c->out, cmd->in_total);
    buf_u8(&c->out, cmd->in_closed || cmd->in.fd < 0);
    buf_end(&c->out, mark);
}

void command_resize(struct conn *c, uint32_t id, struct reader *r) {
    uint32_t pid = rd_u32(r);
    uint16_t rows = rd_u16(r), cols = rd_u16(r);
    if (!rd_done(r) || rows == 0 || cols == 0) {
        conn_fault(c, "malformed RESIZE");
        return;
    }
    struct command *cmd = command_of(pid);
    struct winsize size = {.ws_row = rows, .ws_col = cols};
    if (!cmd) reply_error(c, id, ESRCH, "no such command");
    else if (!cmd->pty) reply_error(c, id, ENOTTY, "this command has no terminal");
    else if (cmd->in.fd < 0 || ioctl(cmd->in.fd, TIOCSWINSZ, &size)) reply_error(c, id, EIO, "the terminal is gone");
    else reply_empty(c, id);
}
