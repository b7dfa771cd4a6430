"""The remote adapter against a real HTTP server: what it sends, what it survives, how its errors read."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from rorqual.agent import (
    DEFAULT_TOOLS,
    Completion,
    ContextFull,
    ModelError,
    RemoteConfig,
    RemoteModel,
    SetupError,
)
from rorqual.agent.models import Delta

from .scripted import Fail, Raw, Say, ScriptedServer, serving

TOOLS = [tool.schema() for tool in DEFAULT_TOOLS]
USER = {"role": "user", "content": "hi"}


def ask(
    server: ScriptedServer | str, *conversations: Sequence[dict[str, Any]], **options: Any
) -> tuple[list[Completion], list[Delta]]:
    """One model asked once per conversation; raises what `complete` raises."""
    url = server if isinstance(server, str) else server.url
    config = RemoteConfig(**{"url": url, "model": "m", "first_wait": 0.01, "attempts": 4} | options)
    deltas: list[Delta] = []

    async def go() -> list[Completion]:
        async with RemoteModel(config) as model:
            return [
                await model.complete(list(c), TOOLS, on_delta=deltas.append)
                for c in conversations or [[USER]]
            ]

    return asyncio.run(go()), deltas


def text(deltas: list[Delta], channel: str) -> str:
    return "".join(delta.text for delta in deltas if delta.channel == channel)


def test_a_streamed_answer_is_assembled_with_its_usage() -> None:
    arguments = {"command": "printf 'a\\nb' && echo é"}
    with serving(
        Say(reasoning="think hard", content="I look.", calls=[("bash", arguments), ("submit", {})])
    ) as server:
        [done], deltas = ask(server)
    assert done.message["reasoning_content"] == text(deltas, "reasoning") == "think hard"
    assert done.message["content"] == text(deltas, "content") == "I look."
    first, second = done.message["tool_calls"]
    assert json.loads(first["function"]["arguments"]) == arguments and first["id"] == "call_1"
    assert second["function"] == {"name": "submit", "arguments": "{}"}
    assert done.finish_reason == "tool_calls" and not done.malformed and not done.notes
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens) == (
        100,
        10,
        64,
        4,
    )
    sent = server.requests[0]
    assert (
        sent["tools"] == TOOLS
        and sent["stream"] is True
        and sent["stream_options"] == {"include_usage": True}
    )
    assert "temperature" not in sent and "authorization" not in server.headers[0]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_goes_back_under_the_name_it_came(name: str) -> None:
    with serving(
        Say(reasoning="why", calls=[("bash", {})], reasoning_name=name), Say(content="ok")
    ) as server:

        async def go() -> None:
            async with RemoteModel(RemoteConfig(url=server.url, model="m")) as model:
                done = await model.complete([USER], TOOLS, on_delta=None)
                assert done.message["reasoning_content"] == "why"
                result = {"role": "tool", "tool_call_id": "call_1", "content": "r"}
                await model.complete([USER, done.message, result], TOOLS, on_delta=None)

        asyncio.run(go())
    assert server.requests[1]["messages"][1][name] == "why"


def assistant(reasoning: str = "", arguments: str = "{}") -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    return message | ({"reasoning_content": reasoning} if reasoning else {})


RESULT = {"role": "tool", "tool_call_id": "c", "content": "r"}


def test_once_a_model_reasons_every_assistant_message_carries_the_field() -> None:
    with serving(Say(reasoning="a", content="b"), Say(content="c"), strict=True) as server:
        ask(server, [USER], [USER, assistant("first"), RESULT, assistant(), RESULT])
    fields = [m.get("reasoning_content") for m in server.requests[1]["messages"] if m["role"] == "assistant"]
    assert fields == ["first", ""]


def test_a_strict_server_that_wants_reasoning_nobody_sent_is_repaired_once() -> None:
    with serving(Say(content="c"), strict=True) as server:
        [done], _ = ask(server, [USER, assistant(), RESULT])
    assert done.message["content"] == "c" and "sending it empty" in done.notes[0]
    assert server.requests[1]["messages"][1]["reasoning_content"] == ""


def test_a_model_that_never_reasons_gets_no_such_field() -> None:
    with serving(Say(content="c")) as server:
        ask(server, [USER, assistant(), RESULT])
    assert "reasoning_content" not in server.requests[0]["messages"][1]


def test_broken_arguments_of_an_old_call_do_not_poison_the_history() -> None:
    with serving(Say(content="c")) as server:
        ask(server, [USER, assistant(arguments='{"command": "ls'), RESULT])
    assert server.requests[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{}"


def test_429_waits_as_told_then_succeeds() -> None:
    with serving(Fail(429, headers={"retry-after": "0"}), Say(content="ok")) as server:
        [done], deltas = ask(server, first_wait=60.0)
    assert done.message["content"] == "ok"
    assert "answered 429" in done.notes[0] and "Trying again in 0.0 s (1 of 4)" in done.notes[0]
    assert [delta.channel for delta in deltas[:2]] == ["note", "restart"]


def test_500s_are_retried_and_then_given_up_with_one_line() -> None:
    with serving(Fail(500), Fail(503), Say(content="ok")) as server:
        [done], _ = ask(server)
        assert done.message["content"] == "ok" and len(done.notes) == 2
    with (
        serving(Fail(502, "<html>bad gateway</html>"), loop=True) as server,
        pytest.raises(ModelError) as caught,
    ):
        ask(server)
    assert len(server.requests) == 4
    assert (
        str(caught.value)
        == f"{server.url}/chat/completions answered 502 Bad Gateway: <html>bad gateway</html>."
    )


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
def test_refusals_are_not_retried(status: int) -> None:
    with (
        serving(Fail(status), loop=True) as server,
        pytest.raises(ModelError, match=f"answered {status} ") as caught,
    ):
        ask(server)
    assert len(server.requests) == 1 and caught.value.status == status
    assert "scripted failure" in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_path_says_so() -> None:
    with serving(Say()) as server, pytest.raises(ModelError) as caught:
        ask(server.url.removesuffix("/v1"))
    assert "answered 404 Not Found: Not Found; check the URL, often the path ends in /v1" in str(caught.value)


def test_a_wrong_port_fails_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(
            ModelError, match=r"cannot connect: .*; is the server running, and are host and port right"
        ):
            ask(url, first_wait=60.0)


@pytest.mark.parametrize("url", ["api.deepseek.com", "ftp://x/v1", "http://", ""])
def test_what_is_no_url_is_refused_before_any_request(url: str) -> None:
    with pytest.raises(SetupError, match="expected http://HOST"):
        ask(url)


def test_keys_are_read_by_name_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-right")
    with serving(Say(content="ok"), key="sk-right") as server:
        assert ask(server, api_key_env="TEST_KEY")[0][0].message["content"] == "ok"
    monkeypatch.setenv("TEST_KEY", "sk-wrong-secret")
    with serving(Say(), key="sk-right") as server:
        with pytest.raises(ModelError) as caught:
            ask(server, api_key_env="TEST_KEY")
        assert "answered 401 Unauthorized: Authentication Fails" in str(caught.value)
        assert "check the key in the environment variable TEST_KEY" in str(caught.value)
        assert "sk-wrong-secret" not in str(caught.value)
        with pytest.raises(ModelError, match="no API key was sent: name the variable"):
            ask(server)
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(SetupError, match="the environment variable TEST_KEY is not set"):
        ask("http://localhost:1/v1", api_key_env="TEST_KEY")
    monkeypatch.setenv("TEST_KEY", "schlüssel")
    with pytest.raises(SetupError, match="not plain ASCII") as refused:
        ask("http://localhost:1/v1", api_key_env="TEST_KEY")
    assert "schlüssel" not in str(refused.value)


CHUNK = b'data: {"choices": [{"index": 0, "delta": {"content": "half"}}]}\n\n'


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        CHUNK,
        CHUNK + b'data: {"choices": [{"index": 0, "del',
        CHUNK + b'data: {"choices": [{"ind\n\n',
        CHUNK + b"data: [1, 2]\n\n",
        CHUNK + b"data: [DONE]\n\n",
        CHUNK + b'data: {"error": {"message": "overloaded", "code": 503}}\n\n',
        CHUNK + b"data: " + b"[" * 100_000 + b"\n\n",
        b"\xff\xfe\x00garbage\n\n",
    ],
)
def test_a_broken_stream_is_repeated_from_the_start(broken: bytes) -> None:
    with serving(Raw(broken), Say(content="whole")) as server:
        [done], deltas = ask(server)
    assert done.message["content"] == "whole" and len(done.notes) == 1
    restart = [delta.channel for delta in deltas].index("restart")
    assert text(deltas[restart:], "content") == "whole"


def test_odd_fields_in_chunks_are_ignored() -> None:
    odd = [
        {"choices": None},
        {"choices": [None]},
        {"choices": [{"delta": None}]},
        {"choices": [{"delta": {"content": 5, "tool_calls": "no"}}]},
        {"choices": [{"delta": {"tool_calls": [None, {"index": 0, "function": None}, {"index": "x"}]}}]},
        {"usage": "many", "choices": [{"delta": {"content": "ok"}, "finish_reason": "stop"}]},
    ]
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in odd)
    with serving(Raw(b": keep-alive\n\n" + body + b"data: [DONE]\n\n")) as server:
        [done], _ = ask(server)
    assert done.message == {"role": "assistant", "content": "ok"} and len(done.malformed) == 1


def test_fragments_without_index_and_with_repeated_names_make_one_call() -> None:
    def piece(**function: Any) -> dict[str, Any]:
        return {
            "choices": [{"delta": {"tool_calls": [{"id": "x1", "function": {"name": "bash", **function}}]}}]
        }

    chunks = [
        piece(arguments='{"comm'),
        piece(arguments='and": "ls"}'),
        {"choices": [{"finish_reason": "tool_calls"}]},
    ]
    with serving(Raw(b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks))) as server:
        [done], _ = ask(server)
    assert done.message["tool_calls"] == [
        {"id": "x1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
    ]


def test_a_server_that_does_not_stream_is_understood() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "bash", "arguments": {"command": "ls"}}}
    message = {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [call]}
    body = {
        "choices": [{"message": message, "finish_reason": "tool_calls"}],
        "usage": {"prompt_cache_hit_tokens": 7},
    }
    with serving(Raw(json.dumps(body).encode(), content_type="application/json")) as server:
        [done], _ = ask(server)
    assert done.message["reasoning_content"] == "r" and done.usage.cached_tokens == 7
    assert done.message["tool_calls"][0]["function"]["arguments"] == '{"command": "ls"}'


def test_a_web_page_is_not_an_api() -> None:
    page = Raw(b"<html>welcome</html>", content_type="text/html; charset=utf-8")
    with (
        serving(page) as server,
        pytest.raises(ModelError, match="answered with text/html, not a chat completion"),
    ):
        ask(server)


def test_an_endless_answer_is_cut_off() -> None:
    with (
        serving(Raw(b"data: " + b"x" * 3_000_000), loop=True) as server,
        pytest.raises(ModelError, match="sent more than 1000000 bytes"),
    ):
        ask(server, max_response_bytes=1_000_000)


def test_a_silent_server_is_given_up() -> None:
    with (
        serving(Say(content="abc", chunk=1, pause=30.0), loop=True) as server,
        pytest.raises(ModelError, match=r"silent for 0\.1 s"),
    ):
        ask(server, read_timeout=0.1, attempts=2)


def test_a_full_context_is_told_apart() -> None:
    said = "This model's maximum context length is 131072 tokens. However, you requested 140000 tokens"
    with (
        serving(Fail(400, json.dumps({"error": {"message": said}}))) as server,
        pytest.raises(ContextFull, match="131072"),
    ):
        ask(server)


def test_an_answer_cut_inside_a_call_gives_no_call() -> None:
    with serving(
        Say(calls=[("bash", {"command": "ls"}), ("bash", '{"command": "rm -r')], finish="length")
    ) as server:
        [done], _ = ask(server)
    assert len(done.message["tool_calls"]) == 1 and done.finish_reason == "length"
    assert done.malformed == ("the call of bash was cut off by the token limit",)


LEAK = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="bash">\n'
    '<｜DSML｜parameter name="command" string="true">ls</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def test_markup_that_a_server_leaked_into_content_is_read_as_the_call_it_is() -> None:
    with serving(Say(reasoning="r", content="I look." + LEAK)) as server:
        [done], _ = ask(server)
    [call] = done.message["tool_calls"]
    assert call["function"] == {"name": "bash", "arguments": '{"command": "ls"}'} and call["id"]
    assert done.message["content"] == "I look." and done.message["reasoning_content"] == "r"
    assert done.finish_reason == "tool_calls" and "1 calls recovered, 0 lost" in done.notes[0]


def test_markup_that_was_left_in_reasoning_is_read_too() -> None:
    with serving(Say(reasoning="so I call" + LEAK)) as server:
        [done], _ = ask(server)
    assert done.message["reasoning_content"] == "so I call" and len(done.message["tool_calls"]) == 1


def test_leaked_markup_that_is_cut_is_no_call() -> None:
    with serving(Say(content="I look." + LEAK[:-50])) as server:
        [done], _ = ask(server)
    assert "tool_calls" not in done.message and "DSML" not in done.message["content"]
    assert len(done.malformed) == 1


def test_markup_is_not_looked_for_beside_real_calls() -> None:
    with serving(Say(content="The syntax is" + LEAK, calls=[("bash", {"command": "pwd"})])) as server:
        [done], _ = ask(server)
    assert [c["function"]["arguments"] for c in done.message["tool_calls"]] == ['{"command": "pwd"}']
