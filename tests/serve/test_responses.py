"""/v1/responses with the unmodified openai package, response validation strict: items, events, stored responses."""

import json

import openai
import pytest

from rorqual.chat import render
from rorqual.serve import ShuttingDown, key_digest
from rorqual.serve.conversation import build_prompt
from rorqual.serve.response_store import ResponseStore, StoredResponse
from rorqual.serve.responses import own_items, pack_reasoning, responses_conversation, unpack_reasoning
from rorqual.serve.responses_schemas import ResponsesRequest

PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOLS = [
    {"type": "function", "name": "look", "description": "Look.", "parameters": PARAMETERS, "strict": True}
]
FUNCTIONS = [
    {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": PARAMETERS}}
]


def ask(client, **fields):
    body = {"model": "tiny", "input": "What is in box 1?", "max_output_tokens": 300, **fields}
    return client.responses.create(**body)


def post(server, **fields):
    with server.http() as http:
        return http.post("/v1/responses", json={"model": "tiny", "input": "x", **fields})


def looker(tokenizer, answer_ids, call, turns=10):
    user = tokenizer.token_id("<｜User｜>")

    def script(prompt):
        turn = prompt.count(user)
        if turn > turns:
            return answer_ids(reasoning_content="I have seen all.", content="Nothing is there.")
        return answer_ids(reasoning_content=f"I look into box {turn}.", tool_calls=[call(f"box {turn}")])

    return script


@pytest.mark.parametrize("summary", [None, "auto"])
def test_items_whole_and_streamed_are_the_same(serve, answer_ids, call, summary):
    ids = answer_ids(reasoning_content="I look.", content="Wait.", tool_calls=[call("box 1"), call("box 2")])
    options = {"reasoning": {"summary": summary}, "include": ["reasoning.encrypted_content"], "tools": TOOLS}
    with serve(script=lambda prompt: ids) as server, server.openai() as client:
        whole = ask(client, **options)
        with client.responses.stream(
            model="tiny", input="What is in box 1?", max_output_tokens=300, **options
        ) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
    for answer in (whole, streamed):
        reasoning, message, first, second = answer.output
        parts = reasoning.summary if summary else reasoning.content
        assert [part.text for part in parts] == ["I look."] and bool(reasoning.summary) == bool(summary)
        assert unpack_reasoning(reasoning.encrypted_content) == "I look."
        assert message.content[0].text == "Wait." and answer.output_text == "Wait."
        assert [json.loads(one.arguments)["place"] for one in (first, second)] == ["box 1", "box 2"]
        assert answer.status == "completed" and answer.tools[0].strict is True
        assert answer.usage.output_tokens_details.reasoning_tokens > 0
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 4
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in streamed.output]
    for event in events[2:-1]:
        assert event.type == "response.output_item.added" or event.output_index <= 3
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == done[2].arguments + done[3].arguments


@pytest.mark.parametrize(
    ("way", "stream"), [("items", True), ("encrypted", False), ("no reasoning", True), ("previous", False)]
)
def test_a_tool_loop_of_ten_turns_hits_the_cache_every_turn(serve, tokenizer, answer_ids, call, way, stream):
    items = [{"role": "user", "content": "What is in box 1?"}]
    fields = {"tools": TOOLS, "instructions": "You look."}
    if way == "encrypted":
        fields |= {"include": ["reasoning.encrypted_content"], "store": False}
    with serve(script=looker(tokenizer, answer_ids, call)) as server, server.openai() as client:
        before, new = 0, items
        for turn in range(1, 12):
            if stream:
                body = {"model": "tiny", "max_output_tokens": 300, **fields}
                with client.responses.stream(input=new, **body) as events:
                    for _ in events:
                        pass
                    answer = events.get_final_response()
            else:
                answer = ask(client, input=new, **fields)
            cached = answer.usage.input_tokens_details.cached_tokens
            assert cached >= 0.95 * before and (turn == 1 or cached == before - 1)
            before = answer.usage.input_tokens + answer.usage.output_tokens
            if turn == 11:
                break
            output = [item.model_dump(exclude_none=True) for item in answer.output]
            if way == "encrypted":
                output[0]["content"] = []
            elif way == "no reasoning":
                output = output[1:]
            (made,) = [item for item in answer.output if item.type == "function_call"]
            result = {"type": "function_call_output", "call_id": made.call_id, "output": f"nothing {turn}"}
            if way == "previous":
                fields["previous_response_id"], new = answer.id, [result]
            else:
                items += [*output, result]
                new = items
        prompts = server.service.scheduler._rows.prompts
    assert answer.output_text == "Nothing is there."
    assert "I look into box 3." in tokenizer.decode(prompts[-1])


