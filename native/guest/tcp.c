/* tcp: the host reaches a TCP port of its own sandbox's loopback, also where there is no network.
 *
 * One stream is one connection to 127.0.0.1 or, when nobody listens there, to ::1. To the host it sends no more than the
 * stream's credit and nothing while OUT_HIGH bytes wait; from the host it takes one chunk at a time and answers when
 * the socket has it. So a stream holds at most one chunk of WIRE_MAX_CHUNK bytes, whoever is slow.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"

struct tcp {
    struct tcp *next, *next_in_conn;
    struct source src;
    struct conn *conn;
    uint32_t id;
    uint16_t port;
    uint64_t credit;
    bool connecting, v6, ended, dead; /* ended: the host was told that nothing more will come */
    uint8_t *out;                     /* a chunk on its way to the socket */
    uint32_t out_len, out_off, out_id;
    bool out_eof;
};

static struct tcp *streams;
static unsigned stream_count;

static struct tcp *stream_of(struct conn *c, uint32_t id) {
    struct tcp *t = c->streams;
    while (t && t->id != id) t = t->next_in_conn;
    return t;
}

bool tcp_has(struct conn *c, uint32_t id) { return stream_of(c, id) != NULL; }

static size_t waiting(const struct conn *c) { return c->out.len - c->out.off; }

static void watch(struct tcp *t) {
    uint32_t events = 0;
    if (t->connecting || t->out) events |= EPOLLOUT;
    if (!t->connecting && !t->ended && t->credit && waiting(t->conn) < OUT_HIGH) events |= EPOLLIN;
    source_watch(&t->src, events);
}

static void settle(struct tcp *t, int err) { /* the answer to the chunk under way */
    if (!t->out) return;
    free(t->out);
    t->out = NULL;
    if (err) reply_error(t->conn, t->out_id, err, "the connection takes no more");
    else reply_empty(t->conn, t->out_id);
}

static void stream_free(struct tcp *t) {
    struct tcp **at = &t->conn->streams;
    while (*at != t) at = &(*at)->next_in_conn;
    *at = t->next_in_conn;
    source_close(&t->src);
    free(t->out);
    t->out = NULL;
    t->dead = true;
}

void tcp_reap(void) {
    for (struct tcp **at = &streams; *at;) {
        struct tcp *t = *at;
        if (!t->dead) {
            at = &t->next;
            continue;
        }
        *at = t->next;
        stream_count--;
        free(t);
    }
}

void tcp_forget_conn(struct conn *c) {
    while (c->streams) stream_free(c->streams);
}

static void end(struct tcp *t, int err) { /* the sandbox's side sends no more */
    if (t->ended) return;
    t->ended = true;
    size_t mark = buf_begin(&t->conn->out, F_TCP_END, t->id);
    buf_u32(&t->conn->out, (uint32_t)err);
    buf_end(&t->conn->out, mark);
}

/* 0 or errno. */
static int dial(struct tcp *t) {
    source_close(&t->src);
    int fd = socket(t->v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return errno;
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in a4 = {.sin_family = AF_INET, .sin_port = htons(t->port)};
    a4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_port = htons(t->port), .sin6_addr = in6addr_loopback};
    int got = t->v6 ? connect(fd, (struct sockaddr *)&a6, sizeof a6) : connect(fd, (struct sockaddr *)&a4, sizeof a4);
    if (got && errno != EINPROGRESS) {
        int err = errno;
        close(fd);
        return err;
    }
    t->src.fd = fd;
    t->src.events = 0;
    t->connecting = true;
    return 0;
}

static void refused(struct tcp *t, int err) { /* try the other family once; the first one's reason is the better one */
    int first = err;
    if (!t->v6 && err == ECONNREFUSED) {
        t->v6 = true;
        if (dial(t) == 0) {
            watch(t);
            return;
        }
    }
    if (t->v6) first = ECONNREFUSED;
    reply_error(t->conn, t->id, first, "nobody listens on that port");
    stream_free(t);
}

