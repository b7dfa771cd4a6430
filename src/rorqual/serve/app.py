"""The application: paths, and the walk of a request: validated, rendered, queued, sampled, written.

Owns which path does what and how errors look; the work is done in the other files. Lifespan starts and ends the
scheduler's thread.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from rorqual import __version__
from rorqual.chat import Tokenizer, TokenizerError
from rorqual.engine import Engine, SamplingParams
from rorqual.serve.answer import ChatAnswer, RawAnswer
from rorqual.serve.config import ServeConfig
from rorqual.serve.conversation import Prompt, build_prompt
from rorqual.serve.documentation import documentation_page
from rorqual.serve.errors import BadRequest, NotFound, ServeError
from rorqual.serve.failures import add_error_handlers
from rorqual.serve.guard import Guard
from rorqual.serve.metrics import Metrics
from rorqual.serve.replay import Record, ReplayStore, canonical_calls, prompt_digest
from rorqual.serve.scheduler import Job, Scheduler
from rorqual.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    ConversationRequest,
    DetokenizeRequest,
    SamplingRequest,
    TokenizeRequest,
    refuse_unsupported,
)
from rorqual.serve.transport import ApiResponse, EventStream, Mailbox, wait_or_gone
from rorqual.serve.wire import ChatWriter, RawWriter, usage

__all__ = ["Service", "create_app"]

_CONVERSATION_FIELDS = frozenset(ConversationRequest.model_fields)


class Service:
    """One model behind the paths: engine, tokenizer, queue, stores, figures."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        config: ServeConfig,
        *,
        scheduler: Scheduler | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """scheduler and metrics: others than the default ones; they must belong together."""
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.metrics = metrics or Metrics(config.model_name)
        self.scheduler = scheduler or Scheduler(engine, config, self.metrics)
        self.replay = ReplayStore(config.replay_bytes)
        self.started = int(time.time())

    def check_model(self, name: str | None) -> None:
        """Raises NotFound for another model than the one served."""
        if name is not None and name != self.config.model_name:
            raise NotFound(
                f"no model {name!r} here: this server has {self.config.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def prompt(self, request: ConversationRequest, tenant: str) -> Prompt:
        """The prompt of a conversation, made outside the event loop."""
        return await asyncio.to_thread(
            build_prompt, request, self.tokenizer, replay=self.replay, tenant=tenant
        )

    def params(self, request: SamplingRequest, max_tokens: int) -> SamplingParams:
        """How the engine is to sample."""
        return SamplingParams(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=secrets.randbits(62) if request.seed is None else request.seed,
            max_tokens=max_tokens,
            stop_ids=(self.tokenizer.eos_id,),
        )

    async def chat(self, http: Request, body: ChatRequest) -> Response:
        """`POST /v1/chat/completions`."""
        self._check(body)
        prompt = await self.prompt(body, _tenant(http))
        asked = _one_of(body.max_completion_tokens, body.max_tokens)
        allowed = self.scheduler.check_fit(prompt.ids, asked, param="messages")
        answer = ChatAnswer(
            self.tokenizer, thinking=prompt.thinking, tools=prompt.tools, stop=_stops(body.stop)
        )
        mailbox = Mailbox()
        job = Job(
            tenant=_tenant(http),
            prompt=prompt.ids,
            params=self.params(body, allowed),
            answer=answer,
            listener=mailbox,
            # The end of input without its cue: there the next turn branches off if this answer's reasoning is
            # dropped (spec/encoding.md 6, rule 6).
            keep_at=(prompt.head, len(prompt.ids) - 1),
            on_finish=lambda: self._remember(job, answer),
        )
        self.metrics.replayed.inc(prompt.replayed)
        self.metrics.reasoning_lost.inc(prompt.reasoning_lost)
        writer = ChatWriter(model=self.config.model_name, include_usage=_wants_usage(body))

        def counts() -> dict[str, Any]:
            return usage(
                prompt=len(prompt.ids),
                completion=len(answer.ids),
                cached=job.cached_tokens,
                reasoning=answer.reasoning_tokens,
            )

        def finish_reason() -> str:
            return answer.message.finish_reason or "stop"

        self.scheduler.submit(job)
        if body.stream:
            return self._stream(
                job,
                mailbox,
                writer,
                closing=lambda: writer.closing(finish_reason(), counts(), answer.message.diagnostics),
            )
        await self._wait(http, job, mailbox)
        return ApiResponse(writer.whole(answer.message, finish_reason=finish_reason(), counts=counts()))

    async def complete(self, http: Request, body: CompletionRequest) -> Response:
        """`POST /v1/completions`."""
        self._check(body)
        prompt = await asyncio.to_thread(self._raw_prompt, body)
        allowed = self.scheduler.check_fit(prompt, body.max_tokens or 16, param="prompt")
        answer = RawAnswer(self.tokenizer, stop=_stops(body.stop))
        mailbox = Mailbox()
        job = Job(
            tenant=_tenant(http),
            prompt=prompt,
            params=self.params(body, allowed),
            answer=answer,
            listener=mailbox,
            keep_at=(len(prompt) - 1,),
        )
        writer = RawWriter(model=self.config.model_name, include_usage=_wants_usage(body))

        def counts() -> dict[str, Any]:
            return usage(prompt=len(prompt), completion=len(answer.ids), cached=job.cached_tokens)

        self.scheduler.submit(job)
        if body.stream:
            return self._stream(
                job, mailbox, writer, closing=lambda: writer.closing(answer.finish_reason, counts(), ())
            )
        await self._wait(http, job, mailbox)
        return ApiResponse(writer.whole(answer.text, finish_reason=answer.finish_reason, counts=counts()))

    async def tokenize(self, http: Request, body: TokenizeRequest) -> Response:
        """`POST /tokenize`."""
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("give either prompt or messages", param="prompt")
        fitting = {"prompt", "add_special_tokens"} if body.messages is None else _CONVERSATION_FIELDS
        for name in sorted(body.model_fields_set - fitting - {"model"}):
            if getattr(body, name) is not None:
                raise BadRequest(f"{name} does not go with what is to be tokenized", param=name)
        if body.prompt is not None:
            ids = await asyncio.to_thread(self._text_ids, body.prompt, bos=body.add_special_tokens)
        else:
            fields = body.model_dump(exclude={"prompt", "add_special_tokens"}, exclude_unset=True)
            ids = (await self.prompt(ConversationRequest.model_validate(fields), _tenant(http))).ids
        limit = self.engine.config.max_position_embeddings
        return ApiResponse({"count": len(ids), "max_model_len": limit, "tokens": ids})

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """`POST /detokenize`."""
        self.check_model(body.model)
        try:
            return ApiResponse({"prompt": self.tokenizer.decode(body.tokens)})
        except TokenizerError as error:
            raise BadRequest(str(error), param="tokens") from None

    async def render(self, http: Request, body: ChatRequest) -> Response:
        """`POST /v1/chat/completions/render`."""
        self.check_model(body.model)
        refuse_unsupported(body)
        prompt = await self.prompt(body, _tenant(http))
        return ApiResponse(
            {
                "text": self.tokenizer.decode(prompt.ids),
                "token_ids": prompt.ids,
                "count": len(prompt.ids),
                "thinking": prompt.thinking,
                "replayed_turns": prompt.replayed,
            }
        )

    def model_card(self) -> dict[str, Any]:
        """The model as `/v1/models` shows it."""
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "rorqual",
            "max_model_len": self.engine.config.max_position_embeddings,
        }

    def _check(self, body: ChatRequest | CompletionRequest) -> None:
        self.check_model(body.model)
        refuse_unsupported(body)
        if body.stream_options is not None and not body.stream:
            raise BadRequest("stream_options needs stream = true", param="stream_options")
        self.scheduler.check_room()

    def _raw_prompt(self, body: CompletionRequest) -> list[int]:
        prompt = body.prompt
        if isinstance(prompt, list) and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise BadRequest("several prompts in one request are not supported: send one", param="prompt")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._text_ids(prompt, bos=True)
        return [int(token) for token in prompt]

    def _text_ids(self, text: str, *, bos: bool) -> list[int]:
        return [self.tokenizer.bos_id] * bos + self.tokenizer.encode_text(text)

    def _remember(self, job: Job, answer: ChatAnswer) -> None:
        """Counts repairs and keeps the turn for replay; one that was cut is not what the format would write."""
        message = answer.message
        for diagnostic in message.diagnostics:
            self.metrics.diagnostic(diagnostic.kind)
        if not answer.ended:
            return
        eos = self.tokenizer.eos_id
        ids = answer.ids if answer.ids[-1] == eos else [*answer.ids, eos]
        record = Record(
            ids=tuple(ids),
            thinking=answer.thinking,
            content=str(message.content),
            reasoning=message.reasoning_content,
            calls=canonical_calls(call.to_openai() for call in message.tool_calls),
        )
        call_ids = [str(call.id) for call in message.tool_calls]
        self.replay.put(job.tenant, prompt_digest(job.prompt), record=record, call_ids=call_ids)

    def _stream(
        self, job: Job, mailbox: Mailbox, writer: ChatWriter | RawWriter, *, closing: Any
    ) -> EventStream:
        return EventStream(
            job,
            mailbox,
            opening=writer.opening,
            chunks=writer.chunks,
            closing=closing,
            keep_alive_seconds=self.config.keep_alive_seconds,
            cancel=self.scheduler.cancel,
        )

    async def _wait(self, http: Request, job: Job, mailbox: Mailbox) -> None:
        try:
            await wait_or_gone(http, mailbox)
        finally:
            self.scheduler.cancel(job)


