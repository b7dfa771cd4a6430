"""tool_choice: a call is begun behind the reasoning, whatever the model wanted to do there."""

import json

import pytest

from rorqual import chat

from .conftest import TOOLS

HELLO = [{"role": "user", "content": "What is in box 1?"}]
NAMED = {"type": "function", "function": {"name": "look"}}
JUMP = {"type": "function", "function": {"name": "jump"}}


def two_part_script(tokenizer, place, *, ending):
    """Thinks and ends its reasoning by `ending`; asked to go on from a begun call, ends that call."""
    mark = tokenizer.token_id("｜DSML｜")
    thoughts = [*tokenizer.encode_text("I need not look."), tokenizer.token_id(ending)]

    def written(text):
        pieces = text.split("｜DSML｜")
        ids = tokenizer.encode_text(pieces[0])
        for piece in pieces[1:]:
            ids += [mark, *tokenizer.encode_text(piece)]
        return ids

    def script(prompt):
        text = tokenizer.decode(prompt)
        header = 'invoke name="look">\n<｜DSML｜'
        if not text.endswith("\n<｜DSML｜"):
            return thoughts
        body = (
            f'parameter name="place" string="true">{place}</｜DSML｜parameter>\n'
            "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
        )
        return [*written(body if text.endswith(header) else header + body), tokenizer.eos_id]

    return script


def ask(server, **fields):
    body = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 400, **fields}
    with server.openai() as client:
        answer = client.chat.completions.create(**body)
        return list(answer) if fields.get("stream") else answer


@pytest.mark.parametrize(
    ("choice", "tools"), [("required", [*TOOLS, JUMP]), ("required", TOOLS), (NAMED, TOOLS)]
)
@pytest.mark.parametrize("ending", ["</think>", "<｜end▁of▁sentence｜>"])
def test_a_call_is_made_behind_the_reasoning(serve, tokenizer, choice, tools, ending):
    with serve(script=two_part_script(tokenizer, "box 1", ending=ending)) as server:
        answer = ask(server, tool_choice=choice, tools=tools)
        message = answer.choices[0].message
        assert message.reasoning_content == "I need not look." and not message.content
        (call,) = message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"place": "box 1"})
        assert answer.choices[0].finish_reason == "tool_calls" and "parse" not in answer.model_extra["x_v4"]
        sent = [*HELLO, message.model_dump(exclude_none=True)]
        sent.append({"role": "tool", "tool_call_id": call.id, "content": "a whale"})
        again = ask(server, messages=sent, tool_choice=choice, tools=tools)
        # The turn is the very ids of both parts: all of it but its last token comes from the cache.
        before = answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert again.usage.prompt_tokens_details.cached_tokens >= before - 1
        prompts = server.service.scheduler._rows.prompts
        rendered = chat.render(sent, tools=tools)
        assert any(tokenizer.decode(prompt) == rendered for prompt in prompts)


def test_without_reasoning_the_call_opens_the_answer_and_streams(serve, tokenizer):
    with serve(script=two_part_script(tokenizer, "box 9", ending="</think>")) as server:
        chunks = ask(
            server,
            tool_choice=NAMED,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"thinking": {"type": "disabled"}},
        )
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        calls = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
        assert calls[0].function.name == "look" and calls[0].id
        assert json.loads("".join(call.function.arguments for call in calls)) == {"place": "box 9"}
        prompts = server.service.scheduler._rows.prompts
    assert len(prompts) == 1 and chunks[-1].usage.prompt_tokens < len(prompts[0])


def test_reasoning_that_takes_all_the_room_is_cut(serve, tokenizer):
    endless = [tokenizer.encode_text("x")[0]] * 500
    with serve(script=lambda prompt: endless) as server:
        answer = ask(server, tool_choice="required", max_tokens=60)
    assert answer.choices[0].finish_reason == "length" and not answer.choices[0].message.tool_calls
    assert answer.usage.completion_tokens < 60


def test_a_client_that_leaves_between_the_parts_frees_the_row(serve, tokenizer):
    endless = [tokenizer.encode_text("x")[0]] * 5000
    with serve(script=lambda prompt: endless) as server, server.openai() as client:
        body = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 3000}
        with client.chat.completions.create(**body, tool_choice="required", stream=True) as stream:
            next(iter(stream))
        with server.http() as http:
            while 'vllm:num_requests_running{model_name="tiny"} 0.0' not in http.get("/metrics").text:
                pass


def test_a_tool_without_required_parameters_may_be_called_with_none(serve, tokenizer):
    def script(prompt):
        mark = tokenizer.token_id("｜DSML｜")
        assert tokenizer.decode(prompt).endswith('invoke name="jump">')
        rest = [*tokenizer.encode_text("\n\n</"), mark, *tokenizer.encode_text("invoke>\n</")]
        return [*rest, mark, *tokenizer.encode_text("tool_calls>"), tokenizer.eos_id]

    with serve(script=script) as server:
        off = {"thinking": {"type": "disabled"}}
        answer = ask(server, tools=[JUMP], tool_choice="required", extra_body=off)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("jump", "{}")
