"""The application: paths, what stands before them, and how errors look.

Owns which path does what; the work is the `Service`'s. Lifespan starts and ends the scheduler's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from rorqual import __version__
from rorqual._openapi_page import documentation_page
from rorqual.serve.anthropic_paths import add_anthropic
from rorqual.serve.errors import ServeError
from rorqual.serve.failures import add_error_handlers
from rorqual.serve.guard import Guard
from rorqual.serve.responses_paths import add_responses
from rorqual.serve.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from rorqual.serve.service import SESSION_HEADER, Service
from rorqual.serve.sessions_paths import add_sessions
from rorqual.serve.transport import ApiResponse

__all__ = ["create_app"]


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
        responses={"4XX": {"description": "The protocol's error object"}},
    )
    app.add_middleware(Guard, config=service.config, metrics=service.metrics)
    if service.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                "authorization",
                "content-type",
                "x-api-key",
                "anthropic-version",
                "anthropic-beta",
                SESSION_HEADER,
            ],
        )
    add_error_handlers(app, service.metrics)
    _add_api(app, service)
    add_anthropic(app, service)
    add_responses(app, service)
    add_sessions(app, service)
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
