/* vsock: the listening socket of a machine whose monitor has a vsock device (--vsock PORT).
 *
 * Only the host may speak to the agent: any process of the guest can reach the port too, through the loopback of vsock.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

#include "guest.h"

int vsock_listen(uint32_t port) {
    struct sockaddr_vm a = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    if (bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 64)) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

bool peer_is_host(int fd) {
    union {
        struct sockaddr any;
        struct sockaddr_vm vm;
        struct sockaddr_storage room;
    } a = {0};
    socklen_t size = sizeof a;
    if (getpeername(fd, &a.any, &size)) return false;
    return a.any.sa_family != AF_VSOCK || a.vm.svm_cid == VMADDR_CID_HOST;
}
