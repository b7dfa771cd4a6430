"""Ports and metrics of real sandboxes: bytes arrive whole both ways, buffers are bounded, ends are seen."""

# ruff: noqa: ASYNC110 -- tests wait for conditions inside

from __future__ import annotations

import asyncio
import hashlib
import http.client
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from rorqual.sandbox import AsyncSandbox, InvalidRequest, Sandbox, SandboxEnded
from rorqual.sandbox import _protocol as wire
from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox._guest_tcp import WINDOW
from rorqual.sandbox._protocol import Type
from rorqual.sandbox.errors import GuestProtocolError

SERVER = """
import hashlib, socketserver, sys
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        verb = self.request.recv(5)
        if verb == b"hash\\n":      # reads to the end, answers once
            seen, total = hashlib.sha256(), 0
            while data := self.request.recv(1 << 16):
                seen.update(data); total += len(data)
            self.request.sendall(f"{total} {seen.hexdigest()}".encode())
        elif verb == b"send\\n":    # sends 8 MB
            for n in range(128): self.request.sendall(bytes([n]) * 65536)
        elif verb == b"flood":      # never stops
            try:
                while True: self.request.sendall(bytes(65536))
            except OSError: open("/tmp/flooded", "w").close()
        elif verb == b"reset":
            import socket, struct
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()
        elif verb == b"sleep":
            import time; time.sleep(1000)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128
Server((sys.argv[1], 8080), Handler).serve_forever()
"""


@pytest.fixture
async def sb(runtime: str) -> AsyncIterator[AsyncSandbox]:
    async with await AsyncSandbox.create(memory_mb=256) as sandbox:
        await sandbox.files.write("server.py", SERVER)
        yield sandbox


async def serve(sb: AsyncSandbox, host: str = "127.0.0.1") -> None:
    await sb.commands.run(f"python3 server.py {host}", background=True, timeout=None)
    async with asyncio.timeout(20):
        while True:
            try:
                await (await sb.ports.connect(8080)).close()
                return
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)


async def everything(read: Callable[[], object]) -> bytes:
    data = b""
    while piece := await read():  # type: ignore[misc]
        data += piece
    return data


async def test_bytes_arrive_whole_both_ways_without_any_network(sb: AsyncSandbox) -> None:
    await serve(sb)
    data = bytes(range(256)) * 12_000
    async with await sb.ports.connect(8080) as stream:
        await stream.write(b"hash\n" + data)
        await stream.write_eof()
        expected = f"{len(data)} {hashlib.sha256(data).hexdigest()}"
        assert (await everything(stream.read)).decode() == expected
    async with await sb.ports.connect(8080) as stream:
        await stream.write(b"send\n")
        assert await everything(stream.read) == b"".join(bytes([n]) * 65536 for n in range(128))
    async with await sb.ports.connect(8080) as stream:
        await stream.write(b"reset")
        with pytest.raises(ConnectionResetError):
            await stream.read()
    assert (await sb.info()).network == "offline"


async def test_a_forward_serves_many_connections_and_ends_with_its_block(sb: AsyncSandbox) -> None:
    await serve(sb)

    async def fetch(number: int) -> str:
        reader, writer = await asyncio.open_connection(*address)
        data = str(number).encode() * 30_000
        writer.write(b"hash\n" + data)
        writer.write_eof()
        answer = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        return (answer.partition(" ")[2] == hashlib.sha256(data).hexdigest() and "same") or answer

    async with sb.ports.forward(8080) as address:
        assert address.host == "127.0.0.1" and address.url == f"http://127.0.0.1:{address.port}"
        assert await asyncio.gather(*[fetch(number) for number in range(100)]) == ["same"] * 100
        with pytest.raises(OSError, match="in use"):
            await sb.ports.forward(8080, local_port=address.port).start()
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"sleep")
    with pytest.raises(ConnectionResetError):  # what was open has ended
        await reader.read()
    writer.close()
    with pytest.raises(OSError):
        await asyncio.open_connection(*address)


async def test_nobody_behind_a_port_is_a_refusal(sb: AsyncSandbox) -> None:
    with pytest.raises(ConnectionRefusedError, match="nobody listens"):
        await sb.ports.connect(8081)
    async with sb.ports.forward(8081) as address:
        reader, writer = await asyncio.open_connection(*address)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
    for wrong in (0, 65536, True, "80"):
        with pytest.raises(InvalidRequest, match="port"):
            await sb.ports.connect(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="port"):
            sb.ports.forward(wrong)  # type: ignore[arg-type]


async def test_a_server_on_the_other_loopback_is_found(sb: AsyncSandbox) -> None:
    await sb.files.write("server.py", SERVER.replace("class Server(", "import socket\nclass Server(").replace(
        "allow_reuse_address", "address_family = socket.AF_INET6; allow_reuse_address"
    ))  # fmt: skip
    await serve(sb, "::1")


