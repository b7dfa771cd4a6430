"""Containers with a network, in the small Internet of internet.py: what they reach, and every way around it tried."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator

import pytest

from rorqual.sandbox import AsyncSandbox, InvalidRequest, LaunchFailed, NetworkPolicy, Sandbox, Unsupported
from tests.sandbox.internet import HOST, HOST_PRIVATE, NAMESERVER, World

PYTHON = r"""
import json, socket, sys, time
def connect(address, port, seconds=2.0):
    try:
        socket.create_connection((address, port), timeout=seconds).close()
        return "open"
    except OSError as error:
        return type(error).__name__
def resolve(name):
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        return str(error)
def ask(packet, server, port=53):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(2)
    try:
        s.connect((server, port))
        s.send(packet)
        return s.recv(4096)
    except OSError as error:
        return type(error).__name__.encode()
def query(name, kind=1, edns=False):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"
    extra = b"\0\0\x29\x04\xd0\0\0\0\0\0\x10\xfd\xe9\0\x0csecret-bytes" if edns else b""
    return b"\x12\x34\x01\0\0\x01\0\0\0\0\0" + bytes([bool(edns)]) + labels + bytes([0, kind, 0, 1]) + extra
def say(value):
    print(json.dumps(value))
"""


def python(box: Sandbox, code: str, *, timeout: float = 30.0) -> object:
    """The JSON that the code says inside."""
    result = box.commands.run(["python3", "-c", PYTHON + code], timeout=timeout)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def curl(box: Sandbox, *words: str) -> str:
    """Its standard output, or '!' and its exit status."""
    result = box.commands.run(["curl", "-sS", "-m", "8", *words], timeout=30)
    return result.stdout if result.exit_code == 0 else f"!{result.exit_code}"


def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


ALLOW = (
    "allowed.test",
    "*.wild.test:80",
    "alias.test",
    "stray.test",
    "rebind.test",
    "metadata.test",
    "half.test",
    "big.test",
)


@pytest.fixture
def box(world: World) -> Iterator[Sandbox]:
    with Sandbox.create(network=NetworkPolicy(allow=ALLOW)) as sandbox:
        yield sandbox


REFUSED, UNKNOWN = "!7", "!6"
"""curl's exit statuses: could not connect, could not resolve."""


def test_an_allowed_name_works_and_an_address_only_after_it_was_asked_for(box: Sandbox) -> None:
    assert curl(box, "http://93.184.216.34/") == REFUSED
    assert curl(box, "http://allowed.test/") == curl(box, "http://allowed.test:8000/") == "93.184.216.34"
    assert curl(box, "http://93.184.216.34/") == "93.184.216.34"
    assert python(box, "say(resolve('ALLOWED.test.'))") == "93.184.216.34"
    assert box.info().network == "custom"


def test_a_name_below_a_star_works_on_its_port_alone(box: Sandbox) -> None:
    assert curl(box, "http://www.wild.test/") == "93.184.216.35"
    assert curl(box, "http://www.wild.test:8000/") == REFUSED
    assert curl(box, "http://wild.test/") == UNKNOWN


def test_a_refused_name_never_leaves_and_is_in_the_log(box: Sandbox, world: World) -> None:
    before = len(world.queries())
    code = """
import random
names = ["%032x.%032x.evil.test" % (random.getrandbits(128), random.getrandbits(128)) for _ in range(40)]
say([resolve(name) for name in ["evil.test", "allowed.test.evil.test", *names]])
"""
    answers = python(box, code)
    assert isinstance(answers, list) and set(answers) == {"[Errno -2] Name or service not known"}
    assert world.queries()[before:] == []
    log = box.network_log()
    assert {"evil.test", "allowed.test.evil.test"} <= {
        event.what for event in log.events if event.kind == "dns"
    }
    assert log.counters["dns_refused"] >= 42 and all("policy" in event.reason for event in log.events)


