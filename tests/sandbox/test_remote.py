"""The contract of every substrate, kept through an edge: over its Unix socket, and over TCP with a token."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from rorqual.sandbox import AsyncSandbox
from tests.sandbox import test_contract as contract
from tests.sandbox.edge_process import EdgeProcess

NOT_THROUGH_AN_EDGE = {
    "test_without_a_freezer_nothing_that_needs_one_is_offered",  # it changes this process, not the edge
}
TOKEN = "a token of the tests"


@pytest.fixture(scope="module", params=["unix", "tcp"])
def place(
    request: pytest.FixtureRequest, runtime: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """(address, token) of an edge."""
    directory = tmp_path_factory.mktemp("edge")
    if request.param == "unix":
        edge = EdgeProcess("contract-unix", directory)
    else:
        roots = ["--mount-root", str(tmp_path_factory.getbasetemp()), "--mount-root", "/etc"]
        options = ["--listen", "127.0.0.1:0", *roots]
        edge = EdgeProcess("contract-tcp", directory, options=options, token=TOKEN)
    edge.start()
    yield (edge.http or edge.socket, edge.token)
    assert edge.stop() == 0


@pytest.fixture(autouse=True)
def everything_goes_through_it(place: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_EDGE", place[0])
    monkeypatch.setenv("RORQUAL_EDGE_TOKEN", place[1])


@pytest.fixture(params=["container"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def sb(kind: str) -> AsyncIterator[AsyncSandbox]:
    async with await AsyncSandbox.create(substrate=kind) as sandbox:
        assert type(sandbox).__name__ == "RemoteSandbox"
        yield sandbox


globals().update(
    {
        name: value
        for name, value in vars(contract).items()
        if name.startswith("test_") and name not in NOT_THROUGH_AN_EDGE
    }
)
