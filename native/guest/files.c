/* files: file calls. Paths are the guest's own, absolute, as bytes; the agent's root is the container's, so there is
 * nothing to escape to. Symlinks inside are the guest's business: read and write follow them as any program would;
 * stat, remove and rename act on the link itself, and a recursive remove never follows one.
 *
 * Never blocks on what the guest planted: files are opened O_NONBLOCK and only regular ones are read or written (a FIFO
 * or device gets EINVAL). A write goes to a temporary beside the target, then rename: a reader sees old or new, whole.
 * No fsync: a sandbox's disk does not outlive it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"

#define MAX_WORKERS 8
#define LISTING_PAGE (96u * 1024)

static struct worker { /* a forked recursive remove */
    pid_t pid;
    struct conn *conn; /* NULL: nobody waits any more */
    uint32_t id;
} workers[MAX_WORKERS];

static void fail(struct conn *c, uint32_t id, int err) { reply_error(c, id, err, strerror(err)); }

static char *rd_path(struct reader *r) {
    char *path = rd_str(r, WIRE_MAX_PATH);
    if (path && path[0] != '/') r->bad = true;
    return path;
}

/* --- handles --- */

static struct handle *handle_new(struct conn *c, enum handle_kind kind, uint32_t *number) {
    for (uint32_t i = 0; i < MAX_HANDLES; i++)
        if (c->handles[i].kind == H_NONE) {
            c->handles[i] = (struct handle){.kind = kind, .fd = -1};
            *number = i + 1;
            return &c->handles[i];
        }
    return NULL;
}

static struct handle *handle_of(struct conn *c, uint32_t number, enum handle_kind kind) {
    if (number < 1 || number > MAX_HANDLES || c->handles[number - 1].kind != kind) return NULL;
    return &c->handles[number - 1];
}

static void handle_close(struct handle *h) {
    if (h->fd >= 0) close(h->fd);
    if (h->dir) closedir(h->dir);
    if (h->temp) unlink(h->temp); /* an unfinished write leaves nothing */
    free(h->temp);
    free(h->path);
    *h = (struct handle){.kind = H_NONE, .fd = -1};
}

/* --- read --- */

static int open_regular(const char *path, int flags, mode_t mode) {
    int fd = open(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, mode);
    struct stat st;
    if (fd < 0) {
        if (errno == ENXIO) errno = EINVAL; /* a FIFO without a reader, a socket */
        return -1;
    }
    int err = fstat(fd, &st) ? errno : S_ISREG(st.st_mode) ? 0 : S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    if (!err) return fd;
    close(fd);
    errno = err;
    return -1;
}

/* One chunk of an open file as a RESULT: u32 handle (0: that was all), then bytes. */
static void read_chunk(struct conn *c, uint32_t id, struct handle *h, uint32_t number) {
    static uint8_t bytes[WIRE_MAX_CHUNK];
    size_t have = 0, want = h->left < sizeof bytes ? h->left : sizeof bytes;
    ssize_t n = 1;
    while (have < want && (n = read(h->fd, bytes + have, want - have)) > 0) have += (size_t)n;
    if (n < 0) {
        int err = errno;
        handle_close(h);
        fail(c, id, err);
        return;
    }
    h->left -= have;
    bool last = n == 0 || h->left == 0;
    if (last) handle_close(h);
    size_t mark = buf_begin(&c->out, F_RESULT, id);
    buf_u32(&c->out, last ? 0 : number);
    buf_put(&c->out, bytes, have);
    buf_end(&c->out, mark);
}

static void read_open(struct conn *c, uint32_t id, const char *path, uint64_t offset, uint64_t limit) {
    uint32_t number;
    struct handle *h = handle_new(c, H_READ, &number);
    if (!h) {
        fail(c, id, EMFILE);
        return;
    }
    h->fd = open_regular(path, O_RDONLY, 0);
    if (h->fd < 0 || (offset && (offset > INT64_MAX || lseek(h->fd, (off_t)offset, SEEK_SET) < 0))) {
        int err = h->fd >= 0 && offset > INT64_MAX ? EINVAL : errno;
        handle_close(h);
        fail(c, id, err);
        return;
    }
    h->left = limit;
    read_chunk(c, id, h, number);
}

/* --- write --- */

static int make_parents(const char *path, const struct identity *who) {
    char at[WIRE_MAX_PATH + 1];
    snprintf(at, sizeof at, "%s", path);
    for (char *slash = at + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        if (mkdir(at, 0755) == 0) {
            if (who->change && chown(at, who->uid, who->gid)) return errno;
        } else if (errno != EEXIST && errno != EISDIR && errno != EROFS) {
            return errno;
        }
        *slash = '/';
    }
    return 0;
}

