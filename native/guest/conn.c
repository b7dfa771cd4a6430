/* conn: one client connection. Bytes in, whole frames dispatched, bytes out.
 *
 * Backpressure, both ways: while OUT_HIGH bytes wait for a client that does not read, its requests stay in the socket
 * and its commands' output stays in their rings. A connection that breaks the protocol gets one ERROR with id 0 and is
 * closed; its commands run on.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"

struct conn *conns;
static unsigned conn_count;

static size_t pending(const struct buffer *b) { return b->len - b->off; }

void conn_accept(int fd) {
    struct conn *c = conn_count < MAX_CONNS ? calloc(1, sizeof *c) : NULL;
    if (!c) {
        close(fd);
        return;
    }
    c->src = (struct source){.kind = SRC_CONN, .fd = fd, .owner = c};
    c->in.ceiling = WIRE_HEADER + WIRE_MAX_PAYLOAD + 64 * 1024;
    c->out.ceiling = OUT_CEILING;
    for (unsigned i = 0; i < MAX_HANDLES; i++) c->handles[i].fd = -1;
    c->next = conns;
    conns = c;
    conn_count++;
    source_watch(&c->src, EPOLLIN);
}

void conn_close(struct conn *c) {
    if (c->dead) return;
    c->dead = true;
    source_close(&c->src);
    while (c->subs) sub_free(c->subs);
    tcp_forget_conn(c);
    command_forget_conn(c);
    files_forget_conn(c);
}

void conn_reap(void) {
    for (struct conn **at = &conns; *at;) {
        struct conn *c = *at;
        if (!c->dead) {
            at = &c->next;
            continue;
        }
        *at = c->next;
        conn_count--;
        buf_free(&c->in);
        buf_free(&c->out);
        free(c);
    }
}

void reply_empty(struct conn *c, uint32_t id) { buf_end(&c->out, buf_begin(&c->out, F_RESULT, id)); }

void reply_u8(struct conn *c, uint32_t id, uint8_t v) {
    size_t mark = buf_begin(&c->out, F_RESULT, id);
    buf_u8(&c->out, v);
    buf_end(&c->out, mark);
}

void reply_error(struct conn *c, uint32_t id, int err, const char *text) {
    size_t mark = buf_begin(&c->out, F_ERROR, id);
    buf_u32(&c->out, (uint32_t)err);
    buf_str(&c->out, text, 1024);
    buf_end(&c->out, mark);
}

void conn_fault(struct conn *c, const char *why) {
    if (c->closing) return;
    reply_error(c, 0, EPROTO, why);
    c->closing = true;
    while (c->subs) sub_free(c->subs);
}

static void hello(struct conn *c, uint32_t id, struct reader *r) {
    uint32_t magic = rd_u32(r);
    uint16_t low = rd_u16(r), high = rd_u16(r);
    if (!rd_done(r) || magic != WIRE_MAGIC) {
        conn_fault(c, "the first frame is not a HELLO of this protocol");
        return;
    }
    if (low > WIRE_VERSION || high < WIRE_VERSION) {
        conn_fault(c, "no common version: this agent speaks version 1");
        return;
    }
    c->greeted = true;
    size_t mark = buf_begin(&c->out, F_WELCOME, id);
    buf_u32(&c->out, WIRE_MAGIC);
    buf_u16(&c->out, WIRE_VERSION);
    buf_u32(&c->out, (uint32_t)getpid());
    buf_put(&c->out, boot_id, sizeof boot_id);
    buf_str(&c->out, AGENT_VERSION, 64);
    buf_end(&c->out, mark);
}

static struct sub *sub_of(struct conn *c, uint32_t id) {
    struct sub *s = c->subs;
    while (s && s->id != id) s = s->next_in_conn;
    return s;
}

static void dispatch(struct conn *c, struct frame *f) {
    struct reader r = {.at = f->payload, .end = f->payload + f->len};
    if (!c->greeted) {
        if (f->type == F_HELLO) hello(c, f->id, &r);
        else conn_fault(c, "the first frame is not a HELLO of this protocol");
        return;
    }
    if (f->id == 0) {
        conn_fault(c, "request id 0 is reserved");
        return;
    }
    struct sub *s;
    switch (f->type) {
        case F_START: command_start(c, f->id, &r); break;
        case F_ATTACH: command_attach(c, f->id, &r); break;
        case F_LIST: command_list(c, f->id, &r); break;
        case F_KILL: command_kill(c, f->id, &r); break;
        case F_STDIN: command_stdin(c, f->id, &r); break;
        case F_RESIZE: command_resize(c, f->id, &r); break;
        case F_CREDIT: { /* for an attachment that just ended: nothing to do, the two frames crossed */
            uint32_t more = rd_u32(&r);
            if (!rd_done(&r)) conn_fault(c, "malformed CREDIT");
            else if ((s = sub_of(c, f->id)) && s->credit < UINT64_MAX / 2) s->credit += more;
            break;
        }
        case F_DETACH:
            if (!rd_done(&r)) conn_fault(c, "malformed DETACH");
            else {
                if ((s = sub_of(c, f->id))) sub_free(s);
                /* RESULT under the attachment's id: no frame of it follows */
                reply_empty(c, f->id);
            }
            break;
        case F_READ_OPEN: case F_READ_NEXT: case F_WRITE_OPEN: case F_WRITE_NEXT: case F_CLOSE: case F_STAT:
        case F_DIR_OPEN: case F_DIR_NEXT: case F_MKDIR: case F_REMOVE: case F_RENAME:
            files_call(c, f, &r);
            break;
        case F_STDIN_AT: command_stdin_at(c, f->id, &r); break;
        case F_TCP_OPEN: tcp_open(c, f->id, &r); break;
        case F_TCP_SEND: tcp_send(c, f->id, &r); break;
        case F_TCP_CREDIT: tcp_credit(c, f->id, &r); break;
        case F_TCP_CLOSE: tcp_close(c, f->id, &r); break;
        case F_RESUME: command_resume(c, f->id, &r); break;
        case F_REFRESH: refresh(c, f->id, &r); break;
        default: conn_fault(c, "unknown frame type"); break;
    }
}

