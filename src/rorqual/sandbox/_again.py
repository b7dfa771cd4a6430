"""A connection to a guest agent that was reset is made anew: over vsock, a snapshot of the machine resets them all.

The same agent answers (its boot id says so), and every command goes on where its output was cut (RESUME). Calls that
were under way have failed by then: nobody knows whether they were carried out. Owns the attempts; the state is
GuestClient's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from . import _protocol as wire
from ._dial import Address
from ._protocol import Type
from .errors import GuestGone, GuestRefused

if TYPE_CHECKING:
    from ._guest import GuestClient

AGAIN_S = 20.0
"""How long it may take, while the machine runs."""


def was_reset() -> GuestGone:
    """What a call that was under way gets."""
    return GuestGone(
        "the connection to the guest agent was reset, as a snapshot of its machine does; whether this call was "
        "carried out is not known"
    )


async def connect_again(client: GuestClient, address: Address, error: GuestGone) -> None:
    """Shakes hands and resumes; `error` is what the client ends with when nobody answers in AGAIN_S."""
    loop = asyncio.get_running_loop()
    end, pause = loop.time() + AGAIN_S, 0.002
    while client._error is None:
        if client.still:
            end = loop.time() + AGAIN_S
        try:
            async with asyncio.timeout(AGAIN_S):
                await client._reopen(address)
                ident, future = client._expect(Type.WELCOME, wire.read_welcome)
                client._write(wire.hello(ident))
                welcome: wire.Welcome = await future
                if welcome.boot_id != client.info.boot_id:
                    client._fail(
                        GuestGone("another guest agent answers where the one of this connection was")
                    )
                    return
                await _resume_all(client)
                # One more answer: what was opened before the guest's kernel learns of the snapshot is reset, too.
                ident, future = client._expect(Type.RESULT, wire.read_list)
                client._write(wire.frame(Type.LIST, ident, wire.u64(wire.NO_LIMIT)))
                await future
            return
        except (OSError, TimeoutError, GuestGone):
            client._drop_connection()
            if loop.time() > end:
                client._fail(error)
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.1)


async def _resume_all(client: GuestClient) -> None:
    for ident, process in list(client._streams.items()):
        request = process._resume()
        if request is None:
            del client._streams[ident]
            process._on_failure(was_reset())
            continue
        _, future = client._expect(Type.STARTED, wire.read_started, ident=ident)
        client._write(request)
        try:
            await future
        except GuestRefused as refused:
            process._on_failure(
                GuestGone(f"the guest agent does not go on with command {process.pid}: {refused}")
            )