def test_a_false_host_header_or_server_name_opens_nothing(box: Sandbox) -> None:
    assert curl(box, "http://allowed.test/") == "93.184.216.34"
    assert curl(box, "-H", "Host: allowed.test", "http://93.184.216.36/") == REFUSED
    assert curl(box, "-k", "--resolve", "allowed.test:443:93.184.216.36", "https://allowed.test/") == REFUSED
    assert curl(box, "--connect-to", "allowed.test:80:93.184.216.36:80", "http://allowed.test/") == REFUSED
    events = {event.what for event in box.network_log().events if event.kind == "address"}
    assert {"93.184.216.36:80/tcp", "93.184.216.36:443/tcp"} <= events


def test_an_alias_is_followed_and_records_beside_it_are_not(box: Sandbox) -> None:
    assert curl(box, "http://alias.test/") == "93.184.216.35"
    assert python(box, "say(resolve('far.cdn.test'))") == "[Errno -2] Name or service not known"
    assert curl(box, "http://stray.test/") == "93.184.216.34"
    assert curl(box, "http://93.184.216.36/") == REFUSED
    box.update_network(NetworkPolicy(allow=ALLOW, deny=["*.cdn.test"]))
    assert python(box, "say(resolve('alias.test'))") == "[Errno -2] Name or service not known"


def test_a_name_that_turns_inwards_is_refused(box: Sandbox, world: World) -> None:
    gone = "[Errno -2] Name or service not known"
    assert python(box, "say([resolve('rebind.test'), resolve('metadata.test'), resolve('half.test')])") == [
        gone,
        gone,
        "93.184.216.34",
    ]
    world.zone({"allowed.test": [f"A 0 {HOST}"], "www.wild.test": ["A 0 127.0.0.1"]})
    assert python(box, "say([resolve('allowed.test'), resolve('www.wild.test')])") == [gone, gone]
    reasons = {event.what: event.reason for event in box.network_log().events}
    assert "10.1.0.5 is protected" in reasons["rebind.test"] and "169.254.169.254" in reasons["metadata.test"]


def test_a_host_that_takes_an_address_is_not_reached_there(world: World) -> None:
    with Sandbox.create(network=NetworkPolicy(allow=["other.test"])) as box:
        assert curl(box, "http://other.test/") == "93.184.216.35"
        world.on_host("ip", "addr", "add", "93.184.216.35/32", "dev", "lan0")
        try:
            until(lambda: python(box, "say(connect('93.184.216.35', 8000))") != "open")
            assert curl(box, "http://other.test/") == UNKNOWN
        finally:
            world.on_host("ip", "addr", "del", "93.184.216.35/32", "dev", "lan0")
        until(lambda: curl(box, "http://other.test/") == "93.184.216.35")


def test_a_loop_of_aliases_is_an_error_and_no_more(world: World) -> None:
    with Sandbox.create(network=NetworkPolicy(allow=["loop.test", "allowed.test"])) as box:
        assert curl(box, "http://loop.test/") == UNKNOWN
        assert curl(box, "http://allowed.test/") == "93.184.216.34"
        assert any("no answer from upstream" in event.reason for event in box.network_log().events)


def test_dns_works_over_tcp_and_when_the_answer_is_large(box: Sandbox, world: World) -> None:
    code = """
import struct
def over_tcp(packet):
    s = socket.create_connection(("198.18.0.1", 53), timeout=5)
    s.sendall(struct.pack("!H", len(packet)) + packet)
    data = b""
    while len(data) < 2 or len(data) < 2 + struct.unpack("!H", data[:2])[0]:
        more = s.recv(65536)
        assert more
        data += more
    return data[2:]
udp, tcp = ask(query("big.test", 16), "198.18.0.1"), over_tcp(query("big.test", 16))
both = over_tcp(query("allowed.test"))
say([bool(udp[2] & 2), len(udp), len(tcp), bool(tcp[2] & 2), b"\\x5d\\xb8\\xd8\\x22" in both])
"""
    truncated, short, long, still, found = python(box, code)  # type: ignore[misc]
    assert truncated and short < 512 and long > 2000 and not still and found
    assert "big.test TXT tcp 0" in world.queries()  # our own way up fell back to TCP as well


