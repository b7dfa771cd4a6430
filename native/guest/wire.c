/* wire: see wire.h. */
#define _GNU_SOURCE
#include "wire.h"

#include <stdlib.h>
#include <string.h>

static uint32_t le32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

int wire_frame(uint8_t *bytes, size_t have, struct frame *out, size_t *used, const char **why) {
    if (have < WIRE_HEADER) return 0;
    uint32_t len = le32(bytes);
    if (len > WIRE_MAX_PAYLOAD) {
        *why = "payload over 256 KiB";
        return -1;
    }
    if (bytes[5] != 0 || bytes[6] != 0 || bytes[7] != 0) {
        *why = "reserved header bytes are not zero";
        return -1;
    }
    if (have < (size_t)WIRE_HEADER + len) return 0;
    out->type = bytes[4];
    out->id = le32(bytes + 8);
    out->payload = bytes + WIRE_HEADER;
    out->len = len;
    *used = (size_t)WIRE_HEADER + len;
    return 1;
}

static uint8_t *take(struct reader *r, size_t n) {
    if (r->bad || (size_t)(r->end - r->at) < n) {
        r->bad = true;
        return NULL;
    }
    uint8_t *p = r->at;
    r->at += n;
    return p;
}

uint8_t rd_u8(struct reader *r) {
    uint8_t *p = take(r, 1);
    return p ? *p : 0;
}
uint16_t rd_u16(struct reader *r) {
    uint8_t *p = take(r, 2);
    return p ? (uint16_t)(p[0] | p[1] << 8) : 0;
}
uint32_t rd_u32(struct reader *r) {
    uint8_t *p = take(r, 4);
    return p ? le32(p) : 0;
}
uint64_t rd_u64(struct reader *r) {
    uint8_t *p = take(r, 8);
    return p ? (uint64_t)le32(p) | (uint64_t)le32(p + 4) << 32 : 0;
}

char *rd_str(struct reader *r, uint32_t max) {
    uint8_t *field = take(r, 4);
    if (!field) return NULL;
    uint32_t len = le32(field);
    if (len > max) {
        r->bad = true;
        return NULL;
    }
    uint8_t *bytes = take(r, len);
    if (!bytes || memchr(bytes, 0, len)) {
        r->bad = true;
        return NULL;
    }
    memmove(field, bytes, len);
    field[len] = 0; /* at most 3 bytes before `at`: the length field left room */
    return (char *)field;
}

uint8_t *rd_rest(struct reader *r, uint32_t *len) {
    size_t n = r->bad ? 0 : (size_t)(r->end - r->at);
    if (n > WIRE_MAX_CHUNK) r->bad = true;
    *len = r->bad ? 0 : (uint32_t)n;
    return take(r, *len);
}

bool rd_done(const struct reader *r) { return !r->bad && r->at == r->end; }

bool wire_user(struct reader *r, struct user_spec *out) {
    out->kind = rd_u8(r);
    out->uid = rd_u32(r);
    out->name = rd_str(r, 255);
    if (out->kind > USER_NAME || (out->kind == USER_ID && out->uid == WIRE_NO_UID)) r->bad = true;
    return !r->bad;
}

bool wire_start(struct reader *r, struct start_request *out) {
    out->timeout_ms = rd_u64(r);
    out->max_output = rd_u64(r);
    out->credit = rd_u32(r);
    out->flags = rd_u8(r);
    out->rows = rd_u16(r);
    out->cols = rd_u16(r);
    if (!wire_user(r, &out->user)) return false;
    out->cwd = rd_str(r, WIRE_MAX_PATH);
    out->tag = rd_str(r, WIRE_MAX_TAG);
    out->argc = rd_u32(r);
    if (r->bad || out->argc == 0 || out->argc > WIRE_MAX_STRINGS) return false;
    for (uint32_t i = 0; i < out->argc; i++) out->argv[i + 1] = rd_str(r, WIRE_MAX_PAYLOAD);
    out->argv[out->argc + 1] = NULL;
    out->envc = rd_u32(r);
    if (r->bad || out->envc > WIRE_MAX_STRINGS) return false;
    for (uint32_t i = 0; i < out->envc; i++) {
        out->env[i] = rd_str(r, WIRE_MAX_PAYLOAD);
        if (r->bad || out->env[i][0] == '=' || !strchr(out->env[i], '=')) return false;
    }
    if (out->flags & ~(START_STDIN | START_PTY)) return false;
    if ((out->flags & START_PTY) && (out->rows == 0 || out->cols == 0)) return false;
    return rd_done(r) && out->argv[1][0] != 0;
}

