"""What makes a launch quick: the sealed runtime is the runtime and nobody's to change; the nudge leaves no process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rorqual.sandbox.host import find_runtimes
from rorqual.sandbox.keeper import quick

ROOT = Path(__file__).resolve().parents[2]


def test_a_sealed_runtime_is_a_copy_that_cannot_change_and_is_renewed_with_its_file(tmp_path: Path) -> None:
    program = tmp_path / "crun"
    program.write_bytes(Path("/bin/echo").read_bytes())
    program.chmod(0o755)
    sealed = quick.Sealed()
    path = sealed.path(str(program))
    assert path.startswith("/proc/self/fd/") and sealed.path(str(program)) == path
    fd = int(path.rpartition("/")[2])
    assert Path(path).read_bytes() == Path("/bin/echo").read_bytes()
    again = f"/proc/{os.getpid()}/fd/{fd}"
    done = subprocess.run([again, "sealed"], capture_output=True, text=True, check=True)
    assert done.stdout == "sealed\n"
    with pytest.raises(PermissionError), open(path, "r+b") as file:
        file.write(b"#!/bin/sh\n")
    with pytest.raises(OSError):
        os.truncate(path, 0)
    program.unlink()
    program.write_bytes(Path("/bin/true").read_bytes())
    assert Path(sealed.path(str(program))).read_bytes() == Path("/bin/true").read_bytes()
    assert sealed.path("/usr/sbin/runc") == "/usr/sbin/runc"  # only what is known to look for the seals
    assert sealed.path(str(tmp_path / "missing/crun")) == str(tmp_path / "missing/crun")
    os.close(int(sealed.path(str(program)).rpartition("/")[2]))


def test_crun_takes_the_sealed_copy_for_its_own(runtime: str) -> None:
    found = dict(find_runtimes())
    if "crun" not in found or not Path("/usr/bin/strace").exists():
        pytest.skip("no crun, or no strace to see it")
    sealed = quick.Sealed()
    path = sealed.path(found["crun"])
    code = "import os, sys; os.execve(sys.argv[1], ['crun', '--version'], {'PATH': '/usr/bin:/bin'})"
    fd = int(path.rpartition("/")[2])
    command = ["strace", "-f", "-e", "trace=execve,execveat", sys.executable, "-I", "-c", code, path]
    done = subprocess.run(command, capture_output=True, text=True, pass_fds=(fd,), check=True)
    os.close(fd)
    started = [line for line in done.stderr.splitlines() if "exec" in line and "= 0" in line]
    assert len(started) == 2 and "crun version" in done.stdout  # Python, and crun once


def test_the_nudge_ends_with_the_keeper_and_holds_none_of_its_files() -> None:
    code = """
import os, sys
from rorqual.sandbox.keeper import quick
fd = os.open(sys.argv[1], os.O_RDONLY)
nudge = quick.Nudge()
nudge.now(); nudge.now()
with open(f"/proc/self/task/{os.getpid()}/children") as file:
    print(file.read().strip(), flush=True)
sys.stdin.read()
"""
    path = __file__
    keeper = subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert keeper.stdout is not None and keeper.stdin is not None
    pid = keeper.stdout.readline().strip()
    if pid:  # '' where no cgroup is ours
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            targets = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            if path not in targets:
                break
            time.sleep(0.01)
        assert path not in targets
    keeper.kill()
    keeper.wait()
    keeper.stdin.close()
    keeper.stdout.close()
    deadline = time.monotonic() + 10
    while pid and Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.01)
    else:
        assert not pid or not Path(f"/proc/{pid}").exists()
