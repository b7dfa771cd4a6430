"""What is left of a network after every kind of end, and what a machine gets. In the small Internet of internet.py."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rorqual.sandbox import NetworkPolicy, Sandbox, SandboxEnded, Secret, prune, secret_url
from rorqual.sandbox.keeper.client import close_all
from rorqual.sandbox.limits import SandboxSpec
from rorqual.sandbox.network import namespaces
from rorqual.sandbox.network.addresses import MACHINE, MACHINE_GATEWAY, MACHINE_MAC
from rorqual.sandbox.network.order import Tap, network_order
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.substrates import substrate
from tests.sandbox.internet import World
from tests.sandbox.test_network import REFUSED, curl, until


def gateways(world: World) -> list[int]:
    """Processes that hold the world's host namespace from elsewhere: gateways."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if b"network.gateway" in words and world.namespace.encode() in words:
            found.append(int(place.name))
    return found


def clean(world: World) -> bool:
    return not gateways(world) and not world.uplinks() and not world.tables()


def test_nothing_is_left_when_the_client_is_done(world: World) -> None:
    close_all()
    until(lambda: clean(world))
    for _ in range(2):
        with Sandbox.create(network=NetworkPolicy(allow=["allowed.test"])) as box:
            assert curl(box, "http://allowed.test/") == "93.184.216.34"
            assert len(gateways(world)) == len(world.uplinks()) == 1
        close_all()
        until(lambda: clean(world))


def test_an_offline_sandbox_has_no_gateway(world: World) -> None:
    close_all()
    with Sandbox.create() as box:
        assert box.commands.run("true").ok
        assert clean(world)


def test_a_dead_sandbox_leaves_no_link_and_no_rule(world: World) -> None:
    with Sandbox.create(network=NetworkPolicy(allow=["allowed.test"])) as stays:
        (gateway,) = gateways(world)

        def links() -> int:
            words = ["nsenter", f"--net=/proc/{gateway}/ns/net", "ip", "-br", "link"]
            text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            return sum(line.startswith("s") for line in text.splitlines())

        def rules() -> int:
            words = ["nsenter", f"--net=/proc/{gateway}/ns/net", "nft", "list", "ruleset"]
            return len(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines())

        before = (links(), rules())
        with Sandbox.create(network=NetworkPolicy(allow=["allowed.test"], deny=["9.9.9.0/24"])) as box:
            assert curl(box, "http://allowed.test/") == "93.184.216.34"
            assert links() == before[0] + 1
        until(lambda: links() == before[0])
        # the names' set of conns may still hold the dead one's last connections
        until(lambda: rules() <= before[1] + 2)
        assert curl(stays, "http://allowed.test/") == "93.184.216.34"


def test_a_dead_gateway_ends_its_sandboxes_with_the_cause(world: World) -> None:
    with Sandbox.create() as offline:
        box = Sandbox.create(network=NetworkPolicy(allow=["allowed.test"]))
        try:
            for pid in gateways(world):
                os.kill(pid, signal.SIGKILL)
            until(lambda: box.cause is not None)
            assert box.cause == "infra"
            with pytest.raises(SandboxEnded, match="network gateway died"):
                box.commands.run("true")
        finally:
            box.kill()
        until(lambda: clean(world))
        assert offline.commands.run("true").ok
        with Sandbox.create(network=NetworkPolicy(allow=["allowed.test"])) as again:
            assert curl(again, "http://allowed.test/") == "93.184.216.34"


CLIENT = """
import sys, time
from rorqual.sandbox import NetworkPolicy, Sandbox, Secret
boxes = [
    Sandbox.create(network=NetworkPolicy(allow=["allowed.test"])),
    Sandbox.create(secrets={"A": Secret(host="api.test", value="0123456789")}),
]
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("whom", ["client", "keeper", "both"])
def test_kill_9_leaves_nothing(world: World, tmp_path: Path, whom: str) -> None:
    environ = {**os.environ, "RORQUAL_STATE": str(tmp_path / "state"), "XDG_CONFIG_HOME": str(world.config)}
    close_all()
    until(lambda: clean(world))
    client = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CLIENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environ,
    )
    try:
        assert client.stdout is not None
        client.stdout.readline()
        until(lambda: len(gateways(world)) == 1)
        keeper = int(Path(f"/proc/{gateways(world)[0]}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in {"client": [client.pid], "keeper": [keeper], "both": [keeper, client.pid]}[whom]:
            os.kill(pid, signal.SIGKILL)
        until(lambda: clean(world))
    finally:
        client.kill()
        client.wait()
        assert client.stdout is not None
        client.stdout.close()
    state = StateDir.from_environment(environ)
    prune(state=state)
    until(lambda: not any(state.sandboxes.iterdir()) and not any(state.keepers.iterdir()))
    state.keepers.rmdir()
    state.sandboxes.rmdir()
    state.run.rmdir()


def test_a_kept_sandbox_keeps_its_network_and_its_secrets(world: World) -> None:
    code = f"""
