"""Malformed completions, one test for each row of the table in spec/encoding.md 4.4."""

import json

import pytest

from rorqual.chat import ParseError, ParserOptions, StreamParser, parse
from tests.chat.conversations import EOS, TOOLS, D, block, invoke, param

LS = param("command", "ls")
BASH = invoke("bash", LS)
OK = "</think>" + block(BASH)
CALL = [("bash", {"command": "ls"})]
SCHEMALESS = [{"type": "function", "function": {"name": "f"}}]


def check(text, *, calls=(), content="", reasoning="", reason=None, kinds=(), strict_raises=True, **kwargs):
    """Parses in one piece and in single characters; strict must raise, as the official parser does."""
    kwargs.setdefault("tools", TOOLS)
    whole = parse(text, **kwargs)
    parser = StreamParser(**{k: v for k, v in kwargs.items() if k != "promote_unclosed_reasoning"})
    events = [e for c in text for e in parser.push(c)] + parser.close()
    for m in (whole,) if "promote_unclosed_reasoning" in kwargs else (whole, parser.message):
        assert [(c.name, json.loads(c.arguments)) for c in m.tool_calls] == list(calls)
        assert (m.reasoning_content, m.content) == (reasoning, content)
        assert m.finish_reason == (reason or ("tool_calls" if calls else "stop"))
        assert [d.kind for d in m.diagnostics] == list(kinds)
    if strict_raises:
        with pytest.raises(ParseError, match="character"):
            parse(text, thinking_mode=kwargs.get("thinking_mode", "thinking"), strict=True)
    return whole, events


def test_no_think_end_before_eos():
    check(f"all of it{EOS}", reasoning="all of it", kinds=["unclosed_reasoning"])


def test_no_think_end_before_eos_can_be_promoted_to_content():
    check(f"hi{EOS}", content="hi", kinds=["unclosed_reasoning"], promote_unclosed_reasoning=True)


def test_no_think_end_before_the_end_by_length():
    check("as far as it g", reasoning="as far as it g", reason="length")


@pytest.mark.parametrize("tools", [TOOLS, None])
def test_call_inside_reasoning(tools):
    check(f"I do{block(BASH)}{EOS}", reasoning="I do", calls=CALL, kinds=["call_in_reasoning"], tools=tools)


def test_call_of_an_unknown_tool_inside_reasoning_is_a_mention():
    text = f"maybe{block(invoke('rm'))}</think>ok{EOS}"
    m = parse(text, tools=TOOLS)
    assert m.tool_calls == [] and m.content == "ok" and D not in m.reasoning_content
    assert {d.kind for d in m.diagnostics} == {"markup_in_text"}


def test_think_echoed_at_the_start():
    check(f"<think>r</think>c{EOS}", reasoning="r", content="c", kinds=["echoed_think"])


@pytest.mark.parametrize("marker", ["</think>", "<think>"])
def test_think_markers_later_in_content(marker):
    check(f"r</think>a{marker}b{EOS}", reasoning="r", content="a b", kinds=["stray_special"])


def test_second_reasoning_pass_stays_content():
    text = f"r</think>more thought</think>c{EOS}"
    check(text, reasoning="r", content="more thought c", kinds=["stray_special"])


@pytest.mark.parametrize("n", [0, 1])
def test_separator_of_less_than_two_newlines(n):
    text = "r</think>c" + "\n" * n + block(BASH)[2:] + EOS
    whole, _ = check(text, reasoning="r", content="c", calls=CALL, kinds=["separator"])
    assert whole.raw == text


def test_text_between_block_end_and_eos():
    text = OK + "\nDone!" + EOS
    whole, _ = check(text, calls=CALL, kinds=["text_after_calls"])
    assert whole.raw == text


def test_second_block():
    check(OK + block(invoke("now")) + EOS, calls=[*CALL, ("now", {})], kinds=["second_block"])


def test_text_between_calls():
    text = f"</think>\n\n<{D}tool_calls>\n{BASH}\nand then <b>\n{invoke('now')}\n</{D}tool_calls>{EOS}"
    check(text, calls=[*CALL, ("now", {})], kinds=["prose_in_block"])


