"""What stands before the paths, and the strict mode: hosts, keys and bodies on every protocol, DeepSeek's 400."""

import openai
import pytest

from rorqual.serve import ServeConfig, key_digest

from .conftest import TOOLS

PATHS = ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]
HELLO = [{"role": "user", "content": "x"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"place": "x"}'}}


def shape(response, path):
    error = response.json()["error"]
    assert (response.json().get("type") == "error") == path.startswith("/v1/messages")
    return error


@pytest.mark.parametrize("path", PATHS)
def test_keys_bodies_and_wrong_json_on_every_protocol(serve, path):
    with (
        serve(key_digests=frozenset({key_digest("secret")}), max_body_bytes=500) as server,
        server.http() as http,
    ):
        for headers in ({}, {"x-api-key": "wrong"}):
            denied = http.post(path, json={}, headers=headers)
            assert denied.status_code == 401 and shape(denied, path)["type"] == "authentication_error"
        key = {"x-api-key": "secret"}
        large = http.post(path, json={"model": "tiny", "input": "x" * 600}, headers=key)
        assert large.status_code == 413 and "500 bytes" in shape(large, path)["message"]
        chunked = http.post(path, content=iter([b'{"model": "' + b"x" * 400, b"x" * 400]), headers=key)
        assert chunked.status_code in (400, 413) and shape(chunked, path)
        for content in (b"{", b"[]", b"\xff", b'{"model": "\\ud800"}'):
            headers = {**key, "content-type": "application/json"}
            wrong = http.post(path, content=content, headers=headers)
            assert wrong.status_code == 400 and shape(wrong, path)["type"] == "invalid_request_error"
        assert shape(http.put(path, headers=key), path) and http.put(path, headers=key).status_code == 405


def test_a_full_queue_has_each_protocols_shape(serve):
    with serve(max_waiting=1) as server, server.http() as http:
        server.service.scheduler._waiting = 1  # as if one waited: a real one could be gone too soon
        try:
            for path, body in (
                ("/v1/messages", {"messages": HELLO, "max_tokens": 1}),
                ("/v1/responses", {"input": "x"}),
            ):
                refused = http.post(path, json={"model": "tiny", **body})
                assert refused.status_code == 429 and refused.headers["retry-after"]
                assert shape(refused, path)["type"] == "rate_limit_error"
        finally:
            server.service.scheduler._waiting = 0


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("[::1]:80", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_only_named_hosts_are_answered(serve, host, status):
    with serve(allowed_hosts=("localhost", "127.0.0.1", "[::1]")) as server, server.http() as http:
        response = http.get("/health", headers={"host": host})
        assert response.status_code == status
        if status == 403:
            assert response.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["", "*", "a/b", "x.org:80", "u@x.org"])
def test_a_host_that_is_none_is_refused_at_the_start(host):
    with pytest.raises(ValueError, match="allowed_hosts"):
        ServeConfig(allowed_hosts=(host,))


ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "a whale"}
SAID = {"role": "assistant", "content": "A whale."}
REASONED = {"reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("messages", "lacking"),
    [
        ([*HELLO, ASSISTANT, RESULT], "messages.1.reasoning_content"),
        ([*HELLO, ASSISTANT | REASONED, RESULT], None),
        ([*HELLO, ASSISTANT | {"reasoning_content": ""}, RESULT], None),
        ([*HELLO, ASSISTANT | {"reasoning": "Hm."}, RESULT], None),
        ([*HELLO, ASSISTANT | REASONED, RESULT, SAID, *HELLO], "messages.3.reasoning_content"),
        ([*HELLO, SAID, *HELLO], None),
        ([*HELLO, SAID, *HELLO, ASSISTANT | REASONED, RESULT], None),
    ],
)
def test_strict_reasoning_is_deepseeks_rule(serve, messages, lacking):
    with serve(strict_reasoning=True) as server, server.openai() as client:

        def ask(**fields):
            return client.chat.completions.create(
                model="tiny", messages=messages, tools=TOOLS, max_tokens=2, **fields
            )

        if lacking is None:
            ask()
        else:
            with pytest.raises(openai.BadRequestError) as refused:
                ask()
            assert refused.value.param == lacking and "must be passed back" in refused.value.message
            ask(extra_body={"thinking": {"type": "disabled"}})  # nothing to pass back there


def test_strict_reasoning_does_not_repair_from_the_store(serve, answer_ids, call):
    ids = answer_ids(reasoning_content="I look.", tool_calls=[call("box 1")])
    with serve(script=lambda prompt: ids, strict_reasoning=True) as server:
        with server.openai() as client:
            said = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, max_tokens=300)
            message = said.choices[0].message.model_dump(exclude_none=True)
            del message["reasoning_content"], message["reasoning"]
            result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "x"}
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(
                    model="tiny", messages=[*HELLO, message, result], tools=TOOLS, max_tokens=300
                )
        call_id = message["tool_calls"][0]["id"]
        blocks = [{"type": "tool_use", "id": call_id, "name": "look", "input": {"place": "box 1"}}]
        history = [
            *HELLO,
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": "x"}]},
        ]
        with server.http() as http:
            body = {"model": "tiny", "max_tokens": 9, "messages": history}
            refused = http.post("/v1/messages", json=body)
    assert refused.status_code == 400 and shape(refused, "/v1/messages")["type"] == "invalid_request_error"
