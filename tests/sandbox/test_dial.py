"""Addresses of guest agents, and the language of a port: begun anew by each client, whatever the last one left."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.sandbox._dial import ESCAPE, FLAG, Address, PortCodec, PortsBusy, dial
from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox.errors import GuestGone, GuestProtocolError


def plain(encoded: bytes) -> bytes:
    """What the other end makes of it: written byte by byte, as native/guest/ports.c does."""
    out = bytearray()
    at = iter(encoded)
    for byte in at:
        assert byte != FLAG[0]
        out.append(next(at) ^ 0x20 if byte == ESCAPE[0] else byte)
    return bytes(out)


@given(st.binary(max_size=200) | st.lists(st.sampled_from(b"\x7d\x7e\x5d\x5e\x00"), max_size=60).map(bytes))
def test_a_port_carries_every_byte_and_never_the_flag(data: bytes) -> None:
    encoded = PortCodec.encode(data)
    assert FLAG not in encoded and plain(encoded) == data


@given(st.binary(max_size=300), st.integers(0, 2**32))
def test_the_client_drops_what_an_earlier_one_left_and_reads_its_own(data: bytes, seed: int) -> None:
    codec = PortCodec()
    left = b"half a frame \x7d" + FLAG + b"0123456789abcdef" + b"of another client"
    stream = left + codec.greeting() + PortCodec.encode(data)
    cuts = random.Random(seed)
    got = b""
    while stream:
        size = cuts.randint(1, 20)
        got += codec.decode(stream[:size])
        stream = stream[size:]
    assert got == data


@pytest.mark.parametrize(
    "forged", [FLAG + b"0" * 16, ESCAPE + b"\x00", ESCAPE + ESCAPE, b"a" + ESCAPE + b"b"]
)
def test_a_forged_port_is_refused(forged: bytes) -> None:
    codec = PortCodec()
    codec.decode(codec.greeting())
    with pytest.raises(GuestProtocolError):
        codec.decode(forged)


def test_a_guest_that_never_answers_costs_no_memory() -> None:
    codec = PortCodec()
    for _ in range(100):
        assert codec.decode(b"x" * 65536) == b""
    assert len(codec._held) < 32


@pytest.mark.parametrize(
    "text",
    [
        "tcp:/x",
        "unix:relative",
        "unix:/x?n=1",
        "ports:/x?n=8",
        "ports:/%d-%d?n=8",
        "ports:/x%s?n=8",
        "ports:/x%d",
        "ports:/x%d?n=0",
        "ports:/x%d?n=32",
        "vsock:/x",
        "vsock:/x?port=0",
        "vsock:/x?port=4294967295",
        "vsock:/x?port=1x",
        "",
    ],
)
def test_what_is_no_address_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="guest address"):
        Address.parse(text)


async def test_each_client_gets_a_port_of_its_own_and_a_dead_ones_is_free_again(tmp_path: Path) -> None:
    servers = [await asyncio.start_unix_server(lambda r, w: w.close(), tmp_path / f"p{n}") for n in range(2)]
    address = Address.parse(f"ports:{tmp_path}/p%d?n=2")
    first, second = await dial(address), await dial(address)
    with pytest.raises(PortsBusy, match="all 2 ports"):
        await dial(address)
    with pytest.raises(GuestGone, match="all 2 ports"):
        await GuestClient.connect(f"ports:{tmp_path}/p%d?n=2", timeout=0.2)
    second.close()
    third = await dial(address)
    assert third.lease >= 0 and first.lease >= 0
    first.close()
    third.close()
    for server in servers:
        server.close()
        await server.wait_closed()


async def test_a_taken_over_vmm_cannot_send_the_host_elsewhere_by_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "p0.lock").symlink_to(victim)
    with pytest.raises(OSError):
        await dial(Address.parse(f"ports:{tmp_path}/p%d?n=1"))
    assert not victim.exists()
    other = socket.socket(socket.AF_UNIX)
    other.bind(str(tmp_path / "other"))
    other.listen()
    os.unlink(tmp_path / "p0.lock")
    (tmp_path / "p0").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="not a socket"):
        await dial(Address.parse(f"ports:{tmp_path}/p%d?n=1"))
    other.close()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"OK 1073741824\nrest", None),
        (b"", ConnectionRefusedError),
        (b"NO\n", GuestProtocolError),
        (b"OK x\n", GuestProtocolError),
        (b"O" * 100, GuestProtocolError),
    ],
)
async def test_vsock_through_a_vmm(tmp_path: Path, answer: bytes, problem: type[Exception] | None) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "v.sock"):
        address = Address.parse(f"vsock:{tmp_path}/v.sock?port=1024")
        if problem is None:
            dialed = await dial(address)
            assert await asyncio.get_running_loop().sock_recv(dialed.sock, 100) == b"rest"
            dialed.close()
        else:
            with pytest.raises(problem):
                await dial(address)
    assert asked == [b"CONNECT 1024\n"]