static void dispatch_all(struct conn *c) {
    while (!c->dead && !c->closing && pending(&c->out) < OUT_HIGH) {
        struct frame f;
        size_t used;
        const char *why = NULL;
        int got = wire_frame(c->in.data + c->in.off, pending(&c->in), &f, &used, &why);
        if (got == 0) return;
        if (got < 0) {
            conn_fault(c, why);
            return;
        }
        dispatch(c, &f);
        buf_drop(&c->in, used);
    }
}

void conn_event(struct conn *c, uint32_t events) {
    if (c->dead) return;
    if (events & EPOLLIN) {
        /* Room for a whole frame only once one is under way; 16 KiB serve the usual traffic. */
        size_t want = 16 * 1024;
        if (pending(&c->in) >= WIRE_HEADER) want = 64 * 1024;
        if (!buf_reserve(&c->in, want)) {
            conn_close(c);
            return;
        }
        ssize_t n = recv(c->src.fd, c->in.data + c->in.len, want, 0);
        if (n > 0) c->in.len += (size_t)n;
        else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
            conn_close(c);
            return;
        }
    } else if (events & (EPOLLHUP | EPOLLERR)) {
        conn_close(c);
    }
}

static bool flush(struct conn *c) {
    while (pending(&c->out)) {
        ssize_t n = send(c->src.fd, c->out.data + c->out.off, pending(&c->out), MSG_NOSIGNAL);
        if (n > 0) {
            buf_drop(&c->out, (size_t)n);
            continue;
        }
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return true;
        return false;
    }
    return true;
}

void conn_pump(struct conn *c) {
    /* Until nothing moves: requests, then output of commands, round robin, then the socket. */
    for (bool moved = true; moved;) {
        dispatch_all(c);
        if (c->dead) return;
        moved = false;
        for (struct sub *s = c->subs, *next; s && pending(&c->out) < OUT_HIGH; s = next) {
            next = s->next_in_conn;
            if (sub_pump(s)) moved = true;
        }
        size_t before = pending(&c->out);
        if (c->out.failed || !flush(c)) {
            conn_close(c);
            return;
        }
        if (before >= OUT_HIGH && pending(&c->out) < OUT_HIGH) moved = true;
        if (pending(&c->out)) moved = moved && pending(&c->out) < OUT_HIGH;
    }
    if (c->closing && !pending(&c->out)) {
        conn_close(c);
        return;
    }
    tcp_pump(c);
    uint32_t events = pending(&c->out) ? EPOLLOUT : 0;
    if (!c->closing && pending(&c->out) < OUT_HIGH) events |= EPOLLIN;
    if (!events) events = EPOLLOUT;
    source_watch(&c->src, events);
}
