"""`sandbox.screen`: what a machine shows, and the hands of whoever uses it. For substrates with a screen (fullvm).

Pictures and input go through the machine's monitor, so nothing needs to run inside: a firmware's menu, an installer or
a desktop will do. What is typed and clicked is in the trajectory log before it happens.
"""

# ruff: noqa: ASYNC109 -- `timeout` is how long a change is awaited

from __future__ import annotations

import asyncio
import os
import secrets
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from rorqual.sandbox._session import Session
from rorqual.sandbox.errors import GuestProtocolError, InvalidRequest, SandboxError, Unsupported
from rorqual.sandbox.machines import screen
from rorqual.sandbox.machines.qmp import MonitorError, monitor
from rorqual.sandbox.machines.screen import Button, Event, Picture
from rorqual.sandbox.records import ScreenSize

_MAX_PICTURE = 64 << 20
_POLL_S = 0.1
_STEP_S = 0.02
"""Between the events of two characters: an emulated keyboard has room for a few, and a guest is not always awake."""


class AsyncScreen:
    """Screen, keyboard and pointer of one sandbox."""

    def __init__(self, session: Session, record: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        self._session = session
        self._record = record
        self._last: Picture | None = None

    async def capture(self) -> bytes:
        """The screen as it is now, as PNG."""
        picture = await self._picture()
        return await asyncio.to_thread(screen.to_png, picture)

    async def size(self) -> ScreenSize:
        """Its size in pixels; changes when the guest changes its mode."""
        picture = await self._picture()
        return ScreenSize(width=picture.width, height=picture.height)

    async def pixel(self, x: int, y: int) -> tuple[int, int, int]:
        """Red, green and blue of one pixel, 0 to 255."""
        picture = await self._picture()
        screen.position(x, y, picture=picture)
        return picture.pixel(x, y)

    async def wait_for_change(self, *, timeout: float = 30.0, pixels: int = 200) -> bytes:
        """The screen as PNG once at least `pixels` of it differ from what this client last saw.

        A text cursor that blinks is less than 200 pixels. Raises TimeoutError: nothing changed.
        """
        if pixels < 1 or not timeout > 0:
            raise InvalidRequest(f"timeout, pixels: {timeout!r}, {pixels!r} must be above 0")
        before = self._last if self._last is not None else await self._picture()
        end = time.monotonic() + timeout
        while True:
            after = await self._picture()
            if await asyncio.to_thread(screen.changed_pixels, before, after) >= pixels:
                return await asyncio.to_thread(screen.to_png, after)
            self._last = before  # many small changes are one large one
            if time.monotonic() > end:
                raise TimeoutError(f"{self._session.id}: its screen did not change in {timeout:g} s")
            await asyncio.sleep(_POLL_S)

    async def type(self, text: str, *, interval: float = _STEP_S) -> None:
        """Types on a US keyboard; '\\n' is Enter. interval: seconds between characters.

        Raises InvalidRequest: a character that is not on that keyboard; nothing is typed then.
        """
        events = screen.typing(text)
        if not 0 <= interval <= 10:
            raise InvalidRequest(f"interval: {interval!r} must be from 0 to 10 seconds")
        await self._act({"type": text}, events, interval)

    async def key(self, name: str) -> None:
        """Presses keys together: 'enter', 'ctrl-alt-f2'."""
        await self._act({"key": name}, [screen.press(screen.key_codes(name))], 0)

    async def move(self, x: int, y: int) -> None:
        """Moves the pointer to a pixel, counted from the top left."""
        await self._point({"move": [x, y]}, x, y, [])

    async def click(
        self, button: Button = "left", *, x: int | None = None, y: int | None = None, count: int = 1
    ) -> None:
        """Clicks `count` times, where the pointer is or at a pixel."""
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 10:
            raise InvalidRequest(f"count: {count!r} must be a whole number from 1 to 10")
        clicks = [[screen.button(button, down)] for _ in range(count) for down in (True, False)]
        await self._point({"click": button, "at": [x, y], "count": count}, x, y, clicks)

    async def drag(self, x: int, y: int, *, to_x: int, to_y: int, button: Button = "left") -> None:
        """Presses at one pixel, moves to another, lets go."""
        picture = await self._picture()
        target = screen.position(to_x, to_y, picture=picture)
        half = screen.position((x + to_x) // 2, (y + to_y) // 2, picture=picture)
        steps = [[screen.button(button, True)], half, target, [screen.button(button, False)]]
        await self._point({"drag": [x, y, to_x, to_y], "button": button}, x, y, steps)

    async def scroll(self, steps: int, *, x: int | None = None, y: int | None = None) -> None:
        """Turns the wheel: down for positive steps, up for negative ones."""
        events = screen.wheel(steps)
        pairs = [events[at : at + 2] for at in range(0, len(events), 2)]
        await self._point({"scroll": steps, "at": [x, y]}, x, y, pairs)

    async def _point(
        self, request: dict[str, Any], x: int | None, y: int | None, after: list[list[Event]]
    ) -> None:
        if (x is None) != (y is None):
            raise InvalidRequest("x, y: give both or neither")
        first = []
        if x is not None and y is not None:
            first = [screen.position(x, y, picture=await self._picture())]
        await self._act(request, first + after, _STEP_S)

    async def _act(self, request: dict[str, Any], groups: list[list[Event]], interval: float) -> None:
        path = await self._monitor()
        session = self._session
        if session.forwarded("screen", request) is not None:
            return
        seq = await session.log.begin(sandbox=session.id, kind="screen", request=request)
        result: dict[str, Any] = {"error": "abandoned"}
        try:
            async with monitor(path) as qmp:
                for number, events in enumerate(groups):
                    if number and interval:
                        await asyncio.sleep(interval)
                    await qmp.execute("input-send-event", {"events": events})
            result = {"ok": True}
        except MonitorError as error:
            result = {"error": str(error)}
            raise await self._verdict(error) from error
        finally:
            session.log.finish(sandbox=session.id, seq=seq, result=result)

    async def _picture(self) -> Picture:
        path = await self._monitor()
        name = f"screen-{secrets.token_hex(6)}.ppm"
        try:
            async with monitor(path) as qmp:
                await qmp.execute("screendump", {"filename": name})
        except MonitorError as error:
            raise await self._verdict(error) from error
        data = await asyncio.to_thread(_take_file, path.parent / name)
        self._last = screen.parse_ppm(data)
        return self._last

    async def _verdict(self, error: MonitorError) -> Exception:
        """A machine that is over has no monitor."""
        session = self._session
        if session.ended is None:
            try:
                async with asyncio.timeout(0.5):
                    await session.over.wait()
            except TimeoutError:
                return error
        return session.end_error()

    async def _monitor(self) -> Path:
        record = await self._record()
        if not record.get("screen"):
            raise Unsupported(
                "screen",
                reason=f"the {record['substrate']} substrate has none",
                available=["substrate='fullvm'"],
            )
        await self._session.awake()
        return Path(record["directory"]) / "vm/qmp.sock"


def _take_file(path: Path) -> bytes:
    """Reads and removes what the monitor wrote. It may be anything: no link is followed, the size is bounded."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SandboxError(f"the machine's screen cannot be read: {error}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_PICTURE:
            raise GuestProtocolError(f"the machine's screen is no file of at most {_MAX_PICTURE} bytes")
        with open(fd, "rb", closefd=False) as file:
            return file.read(_MAX_PICTURE)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
