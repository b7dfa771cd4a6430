"""A tiny random model behind a real uvicorn on 127.0.0.1: its answers are noise, the protocol holds all the same."""

import threading
from contextlib import contextmanager

import anthropic
import httpx
import openai
import pytest

from rorqual import chat
from rorqual.engine import Engine
from rorqual.model import Config, Model
from rorqual.serve import ServeConfig, Server, Service, open_socket
from rorqual.serve.metrics import Metrics
from rorqual.serve.scheduler import Scheduler

from .scripted import scripted_rows

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}},
                "required": ["place"],
            },
        },
    }
]
CONTEXT = 4096


def conversation():
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"place": "box 1"}'}}
    return [
        {"role": "system", "content": "You look at places and tell what is there."},
        {"role": "user", "content": "What is in box 1?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I look into the box.",
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a whale"},
        {"role": "assistant", "content": "There is a whale in box 1.", "reasoning_content": "I know."},
    ]


@pytest.fixture(scope="session")
def tokenizer():
    return chat.train_bpe([chat.render_segments(conversation(), tools=TOOLS)], vocab_size=400)


@pytest.fixture(scope="session")
def engine(tokenizer):
    config = Config.preset("tiny").replace(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1
    )
    return Engine(Model(config).initialize(0), prefill_chunk=64)


class Running:
    """A server that runs in a thread."""

    def __init__(self, service, server, url):
        self.service, self.server, self.url = service, server, url
        self.model = service.config.model_name

    def http(self, **options):
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def openai(self, key="none", **options):
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            timeout=60,
            http_client=httpx.Client(trust_env=False, timeout=60),
            **{"_strict_response_validation": True, **options},
        )

    def anthropic(self, key="none", **options):
        return anthropic.Anthropic(
            base_url=self.url,
            api_key=key,
            max_retries=0,
            timeout=60,
            http_client=anthropic.DefaultHttpxClient(trust_env=False),
            **{"_strict_response_validation": True, **options},
        )


@contextmanager
def running(engine, tokenizer, *, script=None, **options):
    config = ServeConfig(model_name="tiny", **options)
    metrics = Metrics("tiny")
    engine.prefixes.clear()  # the engine is shared by all tests, what they asked is not
    rows = {} if script is None else {"make_rows": scripted_rows(script)}
    scheduler = Scheduler(engine, config, metrics, **rows)
    service = Service(engine, tokenizer, config, scheduler=scheduler, metrics=metrics)
    ready = threading.Event()
    server = Server(service, on_ready=ready.set)
    with open_socket("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert ready.wait(30)
            yield Running(service, server, f"http://127.0.0.1:{sock.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
    assert not scheduler.alive


@pytest.fixture
def serve(engine, tokenizer):
    """`with serve(max_waiting=2) as server`: a server of its own."""

    def start(**options):
        return running(engine, tokenizer, **options)

    return start


@pytest.fixture(scope="session")
def server(engine, tokenizer):
    """One server for the tests that leave nothing behind."""
    with running(engine, tokenizer) as one:
        yield one


@pytest.fixture
def answer_ids(tokenizer):
    """Ids of an assistant message as the model would write it after the cue."""

    def make(thinking=True, **message):
        message = {"role": "assistant", "content": "", **message}
        segments = chat.render_segments(
            [{"role": "user", "content": "x"}, message],
            thinking_mode="thinking" if thinking else "chat",
            drop_thinking=False,
        )
        return tokenizer.encode_segments([segment for segment in segments if segment.generated])

    return make


@pytest.fixture
def call():
    def make(place, identity="x", name="look"):
        import json

        arguments = json.dumps({"place": place})
        return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}

    return make
