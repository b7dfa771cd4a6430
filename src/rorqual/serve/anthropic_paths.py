"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import re

from fastapi import FastAPI, Request
from fastapi.responses import Response

from rorqual.serve.anthropic import MessagesWriter, messages_conversation
from rorqual.serve.anthropic_schemas import CountTokensRequest, MessagesRequest
from rorqual.serve.errors import BadRequest
from rorqual.serve.service import SESSION_HEADER, Sampling, Service, check_stops, tenant_of
from rorqual.serve.sessions import session_name
from rorqual.serve.transport import ApiResponse

__all__ = ["MESSAGES", "add_anthropic"]

MESSAGES = "/v1/messages"
VERSION = re.compile(r"20\d\d-\d\d-\d\d")
"""Every version so far has these shapes; what is no version is a mistake worth telling."""


def add_anthropic(app: FastAPI, service: Service) -> None:
    """Adds the paths."""

    @app.post(MESSAGES, response_class=ApiResponse)
    async def messages(http: Request, body: MessagesRequest) -> Response:
        """Answers a conversation in Anthropic's protocol, whole or streamed."""
        _check(http, service, body)
        conversation = messages_conversation(body, service.replay, tenant_of(http))
        user = (body.metadata or {}).get("user_id")
        display = getattr(body.thinking, "display", None)
        return await service.answer(
            http,
            conversation,
            sampling=Sampling(
                temperature=body.temperature,
                top_p=body.top_p,
                max_tokens=body.max_tokens,
                stop=check_stops(body.stop_sequences, param="stop_sequences"),
            ),
            writer=MessagesWriter(model=service.config.model_name, omit_thinking=display == "omitted"),
            stream=bool(body.stream),
            session=session_name(http.headers.get(SESSION_HEADER), user if isinstance(user, str) else None),
        )

    @app.post(f"{MESSAGES}/count_tokens", response_class=ApiResponse)
    async def count_tokens(http: Request, body: CountTokensRequest) -> Response:
        """Tokens of the prompt that such a request makes. Nothing is sampled."""
        _check(http, service, body)
        tenant = tenant_of(http)
        prompt = await service.prompt(messages_conversation(body, service.replay, tenant), tenant)
        return ApiResponse({"input_tokens": len(prompt.ids)})


def _check(http: Request, service: Service, body: CountTokensRequest) -> None:
    version = http.headers.get("anthropic-version")
    if version is not None and not VERSION.fullmatch(version):
        raise BadRequest(
            f"anthropic-version {version[:40]!r} is no version: send 2023-06-01", param="anthropic-version"
        )
    service.check_model(body.model)