def test_nothing_hidden_in_a_query_goes_up(box: Sandbox, world: World) -> None:
    before = len(world.queries())
    assert python(box, "say(len(ask(query('aLLoWeD.TeST', edns=True), '198.18.0.1')))") > 28  # type: ignore[operator]
    assert world.queries()[before:] == ["allowed.test A udp 0"]


def test_another_name_server_cannot_be_asked(box: Sandbox, world: World) -> None:
    assert curl(box, "http://allowed.test/") == "93.184.216.34"
    before = len(world.queries())
    code = f"""
say([ask(query("evil.test"), "{NAMESERVER}").decode(), ask(query("evil.test"), "93.184.216.34").decode(),
     connect("{NAMESERVER}", 53), connect("93.184.216.34", 53), connect("93.184.216.34", 853)])
"""
    assert set(python(box, code)) <= {"ConnectionRefusedError", "OSError", "TimeoutError"}  # type: ignore[call-overload]
    assert world.queries()[before:] == []


@pytest.mark.parametrize(
    "packet",
    ["b''", "b'x'", "b'\\0' * 12", "b'\\xff' * 512", "query('allowed.test')[:-3]", "bytes(range(256)) * 8"],
)
def test_a_malformed_query_does_no_harm(box: Sandbox, packet: str) -> None:
    python(
        box,
        f"s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto({packet}, ('198.18.0.1', 53)); say(0)",
    )
    assert python(box, "say(resolve('allowed.test'))") == "93.184.216.34"


def test_udp_goes_the_same_way(box: Sandbox) -> None:
    code = """
before = ask(b"hello", "93.184.216.34", 7).decode()
resolve("allowed.test")
say([before, ask(b"hello", "93.184.216.34", 7).decode(), ask(b"hello", "10.1.0.5", 7).decode()])
"""
    before, after, inside = python(box, code)  # type: ignore[misc]
    assert (
        before in ("OSError", "TimeoutError") and after == "hello" and inside in ("OSError", "TimeoutError")
    )


def test_other_types_are_answered_empty_or_refused(box: Sandbox) -> None:
    code = """
def rcode(kind):
    answer = ask(query("allowed.test", kind), "198.18.0.1")
    return [answer[3] & 15, answer[7]]
say([rcode(28), rcode(65), rcode(255), rcode(252)])
"""
    assert python(box, code) == [[0, 0], [0, 0], [3, 0], [3, 0]]


def test_an_address_closes_when_its_answer_has_run_out(world: World) -> None:
    with Sandbox.create(network=NetworkPolicy(allow=["short.test"])) as box:
        assert curl(box, "http://short.test/") == "93.184.216.35"
        until(lambda: curl(box, "http://93.184.216.35/") == REFUSED)
        assert curl(box, "http://short.test/") == "93.184.216.35"


CLOSED = (
    ("169.254.169.254", 80),
    ("10.1.0.5", 80),
    ("192.168.7.7", 8000),
    (HOST, 8000),
    (HOST, 22),
    (HOST_PRIVATE, 8000),
    (NAMESERVER, 8000),
    ("198.18.0.1", 22),
    ("198.18.0.1", 8000),
    ("198.19.0.1", 8000),
)


def test_even_open_does_not_reach_the_host_nor_private_nor_metadata_addresses(world: World) -> None:
    with Sandbox.create(network="open") as box:
        assert curl(box, "http://evil.test/") == curl(box, "http://93.184.216.36:8000/") == "93.184.216.36"
        uplink = world.on_host("ip", "-br", "-4", "addr").split("rqu")[1].split()[2].partition("/")[0]
        code = f"say([connect(a, p) for a, p in {[*CLOSED, (uplink, 8000)]!r}])"
        assert set(python(box, code)) == {"ConnectionRefusedError"}  # type: ignore[call-overload]
        scan = "say([port for port in range(1, 1024) if connect('198.18.0.1', port) == 'open'])"
        assert python(box, scan, timeout=60) == [53]
        scan = f"say([port for port in (*range(1, 400), 8000) if connect('{HOST}', port) == 'open'])"
        assert python(box, scan, timeout=60) == []
        events = [event for event in box.network_log().events if event.kind == "address"]
        assert len(events) <= 512 and any(event.what == "169.254.169.254:80/tcp" for event in events)


