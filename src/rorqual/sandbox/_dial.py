"""Dials a guest agent: an address in, a connected socket out. Owns the addresses; knows no frame.

    unix:/run/x/guest.sock                 a Unix stream socket; many clients
    ports:/run/x/vm/agent-%d.sock?n=8      virtio-serial ports: n Unix sockets of the VMM, one client each
    vsock:/run/x/vm/vsock.sock?port=1024   a VMM that carries vsock over one Unix socket ("CONNECT 1024\\n", "OK n\\n")

A port is one unbroken stream of bytes, whoever is at its host end, so a client that comes after one that died in the
middle of a frame would be misread. Hence on ports, both ways: the byte FLAG never occurs in data (`PortCodec`), and
FLAG with 16 hex digits of the client's choice begins a connection; the agent answers with the same before anything
else (native/guest/ports.c). Which client has which port is decided by file locks beside the sockets, which the kernel
drops at any kind of death. The VMM may be taken over by its guest: no link is followed, no answer is trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from rorqual.sandbox.errors import GuestProtocolError

FLAG, ESCAPE = b"\x7e", b"\x7d"
_ESCAPED_FLAG, _ESCAPED_ESCAPE = b"\x7d\x5e", b"\x7d\x5d"
NONCE_BYTES = 16
MAX_PORTS = 31
"""The ports of one virtio-serial device, less the console's."""
_ADDRESS = re.compile(r"(unix|ports|vsock):(/[^?\0]*)(?:\?(n|port)=([0-9]{1,10}))?")
_VSOCK_ANSWER = 32


class PortsBusy(OSError):
    """Every port has a client. Worth another try later."""

    def __init__(self, count: int) -> None:
        super().__init__(errno.EBUSY, f"all {count} ports of the guest agent have a client")


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A parsed address."""

    kind: str
    """'unix', 'ports' or 'vsock'."""
    path: str
    """A pattern with one %d for ports."""
    number: int = 0
    """How many ports, or which vsock port."""

    @classmethod
    def parse(cls, text: str | Path) -> Address:
        """A Path, or a text without a scheme, means unix. Raises ValueError, which says what is wrong."""
        if isinstance(text, Path) or text.startswith("/"):
            return cls(kind="unix", path=str(text))
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(
                f"guest address {text!r}: must be unix:/path, ports:/path-%d?n=8 or vsock:/path?port=1024"
            )
        kind, path, key, digits = match.groups()
        number = int(digits or 0)
        wanted = {"unix": None, "ports": "n", "vsock": "port"}[kind]
        if key != wanted:
            raise ValueError(f"guest address {text!r}: {kind} takes {wanted or 'no parameter'}, not {key}")
        if kind == "ports" and (path.count("%") != 1 or "%d" not in path or not 1 <= number <= MAX_PORTS):
            raise ValueError(f"guest address {text!r}: needs one %d in its path and n from 1 to {MAX_PORTS}")
        if kind == "vsock" and not 1 <= number < 2**32 - 1:
            raise ValueError(f"guest address {text!r}: no such vsock port")
        return cls(kind=kind, path=path, number=number)


class PortCodec:
    """What a port's bytes look like. The host's end: makes a connection's beginning, and waits for the answer to it."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(NONCE_BYTES // 2).encode()
        self._synced = False
        self._held = b""

    def greeting(self) -> bytes:
        return FLAG + self._nonce

    @staticmethod
    def encode(data: bytes) -> bytes:
        return data.replace(ESCAPE, _ESCAPED_ESCAPE).replace(FLAG, _ESCAPED_FLAG)

    def decode(self, data: bytes) -> bytes:
        """The bytes meant for this connection. Raises GuestProtocolError when it is not the port's language."""
        data = self._held + data
        self._held = b""
        if not self._synced:
            mark = self.greeting()
            at = data.find(mark)
            if (
                at < 0
            ):  # what an earlier client did not read; of the mark itself all but its last byte may be here
                self._held = data[-(len(mark) - 1) :]
                return b""
            self._synced = True
            data = data[at + len(mark) :]
        if FLAG in data:
            raise GuestProtocolError("the guest began its port anew in the middle of a connection")
        if data.endswith(ESCAPE):
            data, self._held = data[:-1], ESCAPE
        plain = data.replace(_ESCAPED_FLAG, FLAG).replace(_ESCAPED_ESCAPE, ESCAPE)
        if len(data) - len(plain) != data.count(ESCAPE):
            raise GuestProtocolError("the guest sent an escape on its port that stands for nothing")
        return plain


@dataclass(kw_only=True, slots=True)
class Dialed:
    """A connection that nobody has spoken on yet."""

    sock: socket.socket
    codec: PortCodec | None = None
    lease: int = -1
    """The lock that makes the port ours; goes with `release`."""

    def release(self) -> None:
        """After the socket was closed: lets the next client have the port. Idempotent."""
        if self.lease >= 0:
            os.close(self.lease)
            self.lease = -1

    def close(self) -> None:
        self.sock.close()
        self.release()


async def dial(address: Address) -> Dialed:
    """Connects once.

    Raises:
        FileNotFoundError, ConnectionRefusedError: nobody listens yet. PortsBusy: every port has a client.
        OSError: it will not work.
    """
    if address.kind == "ports":
        return await _dial_port(address)
    sock = await _connect(address.path)
    try:
        if address.kind == "vsock":
            await _ask_for_vsock(sock, address.number)
    except BaseException:
        sock.close()
        raise
    return Dialed(sock=sock)


async def _connect(path: str) -> socket.socket:
    """Through a descriptor of the socket's file: its path may be longer than 107 bytes, and a link is not followed."""
    target = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(target).st_mode):
            raise OSError(errno.ENOTSOCK, "not a socket", path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, f"/proc/self/fd/{target}")
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(target)


async def _dial_port(address: Address) -> Dialed:
    for number in range(address.number):
        path = address.path % number
        lease = _claim(path + ".lock")
        if lease < 0:
            continue
        try:
            sock = await _connect(path)
        except BaseException:
            os.close(lease)
            raise
        dialed = Dialed(sock=sock, codec=PortCodec(), lease=lease)
        assert dialed.codec is not None
        try:
            await asyncio.get_running_loop().sock_sendall(sock, dialed.codec.greeting())
        except BaseException:
            dialed.close()
            raise
        return dialed
    raise PortsBusy(address.number)


def _claim(path: str) -> int:
    """A locked descriptor, or -1 when somebody has it."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd


async def _ask_for_vsock(sock: socket.socket, port: int) -> None:
    loop = asyncio.get_running_loop()
    answer = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        await loop.sock_sendall(sock, b"CONNECT %d\n" % port)
        while not answer.endswith(b"\n") and len(answer) < _VSOCK_ANSWER:
            byte = await loop.sock_recv(sock, 1)  # what follows the line belongs to the agent
            if not byte:
                break
            answer += byte
    if not answer:  # the VMM hangs up when nothing in the guest listens there
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"nothing in the guest listens on vsock port {port}")
    if not re.fullmatch(rb"OK [0-9]{1,10}\n", answer):
        raise GuestProtocolError(f"the VMM answered {answer!r} where it should say OK and a number")