from rorqual.sandbox import NetworkPolicy, Sandbox, Secret
secret = Secret(host="api.test", value="0123456789abcdef", ca={world.ca!r})
policy = NetworkPolicy(allow=["allowed.test"])
box = Sandbox.create(network=policy, secrets={{"API": secret}}, keep=True, timeout=60)
print(box.id)
box.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    box = Sandbox.connect(done.stdout.strip())
    try:
        assert curl(box, "http://allowed.test/") == "93.184.216.34"
        assert '"at": "93.184.216.34"' in curl(box, secret_url("API") + "/echo")
        box.update_network("offline")
        assert curl(box, "http://93.184.216.34/") == REFUSED
    finally:
        box.kill()


class Wire(threading.Thread):
    """A VMM in little: carries frames between tap0 and a device of a guest with a kernel of its own kind."""

    def __init__(self, netns: str) -> None:
        super().__init__(daemon=True)
        self.guest = namespaces.new_namespace()
        vmm = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        self.tap = namespaces.inside(vmm, lambda: self.open(b"tap0"))
        os.close(vmm)
        self.device = namespaces.inside(self.guest, lambda: self.open(b"eth0"))
        self.stop, self.stopped = os.pipe()
        setup = (
            f"link set eth0 address {MACHINE_MAC}",
            f"addr add {MACHINE}/30 dev eth0",
            "link set eth0 up",
            f"route add default via {MACHINE_GATEWAY}",
        )
        namespaces.inside(self.guest, lambda: namespaces.ip(*setup))

    @staticmethod
    def open(name: bytes) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name, 0x1002))  # TUNSETIFF, IFF_TAP | IFF_NO_PI
        return fd

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self.tap, self.device, self.stop], [], [])
            if self.stop in ready:
                return
            for fd in ready:
                os.write(self.device if fd == self.tap else self.tap, os.read(fd, 65535))

    def do(self, *words: str) -> str:
        """A command in the guest: its output, or '!' and its exit status."""

        def work() -> str:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            return done.stdout if done.returncode == 0 else f"!{done.returncode}"

        return namespaces.inside(self.guest, work)

    def close(self) -> None:
        os.close(self.stopped)
        self.join(10)
        for fd in (self.tap, self.device, self.guest, self.stop):
            os.close(fd)


def test_a_machine_has_a_tap_behind_which_the_same_rules_hold(world: World) -> None:
    """The gateway is asked as the keeper asks it; behind the tap sits a kernel's own network stack."""
    from rorqual.sandbox.network.secret import vault

    secret = Secret(host="api.test", value="0123456789abcdef", ca=world.ca)
    vault.put("sb-machine", {"API": secret})
    spec = SandboxSpec(network=NetworkPolicy(allow=["allowed.test"]), secrets={"API": secret.public()})
    order = network_order(spec, sandbox_id="sb-machine", tap=Tap())
    vault.drop("sb-machine")
    assert order is not None
    ours, theirs = socket.socketpair()
    options = json.dumps({**order["gateway"]["options"], "keeper": os.getpid()})
    process = subprocess.Popen([*order["gateway"]["argv"], options], stdin=theirs)
    theirs.close()
    lines = ours.makefile("rw")

    def ask(op: str, **fields: object) -> dict[str, object]:
        lines.write(json.dumps({"id": 1, "op": op, "sandbox": "sb-machine", **fields}) + "\n")
        lines.flush()
        answer: dict[str, object] = json.loads(lines.readline())
        return answer

    try:
        assert json.loads(lines.readline()) == {"ready": True}
        made = ask("prepare", **{key: order[key] for key in ("policy", "secrets", "tap", "owner", "group")})
        guest = made["guest"]
        assert isinstance(guest, dict) and guest["address"] == MACHINE and guest["mac"] == MACHINE_MAC
        wire = Wire(str(made["netns"]))
        wire.start()
        try:
            name = "http://allowed.test/"
            resolve = "allowed.test:80:93.184.216.34"
            assert wire.do("curl", "-s", "-m", "5", "--resolve", resolve, name) == REFUSED
            code = (
                "import dns.message, dns.query\n"
                "q = dns.message.make_query({0!r}, 'A')\n"
                "print(dns.query.udp(q, '198.18.0.1', timeout=5).answer)\n"
            )
            python = [sys.executable, "-c"]
            assert "93.184.216.34" in wire.do(*python, code.format("allowed.test"))
            assert wire.do("curl", "-s", "-m", "5", "--resolve", resolve, name) == "93.184.216.34"
            assert wire.do(*python, code.format("evil.test")).strip() == "[]"
            assert wire.do("curl", "-s", "-m", "5", "http://10.1.0.5/") == REFUSED
            assert "0123456789" not in wire.do("curl", "-s", "-m", "5", secret_url("API") + "/echo") != "!28"
            assert wire.do("curl", "-s", "-m", "1", f"http://{MACHINE_GATEWAY}:8080/API/echo").startswith("!")
            # A machine is root of its own stack: another source address, raw packets, IPv6.
            lying = "import socket,struct\n" + LIAR
            assert wire.do(sys.executable, "-c", lying) == "nothing\n"
            ask("policy", policy={"name": "custom", "allow": [], "deny": []})
            assert wire.do("curl", "-s", "-m", "5", "--resolve", resolve, name) == REFUSED
            log = ask("log")
            rows = log["rows"]
            assert isinstance(rows, list) and {"10.1.0.5:80/tcp"} <= {row["what"] for row in rows}
        finally:
            wire.close()
        ask("drop")
    finally:
        lines.close()
        ours.close()
        process.wait(timeout=10)


