"""Real clients, unmodified: the openai package with strict response validation; tool loops; a crowd."""

import asyncio
import json
from itertools import pairwise

import httpx
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from rorqual import chat

from .conftest import TOOLS

HELLO = [{"role": "user", "content": "What is in box 1?"}]


def test_openai_chat_and_stream(server):
    with server.openai() as client:
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, temperature=0)
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 8
        assert answer.usage.completion_tokens_details.reasoning_tokens == 8
        assert answer.choices[0].message.reasoning_content
        stream = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_completion_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        said = "".join(c.choices[0].delta.reasoning_content or "" for c in chunks[1:-2])
        assert said == answer.choices[0].message.reasoning_content and chunks[-1].usage.completion_tokens == 8


def test_openai_other_paths(server):
    with server.openai() as client:
        done = client.completions.create(model="tiny", prompt="What is", max_tokens=5, temperature=0)
        assert done.choices[0].finish_reason == "length" and done.usage.completion_tokens == 5
    # OpenAI streams `finish_reason: null` here, which the package's own type does not allow.
    with server.openai(_strict_response_validation=False) as client:
        parts = client.completions.create(
            model="tiny", prompt=["What is"], max_tokens=5, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
    with server.openai() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")
        with pytest.raises(openai.BadRequestError, match="n = 3"):
            client.chat.completions.create(model="tiny", messages=HELLO, n=3)


def looker(tokenizer, answer_ids, call, turns=10):
    """A script that calls `look` until it has seen ten results."""
    user = tokenizer.token_id("<｜User｜>")

    def script(prompt):
        turn = prompt.count(user)
        if turn > turns:
            return answer_ids(reasoning_content="I have seen all.", content="Nothing is there.")
        return answer_ids(reasoning_content=f"I look into box {turn}.", tool_calls=[call(f"box {turn}")])

    return script


def kept(message):
    return message.model_dump(exclude_none=True)


def without_reasoning(message):
    """What lossy clients send back: no reasoning, arguments written anew."""
    out = {"role": "assistant", "content": message.content}
    if message.tool_calls:
        out["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        for one in out["tool_calls"]:
            one["function"]["arguments"] = json.dumps(json.loads(one["function"]["arguments"]), indent=1)
    return out


@pytest.mark.parametrize("send_back", [kept, without_reasoning])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop_of_ten_turns_hits_the_cache_every_turn(
    serve, tokenizer, answer_ids, call, send_back, stream
):
    messages = [{"role": "system", "content": "You look."}, *HELLO]
    with serve(script=looker(tokenizer, answer_ids, call)) as server, server.openai() as client:
        before = 0
        for turn in range(1, 12):
            fields = {"model": "tiny", "messages": messages, "tools": TOOLS, "max_tokens": 300}
            if stream:
                state = ChatCompletionStreamState()
                options = {"stream": True, "stream_options": {"include_usage": True}}
                for chunk in client.chat.completions.create(**fields, **options):
                    state.handle_chunk(chunk)
                answer = state.get_final_completion()
            else:
                answer = client.chat.completions.create(**fields)
            cached = answer.usage.prompt_tokens_details.cached_tokens
            # Everything up to the last token of the last answer came from the cache.
            assert cached >= 0.95 * before and (turn == 1 or cached == before - 1)
            before = answer.usage.prompt_tokens + answer.usage.completion_tokens
            message = answer.choices[0].message
            messages.append(send_back(message))
            if turn == 11:
                assert message.content == "Nothing is there." and answer.choices[0].finish_reason == "stop"
                break
            assert answer.choices[0].finish_reason == "tool_calls"
            one = message.tool_calls[0]
            assert json.loads(one.function.arguments) == {"place": f"box {turn}"}
            messages.append({"role": "tool", "tool_call_id": one.id, "content": f"nothing in box {turn}"})
        prompts = server.service.scheduler._rows.prompts
        assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(prompts))
        assert "I look into box 3." in tokenizer.decode(prompts[-1])


def test_an_edited_answer_is_rendered_as_edited(serve, tokenizer, answer_ids):
    ids = answer_ids(reasoning_content="I know.", content="A whale.")
    with serve(script=lambda prompt: ids) as server, server.openai() as client:
        answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, max_tokens=99)
        assert answer.choices[0].message.content == "A whale."
        edited = {"role": "assistant", "content": "A shark.", "reasoning_content": "I guess."}
        again = [*HELLO, edited, {"role": "user", "content": "Sure?"}]
        client.chat.completions.create(model="tiny", messages=again, tools=TOOLS, max_tokens=99)
        prompt = tokenizer.decode(server.service.scheduler._rows.prompts[-1])
    assert prompt == chat.render(again, tools=TOOLS)


def test_the_next_question_without_tools_recomputes_the_last_answer_alone(serve, answer_ids):
    ids = answer_ids(reasoning_content="I know it very well.", content="A whale.")
    with serve(script=lambda prompt: ids) as server, server.openai() as client:
        first = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=99)
        history = [*HELLO, kept(first.choices[0].message), {"role": "user", "content": "Sure?"}]
        second = client.chat.completions.create(model="tiny", messages=history, max_tokens=99)
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1


async def test_sixty_four_at_once_get_their_own_answers(serve):
    bodies = [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"box {n}"}],
            "max_tokens": 6,
            "seed": n % 4,
        }
        for n in range(64)
    ]
    with serve(max_running=16) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as http:

            async def ask(body):
                response = await http.post("/v1/chat/completions", json=body)
                assert response.status_code == 200, response.text
                return response.json()["choices"][0]["message"]

            crowd = await asyncio.gather(*(ask(body) for body in bodies))
            for body, message in list(zip(bodies, crowd, strict=True))[::9]:
                assert await ask(body) == message
            figures = (await http.get("/metrics")).text
        assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in figures
        done = [line for line in figures.split("\n") if line.startswith("vllm:request_success_total{")]
        assert sum(float(line.rpartition(" ")[2]) for line in done) == 72
