# ruff: noqa: F401, F811 - tests look at local files and take fixtures of test_guest.py
"""What a snapshot does to connections over vsock: they are reset, and the client goes on.

The agent is real, and so is its socket; between them sits what a VMM with vsock is for a client, "CONNECT port" and
then bytes, with a `reset` that cuts every connection. With Firecracker itself: test_firecracker_guest.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from rorqual.sandbox import _protocol as wire
from rorqual.sandbox._guest import GuestClient
from rorqual.sandbox._protocol import Type
from rorqual.sandbox.errors import GuestGone
from tests.sandbox.test_guest import HELLO, Agent, Raw, agent, binary, finish, junk_frame, sh, until


class Vmm:
    """Carries vsock over one Unix socket, to an agent's."""

    def __init__(self, agent: Path, place: Path) -> None:
        self.agent, self.place = agent, place
        self.address = f"vsock:{place}?port=1024"
        self.writers: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.taken = 0
        self.refuse = False
        self.cut_after = -1
        """Bytes from the agent after which everything is cut, once."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.writers.add(writer)
        assert await reader.readline() == b"CONNECT 1024\n"
        if not self.refuse:
            self.taken += 1
            back, forth = await asyncio.open_unix_connection(self.agent)
            self.writers.add(forth)
            writer.write(b"OK 1073741824\n")
            await asyncio.gather(self.carry(reader, forth, False), self.carry(back, writer, True))
            forth.close()
        writer.close()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 14):
                if counts and self.cut_after >= 0:
                    self.cut_after -= len(data)
                    if self.cut_after < 0:
                        self.reset()
                        return
                writer.write(data)
                await writer.drain()
        writer.close()

    def reset(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()


@pytest_asyncio.fixture
async def vmm(agent: Agent, tmp_path: Path) -> AsyncIterator[Vmm]:
    await until(agent.path.exists)
    made = Vmm(agent.path, tmp_path / "v.sock")
    server = await asyncio.start_unix_server(made.serve, made.place)
    async with server:
        yield made
        made.reset()
        await asyncio.wait(made.tasks, timeout=10) if made.tasks else None


@pytest_asyncio.fixture
async def client(vmm: Vmm) -> AsyncIterator[GuestClient]:
    async with await GuestClient.connect(vmm.address) as connected:
        yield connected


async def test_a_command_goes_on_across_a_reset(vmm: Vmm, client: GuestClient, tmp_path: Path) -> None:
    go = tmp_path / "go"
    running = await client.start(
        ["sh", "-c", f"echo one; echo err >&2; while [ ! -e {go} ]; do sleep 0.01; done; echo two; exit 3"]
    )
    events = running.events()
    assert {await anext(events), await anext(events)} == {("stdout", b"one\n"), ("stderr", b"err\n")}
    vmm.reset()
    await until(lambda: vmm.taken == 2)
    go.touch()
    assert await anext(events) == ("stdout", b"two\n")
    end = await running.wait()
    assert (end.exit_code, end.truncated, end.stdout_bytes) == (3, False, 8)
    assert (await sh(client, "echo on"))[0] == b"on\n"


async def test_no_byte_is_lost_or_doubled_by_resets_in_the_middle(vmm: Vmm, client: GuestClient) -> None:
    for after in (1, 13, 5_000, 100_000, 300_000):
        running = await client.start(["sh", "-c", "read x; seq 70000"], stdin=True)
        vmm.cut_after = after + 12  # the answer to the newline arrives
        with contextlib.suppress(GuestGone):
            await running.send_stdin(b"\n")
        out, _, end = await finish(running)
        assert out == b"".join(b"%d\n" % n for n in range(1, 70001)) and not end.truncated
    assert vmm.taken >= 6  # a busy agent may miss a dial


async def test_a_consumer_that_pauses_still_holds_the_command_back(vmm: Vmm, client: GuestClient) -> None:
    running = await client.start(["sh", "-c", "yes | head -c 3000000; echo end"], max_output=1 << 30)
    first = await anext(running.events())
    vmm.reset()
    await until(lambda: vmm.taken == 2)
    size = len(first[1])
    async for _, data in running.events():
        size += len(data)
    end = await running.wait()
    assert size + (3_000_004 - size if end.truncated else 0) == end.stdout_bytes == 3_000_004


async def test_a_connection_is_renewed_before_anything_is_lost_on_it(vmm: Vmm, client: GuestClient) -> None:
    running = await client.start(["sh", "-c", "echo one; read x; echo $x"], stdin=True)
    assert await anext(running.events()) == ("stdout", b"one\n")
    for _ in range(5):
        client.renew()
        assert (await sh(client, "echo on"))[0] == b"on\n"
    await running.send_stdin(b"two\n")
    assert [data async for _, data in running.events()] == [b"two\n"]
    assert vmm.taken >= 6  # a busy agent may miss a dial


async def test_a_connection_of_another_kind_stays(agent: Agent) -> None:
    async with await GuestClient.connect(agent.path) as client:
        client.renew()
        assert client.connected and await client.list() == []


async def test_a_call_under_way_says_that_its_fate_is_unknown(vmm: Vmm, client: GuestClient) -> None:
    cat = await client.start(["sleep", "100"], stdin=True)
    blocked = asyncio.create_task(cat.send_stdin(bytes(1 << 20)))  # more than a pipe takes, and nobody reads
    await asyncio.sleep(0.05)
    vmm.reset()
    with pytest.raises(GuestGone, match="whether this call was carried out is not known"):
        await blocked
    assert await cat.kill()
    assert (await cat.wait()).signal == 9


async def test_a_file_half_read_is_an_error_not_another_file(
    vmm: Vmm, client: GuestClient, tmp_path: Path
) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * 500_000)
    pieces = client.read_pieces(str(big), offset=0, limit=1 << 20)
    await anext(pieces)
    vmm.reset()
    await until(lambda: vmm.taken == 2)
    with pytest.raises(GuestGone):
        async for _ in pieces:
            pass
    assert await client.read_file(str(big)) == big.read_bytes()


async def test_calls_wait_for_the_new_connection(vmm: Vmm, client: GuestClient) -> None:
    vmm.refuse = True
    vmm.reset()
    await until(lambda: not client.connected)
    waiting = asyncio.create_task(sh(client, "echo late"))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    vmm.refuse = False
    assert (await waiting)[0] == b"late\n"


async def test_an_agent_that_never_comes_back_is_gone(
    vmm: Vmm, client: GuestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rorqual.sandbox._again.AGAIN_S", 0.2)
    running = await client.start(["sleep", "100"])
    vmm.refuse = True
    vmm.reset()
    with pytest.raises(GuestGone):
        await running.wait()
    with pytest.raises(GuestGone):
        await client.list()


async def test_another_agent_in_its_place_is_not_taken_for_it(
    vmm: Vmm,
    client: GuestClient,
    binary: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "other").mkdir()
    other = Agent(binary, tmp_path / "other")
    try:
        await until(other.path.exists)
        vmm.agent = other.path
        vmm.reset()
        async with asyncio.timeout(20):
            said = ""
            while "another guest agent" not in said:
                try:
                    await client.list()
                    await asyncio.sleep(0.01)
                except GuestGone as error:
                    said = str(error)
    finally:
        other.stop()


async def test_closing_while_it_connects_again_ends_at_once(vmm: Vmm) -> None:
    client = await GuestClient.connect(vmm.address)
    vmm.refuse = True
    vmm.reset()
    await until(lambda: not client.connected)
    await client.close()
    await client.close()


@pytest.mark.parametrize("bad", [b"", bytes(23), bytes(25)])
def test_a_malformed_resume_ends_the_connection(agent: Agent, bad: bytes) -> None:
    assert b"malformed RESUME" in Raw(agent.path).say(HELLO + junk_frame(Type.RESUME, 2, bad))


async def test_a_resume_that_lies_about_what_it_has_is_refused(agent: Agent) -> None:
    async with await GuestClient.connect(agent.path) as client:
        _, _, _ = await sh(client, "echo 12345")
        pid = (await client.list())[0].pid
    ask = wire.u32(pid) + wire.u32(1000)
    for have, answer in (
        (6, b"12345"),
        (0, b"12345"),
        (7, b"has not written as much"),
        (2**63, b"has not written"),
    ):
        said = Raw(agent.path).say(HELLO + junk_frame(Type.RESUME, 2, ask + wire.u64(have) + wire.u64(0)))
        assert (answer in said) == (have != 6), said
    gone = Raw(agent.path).say(HELLO + junk_frame(Type.RESUME, 2, wire.u32(999_999) + bytes(20)))
    assert b"no such command" in gone
