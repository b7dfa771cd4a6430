"""One launch: what happens between the keeper's fork and the runtime's exec.

Order: (rootless only) user namespace -> private mount namespace -> tmpfs on /mnt -> disk -> layers -> overlays ->
binds -> listening socket -> exec of the OCI runtime. Every mount lives in this process's private mount namespace
and is inherited by the container alone: none is ever visible on the host, so none can be left behind.
The bundle lies in a tmpfs on /mnt of that namespace because a container in a user namespace must be able to
walk to its root, and the state directory is often under a 0700 home.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
from typing import Any

from rorqual.sandbox.keeper import linux
from rorqual.sandbox.loader import client

STAGE = "/mnt"
BUNDLE = STAGE + "/bundle"
ROOT = BUNDLE + "/rootfs"
GUEST_FD = 3


class Idmaps:
    """User namespaces for idmapped mounts, made once and kept. Root only."""

    def __init__(self) -> None:
        self._fds: dict[tuple[str, str], int] = {}

    def fd(self, uid_map: str, gid_map: str) -> int:
        key = (uid_map, gid_map)
        if key not in self._fds:
            self._fds[key] = linux.user_namespace(uid_map, gid_map)
        return self._fds[key]


def enter_userns(uid_map: str, gid_map: str) -> None:
    """Rootless: become root of a new user namespace. `*_map` are lines 'inside outside count'."""
    if len(uid_map.splitlines()) == 1:  # only ourselves: needs no helper
        unmapped = os.getuid(), os.getgid()
        linux.unshare(linux.CLONE_NEWUSER)
        with open("/proc/self/setgroups", "w", encoding="ascii") as file:
            file.write("deny")
        for name, host_id in (("uid_map", unmapped[0]), ("gid_map", unmapped[1])):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(f"0 {host_id} 1")
    else:
        parent = os.getpid()
        ready, done = os.pipe(), os.pipe()
        helper = os.fork()
        if helper == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.close(ready[1])
                if os.read(ready[0], 1):
                    for tool, text in (("newuidmap", uid_map), ("newgidmap", gid_map)):
                        subprocess.run([tool, str(parent), *text.split()], check=True)
                    code = 0
            os._exit(code)
        linux.unshare(linux.CLONE_NEWUSER)
        os.write(ready[1], b"1")
        _, status = os.waitpid(helper, 0)
        for fd in (*ready, *done):
            os.close(fd)
        if status:
            raise OSError(1, "newuidmap or newgidmap refused the ranges of /etc/subuid and /etc/subgid")
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _target(path: str, *, directory: bool, owner: int = 0) -> str:
    """The place of `path` under the root, made when missing. No symlink of the image is followed out of the
    root."""
    here = ROOT
    parts = [part for part in path.split("/") if part]
    for index, part in enumerate(parts):
        if part == "..":
            raise ValueError(f"{path}: '..' in a path inside the sandbox")
        here = f"{here}/{part}"
        last = index == len(parts) - 1
        if os.path.islink(here):
            if not last or directory:
                raise ValueError(f"{path}: {part} is a symlink in the image; name the directory it points to")
            os.unlink(here)
        if os.path.exists(here):
            continue
        if last and not directory:
            os.close(os.open(here, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o644))
        else:
            os.mkdir(here, 0o755)
        os.chown(here, owner, owner)
    return here


def _layers(order: dict[str, Any], idmap_fd: int | None) -> dict[str, str]:
    """Mounts every EROFS layer of the order, each once, from the layer holder: name -> place."""
    found: dict[str, str] = {}
    for spec in order["overlays"]:
        for lower in spec["lower"]:
            name = os.path.basename(lower.partition("#")[0])
            if name.endswith((".erofs", ".lazy")):
                found.setdefault(name, f"{STAGE}/layer{len(found)}")
    if found:
        try:
            fds = client.trees(order["holder"], list(found))
        except (OSError, client.HolderError) as error:
            raise OSError(f"the layer holder gives no mounts: {error}") from error
        for fd, place in zip(fds, found.values(), strict=True):
            os.mkdir(place)
            linux.attach(fd, place, readonly=True, idmap_fd=idmap_fd)
            os.close(fd)
    return found


def _overlay(
    index: int,
    spec: dict[str, Any],
    *,
    disk: str,
    idmap_fd: int | None,
    userxattr: bool,
    layers: dict[str, str],
) -> None:
    lowers: list[str] = []
    for number, lower in enumerate(spec["lower"]):
        file, _, inside = lower.partition("#")
        if os.path.basename(file) in layers:
            path = linux.below(layers[os.path.basename(file)], inside)
            if path is not None:  # this layer has nothing for this mount point
                lowers.append(path)
            continue
        plain = number < spec.get(
            "plain", 0
        )  # a sandbox's own files, which have its host ids on disk already
        if idmap_fd is not None or plain:
            place = f"{STAGE}/lower{index}.{number}"
            os.mkdir(place)
            linux.bind(lower, place, readonly=True, idmap_fd=None if plain else idmap_fd)
            lower = place
        if ":" in lower or "," in lower:
            raise ValueError(f"{lower}: a layer's path must hold no ':' or ','")
        lowers.append(lower)
    upper, work = f"{disk}/upper{index}", f"{disk}/work{index}"
    os.mkdir(upper, 0o755)
    os.mkdir(work, 0o755)
    if spec.get("plain", 0):
        first = os.stat(lowers[0])
        os.chmod(upper, stat.S_IMODE(first.st_mode))
        os.chown(upper, first.st_uid, first.st_gid)
    else:
        os.chown(upper, spec["uid"], spec["gid"])
    target = _target(spec["target"], directory=True, owner=spec["uid"])
    data = f"lowerdir={':'.join(lowers)},upperdir={upper},workdir={work}"
    # Without these a layer stands on its own, so that a snapshot of it does (keeper/layers.py).
    data += ",userxattr" if userxattr else ",redirect_dir=nofollow,metacopy=off,index=off"
    linux.mount("overlay", target, fstype="overlay", data=data)


def _mounts(order: dict[str, Any], idmaps: Idmaps | None) -> None:
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    for path in order["hide"]:
        # crun takes a hybrid host for pure cgroup v2 when /sys/fs/cgroup/unified is mounted (spec/sandbox.md,
        # 0).
        try:
            linux.umount(path)
        except OSError:  # rootless: the host's mounts are locked, but may be covered
            linux.mount("tmpfs", os.path.dirname(path), fstype="tmpfs", data="size=4k,mode=755")
    disk_mb = order["disk_mb"]
    linux.mount(
        "tmpfs", STAGE, fstype="tmpfs", flags=linux.MS_NODEV | linux.MS_NOSUID, data="size=4m,mode=755"
    )
    for path in (BUNDLE, ROOT, STAGE + "/disk"):
        os.mkdir(path, 0o755)
    disk = STAGE + "/disk"
    if disk_mb is None:
        linux.mount(order["disk_dir"], disk, flags=linux.MS_BIND)
    else:
        linux.mount("tmpfs", disk, fstype="tmpfs", flags=linux.MS_NODEV, data=f"size={disk_mb}m,mode=755")
    shift = order["idmap"]
    lower_fd = idmaps.fd(shift, shift) if idmaps is not None and shift else None
    layers = _layers(order, lower_fd)
    for index, spec in enumerate(order["overlays"]):
        _overlay(index, spec, disk=disk, idmap_fd=lower_fd, userxattr=order["userxattr"], layers=layers)
    for item in order["directories"]:
        there = os.path.lexists(ROOT + item["path"])
        place = _target(item["path"], directory=True, owner=order["owner"])
        if there and order.get("seeded"):  # the snapshot's own, with the owner and the mode it had
            continue
        os.chown(place, item["uid"], item["gid"])
        os.chmod(place, item["mode"])
    for item in order["files"]:
        place = _target(item["path"], directory=False, owner=order["owner"])
        os.unlink(place)  # a snapshot may hold anything under this name: a pipe, a link to another file
        with open(place, "x", encoding="utf-8") as file:
            os.fchown(file.fileno(), order["owner"], order["owner"])
            file.write(item["text"])
    for item in order["binds"]:
        fd = idmaps.fd(item["uid_map"], item["gid_map"]) if idmaps is not None and item["uid_map"] else None
        place = _target(item["target"], directory=os.path.isdir(item["source"]), owner=order["owner"])
        linux.bind(item["source"], place, readonly=item["readonly"], idmap_fd=fd)


def listen(directory: str, name: str) -> socket.socket:
    """Binds through /proc/self/fd: a Unix socket's path may hold 107 bytes, a state directory more."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{fd}/{name}")
    finally:
        os.close(fd)
    listener.listen(16)
    return listener


