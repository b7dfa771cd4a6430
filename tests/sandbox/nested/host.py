"""An emulated host whose KVM works: QEMU's TCG emulates AMD SVM, so a Firecracker inside boots a guest of its own.

Nothing here is faked, all of it is slow: figures from in there are not figures of a machine. The host runs one command
as root, in a root of its own (root.py) with the project laid over it at its own path, shows its output line by line as
it comes, and ends. Recipe: spec/sandbox.md section 9.
"""

from __future__ import annotations

import compileall
import contextlib
import os
import py_compile
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox.machines.initrd import newc
from rorqual.sandbox.machines.kernel import Kernel

MODULES = (
    "virtio_pci", "virtio_blk", "virtio_rng", "erofs", "overlay", "kvm_amd", "tun", "veth", "nf_tables",
    "nft_chain_nat", "nft_connlimit", "nft_ct", "nft_limit", "nft_masq", "nft_nat", "nft_redir", "nft_reject_inet",
)  # fmt: skip
DONE = "nested: exit "
INIT = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in $(cat /modules/order); do insmod /modules/$m; done
mkdir -p /lower /job /rw /root
mount -t erofs -o ro /dev/vda /lower && mount -t erofs -o ro /dev/vdb /job || exec halt -f
mount -t tmpfs -o mode=755 rw /rw; mkdir -p /rw/upper /rw/work
mount -t overlay -o lowerdir=/job:/lower,upperdir=/rw/upper,workdir=/rw/work overlay /root
for d in proc sys dev; do mount --move /$d /root/$d; done
mkdir -p /root/dev/pts /root/dev/shm; mount -t devpts -o ptmxmode=666 pts /root/dev/pts
mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
for d in run dev/shm; do mount -t tmpfs -o mode=1777 tmpfs /root/$d; done
mkdir -p /root/tmp; chmod 1777 /root/tmp  # the overlay, which a checkout below /tmp shows through
ip link set lo up; hostname nested-host; echo 1 > /root/proc/sys/net/ipv4/conf/all/forwarding
exec switch_root /root /bin/sh /nested-command
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """How the command ended."""

    exit_code: int | None
    """None: the emulated host died first, or its time was up."""
    output: str
    console: str
    """What its kernel said."""
    seconds: float


def run(
    command: Sequence[str],
    *,
    kernel: Kernel,
    root: Path,
    files: Mapping[str, Path],
    envs: Mapping[str, str],
    cwd: str,
    work: Path,
    timeout: float,
    show: Callable[[str], None] = lambda line: None,
) -> Ran:
    """Boots, runs `command`, and returns when it has ended. files: target inside -> file or directory here.

    work: an empty directory. show: gets each line of output.
    """
    job = work / "job"
    for target, source in files.items():
        place = job / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source, place, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy2(source, place)
    (job / "nested-command").write_text(script(command, envs=envs, cwd=cwd))
    # Compiled here, a hundred times faster than in there; by content, so that no time stamp matters.
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(
        job, stripdir=job, prependdir="/", quiet=1, force=True, invalidation_mode=unchecked
    )
    disk, early = work / "job.erofs", work / "initrd"
    subprocess.run(["mkfs.erofs", "--quiet", "--all-root", disk, job], check=True, stdout=subprocess.DEVNULL)
    early.write_bytes(initrd(kernel))
    console = work / "console"
    machine = subprocess.Popen(
        [
            *("nice", "-n", "5", "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi"),
            *("-cpu", "max,+svm", "-smp", "2", "-m", "2048", "-nodefaults", "-no-reboot", "-display", "none"),
            *("-kernel", str(kernel.bzimage), "-initrd", str(early)),
            *("-append", "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off"),
            *("-serial", f"file:{console}", "-serial", "stdio"),
            *("-drive", f"if=none,id=root,format=raw,readonly=on,file={root}", "-device", "virtio-blk-pci,drive=root"),
            *("-drive", f"if=none,id=job,format=raw,readonly=on,file={disk}", "-device", "virtio-blk-pci,drive=job"),
            *("-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    start = time.monotonic()
    lines: list[str] = []
    code: int | None = None
    try:
        assert machine.stdout is not None
        for line in follow(machine, until=start + timeout):
            if line.startswith(DONE):
                code = int(line.removeprefix(DONE))
            else:
                lines.append(line)
                show(line)
        if code is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                machine.wait(timeout=20)
    finally:
        machine.kill()
        machine.wait()
        assert machine.stdout is not None
        machine.stdout.close()
    said = console.read_text(errors="replace") if console.exists() else ""
    return Ran(exit_code=code, output="\n".join(lines), console=said, seconds=time.monotonic() - start)


def follow(machine: subprocess.Popen[bytes], *, until: float) -> Iterator[str]:
    """Lines of its second serial port, until it ends or time is up."""
    assert machine.stdout is not None
    held = b""
    poll = select.poll()
    poll.register(machine.stdout, select.POLLIN)
    while time.monotonic() < until:
        if not poll.poll(500):
            continue
        data = os.read(machine.stdout.fileno(), 1 << 16)
        held += data
        *whole, held = held.split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace").rstrip("\r")
        if not data:
            return


def script(command: Sequence[str], *, envs: Mapping[str, str], cwd: str) -> str:
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in envs.items())
    return f"""{exports}cd {shlex.quote(cwd)}
{shlex.join(command)} > /dev/ttyS1 2>&1 < /dev/null
echo "{DONE}$?" > /dev/ttyS1
echo o > /proc/sysrq-trigger; while :; do :; done
"""


def initrd(kernel: Kernel) -> bytes:
    """busybox, and the modules in the order of their dependencies, as a cpio archive."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "apt-get install busybox-static"
    order = kernel.closure(MODULES)
    files = [("init", INIT.encode()), ("bin/busybox", Path(busybox).read_bytes())]
    files += [(f"modules/{path.name}", path.read_bytes()) for path in order]
    files += [("modules/order", "\n".join(path.name for path in order).encode())]
    return newc(files)
