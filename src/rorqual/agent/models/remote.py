"""Any OpenAI-compatible chat endpoint, DeepSeek's API first: streaming, retries, reasoning sent back.

Owns one HTTP client, the request body, what is retried and how errors read. Streams are assembled in
assemble.py. Retried: 408, 429, 5xx, timeouts, broken streams (with Retry-After, else growing jittered waits).
Never 400, 401, 404. DeepSeek answers 400 when a turn with calls comes back without its reasoning
(agent_and_serving.md 0.2), so once a model has reasoned, every assistant message carries the field. The key
is read from the environment by NAME, never logged.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import tenacity
from httpx_sse import EventSource, SSEError

from rorqual import __version__
from rorqual.agent.errors import ContextFull, ModelError, SetupError
from rorqual.agent.models.assemble import Assembler, read_usage
from rorqual.agent.models.base import Completion, Delta, OnDelta
from rorqual.agent.models.repair import recover_markup, split_malformed

__all__ = ["RemoteConfig", "RemoteModel"]

_RETRIED = frozenset({408, 425, 429})
_MAX_WAIT = 60.0
_CONTEXT_WORDS = ("context_length_exceeded", "maximum context length", "context length", "context window")


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteConfig:
    """How to reach a model."""

    url: str
    """Base URL (`https://api.deepseek.com`, `http://localhost:8000/v1`), or the full
    `.../chat/completions`."""
    model: str
    """Model name as the server knows it."""
    api_key_env: str | None = None
    """NAME of the environment variable that holds the key; None sends no key."""
    temperature: float | None = None
    """None leaves sampling to the server, as the next two do."""
    top_p: float | None = None
    max_tokens: int | None = None
    reasoning_effort: str | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """More request fields, as they are."""
    attempts: int = 6
    """Tries per request, the first included."""
    first_wait: float = 1.0
    """Seconds before the second try where the server names none; then doubling, with jitter."""
    connect_timeout: float = 10.0
    read_timeout: float = 300.0
    """Seconds of silence (keep-alive comments count as sound) after which a try is given up."""
    request_timeout: float = 3600.0
    """Seconds one try may take in all."""
    max_response_bytes: int = 256 << 20
    """A longer answer is refused."""


class RemoteModel:
    """A `ChatModel` over HTTP. Close it with `aclose`, or use it as an async context manager."""

    profile: Literal["embedded", "remote"] = "remote"

    def __init__(self, config: RemoteConfig) -> None:
        parts = urlsplit(config.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SetupError(f"model URL {config.url!r}: expected http://HOST[:PORT]/PATH or https://...")
        if not config.model:
            raise SetupError(f"no model name for {config.url}: give the name the server knows (--model-name)")
        self.config = config
        self.name = config.model
        base = config.url.rstrip("/")
        self.url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        headers = {"user-agent": f"rorqual/{__version__}", "accept": "text/event-stream, application/json"}
        self._key_env = config.api_key_env
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env, "").strip()
            if not key:
                raise SetupError(
                    f"the environment variable {config.api_key_env} is not set: "
                    f"it should hold the API key of {base}"
                )
            headers["authorization"] = f"Bearer {key}"
        if not all(value.isascii() for value in headers.values()):
            raise SetupError(
                f"the key in {config.api_key_env} cannot be sent in a header: it is not plain ASCII"
            )
        self._headers = headers
        self._client: httpx.AsyncClient | None = None
        self._answered = False
        self._reasoning_names: set[str] = set()

    async def aclose(self) -> None:
        """Close the connections; a later `complete` opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            config = self.config
            timeout = httpx.Timeout(60.0, connect=config.connect_timeout, read=config.read_timeout)
            self._client = httpx.AsyncClient(headers=self._headers, timeout=timeout)
        return self._client

    async def __aenter__(self) -> RemoteModel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        on_delta: OnDelta | None = None,
    ) -> Completion:
        """Send the conversation, stream the answer. Raises ModelError with one line for the user."""
        notes: list[str] = []

        def note(text: str) -> None:
            notes.append(text)
            if on_delta is not None:
                on_delta(Delta(channel="note", text=text))

        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            wait = state.next_action.sleep if state.next_action else 0
            note(f"{error} Trying again in {wait:.1f} s ({state.attempt_number} of {self.config.attempts}).")
            if on_delta is not None:
                on_delta(Delta(channel="restart", text=""))

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, ModelError) and error.retryable
            ),
            stop=tenacity.stop_after_attempt(self.config.attempts),
            wait=_wait(self.config.first_wait),
            before_sleep=before_sleep,
            reraise=True,
        )
        started = time.monotonic()
        try:
            assembler: Assembler = await retrying(self._once, messages, tools, on_delta)
        except ModelError as error:
            # A strict server that wants reasoning this model never sent: say so with empty fields, once.
            if error.status != 400 or "reasoning_content" not in str(error) or self._reasoning_names:
                raise
            note(
                "the server wants reasoning_content on assistant messages: "
                "sending it empty where there was none."
            )
            self._reasoning_names.add("reasoning_content")
            assembler = await retrying(self._once, messages, tools, on_delta)
        self._answered = True
        self._reasoning_names |= assembler.reasoning_names
        return _completion(assembler, tools, notes, time.monotonic() - started)

    def _body(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        config = self.config
        options = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_tokens,
            "reasoning_effort": config.reasoning_effort,
        }
        return {
            "model": config.model,
            "messages": [self._outgoing(message) for message in messages],
            **({"tools": list(tools)} if tools else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in options.items() if value is not None},
            **config.extra_body,
        }

    def _outgoing(self, message: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(message)
        if out.get("role") != "assistant":
            return out
        reasoning = out.pop("reasoning_content", "") or ""
        for name in self._reasoning_names or ({"reasoning_content"} if reasoning else set()):
            out[name] = reasoning
        if out.get(
            "tool_calls"
        ):  # servers parse the arguments of old calls: a broken text would poison the history
            out["tool_calls"] = [_with_valid_arguments(call) for call in out["tool_calls"]]
        return out

    async def _once(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        on_delta: OnDelta | None,
    ) -> Assembler:
        try:
            async with asyncio.timeout(self.config.request_timeout):
                async with self._open().stream(
                    "POST", self.url, json=self._body(messages, tools)
                ) as response:
                    if response.status_code != 200:
                        raise await self._refusal(response)
                    assembler = Assembler(on_delta)
                    async for chunk in self._chunks(response):
                        assembler.feed(chunk)
        except TimeoutError:
            raise self._error(f"no end after {self.config.request_timeout:g} s", retryable=True) from None
        except httpx.TimeoutException as error:
            connecting = isinstance(error, httpx.ConnectTimeout)
            text = "no connection" if connecting else f"silent for {self.config.read_timeout:g} s"
            raise self._error(
                f"{text} ({type(error).__name__})", retryable=self._answered or not connecting
            ) from error
        except httpx.ConnectError as error:
            hint = "is the server running, and are host and port right?"
            raise self._error(f"cannot connect: {error}; {hint}", retryable=self._answered) from error
        except (httpx.TransportError, httpx.DecodingError, httpx.StreamError) as error:
            raise self._error(
                f"the connection broke: {error or type(error).__name__}", retryable=True
            ) from error
        except (httpx.InvalidURL, httpx.HTTPError, UnicodeEncodeError) as error:
            raise self._error(f"the request could not be sent: {error}") from error
        if not assembler.finish_reason:
            raise self._error("the answer broke off before its end", retryable=True)
        return assembler

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[Mapping[str, Any]]:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Bounded(response.stream, self.config.max_response_bytes, self._error)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":  # a server that does not stream
            yield self._json((await response.aread()).decode("utf-8", "replace"))
            return
        if kind != "text/event-stream":
            raise self._error(
                f"answered with {kind or 'no content type'}, not a chat completion: "
                "is this the API's base URL?"
            )
        events = EventSource(response).aiter_sse()
        try:
            async for event in events:
                if event.data.strip() == "[DONE]":
                    return
                if event.data:
                    yield self._json(event.data)
        except SSEError as error:
            raise self._error(f"broken event stream: {error}", retryable=True) from error
        finally:
            await events.aclose()

    def _json(self, text: str) -> Mapping[str, Any]:
        try:
            chunk = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(f"sent a line that is not JSON: {text[:80]!r}", retryable=True) from error
        if not isinstance(chunk, dict):
            raise self._error(f"sent {text[:80]!r} where an object was due", retryable=True)
        if chunk.get("error"):
            status = chunk["error"].get("code") if isinstance(chunk["error"], dict) else None
            status = status if isinstance(status, int) else None
            retryable = status is None or status in _RETRIED or status >= 500
            raise self._error(
                f"error inside the stream: {_server_text(text)}", status=status, retryable=retryable
            )
        return chunk

    async def _refusal(self, response: httpx.Response) -> ModelError:
        status = response.status_code
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Bounded(response.stream, 1 << 20, self._error)
        said = _server_text((await response.aread()).decode("utf-8", "replace"))
        if status in (400, 413, 422) and any(word in said.lower() for word in _CONTEXT_WORDS):
            return ContextFull(f"{self.url} answered {status}: {said}", url=self.url, status=status)
        text = f"answered {status} {response.reason_phrase}".rstrip() + (f": {said}" if said else "")
        hint = self._hint(status)
        return self._error(
            f"{text}{'; ' + hint if hint else ''}",
            status=status,
            retryable=status in _RETRIED or status >= 500,
            retry_after=_retry_after(response.headers.get("retry-after")),
        )

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            if self._key_env is None:
                return "no API key was sent: name the variable that holds it (--api-key-env)"
            return f"check the key in the environment variable {self._key_env}"
        if status == 402:
            return "check the balance of this account"
        if status in (404, 405):
            missing = "" if "/v1" in self.url else ", often the path ends in /v1"
            return f"check the URL{missing} and the model name {self.config.model!r}"
        if 300 <= status < 400:
            return "the URL redirects elsewhere: give the final one"
        return f"check the request for model {self.config.model!r}" if status in (400, 422) else ""

    def _error(
        self,
        text: str,
        *,
        status: int | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
    ) -> ModelError:
        line = " ".join(f"{self.url} {text}".split())
        return ModelError(
            line if line.endswith((".", "?", "!")) else line + ".",
            url=self.url,
            status=status,
            retryable=retryable,
            retry_after=retry_after,
        )


class _Bounded(httpx.AsyncByteStream):
    """Passes bytes through up to a limit: an endless line must not fill the memory."""

    def __init__(self, inner: httpx.AsyncByteStream, limit: int, error: Callable[[str], ModelError]) -> None:
        self._inner, self._limit, self._error = inner, limit, error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        async for piece in self._inner:
            seen += len(piece)
            if seen > self._limit:
                raise self._error(f"sent more than {self._limit} bytes")
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()


def _wait(first: float) -> Callable[[tenacity.RetryCallState], float]:
    growing = tenacity.wait_exponential(multiplier=first, max=_MAX_WAIT) + tenacity.wait_random(0, first)

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, ModelError) else None
        return growing(state) if asked is None else min(asked, _MAX_WAIT)

    return wait