static int write_all(int fd, const uint8_t *data, size_t n) {
    while (n) {
        ssize_t w = write(fd, data, n);
        if (w < 0 && errno == EINTR) continue;
        if (w < 0) return errno;
        data += w;
        n -= (size_t)w;
    }
    return 0;
}

/* Opens the file behind `h`: the target itself to append, else a temporary in its directory. 0 or an errno. */
static int write_target(struct handle *h, const char *asked, uint8_t flags, uint32_t mode, const struct identity *who) {
    static unsigned counter;
    int err = flags & WRITE_PARENTS ? make_parents(asked, who) : 0;
    if (err) return err;
    mode_t bits = flags & WRITE_MODE ? mode & 07777 : 0644;
    if (flags & WRITE_APPEND) {
        bool fresh = access(asked, F_OK) != 0;
        h->fd = open_regular(asked, O_WRONLY | O_APPEND | O_CREAT, 0600);
        if (h->fd < 0) return errno;
        if (fresh && who->change && fchown(h->fd, who->uid, who->gid)) return errno;
        return (fresh || flags & WRITE_MODE) && fchmod(h->fd, bits) ? errno : 0;
    }
    /* Through a symlink to its target, as open(2) would; rename must not replace the link. */
    struct stat old;
    bool exists = false;
    if (lstat(asked, &old) == 0) {
        exists = true;
        if (S_ISLNK(old.st_mode)) {
            h->path = realpath(asked, NULL);
            if (!h->path || stat(h->path, &old)) return errno; /* a dangling link: ENOENT */
        }
        if (!S_ISREG(old.st_mode)) return S_ISDIR(old.st_mode) ? EISDIR : EINVAL;
    }
    if (!h->path && !(h->path = strdup(asked))) return ENOMEM;
    int dir = (int)(strrchr(h->path, '/') - h->path) + 1;
    if (!h->path[dir]) return EISDIR;
    for (int tries = 0; tries < 100 && h->fd < 0; tries++) {
        char *temp;
        if (asprintf(&temp, "%.*s.rorqual-tmp-%d-%u", dir, h->path, (int)getpid(), counter++) < 0) return ENOMEM;
        h->fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (h->fd >= 0) h->temp = temp;
        else {
            err = errno;
            free(temp);
            if (err != EEXIST) return err;
        }
    }
    if (h->fd < 0) return EEXIST;
    if (exists && !(flags & WRITE_MODE)) bits = old.st_mode & 07777;
    /* A replaced file keeps its owner; a failure to give it away means we are not root, and then it is ours anyway. */
    if (exists && (old.st_uid != geteuid() || old.st_gid != getegid()) && fchown(h->fd, old.st_uid, old.st_gid)) {}
    if (!exists && who->change && fchown(h->fd, who->uid, who->gid)) return errno;
    return fchmod(h->fd, bits) ? errno : 0;
}

/* Writes a chunk and, if it was the last, puts the file in its place. Replies RESULT u32 handle (0: finished). */
static void write_chunk(struct conn *c, uint32_t id, struct handle *h, uint32_t number, bool more, struct reader *r) {
    uint32_t len;
    uint8_t *data = rd_rest(r, &len);
    int err = write_all(h->fd, data, len);
    if (!err && !more && h->temp) {
        if (rename(h->temp, h->path)) err = errno;
        else {
            free(h->temp);
            h->temp = NULL;
        }
    }
    if (err || !more) handle_close(h);
    if (err) {
        fail(c, id, err);
        return;
    }
    size_t mark = buf_begin(&c->out, F_RESULT, id);
    buf_u32(&c->out, more ? number : 0);
    buf_end(&c->out, mark);
}

/* --- stat and listings --- */

static char kind_letter(mode_t m) { return S_ISREG(m) ? 'f' : S_ISDIR(m) ? 'd' : S_ISLNK(m) ? 'l' : 'o'; }

static void put_stat(struct buffer *b, const char *name, const struct stat *st, const char *target) {
    buf_str(b, name, WIRE_MAX_PATH);
    buf_u8(b, (uint8_t)kind_letter(st->st_mode));
    buf_u64(b, (uint64_t)st->st_size);
    buf_u32(b, st->st_mode & 07777);
    buf_u32(b, st->st_uid);
    buf_u32(b, st->st_gid);
    buf_u64(b, (uint64_t)(int64_t)st->st_mtim.tv_sec);
    buf_u32(b, (uint32_t)st->st_mtim.tv_nsec);
    buf_str(b, target, WIRE_MAX_PATH);
}

