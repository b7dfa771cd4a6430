"""A NoCloud seed: the little disk labelled `cidata` that cloud-init in a guest reads at its first boot.

    user-data     cloud-config: user, ssh keys, host name, files, commands; and our guest agent, as a service
    meta-data     instance-id (the sandbox's), local-hostname
    network-config    the machine's address, or that there is no network

So any cloud image of any maker gets our agent without being touched. YAML is written as JSON, which it contains.
Source: cloud-init's documentation, NoCloud and "Module reference". xorriso makes the ISO.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rorqual.sandbox.errors import HostUnfit, InvalidRequest, SandboxError
from rorqual.sandbox.host import find_program
from rorqual.sandbox.machines.agent_service import agent_files
from rorqual.sandbox.network.addresses import GATEWAY, MACHINE, MACHINE_GATEWAY, MACHINE_MAC, MACHINE_PREFIX

FIELDS = {"user", "password", "ssh_keys", "hostname", "files", "runcmd", "packages", "agent", "user_data"}
_START = "systemctl daemon-reload; udevadm control --reload; systemctl start --no-block rorqual-guest"
# runcmd comes last, in an emulated guest a minute or more after the files: so somebody waits for the last of those.
_START_EARLY = (
    "systemd-run --no-block sh -c 'n=0; until [ -s /etc/udev/rules.d/80-rorqual-guest.rules ]; do n=$((n+1)); "
    f"[ $n -gt 600 ] && exit; sleep 1; done; {_START}'"
)
_HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


def check(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The checked request of `create(cloud_init=...)`.

    user: name of the account made, with sudo ('user'). password: for it and the console; None: no password login.
    ssh_keys: lines for authorized_keys. hostname. files: {absolute path: text}. runcmd: shell lines, run once at the
    end of the first boot. packages: installed by the guest, which needs a network. agent: install our guest agent.
    user_data: a whole user-data document of your own, instead of all of the above.
    Raises InvalidRequest.
    """
    unknown = set(wanted) - FIELDS
    if unknown:
        raise InvalidRequest(
            f"cloud_init: {sorted(unknown)} is not known; there are {', '.join(sorted(FIELDS))}"
        )
    own = wanted.get("user_data")
    if own is not None and (not isinstance(own, str) or len(wanted) > 1):
        raise InvalidRequest("cloud_init: user_data must be a text, and stand alone")
    result: dict[str, Any] = {"user": "user", "hostname": "sandbox", "agent": True, **wanted}
    if not isinstance(result["user"], str) or not _USER.fullmatch(result["user"]):
        raise InvalidRequest(f"cloud_init: user {result['user']!r} is not a user name")
    if not isinstance(result["hostname"], str) or not _HOST.fullmatch(result["hostname"]):
        raise InvalidRequest(f"cloud_init: hostname {result['hostname']!r} is not a host name")
    if not isinstance(result["agent"], bool):
        raise InvalidRequest("cloud_init: agent must be True or False")
    for name in ("ssh_keys", "runcmd", "packages"):
        value = result.get(name, [])
        if isinstance(value, str) or not all(isinstance(item, str) and "\0" not in item for item in value):
            raise InvalidRequest(f"cloud_init: {name} must be a list of texts")
        result[name] = list(value)
    files = result.get("files", {})
    if not isinstance(files, Mapping) or not all(
        isinstance(path, str) and path.startswith("/") and isinstance(text, str)
        for path, text in files.items()
    ):
        raise InvalidRequest("cloud_init: files must map absolute paths to texts")
    password = result.get("password")
    if password is not None and (not isinstance(password, str) or not password or "\n" in password):
        raise InvalidRequest("cloud_init: password must be a text of one line")
    result["files"] = dict(files)
    return result


def user_data(request: Mapping[str, Any]) -> str:
    """The document. Raises HostUnfit: the agent is wanted and not built."""
    if request.get("user_data") is not None:
        return str(request["user_data"])
    account: dict[str, Any] = {
        "name": request["user"],
        "shell": "/bin/bash",
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
        "lock_passwd": request.get("password") is None,
        "ssh_authorized_keys": request["ssh_keys"],
    }
    files = [
        {"path": path, "content": base64.b64encode(text.encode()).decode(), "encoding": "b64"}
        for path, text in request["files"].items()
    ]
    commands: list[Any] = list(request["runcmd"])
    if request["agent"]:
        for path, (mode, data) in agent_files().items():
            content = base64.b64encode(data).decode()
            files.append(
                {"path": f"/{path}", "content": content, "encoding": "b64", "permissions": f"0{mode:o}"}
            )
        commands.insert(0, _START)
    document: dict[str, Any] = {
        "hostname": request["hostname"],
        "users": [account],
        "write_files": files,
        "runcmd": commands,
    }
    if request["agent"]:
        document["bootcmd"] = [_START_EARLY]
    if request.get("password") is not None:
        document["chpasswd"] = {
            "expire": False,
            "users": [{"name": request["user"], "password": request["password"], "type": "text"}],
        }
        document["ssh_pwauth"] = False
    if request["packages"]:
        document["packages"] = request["packages"]
    return "#cloud-config\n" + json.dumps(document, indent=1) + "\n"


def network_config(*, network: bool) -> str:
    """Version 2; without a network it says so, since a guest would wait for one otherwise."""
    ethernets: dict[str, Any] = {}
    if network:
        ethernets["id0"] = {
            "match": {"macaddress": MACHINE_MAC},
            "addresses": [f"{MACHINE}/{MACHINE_PREFIX}"],
            "routes": [{"to": "0.0.0.0/0", "via": MACHINE_GATEWAY}],
            "nameservers": {"addresses": [GATEWAY]},
        }
    return json.dumps({"version": 2, "ethernets": ethernets})


def seed(request: Mapping[str, Any], target: Path, *, sandbox_id: str, network: bool = False) -> None:
    """Writes the ISO to `target`. Raises HostUnfit (no xorriso), SandboxError."""
    program = find_program("xorriso")
    if program is None:
        raise HostUnfit("cloud_init needs xorriso, which is not installed.", fix="apt-get install xorriso")
    meta = {"instance-id": sandbox_id, "local-hostname": str(request.get("hostname", "sandbox"))}
    with tempfile.TemporaryDirectory(prefix=".seed-", dir=target.parent) as place:
        texts = {
            "user-data": user_data(request),
            "meta-data": json.dumps(meta),
            "network-config": network_config(network=network),
        }
        for name, text in texts.items():
            path = Path(place) / name
            path.touch(mode=0o600)
            path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [program, "-as", "mkisofs", "-quiet", "-V", "cidata", "-J", "-r", "-o", str(target), place],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": place},
            check=False,
        )
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise SandboxError(f"xorriso failed: {words[-1] if words else done.returncode}")
    os.chmod(target, 0o600)