def test_what_is_allowed_by_cidr_is_reached_and_nothing_beside_it(world: World) -> None:
    policy = NetworkPolicy(allow=["10.1.0.0/24:80", f"{HOST}/32:8000"], deny=["10.1.0.6"])
    with Sandbox.create(network=policy) as box:
        assert curl(box, "http://10.1.0.5/") == "10.1.0.5"
        assert curl(box, "http://10.1.0.5:8000/") == REFUSED
        assert python(box, f"say([connect('{HOST}', 8000), connect('{HOST}', 22)])") == [
            "open",
            "ConnectionRefusedError",
        ]
        box.update_network(NetworkPolicy(allow=["10.1.0.0/24:80"], deny=["10.1.0.5"]))
        assert curl(box, "http://10.1.0.5/") == REFUSED
        box.update_network(
            NetworkPolicy(
                allow=["0.0.0.0/0", "10.1.0.0/16:80", "10.1.0.0/24", "10.1.0.0/24:80"],
                deny=["0.0.0.0/0:8000"],
            )
        )
        assert curl(box, "http://10.1.0.5/") == "10.1.0.5"  # by the network that names it
        assert curl(box, "http://93.184.216.36/") == "93.184.216.36"
        assert curl(box, "http://93.184.216.36:8000/") == curl(box, "http://10.1.0.5:8000/") == REFUSED
        for address, port in (("169.254.169.254", 80), ("192.168.7.7", 80), (HOST, 22), ("198.18.0.1", 22)):
            assert python(box, f"say(connect('{address}', {port}))") == "ConnectionRefusedError"


def test_there_are_no_raw_sockets_no_ipv6_and_no_way_to_change_the_interface(box: Sandbox) -> None:
    code = """
def kind(*words):
    try:
        socket.socket(*words).close()
        return "made"
    except OSError as error:
        return type(error).__name__
out = [kind(socket.AF_INET, socket.SOCK_RAW, 1), kind(socket.AF_PACKET, socket.SOCK_RAW, 3)]
try:
    s = socket.socket(socket.AF_INET6)
    s.settimeout(2)
    s.connect(("2001:db8::1", 80))
    out.append("open")
except OSError as error:
    out.append(type(error).__name__)
say(out + [open("/proc/net/if_inet6").read().count("eth0")])
"""
    for user in ("user", "root"):
        result = box.commands.run(["python3", "-c", PYTHON + code], user=user)
        raw, packet, six, addresses = json.loads(result.stdout)
        assert "made" not in (raw, packet) and six != "open" and addresses == 0, user
        assert not box.commands.run("ip addr add 198.18.0.9/16 dev eth0", user=user).ok
        assert not box.commands.run("ip link set eth0 down", user=user).ok


def test_sandboxes_do_not_reach_each_other(world: World) -> None:
    with Sandbox.create(network="open") as one, Sandbox.create(network="open") as two:
        server = one.commands.run("python3 -m http.server 9000", background=True)
        address = one.commands.run("hostname -I").stdout.split()[0]
        until(lambda: curl(one, f"http://{address}:9000/") != REFUSED)
        assert python(two, f"say(connect('{address}', 9000, 5))") in ("OSError", "TimeoutError")
        routed = f"ip route add {address} via 198.18.0.1"
        assert not two.commands.run(routed, user="root").ok
        server.kill()