def create_app(service: Service) -> FastAPI:
    """The ASGI application. Its lifespan runs the service's scheduler."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.scheduler.close)

    app = FastAPI(
        title="Rorqual",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=ApiResponse,
        responses={"4XX": {"description": "OpenAI's error object"}},
    )
    app.add_middleware(Guard, config=service.config, metrics=service.metrics)
    if service.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key"],
        )
    add_error_handlers(app, service.metrics)
    _add_api(app, service)
    _add_operations(app, service)
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_class=ApiResponse)
    async def chat_completions(http: Request, body: ChatRequest) -> Response:
        """Answers a conversation, whole or streamed."""
        return await service.chat(http, body)

    @app.post("/v1/chat/completions/render", response_class=ApiResponse)
    async def render(http: Request, body: ChatRequest) -> Response:
        """The prompt that a chat request makes: its text and token ids. Nothing is sampled."""
        return await service.render(http, body)

    @app.post("/v1/completions", response_class=ApiResponse)
    async def completions(http: Request, body: CompletionRequest) -> Response:
        """Goes on from a text or token ids. The answer is raw text."""
        return await service.complete(http, body)

    @app.post("/tokenize", response_class=ApiResponse)
    async def tokenize(http: Request, body: TokenizeRequest) -> Response:
        """Token ids of a text or of a conversation."""
        return await service.tokenize(http, body)

    @app.post("/detokenize", response_class=ApiResponse)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Text of token ids."""
        return await service.detokenize(body)

    @app.get("/v1/models", response_class=ApiResponse)
    async def models() -> Response:
        """The served model."""
        return ApiResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{model_id:path}", response_class=ApiResponse)
    async def model(model_id: str) -> Response:
        """The served model by its id."""
        service.check_model(model_id)
        return ApiResponse(service.model_card())


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_class=ApiResponse)
    async def health() -> Response:
        """200 while the engine's thread lives, else 503. Needs no key."""
        if not service.scheduler.alive:
            raise _unavailable("the engine's thread has ended")
        return ApiResponse({"status": "ok"})

    @app.get("/ready", response_class=ApiResponse)
    async def ready() -> Response:
        """200 while new requests are accepted, else 503."""
        if service.scheduler.draining or not service.scheduler.alive:
            raise _unavailable("the server accepts no more requests")
        return ApiResponse({"status": "ready"})

    @app.get("/version", response_class=ApiResponse)
    async def version() -> Response:
        """The version of this package."""
        return ApiResponse({"version": __version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(documentation_page(app.openapi()))


def _unavailable(text: str) -> ServeError:
    error = ServeError(text, code="unavailable")
    error.status = 503
    return error


def _tenant(http: Request) -> str:
    return str(http.state.tenant)


def _stops(stop: str | list[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if any(not one or len(one) > 256 for one in stops):
        raise BadRequest("a stop string has 1 to 256 characters", param="stop")
    return stops


def _one_of(newer: int | None, older: int | None) -> int | None:
    if newer is not None and older is not None and newer != older:
        raise BadRequest(
            "max_tokens and max_completion_tokens differ: send one of them", param="max_completion_tokens"
        )
    return newer if newer is not None else older


def _wants_usage(body: SamplingRequest) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage
