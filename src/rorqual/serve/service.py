"""Service: one model behind the paths, and the walk of a request: checked, rendered, queued, sampled, written.

Owns what every protocol shares, and the paths of OpenAI's chat and completions and of tokens; the others
(anthropic_paths.py, responses_paths.py) bring a `Conversation` and a `Writer` to `answer`.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from rorqual.chat import Constrainer, Constraint, Tokenizer, TokenizerError
from rorqual.engine import Engine, SamplingParams, TokenGuide
from rorqual.serve.answer import Answer, ChatAnswer, RawAnswer
from rorqual.serve.cache_report import cache_report
from rorqual.serve.config import ServeConfig
from rorqual.serve.conversation import Conversation, Prompt, build_prompt
from rorqual.serve.errors import BadRequest, NotFound
from rorqual.serve.guide import answer_guide, check_constraint
from rorqual.serve.known_text import NOTHING, Known, KnownText
from rorqual.serve.metrics import Metrics
from rorqual.serve.openai_chat import chat_conversation
from rorqual.serve.replay import Record, ReplayStore, canonical_calls, prompt_digest, reasoning_signature
from rorqual.serve.response_store import ResponseStore
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
from rorqual.serve.sessions import Sessions, session_name
from rorqual.serve.shelf import FILE_NAME, Shelf
from rorqual.serve.transport import ApiResponse, EventStream, Mailbox, wait_or_gone
from rorqual.serve.wire import ChatWriter, Counts, RawWriter, Writer

__all__ = ["SESSION_HEADER", "Sampling", "Service", "check_stops", "tenant_of"]

SESSION_HEADER = "x-session-id"

_CONVERSATION_FIELDS = frozenset(ConversationRequest.model_fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to sample. None: the default, 1 for temperature and top_p, random for the seed."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    """None: what is left of the context."""
    stop: tuple[str, ...] = ()

    def params(self, *, max_tokens: int, eos_id: int) -> SamplingParams:
        """As the engine takes it."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            max_tokens=max_tokens,
            stop_ids=(eos_id,),
        )


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
        self.shelf = _shelf(config, engine, tokenizer)
        """Where the stores outlive the process; None: they do not."""
        self.replay = ReplayStore(config.replay_bytes, shelf=self.shelf)
        self.responses = ResponseStore(config.response_bytes, shelf=self.shelf)
        self.known = KnownText(config.text_bytes, shelf=self.shelf)
        self.sessions = Sessions(engine, config.session_bytes, shelf=self.shelf)
        self.constrainer = Constrainer(tokenizer)
        self.started = int(time.time())

    def close(self) -> None:
        """Closes what the stores are kept in. The engine is its opener's to close. Idempotent."""
        if self.shelf is not None:
            self.shelf.close()

    def check_model(self, name: str | None) -> None:
        """Raises NotFound for another model than the one served."""
        if name is not None and name != self.config.model_name:
            raise NotFound(
                f"no model {name!r} here: this server has {self.config.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def prompt(self, conversation: Conversation, tenant: str) -> Prompt:
        """The prompt of a conversation, made outside the event loop."""
        return await asyncio.to_thread(
            build_prompt,
            conversation,
            self.tokenizer,
            replay=self.replay,
            tenant=tenant,
            strict_reasoning=self.config.strict_reasoning,
            known=self.known,
        )

    async def answer(
        self,
        http: Request,
        conversation: Conversation,
        *,
        sampling: Sampling,
        writer: Writer,
        stream: bool,
        session: str | None = None,
    ) -> Response:
        """Samples the answer to a conversation and writes it, whole or as a stream. session: whose turn it is."""
        self.scheduler.check_room()
        tenant = tenant_of(http)
        prompt = await self.prompt(conversation, tenant)
        allowed = self.scheduler.check_fit(prompt.ids, sampling.max_tokens, param="messages")
        constraint = await asyncio.to_thread(
            check_constraint, conversation, self.constrainer, thinking=prompt.thinking
        )
        answer = ChatAnswer(self.tokenizer, thinking=prompt.thinking, tools=prompt.tools, stop=sampling.stop)
        mailbox = Mailbox()
        job = Job(
            tenant=tenant,
            prompt=prompt.ids,
            params=sampling.params(max_tokens=allowed, eos_id=self.tokenizer.eos_id),
            answer=answer,
            listener=mailbox,
            # The end of input without its cue: there the next turn branches off if this answer's reasoning is
            # dropped (spec/encoding.md 6, rule 6).
            keep_at=(prompt.head, len(prompt.ids) - 1),
            guide=None if constraint is None else self._guide(constraint, allowed),
            on_finish=lambda: self._remember(tenant, prompt.ids, answer, session=session),
        )
        self.metrics.replayed.inc(prompt.replayed)
        self.metrics.reasoning_lost.inc(prompt.reasoning_lost)
        self.scheduler.submit(job)
        return await self._deliver(
            http,
            mailbox,
            writer,
            answer=answer,
            counts=lambda: self._counts(job, answer),
            cancel=lambda: self.scheduler.cancel(job),
            stream=stream,
        )

    async def chat(self, http: Request, body: ChatRequest) -> Response:
        """`POST /v1/chat/completions`."""
        self._check(body)
        sampling = Sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            max_tokens=_one_of(body.max_completion_tokens, body.max_tokens),
            stop=check_stops(body.stop, param="stop"),
        )
        return await self.answer(
            http,
            chat_conversation(body),
            sampling=sampling,
            writer=ChatWriter(model=self.config.model_name, include_usage=_wants_usage(body)),
            stream=bool(body.stream),
            session=session_name(http.headers.get(SESSION_HEADER), body.prompt_cache_key, body.user),
        )

    async def complete(self, http: Request, body: CompletionRequest) -> Response:
        """`POST /v1/completions`."""
        self._check(body)
        self.scheduler.check_room()
        tenant = tenant_of(http)
        session = session_name(http.headers.get(SESSION_HEADER), body.user)
        prompt, text, before = await asyncio.to_thread(self._raw_prompt, body, tenant)
        allowed = self.scheduler.check_fit(prompt, body.max_tokens or 16, param="prompt")
        answer = RawAnswer(self.tokenizer, stop=check_stops(body.stop, param="stop"))
        sampling = Sampling(temperature=body.temperature, top_p=body.top_p, seed=body.seed)
        mailbox = Mailbox()

        def remember() -> None:
            self._remember_raw(tenant, prompt, text, before, answer)
            if session is not None:
                self.sessions.note(tenant, session, [*prompt, *answer.ids])

        job = Job(
            tenant=tenant,
            prompt=prompt,
            params=sampling.params(max_tokens=allowed, eos_id=self.tokenizer.eos_id),
            answer=answer,
            listener=mailbox,
            keep_at=(len(prompt) - 1,),
            on_finish=remember,
        )
        self.scheduler.submit(job)
        return await self._deliver(
            http,
            mailbox,
            RawWriter(model=self.config.model_name, include_usage=_wants_usage(body)),
            answer=answer,
            counts=lambda: self._counts(job, answer),
            cancel=lambda: self.scheduler.cancel(job),
            stream=bool(body.stream),
        )

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
            conversation = chat_conversation(ConversationRequest.model_validate(fields))
            ids = (await self.prompt(conversation, tenant_of(http))).ids
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
        prompt = await self.prompt(chat_conversation(body), tenant_of(http))
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

    def _raw_prompt(self, body: CompletionRequest, tenant: str) -> tuple[list[int], str | None, Known]:
        """Ids, and what they are the ids of if it is a text, and what was known of that."""
        prompt = body.prompt
        if isinstance(prompt, list) and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise BadRequest("several prompts in one request are not supported: send one", param="prompt")
            prompt = prompt[0]
        if not isinstance(prompt, str):
            return [int(token) for token in prompt], None, NOTHING
        data = prompt.encode("utf-8", "surrogatepass")
        before = self.known.of_text(tenant, data)
        if not before.ids:
            return self._text_ids(prompt, bos=True), prompt, before
        rest = data[before.length :].decode("utf-8", "surrogatepass")
        return [*before.ids, *self.tokenizer.encode_text(rest)], prompt, before

    def _remember_raw(
        self, tenant: str, prompt: list[int], text: str | None, before: Known, answer: RawAnswer
    ) -> None:
        """The text of prompt and answer is known from now on, if it is what the ids say."""
        ids = [*prompt, *answer.ids]
        if ids[-1] == self.tokenizer.eos_id:
            ids.pop()
        if text is not None and self.tokenizer.decode(ids[1:]) == text + answer.text:
            data = (text + answer.text).encode("utf-8", "surrogatepass")
            self.known.keep_text(tenant, data, ids, after=before)

    def _text_ids(self, text: str, *, bos: bool) -> list[int]:
        return [self.tokenizer.bos_id] * bos + self.tokenizer.encode_text(text)

    def _guide(self, constraint: Constraint, max_tokens: int) -> TokenGuide:
        words = -(-self.engine.config.vocab_size // 32)
        return answer_guide(constraint, words=words, max_tokens=max_tokens)

    def _counts(self, job: Job, answer: Answer) -> Counts:
        return Counts(
            prompt=len(job.prompt),
            completion=len(answer.ids),
            cached=job.cached_tokens,
            reasoning=answer.reasoning_tokens if isinstance(answer, ChatAnswer) else None,
            cache=None if job.found is None else cache_report(job.found, job.prompt, self.tokenizer),
        )

    def _remember(self, tenant: str, prompt: list[int], answer: ChatAnswer, *, session: str | None) -> None:
        """Counts repairs and keeps the turn for replay; one that was cut is not what the format would write."""
        message = answer.message
        if session is not None:
            self.sessions.note(tenant, session, [*prompt, *answer.ids])
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
        names = [str(call.id) for call in message.tool_calls]
        if message.reasoning_content:
            names.append(reasoning_signature(message.reasoning_content))
        self.replay.put(tenant, prompt_digest(prompt), record=record, names=names)

    async def _deliver(
        self,
        http: Request,
        mailbox: Mailbox,
        writer: Writer,
        *,
        answer: Answer,
        counts: Callable[[], Counts],
        cancel: Callable[[], None],
        stream: bool,
    ) -> Response:
        if stream:
            return EventStream(
                mailbox,
                writer,
                answer=answer,
                counts=counts,
                keep_alive_seconds=self.config.keep_alive_seconds,
                cancel=cancel,
            )
        try:
            await wait_or_gone(http, mailbox)
        finally:
            cancel()
        return ApiResponse(writer.whole(answer, counts()))


def _shelf(config: ServeConfig, engine: Engine, tokenizer: Tokenizer) -> Shelf | None:
    if config.kv_disk is None:
        return None
    digest = hashlib.sha256(engine.fingerprint() + tokenizer.serialized.encode()).digest()
    return Shelf(Path(config.kv_disk) / FILE_NAME, fingerprint=digest)


def tenant_of(http: Request) -> str:
    """The holder of the request's key."""
    return str(http.state.tenant)


def check_stops(stop: str | list[str] | None, *, param: str) -> tuple[str, ...]:
    """The stop strings. Raises BadRequest for one that is empty or too long."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if any(not one or len(one) > 256 for one in stops):
        raise BadRequest("a stop string has 1 to 256 characters", param=param)
    return stops


def _one_of(newer: int | None, older: int | None) -> int | None:
    if newer is not None and older is not None and newer != older:
        raise BadRequest(
            "max_tokens and max_completion_tokens differ: send one of them", param="max_completion_tokens"
        )
    return newer if newer is not None else older


def _wants_usage(body: SamplingRequest) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage
