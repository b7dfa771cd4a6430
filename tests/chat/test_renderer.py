"""The renderer's rules beyond the vectors: messages, keep rule, append-only, bridge, segments, errors."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rorqual.chat import Message, RenderError, ToolCall, render, render_bridge, render_segments
from rorqual.chat.profile import SPECIAL_TOKENS
from tests.chat.conversations import (
    BOS,
    EOS,
    SPECIALS,
    TOOLS,
    D,
    agent_turns,
    assistants,
    hostile_texts,
    texts,
)

U, A, T, TE = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
MODES = st.sampled_from(["thinking", "chat"])


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content="", reasoning="", calls=(), **more):
    tool_calls = [
        {"id": i, "type": "function", "function": {"name": "now", "arguments": "{}"}} for i in calls
    ]
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": tool_calls,
        **more,
    }


def result(content, call_id=None):
    return {"role": "tool", "content": content, "tool_call_id": call_id}


# --- messages


def test_dataclasses_render_as_dicts_do():
    call = ToolCall(name="now", arguments='{"a": 1.50}', id="c1")
    ours = [
        Message(role="system", content="s", tools=TOOLS, response_format={"type": "json_object"}),
        Message(role="user", content="u"),
        Message(role="assistant", content="x", reasoning_content="r", tool_calls=[call]),
        Message(role="tool", content="t", tool_call_id="c1"),
        Message(role="user", content="q", task="query"),
        Message(role="assistant", content="y", wo_eos=True),
    ]
    assert render(ours) == render([m.to_openai() for m in ours])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\n\nb"),
        ([], ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool", "latest_reminder"])
def test_null_and_parts_are_text_everywhere(role, content, text):
    assert render([{"role": role, "content": content}]) == render([{"role": role, "content": text}])


@pytest.mark.parametrize(
    ("value", "text"), [({"a": [1, "é"]}, '{"a": [1, "é"]}'), (3, "3"), ([1, 2], "[1, 2]")]
)
def test_a_tool_result_that_is_json_is_written_as_json(value, text):
    assert render([user("u"), result(value)]) == render([user("u"), result(text)])


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"n": 1.5}, f'<{D}parameter name="n" string="false">1.5</{D}parameter>'),
        ("not json", f'<{D}parameter name="arguments" string="true">not json</{D}parameter>'),
        ("[1]", f'<{D}parameter name="arguments" string="false">[1]</{D}parameter>'),
        ('{"x": NaN}', f'<{D}parameter name="arguments" string="true">{{"x": NaN}}</{D}parameter>'),
        (None, f'<{D}parameter name="arguments" string="false">null</{D}parameter>'),
        ('{"n": 1E5, "m": -0}', f'<{D}parameter name="n" string="false">100000.0</{D}parameter>'),
        ('{"a": "1", "a": "2"}', f'<{D}parameter name="a" string="true">2</{D}parameter>'),
    ],
)
def test_arguments_of_a_call(arguments, parameter):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    assert parameter in render([user("u"), {"role": "assistant", "tool_calls": [call]}])


def test_reasoning_may_be_spelled_as_servers_do():
    spelled = {"role": "assistant", "content": "x", "reasoning": "r"}
    assert render([user("u"), spelled]) == render([user("u"), assistant("x", "r")])


def test_request_tools_stand_on_the_first_system_message_or_alone_at_the_head():
    system = {"role": "system", "content": "s"}
    on_message = [{**system, "tools": TOOLS}, user("u")]
    assert render([system, user("u")], tools=TOOLS) == render(on_message)
    assert render(on_message, tools=TOOLS) == render(on_message)
    alone = [{"role": "system", "content": "", "tools": TOOLS}, user("u")]
    assert render([user("u")], tools=TOOLS) == render(alone)
    assert render([user("u")], tools=[]) == render([user("u")])
    later = [user("u"), system, user("v")]
    assert render(later, tools=TOOLS) == render([alone[0], *later])


def test_rendering_leaves_the_caller_s_messages_alone():
    messages = [user("a"), assistant("", "r", ["c1", "c2"]), result("2", "c2"), result("1", "c1")]
    before = json.dumps(messages)
    render(messages, tools=TOOLS)
    assert json.dumps(messages) == before


# --- rules


def test_results_are_sorted_by_the_calls_before_them_and_texts_keep_their_place():
    head = [user("u"), assistant("", "", ["c1", "c2", "c3"])]
    tail = [result("3", "c3"), user("mid"), result("?", "zz"), result("1", "c1")]
    text = render([*head, *tail])
    blocks = [
        "<tool_result>?</tool_result>",
        "mid",
        "<tool_result>1</tool_result>",
        "<tool_result>3</tool_result>",
    ]
    assert "\n\n".join(blocks) in text
    unnamed = [result("b"), result("a")]
    assert "b</tool_result>\n\n<tool_result>a" in render([*head, *unnamed])


def test_a_task_ends_the_merge_for_users_but_not_for_results():
    assert render([user("a", task="query"), user("b")]).count(U) == 2
    assert render([user("a", task="query"), result("b")]).count(U) == 1
    assert "<｜query｜>" not in render([user("a"), user("b", task="query")])


@pytest.mark.parametrize(
    ("profile", "level", "begins"),
    [
        ("v4", None, "u"),
        ("v4", "high", "u"),
        ("v4", "max", "Reasoning Effort: Absolute"),
        ("v4-0731", "low", "u"),
        ("v4-0731", "high", "Reasoning Effort: Absolute"),
        ("v4-0731", "max", "Reasoning Effort: Beyond"),
    ],
)
def test_reasoning_effort_by_profile(profile, level, begins):
    text = render([{"role": "system", "content": "u"}], reasoning_effort=level, profile=profile)
    assert text.startswith(BOS + begins)
    options = {"reasoning_effort": level, "profile": profile, "thinking_mode": "chat"}
    assert render([{"role": "system", "content": "u"}], **options) == BOS + "u"


def test_the_url_of_read_url_is_set_off_by_a_token_only_there():
    marker = "<｜extracted_url｜>"
    segments = render_segments([user(f"see {marker} {marker}http://x", task="read_url")])
    assert [s.text for s in segments if s.special] == [BOS, U, marker, "<｜read_url｜>"]
    assert marker not in [s.text for s in render_segments([user(f"a{marker}b")]) if s.special]


def test_context_renders_only_what_follows():
    first = [{"role": "system", "content": "s", "tools": TOOLS}, user("u"), assistant("", "r", ["c1", "c2"])]
    more = [result("2", "c2"), result("1", "c1"), assistant("x", "q")]
    assert render(first) + render(more, context=first) == render(first + more)
    assert render([user("v")], context=[user("u")]).startswith(U)


# --- keep rule


def test_reasoning_of_a_running_loop_survives_without_a_tools_field():
    loop = [user("u"), assistant("", "plan", ["c1"]), result("1", "c1")]
    assert f"{T}plan{TE}" in render(loop)
    assert "plan" not in render(loop, keep="official")


def test_without_tools_earlier_reasoning_goes_as_published():
    history = [user("a"), assistant("b", "why"), user("c")]
    assert render(history) == render(history, keep="official")
    assert "why" not in render(history)
    assert "why" in render(history, drop_thinking=False)


# --- append-only (spec section 6)


def steps_of(steps):
    """The conversation after each step."""
    messages = []
    for step in steps:
        messages = messages + step
        yield messages, step


@given(steps=agent_turns(), mode=MODES, declared=st.booleans())
def test_with_tools_the_text_only_grows(steps, mode, declared):
    tools = TOOLS if declared or mode == "chat" else None
    assume(tools or any(m.get("tool_calls") for m in steps[0] + steps[1]))
    before = ""
    for messages, _ in steps_of(steps):
        text = render(messages, tools=tools, thinking_mode=mode)
        assert text.startswith(before)
        before = text


@given(steps=agent_turns(texts=hostile_texts), mode=MODES)
def test_a_bridge_is_what_a_full_render_adds(steps, mode):
    previous, calls, count = None, [], 0
    for messages, step in steps_of(steps):
        now = render_segments(messages, tools=TOOLS, thinking_mode=mode)
        if previous is not None and step[0]["role"] != "assistant":
            bridge = render_bridge(step, previous_calls=calls, thinking_mode=mode, first_turn=count)
            assert previous + bridge == now
        previous, count = now, len(messages)
        calls = step[-1].get("tool_calls") or calls


HISTORY = [{"role": "system", "content": "s"}, user("a"), assistant("b", "r")]
LOOP = [user("a"), assistant("", "r", ["c1", "c2"])]
WITH_TOOLS = {"role": "system", "content": "", "tools": TOOLS}


@pytest.mark.parametrize(
    ("history", "more", "options"),
    [
        (HISTORY, [user("c")], {}),
        ([user("a"), assistant("b", "")], [user("c")], {}),
        (LOOP, [result("1", "c1"), result("2", "c2")], {"keep": "official"}),
        ([user("a")], [user("b")], {}),
        ([WITH_TOOLS, *LOOP, result("2", "c2")], [result("1", "c1")], {}),
        ([user("a")], [{"role": "system", "content": "s"}], {}),
        ([{"role": "developer", "content": "d"}, assistant("b", "r")], [user("c")], {}),
        ([*HISTORY, user("c"), assistant("d", "q")], [{"role": "system", "tools": TOOLS}], {}),
        ([user("a", task="query")], [user("b")], {}),
    ],
    ids=[
        *("dropped answer", "dropped empty reasoning", "official tool results", "user after user"),
        *("late result", "system after user", "developer vanishes", "first tools late", "pending task"),
    ],
)
def test_where_the_format_is_not_append_only(history, more, options):
    """The "no" rows: if one of these starts to hold, the docs and the cache's reports must change."""
    assert not render(history + more, **options).startswith(render(history, **options))


