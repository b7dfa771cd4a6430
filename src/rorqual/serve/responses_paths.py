"""`/v1/responses`: make, get and delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from rorqual.serve.errors import BadRequest, NotFound
from rorqual.serve.response_store import StoredResponse
from rorqual.serve.responses import own_items, responses_conversation
from rorqual.serve.responses_schemas import ResponsesRequest
from rorqual.serve.responses_writer import ResponsesWriter
from rorqual.serve.service import SESSION_HEADER, Sampling, Service, tenant_of
from rorqual.serve.sessions import session_name
from rorqual.serve.transport import ApiResponse

__all__ = ["add_responses"]


def add_responses(app: FastAPI, service: Service) -> None:
    """Adds the paths."""
    store = service.responses

    @app.post("/v1/responses", response_class=ApiResponse)
    async def create(http: Request, body: ResponsesRequest) -> Response:
        """Answers a conversation in the Responses protocol, whole or streamed."""
        service.check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise BadRequest("stream_options needs stream = true", param="stream_options")
        tenant = tenant_of(http)
        own = own_items(body, store, tenant)
        conversation = responses_conversation(body, own, store, tenant)

        def keep(response: Mapping[str, Any]) -> None:
            if body.store is not False:
                items = [item.model_dump(exclude_none=True) for item in own]
                store.put(
                    tenant, StoredResponse(response=response, input=items, previous=body.previous_response_id)
                )

        writer = ResponsesWriter(model=service.config.model_name, request=body, on_done=keep)
        # Without another name a conversation is named by the response that its chain began with.
        chain = store.first(tenant, body.previous_response_id) if body.previous_response_id else writer.id
        return await service.answer(
            http,
            conversation,
            sampling=Sampling(
                temperature=body.temperature, top_p=body.top_p, max_tokens=body.max_output_tokens
            ),
            writer=writer,
            stream=bool(body.stream),
            session=session_name(http.headers.get(SESSION_HEADER), body.prompt_cache_key, body.user, chain),
        )

    @app.get("/v1/responses/{response_id}", response_class=ApiResponse)
    async def get(http: Request, response_id: str) -> Response:
        """A stored response."""
        stored = store.get(tenant_of(http), response_id)
        if stored is None:
            raise _unknown(response_id)
        return ApiResponse(stored.response)

    @app.delete("/v1/responses/{response_id}", response_class=ApiResponse)
    async def delete(http: Request, response_id: str) -> Response:
        """Forgets a stored response; those that follow it can be continued no more."""
        if not store.delete(tenant_of(http), response_id):
            raise _unknown(response_id)
        return ApiResponse({"id": response_id, "object": "response", "deleted": True})


def _unknown(response_id: str) -> NotFound:
    return NotFound(f"no response {response_id!r} is kept", param="response_id")
