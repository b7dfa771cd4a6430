"""The serial console's channel: the last resort, a shell behind a login on a guest's first serial line.

    wake the line, log in, silence the echo  ->  each script goes over as base64 in short lines, each acknowledged
    its exit code and its output's md5 come back on a line that begins with a mark, then the output as base64

A line has one reader, so scripts run one at a time; a lock file decides between clients, who let go of it when idle.
Marks are made of a secret per script and of a product that the guest must compute, so that an echo of what we typed is
no answer. Kernel messages between our lines are skipped, and output that one of them has torn is asked for again.
The guest is not trusted: whatever it prints is bounded, by bytes and by time.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox._dial import Address, dial
from rorqual.sandbox.errors import GuestGone, GuestProtocolError, HostUnfit
from rorqual.sandbox.machines.qga import _locked
from rorqual.sandbox.machines.shell_guest import ShellGuest

_LINE = 1800
"""Characters of base64 in a line: a terminal takes lines of up to 4095, and longer bursts may be lost."""
_SCRIPT_S = 60.0
_LOGIN_S = 30.0
_QUIET_S, _SILENT_S = 0.3, 0.8
_IDLE_S = 0.5
_NOISE = 4 << 20
"""Bytes that may pass by while an answer is awaited."""
_ASKS = 4
_LOGIN, _PASSWORD = re.compile(rb"(?i)\blogin: *\Z"), re.compile(rb"(?i)password[^\n]{0,40}: *\Z")
_ANSI = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()=>][0-9A-Za-z]?|\r")


@dataclass(frozen=True, kw_only=True, slots=True)
class Login:
    """How to get a shell on the line."""

    user: str = "root"
    password: str = ""


class _Line:
    """One hold on the serial line, with a shell at its other end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._held = bytearray()
        self._noise = 0

    async def type(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise GuestGone(f"the serial line broke: {error}") from error

    async def _more(self) -> None:
        data = await self._reader.read(65536)
        if not data:
            raise GuestGone("the serial line was closed")
        self._noise += len(data)
        if self._noise > _NOISE:
            raise GuestProtocolError(f"the serial line carries over {_NOISE} bytes and no answer")
        self._held += data

    async def login(self, login: Login) -> None:
        """Leaves a quiet shell. Raises GuestGone: nobody takes the login.

        A shell is what multiplies: its prompt may be anything, or nothing after an earlier client's visit.
        """
        secret, a, b = secrets.token_hex(4), secrets.randbelow(1 << 20), secrets.randbelow(1 << 10)
        probe, found = f"echo {secret}$(({a}*{b}))\r".encode(), f"{secret}{a * b}".encode()
        asked = 0
        await self.type(b"\x03\r")
        while True:
            try:
                async with asyncio.timeout(_QUIET_S if self._held else _SILENT_S):
                    await self._more()
                continue  # a prompt is the last word before the line falls silent
            except TimeoutError:
                pass
            tail = _ANSI.sub(b"", bytes(self._held[-400:]))
            if found in tail:
                break
            if _PASSWORD.search(tail):
                await self.type(login.password.encode() + b"\r")
            elif _LOGIN.search(tail):
                asked += 1
                if asked > 2:
                    raise GuestGone(f"the console did not take the login of {login.user!r}")
                await self.type(login.user.encode() + b"\r")
            else:
                await self.type(probe)
            self._held.clear()
        self._held.clear()
        await self.type(b"exec /bin/sh\r")
        await self.ask(
            "stty -echo -onlcr -ixon cols 65535 2>/dev/null; dmesg -n 1 2>/dev/null; PS1= PS2= TERM=dumb"
        )

    async def ask(self, words: str, *, limit: int = 256) -> bytes:
        """Types a line, returns what follows the mark on the line that begins with it. Text, at most `limit`."""
        secret, a, b = secrets.token_hex(6), secrets.randbelow(1 << 20), secrets.randbelow(1 << 10)
        # The product is not in what we type, so that an echo never looks like an answer.
        await self.type(f"{words}; e=$?; echo; echo rq{secret}$(({a}*{b})):$e.$q:; q=\r".encode())
        mark = b"rq" + secret.encode() + str(a * b).encode() + b":"
        self._noise = 0
        while True:
            at = self._held.find(mark)
            end = self._held.find(b":", at + len(mark)) if at >= 0 else -1
            if end >= 0:
                answer = bytes(self._held[at + len(mark) : end])
                del self._held[: end + 1]
                if len(answer) > limit:
                    raise GuestProtocolError("the console's answer is longer than it can be")
                return answer
            if at < 0 and len(self._held) > 1 << 16:
                del self._held[: -len(mark)]
            await self._more()

    async def listing(self, words: str, *, limit: int) -> bytes:
        """The lines that a command prints with our prefix (`$q` in `words`), joined."""
        secret = secrets.token_hex(6)
        self._noise = -2 * limit
        await self.type(f"q=z{secret}; {words}; echo; echo ${{q}}END; q=\r".encode())
        prefix, found = b"z" + secret.encode(), bytearray()
        while True:
            at = self._held.find(b"\n")
            if at < 0:
                if len(self._held) > 1 << 20:
                    raise GuestProtocolError("the console's line does not end")
                await self._more()
                continue
            line = _ANSI.sub(b"", bytes(self._held[:at]))
            del self._held[: at + 1]
            if line.startswith(prefix):
                if line == prefix + b"END":
                    return bytes(found)
                found += line[len(prefix) :]
                if len(found) > limit:
                    raise GuestProtocolError("the console's answer is longer than it can be")


class ConsoleGuest(ShellGuest):
    """Commands and files over a serial line."""

    channel = "serial console"
    chunk = 16 << 10

    def __init__(self, path: Path, login: Login) -> None:
        super().__init__()
        self._path = path
        self._login = login
        self._busy = asyncio.Lock()
        self._place = ""
        self._line: _Line | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lock = -1
        self._leaving: asyncio.TimerHandle | None = None

    @classmethod
    async def open(cls, path: Path, *, login: Login, timeout: float) -> ConsoleGuest:  # noqa: ASYNC109
        """path: the host's end of the line. Raises GuestGone: no shell within `timeout` s."""
        if "\n" in login.user + login.password or not login.user:
            raise HostUnfit("console: a user name and a password without line breaks are needed.")
        guest = cls(path, login)
        end = asyncio.get_running_loop().time() + timeout
        while True:
            left = end - asyncio.get_running_loop().time()
            try:
                async with guest._shell(min(_LOGIN_S, max(1.0, left))):
                    pass
                break
            except GuestGone:
                if left <= 0:
                    raise
                await asyncio.sleep(0.5)
        await guest.prepare()
        return guest

    @contextlib.asynccontextmanager
    async def _shell(self, seconds: float) -> AsyncIterator[_Line]:
        if self._error is not None:
            raise self._error
        async with self._busy:
            if self._leaving is not None:
                self._leaving.cancel()
            try:
                async with asyncio.timeout(seconds):
                    if self._line is None:
                        await self._connect()
                    assert self._line is not None
                    yield self._line
                self._leaving = asyncio.get_running_loop().call_later(_IDLE_S, self._let_go)
            except BaseException as error:
                await self._hang_up()  # out of step: the next script logs in anew
                if isinstance(error, TimeoutError):
                    raise GuestGone(f"the serial console gave no answer in {seconds:g} s") from error
                if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                    raise GuestGone(f"the serial line is not there: {error.strerror}") from error
                raise

    async def _connect(self) -> None:
        self._lock = os.open(
            f"{self._path}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        await _locked(self._lock)
        sock = (await dial(Address(kind="unix", path=str(self._path)))).sock
        reader, self._writer = await asyncio.open_connection(sock=sock)
        line = _Line(reader, self._writer)
        await line.login(self._login)
        self._place = f"/tmp/.rorqual-line-{secrets.token_hex(6)}"
        if await line.ask(f"umask 077; mkdir {self._place}; q=$?") != b"0.0":
            raise GuestGone("the console's shell cannot write to /tmp")
        self._line = line

    def _let_go(self) -> None:
        """Idle: another client may have the line. The shell stays as it is."""
        if not self._busy.locked():
            self._line = None
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    async def _hang_up(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
        self._line = None
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def close(self) -> None:
        await super().close()
        await self._hang_up()

    async def script(self, text: str, *, feed: bytes = b"", limit: int = 65536) -> tuple[int, bytes]:
        async with self._shell(_SCRIPT_S + (len(feed) + limit) / 50_000) as line:
            place = self._place
            await self._put(line, text.encode("utf-8", "surrogateescape"), f"{place}/s")
            if feed:
                await self._put(line, feed, f"{place}/i")
            source = f"{place}/i" if feed else "/dev/null"
            code = await line.ask(
                f"sh {place}/s <{source} >{place}/o 2>/dev/null; q=$?; "
                f"q=$q.$(wc -c <{place}/o).$(md5sum <{place}/o | head -c 32); :"
            )
            try:
                _, exit_code, size, digest = code.decode("ascii").split(".")
                count = int(size)
                if count < 0 or not re.fullmatch(r"[0-9a-f]{32}", digest):
                    raise ValueError
            except ValueError as error:
                raise GuestProtocolError(f"the console's answer makes no sense: {code[:80]!r}") from error
            if count > limit:
                raise GuestProtocolError(f"a script in the guest answered {count} bytes, more than {limit}")
            return int(exit_code) % 256, await self._get(line, count, digest) if count else b""

    async def _put(self, line: _Line, data: bytes, path: str) -> None:
        text = base64.b64encode(data).decode()
        for _ in range(_ASKS):
            await line.ask(f": >{path}.b")
            for at in range(0, len(text), _LINE):
                await line.ask(f"printf %s '{text[at : at + _LINE]}' >>{path}.b")
            sum_ = await line.ask(f"base64 -d <{path}.b >{path}; q=$(md5sum <{path} | head -c 32); :")
            if sum_.endswith(hashlib.md5(data, usedforsecurity=False).hexdigest().encode()):
                return
        raise GuestGone("the serial line loses characters")

    async def _get(self, line: _Line, count: int, digest: str) -> bytes:
        for _ in range(_ASKS):
            text = await line.listing(
                f'base64 <{self._place}/o | sed "s/^/$q/"', limit=count * 4 // 3 + count // 50 + 1024
            )
            with contextlib.suppress(binascii.Error):
                data = base64.b64decode(text)
                if len(data) == count and hashlib.md5(data, usedforsecurity=False).hexdigest() == digest:
                    return data
        raise GuestGone("the serial line loses characters, or something else writes to it")