def test_what_changes_at_the_head_is_a_new_prefix():
    base = render(HISTORY, tools=TOOLS)
    assert not render([*HISTORY, user("c")], tools=TOOLS[:1]).startswith(base)
    assert not render([*HISTORY, user("c")], tools=TOOLS[::-1]).startswith(base)
    assert not render([*HISTORY, user("c")], tools=TOOLS, reasoning_effort="max").startswith(base)
    assert not render([*HISTORY, user("c")], tools=TOOLS, thinking_mode="chat").startswith(base)


def test_the_cost_of_dropping_is_the_last_answer_only():
    before, after = render(HISTORY), render([*HISTORY, user("c")])
    common = before.index(A) + len(A)
    assert before[:common] == after[:common] and before[common:] != after[common : len(before)]


@pytest.mark.parametrize(
    ("history", "more", "mode"),
    [
        (HISTORY[:2], [assistant("b", "r")], "thinking"),
        (HISTORY, [user("c")], "chat"),
        ([WITH_TOOLS, *HISTORY[1:]], [{"role": "latest_reminder", "content": "t"}, user("c")], "thinking"),
        ([WITH_TOOLS, *HISTORY[1:]], [{"role": "developer", "content": "c"}], "thinking"),
        ([user("a", task="query"), assistant("q")], [user("c")], "thinking"),
    ],
)
def test_where_the_format_is_append_only(history, more, mode):
    assert render(history + more, thinking_mode=mode).startswith(render(history, thinking_mode=mode))