/* Letters, digits, '-' and '.', not at an end: what sethostname and every reader of /etc/hostname can take. */
static bool is_hostname(const char *s) {
    size_t n = strlen(s);
    for (size_t i = 0; i < n; i++) {
        bool inner = i > 0 && i + 1 < n;
        char c = s[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!letter && !(inner && (c == '-' || c == '.'))) return false;
    }
    return true;
}

bool wire_refresh(struct reader *r, struct refresh_request *out) {
    out->wall_ns = rd_u64(r);
    out->hostname = rd_str(r, 64);
    out->machine_id = rd_str(r, 32);
    out->entropy = rd_rest(r, &out->entropy_len);
    if (!rd_done(r) || out->wall_ns > INT64_MAX || !is_hostname(out->hostname)) return false;
    size_t hex = strspn(out->machine_id, "0123456789abcdef");
    if (out->machine_id[hex] || (hex != 0 && hex != 32)) return false;
    return out->entropy_len == 0 || (out->entropy_len >= WIRE_MIN_ENTROPY && out->entropy_len <= WIRE_MAX_ENTROPY);
}

bool buf_reserve(struct buffer *b, size_t more) {
    if (b->failed) return false;
    if (b->off && (b->off == b->len || b->len + more > b->cap)) {
        memmove(b->data, b->data + b->off, b->len - b->off);
        b->len -= b->off;
        b->off = 0;
    }
    if (b->len + more <= b->cap) return true;
    if (b->len + more > b->ceiling) {
        b->failed = true;
        return false;
    }
    size_t cap = b->cap ? b->cap : 4096;
    while (cap < b->len + more) cap *= 2;
    uint8_t *data = realloc(b->data, cap);
    if (!data) {
        b->failed = true;
        return false;
    }
    b->data = data;
    b->cap = cap;
    return true;
}

void buf_put(struct buffer *b, const void *bytes, size_t n) {
    if (n == 0 || !buf_reserve(b, n)) return;
    memcpy(b->data + b->len, bytes, n);
    b->len += n;
}
void buf_u8(struct buffer *b, uint8_t v) { buf_put(b, &v, 1); }
void buf_u16(struct buffer *b, uint16_t v) { buf_put(b, (uint8_t[]){v & 255, v >> 8}, 2); }
void buf_u32(struct buffer *b, uint32_t v) {
    buf_put(b, (uint8_t[]){v & 255, (v >> 8) & 255, (v >> 16) & 255, v >> 24}, 4);
}
void buf_u64(struct buffer *b, uint64_t v) {
    buf_u32(b, (uint32_t)v);
    buf_u32(b, (uint32_t)(v >> 32));
}
void buf_str(struct buffer *b, const char *s, size_t max) {
    size_t n = strnlen(s, max);
    buf_u32(b, (uint32_t)n);
    buf_put(b, s, n);
}

size_t buf_begin(struct buffer *b, uint8_t type, uint32_t id) {
    if (!buf_reserve(b, WIRE_HEADER)) return 0;
    size_t mark = b->len - b->off; /* relative to `off`: a later reserve may slide the live bytes down */
    buf_u32(b, 0);
    buf_u32(b, type);
    buf_u32(b, id);
    return mark;
}

void buf_end(struct buffer *b, size_t mark) {
    if (b->failed) return;
    uint8_t *head = b->data + b->off + mark;
    uint32_t len = (uint32_t)(b->len - b->off - mark - WIRE_HEADER);
    for (int i = 0; i < 4; i++) head[i] = (uint8_t)(len >> (8 * i));
}

void buf_drop(struct buffer *b, size_t n) {
    b->off += n;
    if (b->off < b->len) return;
    b->off = b->len = 0;
    if (b->cap > 64 * 1024) { /* a burst is over: give its memory back */
        free(b->data);
        b->data = NULL;
        b->cap = 0;
    }
}

void buf_free(struct buffer *b) {
    free(b->data);
    b->data = NULL;
    b->len = b->cap = b->off = 0;
}
