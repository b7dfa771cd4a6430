"""The edge's HTTP API, as any language sees it: lifecycle, files, refusals, sizes, figures, the schema."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rorqual.sandbox import (
    AsyncSandbox,
    EdgeError,
    EdgeRefused,
    FileEntry,
    GuestFileError,
    InvalidRequest,
    SandboxEnded,
    SandboxInfo,
    TrajectoryEntry,
    Unsupported,
    errors,
)
from rorqual.sandbox._remote_codec import decode, decode_error, encode, encode_error
from rorqual.sandbox._remote_methods import SPECIAL, methods
from rorqual.sandbox.edge import EdgeConfig, default_name, token_digest
from rorqual.sandbox.edge.calls import INSIDE, create_arguments, create_model_of_sandbox
from rorqual.sandbox.edge.failures import status_of
from tests.sandbox.edge_process import EdgeProcess

TOKEN = "the-token-of-these-tests"
EXAMPLES = int(os.environ.get("RORQUAL_SCHEMA_EXAMPLES", "2"))
"""For each operation."""


@pytest.fixture(scope="module")
def edge(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeProcess]:
    directory = tmp_path_factory.mktemp("http")
    (directory / "tokens").write_text(f"# one a line\n{token_digest(TOKEN)}  of the tests\n")
    options = ["--listen", "127.0.0.1:0", "--token-file", str(directory / "tokens")]
    options += ["--max-sandboxes", "4", "--max-body-mb", "1", "--max-file-mb", "8"]
    process = EdgeProcess("http", directory, options=options)
    process.start()
    yield process
    assert process.stop() == 0


@pytest.fixture
def client(edge: EdgeProcess) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=edge.http, headers=headers, timeout=60) as http:
        yield http


@pytest.fixture
def made(client: httpx.Client) -> Iterator[str]:
    answer = client.post("/v1/sandboxes", json={"body": {"timeout": 120, "envs": {"KEY": "sesame-inside"}}})
    assert answer.status_code == 201, answer.text
    yield answer.json()["id"]
    client.delete(f"/v1/sandboxes/{answer.json()['id']}")


def error_of(answer: httpx.Response) -> dict[str, object]:
    found: dict[str, object] = answer.json()["error"]
    return found


def test_a_sandbox_is_made_used_and_ended_over_plain_http(client: httpx.Client, made: str) -> None:
    at = f"/v1/sandboxes/{made}"
    assert made in [info["id"] for info in client.get("/v1/sandboxes").json()]
    ran = client.post(f"{at}/commands/run", json={"cmd": "cat; echo $KEY; exit 3", "stdin": "fed\n"})
    assert (ran.json()["stdout"], ran.json()["exit_code"]) == ("fed\nsesame-inside\n", 3)
    started = client.post(f"{at}/commands/start", json={"cmd": "read x; echo got $x", "stdin": True})
    assert started.status_code == 202
    command = started.json()["id"]
    fed = client.post(f"{at}/commands/{command}/stdin", content=b"it\n", params={"eof": True})
    assert fed.status_code == 204
    assert client.post(f"{at}/commands/{command}/wait").json()["stdout"] == "got it\n"
    assert client.post(f"{at}/set_timeout", json={"timeout": 60}).status_code == 200
    assert client.post(f"{at}/renew").status_code == 204
    rows = client.post(f"{at}/trajectory/list", json={}).json()
    assert [row["kind"] for row in rows[:2]] == ["created", "command"]
    ended = client.delete(at).json()
    assert ended == {"alive": True, "cause": "killed", "detail": "kill() was called"}
    assert client.delete(at).json()["alive"] is False
    gone = client.get(at)
    assert gone.status_code == 410 and error_of(gone)["fields"]["cause"] == "killed"  # type: ignore[index]
    assert client.post(f"{at}/trajectory/list", json={}).json()[-1]["kind"] == "ended"


def test_files_stream_both_ways_and_are_bounded(client: httpx.Client, made: str) -> None:
    at = f"/v1/sandboxes/{made}/files"
    data = os.urandom(3 << 20)
    entry = client.put(f"{at}/content", params={"path": "d/x", "mode": 0o600}, content=data).json()
    assert (entry["path"], entry["size"], entry["mode"]) == ("/home/user/d/x", len(data), 0o600)
    assert client.get(f"{at}/content", params={"path": "d/x"}).content == data
    assert [one["name"] for one in client.post(f"{at}/list", json={"path": "d"}).json()] == ["x"]
    small = client.get(f"{at}/content", params={"path": "d/x", "max_bytes": 10})
    assert small.status_code == 413
    missing = client.get(f"{at}/content", params={"path": "no"})
    assert missing.status_code == 404 and error_of(missing)["type"] == "GuestFileError"

    def giant() -> Iterator[bytes]:
        for _ in range(10):
            yield b"x" * (1 << 20)

    refused = client.put(f"{at}/content", params={"path": "giant"}, content=giant())
    assert refused.status_code == 413 and "8388608" in refused.text
    assert client.post(f"{at}/exists", json={"path": "giant"}).json() is False


def test_nothing_but_health_answers_without_the_token(edge: EdgeProcess) -> None:
    with httpx.Client(base_url=edge.http) as http:
        assert http.get("/health").status_code == 200
        for path in ("/v1/sandboxes", "/ready", "/metrics", "/version", "/docs", "/openapi.json"):
            answer = http.get(path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert error_of(answer)["type"] == "EdgeRefused"
        wrong = http.get("/v1/sandboxes", headers={"authorization": "Bearer wrong"})
        assert wrong.status_code == 401 and "not accepted" in wrong.text
        host = http.get("/health", headers={"host": "evil.example"})
        assert host.status_code == 421 and "evil.example" in host.text


async def test_the_sdk_is_refused_without_the_token_too(edge: EdgeProcess) -> None:
    for place in (edge.http, edge.socket):
        for token in ("", "wrong"):
            with pytest.raises(EdgeRefused, match="token") as caught:
                await AsyncSandbox.create(edge=place, token=token)
            assert caught.value.status == 401
    assert isinstance(await AsyncSandbox.list(edge=edge.http, token=TOKEN), list)
    with pytest.raises(InvalidRequest, match="token"):
        await AsyncSandbox.list(edge=edge.http, token="a\nb")


def test_a_giant_body_is_cut_off_whatever_its_header_says(client: httpx.Client) -> None:
    assert client.post("/v1/sandboxes", content=b"x" * (2 << 20)).status_code == 413

    def chunked() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (64 << 10)

    assert client.post("/v1/sandboxes", content=chunked()).status_code == 413


async def test_a_giant_or_senseless_message_ends_the_channel_and_nothing_else(edge: EdgeProcess) -> None:
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed

    uri = f"ws{edge.http.removeprefix('http')}/v1/channel"
    headers = {"authorization": f"Bearer {TOKEN}"}
    for message in ("x" * (2 << 20), "not json", "[]", '{"id": "x", "op": "list"}', b"\0", '{"op": 1}'):
        async with connect(uri, additional_headers=headers, proxy=None) as socket:
            await socket.send(message)
            with pytest.raises(ConnectionClosed):
                await socket.recv()
    async with connect(uri, additional_headers=headers, proxy=None) as socket:
        await socket.send(json.dumps({"id": 0, "op": "steal", "owner": "x"}))
        assert "a channel begins with" in json.loads(await socket.recv())["error"]["message"]
    assert await AsyncSandbox.list(edge=edge.http, token=TOKEN) == []


def test_a_full_edge_says_when_to_come_back(client: httpx.Client) -> None:
    made = []
    try:
        while (answer := client.post("/v1/sandboxes", json={"body": {"timeout": 30}})).status_code == 201:
            made.append(answer.json()["id"])
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        fields = error_of(answer)["fields"]
        assert fields["limit"] == 4 and fields["what"] == "sandboxes"  # type: ignore[index]
        ready = client.get("/ready").json()
        assert (ready["sandboxes"], ready["max_sandboxes"]) == (4, 4)
    finally:
        for sandbox_id in made:
            client.delete(f"/v1/sandboxes/{sandbox_id}")
    assert client.get("/ready").json()["sandboxes"] == 0


def test_figures_version_and_the_page_are_there(client: httpx.Client, made: str) -> None:
    figures = client.get("/metrics").text
    for name in ("rorqual_edge_sandboxes 1.0", "rorqual_edge_sandboxes_created_total", 'call="http"'):
        assert name in figures
    assert client.get("/version").json()["edge"] == "http"
    page = client.get("/docs").text
    assert (
        "/v1/sandboxes/{sandbox_id}/commands/run" in page and "http://" not in page and "<script" not in page
    )


def test_the_audit_log_has_a_line_per_request_and_no_secret(
    edge: EdgeProcess, client: httpx.Client, made: str
) -> None:
    client.put(
        f"/v1/sandboxes/{made}/files/content", params={"path": "secret-path"}, content=b"secret-content"
    )
    client.post(f"/v1/sandboxes/{made}/commands/run", json={"cmd": "echo secret-argument"})
    lines = [json.loads(line) for line in edge.log.read_text().splitlines() if line.startswith("{")]
    mine = [line for line in lines if line["sandbox"] == made]
    assert {"PUT /v1/sandboxes/{id}/files/content", "POST /v1/sandboxes/{id}/commands/run"} <= {
        line["call"] for line in mine
    }
    assert all(line["who"] == token_digest(TOKEN)[:8] and line["outcome"] == "200" for line in mine)
    text = edge.log.read_text()
    for secret in (TOKEN, "sesame-inside", "secret-path", "secret-content", "secret-argument"):
        assert secret not in text


def test_a_token_gives_no_path_of_the_host(client: httpx.Client) -> None:
    for mounts in ({"/etc": "/mnt"}, [{"source": "/", "target": "/mnt"}]):
        answer = client.post("/v1/sandboxes", json={"body": {"mounts": mounts}})
        assert answer.status_code == 400 and "mounts" in answer.text and "--mount-root" in answer.text


def test_host_paths_are_found_in_whatever_argument_holds_them(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to("/etc")
    fine = {"mounts": {str(root): "/x"}, "workdir": "/work", "envs": {"A": "/etc"}, "image": "base"}
    assert create_arguments(fine, roots=[str(root)])["workdir"] == "/work"
    for bad in (
        {"mounts": {str(root / "out"): "/x"}},
        {"mounts": [{"source": f"{root}/../..", "target": "/x"}]},
        {"image": "/etc/passwd"},
        {"layers": ["base", "../../x"]},
        {"disk": Path("/dev/sda")},
        {"secrets": {"A": {"host": "h", "value": "/not/a/path", "ca": "/etc/shadow"}}},
    ):
        with pytest.raises(InvalidRequest, match="path of the edge's host"):
            create_arguments(bad, roots=[str(root)])
    create_arguments({"secrets": {"A": {"host": "h", "value": "/not/a/path"}}}, roots=[])


def test_every_argument_of_create_crosses_or_is_known_not_to() -> None:
    import inspect

    names = set(inspect.signature(AsyncSandbox.create).parameters) - {"edge", "token", "lease", "trajectory"}
    assert set(create_model_of_sandbox().model_fields) == names
    assert names | {"python", "imports"} >= INSIDE


def test_every_call_of_the_sdk_is_plain_special_or_refused_by_name() -> None:
    assert set(methods()) >= SPECIAL
    stays = {path for path, one in methods().items() if not one.crosses} - SPECIAL
    assert stays == {"trajectory.replay"}, (
        "a new call that cannot cross: document it, or give it an operation"
    )


# -- what crosses -------------------------------------------------------------------------------------------


def test_records_and_errors_cross_unchanged() -> None:
    entry = TrajectoryEntry(
        seq=1, kind="command", request={"a": [1, None]}, result=None, stdout=b"\xff\0", stderr=b"",
        started=1.0, ended=None, **({"input": b"i"} if "input" in TrajectoryEntry.__slots__ else {}),
    )  # fmt: skip
    assert decode(list[TrajectoryEntry], json.loads(json.dumps(encode([entry])))) == [entry]
    info = SandboxInfo(
        **{field.name: _sample(field) for field in dataclasses.fields(SandboxInfo)}  # type: ignore[arg-type]
    )
    assert decode(SandboxInfo, json.loads(json.dumps(encode(info)))) == info
    for error in (
        SandboxEnded("sb-x-000000000000", cause="oom", detail="d"),
        GuestFileError(2, "/x", call="read"),
        Unsupported("f", reason="r", available=["a", "b"]),
        errors.EdgeFull("e", what="w", used=1, asked=2, limit=3, retry_after=4),
    ):
        back = decode_error(json.loads(json.dumps(encode_error(error))))
        assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)


def _sample(field: dataclasses.Field[object]) -> object:
    text = str(field.type)
    if "Mapping" in text:
        return {"a": "b"}
    if "tuple" in text:
        return ("n",)
    return {"str": "s", "bool": True, "float": 1.5, "int": 3}.get(text.split(" ")[0])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_an_edge_sends_is_a_record_or_an_edge_error(document: object) -> None:
    for hint in (FileEntry, list[SandboxInfo], bool, TrajectoryEntry, str):
        with contextlib.suppress(EdgeError):
            decode(hint, document)
    made = decode_error(document if isinstance(document, dict) else {"type": document})
    assert isinstance(made, Exception)


def test_an_error_never_becomes_anything_but_an_error_of_ours() -> None:
    for name in ("SystemExit", "os", "Sequence", "__import__", "Exception", "Cause", None, 7):
        made = decode_error({"type": name, "message": "m", "fields": {"__class__": "x", "args": [1]}})
        assert type(made) is EdgeError


def test_statuses_are_what_http_means_by_them() -> None:
    for error, status in (
        (InvalidRequest("x"), 400),
        (errors.SandboxNotFound("x"), 404),
        (GuestFileError(2, "x"), 404),
        (GuestFileError(28, "x"), 507),
        (EdgeRefused("x", status=421), 421),
        (errors.TrajectoryError("x"), 503),
        (errors.SandboxError("x"), 500),
    ):
        assert status_of(error) == status


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""}, {"name": "local"}, {"name": "A"}, {"name": "a" * 25}, {"name": "-a"}, {"max_sandboxes": 0},
        {"max_memory_mb": True}, {"mount_roots": ("relative",)}, {"token_digests": frozenset({"x"})},
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(fields))):
        EdgeConfig(**fields)  # type: ignore[arg-type]
    assert EdgeConfig(name=default_name())


# -- the schema ---------------------------------------------------------------------------------------------


@pytest.mark.timeout(0 if EXAMPLES > 100 else 300)
def test_no_made_up_request_is_an_internal_error(edge: EdgeProcess, client: httpx.Client, made: str) -> None:
    schema = client.get("/openapi.json").json()
    api = schemathesis.openapi.from_dict(schema)
    tried = 0
    for result in api.get_all_operations():
        operation = result.ok()
        if operation.path.endswith("/wait"):
            continue  # it waits

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=EXAMPLES <= 100,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            nonlocal tried
            tried += 1
            if "sandbox_id" in case.path_parameters and case.method != "DELETE":
                case.path_parameters["sandbox_id"] = made
            if isinstance(case.body, dict) and "cmd" in case.body:
                case.body |= {"cmd": "true", "timeout": 1}
            if case.path == "/v1/sandboxes" and case.method == "POST" and isinstance(case.body, dict):
                case.body["body"] = {**case.body.get("body", {}), "substrate": "no-such"}
            answer = case.call(base_url=edge.http, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)
            what = f"{case.method} {case.path}: {answer.text}"
            assert answer.status_code < 500 or answer.status_code in (503, 507), what
            if answer.status_code >= 400:
                assert "error" in answer.json()

        check()
    assert tried >= 25


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left(edge: EdgeProcess) -> Iterator[None]:
    """Forks of made-up requests included."""
    yield
    with httpx.Client(base_url=edge.http, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60) as http:
        for info in http.get("/v1/sandboxes").json():
            http.delete(f"/v1/sandboxes/{info['id']}")
