"""The seccomp profile: an allow-list. What is not named here does not exist inside (ENOSYS).

Derivation: every call of the Linux 6.1 x86_64 table plus futex_wait/wake/requeue, fchmodat2 and cachestat,
minus
  * DENIED: calls that act on the host as a whole (time, modules, kexec, swap, quota, reboot, accounting,
    syslog, perf, bpf, kernel keyrings, which are not namespaced),
    that build mounts or namespaces (the way to most
    kernel bugs that a container can reach), that leave the path rules of the root (open_by_handle_at,
    chroot), that need a driver surface of their own (io_uring, userfaultfd, vmsplice, NUMA placement, ioperm,
    modify_ldt). They answer EPERM.
  * calls removed from the kernel, or never implemented.
With conditions: clone without namespace flags (clone3 hides its flags in memory, so it answers ENOSYS and
libc falls back to clone), socket for Unix, IPv4, IPv6 and netlink alone (no packet, vsock or AF_ALG sockets),
personality with the values that compilers and debuggers set. ptrace stays: it reaches this sandbox's
processes only. A runtime ignores names its libseccomp does not know; those then answer ENOSYS. Native
architecture only: 32-bit code is killed.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

from rorqual.sandbox.errors import HostUnfit

ALLOWED = tuple(
    [
        "accept",
        "accept4",
        "access",
        "alarm",
        "arch_prctl",
        "bind",
        "brk",
        "cachestat",
        "capget",
        "capset",
        "chdir",
        "chmod",
        "chown",
        "clock_getres",
        "clock_gettime",
        "clock_nanosleep",
        "close",
        "close_range",
        "connect",
        "copy_file_range",
        "creat",
        "dup",
        "dup2",
        "dup3",
        "epoll_create",
        "epoll_create1",
        "epoll_ctl",
        "epoll_pwait",
        "epoll_pwait2",
        "epoll_wait",
        "eventfd",
        "eventfd2",
        "execve",
        "execveat",
        "exit",
        "exit_group",
        "faccessat",
        "faccessat2",
        "fadvise64",
        "fallocate",
        "fanotify_mark",
        "fchdir",
        "fchmod",
        "fchmodat",
        "fchmodat2",
        "fchown",
        "fchownat",
        "fcntl",
        "fdatasync",
        "fgetxattr",
        "flistxattr",
        "flock",
        "fork",
        "fremovexattr",
        "fsetxattr",
        "fstat",
        "fstatfs",
        "fsync",
        "ftruncate",
        "futex",
        "futex_requeue",
        "futex_wait",
        "futex_waitv",
        "futex_wake",
        "futimesat",
        "get_robust_list",
        "get_thread_area",
        "getcpu",
        "getcwd",
        "getdents",
        "getdents64",
        "getegid",
        "geteuid",
        "getgid",
        "getgroups",
        "getitimer",
        "getpeername",
        "getpgid",
        "getpgrp",
        "getpid",
        "getppid",
        "getpriority",
        "getrandom",
        "getresgid",
        "getresuid",
        "getrlimit",
        "getrusage",
        "getsid",
        "getsockname",
        "getsockopt",
        "gettid",
        "gettimeofday",
        "getuid",
        "getxattr",
        "inotify_add_watch",
        "inotify_init",
        "inotify_init1",
        "inotify_rm_watch",
        "io_cancel",
        "io_destroy",
        "io_getevents",
        "io_pgetevents",
        "io_setup",
        "io_submit",
        "ioctl",
        "ioprio_get",
        "ioprio_set",
        "kill",
        "landlock_add_rule",
        "landlock_create_ruleset",
        "landlock_restrict_self",
        "lchown",
        "lgetxattr",
        "link",
        "linkat",
        "listen",
        "listxattr",
        "llistxattr",
        "lremovexattr",
        "lseek",
        "lsetxattr",
        "lstat",
        "madvise",
        "membarrier",
        "memfd_create",
        "memfd_secret",
        "mincore",
        "mkdir",
        "mkdirat",
        "mknod",
        "mknodat",
        "mlock",
        "mlock2",
        "mlockall",
        "mmap",
        "mprotect",
        "mq_getsetattr",
        "mq_notify",
        "mq_open",
        "mq_timedreceive",
        "mq_timedsend",
        "mq_unlink",
        "mremap",
        "msgctl",
        "msgget",
        "msgrcv",
        "msgsnd",
        "msync",
        "munlock",
        "munlockall",
        "munmap",
        "nanosleep",
        "newfstatat",
        "open",
        "openat",
        "openat2",
        "pause",
        "pidfd_getfd",
        "pidfd_open",
        "pidfd_send_signal",
        "pipe",
        "pipe2",
        "pkey_alloc",
        "pkey_free",
        "pkey_mprotect",
        "poll",
        "ppoll",
        "prctl",
        "pread64",
        "preadv",
        "preadv2",
        "prlimit64",
        "process_mrelease",
        "process_vm_readv",
        "process_vm_writev",
        "pselect6",
        "ptrace",
        "pwrite64",
        "pwritev",
        "pwritev2",
        "read",
        "readahead",
        "readlink",
        "readlinkat",
        "readv",
        "recvfrom",
        "recvmmsg",
        "recvmsg",
        "remap_file_pages",
        "removexattr",
        "rename",
        "renameat",
        "renameat2",
        "restart_syscall",
        "rmdir",
        "rseq",
        "rt_sigaction",
        "rt_sigpending",
        "rt_sigprocmask",
        "rt_sigqueueinfo",
        "rt_sigreturn",
        "rt_sigsuspend",
        "rt_sigtimedwait",
        "rt_tgsigqueueinfo",
        "sched_get_priority_max",
        "sched_get_priority_min",
        "sched_getaffinity",
        "sched_getattr",
        "sched_getparam",
        "sched_getscheduler",
        "sched_rr_get_interval",
        "sched_setaffinity",
        "sched_setattr",
        "sched_setparam",
        "sched_setscheduler",
        "sched_yield",
        "seccomp",
        "select",
        "semctl",
        "semget",
        "semop",
        "semtimedop",
        "sendfile",
        "sendmmsg",
        "sendmsg",
        "sendto",
        "set_robust_list",
        "set_thread_area",
        "set_tid_address",
        "setfsgid",
        "setfsuid",
        "setgid",
        "setgroups",
        "setitimer",
        "setpgid",
        "setpriority",
        "setregid",
        "setresgid",
        "setresuid",
        "setreuid",
        "setrlimit",
        "setsid",
        "setsockopt",
        "setuid",
        "setxattr",
        "shmat",
        "shmctl",
        "shmdt",
        "shmget",
        "shutdown",
        "sigaltstack",
        "signalfd",
        "signalfd4",
        "socketpair",
        "splice",
        "stat",
        "statfs",
        "statx",
        "symlink",
        "symlinkat",
        "sync",
        "sync_file_range",
        "syncfs",
        "sysinfo",
        "tee",
        "tgkill",
        "time",
        "timer_create",
        "timer_delete",
        "timer_getoverrun",
        "timer_gettime",
        "timer_settime",
        "timerfd_create",
        "timerfd_gettime",
        "timerfd_settime",
        "times",
        "tkill",
        "truncate",
        "umask",
        "uname",
        "unlink",
        "unlinkat",
        "utime",
        "utimensat",
        "utimes",
        "vfork",
        "wait4",
        "waitid",
        "write",
        "writev",
    ]
)
DENIED = tuple(
    [
        "acct",
        "add_key",
        "adjtimex",
        "bpf",
        "chroot",
        "clock_adjtime",
        "clock_settime",
        "delete_module",
        "fanotify_init",
        "finit_module",
        "fsconfig",
        "fsmount",
        "fsopen",
        "fspick",
        "get_mempolicy",
        "init_module",
        "io_uring_enter",
        "io_uring_register",
        "io_uring_setup",
        "ioperm",
        "iopl",
        "kcmp",
        "kexec_file_load",
        "kexec_load",
        "keyctl",
        "lookup_dcookie",
        "mbind",
        "migrate_pages",
        "modify_ldt",
        "mount",
        "mount_setattr",
        "move_mount",
        "move_pages",
        "name_to_handle_at",
        "open_by_handle_at",
        "open_tree",
        "perf_event_open",
        "pivot_root",
        "process_madvise",
        "quotactl",
        "quotactl_fd",
        "reboot",
        "request_key",
        "set_mempolicy",
        "set_mempolicy_home_node",
        "setdomainname",
        "sethostname",
        "setns",
        "settimeofday",
        "swapoff",
        "swapon",
        "syslog",
        "umount2",
        "unshare",
        "userfaultfd",
        "vhangup",
        "vmsplice",
    ]
)
_NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET"""
_SOCKET_DOMAINS = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK"""
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)
"""PER_LINUX, PER_LINUX32, UNAME26 and its 32-bit twin, ADDR_NO_RANDOMIZE, the query."""
_EPERM, _ENOSYS = 1, 38
_OPTIMIZE = 8
"""SCMP_FLTATR_CTL_OPTIMIZE"""
_OPS = {"SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}
_ARCHES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


def _argument(index: int, value: int, op: str, value_two: int = 0) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": value_two, "op": op}


def profile(machine: str | None = None) -> dict[str, Any]:
    """The `linux.seccomp` object of an OCI configuration (runtime-spec, config-linux.md)."""
    arch = _ARCHES.get(machine or platform.machine())
    allow = "SCMP_ACT_ALLOW"
    rules: list[dict[str, Any]] = [
        {"names": list(ALLOWED), "action": allow},
        {"names": list(DENIED), "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM},
        # OCI 'valueTwo' is the value compared after masking with 'value'.
        {"names": ["clone"], "action": allow, "args": [_argument(0, _NAMESPACE_FLAGS, "SCMP_CMP_MASKED_EQ")]},
        *(
            {"names": ["socket"], "action": allow, "args": [_argument(0, domain, "SCMP_CMP_EQ")]}
            for domain in _SOCKET_DOMAINS
        ),
        *(
            {"names": ["personality"], "action": allow, "args": [_argument(0, value, "SCMP_CMP_EQ")]}
            for value in _PERSONALITIES
        ),
    ]
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _ENOSYS,
        "architectures": [arch] if arch else [],
        "syscalls": rules,
    }


def function_profile(machine: str | None = None) -> dict[str, Any]:
    """As `profile`, without what could carry a state from one call of a function to another in the same namespaces:
    sockets other than Unix ones, and watches on the shared files."""
    result = profile(machine)
    rules = []
    for rule in result["syscalls"]:
        domains = [item["value"] for item in rule.get("args", ()) if rule["names"] == ["socket"]]
        if not domains or domains == [1]:
            names = [name for name in rule["names"] if not name.startswith("inotify_")]
            rules.append(rule | {"names": names})
    denied = ["inotify_init", "inotify_init1", "inotify_add_watch"]
    rules.append({"names": denied, "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM})
    return result | {"syscalls": rules}


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def compiled(document: dict[str, Any]) -> bytes:
    """The profile as a filter program (struct sock_filter[]) for this machine, by the host's libseccomp, which the
    OCI runtimes use too. Names that it does not know are left out, and answer ENOSYS.

    Raises:
        HostUnfit: no libseccomp.
    """
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise HostUnfit(
            f"libseccomp cannot be loaded: {error}.", fix="apt-get install libseccomp2"
        ) from error
    lib.seccomp_init.restype = ctypes.c_void_p

    def action(name: str, errno: int) -> int:
        return {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000 | errno}[name]

    context = ctypes.c_void_p(
        lib.seccomp_init(action(document["defaultAction"], document["defaultErrnoRet"]))
    )
    try:
        lib.seccomp_attr_set(context, _OPTIMIZE, 2)  # a binary tree of the numbers, where it can
        for rule in document["syscalls"]:
            what = action(rule["action"], rule.get("errnoRet", 0))
            tests = [
                _Comparison(item["index"], _OPS[item["op"]], item["value"], item["valueTwo"])
                for item in rule.get("args", ())
            ]
            for name in rule["names"]:
                number = lib.seccomp_syscall_resolve_name(name.encode())
                if number < 0:
                    continue
                array = (_Comparison * len(tests))(*tests)
                failed = lib.seccomp_rule_add_array(context, what, number, len(tests), array)
                if failed:
                    raise HostUnfit(f"libseccomp refuses the rule for {name}: {os.strerror(-failed)}.")
        fd = os.memfd_create("filter")
        try:
            if failed := lib.seccomp_export_bpf(context, fd):
                raise HostUnfit(f"libseccomp cannot write the filter: {os.strerror(-failed)}.")
            return os.pread(fd, 1 << 20, 0)
        finally:
            os.close(fd)
    finally:
        lib.seccomp_release(context)
