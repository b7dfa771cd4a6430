"""What `doctor` says of networks: one is tried, without leaving the host, and forwarding is looked at."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from rorqual.sandbox import host
from rorqual.sandbox._async.sandbox import AsyncSandbox
from rorqual.sandbox.errors import HostUnfit, SandboxError
from rorqual.sandbox.network.order import lacking
from rorqual.sandbox.network.policy import NetworkPolicy
from rorqual.sandbox.records import Check

_PROBE = """
import socket
try:
    print("resolved", socket.gethostbyname("doctor.invalid"))
except socket.gaierror as error:
    print(error.errno == socket.EAI_NONAME and "refused" or error)
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
    print("connected")
except ConnectionRefusedError:
    print("reset")
except OSError as error:
    print(error)
"""


async def check_network() -> list[Check]:
    """Two lines: whether a sandbox gets a network and its gateway answers, and whether its packets could go on."""
    problem = lacking()
    if problem is not None:
        return [_lacking(problem)]
    try:
        async with await AsyncSandbox.create(network=NetworkPolicy(), memory_mb=64, timeout=60) as sb:
            result = await sb.commands.run(["python3", "-c", _PROBE], timeout=30)
    except SandboxError as error:
        return [Check(name="network", ok=False, why=str(error), fix=getattr(error, "fix", ""))]
    ok = result.stdout.split() == ["refused", "reset"]
    why = "a sandbox asked its gateway for a name and an address, and was refused both"
    found = result.stdout.strip().replace("\n", ", ") or result.stderr.strip()[-200:]
    return [
        Check(
            name="network",
            ok=ok,
            why=why if ok else f"refused and reset were expected, it got: {found}",
            fix="",
        ),
        _forwarding(),
    ]


def _lacking(problem: HostUnfit) -> Check:
    return Check(name="network", ok=False, why=problem.what, fix=problem.fix)


def _forwarding() -> Check:
    name = "network: forwarding"
    routes = subprocess.run(
        [host.find_program("ip") or "ip", "-j", "-4", "route", "show", "default"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    devices = sorted({route["dev"] for route in json.loads(routes.stdout or "[]") if "dev" in route}) or [
        "all"
    ]
    for device in devices:
        flag = Path(f"/proc/sys/net/ipv4/conf/{device}/forwarding").read_text(encoding="ascii").strip()
        if flag != "1":
            return Check(
                name=name,
                ok=False,
                why=f"packets that come in by {device} are not forwarded: only policies that allow nothing work",
                fix=f"sysctl -w net.ipv4.conf.{device}.forwarding=1",
            )
    listed = subprocess.run(
        [host.find_program("nft") or "nft", "-j", "list", "chains"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    for item in json.loads(listed.stdout or "{}").get("nftables", []) if listed.returncode == 0 else []:
        chain = item.get("chain", {})
        if chain.get("hook") == "forward" and chain.get("policy") == "drop":
            where = f"{chain['family']} {chain['table']} {chain['name']}"
            rule = f"nft insert rule {where} {{}}"
            return Check(
                name=name,
                ok=False,
                why=f"the host's own chain {where!r} drops what is forwarded, unless a rule lets rqu* through",
                fix="; ".join(rule.format(f"{side} 'rqu*' accept") for side in ("iifname", "oifname")),
            )
    return Check(
        name=name, ok=True, why=f"{', '.join(devices)} forwards, and no chain of the host drops it", fix=""
    )
