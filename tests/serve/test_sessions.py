"""Sessions and restarts: a conversation is found again, looked at, pinned, forked, written to disk and forgotten."""

import pytest

from rorqual.engine import Engine
from rorqual.serve import ServeConfig

from .conftest import TOOLS, running

HELLO = [
    {"role": "system", "content": "You look at places. " * 20},
    {"role": "user", "content": "What is it?"},
]
LONG = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "temperature": 0}


@pytest.fixture
def disk(engine, tokenizer, tmp_path):
    """`with disk(script=...) as server`: a server over the same directory, each time a new engine."""

    def start(**options):
        fields = {"kv_disk": str(tmp_path / "kv"), **options}
        script = fields.pop("script", None)
        config = ServeConfig(**fields)
        own = Engine(engine.model, prefill_chunk=64, store=config.store_config())
        return closing(own, running(own, tokenizer, script=script, **fields))

    return start


class closing:
    def __init__(self, engine, server):
        self.engine, self.server = engine, server

    def __enter__(self):
        self.running = self.server.__enter__()
        return self.running

    def __exit__(self, *error):
        try:
            self.server.__exit__(*error)
        finally:
            self.running.service.close()
            self.engine.close()


def ask(server, *, session=None, **fields):
    headers = {} if session is None else {"x-session-id": session}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json={**LONG, **fields}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_session_is_listed_inspected_pinned_forked_and_deleted(serve):
    with serve() as server, server.http() as http:
        answer = ask(server, session="main.1")
        ask(server, prompt_cache_key="by key")
        ask(server, user="u@example.org")
        listed = http.get("/v1/sessions").json()["data"]
        assert [one["id"] for one in listed][::2] == ["u@example.org", "main.1"]
        assert listed[1]["id"].startswith("key-") and len(listed) == 3
        one = http.get("/v1/sessions/main.1").json()
        whole = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
        assert (one["tokens"], one["turns"], one["pinned"], one["tier"]) == (whole, 1, False, "ram")
        assert one["cached_tokens"] == {"live": 0, "ram": whole - 1, "disk": 0} and one["kv_bytes"] > 0
        assert http.post("/v1/sessions/main.1/pin", json={}).json()["pinned"] is True
        server.service.scheduler.call(lambda: server.service.engine.prefixes.evict(1 << 40)).result(60)
        assert http.get("/v1/sessions/main.1").json()["cached_tokens"]["ram"] == whole - 1
        twin = http.post("/v1/sessions/main.1/fork", json={"id": "twin"}).json()
        assert (twin["tokens"], twin["parent"], twin["pinned"]) == (whole, "main.1", False)
        taken = http.post("/v1/sessions/main.1/fork", json={"id": "twin"})
        assert taken.status_code == 400 and taken.json()["error"]["param"] == "id"
        assert http.post("/v1/sessions/main.1/fork", json={"id": "a/b"}).status_code == 400
        assert http.post("/v1/sessions/main.1/fork", json={}).json()["id"].startswith("fork-")
        refused = http.post("/v1/sessions/main.1/checkpoint")
        assert refused.status_code == 400 and "nothing on disk" in refused.json()["error"]["message"]
        assert http.delete("/v1/sessions/main.1").json()["deleted"] is True
        gone = http.get("/v1/sessions/main.1")
        assert gone.status_code == 404 and "main.1" in gone.json()["error"]["message"]
        assert (
            http.get("/v1/sessions/twin").json()["cached_tokens"]["ram"] == 0
        )  # they shared what was forgotten
        bad = http.post("/v1/chat/completions", json=LONG, headers={"x-session-id": "a b"})
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "X-Session-Id"


