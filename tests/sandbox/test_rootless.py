"""The container substrate for a user who is not root: with subordinate ids, and with none at all."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "/usr/bin/python3"
SCRIPT = r"""
import json, os, sys
from rorqual.sandbox import Sandbox, Mount, HostUnfit, Unsupported
out = {}
mine = os.environ["RORQUAL_STATE"] + "/mine"
os.makedirs(mine)
with Sandbox.create(memory_mb=256, pids=64, mounts=[Mount(source=mine, target="/home/w", readonly=False)]) as sb:
    info = sb.info()
    out["info"] = [info.rootless, info.user, info.limits, list(info.notes), info.runtime]
    run = sb.commands.run
    out["id"] = run("id -u; python3 -c 'print(6*7)'").stdout
    out["bomb"] = run(["python3", "-c", "x = bytearray(1 << 30)"]).exit_code
    out["host"] = run("cat /etc/shadow || mount -t tmpfs x /mnt || echo x > /proc/sys/kernel/domainname").exit_code
    out["write"] = run("echo hi > /home/w/f; echo $?; mkdir /tmp/d; touch /tmp/d/x; rm -r /tmp/d").stdout
    out["timeout"] = run("sleep 50", timeout=0.3).timed_out
    sb.files.write("a", "b", mode=0o600)
    out["read"] = sb.files.read("a")
out["owner"] = os.stat(mine + "/f").st_uid == os.getuid()
try:
    Sandbox.create(user="user").kill()
    out["user"] = "ok"
except HostUnfit as error:
    out["user"] = error.fix
with Sandbox.create(disk_mb=None, user="root") as sb:
    sb.commands.run("mkdir -p /var/x; touch /var/x/y; chmod 700 /var/x")
    out["root"] = sb.commands.run("id -u").stdout
with Sandbox.create() as sb:
    out["refused"] = []
    for call in (sb.pause, sb.snapshot, sb.fork, lambda: sb.commit("x")):
        try:
            call()
        except Unsupported as error:
            out["refused"].append("commands" in error.available)
print(json.dumps(out))
"""


def accounts() -> list[str]:
    """An account without subordinate ids, and one with, where there is one."""
    names = ["nobody"]
    for line in Path("/etc/subuid").read_text().splitlines() if Path("/etc/subuid").exists() else []:
        name = line.partition(":")[0]
        try:
            if pwd.getpwnam(name).pw_uid != 0:
                names.append(name)
                break
        except KeyError:
            continue
    return names


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="rq-rootless-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(
    os.geteuid() != 0, reason="becoming another user needs root; as that user, every other test is this one"
)
@pytest.mark.parametrize("name", accounts())
@pytest.mark.parametrize("only", ["crun", pytest.param("runc", marks=pytest.mark.slow)])
def test_a_user_who_is_not_root_gets_a_whole_sandbox(name: str, only: str, runtime: str, place: Path) -> None:
    if (
        not os.access(PYTHON, os.X_OK)
        or not shutil.which("setpriv")
        or not shutil.which(only, path="/usr/bin:/usr/sbin")
    ):
        pytest.skip(f"needs {PYTHON}, setpriv and {only}")
    if Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0":
        pytest.skip("user namespaces are turned off on this host")
    shutil.copytree(ROOT / "src/rorqual", place / "src/rorqual", ignore=shutil.ignore_patterns("__pycache__"))
    account = pwd.getpwnam(name)
    state = place / "state"
    state.mkdir()
    os.chown(state, account.pw_uid, account.pw_gid)
    script = SCRIPT.replace(
        "import json, os, sys\n",
        f"import json, os, sys\nimport rorqual.sandbox.host as h\nh.RUNTIMES = ({only!r},)\n",
    )
    done = subprocess.run(
        [
            "setpriv",
            f"--reuid={account.pw_uid}",
            f"--regid={account.pw_gid}",
            "--clear-groups",
            PYTHON,
            "-c",
            script,
        ],
        env={
            "PATH": "/usr/bin:/bin:/usr/sbin",
            "PYTHONPATH": str(place / "src"),
            "RORQUAL_STATE": str(state),
            "HOME": str(state),
        },
        cwd="/",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    rootless, user, limits, notes, used = out["info"]
    assert rootless and used == only and any("rlimits" in note for note in notes)
    assert limits["memory"] == "rlimit" and limits["cpu"] == "none" and limits["disk"] == "tmpfs"
    two_ids = name != "nobody" and shutil.which("newuidmap") is not None
    assert user == ("user" if two_ids else "root")
    assert out["id"] == ("1000" if two_ids else "0") + "\n42\n"
    assert out["bomb"] != 0 and out["host"] != 0 and out["timeout"]
    assert out["write"].startswith("0\n") and out["read"] == "b" and out["owner"]
    assert out["user"] == "ok" if two_ids else "usermod --add-subuids" in out["user"]
    assert out["root"] == "0\n" and out["refused"] == [True] * 4
    run = Path(f"/tmp/rorqual-{account.pw_uid}")
    left = [path for path in run.glob("*/*/*")]
    assert not left
    subprocess.run(["find", str(run), "-type", "d", "-empty", "-delete"], check=False)
