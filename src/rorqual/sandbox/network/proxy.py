"""The secret proxy: takes a request of a sandbox, adds the credential, and forwards it over TLS to that host alone.

`http://<gateway>:8080/<NAME>/<path>` becomes `https://<host>/<path>`. The credential is put into one header, over
whatever the sandbox sent under that name; it goes to the host the secret names, whose certificate is checked, and
nowhere else: no redirect is followed here. An answer that echoes the secret, in a header or in the body, has it
blacked out by asterisks of the same length (also base64 and percent-encoded), also across chunks; that an answer be
compressed is not asked for and not accepted. Bodies are streamed both ways. Parsing: h11. Never logs a header.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fnmatch
import functools
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import dns.exception
import h11

from rorqual.sandbox.network.addresses import GATEWAY, PROXY_PORT
from rorqual.sandbox.network.guests import Guest
from rorqual.sandbox.network.namespaces import Host

log = logging.getLogger(__name__)

TUNNELS = 64
"""Connections of one sandbox."""
CONNECT_S = 15.0
IDLE_S = 300.0
_CHUNK = 1 << 16
_HEADERS = 1 << 16
_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}


class Denied(Exception):
    """A request that is not forwarded: `status`, and a text that holds nothing secret."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Blackout:
    """Replaces the forms of a secret in a stream by asterisks. Holds back only what may be the start of one."""

    def __init__(self, value: str) -> None:
        raw = value.encode()
        forms = {
            raw,
            quote(value, safe="").encode(),
            base64.b64encode(raw),
            base64.b64encode(raw).rstrip(b"="),
            base64.urlsafe_b64encode(raw).rstrip(b"="),
            value.replace("\\", "\\\\").replace('"', '\\"').encode(),
        }
        self._forms = sorted(forms, key=len, reverse=True)
        self._held = b""

    def once(self, data: bytes) -> bytes:
        """A whole text."""
        for form in self._forms:
            data = data.replace(form, b"*" * len(form))
        return data

    def feed(self, data: bytes) -> bytes:
        data = self.once(self._held + data)
        keep = 0
        for form in self._forms:
            for size in range(min(len(form) - 1, len(data)), keep, -1):
                if data.endswith(form[:size]):
                    keep = size
                    break
        self._held = data[len(data) - keep :] if keep else b""
        return data[: len(data) - keep] if keep else data

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held


def check_path(target: str, paths: list[str]) -> None:
    """Raises Denied for a path outside `paths`, and for one that servers read in more than one way."""
    path = target.partition("?")[0]
    plain = unquote(path)
    if (
        "//" in path
        or "\\" in plain
        or any(part in (".", "..") for part in plain.split("/"))
        or "%2f" in path.lower()
    ):
        raise Denied(400, "the path holds '.', '..', '//', a backslash or an encoded slash")
    if paths and not any(
        fnmatch.fnmatchcase(plain, _escape(item)) if item.endswith("*") else plain == item for item in paths
    ):
        raise Denied(403, "the secret may not be used for this path")


def _escape(item: str) -> str:
    """Only the final '*' is a wildcard."""
    return re.sub(r"([\[?])", r"[\1]", item[:-1]).replace("*", "[*]") + "*"