def test_sessions_of_others_are_not_there(serve):
    from rorqual.serve import key_digest

    with serve(key_digests=frozenset(map(key_digest, "ab"))) as server:
        with server.http(headers={"authorization": "Bearer a", "x-session-id": "s"}) as http:
            assert http.post("/v1/chat/completions", json=LONG).status_code == 200
            assert len(http.get("/v1/sessions").json()["data"]) == 1
        with server.http(headers={"authorization": "Bearer b"}) as http:
            assert http.get("/v1/sessions").json()["data"] == []
            assert http.get("/v1/sessions/s").status_code == 404
            assert http.delete("/v1/sessions/s").status_code == 404


def test_sessions_are_bounded_and_pinned_ones_stay(serve):
    with serve(session_bytes=4000) as server, server.http() as http:
        ask(server, session="kept")
        http.post("/v1/sessions/kept/pin", json={})
        for number in range(4):
            ask(server, session=f"s{number}")
        names = [one["id"] for one in http.get("/v1/sessions").json()["data"]]
        assert "kept" in names and "s3" in names and "s0" not in names
        http.post("/v1/sessions/kept/pin", json={"pinned": False})
        pool = server.service.scheduler.call(lambda: server.service.engine.prefixes.evict(1 << 40))
        assert pool.result(60) and server.service.engine.prefixes.pages == 0


def test_a_chain_of_responses_is_a_session(serve):
    with serve() as server, server.openai() as client, server.http() as http:
        one = client.responses.create(model="tiny", input="What is it?", max_output_tokens=16)
        two = client.responses.create(
            model="tiny", input="And now?", max_output_tokens=16, previous_response_id=one.id
        )
        three = client.responses.create(
            model="tiny", input="And then?", max_output_tokens=16, previous_response_id=two.id
        )
        assert three.id != one.id
        (session,) = http.get("/v1/sessions").json()["data"]
        assert (session["id"], session["turns"]) == (one.id, 3)


@pytest.mark.parametrize("window", ["full", "periodic", "zero"])
def test_the_next_turn_after_a_restart_hits_the_disk(disk, window):
    with disk(kv_window=window) as server:
        first = ask(server, session="s")
    message = first["choices"][0]["message"]
    turn = [
        *HELLO,
        {"role": "assistant", "content": message["content"] or ""},
        {"role": "user", "content": "And?"},
    ]
    with disk(kv_window=window) as server, server.http() as http:
        (listed,) = http.get("/v1/sessions").json()["data"]
        before = first["usage"]["prompt_tokens"]
        assert (listed["id"], listed["turns"]) == ("s", 1)
        assert http.get("/v1/sessions/s").json()["tier"] == "disk"
        again = ask(server, session="s", messages=turn)
        cache = again["x_v4"]["cache"]
        assert (
            cache["tier"] == "disk" and cache["cached_tokens"] == cache["disk_tokens"] == before // 128 * 128
        )
        assert 'prefix_cache_disk_hits_total{model_name="tiny"} 128' in http.get("/metrics").text
        fresh = ask(server, messages=turn, seed=4)
        assert fresh["choices"][0]["message"] == again["choices"][0]["message"]


def test_a_checkpoint_writes_now_whatever_the_budget(disk):
    with disk(kv_disk_bytes_per_second=1) as server, server.http() as http:
        ask(server, session="s")
        assert http.get("/v1/sessions/s").json()["cached_tokens"]["disk"] == 0
        assert http.post("/v1/sessions/s/checkpoint").json()["cached_tokens"]["disk"] == 128
        http.delete("/v1/sessions/s")
        assert server.service.engine.store.statistics().pages == 0


def test_lossy_clients_are_repaired_after_a_restart(disk, answer_ids, call):
    ids = answer_ids(reasoning_content="I look into box 1.", tool_calls=[call("box 1")])
    with disk(script=lambda prompt: ids) as server:
        first = ask(server, tools=TOOLS, max_tokens=200)
    message = first["choices"][0]["message"]
    (made,) = message["tool_calls"]
    lossy = {"role": "assistant", "content": None, "tool_calls": [made]}
    sent = [*HELLO, lossy, {"role": "tool", "tool_call_id": made["id"], "content": "a whale"}]
    with disk(script=lambda prompt: ids) as server, server.http() as http:
        shown = http.post(
            "/v1/chat/completions/render", json={**LONG, "messages": sent, "tools": TOOLS}
        ).json()
        assert "I look into box 1." in shown["text"] and shown["replayed_turns"] == 1
        again = ask(server, messages=sent, tools=TOOLS, max_tokens=200)
        assert again["x_v4"]["cache"]["tier"] == "disk"


