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

from rorqual.sandbox._async.sandbox import AsyncSandbox
from rorqual.sandbox.errors import EdgeRefused, GuestGone, InvalidRequest
from rorqual.sandbox.records import FileEntry

IN_MEMORY = 1 << 20


class Spool:
    """Bytes of one upload. A context manager; `write` it, then `commit` it."""

    def __init__(self, *, limit: int) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 -- closed in __exit__
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
        if self.size <= IN_MEMORY:
            self._file.seek(0)
            return await sandbox.files.write(path, self._file.read(), mode=mode, append=append, user=user)
        session = sandbox._session
        where = session.path(path)
        self._file.rollover()
        self._file.flush()
        request = {
            "path": where,
            "size": self.size,
            "sha256": self._digest.hexdigest(),
            "mode": mode,
            "append": append,
        }
        # Not closed here: an exception may hold a view of it. It goes with its last reference.
        content = cast(bytes, mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        write = session.guest.write_file(
            where, content, mode=mode, append=append, user=user or session.launched.user
        )
        await sandbox.files._change("write", request, write)
        return await sandbox.files.get_info(where)


async def pieces(sandbox: AsyncSandbox, path: str, *, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """A file's content. Raises InvalidRequest when it is larger than max_bytes, and what AsyncFiles.read raises."""
    if isinstance(max_bytes, bool) or max_bytes < 0:
        raise InvalidRequest(f"max_bytes: {max_bytes!r} must be 0 or more")
    session = sandbox._session
    where = session.path(path)
    with session.alive():
        got = 0
        try:
            async with contextlib.aclosing(
                session.guest.read_pieces(where, offset=0, limit=max_bytes + 1)
            ) as reading:
                async for piece in reading:
                    got += len(piece)
                    if got > max_bytes:
                        raise InvalidRequest(
                            f"{where}: larger than max_bytes={max_bytes}; pass a higher max_bytes"
                        )
                    yield piece
        except GuestGone as error:
            raise await session.verdict(error) from error