def test_a_microvm_has_the_same_network(world: World) -> None:
    """Booted, with our agent in it; bash's own sockets stand for curl."""
    if "network:policy" not in substrate("microvm").capabilities():
        pytest.skip("no VMM here; rorqual doctor says why")

    def get(box: Sandbox, host: str, port: int = 80, path: str = "/") -> str:
        ask = f"printf 'GET {path} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' >&3; timeout 20 cat <&3"
        result = box.commands.run(
            ["bash", "-c", f"exec 3<>/dev/tcp/{host}/{port} || exit 1; {ask}"], timeout=60
        )
        return (
            result.stdout.rpartition("\r\n")[2] if result.ok else "!" + result.stderr.split(":")[-1].strip()
        )

    secrets = {"API": Secret(host="api.test", value="0123456789abcdef", format="Bearer {}", ca=world.ca)}
    policy = NetworkPolicy(allow=["allowed.test"])
    with Sandbox.create(substrate="microvm", network=policy, secrets=secrets, timeout=120) as box:
        assert get(box, "93.184.216.34") == "!Connection refused"
        assert get(box, "allowed.test") == "93.184.216.34"
        assert "Name or service not known" in box.commands.run("exec 3<>/dev/tcp/evil.test/80").stderr
        assert get(box, "169.254.169.254") == "!Connection refused"
        (child,) = box.fork()  # of its memory: it has the same addresses, and its connections start anew
        with child:
            assert get(child, "allowed.test") == "93.184.216.34"
            assert "Bearer ****" in get(child, "198.18.0.1", 8080, "/API/echo")
            child.update_network("offline")
            assert get(child, "93.184.216.34") == "!Connection refused"
        assert get(box, "allowed.test") == "93.184.216.34"
        assert '"authorization": "Bearer ****************"' in get(box, "198.18.0.1", 8080, "/API/echo")
        box.update_network("offline")
        assert get(box, "93.184.216.34") == "!Connection refused"
        assert {"evil.test", "169.254.169.254:80/tcp"} <= {event.what for event in box.network_log().events}


LIAR = """
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
def packet(source, destination, protocol, payload):
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 7, 0, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(destination))
    return head + payload
dns = b"\\x12\\x34\\x01\\0\\0\\x01\\0\\0\\0\\0\\0\\0\\x07allowed\\x04test\\0\\0\\x01\\0\\x01"
udp = struct.pack("!HHHH", 5353, 53, 8 + len(dns), 0) + dns
listen = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
listen.settimeout(1)
raw.sendto(packet("198.18.0.3", "198.18.0.1", 17, udp), ("198.18.0.1", 0))   # a neighbour's address
raw.sendto(packet("198.19.255.2", "93.184.216.34", 47, b"x" * 40), ("93.184.216.34", 0))   # GRE
raw.sendto(packet("198.19.255.2", "93.184.216.34", 1, b"\\x08\\0\\xf7\\xff\\0\\0\\0\\0"), ("93.184.216.34", 0))  # ping
try:
    print(listen.recv(100))
except TimeoutError:
    print("nothing")
"""
