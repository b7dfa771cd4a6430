"""A client that goes away frees its row, streamed or not, running or queued."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Look into the box, and tell."}],
    "max_tokens": 3000,
}
RAW = {"model": "tiny", "prompt": "Look into the box, and tell.", "max_tokens": 3000}


def until(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.01)


@contextmanager
def asking(server, path, body):
    """A request whose answer nobody reads; leaving closes the connection."""
    parts = urlsplit(server.url)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        yield


@pytest.fixture
def endless(serve):
    with serve(script=lambda prompt: [40] * 4000, max_running=1, keep_alive_seconds=0.05) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {**RAW, "stream": True}),
        ("/v1/completions", RAW),
    ],
)
def test_a_client_that_goes_away_frees_its_row(endless, path, body):
    scheduler = endless.service.scheduler
    with asking(endless, path, body):
        until(lambda: any(len(job.answer.ids) > 10 for job in list(scheduler._running.values())))
    until(lambda: scheduler.held == 0 and len(scheduler._rows) == 0 and scheduler._reserved == 0)
    # What was computed is a prefix to the token, the part of the answer included; a retry feeds one token.
    prompt = scheduler._rows.prompts[0]
    assert scheduler.engine.prefixes.match([*prompt, *[40] * 4000]).tokens > len(prompt) + 9
    with endless.openai() as client:
        again = client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens == len(prompt) - 1


def test_queued_clients_that_go_away(endless):
    scheduler = endless.service.scheduler
    with asking(endless, "/v1/chat/completions", {**CHAT, "stream": True}):
        until(lambda: scheduler._running)
        for body in (CHAT, {**CHAT, "stream": True}):
            with asking(endless, "/v1/chat/completions", body):
                until(lambda: scheduler._waiting == 1)
            until(lambda: scheduler._waiting == 0)
        assert len(scheduler._running) == 1
    until(lambda: scheduler.held == 0)
    with endless.http() as http:
        assert 'rorqual:requests_aborted_total{model_name="tiny"} 3.0' in http.get("/metrics").text
