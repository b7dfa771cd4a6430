"""Mounts EROFS images: straight from a file, or over a loop device where the kernel wants a block device.

Standard library only: launch children and the layer holder run this without the package's `__init__`.
Sources: Linux fs/erofs/super.c (file-backed mounts, 6.12 and newer), loop(4).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from rorqual.sandbox.keeper import linux

_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_READ_ONLY_AUTOCLEAR = 1 | 4
_ATTEMPTS = 16


def mount_erofs(image: str, target: str, *, devices: Sequence[str] = ()) -> str:
    """Mounts `image` read-only at the directory `target`, in the caller's mount namespace. Needs root.

    devices: the files with the data of an image whose files lie outside it (mkfs.erofs --blobdev).
    Returns 'file', or 'loop' where this kernel mounts no EROFS from a file. Raises OSError.
    """
    flags = linux.MS_RDONLY | linux.MS_NODEV | linux.MS_NOSUID
    try:
        linux.mount(image, target, fstype="erofs", flags=flags, data=_devices(devices))
        return "file"
    except OSError as error:
        if error.errno != errno.ENOTBLK:  # what a kernel without file-backed mounts says
            raise
    held: list[int] = []
    try:
        names = [_loop(path, held) for path in (image, *devices)]
        linux.mount(names[0], target, fstype="erofs", flags=flags, data=_devices(names[1:]))
    finally:
        for fd in held:  # the mount keeps the devices; without one they clear themselves
            os.close(fd)
    return "loop"


def _devices(paths: Sequence[str]) -> str:
    for path in paths:
        if "," in path:
            raise ValueError(f"{path}: the path of a layer must hold no ','")
    return ",".join(f"device={path}" for path in paths)


def _loop(path: str, held: list[int]) -> str:
    """Attaches a free loop device, which goes by itself with its last user; appends its descriptor to `held`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            for _ in range(_ATTEMPTS):
                name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
                device = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
                # struct loop_config: fd, block_size, loop_info64 (232 bytes; lo_flags at 52), 8 reserved u64
                info = bytearray(232)
                struct.pack_into("I", info, 52, _LO_READ_ONLY_AUTOCLEAR)
                try:
                    fcntl.ioctl(device, _LOOP_CONFIGURE, struct.pack("II", fd, 0) + bytes(info) + bytes(64))
                except OSError as error:
                    os.close(device)
                    if error.errno != errno.EBUSY:  # somebody else was faster
                        raise
                    continue
                held.append(device)
                return name
        finally:
            os.close(control)
    finally:
        os.close(fd)
    raise OSError(errno.EBUSY, f"no free loop device for {path}")