# --- segments


def specials(messages, **options):
    return [(s.text, s.turn) for s in render_segments(messages, **options) if s.special]


def blanked(message):
    """The same message with every text of a user, tool or model emptied: what is left is the grammar's
    own."""
    out = {**message, "content": "x" if message["role"] == "developer" else ""}
    out["reasoning_content"] = ""
    if message.get("tool_calls"):
        calls = []
        for c in message["tool_calls"]:
            keys = json.loads(c["function"]["arguments"])
            calls.append({**c, "function": {"name": "f", "arguments": json.dumps(dict.fromkeys(keys, ""))}})
        out["tool_calls"] = calls
    return out


@settings(max_examples=200)
@given(
    messages=st.lists(
        assistants(hostile_texts, keys=hostile_texts, values=hostile_texts)
        | st.builds(user, hostile_texts)
        | st.builds(result, hostile_texts, st.just("c0"))
        | st.builds(lambda t: {"role": "latest_reminder", "content": t}, hostile_texts),
        max_size=6,
    ),
    system=hostile_texts,
    description=hostile_texts,
    mode=MODES,
    keep=st.sampled_from(["auto", "official"]),
)
def test_no_text_makes_a_special_segment(messages, system, description, mode, keep):
    def tools(text):
        return [{"type": "function", "function": {"name": text, "description": text}}]

    options = {"thinking_mode": mode, "keep": keep}
    dirty = [{"role": "system", "content": system, "tools": tools(description)}, *messages]
    clean = [{"role": "system", "content": "", "tools": tools("")}, *map(blanked, messages)]
    assert specials(dirty, **options) == specials(clean, **options)
    segments = render_segments(dirty, **options)
    assert "".join(s.text for s in segments) == render(dirty, **options)
    assert all(s.text in SPECIAL_TOKENS for s in segments if s.special)


