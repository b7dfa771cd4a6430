"""The qemu-guest-agent's channel: commands and files in a guest that has Debian's (or anyone's) qemu-guest-agent.

One JSON document a line over a virtio-serial port, one request at a time (QEMU's docs/interop/qemu-ga-ref). Each script
opens the port anew and begins with guest-sync-delimited, which also cleans up after a client that died in the middle;
a lock file decides between clients. Owns the port's language; shell_guest.py makes commands and files of it.
The guest is not trusted: what it sends is bounded by what was asked for, and nonsense ends the exchange.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import errno
import fcntl
import json
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rorqual.sandbox._dial import Address, dial
from rorqual.sandbox.errors import GuestFileError, GuestGone, GuestProtocolError, Unsupported
from rorqual.sandbox.machines.shell_guest import ShellGuest

PORT = "org.qemu.guest_agent.0"
_MAX_STALE = 64
"""Answers to an earlier client, or of a forger, that are read before the channel counts as broken."""
_MAX_LINE = 8 << 20
_EXEC_S = 60.0
_FILE_CHUNK = 1 << 20
_READY_S = 5.0


class QgaError(GuestProtocolError):
    """The agent answered a request with an error. `kind` is its class."""

    def __init__(self, request: str, kind: str, text: str) -> None:
        self.kind = kind
        self.text = text
        super().__init__(f"qemu-guest-agent refused {request}: {text[:300]}")


class _Exchange:
    """One hold on the port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def sync(self) -> None:
        number = secrets.randbits(48)
        # 0xff is no JSON: it makes the agent drop what an earlier client left unfinished.
        await self._send(b"\xff" + json.dumps(_request("guest-sync-delimited", id=number)).encode() + b"\n")
        for _ in range(_MAX_STALE):
            try:
                await self._reader.readuntil(b"\xff")
                line = await self._reader.readuntil(b"\n")
            except asyncio.LimitOverrunError as error:
                raise GuestProtocolError("qemu-guest-agent's port: a flood instead of an answer") from error
            except asyncio.IncompleteReadError as error:
                raise GuestGone("the qemu-guest-agent's port was closed") from error
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict) and answer.get("return") == number:
                    return
        raise GuestProtocolError("qemu-guest-agent's port: a flood instead of an answer")

    async def call(self, name: str, **arguments: Any) -> Any:
        await self._send(json.dumps(_request(name, **arguments)).encode() + b"\n")
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.LimitOverrunError as error:
            raise GuestProtocolError(
                f"qemu-guest-agent's answer to {name} is over {_MAX_LINE} bytes"
            ) from error
        except asyncio.IncompleteReadError as error:
            raise GuestGone("the qemu-guest-agent's port was closed") from error
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GuestProtocolError(f"qemu-guest-agent answered {name} with {line[:80]!r}") from error
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
            wrong = answer["error"]
            raise QgaError(name, str(wrong.get("class", ""))[:80], str(wrong.get("desc", ""))[:1000])
        if not isinstance(answer, dict) or "return" not in answer:
            raise GuestProtocolError(f"qemu-guest-agent answered {name} with {line[:80]!r}")
        return answer["return"]

    async def _send(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise GuestGone(f"the qemu-guest-agent's port broke: {error}") from error


class QgaGuest(ShellGuest):
    """Commands through guest-exec, files through guest-file-*."""

    channel = "qemu-guest-agent"
    chunk = 1 << 20

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._busy = asyncio.Lock()

    @classmethod
    async def open(cls, path: Path, *, timeout: float) -> QgaGuest:  # noqa: ASYNC109 - as GuestClient.connect
        """path: the host's end of the port. Waits up to `timeout` s for an agent to answer.

        Raises:
            GuestGone: none did. GuestProtocolError: something else did. Unsupported: no shell there (Windows).
        """
        guest = cls(path)
        end = asyncio.get_running_loop().time() + timeout
        while True:
            left = end - asyncio.get_running_loop().time()
            try:
                async with guest._exchange(min(_READY_S, max(0.2, left))) as port:
                    info = await port.call("guest-info")
                break
            except GuestGone:
                if left <= 0:
                    raise
                await asyncio.sleep(0.2)
        try:
            names = {str(item["name"]) for item in info["supported_commands"] if item["enabled"]}
        except (KeyError, TypeError) as error:
            raise GuestProtocolError("qemu-guest-agent's guest-info makes no sense") from error
        missing = {"guest-exec", "guest-exec-status", "guest-file-open", "guest-file-read"} - names
        if missing:
            raise Unsupported(
                "commands",
                reason=f"this guest's qemu-guest-agent does not allow {', '.join(sorted(missing))}",
                available=["console", "screen"],
            )
        await guest.prepare()
        return guest

    @contextlib.asynccontextmanager
    async def _exchange(self, seconds: float) -> AsyncIterator[_Exchange]:
        """The port, for one client at a time, in step. Raises GuestGone after `seconds` without an answer."""
        if self._error is not None:
            raise self._error
        async with self._busy:
            lock = os.open(f"{self._path}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            writer: asyncio.StreamWriter | None = None
            try:
                async with asyncio.timeout(seconds):
                    await _locked(lock)
                    sock = (await dial(Address(kind="unix", path=str(self._path)))).sock
                    reader, writer = await asyncio.open_connection(sock=sock, limit=_MAX_LINE)
                    port = _Exchange(reader, writer)
                    await port.sync()
                    yield port
            except TimeoutError as error:
                raise GuestGone(f"qemu-guest-agent gave no answer in {seconds:g} s") from error
            except (FileNotFoundError, ConnectionRefusedError) as error:
                raise GuestGone(f"the qemu-guest-agent's port is not there: {error.strerror}") from error
            finally:
                if writer is not None:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
                os.close(lock)

    async def script(self, text: str, *, feed: bytes = b"", limit: int = 65536) -> tuple[int, bytes]:
        arguments: dict[str, Any] = {"path": "/bin/sh", "arg": ["-c", text], "capture-output": True}
        arguments["input-data"] = base64.b64encode(feed).decode()
        while True:
            async with self._exchange(_EXEC_S) as port:
                pid = (await port.call("guest-exec", **arguments)).get("pid")
                pause = 0.004
                while True:
                    state = await port.call("guest-exec-status", pid=pid)
                    if not isinstance(state, dict):
                        raise GuestProtocolError("qemu-guest-agent's guest-exec-status makes no sense")
                    if state.get("exited"):
                        break
                    await asyncio.sleep(pause)
                    pause = min(1.5 * pause, 0.1)
            out = _bytes(state.get("out-data", ""))
            if state.get("out-truncated") or len(out) > limit:
                raise GuestProtocolError(f"a script in the guest answered more than {limit} bytes")
            code = state.get("exitcode", 255)
            return (code if isinstance(code, int) else 255), out

    async def read_file(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """By guest-file-read when it is long: no process in the guest, and less to carry."""
        if limit is not None and limit <= self.chunk:
            return await super().read_file(path, offset=offset, limit=limit)
        info = await self.stat(path)
        if info.type != "file" or info.size <= self.chunk:
            return await super().read_file(path, offset=offset, limit=limit)
        most = (256 << 20) + 1 if limit is None else limit
        data = bytearray()
        async with self._exchange(_EXEC_S + info.size / (1 << 20)) as port:
            try:
                handle = await port.call("guest-file-open", path=path, mode="rb")
            except QgaError as error:
                raise GuestFileError(errno.EACCES, path, call="read") from error
            try:
                if offset:
                    await port.call("guest-file-seek", handle=handle, offset=offset, whence="set")
                while len(data) < most:
                    count = min(_FILE_CHUNK, most - len(data))
                    answer = await port.call("guest-file-read", handle=handle, count=count)
                    part = _bytes(answer.get("buf-b64", "") if isinstance(answer, dict) else None)
                    if len(part) > count:
                        raise GuestProtocolError("qemu-guest-agent read more of a file than it was asked for")
                    data += part
                    if not part or answer.get("eof"):
                        break
            finally:
                await port.call("guest-file-close", handle=handle)
        if limit is None and len(data) >= most:
            raise GuestFileError(errno.EFBIG, path, call="read without limit")
        return bytes(data)


def _request(name: str, **arguments: Any) -> dict[str, Any]:
    return {"execute": name, "arguments": arguments} if arguments else {"execute": name}


def _bytes(text: Any) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise GuestProtocolError("qemu-guest-agent sent data that is not base64") from error


async def _locked(fd: int) -> None:
    """Other clients hold it for the length of one script."""
    pause = 0.002
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.05)
