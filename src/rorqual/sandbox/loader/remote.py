"""Reads a layer store: a directory, or an HTTP server that answers ranges. The server is not trusted.

Owns transport: bounded sizes, a deadline over the whole answer (headers too, however slowly they drip), no redirects,
no ranges but the one that was asked for. What the bytes must be is chunks.py's business. Standard library only.
Thread-safe.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from typing import Protocol
from urllib.parse import quote, urlsplit

_CONNECT_S = 5.0
_STEP_S = 10.0
_TICK_S = 0.1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:-]*(/[A-Za-z0-9][A-Za-z0-9._@:-]*)*")


class RemoteError(Exception):
    """The store did not give what was asked for. `lasting`: asking again will not help."""

    def __init__(self, text: str, *, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting


class Remote(Protocol):
    """A store that can be read."""

    url: str

    def get(self, name: str, *, max_bytes: int, deadline_s: float) -> bytes:
        """A whole small file. Raises RemoteError."""

    def read(self, name: str, *, offset: int, size: int, deadline_s: float) -> bytes:
        """`size` bytes from `offset` of a file. Raises RemoteError."""

    def close(self) -> None:
        """Drops its connections."""


def open_remote(url: str) -> Remote:
    """A store by its URL: http://, https://, file:// or an absolute path. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and parts.hostname and not parts.username and not parts.query:
        return HttpRemote(url)
    path = parts.path if parts.scheme == "file" and not parts.netloc else url
    if path.startswith("/") and "\0" not in path:
        return DirectoryRemote(path)
    raise ValueError(f"{url!r} is not a store: http://HOST/PATH, https://HOST/PATH, or an absolute directory")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or ".." in name:
        raise RemoteError(f"{name[:80]!r} is not a name in a store", lasting=True)
    return name


class DirectoryRemote:
    """A store on a file system of this host (a network file system, mostly)."""

    def __init__(self, path: str) -> None:
        self.url = path

    def get(self, name: str, *, max_bytes: int, deadline_s: float) -> bytes:
        data = self._read(name, offset=0, size=max_bytes + 1)
        if len(data) > max_bytes:
            raise RemoteError(f"{self.url}/{name}: more than {max_bytes} bytes", lasting=True)
        return data

    def read(self, name: str, *, offset: int, size: int, deadline_s: float) -> bytes:
        data = self._read(name, offset=offset, size=size)
        if len(data) != size:
            raise RemoteError(f"{self.url}/{name}: it ends before byte {offset + size}")
        return data

    def _read(self, name: str, *, offset: int, size: int) -> bytes:
        where = f"{self.url}/{_checked(name)}"
        parts = []
        try:
            fd = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not be waited for
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise RemoteError(f"{where}: not a plain file", lasting=True)
                while size and (data := os.pread(fd, min(size, 1 << 20), offset)):
                    parts.append(data)
                    size, offset = size - len(data), offset + len(data)
            finally:
                os.close(fd)
        except OSError as error:
            lasting = isinstance(error, FileNotFoundError)
            raise RemoteError(f"{where}: {error.strerror}", lasting=lasting) from error
        return b"".join(parts)

    def close(self) -> None:
        pass


class HttpRemote:
    """A store behind HTTP. Keeps as many idle connections as there were readers at once."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.url = url.rstrip("/")
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._running: dict[int, tuple[float, socket.socket]] = {}
        self._watching = False

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def get(self, name: str, *, max_bytes: int, deadline_s: float) -> bytes:
        return self._ask(name, {}, deadline_s, size=None, offset=0, max_bytes=max_bytes)

    def read(self, name: str, *, offset: int, size: int, deadline_s: float) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
        return self._ask(name, headers, deadline_s, size=size, offset=offset, max_bytes=size)

    def _connect(self) -> http.client.HTTPConnection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        if self._tls is not None:
            return http.client.HTTPSConnection(self._host, self._port, timeout=_CONNECT_S, context=self._tls)
        return http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_S)

    def _ask(
        self,
        name: str,
        headers: dict[str, str],
        deadline_s: float,
        *,
        size: int | None,
        offset: int,
        max_bytes: int,
    ) -> bytes:
        where = f"{self.url}/{_checked(name)}"
        end = time.monotonic() + deadline_s
        connection = self._connect()
        reused = connection.sock is not None
        try:
            if not reused:
                connection.connect()
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._watched(connection.sock, end):
                connection.sock.settimeout(_STEP_S)
                connection.request("GET", f"{self._path}/{quote(name)}", headers=headers)
                answer = connection.getresponse()
                data = self._body(answer, where, end, size=size, offset=offset, max_bytes=max_bytes)
                kept = not answer.will_close and answer.isclosed()
        except (OSError, http.client.HTTPException, ValueError, RemoteError) as error:
            connection.close()
            if time.monotonic() >= end:  # an answer that the watch cut short looks like a bad one
                raise RemoteError(f"{where}: not there after {deadline_s:g} s") from error
            if isinstance(error, RemoteError):
                raise
            if reused:  # a server may close what has idled; that says nothing about the file
                return self._ask(
                    name,
                    headers,
                    max(0.0, end - time.monotonic()),
                    size=size,
                    offset=offset,
                    max_bytes=max_bytes,
                )
            raise RemoteError(f"{where}: {error or type(error).__name__}") from error
        except BaseException:
            connection.close()
            raise
        if kept:
            with self._lock:
                self._idle.append(connection)
        else:
            connection.close()
        return data

    def _body(
        self,
        answer: http.client.HTTPResponse,
        where: str,
        end: float,
        *,
        size: int | None,
        offset: int,
        max_bytes: int,
    ) -> bytes:
        if size is not None and answer.status == 200:
            raise RemoteError(
                f"{where}: the server ignores ranges, which layers on demand need", lasting=True
            )
        wanted = 200 if size is None else 206
        if answer.status != wanted:
            lasting = answer.status in (301, 302, 307, 308, 401, 403, 404, 410, 416)
            raise RemoteError(
                f"{where}: HTTP {answer.status} {answer.reason[:80]!r} instead of {wanted}", lasting=lasting
            )
        if size is not None:
            given = answer.getheader("Content-Range", "")
            if not given.startswith(f"bytes {offset}-{offset + size - 1}/"):
                raise RemoteError(
                    f"{where}: bytes {offset}-{offset + size - 1} were asked for, {given[:60]!r} came"
                )
        parts = bytearray()
        while len(parts) <= max_bytes:
            piece = answer.read1(min(1 << 18, max_bytes + 1 - len(parts)))
            if not piece:
                break
            parts += piece
            if time.monotonic() >= end:
                raise TimeoutError
        if len(parts) > max_bytes:
            raise RemoteError(f"{where}: more than {max_bytes} bytes", lasting=True)
        if size is not None and len(parts) != size:
            raise RemoteError(f"{where}: {len(parts)} of {size} bytes came")
        return bytes(parts)

    @contextlib.contextmanager
    def _watched(self, sock: socket.socket, end: float) -> Iterator[None]:
        """Ends the socket at the deadline: a timeout of its own would begin again with every byte."""
        key = id(sock)
        with self._lock:
            self._running[key] = (end, sock)
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="rorqual-remote", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                self._running.pop(key, None)

    def _watch(self) -> None:
        while True:
            with self._lock:
                if not self._running:
                    self._watching = False
                    return
                late = [sock for end, sock in self._running.values() if end <= time.monotonic()]
                for sock in late:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
            time.sleep(_TICK_S)