static void read_target(int dir, const char *name, const struct stat *st, char *target, size_t cap) {
    ssize_t n = S_ISLNK(st->st_mode) ? readlinkat(dir, name, target, cap - 1) : 0;
    target[n > 0 ? n : 0] = 0;
}

/* A page of a directory: u32 handle (0: that was all), then entries. Entries that vanish meanwhile are left out. */
static void dir_page(struct conn *c, uint32_t id, struct handle *h, uint32_t number) {
    static char target[WIRE_MAX_PATH + 1];
    size_t mark = buf_begin(&c->out, F_RESULT, id), start = c->out.len - c->out.off, where = start;
    buf_u32(&c->out, number);
    struct dirent *e = NULL;
    while (c->out.len - c->out.off - start < LISTING_PAGE && (e = readdir(h->dir))) {
        struct stat st;
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        if (fstatat(dirfd(h->dir), e->d_name, &st, AT_SYMLINK_NOFOLLOW)) continue;
        read_target(dirfd(h->dir), e->d_name, &st, target, sizeof target);
        put_stat(&c->out, e->d_name, &st, target);
    }
    if (!e) {
        handle_close(h);
        if (!c->out.failed) memset(c->out.data + c->out.off + where, 0, 4);
    }
    buf_end(&c->out, mark);
}

/* --- remove --- */

/* By descriptor, level by level, O_NOFOLLOW: someone who swaps a directory for a symlink meanwhile gains nothing. */
static int remove_tree(int parent, const char *name) {
    if (unlinkat(parent, name, 0) == 0 || errno == ENOENT) return 0;
    if (errno != EISDIR && errno != EPERM) return errno;
    int err = 0;
    for (int tries = 0; tries < 3; tries++) { /* something may be adding files while we remove */
        int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (fd < 0) return errno == ENOENT ? 0 : errno;
        DIR *dir = fdopendir(fd);
        if (!dir) return errno;
        err = 0;
        for (struct dirent *e; (e = readdir(dir));) {
            if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
            int got = remove_tree(fd, e->d_name);
            if (got && !err) err = got; /* go on: remove what can be removed, report the first failure */
        }
        closedir(dir);
        if (unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT) return 0;
        if (!err) err = errno;
        if (err != ENOTEMPTY) return err;
    }
    return err;
}

static void remove_path(struct conn *c, uint32_t id, const char *path, bool recursive) {
    struct stat st;
    int err = lstat(path, &st) ? errno : 0;
    if (!err) err = (S_ISDIR(st.st_mode) ? rmdir(path) : unlink(path)) ? errno : 0;
    if (err == EEXIST) err = ENOTEMPTY;
    if (err != ENOTEMPTY || !recursive) {
        if (err) fail(c, id, err);
        else reply_empty(c, id);
        return;
    }
    struct worker *w = workers;
    while (w < workers + MAX_WORKERS && w->pid) w++;
    if (w == workers + MAX_WORKERS) {
        fail(c, id, EAGAIN);
        return;
    }
    /* A tree can hold millions of files; a child walks it so that timeouts and output go on meanwhile. */
    pid_t pid = fork();
    if (pid == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        _exit(remove_tree(AT_FDCWD, path));
    }
    if (pid < 0) fail(c, id, errno);
    else *w = (struct worker){.pid = pid, .conn = c, .id = id};
}

bool files_worker_exited(pid_t pid, int status) {
    for (struct worker *w = workers; w < workers + MAX_WORKERS; w++)
        if (w->pid == pid) {
            int err = WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
            if (w->conn && err) fail(w->conn, w->id, err);
            else if (w->conn) reply_empty(w->conn, w->id);
            w->pid = 0;
            return true;
        }
    return false;
}

void files_forget_conn(struct conn *c) {
    for (unsigned i = 0; i < MAX_HANDLES; i++)
        if (c->handles[i].kind) handle_close(&c->handles[i]);
    for (struct worker *w = workers; w < workers + MAX_WORKERS; w++)
        if (w->conn == c) w->conn = NULL;
}

/* --- dispatch --- */

static bool owner(struct conn *c, uint32_t id, struct reader *r, struct identity *who) {
    struct user_spec user;
    char why[300];
    if (!wire_user(r, &user)) return true; /* the caller sees r->bad */
    if (user.kind == USER_AGENT) { /* the usual case needs no look into /etc/passwd */
        *who = (struct identity){.change = false};
        return true;
    }
    if (identity_of(&user, who, why, sizeof why)) return true;
    reply_error(c, id, EUSERS, why); /* not about the path: a refusal, not a file error */
    return false;
}

