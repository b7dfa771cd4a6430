"""`rorqual sandbox cp`: files as they are, directories as one tar through the files API.

Trusts nobody: what comes out of a sandbox is unpacked by tarfile's `data` filter (no absolute path, no '..', no link
that leads out, no device), below a directory of ours alone.
"""

# ruff: noqa: ASYNC240 -- one command, one task: nobody waits for our disk meanwhile

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import posixpath
import secrets
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from rorqual._cli.exits import FAILED, WRONG_USE, CliError
from rorqual.sandbox import AsyncSandbox, GuestFileError


async def into(sandbox: AsyncSandbox, source: Path, target: str, *, max_bytes: int) -> dict[str, Any]:
    """Copies a path of ours to `target` inside; says what was done."""
    if not source.exists():
        raise CliError(f"{source}: no such file or directory", code=WRONG_USE)
    place = await _place(sandbox, target, source.resolve().name)
    if source.is_file():
        if source.stat().st_size > max_bytes:
            raise CliError(f"{source}: larger than --max-mb", code=WRONG_USE)
        mode = source.stat().st_mode & 0o777
        data = await asyncio.to_thread(source.read_bytes)
        entry = await sandbox.files.write(place, data, mode=mode)
        return {"target": entry.path, "files": 1, "bytes": entry.size}
    with tempfile.TemporaryFile() as packed:
        count = await asyncio.to_thread(_pack, source, packed, max_bytes)
        size = packed.tell()
        packed.seek(0)
        archive = f"/tmp/.rorqual-cp-{secrets.token_hex(6)}"
        await sandbox.files.write(archive, await asyncio.to_thread(packed.read))
    try:
        await sandbox.files.make_dir(place)
        await _tar(sandbox, ["tar", "--extract", "--no-same-owner", "--file", archive, "--directory", place])
    finally:
        await sandbox.files.remove(archive)
    return {"target": place, "files": count, "bytes": size}


async def out_of(sandbox: AsyncSandbox, source: str, target: Path, *, max_bytes: int) -> dict[str, Any]:
    """Copies a path inside to `target` of ours; says what was done."""
    entry = await sandbox.files.get_info(source)
    if entry.type == "symlink":
        followed = await sandbox.commands.run(["readlink", "--canonicalize", "--", entry.path])
        entry = await sandbox.files.get_info(followed.stdout.rstrip("\n") or entry.path)
    name = posixpath.basename(posixpath.normpath(entry.path)) or "root"
    place = target / name if target.is_dir() else target
    if entry.type == "file":
        if entry.size > max_bytes:
            raise CliError(f"{entry.path}: larger than --max-mb", code=WRONG_USE)
        data = await sandbox.files.read(entry.path, format="bytes", max_bytes=max_bytes)
        await asyncio.to_thread(place.write_bytes, data)
        os.chmod(place, entry.mode & 0o777)
        return {"target": str(place), "files": 1, "bytes": len(data)}
    if entry.type != "dir":
        raise CliError(f"{entry.path}: neither a file nor a directory", code=WRONG_USE)
    archive = f"/tmp/.rorqual-cp-{secrets.token_hex(6)}"
    try:
        await _tar(sandbox, ["tar", "--create", "--file", archive, "--directory", entry.path, "."])
        data = await sandbox.files.read(archive, format="bytes", max_bytes=max_bytes)
    finally:
        with contextlib.suppress(GuestFileError):  # tar made none
            await sandbox.files.remove(archive)
    count = await asyncio.to_thread(_unpack, data, place, max_bytes)
    return {"target": str(place), "files": count, "bytes": len(data)}


async def _place(sandbox: AsyncSandbox, target: str, name: str) -> str:
    """Where it goes: into `target` when that is a directory or ends with '/', else to `target` itself."""
    if target.endswith("/"):
        return posixpath.join(target, name)
    try:
        entry = await sandbox.files.get_info(target)
    except GuestFileError:
        return target
    return posixpath.join(target, name) if entry.type == "dir" else target


async def _tar(sandbox: AsyncSandbox, command: list[str]) -> None:
    result = await sandbox.commands.run(command, timeout=None)
    if result.exit_code == 127:
        raise CliError("the image has no tar: copy its files one by one", code=FAILED)
    if not result.ok:
        lines = (result.stderr or result.error).strip().splitlines()
        raise CliError(f"tar inside failed: {lines[-1] if lines else result.exit_code}", code=FAILED)


def _pack(source: Path, packed: Any, max_bytes: int) -> int:
    count = 0

    def counted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        nonlocal count
        if not (info.isfile() or info.isdir() or info.issym() or info.islnk()):
            return None  # a socket or a device is no content
        count += not info.isdir()
        if packed.tell() + info.size > max_bytes:
            raise CliError(f"{source}: larger than --max-mb", code=WRONG_USE)
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(source, arcname=".", filter=counted)
    packed.seek(0, os.SEEK_END)
    return count


def _unpack(data: bytes, place: Path, max_bytes: int) -> int:
    place.mkdir(parents=True, exist_ok=True)
    count = total = 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            total += member.size
            if total > max_bytes:
                raise CliError(f"{place}: more than --max-mb unpacked", code=FAILED)
            try:
                tar.extract(member, place, filter="data")
            except tarfile.FilterError as error:
                raise CliError(
                    f"refused to unpack what leads out of {place}: {error}", code=FAILED
                ) from error
            count += not member.isdir()
    return count