def test_white_space_and_indentation_between_tags():
    text = (
        f'</think>\n\n<{D}tool_calls>\n\n  <{D}invoke name="bash">\n    {LS}\n\n\t'
        f"{param('timeout', '5', 'false')}\n  </{D}invoke>  \n</{D}tool_calls>\n{EOS}"
    )
    check(text, calls=[("bash", {"command": "ls", "timeout": 5})])


@pytest.mark.parametrize("before", ["", "Working.", "Working.\n\n"])
def test_block_start_missing(before):
    text = f"</think>{before}{BASH}\n</{D}tool_calls>{EOS}"
    check(text, content=before.rstrip("\n"), calls=CALL, kinds=["orphan_invoke"])


def test_block_start_missing_with_an_unknown_name_is_no_call():
    check(f"</think>{invoke('rm')}{EOS}", content="\n\n ", kinds=["markup_in_text"] * 2)


@pytest.mark.parametrize(
    "spell",
    [
        lambda t: t.replace("tool_calls", "toolcalls"),
        lambda t: t.replace("tool_calls", "tool"),
        lambda t: t.replace("tool_calls", "function_calls"),
        lambda t: (
            t.replace("tool_calls", " calls")
            .replace(f"{D}invoke", f"{D} invoke")
            .replace("parameter", " parameter")
        ),
        lambda t: t.replace(D, "｜｜DSML｜｜"),
        lambda t: t.replace(D, "|DSML|"),
        lambda t: t.replace(D, "||DSML||"),
        lambda t: t.replace(D, ""),
    ],
    ids=["toolcalls", "tool", "v3.2", "v4.1", "doubled", "ascii", "doubled ascii", "none"],
)
def test_damaged_start_or_names(spell):
    call = spell(block(BASH, invoke("now")))
    check(f"r</think>c{call}{EOS}", reasoning="r", content="c", calls=[*CALL, ("now", {})],
          kinds=["alias_markup"], strict_raises=D in call)  # fmt: skip
    for tools in (None, []):  # nothing offered: no call is made of damaged markup
        assert parse(f"r</think>c{call}{EOS}", tools=tools).tool_calls == []
    unknown = spell(block(invoke("rm")))
    assert parse(f"r</think>c{unknown}{EOS}", tools=TOOLS).tool_calls == []
    if D not in call:  # without any real marker only at a line start
        in_line = spell("Write " + block(BASH)[2:])
        assert parse(f"r</think>{in_line}{EOS}", tools=TOOLS).tool_calls == []


def test_invoke_close_missing_before_the_next_invoke_and_before_the_block_end():
    open_call = BASH[: -len(f"\n</{D}invoke>")]
    check("</think>" + block(open_call, invoke("now")) + EOS, calls=[*CALL, ("now", {})],
          kinds=["missing_invoke_close"])  # fmt: skip
    check("</think>" + block(open_call) + EOS, calls=CALL, kinds=["missing_invoke_close"])


def test_block_close_missing():
    text = OK[: -len(f"\n</{D}tool_calls>")] + EOS
    check(text, calls=CALL, kinds=["missing_block_close"])


def test_parameter_close_missing_and_the_next_parameter_follows():
    text = "</think>" + block(
        f'<{D}invoke name="bash">\n<{D}parameter name="command" string="true">ls\n'
        f"{param('timeout', '5', 'false')}\n</{D}invoke>"
    )
    calls = [("bash", {"command": "ls", "timeout": 5})]
    check(text + EOS, calls=calls, kinds=["missing_parameter_close"], strict_raises=False)
    # Without a schema, or for a property that is unknown or was given, it is data.
    data = {"command": f'ls\n<{D}parameter name="timeout" string="false">5'}
    check(text + EOS, calls=[("bash", data)], tools=None, strict_raises=False)


def test_parameter_close_missing_and_the_call_ends():
    parameter = f'<{D}parameter name="command" string="true">ls'
    text = "</think>" + block(invoke("bash", parameter))
    check(text + EOS, calls=CALL, kinds=["missing_parameter_close"])


def test_a_closing_tag_inside_a_value_is_data():
    value = f"x</{D}parameter>y</{D}invoke> z</{D}parameterr>"
    text = "</think>" + block(invoke("bash", param("command", value))) + EOS
    check(text, calls=[("bash", {"command": value})])


def test_a_misspelled_closing_tag_is_data_until_a_real_one():
    text = "</think>" + block(invoke("bash", param("command", f"ls</{D}paramter>\n")))
    check(text + EOS, calls=[("bash", {"command": f"ls</{D}paramter>\n"})], strict_raises=False)


@pytest.mark.parametrize(
    ("header", "value", "want"),
    [
        ('name="command"', "5", "5"),
        ('name="timeout"', "5", 5),
        ('name="timeout" string="maybe"', "5", 5),
        ('name="timeout" string=false', "5", 5),
        ('name="timeout"', "five", "five"),
        ('name="other"', '{"a": 1}', {"a": 1}),
        ('name="other"', "a b", "a b"),
    ],
)
def test_string_attribute_missing_or_bad(header, value, want):
    parameter = f"<{D}parameter {header}>{value}</{D}parameter>"
    text = "</think>" + block(invoke("bash", parameter))
    key = header.split('"')[1]
    check(text + EOS, calls=[("bash", {key: want})], kinds=["bad_string_flag"])


@pytest.mark.parametrize("value", ["{'a': 1}", "", "NaN", "-Infinity", "[1,]", "yes"])
def test_json_value_that_is_not_json(value):
    text = "</think>" + block(invoke("bash", param("timeout", value, "false"))) + EOS
    check(text, calls=[("bash", {"timeout": value})], kinds=["invalid_json"], strict_raises=False)


@pytest.mark.parametrize("value", ["1.50", "1e999", "123456789012345678901234567890", "-0", '"\\u00e9"'])
def test_json_values_keep_their_spelling(value):
    text = "</think>" + block(invoke("bash", param("timeout", f" {value}\n", "false"))) + EOS
    assert parse(text, tools=TOOLS).tool_calls[0].arguments == f'{{"timeout": {value}}}'


def test_duplicate_parameter():
    text = "</think>" + block(invoke("bash", LS, param("command", "rm"))) + EOS
    check(text, calls=CALL, kinds=["duplicate_parameter"])


def test_body_is_a_json_object():
    text = "</think>" + block(f'<{D}invoke name="bash">\n{{"command": "ls", "n": {{}}}}\n</{D}invoke>') + EOS
    check(text, calls=[("bash", {"command": "ls", "n": {}})], kinds=["json_body"])


@pytest.mark.parametrize("body", ['{"command": ls}', "{not json", "[1]", "ls -la", "<b>", '"x"'])
def test_other_text_inside_a_call(body):
    text = "</think>" + block(f'<{D}invoke name="bash">\n{body}\n</{D}invoke>', invoke("now")) + EOS
    _, events = check(text, calls=[("now", {})], kinds=["malformed_call"])
    assert [e.index for e in events if e.kind == "call_malformed"] == [0]
    assert [e.index for e in events if e.kind == "call_end"] == [1]


def test_text_after_a_parameter_makes_the_call_malformed():
    text = "</think>" + block(f'<{D}invoke name="bash">\n{LS} | wc\n{LS}\n</{D}invoke>') + EOS
    m = parse(text, tools=None)
    # " | wc" follows the closing tag: that tag is data, the next one closes.
    assert json.loads(m.tool_calls[0].arguments)["command"].startswith(f"ls</{D}parameter> | wc")


@pytest.mark.parametrize("inner", ["", "\n", "\n\n", "  \n"])
def test_no_parameters_with_or_without_the_empty_line(inner):
    text = "</think>" + block(f'<{D}invoke name="now">{inner}</{D}invoke>') + EOS
    check(text, calls=[("now", {})], strict_raises=inner in ("", "  \n"))


def test_empty_block():
    check(f"</think>c\n\n<{D}tool_calls>\n</{D}tool_calls>{EOS}", content="c", strict_raises=False)


