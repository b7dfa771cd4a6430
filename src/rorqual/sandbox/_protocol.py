"""Bytes of the guest protocol, host side: frames, payload fields, bounds (docs/guest-protocol.md).

A frame is u32 payload length, u8 type, three zero bytes, u32 id, payload; little-endian throughout.
Owns encoding and checking; never touches a socket (sandbox/_guest.py does). The guest is not trusted: each
length is checked before anything is allocated for it, each field against its range; else GuestProtocolError.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from .errors import GuestProtocolError, GuestRefused

MAGIC = 0x51524F52
VERSION = 1
MAX_PAYLOAD = 256 * 1024
"""Bytes of one frame's payload: bounds what one frame from the guest can make us hold."""
MAX_CHUNK = 64 * 1024
"""Bytes of data in one DATA, STDIN, READ or WRITE frame."""
MAX_STRINGS = 4096
"""Entries of argv, and of env."""
MAX_PATH = 4095
MAX_TAG = 256
MAX_HANDLES = 16
MIN_ENTROPY, MAX_ENTROPY = 32, 512
"""Bytes that a REFRESH credits; below 32 the generator of a fork could be guessed."""
NO_LIMIT = 2**63 - 1

_HEADER = struct.Struct("<IB3xI")
_RESERVED = b"\0\0\0"


class Type(IntEnum):
    """Frame types; below 0x80 host to guest, above guest to host."""

    HELLO = 0x01
    START = 0x10
    ATTACH = 0x11
    LIST = 0x12
    KILL = 0x13
    STDIN = 0x14
    RESIZE = 0x15
    CREDIT = 0x16
    DETACH = 0x17
    READ_OPEN = 0x20
    READ_NEXT = 0x21
    WRITE_OPEN = 0x22
    WRITE_NEXT = 0x23
    CLOSE = 0x24
    STAT = 0x28
    DIR_OPEN = 0x29
    DIR_NEXT = 0x2A
    MKDIR = 0x2B
    REMOVE = 0x2C
    RENAME = 0x2D
    REFRESH = 0x30
    RESUME = 0x31
    TCP_OPEN = 0x38
    TCP_SEND = 0x39
    TCP_CREDIT = 0x3A
    TCP_CLOSE = 0x3B
    STDIN_AT = 0x3F
    WELCOME = 0x81
    RESULT = 0x90
    ERROR = 0x91
    STARTED = 0x92
    DATA = 0x93
    EXIT = 0x94
    TCP_DATA = 0x95
    TCP_END = 0x96


