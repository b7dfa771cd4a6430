"""Transport: a job's events across the thread border, and out as JSON or as server-sent events.

Owns waiting: keep-alive comments while there is nothing to say, and the client that goes away, streamed or not,
which cancels the job. Never looks into an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from rorqual import chat
from rorqual.serve.errors import ServeError
from rorqual.serve.wire import KEEP_ALIVE, Counts, Writer, json_bytes

__all__ = ["ApiResponse", "ClientGone", "EventStream", "Mailbox", "wait_or_gone"]


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


class ApiResponse(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """JSON in UTF-8."""
        return json_bytes(content)


class Mailbox:
    """A `Listener` that hands events over to the event loop it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Sequence[chat.Event] | ServeError] = asyncio.Queue()

    def on_events(self, events: Sequence[chat.Event]) -> None:
        """See `Listener`."""
        self._post(events)

    def on_error(self, error: ServeError) -> None:
        """See `Listener`."""
        self._post(error)

    def _post(self, item: Sequence[chat.Event] | ServeError) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # The server has ended under the job: nobody is left to hear of it.

    async def batches(self) -> AsyncIterator[Sequence[chat.Event]]:
        """Events up to the one that ends the answer. Raises the job's error."""
        while True:
            item = await self._queue.get()
            if isinstance(item, ServeError):
                raise item
            yield item
            if item[-1].kind == "end":
                return

    async def finished(self) -> None:
        """Waits for the end of the answer. Raises the job's error."""
        async for _ in self.batches():
            pass


async def wait_or_gone(request: Request, mailbox: Mailbox) -> None:
    """Waits for the end of an answer that is not streamed. Raises the job's error, or ClientGone."""
    done = asyncio.create_task(mailbox.finished())
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientGone
        await done
    finally:
        await _end(done, gone)


class EventStream(Response):
    """Server-sent events of a job. A failure after the head goes out as the writer has it; then the stream ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        mailbox: Mailbox,
        writer: Writer,
        *,
        answer: Any,
        counts: Callable[[], Counts],
        keep_alive_seconds: float,
        cancel: Callable[[], None],
    ) -> None:
        """answer: what `writer.closing` is given; counts: as they are now."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._mailbox, self._writer = mailbox, writer
        self._answer, self._counts = answer, counts
        self._keep_alive_seconds = keep_alive_seconds
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end, or until the client goes away."""
        said = asyncio.create_task(self._say(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({said, gone}, return_when=asyncio.FIRST_COMPLETED)
            if said.done():
                await said
        finally:
            self._cancel()
            await _end(said, gone)

    async def _say(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for body in self._bodies():
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except ServeError as error:
            await send({"type": "http.response.body", "body": self._failure(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _bodies(self) -> AsyncIterator[bytes]:
        batches = self._mailbox.batches()
        opened = False
        pending = asyncio.ensure_future(anext(batches, None))
        try:
            while True:
                done, _ = await asyncio.wait({pending}, timeout=self._keep_alive_seconds)
                if not done:
                    yield self._writer.keep_alive if opened else KEEP_ALIVE
                    continue
                batch = await pending
                if batch is None:
                    break
                head = () if opened else self._writer.opening(self._counts())
                opened = True
                if body := self._frames((*head, *self._writer.chunks(batch))):
                    yield body
                pending = asyncio.ensure_future(anext(batches, None))
        finally:
            await _end(pending)
            await batches.aclose()  # type: ignore[attr-defined]  # an async generator
        yield self._frames(self._writer.closing(self._answer, self._counts())) + self._writer.ending

    def _frames(self, chunks: Sequence[Mapping[str, Any]]) -> bytes:
        return b"".join(map(self._writer.frame, chunks))

    def _failure(self, error: ServeError) -> bytes:
        return self._writer.frame(self._writer.failure(error))


async def _disconnected(receive: Receive) -> None:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancels what still runs and lets it end; its outcome no longer matters."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
