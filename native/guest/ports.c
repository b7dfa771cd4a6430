/* ports: clients that come over the virtio-serial ports of a machine (--ports N), one at a time on each port.
 *
 * A port is one stream without beginnings: a client that dies leaves half a frame in it, and the next one's bytes follow
 * at once. So the byte FLAG, which data never holds (ESCAPE, byte ^ 0x20 stand for FLAG and ESCAPE), followed by 16 hex
 * digits of the client's choice, begins a connection; whatever was before is over, and the same 17 bytes are our first
 * answer, so that the client too knows where its own begin. `_dial.py` is the other end.
 * Each connection is a socket pair: conn.c has one end, this file carries bytes between the other and the port.
 * Edge-triggered, since a port that nobody has open is for ever ready to say so.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#ifndef PORTS_DIR /* the tests have terminals for ports */
#define PORTS_DIR "/sys/class/virtio-ports"
#define DEVICES "/dev"
#endif
#define PORT_NAME "org.rorqual.agent."
#define FLAG 0x7e
#define ESCAPE 0x7d
#define NONCE 16u
#define CHUNK (32u * 1024)

enum state { IDLE, NAMING, OPEN }; /* waits for FLAG; reads the nonce; carries a connection */

struct port {
    struct source port, pair; /* pair.fd is -1 unless OPEN */
    enum state state;
    bool escaped, ending; /* ending: the agent has hung up, its last bytes and a FLAG are still to go out */
    uint8_t nonce[NONCE];
    unsigned named;
    uint8_t in[CHUNK], out[2 * CHUNK]; /* decoded, for the agent; encoded, for the host */
    size_t in_off, in_len, out_off, out_len;
    uint8_t rest[CHUNK]; /* raw bytes of the host after a FLAG */
    size_t rest_off, rest_len;
};

/* How many bytes from here on stand for themselves. Eight at a time: an emulated CPU pays for each instruction. */
static size_t plain(const uint8_t *bytes, size_t n) {
    const uint64_t ones = 0x0101010101010101u, tops = ones << 7;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t x;
        memcpy(&x, bytes + i, 8);
        uint64_t f = x ^ (ones * FLAG), e = x ^ (ones * ESCAPE); /* a zero byte where it is one */
        if ((((f - ones) & ~f) | ((e - ones) & ~e)) & tops) break;
    }
    while (i < n && bytes[i] != FLAG && bytes[i] != ESCAPE) i++;
    return i;
}

static void hang_up(struct port *p) {
    source_close(&p->pair);
    p->in_off = p->in_len = 0;
    p->escaped = p->ending = false;
    p->state = IDLE;
}

static void begin(struct port *p) {
    int pair[2];
    hang_up(p);
    p->out_off = p->out_len = 0;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair)) return;
    conn_accept(pair[0]); /* too many connections: it closes its end, and we see that */
    p->pair = (struct source){.kind = SRC_PORT, .fd = pair[1], .owner = p};
    source_watch(&p->pair, EPOLLIN | EPOLLOUT | EPOLLET);
    p->out[0] = FLAG;
    memcpy(p->out + 1, p->nonce, NONCE);
    p->out_len = 1 + NONCE;
    p->state = OPEN;
}

/* Takes raw bytes of the host until the room for decoded ones is full or the connection changes; returns how many. */
static size_t take(struct port *p, const uint8_t *raw, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (p->state == OPEN && !p->escaped) {
            size_t room = sizeof p->in - p->in_len, run = plain(raw + i, n - i < room ? n - i : room);
            memcpy(p->in + p->in_len, raw + i, run);
            p->in_len += run;
            i += run;
            if (i == n) return n;
        }
        uint8_t b = raw[i];
        if (b == FLAG) {
            hang_up(p);
            p->state = NAMING;
            p->named = 0;
        } else if (p->state == NAMING) {
            bool hex = (b >= '0' && b <= '9') || (b >= 'a' && b <= 'f');
            if (!hex) p->state = IDLE;
            else {
                p->nonce[p->named++] = b;
                if (p->named == NONCE) begin(p);
            }
        } else if (p->state == OPEN) {
            if (p->in_len == sizeof p->in) return i;
            if (p->escaped) {
                b ^= 0x20;
                p->escaped = false;
                if (b != FLAG && b != ESCAPE) {
                    hang_up(p); /* not this language: wait for the next beginning */
                    continue;
                }
                p->in[p->in_len++] = b;
            } else if (b == ESCAPE) p->escaped = true;
            else p->in[p->in_len++] = b;
        }
    }
    return n;
}

