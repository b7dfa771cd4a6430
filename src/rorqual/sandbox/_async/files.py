"""`sandbox.files`: read, write, list and move files inside. Paths are resolved in the sandbox, never on the
host.

Relative paths start at the working directory. What changes something is in the trajectory log before it happens, with
the content; what is read is noted with what came of it, so that a restarted client sees what the first one saw.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict
from typing import Any, Literal, TypeVar, cast, overload

from rorqual.sandbox._forward import digest
from rorqual.sandbox._guest import FileInfo
from rorqual.sandbox._reattach import forward_of
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import GuestFileError, GuestGone, InvalidRequest
from rorqual.sandbox.records import FileEntry
from rorqual.sandbox.trajectory import TrajectoryEntry

MAX_READ = 64 << 20
"""Default bound of `read`, in bytes."""
MAX_LISTED = 4096
"""Entries of a directory that the log keeps."""
T = TypeVar("T")


class AsyncFiles:
    """Files of one sandbox. All calls raise SandboxEnded when it is over, GuestFileError (errno, path) on
    failure."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @overload
    async def read(
        self, path: str, *, format: Literal["text"] = "text", max_bytes: int = MAX_READ
    ) -> str: ...

    @overload
    async def read(self, path: str, *, format: Literal["bytes"], max_bytes: int = MAX_READ) -> bytes: ...

    @overload
    async def read(
        self, path: str, *, format: Literal["text", "bytes"], max_bytes: int = MAX_READ
    ) -> str | bytes: ...

    async def read(
        self, path: str, *, format: Literal["text", "bytes"] = "text", max_bytes: int = MAX_READ
    ) -> str | bytes:
        """The whole file, as text (UTF-8) or bytes.

        Raises:
            InvalidRequest: it is larger than max_bytes, or is not UTF-8 and text was asked for.
        """
        if format not in ("text", "bytes"):
            raise InvalidRequest(f"format: {format!r} must be 'text' or 'bytes'")
        where = self._session.path(path)
        data = await self._read(where, max_bytes)
        if format == "bytes":
            return data
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"{where}: not UTF-8 at byte {error.start}; read it with format='bytes'"
            ) from error

    async def write(
        self,
        path: str,
        data: str | bytes,
        *,
        mode: int | None = None,
        append: bool = False,
        user: str | None = None,
    ) -> FileEntry:
        """Writes a file, its directories made when missing, owned by `user` (the sandbox's default user).

        mode: permission bits; None keeps those of an existing file, else 0o644.
        """
        content = data.encode() if isinstance(data, str) else bytes(data)
        where = self._session.path(path)
        owner = user or self._session.launched.user
        request = {
            "path": where,
            "size": len(content),
            "sha256": digest(content),
            "mode": mode,
            "append": append,
            "owner": owner,
        }

        async def work() -> FileInfo:
            guest = self._session.guest
            await guest.write_file(where, content, mode=mode, append=append, user=owner)
            return await guest.stat(where)

        async def there() -> bool:
            if append:
                return False
            found = await self._session.guest.read_file(where, limit=len(content) + 1)
            return found == content

        return _entry(await self._change("write", request, work, there=there, input=content))

    async def write_files(
        self, files: Mapping[str, str | bytes], *, user: str | None = None
    ) -> builtins.list[FileEntry]:
        """Writes several files, in order; stops at the first that fails."""
        return [await self.write(path, data, user=user) for path, data in files.items()]

    async def list(self, path: str = ".") -> builtins.list[FileEntry]:
        """Entries of a directory, sorted by name."""
        where = self._session.path(path)
        entries = await self._look("list", where, lambda: self._session.guest.list_dir(where))
        return sorted((FileEntry(**entry) for entry in entries), key=lambda entry: entry.name)

    async def exists(self, path: str) -> bool:
        """Whether the path is there (a dangling link is)."""
        try:
            await self.get_info(path)
        except GuestFileError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        return True

    async def get_info(self, path: str) -> FileEntry:
        """One entry; a link is not followed."""
        where = self._session.path(path)
        return FileEntry(**(await self._look("stat", where, lambda: self._session.guest.stat(where))))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file, a link (not its target), or a directory: an empty one, or any with
        recursive=True."""
        where = self._session.path(path)
        guest = self._session.guest
        request = {"path": where, "recursive": recursive}

        async def gone() -> bool:
            return not await guest.exists(where)

        await self._change("remove", request, lambda: guest.remove(where, recursive=recursive), there=gone)

    async def rename(self, old: str, new: str) -> FileEntry:
        """Moves a file or directory; what is at `new` gives way as in rename(2)."""
        source, target = self._session.path(old), self._session.path(new)
        guest = self._session.guest

        async def work() -> FileInfo:
            await guest.rename(source, target)
            return await guest.stat(target)

        async def there() -> bool:
            return not await guest.exists(source) and await guest.exists(target)

        return _entry(await self._change("rename", {"old": source, "new": target}, work, there=there))

    async def make_dir(self, path: str, *, user: str | None = None) -> bool:
        """Makes a directory and its parents; False when it was there."""
        where = self._session.path(path)
        guest, owner = self._session.guest, user or self._session.launched.user

        async def there() -> bool:
            return (await guest.stat(where)).type == "dir"

        try:
            return await self._change(
                "make_dir",
                {"path": where, "owner": owner},
                lambda: guest.make_dir(where, parents=True, user=owner),
                there=there,
            )
        except GuestFileError as error:
            if error.errno == errno.EEXIST:
                return False
            raise

    async def _read(self, where: str, max_bytes: int) -> bytes:
        """From the log when it was read before; what is too long for it is read again, and must be the same."""
        session = self._session
        request = {"path": where, "max_bytes": max_bytes}
        entry = session.forwarded("read", request)
        if entry is not None and entry.result is not None:
            _raise_logged(entry, where)
            if not entry.result.get("stdout_cut"):
                return _bounded(entry.stdout, where, max_bytes)
        data = await self._noted(
            "read", request, lambda: session.guest.read_file(where, limit=max_bytes + 1), entry
        )
        if entry is not None and entry.result is not None and entry.result["sha256"] != digest(data):
            raise forward_of(session).unknown(
                entry,
                f"{entry.result['size']} bytes were read, more than the log keeps, and {where} is another file now",
            )
        return _bounded(data, where, max_bytes)

    async def _look(
        self, kind: str, where: str, call: Callable[[], Awaitable[FileInfo | builtins.list[FileInfo]]]
    ) -> Any:
        """What `list` and `stat` saw, as dictionaries."""
        session = self._session
        entry = session.forwarded(kind, {"path": where})
        if entry is not None and entry.result is not None and "found" in entry.result:
            return entry.result["found"]
        if entry is not None:
            _raise_logged(entry, where)
        found = await self._noted(kind, {"path": where}, call, entry)
        return [asdict(_entry(one)) for one in found] if isinstance(found, list) else asdict(_entry(found))

    async def _noted(
        self,
        kind: str,
        request: dict[str, Any],
        call: Callable[[], Awaitable[T]],
        entry: TrajectoryEntry | None,
    ) -> T:
        """Asks the guest, and notes what came of it, unless it is a row of the log that is asked again."""
        session = self._session
        with session.alive():
            try:
                value = await call()
            except GuestGone as error:
                raise await session.verdict(error) from error
            except GuestFileError as error:
                if entry is None:
                    result: dict[str, Any] = {"errno": error.errno, "call": error.call}
                    session.log.note(sandbox=session.id, kind=kind, request=request, result=result)
                raise
        if entry is None:
            result, data = _seen(value)
            session.log.note(sandbox=session.id, kind=kind, request=request, result=result, stdout=data)
        return value

    async def _change(
        self,
        kind: str,
        request: dict[str, Any],
        call: Callable[[], Awaitable[T]] | Coroutine[Any, Any, T],
        *,
        there: Callable[[], Awaitable[bool]] | None = None,
        input: bytes = b"",
    ) -> T:
        """Logs it, does it. there: whether it is as if it had been done, which tells of a call without a result."""
        if not callable(call):
            with contextlib.closing(call) as begun:
                return await self._change(kind, request, lambda: begun, there=there, input=input)
        session = self._session
        entry = session.forwarded(kind, request)
        if entry is not None and entry.result is not None:
            _raise_logged(entry, request.get("path", request.get("old", "")))
            found = entry.result.get("found")
            return cast(T, FileInfo(**found) if isinstance(found, dict) else entry.result.get("value"))
        if entry is not None and session.ended is not None:
            raise forward_of(session).unknown(
                entry, f"the sandbox ended ({session.ended[0]}) before it was known"
            )
        with session.alive():
            try:
                if entry is not None:
                    return cast(T, await self._was_done(entry, there))
                seq = await session.log.begin(sandbox=session.id, kind=kind, request=request, input=input)
                value = await call()
            except GuestGone as error:
                raise await session.verdict(error) from error
            except GuestFileError as error:
                if entry is None:
                    result = {"errno": error.errno, "call": error.call}
                    session.log.finish(sandbox=session.id, seq=seq, result=result)
                raise
        session.log.finish(sandbox=session.id, seq=seq, result=_done(value))
        return value

    async def _was_done(
        self, entry: TrajectoryEntry, there: Callable[[], Awaitable[bool]] | None
    ) -> FileInfo | bool | None:
        """The value of a change whose result was not logged, when its effect is to be seen. Raises UnknownOutcome."""
        session = self._session
        await session.guest.list()  # after whatever the dead client had sent
        try:
            seen = there is not None and await there()
        except GuestFileError:
            seen = False
        if not seen:
            raise forward_of(session).unknown(entry, "its effect is not to be seen")
        value: FileInfo | bool | None = None
        if entry.kind in ("write", "rename"):
            value = await session.guest.stat(entry.request["path" if entry.kind == "write" else "new"])
        elif entry.kind == "make_dir":
            value = True
        session.log.finish(sandbox=session.id, seq=entry.seq, result=_done(value) | {"seen_later": True})
        return value


def _done(value: Any) -> dict[str, Any]:
    if isinstance(value, FileInfo):
        return {"ok": True, "found": asdict(value)}
    return {"ok": True, "value": value}


def _seen(value: Any) -> tuple[dict[str, Any], bytes]:
    """What the log keeps of what was read: result and data."""
    if isinstance(value, bytes):
        return {"size": len(value), "sha256": digest(value)}, value
    if isinstance(value, list):
        # a larger one is not kept: a restarted client sees what is there then
        kept = {"found": [asdict(_entry(one)) for one in value]} if len(value) <= MAX_LISTED else {}
        return {"count": len(value)} | kept, b""
    return {"found": asdict(_entry(value))}, b""


def _bounded(data: bytes, where: str, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise InvalidRequest(f"{where}: larger than max_bytes={max_bytes}; pass a higher max_bytes")
    return data


def _raise_logged(entry: TrajectoryEntry, path: str) -> None:
    if entry.result is not None and "errno" in entry.result:
        raise GuestFileError(entry.result["errno"], path, call=entry.result.get("call", ""))


def _entry(info: FileInfo) -> FileEntry:
    return FileEntry(
        path=info.path,
        name=info.name,
        type=info.type,
        size=info.size,
        mode=info.mode,
        uid=info.uid,
        gid=info.gid,
        mtime=info.mtime,
        target=info.target,
    )