def test_the_prompt_is_that_of_the_same_chat(tokenizer, server):
    body = {
        "model": "tiny",
        "instructions": "You look.",
        "tools": TOOLS,
        "input": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "Look."}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Yes.", "annotations": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"place": "box 1"}'},
            {"type": "function_call", "call_id": "c2", "name": "look", "arguments": '{"place": "box 2"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "a whale"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "a shark"}],
            },
            {"type": "reasoning", "summary": [], "encrypted_content": pack_reasoning("Two \ud800 now.")},
            {"role": "assistant", "content": "Two."},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "More."}]},
            {"role": "assistant", "content": "Three."},
            {"role": "user", "content": "Sure?"},
        ],
    }

    def called(identity, place):
        function = {"name": "look", "arguments": json.dumps({"place": place})}
        return {"id": identity, "type": "function", "function": function}

    expected = [
        {"role": "system", "content": "You look."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": "Yes.",
            "reasoning_content": "Hm.",
            "tool_calls": [called("c1", "box 1"), called("c2", "box 2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a whale"},
        {"role": "tool", "tool_call_id": "c2", "content": "a shark"},
        {"role": "assistant", "content": "Two.", "reasoning_content": "Two ? now."},
        {"role": "assistant", "content": "Three.", "reasoning_content": "More."},
        {"role": "user", "content": "Sure?"},
    ]
    body["input"][8]["encrypted_content"] = pack_reasoning("Two ? now.")
    request, store = ResponsesRequest.model_validate(body), ResponseStore(1 << 20)
    conversation = responses_conversation(request, own_items(request, store, ""), store, "")
    prompt = build_prompt(conversation, tokenizer, replay=server.service.replay, tenant="")
    assert tokenizer.decode(prompt.ids) == render(expected, tools=FUNCTIONS)
    # A lone surrogate survives the packing, whatever becomes of it later.
    assert unpack_reasoning(pack_reasoning("Two \ud800 now.")) == "Two \ud800 now."


def test_a_stored_response_can_be_read_referred_to_and_deleted(serve, answer_ids):
    ids = answer_ids(reasoning_content="I know.", content="A whale.")
    with serve(script=lambda prompt: ids) as server, server.openai() as client:
        first = ask(client)
        assert client.responses.retrieve(first.id) == first
        message = first.output[-1]
        again = ask(
            client,
            input=[
                {"role": "user", "content": "What is in box 1?"},
                {"type": "item_reference", "id": message.id},
                {"role": "user", "content": "Sure?"},
            ],
        )
        third = ask(client, input="Really?", previous_response_id=again.id)
        assert third.previous_response_id == again.id
        client.responses.delete(first.id)
        for lost in (
            lambda: client.responses.retrieve(first.id),
            lambda: client.responses.delete(first.id),
            lambda: ask(client, previous_response_id=first.id),
            lambda: ask(client, input=[{"type": "item_reference", "id": message.id}]),
        ):
            with pytest.raises(openai.NotFoundError, match="is kept"):
                lost()
        assert ask(client, input="Well?", previous_response_id=third.id).status == "completed"
        unstored = ask(client, store=False)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(unstored.id)


def test_holders_of_keys_do_not_see_each_other(serve, answer_ids):
    ids = answer_ids(reasoning_content="I know.", content="A whale.")
    keys = frozenset({key_digest("a"), key_digest("b")})
    with serve(script=lambda prompt: ids, key_digests=keys) as server:
        with server.openai(key="a") as client:
            mine = ask(client)
        with server.openai(key="b") as client:
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(mine.id)
            with pytest.raises(openai.NotFoundError):
                ask(client, previous_response_id=mine.id)


def test_the_store_is_bounded_and_a_used_chain_stays():
    def stored(number, previous=None):
        output = [{"id": f"m{number}", "type": "message", "text": "y" * 500}]
        item = {"role": "user", "content": "x"}
        response = {"id": f"r{number}", "output": output}
        return StoredResponse(response=response, input=[item], previous=previous)

    store = ResponseStore(10_000)
    store.put("", stored(0))
    store.put("", stored(1, "r0"))
    for number in range(2, 40):
        store.put("", stored(number))
        assert len(store.history("", "r1")) == 4 and store.held_bytes <= 10_000
    assert store.get("", "r2") is None and store.item("", "m39") is not None and len(store) < 8
    assert store.get("other", "r1") is None and store.item("other", "m1") is None
    assert store.delete("", "r0") and store.history("", "r1") is None
    empty = ResponseStore(0)
    empty.put("", stored(1))
    assert len(empty) == 0


def test_the_end_by_length_is_incomplete(serve, tokenizer):
    endless = tokenizer.encode_text("x") * 99
    with serve(script=lambda prompt: endless) as server, server.openai() as client:
        whole = ask(client, max_output_tokens=5)
        with client.responses.stream(model="tiny", input="x", max_output_tokens=5) as stream:
            kinds = [event.type for event in stream]
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert kinds[-1] == "response.incomplete"


def test_a_call_that_is_cut_is_not_part_of_the_response(serve, answer_ids, call):
    ids = answer_ids(reasoning_content="I look.", tool_calls=[call("a long way " * 9)])
    with serve(script=lambda prompt: ids) as server, server.openai() as client:
        body = {"tools": TOOLS, "max_output_tokens": len(ids) - 12}
        whole = ask(client, **body)
        events = list(ask(client, **body, stream=True))
    final = events[-1].response
    assert [item.type for item in whole.output] == [item.type for item in final.output] == ["reasoning"]
    last = [event.item for event in events if event.type == "response.output_item.done"][-1]
    assert last.type == "function_call" and last.status == "incomplete"


def test_a_failure_inside_a_stream(serve, tokenizer):
    endless = tokenizer.encode_text("x") * 3000
    with serve(script=lambda prompt: endless) as server, server.openai() as client:
        events = []
        for event in ask(client, max_output_tokens=3000, stream=True):
            events.append(event)
            if len(events) == 6:
                server.service.scheduler.abort_all(ShuttingDown("going down"))
    assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
    assert events[-1].response.error.message == "going down"
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"text": {"format": {"type": "xml", "name": "x", "schema": {}}}}, "text.format"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type"),
        ({"input": []}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0",
        ),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}]},
            "input.0.encrypted_content",
        ),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "rq1.AAAA"}]},
            "input.0.encrypted_content",
        ),
        ({"input": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"tool_choice": {"type": "function", "name": "jump"}, "tools": TOOLS}, "tool_choice"),
        ({"stream_options": {}}, "stream_options"),
        ({"max_output_tokens": 10**6}, "messages"),
    ],
)
def test_what_is_not_done_is_refused_by_name(server, fields, param):
    response = post(server, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param) and set(error) == {"message", "type", "param", "code"}
