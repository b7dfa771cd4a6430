/* wire: frames and payload fields of the guest protocol (docs/guest-protocol.md). Pure functions over byte buffers:
 * no descriptors, no globals, so fuzz.c can drive them alone. Every length is checked before it is believed. */
#ifndef RORQUAL_WIRE_H
#define RORQUAL_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WIRE_MAGIC 0x51524f52u /* "RORQ" */
#define WIRE_VERSION 1
#define WIRE_HEADER 12
#define WIRE_MAX_PAYLOAD (256u * 1024)
#define WIRE_MAX_CHUNK (64u * 1024) /* bytes of data in one DATA, STDIN, READ or WRITE */
#define WIRE_MAX_STRINGS 4096u      /* entries of argv, and of env */
#define WIRE_MAX_PATH 4095u
#define WIRE_MAX_TAG 256u
#define WIRE_NO_UID 0xffffffffu
#define WIRE_MIN_ENTROPY 32u
#define WIRE_MAX_ENTROPY 512u

enum {
    /* host to guest */
    F_HELLO = 0x01, F_START = 0x10, F_ATTACH = 0x11, F_LIST = 0x12, F_KILL = 0x13, F_STDIN = 0x14, F_RESIZE = 0x15,
    F_CREDIT = 0x16, F_DETACH = 0x17,
    F_READ_OPEN = 0x20, F_READ_NEXT = 0x21, F_WRITE_OPEN = 0x22, F_WRITE_NEXT = 0x23, F_CLOSE = 0x24,
    F_STAT = 0x28, F_DIR_OPEN = 0x29, F_DIR_NEXT = 0x2a, F_MKDIR = 0x2b, F_REMOVE = 0x2c, F_RENAME = 0x2d,
    F_REFRESH = 0x30, F_RESUME = 0x31,
    F_TCP_OPEN = 0x38, F_TCP_SEND = 0x39, F_TCP_CREDIT = 0x3a, F_TCP_CLOSE = 0x3b, F_STDIN_AT = 0x3f,
    /* guest to host */
    F_WELCOME = 0x81, F_RESULT = 0x90, F_ERROR = 0x91, F_STARTED = 0x92, F_DATA = 0x93, F_EXIT = 0x94,
    F_TCP_DATA = 0x95, F_TCP_END = 0x96,
};

enum { START_STDIN = 1, START_PTY = 2 };
enum { WRITE_APPEND = 1, WRITE_PARENTS = 2, WRITE_MORE = 4, WRITE_MODE = 8 };
enum { USER_AGENT = 0, USER_ID = 1, USER_NAME = 2 };

struct frame {
    uint8_t type;
    uint32_t id;
    uint8_t *payload; /* inside the caller's buffer, writable: strings are terminated in place */
    uint32_t len;
};

/* 1: a frame, *used bytes long. 0: more bytes needed. -1: not a frame of this protocol, *why says so. */
int wire_frame(uint8_t *bytes, size_t have, struct frame *out, size_t *used, const char **why);

/* A cursor over a payload; the first field that does not fit sets `bad`, and every later read returns 0. */
struct reader {
    uint8_t *at, *end;
    bool bad;
};
uint8_t rd_u8(struct reader *r);
uint16_t rd_u16(struct reader *r);
uint32_t rd_u32(struct reader *r);
uint64_t rd_u64(struct reader *r);
/* u32 length, then bytes without NUL. Moves the string onto its own length field, so it ends in a NUL in place. */
char *rd_str(struct reader *r, uint32_t max);
/* What is left, as data; bad if more than WIRE_MAX_CHUNK. */
uint8_t *rd_rest(struct reader *r, uint32_t *len);
bool rd_done(const struct reader *r); /* all fields good and nothing left over */

struct user_spec {
    uint8_t kind;
    uint32_t uid;
    char *name;
};

struct start_request {
    uint64_t timeout_ms, max_output;
    uint32_t credit;
    uint8_t flags;
    uint16_t rows, cols;
    struct user_spec user;
    char *cwd, *tag;
    uint32_t argc, envc;
    char *argv[WIRE_MAX_STRINGS + 2]; /* slot 0 is left free for /bin/sh; argv + 1 is the command, NULL ended */
    char *env[WIRE_MAX_STRINGS];
};
bool wire_user(struct reader *r, struct user_spec *out);
bool wire_start(struct reader *r, struct start_request *out);

struct refresh_request { /* 0 and "": leave that as it is */
    uint64_t wall_ns; /* since 1970 */
    char *hostname, *machine_id;
    uint8_t *entropy;
    uint32_t entropy_len;
};
bool wire_refresh(struct reader *r, struct refresh_request *out);

/* A growing byte buffer with a ceiling; `failed` once it hit the ceiling or memory ran out. */
struct buffer {
    uint8_t *data;
    size_t len, cap, off; /* live bytes are data[off..len) */
    size_t ceiling;
    bool failed;
};
bool buf_reserve(struct buffer *b, size_t more);
void buf_put(struct buffer *b, const void *bytes, size_t n);
void buf_u8(struct buffer *b, uint8_t v);
void buf_u16(struct buffer *b, uint16_t v);
void buf_u32(struct buffer *b, uint32_t v);
void buf_u64(struct buffer *b, uint64_t v);
void buf_str(struct buffer *b, const char *s, size_t max);
size_t buf_begin(struct buffer *b, uint8_t type, uint32_t id); /* returns a mark for buf_end, which fills the length */
void buf_end(struct buffer *b, size_t mark);
void buf_drop(struct buffer *b, size_t n); /* n live bytes were consumed */
void buf_free(struct buffer *b);

#endif
