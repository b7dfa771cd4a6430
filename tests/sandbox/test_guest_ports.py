# ruff: noqa: ASYNC240 -- tests look at local files
"""The agent's end of a virtio-serial port, natively and under the sanitizers: a raw terminal stands for the port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rorqual.sandbox import _protocol as wire
from rorqual.sandbox._dial import FLAG, PortCodec

SOURCE = Path(__file__).parents[2] / "native/guest"


class Port:
    """The host's end of one port of a running agent."""

    def __init__(self, folder: Path) -> None:
        self.master, self.slave = os.openpty()
        tty.setraw(self.slave)
        (folder / "ports/vport1p1").mkdir(parents=True)
        (folder / "ports/vport1p1/name").write_text("org.rorqual.agent.0\n")
        (folder / "ports/vport1p2").mkdir()
        (folder / "ports/vport1p2/name").write_text("somebody.else\n")
        (folder / "dev").mkdir()
        (folder / "dev/vport1p1").symlink_to(os.ttyname(self.slave))
        binary = folder / "agent"
        places = [f'-DPORTS_DIR="{folder}/ports"', f'-DDEVICES="{folder}/dev"']
        flags = ["-std=c11", "-g", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        sources = [str(path) for path in sorted(SOURCE.glob("*.c")) if path.name != "fuzz.c"]
        made = subprocess.run(
            ["cc", *flags, *places, "-o", binary, *sources], capture_output=True, text=True, check=False
        )
        if made.returncode and "sanitize" in made.stderr:
            pytest.skip("this compiler has no address sanitizer")
        assert not made.returncode, made.stderr
        self.process = subprocess.Popen(
            [binary, "--ports", "1"],
            env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
            stderr=subprocess.PIPE,
        )
        os.set_blocking(self.master, False)

    async def exchange(self, data: bytes, codec: PortCodec, enough: int) -> bytes:
        """Sends bytes as they are; what the agent has answered on this connection, at least so many bytes."""
        out = b""
        for _ in range(4000):
            if data:
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(self.master, data[:2048]) :]
            with contextlib.suppress(BlockingIOError):
                out += codec.decode(os.read(self.master, 1 << 16))
            if self.process.poll() is not None:
                raise AssertionError(self.process.communicate()[1].decode())
            if not data and len(out) >= enough:
                return out
            await asyncio.sleep(0.0005)
        raise AssertionError("no answer")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    if shutil.which("cc") is None:
        pytest.skip("apt-get install gcc libc6-dev")
    port = Port(tmp_path_factory.mktemp("ports"))
    yield port
    port.process.terminate()
    _, complaints = port.process.communicate(timeout=20)
    os.close(port.master)
    os.close(port.slave)
    assert port.process.returncode == 0 and not complaints, complaints.decode()


async def greeted(port: Port, before: bytes = b"") -> PortCodec:
    codec = PortCodec()
    hello = codec.greeting() + PortCodec.encode(wire.hello(1))
    answer = await port.exchange(before + hello, codec, 12)
    (frame,) = wire.Decoder().feed(answer)
    assert frame.type is wire.Type.WELCOME
    return codec


async def test_a_client_is_served(port: Port) -> None:
    codec = await greeted(port)
    stat = wire.frame(wire.Type.STAT, 2, wire.path("/etc/passwd"))
    (answer,) = wire.Decoder().feed(await port.exchange(PortCodec.encode(stat), codec, 30))
    assert answer.type is wire.Type.RESULT and wire.read_stat(answer).type == "file"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    left=st.lists(
        st.binary(max_size=300)
        | st.sampled_from(
            [FLAG, b"\x7d", b"\x7d\x7d", FLAG * 3, FLAG + b"0123456789abcdef", b"\x7d\x5e\x7d\x5d"]
        )
        | st.binary(max_size=60).map(PortCodec.encode),
        max_size=8,
    ).map(b"".join)
)
async def test_whatever_a_client_leaves_behind_the_next_one_is_served(port: Port, left: bytes) -> None:
    await greeted(port, left)


async def test_a_broken_protocol_ends_that_connection_with_a_flag(port: Port) -> None:
    codec = await greeted(port)
    os.write(port.master, PortCodec.encode(b"\xff" * 40))
    raw = b""
    for _ in range(4000):
        try:
            raw += os.read(port.master, 4096)
        except BlockingIOError:
            await asyncio.sleep(0.0005)
        if raw.endswith(FLAG):
            break
    (frame,) = wire.Decoder().feed(codec.decode(raw[:-1]))
    assert frame.type is wire.Type.ERROR and frame.id == 0
    await greeted(port)


async def test_a_flood_of_requests_that_nobody_reads_the_answers_of_costs_no_memory(port: Port) -> None:
    await greeted(port)
    requests = b"".join(
        PortCodec.encode(wire.frame(wire.Type.STAT, number, wire.path("/etc"))) for number in range(2, 20_000)
    )
    sent = 0
    for _ in range(200):
        try:
            sent += os.write(port.master, requests[sent : sent + 4096])
        except BlockingIOError:
            await asyncio.sleep(0.001)
    status = Path(f"/proc/{port.process.pid}/status").read_text()
    assert int(status.partition("VmRSS:")[2].split()[0]) < 200_000
    await greeted(port, requests[sent : sent + 5])
