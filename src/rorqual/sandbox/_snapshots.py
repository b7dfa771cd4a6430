"""Takes a snapshot of a live sandbox: asks its keeper for the copy, makes an image of it, leaves nothing half done.

The keeper brings the sandbox to a standstill, copies, and lets it go on (keeper/holds.py); the layers of a fork get a
hidden name and a lease, those of `snapshot` and `commit` a name. Used by `_async/sandbox.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import ImageRejected, SandboxError
from rorqual.sandbox.images import snapshots, store
from rorqual.sandbox.images.unpack import Bounds
from rorqual.sandbox.keeper import leases
from rorqual.sandbox.keeper.client import KeeperDied
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.records import Snapshot
from rorqual.sandbox.state import StateDir

_ABORT_S = 10.0
T = TypeVar("T")


async def take(
    session: Session, record: Mapping[str, Any], *, name: str, state: StateDir, bounds: Bounds
) -> tuple[Snapshot, list[int]]:
    """name: the image's; '' makes a fork's layers. Returns with the lease on them, which the caller gives back.

    Raises:
        ImageRejected: what the sandbox has written is too much, or cannot become a layer. Nothing is kept.
        SandboxEnded: it ended meanwhile. SandboxError: it did not come to a standstill.
    """
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=state.images))
    final = name or f"{leases.FORK_PREFIX}{secrets.token_hex(6)}"
    held: list[int] = []
    try:
        (building / leases.FILE).touch(mode=0o600)
        held = leases.take([str(building / leases.FILE)])
        start = time.monotonic()
        report = await _copy(session, building, bounds=bounds, durable=bool(name))
        seconds = time.monotonic() - start
        finish = partial(snapshots.finish, report=report, source=dict(record), fork=not name, state=state)
        image = await to_its_end(partial(finish, building))
        await to_its_end(partial(store.install, building, name=final, state=state, record=image))
    except BaseException:
        leases.give(held)
        await asyncio.shield(asyncio.to_thread(remove_tree, str(building)))
        if not name:  # cancelled when the layers had their place already
            await asyncio.shield(asyncio.to_thread(leases.remove_unused, os.path.join(state.images, final)))
        raise
    snapshot = Snapshot(
        name=final,
        sandbox_id=session.id,
        parent=image["parent"],
        size_bytes=image["size_bytes"],
        entries=image["entries"],
        seconds=seconds,
    )
    return snapshot, held


async def to_its_end(work: Callable[[], T]) -> T:
    """Runs in a thread; a cancellation waits for the thread, which would go on in a directory that is to be removed."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _copy(session: Session, building: Path, *, bounds: Bounds, durable: bool) -> dict[str, Any]:
    keeper = session.launched.keeper
    future = asyncio.wrap_future(
        keeper.request(
            "snapshot",
            sandbox=session.id,
            destination=str(building),
            max_bytes=bounds.max_bytes,
            max_entries=bounds.max_entries,
            durable=durable,
        )
    )
    try:
        answer = await asyncio.shield(future)
    except KeeperDied as error:
        raise session.end_error() from error
    except asyncio.CancelledError:  # the copy must have ended before its directory can go
        keeper.request("abort_snapshot", sandbox=session.id)
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await asyncio.wait([future], timeout=_ABORT_S)
        raise
    if "gone" in answer or (session.ended is not None and "error" in answer):
        raise session.end_error()
    if "error" in answer:
        stage, detail = answer["error"]["stage"], answer["error"]["detail"]
        if stage == "copy":
            raise ImageRejected(session.id, f"its files cannot become a snapshot: {detail}")
        raise SandboxError(f"{session.id}: snapshot failed ({stage}): {detail}")
    return answer


def drop_fork(name: str, held: list[int], *, state: StateDir) -> None:
    """Gives the lease back, and removes a fork's layers when no sandbox runs on them."""
    leases.give(held)
    leases.remove_unused(os.path.join(state.images, name))