def test_generated_marks_exactly_what_the_model_writes():
    messages = [user("u"), assistant("say", "why", ["c1"]), result("1", "c1"), assistant("end", "ok")]
    for mode, first, last in (("thinking", f"why{TE}say", f"ok{TE}end"), ("chat", "say", "end")):
        segments = render_segments(messages, tools=TOOLS, thinking_mode=mode)
        call = f'\n\n<{D}tool_calls>\n<{D}invoke name="now">\n\n</{D}invoke>\n</{D}tool_calls>'
        assert "".join(s.text for s in segments if s.generated and s.turn == 1) == first + call + EOS
        assert "".join(s.text for s in segments if s.generated and s.turn == 3) == last + EOS
        assert {s.turn for s in segments if s.generated} == {1, 3}
        cue = T if mode == "thinking" else TE
        assert [s.text for s in segments if s.special and s.turn == 0] == [U, A, cue]
        assert segments[0].turn == segments[1].turn == -1


@given(message=assistants(texts), mode=MODES)
def test_the_generated_part_is_the_completion(message, mode):
    prompt, full = (render([user("u"), *m], thinking_mode=mode) for m in ([], [message]))
    segments = render_segments([user("u"), message], thinking_mode=mode)
    assert prompt + "".join(s.text for s in segments if s.generated) == full


# --- errors


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([user("u"), {"role": "robot"}], {}, r"messages\[1\]\.role: unknown role 'robot'"),
        ([{"content": "x"}], {}, r"messages\[0\]\.role: has no role"),
        (["hello"], {}, r"messages\[0\]: is str"),
        ([{"role": "developer", "content": ""}], {}, r"messages\[0\]\.content: a developer message needs"),
        ([user([{"type": "image_url", "image_url": "x"}])], {}, r"messages\[0\]\.content: .*'image_url'"),
        ([user(7)], {}, r"messages\[0\]\.content: content is int"),
        ([result({1, 2})], {}, r"messages\[0\]\.content: tool result is not text"),
        ([user("u", task="dance")], {}, r"messages\[0\]\.task: unknown task 'dance'"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], {}, r"messages\[0\]\.tool_calls: .*name"),
        ([{"role": "assistant", "tool_calls": "x"}], {}, r"messages\[0\]\.tool_calls: pass a list"),
        ([{"role": "assistant", "reasoning_content": 3}], {}, r"messages\[0\]\.reasoning_content: .*int"),
        ([{"role": "system", "tools": "x"}], {}, r"messages\[0\]\.tools: pass a list"),
        ([{"role": "system", "tools": ["x"]}], {}, r"messages\[0\]\.tools: a tool is"),
        ([{"role": "system", "response_format": {1, 2}}], {}, r"\.response_format: cannot be written"),
        ([{"role": "system", "tools": TOOLS}], {"tools": TOOLS[:1]}, r"\.tools: has tools of its own"),
        ([user("u")], {"thinking_mode": "deep"}, "thinking_mode 'deep'"),
        ([user("u")], {"keep": "all"}, "keep 'all'"),
        ([user("u")], {"reasoning_effort": "low"}, "'low' does not exist in profile 'v4'"),
        ([user("u")], {"profile": "v9"}, "unknown format profile 'v9'"),
    ],
)
def test_bad_input_is_named(messages, options, says):
    with pytest.raises(RenderError, match=says):
        render(messages, **options)


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ([], "at least one"),
        ([assistant("x")], r"messages\[5\]\.role: role 'assistant'"),
        ([{"role": "system", "content": "x"}], "role 'system'"),
        ([user("u"), {"role": "latest_reminder", "content": "t"}], r"messages\[6\]: a bridge cannot end"),
    ],
)
def test_a_bridge_refuses_what_it_cannot_carry(new, says):
    with pytest.raises(RenderError, match=says):
        render_bridge(new, first_turn=5)
    with pytest.raises(RenderError, match="thinking_mode"):
        render_bridge([user("u")], thinking_mode="no")


def test_every_marker_of_the_strategies_is_a_special_token():
    assert set(SPECIALS) <= set(SPECIAL_TOKENS)