def test_previous_response_id_survives_a_restart(disk):
    with disk() as server, server.openai() as client:
        one = client.responses.create(model="tiny", input="What is it?", max_output_tokens=16)
    with disk() as server, server.openai() as client:
        two = client.responses.create(
            model="tiny", input="And now?", max_output_tokens=16, previous_response_id=one.id
        )
        assert two.previous_response_id == one.id and two.usage.input_tokens > one.usage.input_tokens


def test_a_raw_text_goes_on_from_the_ids_it_was_sampled_as(disk, tokenizer):
    odd = [tokenizer.encode_text(letter)[0] for letter in "look"]  # not as the tokenizer would have it
    assert tokenizer.encode_text("look") != odd
    body = {"model": "tiny", "prompt": "Please: ", "max_tokens": 4}
    with disk(script=lambda prompt: list(odd)) as server, server.http() as http:
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "look"
        longer = {**body, "prompt": "Please: look here", "max_tokens": 1}
        assert http.post("/v1/completions", json=longer).status_code == 200
        assert (
            odd
            == server.service.scheduler._rows.prompts[-1][-len(odd) - len(tokenizer.encode_text(" here")) :][
                :4
            ]
        )
    with disk(script=lambda prompt: None) as server, server.http() as http:
        http.post("/v1/completions", json=longer)
        prompt = server.service.scheduler._rows.prompts[-1]
        assert tokenizer.decode(prompt[1:]) == longer["prompt"] and any(
            prompt[n : n + 4] == odd for n in range(20)
        )


def test_one_offs_do_not_take_the_main_sessions_prefix_while_it_is_warm(engine, tokenizer):
    room = 6 * engine.pool.layout.held_bytes(400)
    own = Engine(engine.model, prefill_chunk=64, kv_bytes=room)
    with running(
        own, tokenizer, script=lambda prompt: [tokenizer.encode_text("x")[0], 1], kv_bytes=room
    ) as server:
        messages = [*HELLO]
        for turn in range(3):
            main = ask(server, messages=messages)
            messages += [main["choices"][0]["message"], {"role": "user", "content": f"And {turn}?"}]
        for number in range(12):  # each is another agent's only request
            one = [
                {"role": "system", "content": f"{number} is your number. " * 30},
                {"role": "user", "content": "?"},
            ]
            assert ask(server, messages=one)["x_v4"]["cache"]["cached_tokens"] == 0
        assert own.prefixes.statistics().evicted_pages > 4
        cache = ask(server, messages=messages)["x_v4"]["cache"]
        assert (cache["tier"], cache["reason"]) == ("ram", "hit")
        assert cache["cached_tokens"] >= main["usage"]["prompt_tokens"] - 1
    own.close()


def test_at_most_half_of_the_cache_is_pinned(engine, tokenizer):
    room = 2 * engine.pool.layout.held_bytes(500)
    own = Engine(engine.model, prefill_chunk=64, kv_bytes=room)
    with running(own, tokenizer, kv_bytes=room) as server, server.http() as http:
        statuses = []
        for number in range(4):
            one = [{"role": "user", "content": f"{number} is your number. " * 25}]
            ask(server, session=f"s{number}", messages=one, max_tokens=1)
            statuses.append(http.post(f"/v1/sessions/s{number}/pin", json={}).status_code)
        assert statuses[0] == 200 and statuses[-1] == 400
        assert http.post("/v1/sessions/s3/pin", json={}).json()["error"]["code"] == "cache_full"
        assert http.post("/v1/sessions/s0/pin", json={"pinned": False}).status_code == 200
    own.close()
