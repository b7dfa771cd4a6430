"""/v1/chat/completions over HTTP: shapes, order of a stream, fields, refusals, stop strings, errors."""

import json
from collections import Counter

import pytest

from .conftest import CONTEXT, TOOLS

HELLO = [{"role": "user", "content": "What is in box 1?"}]


def ask(server, **fields):
    with server.http() as http:
        body = {"model": server.model, "messages": HELLO, "max_tokens": 12, "temperature": 0, **fields}
        return http.post("/v1/chat/completions", json=body)


def lines(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def joined(chunks):
    """The message a client puts together."""
    out = {"content": "", "reasoning_content": "", "reasoning": "", "tool_calls": {}}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content", "reasoning"):
                out[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                held = out["tool_calls"].setdefault(call["index"], {"arguments": ""})
                if "id" in call:
                    assert call["function"]["arguments"] == "" and call["type"] == "function"
                    held.update(id=call["id"], name=call["function"]["name"])
                else:
                    held["arguments"] += call["function"]["arguments"]
    return out


def test_whole_and_streamed_say_the_same(server):
    whole = ask(server)
    assert whole.status_code == 200
    message, counts = whole.json()["choices"][0]["message"], whole.json()["usage"]
    chunks = lines(ask(server, stream=True, stream_options={"include_usage": True}))
    said = joined(chunks)
    assert said["content"] == message["content"] and said["reasoning"] == said["reasoning_content"]
    assert said["reasoning"] == message.get("reasoning", "") == message.get("reasoning_content", "")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "length", "logprobs": None}
    assert chunks[-1]["choices"] == [] and all(chunk["usage"] is None for chunk in chunks[:-1])
    last = chunks[-1]["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details"):
        assert last[name] == counts[name]
    assert (
        last["total_tokens"]
        == last["prompt_tokens"] + last["completion_tokens"]
        == last["prompt_tokens"] + 12
    )
    # The second request found all but the last token of the first one's prompt.
    assert last["prompt_tokens_details"]["cached_tokens"] == last["prompt_tokens"] - 1
    assert last["prompt_cache_hit_tokens"] + last["prompt_cache_miss_tokens"] == last["prompt_tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_call_streams_as_header_then_fragments(serve, answer_ids, call):
    ids = answer_ids(
        reasoning_content="I look.", content="Let me see.", tool_calls=[call("box 1"), call("béta 2")]
    )
    with serve(script=lambda prompt: ids) as server:
        message = ask(server, tools=TOOLS, max_tokens=500).json()["choices"][0]
        chunks = lines(ask(server, tools=TOOLS, max_tokens=500, stream=True))
    assert message["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    message = message["message"]
    assert message["content"] == "Let me see." and message["reasoning_content"] == "I look."
    said = joined(chunks)
    assert [one["function"]["arguments"] for one in message["tool_calls"]] == [
        said["tool_calls"][index]["arguments"] for index in (0, 1)
    ]
    assert json.loads(said["tool_calls"][1]["arguments"]) == {"place": "béta 2"}
    assert said["tool_calls"][0]["name"] == "look" and len({one["id"] for one in message["tool_calls"]}) == 2
    kinds = [next(iter(chunk["choices"][0]["delta"]), "end") for chunk in chunks]
    order = [kind for number, kind in enumerate(kinds) if number == 0 or kinds[number - 1] != kind]
    assert order == ["role", "reasoning_content", "content", "tool_calls", "end"]


def test_tool_choice_none_offers_nothing_and_a_call_is_dropped(serve, answer_ids, call, tokenizer):
    ids = answer_ids(reasoning_content="I look.", tool_calls=[call("box 1")])
    with serve(script=lambda prompt: ids) as server:
        answer = ask(server, tools=TOOLS, tool_choice="none", max_tokens=500).json()
        with server.http() as http:
            body = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": "none"}
            shown = http.post("/v1/chat/completions/render", json=body).json()
    assert (
        "tool_calls" not in answer["choices"][0]["message"]
        and answer["choices"][0]["finish_reason"] == "stop"
    )
    assert [one["kind"] for one in answer["x_v4"]["parse"]] == ["unexpected_call"]
    assert "look" not in shown["text"] and tokenizer.decode(shown["token_ids"]) == shown["text"]


@pytest.mark.parametrize(
    ("switch", "thinks"),
    [
        ({}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
    ],
)
def test_thinking_is_switched(server, switch, thinks):
    with server.http() as http:
        body = {"model": server.model, "messages": HELLO, **switch}
        shown = http.post("/v1/chat/completions/render", json=body).json()
    assert shown["thinking"] is thinks and shown["text"].endswith("<think>" if thinks else "</think>")
    message = ask(server, **switch).json()["choices"][0]["message"]
    assert ("reasoning_content" in message) == thinks


def test_the_seed_decides(server):
    texts = Counter(
        json.dumps(ask(server, temperature=1, seed=seed).json()["choices"][0]["message"])
        for seed in (1, 1, 2, 3)
    )
    assert sorted(texts.values()) == [1, 1, 2]


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(serve, answer_ids):
    ids = answer_ids(thinking=False, content="There is a whale in box 1.")
    with serve(script=lambda prompt: ids) as server:
        fields = {"thinking": {"type": "disabled"}, "stop": ["box", " whale"], "max_tokens": 100}
        answer = ask(server, **fields).json()
        said = joined(lines(ask(server, stream=True, **fields)))
    assert answer["choices"][0]["message"]["content"] == said["content"] == "There is a"
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_k": 40}, "top_k"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "jump"}}, "tools": TOOLS}, "tool_choice"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"guided_json": {}}, "guided_json"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages.0.name"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools.1.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": "very"}}]},
            "tools.0.function.strict",
        ),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "thinking"),
    ],
)
def test_what_is_not_done_is_refused_by_name(server, fields, param):
    response = ask(server, **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"].startswith(param) and param.rpartition(".")[2] in error["message"]
    assert error["code"] and "\n" not in error["message"]


def test_defaults_that_ask_for_nothing_pass(server):
    fields = {
        "n": 1,
        "logprobs": False,
        "top_logprobs": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "store": False,
        "stop": None,
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
    }
    assert ask(server, **fields).status_code == 200


def test_overflow_is_honest(server):
    long = [{"role": "user", "content": "whale " * CONTEXT}]
    response = ask(server, messages=long)
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert str(CONTEXT) in response.json()["error"]["message"]
    response = ask(server, max_tokens=CONTEXT)
    assert response.status_code == 400 and f"{CONTEXT} for the answer" in response.json()["error"]["message"]


def test_an_unknown_model_is_404(server):
    response = ask(server, model="gpt-9")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    assert "'tiny'" in response.json()["error"]["message"]


def opened(http, body):
    """A running stream: (response, its parts). Whoever drops the parts closes the connection."""
    response = http.send(http.build_request("POST", "/v1/chat/completions", json=body), stream=True)
    return response, response.iter_raw()


ENDLESS = {"model": "tiny", "messages": HELLO, "max_tokens": 3000, "stream": True}


def test_a_full_queue_is_429_with_retry_after(serve):
    options = {"max_running": 1, "max_waiting": 1, "drain_seconds": 0}
    with serve(script=lambda prompt: [40] * 4000, **options) as server, server.http() as http:
        first, running = opened(http, ENDLESS)
        assert b"data: " in next(part for part in running if b"data" in part)
        second, waiting = opened(http, ENDLESS)
        third = http.post("/v1/chat/completions", json=ENDLESS)
        assert third.status_code == 429 and int(third.headers["retry-after"]) >= 1
        assert third.json()["error"]["code"] == "queue_full"
        for parts, response in ((waiting, second), (running, first)):
            parts.close()
            response.close()


def test_keep_alive_comments_while_there_is_nothing_to_say(serve):
    options = {"max_running": 1, "keep_alive_seconds": 0.02, "drain_seconds": 0}
    with serve(script=lambda prompt: [40] * 4000, **options) as server, server.http() as http:
        first, running = opened(http, ENDLESS)
        assert b"data: " in next(part for part in running if b"data" in part)
        second, waiting = opened(http, ENDLESS)
        assert next(waiting).startswith(b": keep-alive\n\n")
        for parts, response in ((waiting, second), (running, first)):
            parts.close()
            response.close()


def test_a_failure_inside_a_stream_is_an_error_event(serve, monkeypatch):
    with serve() as server:

        def fail():
            raise RuntimeError("no memory")

        monkeypatch.setattr(server.service.scheduler._rows, "step", fail)
        response = ask(server, stream=True)
        assert response.status_code == 200
        data = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: ")]
        assert data[-1]["error"]["code"] == "engine_failed" and "no memory" in data[-1]["error"]["message"]
        assert "[DONE]" not in response.text
        assert ask(server).status_code == 200  # with new rows
        assert ask(server, stream=True).status_code == 200
