"""Firecracker with guests on any host: one emulated host, in which test_firecracker_guest.py runs.

Where /dev/kvm boots guests that file runs directly, and this one is skipped. Two minutes on two idle cores, most of
them for the emulation of an emulation; what is measured in there is not what Firecracker takes on a machine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.sandbox.errors import HostUnfit
from rorqual.sandbox.machines import kernel
from rorqual.sandbox.state import cache_dir
from rorqual.sandbox.substrates.microvm import VMMS
from tests.sandbox.nested import host, root

PROJECT = Path(__file__).resolve().parents[3]
INNER = "tests/sandbox/test_firecracker_guest.py"
FILES = ("src/rorqual/__init__.py", "src/rorqual/sandbox", "pyproject.toml", "tests/__init__.py", INNER)
FILES += (
    "docs/sandbox-machines.md",
    "tests/sandbox/__init__.py",
    "tests/sandbox/nested/__init__.py",
    "tests/sandbox/nested/plugin.py",
)
PLUGINS = ("pytest_asyncio.plugin", "pytest_timeout", "tests.sandbox.nested.plugin")
NEEDED = {"qemu-system-x86_64": "qemu-system-x86", "mkfs.erofs": "erofs-utils", "busybox": "busybox-static"}
SECONDS = 420.0


def needs() -> str:
    """What this host lacks, or ''."""
    for program, package in NEEDED.items():
        if shutil.which(program) is None:
            return f"no {program}: apt-get install {package}"
    if shutil.which("dpkg-query") is None:
        return "the emulated host is made of Debian packages, and this is no Debian"
    known = subprocess.run(["dpkg-query", "-L", *root.PACKAGES], capture_output=True, text=True, check=False)
    return f"packages are missing: {' '.join(known.stderr.split())}" if known.returncode else ""


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_firecracker_boots_snapshots_and_forks_in_an_emulated_host(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        VMMS["firecracker"].accelerator()
        pytest.skip(f"/dev/kvm boots guests here: {INNER} runs directly")
    except HostUnfit:
        pass
    why = needs()
    if why:
        pytest.skip(why)
    fetched = subprocess.run(
        [sys.executable, PROJECT / "scripts/fetch_firecracker.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    if fetched.returncode:
        pytest.skip(f"no Firecracker, and none can be fetched: {fetched.stderr.strip()}")
    found = kernel.find_kernel()
    files = {f"/project/{name}": PROJECT / name for name in FILES}
    files |= {f"/cache/kernels/{found.release}": found.vmlinux.parent}
    for name in ("firecracker", "jailer"):
        files[f"/cache/bin/{name}"] = cache_dir() / "bin" / name
    command = [
        "python",
        "-m",
        "pytest",
        "-vv",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "--tb=short",
        "--color=no",
        INNER,
    ]
    for plugin in PLUGINS:
        command += ["-p", plugin]

    def show(line: str) -> None:
        if "::" in line or line.startswith(("E ", "FAILED", "=")):
            with capfd.disabled():
                print(f"    {line}", flush=True)

    ran = host.run(
        command,
        kernel=kernel.find_kernel(cache=cache_dir() / "nested", also=host.MODULES),
        root=root.make(cache_dir() / "guests"),
        files=files,
        envs={
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin",
            "HOME": "/root",
            "PYTHONPATH": "/project/src",
            "RORQUAL_CACHE": "/cache",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        cwd="/project",
        work=tmp_path,
        timeout=SECONDS,
        show=show,
    )
    told = f"{ran.output[-6000:]}\n--- the emulated host's kernel:\n{ran.console[-2000:]}"
    assert ran.exit_code == 0, f"exit {ran.exit_code} after {ran.seconds:.0f} s\n{told}"
    passed = re.search(r"(\d+) passed", ran.output)
    assert passed and int(passed[1]) >= 10 and "skipped" not in ran.output.splitlines()[-1], told
