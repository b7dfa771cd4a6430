"""Constrained decoding: whatever a sampler picks under the mask parses, and is valid against the tool's schema."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.chat import ChatError, Constrainer, Constraint, Tokenizer, parse_pieces
from rorqual.chat.grammar import MAX_FREE_ORDER, schema_types
from rorqual.chat.profile import DSML, THINK_END

TOKENIZER = Tokenizer.from_file("src/rorqual/embedded")
CONSTRAINER = Constrainer(TOKENIZER)
MARK, END = TOKENIZER.token_id(DSML), TOKENIZER.token_id(THINK_END)
LESS = TOKENIZER.encode_text("\n\n<")
MARKED = '</｜DSML｜parameter>\n</｜DSML｜invoke> " \\ \n'


def values(text: str) -> Any:
    """JSON with its numbers cut short: a random walk writes 1e999, which is valid and no float."""
    return json.loads(text, parse_float=lambda digits: float(digits) if abs(float(digits)) < 1e300 else 0.5)


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **parameters}}}


WRITE = tool(
    "write",
    properties={
        "path": {"type": "string"},
        "mode": {"enum": ["r", "rw/x", "a b"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 99},
        "options": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/options"}]},
        "flag": {"type": ["boolean", "string"], "maxLength": 8},
    },
    required=["path", "count"],
    **{"$defs": {"options": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"],
                             "additionalProperties": False}}},
)  # fmt: skip
NOTHING = tool("nothing", properties={}, additionalProperties=False)
ANYTHING = {"name": "anything"}


def allowed(constraint: Constraint, *, ending: bool = False) -> list[int] | None:
    mask = np.zeros(CONSTRAINER.words, np.int32)
    if not constraint.fill(mask, ending=ending):
        return None
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: TOKENIZER.vocab_size]
    return [int(n) for n in np.nonzero(bits)[0]]


def walk(constraint: Constraint, start: Sequence[int], *, seed: int, close: float = 0.6) -> list[int]:
    """Samples at random under the mask until the turn ends; `close`: chance to take a DSML token where one may
    come, so that texts end."""
    chance = random.Random(seed)
    ids = list(start)
    for token in start:
        constraint.push(token)
    for _ in range(4000):
        choices = allowed(constraint)
        assert choices, "nothing may come: the grammar is at a dead end"
        token = chance.choice(choices)
        if MARK in choices and chance.random() < close:
            token = MARK
        ids.append(token)
        constraint.push(token)
        if token == TOKENIZER.eos_id:
            return ids
    raise AssertionError("the walk did not end")


def read(ids: Sequence[int], tools: Sequence[dict[str, Any]], *, mode: str = "chat") -> Any:
    return parse_pieces(TOKENIZER.pieces(ids), thinking_mode=mode, tools=tools, finish_reason="stop")


@pytest.mark.parametrize("seed", range(12))
def test_what_any_sampler_writes_is_a_call_valid_against_its_schema(seed: int) -> None:
    tools = [WRITE, NOTHING, ANYTHING]
    ids = walk(CONSTRAINER.constraint(thinking=False, tools=tools), [*LESS, MARK], seed=seed)
    message = read(ids, tools)
    assert message.tool_calls and not message.diagnostics and message.finish_reason == "tool_calls"
    for call in message.tool_calls:
        arguments = values(call.arguments)
        if call.name == "write":
            jsonschema_rs.validate(WRITE["function"]["parameters"], arguments)
        elif call.name == "nothing":
            assert arguments == {}


SCALARS = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "maxLength": 5},
        {"type": "string", "enum": ["x", "x y", 'quo"te', "a/b", "l1\nl2"]},
        {"const": "only"},
        {"type": "integer", "minimum": -3},
        {"type": "number"},
        {"type": "boolean"},
        {"type": ["null", "string"]},
        {"enum": [1, "one", None]},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        {"type": "object", "properties": {"k": {"type": "string"}}, "additionalProperties": False},
        {},
    ]
)
KEYS = st.text(st.sampled_from("abcdefgh_0é "), min_size=1, max_size=6).filter(lambda key: key.strip() == key)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(KEYS, SCALARS, max_size=9), st.data(), st.integers(0, 1 << 30))
def test_made_up_tools_are_called_validly(properties: dict[str, Any], data: st.DataObject, seed: int) -> None:
    required = [key for key in properties if data.draw(st.booleans())]
    offered = [tool("made_up", properties=properties, required=required, additionalProperties=False)]
    ids = walk(CONSTRAINER.constraint(thinking=False, tools=offered, required=True), [], seed=seed)
    message = read(ids, offered)
    assert message.tool_calls and not message.diagnostics
    for call in message.tool_calls:
        arguments = values(call.arguments)
        jsonschema_rs.validate(offered[0]["function"]["parameters"], arguments)
        if len(properties) > MAX_FREE_ORDER:
            assert list(arguments) == [key for key in properties if key in arguments]


def test_a_call_that_a_model_would_write_passes_in_any_order_of_few_parameters() -> None:
    constraint = CONSTRAINER.constraint(thinking=False, tools=[WRITE])
    texts = [
        'tool_calls>\n<', 'invoke name="write">\n<', 'parameter name="count" string="false">12</',
        'parameter>\n<', 'parameter name="path" string="true">a </b> <x\n</y</', "parameter>\n</", "invoke>\n</",
        "tool_calls>",
    ]  # fmt: skip
    ids = [*LESS, MARK]
    for n, text in enumerate(texts):
        ids += [*([MARK] if n else []), *TOKENIZER.encode_text(text)]
    for n, token in enumerate([*ids, TOKENIZER.eos_id]):
        choices = allowed(constraint)
        assert choices is None if n < len(LESS) + 1 else token in (choices or [])
        constraint.push(token)


def test_nothing_is_masked_before_a_call_opens_and_a_mention_opens_none() -> None:
    constraint = CONSTRAINER.constraint(thinking=True, tools=[WRITE])
    for token in [
        *TOKENIZER.encode_text("so a < b, I think"),
        MARK,
        END,
        *TOKENIZER.encode_text("text"),
        MARK,
    ]:
        assert allowed(constraint) is None
        constraint.push(token)
    assert not constraint.opened


def test_without_tools_a_call_is_not_held_to_any_grammar() -> None:
    constraint = CONSTRAINER.constraint(thinking=False)
    for token in [*LESS, MARK]:
        constraint.push(token)
    assert allowed(constraint) is None and not constraint.opened


def test_a_call_inside_reasoning_opens_like_any_other() -> None:
    ids = walk(CONSTRAINER.constraint(thinking=True, tools=[NOTHING]), [*LESS, MARK], seed=3)
    message = read(ids, [NOTHING], mode="thinking")
    assert message.tool_calls[0].name == "nothing"


def test_a_required_call_comes_behind_the_reasoning_and_the_turn_cannot_end_before() -> None:
    constraint = CONSTRAINER.constraint(thinking=True, tools=[WRITE, NOTHING], only="nothing", parallel=False)
    choices = allowed(constraint)
    assert choices is not None and TOKENIZER.eos_id not in choices and END in choices
    assert allowed(constraint, ending=True) == [END]
    ids = walk(constraint, [*TOKENIZER.encode_text("hm"), END], seed=1)
    message = read(ids, [WRITE, NOTHING], mode="thinking")
    assert [call.name for call in message.tool_calls] == ["nothing"] and not message.content


def test_syntax_is_greedy_and_values_are_sampled() -> None:
    constraint = CONSTRAINER.constraint(thinking=False, tools=[WRITE])
    seen: list[tuple[bool, str]] = []
    pieces = [
        *LESS, MARK, *TOKENIZER.encode_text("tool_calls>\n<"), MARK, *TOKENIZER.encode_text('invoke name="write">\n<'),
        MARK, *TOKENIZER.encode_text('parameter name="path" string="true">'), *TOKENIZER.encode_text("value"),
    ]  # fmt: skip
    for token in pieces:
        seen.append((constraint.greedy, TOKENIZER.decode([token])))
        constraint.push(token)
    assert constraint.greedy is False
    assert all(not greedy for greedy, _ in seen[: len(LESS) + 1])
    assert all(greedy for greedy, _ in seen[len(LESS) + 1 : -len(TOKENIZER.encode_text("value"))])


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "why": {"type": "string", "maxLength": 20}},
    "required": ["answer", "why"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tools", [[], [NOTHING]])
def test_an_answer_with_a_schema_is_valid_json_or_a_call(seed: int, tools: list[dict[str, Any]]) -> None:
    ids = walk(CONSTRAINER.constraint(thinking=True, tools=tools, schema=SCHEMA), [END], seed=seed)
    message = read(ids, tools, mode="thinking")
    assert message.tool_calls or message.content
    if not message.tool_calls:
        jsonschema_rs.validate(SCHEMA, values(message.content))


def test_a_string_may_spell_markup() -> None:
    constraint = CONSTRAINER.constraint(thinking=False, tools=[WRITE], required=True, only="write")
    head = [*LESS, MARK, *TOKENIZER.encode_text("tool_calls>\n<"), MARK,
            *TOKENIZER.encode_text('invoke name="write">\n<'), MARK,
            *TOKENIZER.encode_text('parameter name="path" string="true">' + MARKED + "</"), MARK,
            *TOKENIZER.encode_text("parameter>\n<")]  # fmt: skip
    ids = walk(constraint, head, seed=2)
    arguments = values(read(ids, [WRITE]).tool_calls[0].arguments)
    assert arguments["path"] == MARKED


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strange"}, "cannot be followed"),
        ({"$ref": "#/nowhere"}, "cannot be followed"),
        ({"type": "string", "pattern": "(("}, "cannot be followed"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(
    schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ChatError, match=reason):
        CONSTRAINER.constraint(thinking=False, schema=schema)


def test_a_property_that_the_engine_cannot_follow_may_be_any_json() -> None:
    odd = tool("odd", properties={"x": {"type": "number", "multipleOf": "no"}}, required=["x"])
    ids = walk(CONSTRAINER.constraint(thinking=False, tools=[odd], required=True), [], seed=0)
    assert read(ids, [odd]).tool_calls


def test_no_tools_and_unknown_names_are_refused() -> None:
    with pytest.raises(ChatError, match="no tools are offered"):
        CONSTRAINER.constraint(thinking=False, required=True)
    with pytest.raises(ChatError, match="no tool is called 'x'"):
        CONSTRAINER.constraint(thinking=False, tools=[NOTHING], only="x")


def test_a_token_outside_the_mask_lets_go_instead_of_failing() -> None:
    constraint = CONSTRAINER.constraint(thinking=False, tools=[NOTHING])
    for token in [*LESS, MARK, TOKENIZER.encode_text("z")[0]]:
        constraint.push(token)
    assert allowed(constraint) is None


def test_types_follow_references_and_give_up_on_circles() -> None:
    root = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "null"}, "c": {"$ref": "#/$defs/c"}}}
    assert schema_types({"$ref": "#/$defs/a"}, root) == {"null"}
    assert "string" in schema_types({"$ref": "#/$defs/c"}, root)
