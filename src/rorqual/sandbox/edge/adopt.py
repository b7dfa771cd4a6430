"""After the restart of an edge: the commands that were running get their results into the log.

The agent kept the commands and their last output; the log has their intents. Whoever ran them is gone, so this edge
attaches to each and finishes its row. A command whose intent is there and that never started stays without a result.
"""

from __future__ import annotations

import asyncio
import logging

from rorqual.sandbox._async.commands import AsyncCommandHandle
from rorqual.sandbox._async.sandbox import AsyncSandbox
from rorqual.sandbox.errors import GuestRefused, SandboxError

log = logging.getLogger(__name__)


async def settle(sandbox: AsyncSandbox) -> int:
    """Follows every command of the sandbox whose result is not in the log; returns how many there are."""
    session = sandbox._session
    entries = await asyncio.to_thread(session.log.read, sandbox.id)
    unfinished = {entry.seq for entry in entries if entry.kind == "command" and entry.result is None}
    followed = 0
    try:
        for info in await session.guest.list() if unfinished else ():
            seq = session.seq_of(info.tag)
            if seq not in unfinished or info.pid in session.processes:
                continue
            try:
                process = await session.guest.attach(info.pid)
            except GuestRefused:
                continue  # the agent has forgotten it meanwhile
            handle = AsyncCommandHandle(session, process, seq=seq, log_result=True)
            session.processes[process.pid] = process
            handle._start(None, None)
            followed += 1
    except SandboxError as error:
        log.warning("cannot follow its commands", extra={"sandbox": sandbox.id, "error": str(error)})
    return followed