async def test_who_does_not_read_holds_the_sender_back_and_hanging_up_is_felt(sb: AsyncSandbox) -> None:
    await serve(sb)
    stream = await sb.ports.connect(8080)
    await stream.write(b"flood")
    inner = stream._stream
    async with asyncio.timeout(20):
        while inner._credit:
            await asyncio.sleep(0.01)
    assert sum(len(chunk) for chunk in inner._chunks) == WINDOW
    assert (await sb.commands.run("echo meanwhile")).stdout == "meanwhile\n"
    await stream.close()
    await stream.close()
    async with asyncio.timeout(20):
        while not await sb.files.exists("/tmp/flooded"):
            await asyncio.sleep(0.02)


async def test_connections_are_counted_and_a_full_agent_refuses(sb: AsyncSandbox) -> None:
    await serve(sb)
    streams = [await sb.ports.connect(8080) for _ in range(256)]
    with pytest.raises(ConnectionError, match="256"):
        await sb.ports.connect(8080)
    await asyncio.gather(*[stream.close() for stream in streams])
    await (await sb.ports.connect(8080)).close()


async def test_the_end_of_the_sandbox_ends_its_connections(sb: AsyncSandbox) -> None:
    await serve(sb)
    stream = await sb.ports.connect(8080)
    await stream.write(b"sleep")
    reading = asyncio.create_task(stream.read())
    async with sb.ports.forward(8080) as address:
        _, writer = await asyncio.open_connection(*address)
        await sb.kill()
        with pytest.raises(SandboxEnded, match="killed"):
            await reading
        with pytest.raises(SandboxEnded, match="killed"):
            await sb.ports.connect(8080)
        writer.close()


@pytest.mark.parametrize(
    "lie",
    [
        wire.frame(Type.TCP_DATA, 9, b"x"),
        wire.frame(Type.RESULT, 2) + wire.frame(Type.TCP_DATA, 2, b""),
        wire.frame(Type.RESULT, 2) + b"".join(wire.frame(Type.TCP_DATA, 2, bytes(60_000)) for _ in range(10)),
        wire.frame(Type.RESULT, 2) + wire.frame(Type.TCP_END, 2, b"\0"),
        wire.frame(Type.RESULT, 2) + wire.frame(Type.TCP_END, 2, bytes(4)) * 2,
        wire.frame(Type.RESULT, 2)
        + wire.frame(Type.TCP_END, 2, bytes(4))
        + wire.frame(Type.TCP_DATA, 2, b"x"),
    ],
)
async def test_a_guest_that_lies_about_a_port_is_hung_up_on(tmp_path: Path, lie: bytes) -> None:
    async def forge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        welcome = wire.u32(wire.MAGIC) + wire.u16(1) + wire.u32(1) + bytes(16) + wire.string("forged", "")
        writer.write(wire.frame(Type.WELCOME, 1, welcome))
        await reader.read(1000)
        writer.write(lie)
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(forge, tmp_path / "forged")
    async with server, await GuestClient.connect(tmp_path / "forged") as client:
        with pytest.raises(GuestProtocolError):
            async with asyncio.timeout(20):
                stream = await client.tcp_open(80)
                while client._error is None:
                    await asyncio.sleep(0.001)
                while True:
                    await stream.read()


def test_the_synchronous_twin_forwards(runtime: str) -> None:
    with Sandbox.create(memory_mb=128) as sb:
        sb.files.write("index.html", "hello")
        sb.commands.run("python3 -m http.server 8000", background=True, timeout=None)
        sb.commands.run("until exec 3<>/dev/tcp/127.0.0.1/8000; do sleep 0.02; done 2>/dev/null", timeout=20)
        with sb.ports.forward(8000) as address:
            connection = http.client.HTTPConnection(*address, timeout=20)
            connection.request("GET", "/index.html")
            assert connection.getresponse().read() == b"hello"
            connection.close()
        with sb.ports.connect(8000) as stream:
            stream.write(b"GET /index.html HTTP/1.0\r\n\r\n")
            answer = b""
            while piece := stream.read():
                answer += piece
            assert answer.endswith(b"\r\n\r\nhello")


# -- metrics ------------------------------------------------------------------------------------------------


async def test_metrics_say_what_is_used(runtime: str) -> None:
    async with await AsyncSandbox.create(memory_mb=200, disk_mb=64) as sb:
        before = await sb.metrics()
        await sb.commands.run(
            "head -c 20000000 /dev/zero > filled; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"
        )
        await sb.commands.run("echo 12345; echo 678 >&2")
        await sb.commands.run("sleep 1000", background=True, timeout=None)
        after = await sb.metrics()
        assert after.cpu_seconds > before.cpu_seconds > 0 and after.pids == before.pids + 1
        assert after.memory_bytes > before.memory_bytes and after.memory_limit_bytes == 200 << 20
        assert after.output_bytes == 10 and before.output_bytes == 0
        assert after.network_received_bytes is after.network_sent_bytes is None
        assert after.disk_bytes is not None and before.disk_bytes is not None
        assert 20_000_000 <= after.disk_bytes - before.disk_bytes < 21_000_000
        if "cgroup" in (await sb.info()).limits["memory"]:
            assert after.memory_peak_bytes is not None and after.memory_peak_bytes >= after.memory_bytes - (
                1 << 20
            )
            assert after.oom_kills == 0
            await sb.commands.run("python3 -c 'bytearray(400 << 20)'")
            assert (await sb.metrics()).oom_kills == 1
    with pytest.raises(SandboxEnded):
        await sb.metrics()