void tcp_open(struct conn *c, uint32_t id, struct reader *r) {
    uint16_t port = rd_u16(r);
    uint32_t credit = rd_u32(r);
    if (!rd_done(r) || port == 0) {
        conn_fault(c, "malformed TCP_OPEN");
        return;
    }
    if (!may_attach(c, id)) return;
    struct tcp *t = stream_count < MAX_STREAMS ? calloc(1, sizeof *t) : NULL;
    if (!t) {
        reply_error(c, id, EAGAIN, "too many connections to ports (256)");
        return;
    }
    *t = (struct tcp){.conn = c, .id = id, .port = port, .credit = credit, .next = streams, .next_in_conn = c->streams};
    t->src = (struct source){.kind = SRC_TCP, .fd = -1, .owner = t};
    streams = t;
    c->streams = t;
    stream_count++;
    int err = dial(t);
    if (err) refused(t, err);
    else watch(t);
}

static void take_out(struct tcp *t) {
    while (t->out && t->out_off < t->out_len) {
        ssize_t n = send(t->src.fd, t->out + t->out_off, t->out_len - t->out_off, MSG_NOSIGNAL);
        if (n >= 0) {
            t->out_off += (uint32_t)n;
            continue;
        }
        if (errno == EINTR) continue;
        if (errno != EAGAIN) settle(t, errno);
        return;
    }
    if (!t->out) return;
    if (t->out_eof) shutdown(t->src.fd, SHUT_WR);
    settle(t, 0);
}

void tcp_event(struct tcp *t, uint32_t events) {
    if (t->dead) return;
    if (t->connecting) {
        int err = 0;
        socklen_t size = sizeof err;
        getsockopt(t->src.fd, SOL_SOCKET, SO_ERROR, &err, &size);
        if (err) {
            refused(t, err);
            return;
        }
        if (!(events & EPOLLOUT)) return;
        t->connecting = false;
        reply_empty(t->conn, t->id);
    }
    if (t->out) take_out(t);
    if (!t->ended && t->credit && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && waiting(t->conn) < OUT_HIGH) {
        static uint8_t chunk[DATA_CHUNK];
        size_t want = t->credit < sizeof chunk ? (size_t)t->credit : sizeof chunk;
        ssize_t n = recv(t->src.fd, chunk, want, 0);
        if (n > 0) {
            t->credit -= (uint64_t)n;
            size_t mark = buf_begin(&t->conn->out, F_TCP_DATA, t->id);
            buf_put(&t->conn->out, chunk, (size_t)n);
            buf_end(&t->conn->out, mark);
        } else if (n == 0) end(t, 0);
        else if (errno != EAGAIN && errno != EINTR) end(t, errno);
    }
    watch(t);
}

void tcp_send(struct conn *c, uint32_t id, struct reader *r) {
    uint32_t stream = rd_u32(r);
    uint8_t eof = rd_u8(r);
    uint32_t len;
    uint8_t *data = rd_rest(r, &len);
    if (r->bad || eof > 1 || len > WIRE_MAX_CHUNK) {
        conn_fault(c, "malformed TCP_SEND");
        return;
    }
    struct tcp *t = stream_of(c, stream);
    if (!t || t->connecting) reply_error(c, id, ENOTCONN, "no such connection");
    else if (t->out) reply_error(c, id, EBUSY, "another write to this connection is under way");
    else if (!(t->out = malloc(len + 1u))) reply_error(c, id, ENOMEM, "out of memory");
    else {
        if (len) memcpy(t->out, data, len);
        t->out_len = len;
        t->out_off = 0;
        t->out_eof = eof;
        t->out_id = id;
        take_out(t);
        watch(t);
    }
}

void tcp_credit(struct conn *c, uint32_t id, struct reader *r) {
    uint32_t more = rd_u32(r);
    if (!rd_done(r)) {
        conn_fault(c, "malformed TCP_CREDIT");
        return;
    }
    struct tcp *t = stream_of(c, id);
    if (!t) return; /* it was just closed: the two frames crossed */
    if (t->credit < UINT64_MAX / 2) t->credit += more;
    watch(t);
}

void tcp_close(struct conn *c, uint32_t id, struct reader *r) {
    if (!rd_done(r)) {
        conn_fault(c, "malformed TCP_CLOSE");
        return;
    }
    struct tcp *t = stream_of(c, id);
    if (t) {
        settle(t, ECANCELED);
        stream_free(t);
    }
    reply_empty(c, id); /* the last frame of that id */
}

void tcp_pump(struct conn *c) {
    for (struct tcp *t = c->streams; t; t = t->next_in_conn) watch(t);
}