class SecretProxy:
    """Serves every sandbox of one gateway."""

    def __init__(
        self,
        host: Host,
        *,
        guests: Callable[[str], Guest | None],
        resolve: Callable[[str], Awaitable[list[str]]] | None,
    ) -> None:
        """resolve: addresses of a host's name; None: as the host itself finds them."""
        self._host = host
        self._guest = guests
        self._resolve = resolve
        self._server: asyncio.Server | None = None
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, address: str = "0.0.0.0", port: int = PROXY_PORT) -> None:
        """Listens in the namespace of the calling thread."""
        self._server = await asyncio.start_server(
            self._client, address, port, family=socket.AF_INET, limit=_CHUNK
        )

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        peer = writer.get_extra_info("peername")
        guest = self._guest(peer[0]) if peer else None
        try:
            if guest is not None and guest.tunnels < TUNNELS:
                guest.tunnels += 1
                try:
                    await _Exchange(self, guest, reader, writer).serve()
                finally:
                    guest.tunnels -= 1
        except (OSError, TimeoutError, h11.ProtocolError):
            pass  # the sandbox hung up, was idle, or spoke something else than HTTP
        finally:
            writer.close()

    async def connect(self, secret: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A TLS connection to the secret's host, its certificate checked. Raises Denied."""
        loop = asyncio.get_running_loop()
        name, port = secret["host"], secret["port"]
        try:
            context = self._contexts.get(secret["ca"])
            if context is None:
                context = self._contexts[secret["ca"]] = ssl.create_default_context(
                    cafile=secret["ca"] or None
                )
            async with asyncio.timeout(CONNECT_S):
                addresses = [name] if self._resolve is None else (await self._resolve(name))[:4]
                found = [
                    item
                    for address in addresses
                    for item in await loop.run_in_executor(
                        self._host.pool,
                        functools.partial(socket.getaddrinfo, address, port, type=socket.SOCK_STREAM),
                    )
                ]
                error: OSError = OSError("no address")
                for family, kind, _, _, address in found[:4]:
                    make = functools.partial(socket.socket, family, kind | socket.SOCK_NONBLOCK)
                    sock = await loop.run_in_executor(self._host.pool, make)
                    try:
                        await loop.sock_connect(sock, address)
                        return await asyncio.open_connection(
                            sock=sock, ssl=context, server_hostname=name, limit=_CHUNK
                        )
                    except OSError as problem:  # ssl.SSLError is one
                        sock.close()
                        error = problem
                raise error
        except TimeoutError:
            raise Denied(504, f"{name} did not answer in {CONNECT_S:g} s") from None
        except (OSError, dns.exception.DNSException) as error:
            log.warning("a secret's host cannot be reached", extra={"host": name, "reason": str(error)})
            raise Denied(502, f"{name} cannot be reached: {type(error).__name__}") from None


class _Exchange:
    """One connection of a sandbox: requests one after the other."""

    def __init__(
        self, proxy: SecretProxy, guest: Guest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.proxy, self.guest, self.reader, self.writer = proxy, guest, reader, writer
        self.down = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEADERS)

    async def serve(self) -> None:
        while True:
            try:
                request = await _event(self.down, self.reader)
                if not isinstance(request, h11.Request):
                    return
                try:
                    await self._forward(request)
                except Denied as error:
                    await self._deny(request, error)
                    return
            except h11.RemoteProtocolError as error:
                await self._plain(error.error_status_hint or 400, "this is not HTTP/1.1")
                return
            if self.down.our_state is not h11.DONE or self.down.their_state is not h11.DONE:
                return
            self.down.start_next_cycle()

    async def _deny(self, request: h11.Request, error: Denied) -> None:
        target = request.target.decode("latin-1")
        self.guest.secret_refused += 1
        what = f"{request.method.decode('latin-1')} {target.partition('?')[0]}"
        self.guest.events.note("secret", what, str(error))
        if self.down.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._plain(error.status, str(error))

    async def _plain(self, status: int, text: str) -> None:
        body = f"rorqual: {text}\n".encode()
        headers = [
            ("content-type", "text/plain"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):
            self._send(h11.Response(status_code=status, headers=headers))
            self._send(h11.Data(data=body))
            self._send(h11.EndOfMessage())
            await self._drain()

    def _send(self, event: Any) -> None:
        data = self.down.send(event)
        if data:
            self.writer.write(data)

    async def _drain(self) -> None:
        async with asyncio.timeout(IDLE_S):
            await self.writer.drain()

    def _target(self, request: h11.Request) -> tuple[dict[str, Any], str, str]:
        """(the secret, its name, the target for the host). Raises Denied."""
        text = request.target.decode("latin-1")
        if text.startswith("http://"):  # asked as a proxy
            parts = urlsplit(text)
            text = parts.path + (f"?{parts.query}" if parts.query else "")
        head, _, rest = text.removeprefix("/").partition("/")
        name, mark, query = head.partition("?")
        target = "/" + rest + mark + query
        secret = self.guest.secrets.get(name)
        if secret is None:
            have = ", ".join(sorted(self.guest.secrets)) or "none"
            raise Denied(404, f"this sandbox has no such secret (it has: {have})")
        method = request.method.decode("latin-1").upper()
        if method in ("CONNECT", "TRACE") or (secret["methods"] and method not in secret["methods"]):
            raise Denied(405, f"the secret may not be used for {method}")
        check_path(target, secret["paths"])
        framing = {bytes(key) for key, _ in request.headers} & {b"content-length", b"transfer-encoding"}
        if len(framing) == 2:  # h11 believes the one, the host might believe the other
            raise Denied(400, "the request has both Content-Length and Transfer-Encoding")
        return secret, name, target

    async def _forward(self, request: h11.Request) -> None:
        secret, name, target = self._target(request)
        headers = _request_headers(request, secret)
        sized = next((value for key, value in headers if key == b"content-length"), b"0")
        if int(sized) > secret["max_body"]:
            raise Denied(413, f"the body is larger than {secret['max_body']} bytes")
        self.guest.secret_requests += 1
        reader, writer = await self.proxy.connect(secret)
        try:
            up = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADERS)
            writer.write(
                up.send(h11.Request(method=request.method, target=target.encode("latin-1"), headers=headers))
                or b""
            )
            sending = asyncio.create_task(self._upload(up, writer, secret["max_body"]))
            try:
                response = await self._response(up, reader, sending)
                await self._download(up, reader, response, secret, name)
            except h11.RemoteProtocolError:
                raise Denied(502, f"{secret['host']} did not answer in HTTP/1.1") from None
            except TimeoutError:
                raise Denied(504, f"{secret['host']} was silent for {IDLE_S:g} s") from None
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await sending
        finally:
            writer.close()

    async def _upload(self, up: h11.Connection, writer: asyncio.StreamWriter, max_body: int) -> None:
        sent = 0
        while True:
            if self.down.they_are_waiting_for_100_continue:
                self._send(h11.InformationalResponse(status_code=100, headers=[]))
                await self._drain()
            event = await _event(self.down, self.reader)
            if isinstance(event, h11.Data):
                sent += len(event.data)
                if sent > max_body:
                    raise Denied(413, f"the body is larger than {max_body} bytes")
                writer.write(up.send(event) or b"")
            elif isinstance(event, h11.EndOfMessage):
                writer.write(up.send(h11.EndOfMessage()) or b"")  # its trailers stay behind
                await writer.drain()
                return
            else:
                raise OSError("the sandbox hung up")
            async with asyncio.timeout(IDLE_S):
                await writer.drain()

    async def _response(
        self, up: h11.Connection, reader: asyncio.StreamReader, sending: asyncio.Task[None]
    ) -> h11.Response:
        """The head of the host's answer; an upload that is refused meanwhile ends the wait."""
        while True:
            waiting = asyncio.create_task(_event(up, reader))
            try:
                await asyncio.wait(
                    {waiting, sending} - ({sending} if sending.done() else set()),
                    return_when="FIRST_COMPLETED",
                )
                if (
                    sending.done()
                    and not sending.cancelled()
                    and isinstance(sending.exception(), Denied | OSError)
                ):
                    problem = sending.exception()
                    assert problem is not None
                    raise problem
                event = await waiting
            finally:
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await waiting
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("no response")

    async def _download(
        self,
        up: h11.Connection,
        reader: asyncio.StreamReader,
        response: h11.Response,
        secret: dict[str, Any],
        name: str,
    ) -> None:
        blackout = Blackout(secret["value"])
        encoding = next((value for key, value in response.headers if key == b"content-encoding"), b"identity")
        if encoding.strip().lower() not in (b"identity", b""):
            raise Denied(502, f"{secret['host']} answered compressed, which was not asked for")
        headers = [
            (key, blackout.once(_location(value, secret, name) if key == b"location" else value))
            for key, value in response.headers
            if key not in _dropped(response.headers)
        ]
        self._send(
            h11.Response(
                status_code=response.status_code, headers=headers, reason=blackout.once(response.reason)
            )
        )
        while True:
            event = await _event(up, reader)
            if isinstance(event, h11.Data):
                data = blackout.feed(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                data = blackout.rest()
            else:
                raise OSError("the host hung up")
            if data:
                self._send(h11.Data(data=data))
            if isinstance(event, h11.EndOfMessage):
                self._send(h11.EndOfMessage())
            await self._drain()
            if isinstance(event, h11.EndOfMessage):
                return


async def _event(connection: h11.Connection, reader: asyncio.StreamReader) -> Any:
    """The next event, read as far as needed. Raises TimeoutError after IDLE_S, h11.RemoteProtocolError."""
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return event
        async with asyncio.timeout(IDLE_S):
            connection.receive_data(await reader.read(_CHUNK))


def _dropped(headers: Any) -> set[bytes]:
    """Hop-by-hop headers: the standard ones, and those that Connection names (RFC 9110, 7.6.1)."""
    named = {
        word.strip().lower()
        for key, value in headers
        if key == b"connection"
        for word in bytes(value).split(b",")
    }
    return _HOP - {b"transfer-encoding"} | named


def _request_headers(request: h11.Request, secret: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    own = secret["header"].lower().encode()
    dropped = _dropped(request.headers) | {b"host", b"accept-encoding", b"expect", own}
    kept = [(bytes(key), bytes(value)) for key, value in request.headers if key not in dropped]
    host = secret["host"] if secret["port"] == 443 else f"{secret['host']}:{secret['port']}"
    return [
        (b"host", host.encode()),
        (own, secret["format"].replace("{}", secret["value"]).encode()),
        (b"accept-encoding", b"identity"),
        (b"connection", b"close"),
        *kept,
    ]


def _location(value: bytes, secret: dict[str, Any], name: str) -> bytes:
    """A redirect to the same host stays with the proxy; any other goes out as it is, and without the credential."""
    host = secret["host"] if secret["port"] == 443 else f"{secret['host']}:{secret['port']}"
    origin = f"https://{host}/".encode()
    here = f"http://{GATEWAY}:{PROXY_PORT}/{name}/".encode()
    if value.startswith(origin):
        return here + value[len(origin) :]
    return here + value[1:] if value.startswith(b"/") and not value.startswith(b"//") else value
