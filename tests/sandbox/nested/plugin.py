"""What tests/sandbox/conftest.py gives, for the inner tests, without what that file loads for others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import trajectory
from rorqual.sandbox.keeper.client import close_all
from rorqual.sandbox.state import StateDir


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateDir]:
    os.environ["RORQUAL_STATE"] = str(tmp_path_factory.mktemp("state"))
    place = StateDir.from_environment()
    yield place
    close_all()
    trajectory.close_all()
    left = [
        str(path) for part in (place.sandboxes, place.keepers) if part.is_dir() for path in part.iterdir()
    ]
    left += [str(path) for path in Path("/sys/fs/cgroup").glob("rorqual-*")]
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(place.run) in line]
    assert not left, f"left behind: {left}"
