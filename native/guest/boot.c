/* boot: the agent as /init of a machine (--machine): from the kernel's first process to a root that commands can use.
 *
 * Loads the modules of the initial file system, mounts the layers (EROFS, read-only) and over them what is writable, makes
 * that the root and forgets the initial file system. What it is to do comes from the kernel's command line, after "--":
 *   --layers N            block devices "layer0" (the top one) ... of read-only images; by serial, else vda, vdb, ...
 *   --disk SIZE           writable layer in memory, of SIZE MiB; or
 *   --disk-device         writable layer on the block device "disk", ext4
 *   --pids N              at most so many more threads than the kernel's own
 *   --home PATH:ID        a directory to make, owned by ID; "%XX" for any byte. More than once
 *   --hostname NAME
 *   --net ADDRESS/BITS,GATEWAY,DNS   of eth0
 * Whatever fails is said on the console, and the machine stops (a kernel without init panics, with panic=-1 it is over).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define MAX_LAYERS 24
#define MAX_HOMES 8
#define NEW "/new"
#define DEVICE_WAIT_NS 10000000000ll

bool boot_machine;
static unsigned layers = 1, disk_mb, pids, homes;
static bool disk_device;
static const char *hostname = "sandbox", *net, *home[MAX_HOMES];

static void fail(const char *what, const char *name) {
    fprintf(stderr, "rorqual-guest: boot: %s %s: %s\n", what, name, strerror(errno));
    exit(1);
}

/* How many arguments it took; 0: not one of ours. */
int boot_option(int left, char **argv) {
    const char *name = argv[0], *value = left > 1 ? argv[1] : NULL;
    if (!strcmp(name, "--machine")) boot_machine = true;
    else if (!strcmp(name, "--disk-device")) disk_device = true;
    else {
        if (!value) return 0;
        if (!strcmp(name, "--layers")) layers = (unsigned)atoi(value);
        else if (!strcmp(name, "--disk")) disk_mb = (unsigned)atoi(value);
        else if (!strcmp(name, "--pids")) pids = (unsigned)atoi(value);
        else if (!strcmp(name, "--hostname")) hostname = value;
        else if (!strcmp(name, "--net")) net = value;
        else if (!strcmp(name, "--home") && homes < MAX_HOMES) home[homes++] = value;
        else return 0;
        return 2;
    }
    return 1;
}

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) fprintf(stderr, "rorqual-guest: boot: %s: %s\n", path, strerror(errno));
    if (fd >= 0) close(fd);
}

static void must_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data) {
    if (mount(source, target, type, flags, data)) fail("mount", target);
}

static void make(const char *path, mode_t mode) {
    if (mkdir(path, mode) && errno != EEXIST) fail("mkdir", path);
}

static void load_modules(void) {
    struct dirent **list;
    int n = scandir("/modules", &list, NULL, alphasort); /* their names begin with their number */
    for (int i = 0; i < n; i++) {
        char path[300];
        snprintf(path, sizeof path, "/modules/%s", list[i]->d_name);
        int fd = list[i]->d_name[0] == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0) {
            if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST) fail("load", path);
            close(fd);
            unlink(path); /* the initial file system's memory is the machine's */
        }
        free(list[i]);
    }
    free(list);
}

/* The block device with this serial number, else the one with this letter; waits until it is there. */
static void find_device(const char *serial, char letter, char *out, size_t size) {
    for (int64_t until = now_ns() + DEVICE_WAIT_NS; now_ns() < until;) {
        bool named = false;
        for (char c = 'a'; c <= 'z'; c++) {
            char path[64], text[32] = "";
            snprintf(path, sizeof path, "/sys/block/vd%c/serial", c);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd < 0) continue;
            ssize_t n = read(fd, text, sizeof text - 1);
            close(fd);
            if (n <= 0) continue;
            text[strcspn(text, "\n")] = 0;
            named = named || !strncmp(text, "layer", 5);
            snprintf(out, size, "/dev/vd%c", c);
            if (!strcmp(text, serial) && access(out, F_OK) == 0) return;
        }
        snprintf(out, size, "/dev/vd%c", letter);
        if (!named && access(out, F_OK) == 0) return;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    errno = ENODEV;
    fail("find the block device", serial);
}

static void mount_root(void) {
    char lower[MAX_LAYERS * 8 + 16] = "lowerdir=", data[MAX_LAYERS * 8 + 128], device[32], place[16];
    for (unsigned i = 0; i < layers; i++) {
        char serial[16];
        snprintf(serial, sizeof serial, "layer%u", i);
        find_device(serial, (char)('a' + i), device, sizeof device);
        snprintf(place, sizeof place, "/l%u", i);
        make(place, 0755);
        must_mount(device, place, "erofs", MS_RDONLY | MS_NODEV, "");
        snprintf(lower + strlen(lower), sizeof lower - strlen(lower), "%s%s", i ? ":" : "", place);
    }
    make("/w", 0755);
    if (disk_device) {
        find_device("disk", (char)('a' + layers), device, sizeof device);
        must_mount(device, "/w", "ext4", MS_NODEV | MS_NOATIME, "");
    } else {
        snprintf(data, sizeof data, "size=%um,mode=755", disk_mb);
        must_mount("disk", "/w", "tmpfs", MS_NODEV, data);
    }
    make("/w/upper", 0755);
    make("/w/work", 0755);
    snprintf(data, sizeof data, "%s,upperdir=/w/upper,workdir=/w/work", lower);
    make(NEW, 0755);
    must_mount("root", NEW, "overlay", MS_NODEV, data);
}