_FROM_GUEST = frozenset({Type.WELCOME, Type.RESULT, Type.ERROR, Type.STARTED, Type.DATA, Type.EXIT}) | {
    Type.TCP_DATA,
    Type.TCP_END,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole frame from the guest."""

    type: Type
    id: int
    payload: bytes


class Decoder:
    """Cuts a byte stream from the guest into frames. Holds one frame, and what came with its last bytes."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Frames that `data` completes. Raises GuestProtocolError; the decoder is then of no further use."""
        held = self._held
        held += data
        frames = []
        at = 0
        while len(held) - at >= _HEADER.size:
            length, kind, ident = _HEADER.unpack_from(held, at)
            if length > MAX_PAYLOAD:
                raise GuestProtocolError(f"the guest announced a frame of {length} bytes, over {MAX_PAYLOAD}")
            if held[at + 5 : at + 8] != _RESERVED:
                raise GuestProtocolError("the guest sent a frame whose reserved bytes are not zero")
            if kind not in _FROM_GUEST:
                raise GuestProtocolError(f"the guest sent a frame of type 0x{kind:02x}, which no guest sends")
            end = at + _HEADER.size + length
            if len(held) < end:
                break
            frames.append(Frame(Type(kind), ident, bytes(held[at + _HEADER.size : end])))
            at = end
        del held[:at]
        return frames


class Reader:
    """Reads payload fields in order; a field that does not fit raises GuestProtocolError naming the frame."""

    def __init__(self, frame: Frame) -> None:
        self._name = frame.type.name
        self._data = frame.payload
        self._at = 0

    def bad(self, what: str) -> GuestProtocolError:
        return GuestProtocolError(f"malformed {self._name} from the guest: {what}")

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise self.bad(f"a field of {count} bytes at {self._at} does not fit in {len(self._data)}")
        self._at += count
        return self._data[self._at - count : self._at]

    def _int(self, size: int, most: int | None) -> int:
        value = int.from_bytes(self.take(size), "little")
        if most is not None and value > most:
            raise self.bad(f"{value} is over {most}")
        return value

    def u8(self, most: int | None = None) -> int:
        return self._int(1, most)

    def u16(self, most: int | None = None) -> int:
        return self._int(2, most)

    def u32(self, most: int | None = None) -> int:
        return self._int(4, most)

    def u64(self, most: int | None = NO_LIMIT) -> int:
        return self._int(8, most)

    def i64(self) -> int:
        return int.from_bytes(self.take(8), "little", signed=True)

    def string(self, most: int) -> bytes:
        return self.take(self.u32(most))

    def text(self, most: int) -> str:
        """A string as Python sees file names: bytes that are not UTF-8 become surrogates (PEP 383)."""
        return os.fsdecode(self.string(most))

    def rest(self, most: int = MAX_CHUNK) -> bytes:
        count = len(self._data) - self._at
        if count > most:
            raise self.bad(f"{count} bytes of data, {most} is the most")
        return self.take(count)

    def more(self) -> bool:
        return self._at < len(self._data)

    def end(self) -> None:
        if self.more():
            raise self.bad(f"{len(self._data) - self._at} bytes too many")


def frame(kind: Type, ident: int, *parts: bytes) -> bytes:
    """One frame, encoded. Raises GuestRefused(E2BIG) if the payload is over MAX_PAYLOAD."""
    payload = b"".join(parts)
    if len(payload) > MAX_PAYLOAD:
        raise GuestRefused(
            f"{kind.name}: {len(payload)} bytes do not fit into one frame of {MAX_PAYLOAD}; "
            "write large content to a file and pass its path",
            errno=7,
        )
    return _HEADER.pack(len(payload), kind, ident) + payload


def u8(value: int) -> bytes:
    return value.to_bytes(1, "little")


def u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def string(value: str | bytes, what: str, *, most: int = MAX_PAYLOAD) -> bytes:
    """u32 length and bytes. Raises ValueError for a NUL or an over-long value, naming `what`."""
    try:
        data = os.fsencode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: {error.reason} at character {error.start}") from error
    if b"\0" in data:
        raise ValueError(f"{what} contains a NUL character, which no program argument or path can carry")
    if len(data) > most:
        raise ValueError(f"{what} has {len(data)} bytes; {most} is the most")
    return u32(len(data)) + data


def path(value: str | os.PathLike[str]) -> bytes:
    """A path of the guest's. Raises ValueError unless it is absolute."""
    text = os.fspath(value)
    if not text.startswith("/"):
        raise ValueError(f"path {text!r} is not absolute: paths in the guest start with /")
    return string(text, "path", most=MAX_PATH)


def user(value: str | int | None) -> bytes:
    """Who to run as, or to give a file to: None is the agent's user, an int a uid, a str a name."""
    if value is None:
        return u8(0) + u32(0) + u32(0)
    if isinstance(value, int):
        if not 0 <= value < 2**32 - 1:
            raise ValueError(f"user {value} is not a uid (0 to 4294967294)")
        return u8(1) + u32(value) + u32(0)
    if not value:
        raise ValueError("user is an empty name; use None for the agent's own user")
    return u8(2) + u32(0) + string(value, "user", most=255)


def identity(*, wall_ns: int, hostname: str, machine_id: str, entropy: bytes) -> bytes:
    """Payload of REFRESH; 0 and empty leave that as it is. Raises ValueError, naming the field."""
    if not 0 <= wall_ns <= NO_LIMIT:
        raise ValueError(f"wall_ns is {wall_ns}: nanoseconds since 1970")
    if hostname and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", hostname):
        raise ValueError(f"hostname {hostname!r}: letters, digits, '-' and '.', at most 64")
    if machine_id and not re.fullmatch(r"[0-9a-f]{32}", machine_id):
        raise ValueError(f"machine_id {machine_id!r} is not 32 lower-case hex digits")
    if entropy and not MIN_ENTROPY <= len(entropy) <= MAX_ENTROPY:
        raise ValueError(f"entropy has {len(entropy)} bytes; give {MIN_ENTROPY} to {MAX_ENTROPY}, or none")
    return u64(wall_ns) + string(hostname, "hostname") + string(machine_id, "machine_id") + entropy


def environment(env: Mapping[str, str] | None) -> bytes:
    """u32 count and NAME=VALUE strings."""
    entries = []
    for name, value in (env or {}).items():
        if not name or "=" in name:
            raise ValueError(f"environment name {name!r} is empty or contains '='")
        entries.append(string(f"{name}={value}", f"environment variable {name}"))
    if len(entries) > MAX_STRINGS:
        raise ValueError(f"{len(entries)} environment variables; {MAX_STRINGS} is the most")
    return u32(len(entries)) + b"".join(entries)


def arguments(argv: Sequence[str]) -> bytes:
    """u32 count and strings."""
    if isinstance(argv, str | bytes):
        raise TypeError("argv is one string; pass a list, or ['/bin/sh', '-c', text] for a shell command")
    if not argv or not argv[0]:
        raise ValueError("argv is empty, or its first entry (the program) is")
    if len(argv) > MAX_STRINGS:
        raise GuestRefused(f"argv has {len(argv)} entries; {MAX_STRINGS} is the most", errno=7)
    return u32(len(argv)) + b"".join(string(a, f"argv[{i}]", most=NO_LIMIT) for i, a in enumerate(argv))


def hello(ident: int) -> bytes:
    return frame(Type.HELLO, ident, u32(MAGIC), u16(VERSION), u16(VERSION))


def start(
    ident: int,
    argv: Sequence[str],
    *,
    cwd: str | None,
    env: Mapping[str, str] | None,
    who: str | int | None,
    stdin: bool,
    pty: tuple[int, int] | None,
    timeout_ms: int,
    max_output: int,
    credit: int,
    tag: str,
) -> bytes:
    """START. `timeout_ms` 0 is none; `pty` is (rows, cols)."""
    rows, cols = pty or (0, 0)
    flags = (1 if stdin else 0) | (2 if pty else 0)
    return frame(
        Type.START,
        ident,
        u64(timeout_ms) + u64(max_output) + u32(credit) + u8(flags) + u16(rows) + u16(cols),
        user(who),
        string(cwd or "", "cwd", most=MAX_PATH),
        string(tag, "tag", most=MAX_TAG),
        arguments(argv),
        environment(env),
    )


@dataclass(frozen=True, slots=True)
class Welcome:
    version: int
    pid: int
    boot_id: str
    agent: str


@dataclass(frozen=True, slots=True)
class Started:
    pid: int
    pty: bool
    max_output: int


@dataclass(frozen=True, slots=True)
class Exit:
    exit_code: int
    signal: int
    timed_out: bool
    truncated: bool
    stdout_bytes: int
    stderr_bytes: int
    duration_ns: int
    error: str


@dataclass(frozen=True, slots=True)
class Listed:
    serial: int
    pid: int
    running: bool
    pty: bool
    age_ns: int
    exit_code: int
    tag: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stat:
    name: str
    type: Literal["file", "dir", "symlink", "other"]
    size: int
    mode: int
    uid: int
    gid: int
    mtime: float
    target: str


def read_welcome(got: Frame) -> Welcome:
    r = Reader(got)
    if r.u32() != MAGIC:
        raise r.bad("no magic number: this is not a guest agent")
    version = r.u16()
    if version != VERSION:
        raise r.bad(f"version {version}, asked for {VERSION}")
    welcome = Welcome(version, r.u32(), r.take(16).hex(), r.text(64))
    r.end()
    return welcome


def read_error(got: Frame) -> GuestRefused:
    r = Reader(got)
    number, text = r.u32(4095), r.string(1024).decode("utf-8", "replace")
    r.end()
    return GuestRefused(text, errno=number)


def read_empty(got: Frame) -> None:
    Reader(got).end()


def read_flag(got: Frame) -> bool:
    r = Reader(got)
    flag = r.u8(1)
    r.end()
    return bool(flag)


def read_handle(got: Frame) -> int:
    r = Reader(got)
    handle = r.u32(MAX_HANDLES)
    r.end()
    return handle


def read_stdin_at(got: Frame) -> tuple[int, bool]:
    """Bytes of input taken, and whether it was closed."""
    r = Reader(got)
    taken, closed = r.u64(None), bool(r.u8(1))
    r.end()
    return taken, closed


def read_code(got: Frame) -> int:
    """An errno; 0: an orderly end."""
    r = Reader(got)
    code = r.u32(4095)
    r.end()
    return code


def read_chunk(got: Frame) -> tuple[int, bytes]:
    """Handle to read on from (0: that was all), and bytes."""
    r = Reader(got)
    handle, data = r.u32(MAX_HANDLES), r.rest()
    if handle and not data:
        raise r.bad("an empty chunk that is not the last")
    return handle, data


def read_started(got: Frame) -> Started:
    r = Reader(got)
    started = Started(r.u32(2**31 - 1), bool(r.u8(1)), r.u64(None))
    r.end()
    if started.pid == 0:
        raise r.bad("process id 0")
    return started


def read_data(got: Frame) -> tuple[int, bytes]:
    """Stream (0 stdout, 1 stderr) and bytes, never empty."""
    r = Reader(got)
    stream, data = r.u8(1), r.rest()
    if not data:
        raise r.bad("no data")
    return stream, data


def read_exit(got: Frame) -> Exit:
    r = Reader(got)
    code, signal, flags = r.u32(255), r.u32(64), r.u8(3)
    out, err, duration = r.u64(), r.u64(), r.u64()
    error = r.string(1024).decode("utf-8", "replace")
    r.end()
    return Exit(code, signal, bool(flags & 1), bool(flags & 2), out, err, duration, error)


def read_list(got: Frame) -> tuple[list[Listed], int]:
    """Commands in order of start, and the serial to ask on from (0: that was all)."""
    r = Reader(got)
    listed: list[Listed] = []
    while True:
        serial = r.u64()
        if not r.more():
            return listed, serial
        pid, flags, age, code = r.u32(2**31 - 1), r.u8(3), r.u64(), r.u32(255)
        tag, title = r.text(MAX_TAG), r.string(256)
        argv = tuple(os.fsdecode(part) for part in title.split(b"\0"))
        if listed and serial <= listed[-1].serial:
            raise r.bad("commands out of order")
        listed.append(Listed(serial, pid, bool(flags & 1), bool(flags & 2), age, code, tag, argv))


_KINDS: Mapping[int, Literal["file", "dir", "symlink", "other"]] = {
    ord("f"): "file",
    ord("d"): "dir",
    ord("l"): "symlink",
    ord("o"): "other",
}


def _stat(r: Reader) -> Stat:
    name = r.text(MAX_PATH)
    kind = _KINDS.get(r.u8())
    if kind is None:
        raise r.bad("a file type other than f, d, l, o")
    size, mode, uid, gid = r.u64(), r.u32(0o7777), r.u32(), r.u32()
    seconds, nanos = r.i64(), r.u32(999_999_999)
    return Stat(name, kind, size, mode, uid, gid, seconds + nanos / 1e9, r.text(MAX_PATH))


def read_stat(got: Frame) -> Stat:
    r = Reader(got)
    found = _stat(r)
    r.end()
    return found


def read_page(got: Frame) -> tuple[int, list[Stat]]:
    """Handle to list on from (0: that was all), and entries, whose names are safe to join to a path."""
    r = Reader(got)
    handle = r.u32(MAX_HANDLES)
    entries: list[Stat] = []
    while r.more():
        one = _stat(r)
        if "/" in one.name or "\0" in one.name or one.name in ("", ".", ".."):
            raise r.bad(f"a directory entry named {one.name!r}")
        entries.append(one)
    if handle and not entries:
        raise r.bad("an empty page that is not the last")
    return handle, entries
