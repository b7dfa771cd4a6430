"""/v1/messages with the unmodified anthropic package, response validation strict: blocks, streams, tools, errors."""

import json

import anthropic
import pytest

from rorqual.chat import render
from rorqual.serve import ShuttingDown, key_digest
from rorqual.serve.anthropic import messages_conversation
from rorqual.serve.anthropic_schemas import CountTokensRequest
from rorqual.serve.conversation import build_prompt
from rorqual.serve.replay import reasoning_signature

TOOLS = [
    {
        "name": "look",
        "description": "Look at a place.",
        "input_schema": {
            "type": "object",
            "properties": {"place": {"type": "string"}},
            "required": ["place"],
        },
        "cache_control": {"type": "ephemeral"},
    }
]
FUNCTIONS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at a place.",
            "parameters": TOOLS[0]["input_schema"],
        },
    }
]
HELLO = [{"role": "user", "content": "What is in box 1?"}]


def ask(client, **fields):
    return client.messages.create(**{"model": "tiny", "max_tokens": 300, "messages": HELLO, **fields})


def post(server, path="/v1/messages", headers=None, **fields):
    body = {"model": "tiny", "max_tokens": 8, "messages": HELLO, **fields}
    with server.http() as http:
        return http.post(path, json=body, headers=headers)


def stream_of(response):
    """[(event, data)] of a stream."""
    out = []
    for part in response.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in part.split("\n") if ": " in line and line[0] != ":")
        if "data" in lines:
            out.append((lines["event"], json.loads(lines["data"])))
    return out


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_text_and_calls_are_blocks_in_this_order(serve, answer_ids, call, stream):
    calls = [call("box 1"), call("box 2")]
    ids = answer_ids(reasoning_content="I look.", content="Let me see.", tool_calls=calls)
    with serve(script=lambda prompt: ids) as server, server.anthropic() as client:
        if stream:
            with client.messages.stream(model="tiny", max_tokens=300, messages=HELLO, tools=TOOLS) as events:
                kinds = [event.type for event in events]
                answer = events.get_final_message()
            assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
            assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
        else:
            answer = ask(client, tools=TOOLS)
    thinking, text, first, second = answer.content
    assert (thinking.type, thinking.thinking) == ("thinking", "I look.")
    assert thinking.signature == reasoning_signature("I look.")
    assert (text.type, text.text) == ("text", "Let me see.")
    assert [(one.name, one.input) for one in (first, second)] == [
        ("look", {"place": "box 1"}),
        ("look", {"place": "box 2"}),
    ]
    assert first.id != second.id and answer.stop_reason == "tool_use" and answer.stop_sequence is None
    assert answer.usage.output_tokens == len(ids) - 1  # the end of the block of calls ends the turn
    assert answer.usage.output_tokens_details.thinking_tokens > 0


def test_a_stream_is_blocks_with_deltas_between_start_and_stop(serve, answer_ids, call):
    ids = answer_ids(reasoning_content="I look.", content="Wait.", tool_calls=[call("box 1")])
    with serve(script=lambda prompt: ids) as server:
        events = stream_of(post(server, stream=True, tools=TOOLS, max_tokens=300))
    assert all(name == data["type"] for name, data in events)
    assert [name for name, _ in events[:2]] == ["message_start", "ping"]
    start = events[0][1]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["output_tokens"] == 0
    assert start["usage"]["input_tokens"] > 0
    open_index, kinds = None, []
    for name, data in events[2:-2]:
        if name == "content_block_start":
            assert open_index is None and data["index"] == len(kinds)
            open_index, kind = data["index"], data["content_block"]["type"]
            kinds.append(kind)
        elif name == "content_block_stop":
            assert data["index"] == open_index
            open_index = None
        else:
            allowed = {
                "thinking": ("thinking_delta", "signature_delta"),
                "text": ("text_delta",),
                "tool_use": ("input_json_delta",),
            }
            assert data["index"] == open_index and data["delta"]["type"] in allowed[kind]
    assert open_index is None and kinds == ["thinking", "text", "tool_use"]
    assert events[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-1] == ("message_stop", {"type": "message_stop"})


