/* refresh: a machine that was restored or forked from a snapshot becomes one of its own (REFRESH).
 *
 * Two children of one snapshot start with the same random state, name and clock. The host gives each its own: entropy
 * (credited, and the kernel's generator reseeded from it), a kernel and an agent boot id drawn from that, a host name, a
 * machine id, the time. Only an agent that owns its kernel (--own-kernel, --machine) does this: elsewhere it would be
 * the host's clock. What a process has drawn into its own generator before the snapshot is out of our reach.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#ifndef RNDRESEEDCRNG
#define RNDRESEEDCRNG _IO('R', 0x07)
#endif

#define KERNEL_BOOT_ID "/proc/sys/kernel/random/boot_id"

bool owns_kernel;

/* Credits the bytes and has the generator of every CPU start anew from the pool. */
static const char *stir(const uint8_t *bytes, uint32_t len) {
    struct {
        int count, size;
        uint8_t data[WIRE_MAX_ENTROPY];
    } pool = {.count = (int)len * 8, .size = (int)len};
    memcpy(pool.data, bytes, len);
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0) return "open /dev/urandom";
    bool credited = ioctl(fd, RNDADDENTROPY, &pool) == 0;
    bool reseeded = credited && ioctl(fd, RNDRESEEDCRNG) == 0;
    int error = errno;
    explicit_bzero(&pool, sizeof pool);
    close(fd);
    errno = error;
    return !credited ? "credit the entropy" : !reseeded ? "reseed the random generator" : NULL;
}

/* A whole new file under a known name: no process can have planted a link that we would write through. */
static bool replace(const char *path, const char *text, mode_t mode) {
    char temp[64];
    snprintf(temp, sizeof temp, "%s.rorqual", path);
    unlink(temp);
    int fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    if (fd < 0) return false;
    size_t len = strlen(text);
    bool good = write(fd, text, len) == (ssize_t)len && fchmod(fd, mode) == 0;
    int error = errno;
    close(fd);
    if (good && rename(temp, path) == 0) return true;
    if (good) error = errno;
    unlink(temp);
    errno = error;
    return false;
}

/* The kernel draws its boot id once; a file bound over it is what the guest reads from now on. */
static const char *new_boot_ids(void) {
    uint8_t r[16];
    if (getrandom(boot_id, sizeof boot_id, 0) != sizeof boot_id || getrandom(r, sizeof r, 0) != sizeof r)
        return "draw a boot id";
    if (access(KERNEL_BOOT_ID, F_OK)) return NULL;
    r[6] = (uint8_t)((r[6] & 0x0f) | 0x40);
    r[8] = (uint8_t)((r[8] & 0x3f) | 0x80);
    char text[40], *at = text;
    for (int i = 0; i < 16; i++) {
        at += snprintf(at, 3, "%02x", r[i]);
        if (i == 3 || i == 5 || i == 7 || i == 9) *at++ = '-';
    }
    strcpy(at, "\n");
    const char *file = "/dev/.rorqual-boot-id"; /* memory-backed, and no command of the image puts anything there */
    if (!replace(file, text, 0444)) return "write the boot id";
    umount2(KERNEL_BOOT_ID, MNT_DETACH | UMOUNT_NOFOLLOW); /* an earlier refresh's */
    bool bound = mount(file, KERNEL_BOOT_ID, NULL, MS_BIND, NULL) == 0 &&
                 mount(NULL, KERNEL_BOOT_ID, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NOEXEC, NULL) == 0;
    int error = errno;
    unlink(file);
    errno = error;
    return bound ? NULL : "bind the boot id";
}

static const char *rename_host(const char *name) {
    if (sethostname(name, strlen(name))) return "set the host name";
    char line[80];
    snprintf(line, sizeof line, "%s\n", name);
    if (access("/etc/hostname", F_OK) == 0 && !replace("/etc/hostname", line, 0644)) return "write /etc/hostname";
    return NULL;
}

static const char *carry_out(const struct refresh_request *q) {
    const char *failed = NULL;
    if (q->entropy_len) {
        failed = stir(q->entropy, q->entropy_len);
        if (!failed) failed = new_boot_ids();
    }
    if (!failed && q->hostname[0]) failed = rename_host(q->hostname);
    if (!failed && q->machine_id[0]) {
        char line[40];
        snprintf(line, sizeof line, "%s\n", q->machine_id);
        if (!replace("/etc/machine-id", line, 0444)) failed = "write /etc/machine-id";
    }
    if (!failed && q->wall_ns) {
        struct timespec t = {.tv_sec = (time_t)(q->wall_ns / 1000000000u), .tv_nsec = (long)(q->wall_ns % 1000000000u)};
        if (clock_settime(CLOCK_REALTIME, &t)) failed = "set the clock";
    }
    return failed;
}

void refresh(struct conn *c, uint32_t id, struct reader *r) {
    struct refresh_request q;
    if (!wire_refresh(r, &q)) {
        conn_fault(c, "malformed REFRESH");
        return;
    }
    if (!owns_kernel) {
        reply_error(c, id, EPERM, "this agent shares its kernel: only a machine can be refreshed");
        return;
    }
    const char *failed = carry_out(&q);
    if (!failed) {
        reply_empty(c, id);
        return;
    }
    int error = errno;
    char text[128];
    snprintf(text, sizeof text, "cannot %s: %s", failed, strerror(error));
    reply_error(c, id, error, text);
}