static void enter_root(void) {
    static const char *const move[] = {"dev", "proc", "sys"};
    for (unsigned i = 0; i < 3; i++) {
        char from[16], to[32];
        snprintf(from, sizeof from, "/%s", move[i]);
        snprintf(to, sizeof to, NEW "/%s", move[i]);
        make(to, 0755);
        must_mount(from, to, NULL, MS_MOVE, NULL);
    }
    unlink("/init");
    if (chdir(NEW)) fail("chdir", NEW);
    must_mount(".", "/", NULL, MS_MOVE, NULL);
    if (chroot(".") || chdir("/")) fail("chroot", NEW);
    make("/dev/pts", 0755);
    must_mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620");
    make("/dev/shm", 01777);
    must_mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=64m");
    if (symlink("/proc/self/fd", "/dev/fd") || symlink("/proc/self/fd/0", "/dev/stdin") ||
        symlink("/proc/self/fd/1", "/dev/stdout") || symlink("/proc/self/fd/2", "/dev/stderr")) {} /* devtmpfs may have them */
}

static void decode(const char *text, char *out, size_t size) {
    size_t n = 0;
    for (; *text && n + 1 < size; text++) {
        unsigned value;
        if (*text == '%' && sscanf(text + 1, "%2x", &value) == 1 && text[1] && text[2]) {
            out[n++] = (char)value;
            text += 2;
        } else out[n++] = *text;
    }
    out[n] = 0;
}

/* Makes each missing part of the path; the last one gets the owner. Nobody has run here yet: no link is a trap. */
static void make_home(const char *spec) {
    char path[WIRE_MAX_PATH + 1];
    const char *colon = strrchr(spec, ':');
    decode(spec, path, sizeof path);
    char *end = strrchr(path, ':');
    if (!colon || !end || path[0] != '/') {
        errno = EINVAL;
        fail("make", spec);
    }
    *end = 0;
    for (char *at = path + 1; (at = strchr(at, '/')); at++) {
        *at = 0;
        make(path, 0755);
        *at = '/';
    }
    make(path, 0755);
    uid_t id = (uid_t)atoi(colon + 1);
    if (chown(path, id, id)) fail("chown", path);
}

static void address(struct sockaddr *out, const char *text) {
    struct sockaddr_in a = {.sin_family = AF_INET};
    if (text && inet_pton(AF_INET, text, &a.sin_addr) != 1) {
        errno = EINVAL;
        fail("read the address", text);
    }
    memcpy(out, &a, sizeof a);
}

static void set_up_network(void) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq r = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &r)) fail("bring up", "lo");
    char text[128], mask[16];
    if (net) {
        snprintf(text, sizeof text, "%s", net);
        char *rest = text, *own = strsep(&rest, ","), *gateway = strsep(&rest, ","), *dns = strsep(&rest, ",");
        char *bits = own ? strchr(own, '/') : NULL;
        if (bits) *bits++ = 0;
        int length = bits ? atoi(bits) : 32;
        uint32_t m = htonl(length ? ~0u << (32 - length) : 0);
        inet_ntop(AF_INET, &m, mask, sizeof mask);
        memset(&r, 0, sizeof r);
        strcpy(r.ifr_name, "eth0");
        address(&r.ifr_addr, own);
        if (ioctl(fd, SIOCSIFADDR, &r)) fail("set the address of", "eth0");
        address(&r.ifr_netmask, mask);
        if (ioctl(fd, SIOCSIFNETMASK, &r)) fail("set the netmask of", "eth0");
        r.ifr_flags = IFF_UP | IFF_RUNNING;
        if (ioctl(fd, SIOCSIFFLAGS, &r)) fail("bring up", "eth0");
        if (gateway && *gateway) {
            struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
            address(&route.rt_dst, "0.0.0.0");
            address(&route.rt_genmask, "0.0.0.0");
            address(&route.rt_gateway, gateway);
            if (ioctl(fd, SIOCADDRT, &route)) fail("route through", gateway);
        }
        if (dns && *dns) {
            char line[160];
            snprintf(line, sizeof line, "nameserver %s\n", dns);
            unlink("/etc/resolv.conf"); /* an image may have a link there */
            int out = open("/etc/resolv.conf", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
            if (out < 0 || write(out, line, strlen(line)) < 0) fail("write", "/etc/resolv.conf");
            close(out);
        }
    }
    close(fd);
}

static void limit_threads(void) {
    struct sysinfo now;
    char text[24];
    if (!pids || sysinfo(&now)) return;
    snprintf(text, sizeof text, "%u", now.procs + pids);
    put("/proc/sys/kernel/threads-max", text);
}

void machine_boot(void) {
    clearenv();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("HOME", "/root", 1);
    setenv("LANG", "C.UTF-8", 1);
    setenv("TERM", "xterm-256color", 1);
    umask(0);
    make("/dev", 0755);
    make("/proc", 0755);
    make("/sys", 0755);
    must_mount("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=755");
    must_mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    must_mount("sys", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    if (layers < 1 || layers > MAX_LAYERS) {
        errno = EINVAL;
        fail("mount", "so many layers");
    }
    load_modules();
    mount_root();
    enter_root();
    umask(022);
    for (unsigned i = 0; i < homes; i++) make_home(home[i]);
    if (sethostname(hostname, strlen(hostname))) fail("name", hostname);
    set_up_network();
    limit_threads();
    put("/proc/self/oom_score_adj", "-1000"); /* spawn.c takes it back for commands */
}
