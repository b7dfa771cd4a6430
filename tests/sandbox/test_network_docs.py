"""Runs the examples of docs/sandbox-network.md in the small Internet of internet.py; what doctor says of networks."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from rorqual.sandbox.errors import InvalidRequest
from rorqual.sandbox.network.check import check_network
from rorqual.sandbox.network.policy import load
from tests.sandbox.internet import World

TEXT = (Path(__file__).resolve().parents[2] / "docs/sandbox-network.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.S | re.M)


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example {n}" for n in range(len(EXAMPLES))])
def test_the_example_runs(code: str, world: World) -> None:
    exec(compile(code, "<an example of docs/sandbox-network.md>", "exec"), {"CA": world.ca})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3


def test_the_configuration_shown_is_one(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", TEXT, re.S | re.M)
    path = tmp_path / "networks.toml"
    path.write_text(shown)
    assert load(path).gateway.resolvers == ("9.9.9.9",) and "research" in load(path).policies


def test_doctor_tries_a_network(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = asyncio.run(check_network())
    assert [check.name for check in checks] == ["network", "network: forwarding"]
    assert checks[0].ok and "refused both" in checks[0].why
    assert checks[1].ok or "sysctl" in checks[1].fix or "nft" in checks[1].fix
    (tmp_path / "rorqual").mkdir()
    (tmp_path / "rorqual/networks.toml").write_text("[gateway")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (check,) = asyncio.run(check_network())
    assert not check.ok and "networks.toml" in check.why
    with pytest.raises(InvalidRequest):
        load()