def run(
    order: dict[str, Any],
    *,
    idmaps: Idmaps | None,
    channel: socket.socket | None = None,
    program: str = "",
) -> None:
    """Runs in the forked child; ends in exec, or writes `stage: reason` to the sandbox's error file and exits
    70. Hands the disk's directory to the keeper through `channel`, since no path leads there afterwards.
    program: the runtime's file, when not the order's (quick.py)."""
    stage = "start"
    directory = order["directory"]
    try:
        os.setpgid(0, 0)  # the keeper kills a launch that hangs as one group
        linux.prctl(linux.PR_SET_PDEATHSIG, 9)
        errors = os.open(
            directory + "/launch.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.dup2(errors, 2)
        if order["disk_mb"] is None:
            os.mkdir(order["disk_dir"], 0o755)
        # Made here, so that a rootless runtime, which is another user, does not make it unreadable to the keeper.
        os.close(os.open(directory + "/init.pid", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        stage = "agent socket"
        listener = listen(directory, "guest.sock") if not order.get("door") else None
        if order["userns"]:
            stage = "user namespace"
            enter_userns(order["userns"]["uid_map"], order["userns"]["gid_map"])
            linux.prctl(linux.PR_SET_PDEATHSIG, 9)  # a change of credentials clears it
        stage = "mounts"
        _mounts(order, idmaps)
        if channel is not None:
            disk = os.open(STAGE + "/disk", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            socket.send_fds(channel, [b"d"], [disk])
        stage = "bundle"
        with open(BUNDLE + "/config.json", "w", encoding="utf-8") as file:
            json.dump(order["config"], file)
        stage = "runtime"
        if listener is None:
            pass  # the keeper listens, and has a relay started for each client (door.py)
        elif listener.fileno() != GUEST_FD:
            os.dup2(listener.fileno(), GUEST_FD, inheritable=True)
        else:
            os.set_inheritable(GUEST_FD, True)
        os.chdir("/")
        os.execve(program or order["runtime"][0], order["runtime"], order["env"])
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(2, f"{stage}: {error}\n".encode())
        os._exit(70)