def _retry_after(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:  # an HTTP date: the growing wait will do
        return None


def _server_text(body: str) -> str:
    """The server's own message out of an error body, at most 300 characters, on one line."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        raw = body
    for _ in range(3):
        if not isinstance(raw, dict):
            break
        raw = next(
            (raw[key] for key in ("error", "message", "detail", "msg") if raw.get(key)), json.dumps(raw)
        )
    text = raw if isinstance(raw, str) else json.dumps(raw)
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def _with_valid_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    try:
        valid = isinstance(json.loads(function.get("arguments") or ""), dict)
    except (ValueError, RecursionError):
        valid = False
    return {**call, "function": function if valid else {**function, "arguments": "{}"}}


def _completion(
    assembler: Assembler, tools: Sequence[Mapping[str, Any]], notes: list[str], seconds: float
) -> Completion:
    content, reasoning, calls = assembler.content, assembler.reasoning, assembler.tool_calls()
    reason = assembler.finish_reason or "stop"
    calls, malformed = split_malformed(calls, cut=reason == "length")
    if not calls and tools:
        recovered = recover_markup(content, tools, reasoning=reasoning)
        if recovered is not None:
            content, reasoning, calls, lost, found = recovered
            malformed += lost
            notes.append(found)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return Completion(
        message=message,
        usage=read_usage(assembler.usage, seconds=seconds),
        finish_reason="length" if reason == "length" else "tool_calls" if calls else "stop",
        malformed=tuple(malformed),
        notes=tuple(notes),
    )