def test_a_change_of_the_policy_cuts_open_connections_and_keeps_allowed_ones(world: World) -> None:
    with Sandbox.create(network=NetworkPolicy(allow=["allowed.test", "short.test"])) as box:
        keep = box.commands.run("exec timeout 60 curl -sSN http://short.test/hold > kept", background=True)
        cut = box.commands.run("exec timeout 60 curl -sSN http://allowed.test/hold > cut", background=True)

        def size(name: str) -> int:
            return int(box.commands.run(f"stat -c %s {name} 2>/dev/null || echo 0").stdout)

        until(lambda: size("kept") > 0 and size("cut") > 0)
        # short.test's answer runs out: new connections are refused, this one stays, also after the change
        until(lambda: curl(box, "http://93.184.216.35/") == REFUSED)
        box.update_network(NetworkPolicy(allow=["short.test:80", "other.test"]))
        assert cut.wait().exit_code in (52, 56)  # reset, or nothing more
        before = size("kept")
        until(lambda: size("kept") > before + 3)
        assert (
            curl(box, "http://allowed.test/") == UNKNOWN
            and curl(box, "http://other.test/") == "93.184.216.35"
        )
        box.update_network("offline")
        assert keep.wait().exit_code in (52, 56)
        kinds = [(entry.kind, entry.result) for entry in box.trajectory.list() if entry.kind == "network"]
        assert kinds == [("network", {"ok": True})] * 2 and box.info().network == "offline"


def test_a_sandbox_that_was_created_offline_has_nothing_to_change(runtime: str) -> None:
    with Sandbox.create() as box:
        with pytest.raises(Unsupported, match=r"NetworkPolicy\(\)"):
            box.update_network("open")
        with pytest.raises(Unsupported, match="offline"):
            box.network_log()
        assert box.commands.run("cat /proc/net/dev | grep -c :").stdout.strip() == "1"


def test_an_empty_policy_can_be_widened_and_a_wrong_one_changes_nothing(world: World) -> None:
    with Sandbox.create(network=NetworkPolicy()) as box:
        assert curl(box, "http://allowed.test/") == UNKNOWN
        with pytest.raises(InvalidRequest, match="not a host name"):
            box.update_network({"allow": ["a b"]})
        box.update_network({"allow": ["allowed.test"]})
        assert curl(box, "http://allowed.test/") == "93.184.216.34"
        (child,) = box.fork()
        with child:
            assert curl(child, "http://allowed.test/") == "93.184.216.34" and child.info().network == "custom"


def test_twenty_at_once(world: World) -> None:
    async def one(number: int) -> str:
        policy = NetworkPolicy(allow=["allowed.test"] if number % 2 else ["other.test"])
        async with await AsyncSandbox.create(network=policy, memory_mb=64) as box:
            words = "curl -s -m 20 http://allowed.test/; curl -s -m 20 http://other.test/"
            return (await box.commands.run(words, timeout=60)).stdout

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one(number) for number in range(20)))

    assert asyncio.run(all_of_them()) == ["93.184.216.35", "93.184.216.34"] * 10


def test_a_host_that_does_not_forward_is_told_how(world: World) -> None:
    world.configure(NAMESERVER, "203.0.113.9")  # another gateway, which has no uplink yet
    try:
        world.on_host("sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=0")
        with pytest.raises(
            LaunchFailed, match=r"does not forward.*sysctl -w net\.ipv4\.conf\.eth0\.forwarding=1"
        ):
            Sandbox.create(network="pypi")
        with Sandbox.create(network=NetworkPolicy()) as box:  # nothing to reach, nothing to forward
            assert curl(box, "http://allowed.test/") == UNKNOWN
    finally:
        world.on_host("sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=1")
        world.configure(NAMESERVER)


def test_a_namespace_that_is_not_there_is_named(world: World) -> None:
    before = world.namespace
    try:
        world.namespace = "/run/netns/no-such"
        world.configure(NAMESERVER)
        with pytest.raises(LaunchFailed, match=r"network\).*'/run/netns/no-such'"):
            Sandbox.create(network="pypi")
    finally:
        world.namespace = before
        world.configure(NAMESERVER)
