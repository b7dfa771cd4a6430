"""Constrained answers: calls, forced or free, and answers with a schema are valid whatever the model would say.

The model is tiny and random, so nothing but the constraint makes its text anything.
"""

import json

import jsonschema_rs
import numpy as np
import openai
import pytest

from rorqual.chat import Constrainer
from rorqual.serve.guide import answer_guide

from .conftest import TOOLS

HELLO = [{"role": "user", "content": "What is in box 1?"}]
COUNT = {
    "type": "function",
    "function": {
        "name": "count",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 9},
                "times": {"type": "integer", "maximum": 99, "minimum": 0},
            },
            "required": ["place", "times"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
JUMP = {
    "type": "function",
    "function": {
        "name": "jump",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"box": {"type": "integer", "minimum": 0, "maximum": 9}, "full": {"type": "boolean"}},
    "required": ["box", "full"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "box", "schema": SCHEMA, "strict": True}}
SILENT = {"thinking": {"type": "disabled"}}
MARK = "｜DSML｜"


def ask(server, **fields):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 700, "seed": 3, **fields}
    with server.openai() as client:
        answer = client.chat.completions.create(**body)
        return list(answer) if fields.get("stream") else answer


def check_calls(calls, tools):
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for call in calls:
        jsonschema_rs.validate(schemas[call.function.name], json.loads(call.function.arguments))


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_of_a_random_model_is_valid_and_comes_behind_its_reasoning(serve, seed):
    with serve() as server:
        answer = ask(
            server, tools=[COUNT, JUMP], tool_choice="required", parallel_tool_calls=False, seed=seed
        )
    choice = answer.choices[0]
    assert choice.message.reasoning_content and not choice.message.content
    assert choice.finish_reason == "tool_calls" and len(choice.message.tool_calls) == 1
    check_calls(choice.message.tool_calls, [COUNT, JUMP])


def test_the_named_tool_is_called_again_and_again_from_the_cache(serve):
    named = {"type": "function", "function": {"name": "jump"}}
    with serve() as server:
        messages = list(HELLO)
        before = None
        for _ in range(4):
            answer = ask(
                server, messages=messages, tools=[COUNT, JUMP], tool_choice=named, parallel_tool_calls=False
            )
            message = answer.choices[0].message
            (call,) = message.tool_calls
            assert call.function.name == "jump"
            if before is not None:
                assert answer.usage.prompt_tokens_details.cached_tokens >= before - 1
            before = answer.usage.total_tokens
            messages.append(message.model_dump(exclude_none=True))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "a whale"})


def test_without_reasoning_the_call_opens_the_answer_and_streams(serve):
    with serve() as server:
        options = {"stream": True, "parallel_tool_calls": False, "extra_body": SILENT}
        chunks = ask(server, tools=[COUNT], tool_choice="required", **options)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert calls[0].function.name == "count" and calls[0].id and not any(delta.content for delta in deltas)
    made = json.loads("".join(call.function.arguments for call in calls))
    jsonschema_rs.validate(COUNT["function"]["parameters"], made)


def test_reasoning_without_an_end_is_ended_in_time(serve):
    with serve() as server:
        answer = ask(server, tools=[JUMP], tool_choice="required", max_tokens=400, parallel_tool_calls=False)
    message = answer.choices[0].message
    assert message.tool_calls[0].function.name == "jump"
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 300


def test_an_answer_that_does_not_fit_is_cut_and_calls_nothing(serve):
    with serve() as server:
        answer = ask(server, tools=[COUNT], tool_choice="required", max_tokens=12)
    assert answer.choices[0].finish_reason == "length" and not answer.choices[0].message.tool_calls


def test_a_call_that_the_model_opens_by_itself_is_held_to_its_tools(tokenizer):
    opened = [*tokenizer.encode_text("\n\n<"), tokenizer.token_id(MARK)]

    constraint = Constrainer(tokenizer).constraint(thinking=False, tools=[JUMP])
    guide = answer_guide(constraint, words=constraint.words + 3, max_tokens=100)
    assert guide(None) is None and [guide(token) for token in opened[:-1]] == [None] * (len(opened) - 1)
    held = guide(opened[-1])
    assert (
        held is not None and held.greedy and held.bits is not None and len(held.bits) == constraint.words + 3
    )
    bits = np.unpackbits(held.bits.view(np.uint8), bitorder="little")
    assert {tokenizer.decode([int(n)])[0] for n in bits.nonzero()[0]} == {"t"}  # of tool_calls


@pytest.mark.parametrize("thinking", [True, False])
def test_a_json_schema_holds_the_answer(serve, thinking):
    with serve() as server:
        extra = {} if thinking else {"extra_body": SILENT}
        answer = ask(server, response_format=FORMAT, **extra)
        jsonschema_rs.validate(SCHEMA, json.loads(answer.choices[0].message.content))
        assert hasattr(answer.choices[0].message, "reasoning_content") == thinking
        loose = ask(
            server, response_format={"type": "json_object"}, max_tokens=900, temperature=0, extra_body=SILENT
        )
        said = loose.choices[0].message.content
        assert loose.choices[0].finish_reason == "length" or isinstance(json.loads(said), dict)


def test_the_model_is_told_of_the_schema(serve):
    with serve() as server, server.http() as http:
        body = {"model": "tiny", "messages": HELLO, "response_format": FORMAT}
        text = http.post("/v1/chat/completions/render", json=body).json()["text"]
    assert "## Response Format:" in text and json.dumps(SCHEMA) in text


def test_responses_take_schemas_and_say_so(serve):
    with serve() as server, server.openai() as client:
        form = {"type": "json_schema", "name": "box", "schema": SCHEMA, "strict": True}
        answer = client.responses.create(
            model="tiny",
            input="hi",
            text={"format": form},
            reasoning={"effort": "none"},
            max_output_tokens=400,
        )
    jsonschema_rs.validate(SCHEMA, json.loads(answer.output_text))
    assert answer.text.format.type == "json_schema"


ODD = {"type": "object", "properties": {"a": {"type": "object", "patternProperties": {"((": {}}}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ODD}}},
            "response_format",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "strict": True, "parameters": ODD}}]},
            "tools",
        ),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_by_name(serve, fields, param):
    with serve() as server, pytest.raises(openai.BadRequestError) as refused:
        ask(server, **fields)
    assert param in refused.value.param


def test_a_client_that_leaves_frees_the_row(serve):
    with serve() as server, server.openai() as client:
        body = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 3000}
        with client.chat.completions.create(**body, tool_choice="required", stream=True) as stream:
            next(iter(stream))
        with server.http() as http:
            while 'vllm:num_requests_running{model_name="tiny"} 0.0' not in http.get("/metrics").text:
                pass