static void call_write_open(struct conn *c, uint32_t id, struct reader *r) {
    struct identity who = {0};
    uint8_t flags = rd_u8(r);
    uint32_t mode = rd_u32(r), number;
    if (!owner(c, id, r, &who)) return;
    char *path = rd_path(r);
    if (r->bad || flags > 15 || (size_t)(r->end - r->at) > WIRE_MAX_CHUNK) {
        conn_fault(c, "malformed WRITE_OPEN (paths are absolute)");
        return;
    }
    struct handle *h = handle_new(c, H_WRITE, &number);
    if (!h) {
        fail(c, id, EMFILE);
        return;
    }
    int err = write_target(h, path, flags, mode, &who);
    if (err) {
        handle_close(h);
        fail(c, id, err);
        return;
    }
    write_chunk(c, id, h, number, flags & WRITE_MORE, r);
}

static void call_mkdir(struct conn *c, uint32_t id, struct reader *r) {
    struct identity who = {0};
    uint8_t parents = rd_u8(r);
    if (!owner(c, id, r, &who)) return;
    char *path = rd_path(r);
    if (!rd_done(r) || parents > 1) {
        conn_fault(c, "malformed MKDIR (paths are absolute)");
        return;
    }
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') path[--n] = 0;
    struct stat st;
    int err = parents ? make_parents(path, &who) : 0;
    if (!err && mkdir(path, 0755) == 0) {
        if (who.change && chown(path, who.uid, who.gid)) fail(c, id, errno);
        else reply_u8(c, id, 1);
        return;
    }
    if (!err) err = errno;
    if (parents && err == EEXIST && stat(path, &st) == 0 && S_ISDIR(st.st_mode)) reply_u8(c, id, 0);
    else fail(c, id, err);
}

void files_call(struct conn *c, const struct frame *f, struct reader *r) {
    uint32_t id = f->id, number;
    struct handle *h;
    char *path, *other;
    switch (f->type) {
        case F_READ_OPEN: {
            uint64_t offset = rd_u64(r), limit = rd_u64(r);
            path = rd_path(r);
            if (!rd_done(r)) break;
            read_open(c, id, path, offset, limit);
            return;
        }
        case F_READ_NEXT:
            number = rd_u32(r);
            if (!rd_done(r) || !(h = handle_of(c, number, H_READ))) break;
            read_chunk(c, id, h, number);
            return;
        case F_WRITE_OPEN: call_write_open(c, id, r); return;
        case F_WRITE_NEXT: {
            number = rd_u32(r);
            uint8_t more = rd_u8(r);
            if (r->bad || more > 1 || r->end - r->at > (ptrdiff_t)WIRE_MAX_CHUNK) break;
            if (!(h = handle_of(c, number, H_WRITE))) break;
            write_chunk(c, id, h, number, more, r);
            return;
        }
        case F_CLOSE:
            number = rd_u32(r);
            if (!rd_done(r) || number < 1 || number > MAX_HANDLES) break;
            handle_close(&c->handles[number - 1]);
            reply_empty(c, id);
            return;
        case F_STAT: {
            static char target[WIRE_MAX_PATH + 1];
            struct stat st;
            path = rd_path(r);
            if (!rd_done(r)) break;
            if (lstat(path, &st)) {
                fail(c, id, errno);
                return;
            }
            read_target(AT_FDCWD, path, &st, target, sizeof target);
            size_t mark = buf_begin(&c->out, F_RESULT, id);
            put_stat(&c->out, path, &st, target);
            buf_end(&c->out, mark);
            return;
        }
        case F_DIR_OPEN: {
            path = rd_path(r);
            if (!rd_done(r)) break;
            h = handle_new(c, H_DIR, &number);
            if (!h || !(h->dir = opendir(path))) {
                int err = h ? errno : EMFILE;
                if (h) handle_close(h);
                fail(c, id, err);
                return;
            }
            dir_page(c, id, h, number);
            return;
        }
        case F_DIR_NEXT:
            number = rd_u32(r);
            if (!rd_done(r) || !(h = handle_of(c, number, H_DIR))) break;
            dir_page(c, id, h, number);
            return;
        case F_MKDIR: call_mkdir(c, id, r); return;
        case F_REMOVE: {
            uint8_t recursive = rd_u8(r);
            path = rd_path(r);
            if (!rd_done(r) || recursive > 1) break;
            remove_path(c, id, path, recursive);
            return;
        }
        case F_RENAME:
            path = rd_path(r);
            other = rd_path(r);
            if (!rd_done(r)) break;
            if (rename(path, other)) fail(c, id, errno);
            else reply_empty(c, id);
            return;
        default: break;
    }
    conn_fault(c, "malformed file call, or a handle that is not open (paths are absolute)");
}
