"""Every example runs as it stands and says what its top promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.sandbox import Sandbox, SandboxError

EXAMPLES = Path(__file__).parents[1] / "examples"
SAID = {
    "sandbox_hello.py": ("sum: 5050\n", "stopped: True kept: begun\n", "\n1 created\n"),
    "engine_generate.py": ("sampled: [", "135 tokens hold ", "a rewound twin goes on the same: True\n"),
    "agent_embedded.py": ("task: ", "answer: ", "solved: "),
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_the_example_runs(name: str) -> None:
    if name != "engine_generate.py":
        try:
            Sandbox.create(timeout=60).kill()
        except SandboxError as error:
            pytest.skip(f"no container on this host: {error}")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for line in SAID[name]:
        assert line in "\n" + done.stdout, done.stdout