static bool from_host(struct port *p) {
    bool moved = false;
    if (p->rest_off == p->rest_len && p->in_len < sizeof p->in) {
        ssize_t n = read(p->port.fd, p->rest, sizeof p->rest);
        p->rest_off = p->rest_len = 0;
        if (n > 0) p->rest_len = (size_t)n;
        else if (n == 0) hang_up(p); /* nobody has the host's end */
        moved = n > 0;
    }
    if (p->rest_off < p->rest_len) {
        size_t used = take(p, p->rest + p->rest_off, p->rest_len - p->rest_off);
        p->rest_off += used;
        moved = moved || used;
    }
    while (p->in_off < p->in_len) {
        ssize_t n = send(p->pair.fd, p->in + p->in_off, p->in_len - p->in_off, MSG_NOSIGNAL);
        if (n <= 0) {
            if (n < 0 && (errno == EAGAIN || errno == EINTR)) break;
            p->in_off = p->in_len; /* the agent has hung up: to_host sees it */
            break;
        }
        p->in_off += (size_t)n;
        moved = true;
    }
    if (p->in_off == p->in_len) p->in_off = p->in_len = 0;
    return moved;
}

static bool to_host(struct port *p) {
    bool moved = false;
    if (p->out_off == p->out_len && p->state == OPEN && !p->ending) {
        uint8_t raw[CHUNK];
        ssize_t n = recv(p->pair.fd, raw, sizeof raw, 0);
        p->out_off = p->out_len = 0;
        for (size_t i = 0; n > 0 && i < (size_t)n; i++) {
            size_t run = plain(raw + i, (size_t)n - i);
            memcpy(p->out + p->out_len, raw + i, run);
            p->out_len += run;
            i += run;
            if (i == (size_t)n) break;
            p->out[p->out_len++] = ESCAPE;
            p->out[p->out_len++] = raw[i] ^ 0x20;
        }
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
            p->ending = true;
            p->out[p->out_len++] = FLAG; /* in the middle of a connection: its end */
        }
        moved = p->out_len > 0;
    }
    while (p->out_off < p->out_len) {
        ssize_t n = write(p->port.fd, p->out + p->out_off, p->out_len - p->out_off);
        if (n <= 0) break;
        p->out_off += (size_t)n;
        moved = true;
    }
    if (p->ending && p->out_off == p->out_len) {
        hang_up(p);
        moved = true;
    }
    return moved;
}

void ports_event(void *owner) {
    struct port *p = owner;
    for (bool moved = true; moved;) {
        moved = from_host(p);
        moved = to_host(p) || moved;
    }
}

static void open_port(const char *device) {
    char path[128];
    snprintf(path, sizeof path, DEVICES "/%.63s", device);
    int fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct port *p = fd < 0 ? NULL : calloc(1, sizeof *p);
    if (!p) {
        if (fd >= 0) close(fd);
        return;
    }
    p->port = (struct source){.kind = SRC_PORT, .fd = fd, .owner = p};
    p->pair = (struct source){.kind = SRC_PORT, .fd = -1, .owner = p};
    source_watch(&p->port, EPOLLIN | EPOLLOUT | EPOLLET);
    ports_event(p);
}

static bool is_ours(const char *device) {
    char path[128], name[sizeof PORT_NAME + 8] = "";
    snprintf(path, sizeof path, PORTS_DIR "/%.63s/name", device);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    if (read(fd, name, sizeof name - 1) < 0) name[0] = 0;
    close(fd);
    return !strncmp(name, PORT_NAME, sizeof PORT_NAME - 1);
}

unsigned ports_open(unsigned wanted) {
    /* The device tells of its ports one by one, some milliseconds after its driver has started. */
    char devices[MAX_CONNS][64];
    unsigned found = 0;
    for (int64_t until = now_ns() + 5000000000ll; found < wanted && now_ns() < until;) {
        found = 0;
        DIR *d = opendir(PORTS_DIR);
        for (struct dirent *e; d && (e = readdir(d)) && found < wanted && found < MAX_CONNS;)
            if (e->d_name[0] != '.' && strlen(e->d_name) < sizeof devices[0] && is_ours(e->d_name))
                strcpy(devices[found++], e->d_name);
        if (d) closedir(d);
        if (found < wanted) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    for (unsigned i = 0; i < found; i++) open_port(devices[i]);
    return found;
}