@pytest.mark.parametrize("lost", ["nothing", "text", "blocks"])
def test_ten_turns_hit_the_cache_whatever_the_client_does_to_thinking(
    serve, tokenizer, answer_ids, call, lost
):
    user = tokenizer.token_id("<｜User｜>")

    def script(prompt):
        turn = prompt.count(user)
        if turn > 10:
            return answer_ids(reasoning_content="I have seen all.", content="Nothing.")
        return answer_ids(reasoning_content=f"I look into box {turn}.", tool_calls=[call(f"box {turn}")])

    messages = list(HELLO)
    with serve(script=script) as server, server.anthropic() as client:
        before = 0
        for turn in range(1, 12):
            system = [{"type": "text", "text": "You look.", "cache_control": {"type": "ephemeral"}}]
            answer = ask(client, messages=messages, tools=TOOLS, system=system)
            cached = answer.usage.cache_read_input_tokens
            assert cached >= 0.95 * before and (turn == 1 or cached == before - 1)
            before = cached + answer.usage.input_tokens + answer.usage.output_tokens
            content = [block.model_dump(exclude_none=True) for block in answer.content]
            if lost == "text":
                content[0]["thinking"] = ""
            elif lost == "blocks":
                content = content[1:]
            messages.append({"role": "assistant", "content": content})
            if turn == 11:
                break
            result = {"type": "tool_result", "tool_use_id": content[-1]["id"], "is_error": True}
            result["content"] = [{"type": "text", "text": f"nothing in box {turn}"}]
            messages.append({"role": "user", "content": [result]})
        prompts = server.service.scheduler._rows.prompts
    assert "I look into box 3." in tokenizer.decode(prompts[-1]) and answer.stop_reason == "end_turn"


def test_the_prompt_is_that_of_the_same_openai_conversation(server, tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "text", "text": "Now."}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "another server's"},
                {"type": "text", "text": "Yes."},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"place": "béta", "n": 1.5}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "a whale"},
                {"type": "text", "text": "And?"},
            ],
        },
        {"role": "system", "content": "Be brief."},
    ]
    system = [{"type": "text", "text": "You look."}, {"type": "text", "text": "Well."}]
    call = {"name": "look", "arguments": '{"place": "béta", "n": 1.5}'}
    expected = render(
        [
            {"role": "system", "content": "You look.\n\nWell."},
            {"role": "user", "content": "Look.\n\nNow."},
            {
                "role": "assistant",
                "content": "Yes.",
                "reasoning_content": "Hm.",
                "tool_calls": [{"id": "t1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "t1", "content": "a whale"},
            {"role": "user", "content": "And?\n\nBe brief."},
        ],
        tools=FUNCTIONS,
    )
    with server.anthropic() as client:
        count = client.messages.count_tokens(model="tiny", messages=messages, system=system, tools=TOOLS)
        answer = ask(client, messages=messages, system=system, tools=TOOLS, max_tokens=1)
    usage = answer.usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    request = CountTokensRequest(model="tiny", messages=messages, system=system, tools=TOOLS)
    store = server.service.replay
    prompt = build_prompt(messages_conversation(request, store, ""), tokenizer, replay=store, tenant="")
    assert tokenizer.decode(prompt.ids) == expected and count.input_tokens == len(prompt.ids)


def test_thinking_is_switched_and_omitted(serve, answer_ids):
    ids = answer_ids(reasoning_content="I know.", content="A whale.")
    with serve(script=lambda prompt: ids) as server, server.anthropic() as client:
        adaptive = {"type": "adaptive", "display": "omitted"}
        whole = ask(client, thinking=adaptive, output_config={"effort": "max"})
        with client.messages.stream(
            model="tiny", max_tokens=300, messages=HELLO, thinking=adaptive
        ) as stream:
            streamed = stream.get_final_message()
        for answer in (whole, streamed):
            assert answer.content[0].thinking == "" and answer.content[1].text == "A whale."
            assert answer.content[0].signature == reasoning_signature("I know.")
        prompt = server.service.scheduler._rows.prompts
    off = answer_ids(content="A whale.", thinking=False)
    with serve(script=lambda prompt: off) as server, server.anthropic() as client:
        answer = ask(client, thinking={"type": "disabled"})
        assert [block.type for block in answer.content] == ["text"] and answer.stop_reason == "end_turn"
    assert len(prompt) == 2


def test_stop_reasons(serve, answer_ids):
    ids = answer_ids(reasoning_content="I know.", content="A whale. Or not.")
    with serve(script=lambda prompt: ids) as server, server.anthropic() as client:
        stopped = ask(client, stop_sequences=["Or", "whale."])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "whale.")
        assert stopped.content[-1].text == "A "
        cut = ask(client, max_tokens=3)
        assert cut.stop_reason == "max_tokens" and cut.content[0].type == "thinking"
        last = stream_of(post(server, stream=True, max_tokens=300, stop_sequences=["Or"]))[-2][1]
        assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "Or"}


def test_tool_choice(serve, tokenizer, answer_ids, call):
    ids = answer_ids(reasoning_content="I look.", tool_calls=[call("box 1")])
    with serve(script=lambda prompt: ids) as server, server.anthropic() as client:
        none = ask(client, tools=TOOLS, tool_choice={"type": "none"})
        assert all(block.type != "tool_use" for block in none.content)
        auto = ask(client, tools=TOOLS, tool_choice={"type": "auto"})
        assert auto.content[-1].type == "tool_use"
    with serve() as server, server.anthropic() as client:
        choice = {"type": "tool", "name": "look"}
        ask(client, tools=TOOLS, tool_choice=choice, thinking={"type": "disabled"}, max_tokens=40)
        with pytest.raises(anthropic.BadRequestError, match="jump"):
            ask(client, tools=TOOLS, tool_choice={"type": "tool", "name": "jump"})
        with pytest.raises(anthropic.BadRequestError, match="no tools"):
            ask(client, tool_choice={"type": "any"})


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0: type 'image'"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}],
                    }
                ]
            },
            "messages.0.content.0.content.0.type",
        ),
        ({"top_k": 5}, "top_k"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "twice"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "The answer is ("}]}, "must end"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 10**6}, "context is"),
        ({"stop_sequences": [""]}, "stop string"),
        ({"system": [{"type": "text", "text": 5}]}, "system.0.text"),
    ],
)
def test_what_is_not_done_is_refused_by_name(server, fields, said):
    response = post(server, **fields)
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert said in body["error"]["message"]