@pytest.mark.parametrize("name", ["ba\nsh", "x" * 600, "", f"ba{D}"])
def test_invoke_name_that_is_no_name(name):
    text = "</think>" + block(invoke(name, LS), invoke("now")) + EOS
    check(text, calls=[("now", {})], kinds=["bad_invoke_header"], strict_raises=False)


def test_unknown_tool_is_passed_on():
    text = "</think>" + block(invoke("rm", LS)) + EOS
    check(text, calls=[("rm", {"command": "ls"})], kinds=["unknown_tool"], strict_raises=False)


@pytest.mark.parametrize("key", ["arguments", "input"])
@pytest.mark.parametrize("flag", ["true", "false"])
def test_wrapped_arguments(key, flag):
    text = "</think>" + block(invoke("bash", param(key, ' {"command": "ls"} ', flag))) + EOS
    _, events = check(text, calls=CALL, kinds=["wrapped_arguments"], strict_raises=False)
    assert "".join(e.text for e in events if e.kind == "args") == '{"command": "ls"}'


def test_what_only_looks_like_a_wrapper_stays():
    two = "</think>" + block(invoke("bash", param("input", "{}"), LS)) + EOS
    check(two, calls=[("bash", {"input": "{}", "command": "ls"})], strict_raises=False)
    plain = "</think>" + block(invoke("bash", param("input", "hello"))) + EOS
    check(plain, calls=[("bash", {"input": "hello"})], strict_raises=False)
    unknown = "</think>" + block(invoke("f", param("input", "{}"))) + EOS
    check(unknown, calls=[("f", {"input": "{}"})], tools=SCHEMALESS, strict_raises=False)


def test_tool_choice_none_drops_calls():
    text = "</think>no" + block(BASH) + EOS
    options = ParserOptions(tool_choice="none")
    check(text, content="no", kinds=["unexpected_call"], options=options, strict_raises=False)


@pytest.mark.parametrize(
    "cut", [f"<{D}", f"<{D}tool_", f"<{D}tool_calls>", f"<{D}tool_calls>\n<{D}invoke na"]
)
def test_cut_inside_a_start_tag(cut):
    text = f"r</think>c\n\n{cut}"
    check(text, reasoning="r", content="c", reason="length", kinds=["cut_start_tag"], tools=None)


@pytest.mark.parametrize("keep", [1, 15, 40, 60, 75, 100, 120])
def test_cut_inside_a_call(keep):
    second = invoke("bash", param("command", "0123456789" * 5))
    second = second[: len(f'<{D}invoke name="bash">') + keep]
    text = f"</think>\n\n<{D}tool_calls>\n{invoke('now')}\n" + second
    _, events = check(text, calls=[("now", {})], reason="length", kinds=["truncated_call"])
    assert [e.index for e in events if e.kind == "call_truncated"] == [1]


@pytest.mark.parametrize("text", ["", EOS])
def test_empty_completion(text):
    check(text, thinking_mode="chat", kinds=["empty"], strict_raises=text == "")
    m = parse("</think>" + text)
    assert (m.content, m.reasoning_content, m.tool_calls) == ("", "", [])


def test_coercion_by_schema_is_an_option():
    text = "</think>" + block(invoke("bash", param("timeout", "50"), param("command", "7"))) + EOS
    assert json.loads(parse(text, tools=TOOLS).tool_calls[0].arguments) == {"timeout": "50", "command": "7"}
    on = parse(text, tools=TOOLS, options=ParserOptions(coerce_by_schema=True))
    assert json.loads(on.tool_calls[0].arguments) == {"timeout": 50, "command": "7"}
    odd = "</think>" + block(invoke("bash", param("timeout", "soon"))) + EOS
    kept = parse(odd, tools=TOOLS, options=ParserOptions(coerce_by_schema=True))
    assert json.loads(kept.tool_calls[0].arguments) == {"timeout": "soon"}


def test_markers_cannot_join_from_the_pieces_of_another():
    for inner in ("<think>", "</think>", D, f"<{D}tool_calls>"):
        for tools in (None, TOOLS):
            m = parse(f"x</think>｜DS{inner}ML｜{EOS}", tools=tools)
            assert D not in m.content and "</think>" not in m.content
