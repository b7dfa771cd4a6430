"""The seed for cloud-init: what is in it, and what is refused. That a guest takes it is in test_fullvm.py."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rorqual.sandbox.errors import InvalidRequest
from rorqual.sandbox.host import find_program
from rorqual.sandbox.machines import cloud_init
from rorqual.sandbox.machines.agent_service import BINARY, agent_files


def document(**wanted: Any) -> dict[str, Any]:
    text = cloud_init.user_data(cloud_init.check(wanted))
    head, _, rest = text.partition("\n")
    assert head == "#cloud-config"
    return json.loads(rest)  # type: ignore[no-any-return]


def test_the_default_is_a_user_and_our_agent(runtime: str) -> None:
    found = document()
    assert found["users"][0] | {} == {
        "name": "user",
        "shell": "/bin/bash",
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
        "lock_passwd": True,
        "ssh_authorized_keys": [],
    }
    files = {item["path"]: item for item in found["write_files"]}
    mode, data = agent_files()[BINARY]
    assert base64.b64decode(files[f"/{BINARY}"]["content"]) == data
    assert files[f"/{BINARY}"]["permissions"] == f"0{mode:o}"
    assert (
        list(files)[-1].endswith(".rules") and ".rules" in found["bootcmd"][0]
    )  # the last file is waited for
    assert "rorqual-guest" in found["runcmd"][0] and "chpasswd" not in found


def test_what_is_asked_for_is_in_it() -> None:
    found = document(
        user="ada",
        hostname="engine",
        password="s3cret'\"",
        ssh_keys=["ssh-ed25519 A"],
        files={"/etc/x": "ü\n"},
        runcmd=["touch /a b"],
        packages=["jq"],
        agent=False,
    )
    assert found["chpasswd"]["users"] == [{"name": "ada", "password": "s3cret'\"", "type": "text"}]
    assert base64.b64decode(found["write_files"][0]["content"]).decode() == "ü\n"
    assert (found["runcmd"], found["packages"], found["hostname"]) == (["touch /a b"], ["jq"], "engine")
    assert "bootcmd" not in found and found["users"][0]["ssh_authorized_keys"] == ["ssh-ed25519 A"]
    own = cloud_init.check({"user_data": "#!/bin/sh\necho mine\n"})
    assert cloud_init.user_data(own) == "#!/bin/sh\necho mine\n"


@pytest.mark.parametrize(
    "wanted",
    [
        {"users": []},
        {"user": "Root!"},
        {"user": 7},
        {"hostname": "a b"},
        {"hostname": "-a"},
        {"ssh_keys": "ssh-ed25519 A"},
        {"runcmd": [["a", "b"]]},
        {"files": {"etc/x": ""}},
        {"files": {"/etc/x": b""}},
        {"files": ["/etc/x"]},
        {"password": ""},
        {"password": "a\nb"},
        {"agent": "yes"},
        {"user_data": "x", "user": "ada"},
        {"user_data": 7},
    ],
)
def test_what_is_none_is_refused_by_name(wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="cloud_init"):
        cloud_init.check(wanted)


def test_a_machine_without_a_network_is_told_so() -> None:
    assert json.loads(cloud_init.network_config(network=False)) == {"version": 2, "ethernets": {}}
    assert json.loads(cloud_init.network_config(network=True))["ethernets"]["id0"]["addresses"]


@pytest.mark.skipif(find_program("xorriso") is None, reason="apt-get install xorriso")
def test_the_seed_is_a_disc_labelled_cidata_for_its_owner_alone(tmp_path: Path) -> None:
    target = tmp_path / "seed"
    cloud_init.seed(cloud_init.check({"user_data": "#cloud-config\n{}\n"}), target, sandbox_id="sb-x")
    assert target.stat().st_mode & 0o777 == 0o600 and [path.name for path in tmp_path.iterdir()] == ["seed"]
    data = target.read_bytes()
    assert data[0x8001:0x8006] == b"CD001" and data[0x8028:0x802E] == b"cidata"
    subprocess.run(
        ["xorriso", "-osirrox", "on", "-indev", str(target), "-extract", "/", str(tmp_path / "out")],
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "out/user-data").read_text() == "#cloud-config\n{}\n"
    assert json.loads((tmp_path / "out/meta-data").read_text())["instance-id"] == "sb-x"
    assert (tmp_path / "out/network-config").exists()
