"""The terminal of `rorqual sandbox shell`: ours in raw mode, theirs inside, bytes in between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator, Sequence

from rorqual.sandbox import AsyncPtyHandle, AsyncSandbox, GuestRefused, PtySize


async def terminal(
    sandbox_id: str, *, command: Sequence[str] | None, user: str | None, workdir: str | None, edge: str | None
) -> int:
    """Runs until the shell inside ends; its exit code. Our terminal is as before afterwards, whatever happened."""
    async with await AsyncSandbox.connect(sandbox_id, edge=edge) as sandbox:
        out = sys.stdout.fileno()
        pty = await sandbox.pty.create(
            size=_size(), cmd=command, user=user, cwd=workdir, on_data=lambda data: _write_all(out, data)
        )
        loop = asyncio.get_running_loop()
        keys: asyncio.Queue[bytes | None] = asyncio.Queue()
        with _raw(sys.stdin.fileno()):
            resized = asyncio.Event()
            loop.add_signal_handler(signal.SIGWINCH, resized.set)
            loop.add_reader(sys.stdin.fileno(), _read, sys.stdin.fileno(), keys)
            tasks = [asyncio.create_task(_type(pty, keys)), asyncio.create_task(_resize(pty, resized))]
            try:
                return await pty.wait()
            except asyncio.CancelledError:
                await pty.kill()
                raise
            finally:
                loop.remove_reader(sys.stdin.fileno())
                loop.remove_signal_handler(signal.SIGWINCH)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


def _size() -> PtySize:
    size = os.get_terminal_size(sys.stdout.fileno())
    return PtySize(rows=max(1, size.lines), cols=max(1, size.columns))


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _read(fd: int, keys: asyncio.Queue[bytes | None]) -> None:
    try:
        data = os.read(fd, 4096)
    except OSError:
        data = b""
    if not data:  # our terminal is gone
        asyncio.get_running_loop().remove_reader(fd)
    keys.put_nowait(data or None)


async def _type(pty: AsyncPtyHandle, keys: asyncio.Queue[bytes | None]) -> None:
    with contextlib.suppress(GuestRefused):  # it has ended: `wait` tells how
        while data := await keys.get():
            await pty.send_stdin(data)
        await pty.kill()


async def _resize(pty: AsyncPtyHandle, resized: asyncio.Event) -> None:
    while True:
        await resized.wait()
        resized.clear()
        with contextlib.suppress(GuestRefused):
            await pty.resize(_size())


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
