"""A real HTTP server on localhost that speaks the chat completions stream from a script.

Each request takes the next step of the script. `strict=True` answers 400, as DeepSeek's API does, when an
assistant message that has tool calls comes back without `reasoning_content`. It records every request body.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Say:
    """One answer: reasoning, content, calls as (name, arguments)."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    finish: str = ""
    chunk: int = 5
    reasoning_name: str = "reasoning_content"
    pause: float = 0.0


@dataclass
class Fail:
    """An HTTP error."""

    status: int
    body: str = '{"error": {"message": "scripted failure"}}'
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Raw:
    """Bytes of an event stream as they are, then the connection closes."""

    body: bytes
    content_type: str = "text/event-stream"


Step = Say | Fail | Raw | Callable[[dict[str, Any]], "Say | Fail | Raw"]


class ScriptedServer:
    """`steps` in order; the last one repeats if `loop`."""

    def __init__(
        self, steps: list[Step], *, strict: bool = False, key: str | None = None, loop: bool = False
    ) -> None:
        self.steps = list(steps)
        self.strict, self.key, self.loop = strict, key, loop
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.closing = threading.Event()
        self.calls = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                try:
                    outer._answer(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def _answer(self, http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if http.path != "/v1/chat/completions":
            return self._fail(http, Fail(404, '{"detail": "Not Found"}'))
        if self.key is not None and http.headers.get("authorization") != f"Bearer {self.key}":
            return self._fail(
                http, Fail(401, '{"error": {"message": "Authentication Fails, invalid api key"}}')
            )
        self.requests.append(body)
        self.headers.append(dict(http.headers.items()))
        if self.strict:
            for message in body["messages"]:
                if message.get("tool_calls") and not isinstance(message.get("reasoning_content"), str):
                    said = "The `reasoning_content` in the thinking mode must be passed back to the API."
                    return self._fail(http, Fail(400, json.dumps({"error": {"message": said}})))
        step = self.steps[0] if self.loop and len(self.steps) == 1 else self.steps.pop(0)
        if callable(step) and not isinstance(step, Say | Fail | Raw):
            step = step(body)
        if isinstance(step, Fail):
            return self._fail(http, step)
        http.send_response(200)
        http.send_header("content-type", step.content_type if isinstance(step, Raw) else "text/event-stream")
        http.send_header("connection", "close")
        http.end_headers()
        http.close_connection = True
        if isinstance(step, Raw):
            http.wfile.write(step.body)
            return None
        for chunk in self._chunks(step):
            http.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            http.wfile.flush()
            if step.pause and self.closing.wait(step.pause):
                return None
        http.wfile.write(b"data: [DONE]\n\n")
        return None

    def _fail(self, http: BaseHTTPRequestHandler, step: Fail) -> None:
        raw = step.body.encode()
        http.send_response(step.status)
        http.send_header("content-type", "application/json")
        http.send_header("content-length", str(len(raw)))
        for name, value in step.headers.items():
            http.send_header(name, value)
        http.end_headers()
        http.wfile.write(raw)

    def _chunks(self, step: Say) -> Iterator[dict[str, Any]]:
        def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

        def cut(text: str) -> Iterator[str]:
            return (text[i : i + step.chunk] for i in range(0, len(text), step.chunk))

        yield chunk({"role": "assistant", "content": None})
        for piece in cut(step.reasoning):
            yield chunk({step.reasoning_name: piece})
        for piece in cut(step.content):
            yield chunk({"content": piece})
        for index, (name, arguments) in enumerate(step.calls):
            self.calls += 1
            head = {"index": index, "id": f"call_{self.calls}", "type": "function"}
            yield chunk({"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
            for piece in cut(text):
                yield chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
        yield chunk({}, step.finish or ("tool_calls" if step.calls else "stop"))
        usage = {
            "prompt_tokens": 100,
            "completion_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 64},
            "completion_tokens_details": {"reasoning_tokens": 4},
        }
        yield {"id": "c", "choices": [], "usage": usage}

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(*steps: Step, **options: Any) -> Iterator[ScriptedServer]:
    with ScriptedServer(list(steps), **options) as server:
        yield server


def wait_until(condition: Callable[[], bool], *, limit: float = 10.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("the condition did not come true")
        time.sleep(0.01)
