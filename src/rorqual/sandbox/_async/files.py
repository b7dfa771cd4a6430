"""`sandbox.files`: read, write, list and move files inside. Paths are resolved in the sandbox, never on the
host.

Relative paths start at the working directory. What changes something is in the trajectory log before it
happens, with the content's sha256.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
from collections.abc import Awaitable, Mapping
from typing import Any, Literal, TypeVar, overload

from rorqual.sandbox._guest import FileInfo
from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import GuestFileError, GuestGone, InvalidRequest
from rorqual.sandbox.records import FileEntry

MAX_READ = 64 << 20
"""Default bound of `read`, in bytes."""
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
        data = await self._ask(self._session.guest.read_file(where, limit=max_bytes + 1))
        if len(data) > max_bytes:
            raise InvalidRequest(f"{where}: larger than max_bytes={max_bytes}; pass a higher max_bytes")
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
        request = {
            "path": where,
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "mode": mode,
            "append": append,
        }
        await self._change(
            "write",
            request,
            self._session.guest.write_file(
                where, content, mode=mode, append=append, user=user or self._session.launched.user
            ),
        )
        return await self.get_info(where)

    async def write_files(
        self, files: Mapping[str, str | bytes], *, user: str | None = None
    ) -> builtins.list[FileEntry]:
        """Writes several files, in order; stops at the first that fails."""
        return [await self.write(path, data, user=user) for path, data in files.items()]

    async def list(self, path: str = ".") -> builtins.list[FileEntry]:
        """Entries of a directory, sorted by name."""
        infos = await self._ask(self._session.guest.list_dir(self._session.path(path)))
        return sorted((_entry(info) for info in infos), key=lambda entry: entry.name)

    async def exists(self, path: str) -> bool:
        """Whether the path is there (a dangling link is)."""
        return await self._ask(self._session.guest.exists(self._session.path(path)))

    async def get_info(self, path: str) -> FileEntry:
        """One entry; a link is not followed."""
        return _entry(await self._ask(self._session.guest.stat(self._session.path(path))))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file, a link (not its target), or a directory: an empty one, or any with
        recursive=True."""
        where = self._session.path(path)
        request = {"path": where, "recursive": recursive}
        await self._change("remove", request, self._session.guest.remove(where, recursive=recursive))

    async def rename(self, old: str, new: str) -> FileEntry:
        """Moves a file or directory; what is at `new` gives way as in rename(2)."""
        source, target = self._session.path(old), self._session.path(new)
        await self._change(
            "rename", {"old": source, "new": target}, self._session.guest.rename(source, target)
        )
        return await self.get_info(target)

    async def make_dir(self, path: str, *, user: str | None = None) -> bool:
        """Makes a directory and its parents; False when it was there."""
        where = self._session.path(path)
        try:
            return await self._change(
                "make_dir",
                {"path": where},
                self._session.guest.make_dir(where, parents=True, user=user or self._session.launched.user),
            )
        except GuestFileError as error:
            if error.errno == errno.EEXIST:
                return False
            raise

    async def _ask(self, call: Awaitable[T]) -> T:
        session = self._session
        if session.ended is not None:
            _discard(call)
            raise session.end_error()
        try:
            return await call
        except GuestGone as error:
            raise await session.verdict(error) from error

    async def _change(self, kind: str, request: dict[str, Any], call: Awaitable[T]) -> T:
        session = self._session
        if session.ended is not None:
            _discard(call)
            raise session.end_error()
        try:
            seq = await session.log.begin(sandbox=session.id, kind=kind, request=request)
        except BaseException:
            _discard(call)
            raise
        try:
            value = await call
        except GuestGone as error:
            raise await session.verdict(error) from error
        except GuestFileError as error:
            session.log.finish(sandbox=session.id, seq=seq, result={"errno": error.errno})
            raise
        session.log.finish(sandbox=session.id, seq=seq, result={"ok": True})
        return value


def _discard(call: Awaitable[Any]) -> None:
    """Closes a coroutine that will not be awaited."""
    close = getattr(call, "close", None)
    if close is not None:
        close()


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
