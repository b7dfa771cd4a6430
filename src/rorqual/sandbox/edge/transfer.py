"""File contents through an edge: spooled to disk on the way in, in pieces on the way out.

A file is written in the sandbox when all of it has arrived, logged before with its size and sha256: a client or an
edge that dies in the middle leaves nothing there. Memory is constant, whatever the size.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import tempfile
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import cast

from rorqual.sandbox._async.files import _entry
from rorqual.sandbox._async.sandbox import AsyncSandbox
from rorqual.sandbox._guest import FileInfo
from rorqual.sandbox.errors import EdgeRefused, GuestFileError, GuestGone, InvalidRequest
from rorqual.sandbox.records import FileEntry
from rorqual.sandbox.trajectory import INPUT_BYTES


class Spool:
    """Bytes of one upload. A context manager; `write` it, then `commit` it."""

    def __init__(self, *, limit: int) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=INPUT_BYTES)  # noqa: SIM115 -- closed in __exit__
        self._digest = hashlib.sha256()
        self._limit = limit
        self.size = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Adds a piece. Raises EdgeRefused beyond the limit."""
        self.size += len(data)
        if self.size > self._limit:
            raise EdgeRefused(f"the file is larger than this edge takes ({self._limit} bytes)", status=413)
        self._digest.update(data)
        self._file.write(data)

    async def commit(
        self, sandbox: AsyncSandbox, path: str, *, mode: int | None, append: bool, user: str | None
    ) -> FileEntry:
        """AsyncFiles.write with what has arrived. Raises what it raises."""
        session = sandbox._session
        if self.size <= INPUT_BYTES or session.forward is not None:
            self._file.seek(0)
            return await sandbox.files.write(path, self._file.read(), mode=mode, append=append, user=user)
        where, owner = session.path(path), user or session.launched.user
        self._file.rollover()
        self._file.flush()
        # Not closed here: an exception may hold a view of it. It goes with its last reference.
        content = cast(bytes, mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        request = {
            "path": where,
            "size": self.size,
            "sha256": self._digest.hexdigest(),
            "mode": mode,
            "append": append,
            "owner": owner,
        }

        async def work() -> FileInfo:
            await session.guest.write_file(where, content, mode=mode, append=append, user=owner)
            return await session.guest.stat(where)

        return _entry(await sandbox.files._change("write", request, work))


async def pieces(sandbox: AsyncSandbox, path: str, *, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """A file's content. Raises InvalidRequest when it is larger than max_bytes, and what AsyncFiles.read raises."""
    if isinstance(max_bytes, bool) or max_bytes < 0:
        raise InvalidRequest(f"max_bytes: {max_bytes!r} must be 0 or more")
    session = sandbox._session
    where = session.path(path)
    in_pieces = getattr(session.guest, "read_pieces", None)  # not every guest has our agent
    whole = session.forward is not None
    with session.alive():
        try:
            whole = whole or (await session.guest.stat(where)).size <= INPUT_BYTES
        except GuestFileError:
            whole = True  # and the call says what is wrong
        except GuestGone as error:
            raise await session.verdict(error) from error
        if whole or in_pieces is None:
            yield await sandbox.files.read(path, format="bytes", max_bytes=max_bytes)
            return
        got, seen = 0, hashlib.sha256()
        try:
            async with contextlib.aclosing(in_pieces(where, offset=0, limit=max_bytes + 1)) as reading:
                async for piece in reading:
                    got += len(piece)
                    seen.update(piece)
                    if got > max_bytes:
                        raise InvalidRequest(
                            f"{where}: larger than max_bytes={max_bytes}; pass a higher max_bytes"
                        )
                    yield piece
        except GuestGone as error:
            raise await session.verdict(error) from error
    session.log.note(
        sandbox=session.id,
        kind="read",
        request={"path": where, "max_bytes": max_bytes},
        result={"size": got, "sha256": seen.hexdigest(), "stdout_cut": True},
        stdout=b"",
    )