def test_errors_have_anthropics_shape(serve):
    with serve(key_digests=frozenset({key_digest("secret")}), max_body_bytes=2000) as server:
        with server.anthropic(key="secret") as client:
            assert client.messages.count_tokens(model="tiny", messages=HELLO).input_tokens > 3
            with pytest.raises(anthropic.NotFoundError) as missing:
                ask(client, model="claude-9")
            assert missing.value.body["error"]["type"] == "not_found_error"
            with pytest.raises(anthropic.APIStatusError) as large:
                ask(client, messages=[{"role": "user", "content": "x" * 3000}])
            assert large.value.status_code == 413 and large.value.body["error"]["type"] == "request_too_large"
        with server.anthropic(key="wrong") as client, pytest.raises(anthropic.AuthenticationError) as denied:
            ask(client)
        assert denied.value.body["error"]["type"] == "authentication_error"
        old = post(server, headers={"x-api-key": "secret", "anthropic-version": "latest"})
        assert old.status_code == 400 and "anthropic-version" in old.json()["error"]["message"]


def test_a_failure_inside_a_stream_is_an_error_event(serve, tokenizer):
    endless = tokenizer.encode_text("x") * 3000
    with serve(script=lambda prompt: endless) as server, server.anthropic() as client:
        events = []
        with pytest.raises(anthropic.APIStatusError) as broken:
            for event in client.messages.create(model="tiny", max_tokens=3000, messages=HELLO, stream=True):
                events.append(event.type)
                if len(events) == 5:
                    server.service.scheduler.abort_all(ShuttingDown("going down"))
        assert events[0] == "message_start" and "message_stop" not in events
        assert broken.value.body["error"] == {
            "type": "overloaded_error",
            "message": "going down",
            "code": "shutting_down",
        }
