/* relay: carries one client between the agent's socket and our standard input and output (--relay PATH).
 *
 * For a runtime that hands no listening socket in (gVisor): the host starts one of these per client, whose stdin is the
 * client's connection. A process of its own, not part of the agent; it ends with either side.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "guest.h"

static bool carry(int from, int to) { /* false: an end, of one side or the other */
    static uint8_t bytes[64 * 1024];
    ssize_t n = read(from, bytes, sizeof bytes);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) return true;
    if (n <= 0) return false;
    for (ssize_t at = 0; at < n;) {
        ssize_t put = write(to, bytes + at, (size_t)(n - at));
        if (put > 0) at += put;
        else if (errno == EAGAIN) {
            struct pollfd wait = {.fd = to, .events = POLLOUT};
            poll(&wait, 1, -1);
        } else if (errno != EINTR) return false;
    }
    return true;
}

int relay(const char *path) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof a.sun_path) return 2;
    strcpy(a.sun_path, path);
    prctl(PR_SET_DUMPABLE, 0);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a)) return 1;
    struct pollfd both[2] = {{.fd = 0, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
    for (;;) {
        if (poll(both, 2, -1) < 0 && errno != EINTR) return 1;
        if (both[0].revents && !carry(0, fd)) return 0;
        if (both[1].revents && !carry(fd, 0)) return 0;
    }
}
