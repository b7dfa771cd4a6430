"""One state directory for the whole room's tests, and proof at the end that nothing of it is left on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import trajectory
from rorqual.sandbox.errors import HostUnfit
from rorqual.sandbox.host import find_runtimes
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.keeper.client import close_all
from rorqual.sandbox.network.order import lacking
from rorqual.sandbox.state import StateDir
from tests.sandbox.internet import World

ROOT = Path(__file__).resolve().parents[2]
GUEST = ROOT / "src/rorqual/sandbox/_bin/rorqual-guest"


def leftovers(state: StateDir) -> list[str]:
    """Everything a sandbox of this state directory could leave behind, in words."""
    found = []
    for directory in (state.sandboxes, state.keepers):
        found += [str(path) for path in directory.iterdir()] if directory.is_dir() else []
    for point in set(cgroups.hierarchies().values()):
        found += [
            str(path) for path in Path(point).glob("rorqual-sb-*") if _ours(path, state) and path.exists()
        ]
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    found += [line for line in mounts.splitlines() if str(state.run) in line or str(state.root) in line]
    return found


def _ours(cgroup: Path, state: StateDir) -> bool:
    """Other engineers and tests may run sandboxes on this host: only empty or own cgroups count."""
    return not any(
        (run / "sandboxes" / cgroup.name.removeprefix("rorqual-")).exists()
        for run in state.run.parent.iterdir()
    )


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateDir]:
    root = tmp_path_factory.mktemp("state")
    before = os.environ.get("RORQUAL_STATE")
    os.environ["RORQUAL_STATE"] = str(root)
    place = StateDir.from_environment()
    yield place
    close_all()
    trajectory.close_all()
    if before is None:
        del os.environ["RORQUAL_STATE"]
    else:
        os.environ["RORQUAL_STATE"] = before
    left = leftovers(place) if place.run.exists() else []
    shutil.rmtree(place.run, ignore_errors=True)
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def internet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The small Internet of internet.py, and the settings that make it the sandboxes'."""
    problem = lacking()
    if problem is not None:
        pytest.skip(str(problem))
    with World(tmp_path_factory.mktemp("internet")) as world:
        yield world


@pytest.fixture
def world(internet: World, runtime: str, monkeypatch: pytest.MonkeyPatch) -> World:
    """Sandboxes of this test go out through it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(internet.config))
    internet.zone({})
    return internet


@pytest.fixture(scope="session")
def runtime() -> str:
    """Skips where the host has no OCI runtime; builds the guest agent where it is missing."""
    try:
        name, _ = find_runtimes()[0]
    except HostUnfit as error:
        pytest.skip(str(error))
    if not GUEST.exists():
        GUEST.parent.mkdir(exist_ok=True)
        subprocess.run(["make", "-s", "-C", str(ROOT / "native/guest"), "CC=cc", f"OUT={GUEST}"], check=True)
    return name
