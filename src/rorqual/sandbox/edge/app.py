"""The HTTP API of an edge: resources for lifecycle and file contents, one path per plain call of the SDK.

Owns paths, statuses and the OpenAPI schema. The paths of plain calls are made from the SDK (_remote_methods.py), so
what Python can ask for, any language can. Streams are the channel's.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, FastAPI, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from rorqual import __version__
from rorqual._openapi_page import documentation_page
from rorqual.sandbox._remote_channel import API
from rorqual.sandbox._remote_codec import encode, encode_error
from rorqual.sandbox._remote_methods import methods
from rorqual.sandbox.edge.calls import call, create_arguments, create_model_of_sandbox, model_of
from rorqual.sandbox.edge.channel import Channel
from rorqual.sandbox.edge.edge import Edge
from rorqual.sandbox.edge.failures import failure
from rorqual.sandbox.edge.guard import Guard
from rorqual.sandbox.edge.transfer import Spool, pieces
from rorqual.sandbox.errors import EdgeRefused, InvalidRequest, SandboxError
from rorqual.sandbox.images import ImageInfo, images
from rorqual.sandbox.records import CommandResult, FileEntry, SandboxInfo

MAX_OUTPUT = 8 << 20
"""Of a command that is run over plain HTTP; the channel streams more."""


class Lease(BaseModel):
    """Without a lease it lives until its timeout or its kill."""

    seconds: float | None = Field(default=None, ge=0.5, le=86400)
    """It ends when no renewal came for so long, and no channel to it was open."""
    owner: str = Field(default="", max_length=128)
    """The client in its own words, for logs."""


class Ended(BaseModel):
    alive: bool
    """It was alive until now."""
    cause: str
    detail: str


class Refused(BaseModel):
    """Every error: the exception of the Python SDK, its text, its fields."""

    type: str
    message: str
    fields: dict[str, Any] = {}


class Failure(BaseModel):
    error: Refused


def create_app(edge: Edge) -> FastAPI:
    """The ASGI application. Its lifespan starts and stops the edge."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await edge.start()
        try:
            yield
        finally:
            await edge.stop()

    app = FastAPI(
        title=f"Rorqual edge, API v{API}",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={
            "4XX": {"model": Failure, "description": "Refused"},
            "5XX": {"model": Failure, "description": "The edge or the sandbox failed"},
        },
    )
    app.add_middleware(Guard, config=edge.config, metrics=edge.metrics)
    _add_errors(app)
    _add_lifecycle(app, edge)
    _add_commands(app, edge)
    _add_files(app, edge)
    _add_calls(app, edge)
    _add_operations(app, edge)

    @app.websocket(f"/v{API}/channel")
    async def channel(socket: WebSocket) -> None:
        await Channel(edge, socket, who=socket.state.who).serve()

    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(SandboxError)
    async def ours(_: Request, error: Exception) -> Response:
        return failure(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"][1:]) or "the body"
        return failure(InvalidRequest(f"{where}: {found['msg']}"))

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return failure(EdgeRefused(str(error.detail), status=error.status_code))

    @app.exception_handler(OverflowError)
    @app.exception_handler(ValueError)
    async def value(_: Request, error: Exception) -> Response:
        return failure(InvalidRequest(str(error)))

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": {**encode_error(error), "fields": {}}}, status_code=500)


def _add_lifecycle(app: FastAPI, edge: Edge) -> None:
    create_model = create_model_of_sandbox()

    async def create(
        body: Annotated[Any, Body()], lease: Annotated[Lease, Body(default_factory=Lease)]
    ) -> Response:
        """Makes a sandbox and answers when its guest agent has."""
        given = {name: getattr(body, name) for name in create_model.model_fields}
        checked = create_arguments(given, roots=edge.config.mount_roots)
        tenancy = await edge.create(checked, owner=lease.owner, lease=lease.seconds)
        sandbox = await edge.held(tenancy.id)
        return JSONResponse(encode(await sandbox.info()), status_code=201)

    _typed(create, body=Annotated[create_model, Body(default_factory=create_model)])
    app.post(
        f"/v{API}/sandboxes", status_code=201, responses={201: {"model": SandboxInfo}}, response_model=None
    )(create)

    @app.get(f"/v{API}/sandboxes", responses={200: {"model": list[SandboxInfo]}})
    async def live() -> Response:
        """Every live sandbox of this edge, oldest first."""
        return JSONResponse(encode(edge.live()))

    @app.get(f"/v{API}/images", responses={200: {"model": list[ImageInfo]}})
    async def all_images() -> Response:
        """The images of this host: what `image` and `layers` may name."""
        return JSONResponse(encode(await asyncio.to_thread(images, state=edge.state)))

    @app.get(f"/v{API}/sandboxes/{{sandbox_id}}", responses={200: {"model": SandboxInfo}})
    async def info(sandbox_id: str) -> Response:
        """What it is. 410 when it is over: the error's `cause` says why."""
        return JSONResponse(await call(edge, sandbox_id, "info", {}))

    @app.delete(f"/v{API}/sandboxes/{{sandbox_id}}", responses={200: {"model": Ended}})
    async def kill(sandbox_id: str) -> Response:
        """Ends it with cause `killed` and removes everything of it. Idempotent."""
        alive, cause, detail = await edge.kill(sandbox_id)
        return JSONResponse({"alive": alive, "cause": cause, "detail": detail})

    @app.post(f"/v{API}/sandboxes/{{sandbox_id}}/renew", status_code=204)
    async def renew(sandbox_id: str) -> Response:
        """Renews its lease."""
        edge.tenancy(sandbox_id)
        edge.hear(sandbox_id)
        return Response(status_code=204)

    fork_model = model_of("fork")

    async def fork(sandbox_id: str, body: Annotated[Any, Body()]) -> Response:
        """New sandboxes with the files of this one; they have its lease."""
        given = {name: getattr(body, name) for name in fork_model.model_fields}
        made = await edge.fork(edge.tenancy(sandbox_id), given)
        ids = {tenancy.id for tenancy in made}
        return JSONResponse([encode(one) for one in edge.live() if one.id in ids], status_code=201)

    _typed(fork, body=Annotated[fork_model, Body(default_factory=fork_model)])
    app.post(
        f"/v{API}/sandboxes/{{sandbox_id}}/fork",
        status_code=201,
        responses={201: {"model": list[SandboxInfo]}},
        response_model=None,
    )(fork)


def _add_commands(app: FastAPI, edge: Edge) -> None:
    run_model = model_of("commands.run", "on_stdout", "on_stderr", "background", "max_output")

    async def run(sandbox_id: str, body: Annotated[Any, Body()]) -> Response:
        """Runs a command and answers with its result; it goes on when the client hangs up."""
        sandbox = await edge.held(sandbox_id)
        given = {name: getattr(body, name) for name in run_model.model_fields}
        if given["stdin"] is True:
            raise InvalidRequest("stdin: a command that is fed while it runs needs the channel")
        return JSONResponse(encode(await sandbox.commands.run(**given, max_output=MAX_OUTPUT)))

    _typed(run, body=run_model)
    app.post(
        f"/v{API}/sandboxes/{{sandbox_id}}/commands/run",
        responses={200: {"model": CommandResult}},
        response_model=None,
    )(run)

    async def start(sandbox_id: str, body: Annotated[Any, Body()]) -> Response:
        """Starts a command and answers with its id and its number in the log."""
        sandbox = await edge.held(sandbox_id)
        given = {name: getattr(body, name) for name in run_model.model_fields}
        handle = await sandbox.commands.run(**given, background=True, max_output=MAX_OUTPUT)
        edge.running(sandbox_id, handle)
        return JSONResponse({"id": handle.id, "seq": handle.seq}, status_code=202)

    _typed(start, body=run_model)
    app.post(f"/v{API}/sandboxes/{{sandbox_id}}/commands/start", status_code=202, response_model=None)(start)

    @app.post(
        f"/v{API}/sandboxes/{{sandbox_id}}/commands/{{command}}/wait",
        responses={200: {"model": CommandResult}},
    )
    async def wait(sandbox_id: str, command: int) -> Response:
        """Waits for the end of a command: its result, with what is kept of its output."""
        handle = edge.handle(sandbox_id, command)
        if handle is None:
            sandbox = await edge.held(sandbox_id)
            handle = await sandbox.commands.connect(command)
        return JSONResponse(encode(await handle.wait()))

    @app.post(f"/v{API}/sandboxes/{{sandbox_id}}/commands/{{command}}/stdin", status_code=204)
    async def stdin(
        sandbox_id: str, command: int, http: Request, eof: Annotated[bool, Query()] = False
    ) -> Response:
        """Feeds the body to a command that was started with `stdin: true`; `eof` ends its input."""
        handle = edge.handle(sandbox_id, command)
        if handle is None:
            sandbox = await edge.held(sandbox_id)
            handle = await sandbox.commands.connect(command)
        data = await http.body()
        if data:
            await handle.send_stdin(data)
        if eof:
            await handle.close_stdin()
        return Response(status_code=204)


def _add_files(app: FastAPI, edge: Edge) -> None:
    path = f"/v{API}/sandboxes/{{sandbox_id}}/files/content"
    content: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

    @app.get(path, responses={200: {"content": content}}, response_class=StreamingResponse)
    async def read(sandbox_id: str, path: str, max_bytes: Annotated[int, Query(ge=0)] = 64 << 20) -> Response:
        """A file's content, streamed. 413 when it is larger than max_bytes."""
        sandbox = await edge.held(sandbox_id)
        entry = await sandbox.files.get_info(path)
        if entry.type == "file" and entry.size > max_bytes:
            raise EdgeRefused(f"{entry.path}: larger than max_bytes={max_bytes}", status=413)
        reading = pieces(sandbox, path, max_bytes=max_bytes)
        first = await anext(reading, b"")  # errors come before the status does

        async def body() -> AsyncIterator[bytes]:
            yield first
            async for piece in reading:
                yield piece

        return StreamingResponse(body(), media_type="application/octet-stream")

    @app.put(
        path,
        responses={200: {"model": FileEntry}},
        openapi_extra={"requestBody": {"content": content, "required": True}},
    )
    async def write(
        http: Request,
        sandbox_id: str,
        path: str,
        mode: Annotated[int | None, Query(ge=0, le=0o7777)] = None,
        append: bool = False,
        user: str | None = None,
    ) -> Response:
        """Writes the body to a file when all of it has arrived."""
        sandbox = await edge.held(sandbox_id)
        with Spool(limit=edge.config.max_file_bytes) as spool:
            async for piece in http.stream():
                spool.write(piece)
            entry = await spool.commit(sandbox, path, mode=mode, append=append, user=user)
        return JSONResponse(encode(entry))


def _add_calls(app: FastAPI, edge: Edge) -> None:
    for name, method in methods().items():
        if method.crosses and name != "info":
            _add_call(app, edge, name)


def _add_call(app: FastAPI, edge: Edge, name: str) -> None:
    method, model = methods()[name], model_of(name)

    async def endpoint(sandbox_id: str, body: Annotated[Any, Body()]) -> Response:
        given = body.model_dump(mode="json", exclude_unset=True)
        return JSONResponse(await call(edge, sandbox_id, name, given))

    endpoint.__doc__ = inspect.getdoc(method.function)
    needed = any(field.is_required() for field in model.model_fields.values())
    _typed(endpoint, body=model if needed else Annotated[model, Body(default_factory=model)])
    result = method.hints.get("return")
    app.post(
        f"/v{API}/sandboxes/{{sandbox_id}}/{name.replace('.', '/')}",
        operation_id=name.replace(".", "_"),
        responses={200: {"model": result}} if result not in (None, type(None)) else {},
        response_model=None,
    )(endpoint)


def _add_operations(app: FastAPI, edge: Edge) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the edge runs. Needs no token."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """200 while new sandboxes are made, else 503; with what is in use and what there is."""
        sandboxes, memory = edge.used
        document = {
            "status": "stopping" if edge.draining else "ready",
            "edge": edge.config.name,
            "sandboxes": sandboxes,
            "max_sandboxes": edge.config.max_sandboxes,
            "memory_mb": memory,
            "max_memory_mb": edge.config.max_memory_mb,
        }
        return JSONResponse(document, status_code=503 if edge.draining else 200)

    @app.get("/version")
    async def version() -> Response:
        """The version of this package and of the API, and the edge's name."""
        return JSONResponse({"version": __version__, "api": API, "edge": edge.config.name})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        figures = edge.metrics
        sandboxes, memory = edge.used
        figures.sandboxes.set(sandboxes)
        figures.sandboxes_limit.set(edge.config.max_sandboxes)
        figures.memory.set(memory)
        figures.memory_limit.set(edge.config.max_memory_mb)
        return Response(figures.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(documentation_page(app.openapi()))


def _typed(endpoint: Any, **kinds: Any) -> None:
    """Gives parameters of an endpoint types that are made at run time."""
    signature = inspect.signature(endpoint, eval_str=True)
    parameters = [
        one.replace(annotation=kinds.get(one.name, one.annotation), default=inspect.Parameter.empty)
        for one in signature.parameters.values()
    ]
    endpoint.__signature__ = signature.replace(parameters=parameters)
    endpoint.__annotations__ = {one.name: one.annotation for one in parameters}
