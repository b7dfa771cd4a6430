"""OpenAI Responses: items as a `Conversation` (spec/encoding.md 5.2, last lines).

An assistant turn is a run of items: reasoning, then text, then calls; a reasoning item belongs to what follows it.
What is called encrypted_content is the reasoning itself with a checksum: nothing about it is secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from rorqual.serve.conversation import Conversation, ToolChoice, effort_level
from rorqual.serve.errors import BadRequest, NotFound
from rorqual.serve.response_store import ResponseStore
from rorqual.serve.responses_schemas import (
    FunctionCallItem,
    FunctionOutputItem,
    InputText,
    Item,
    ItemReference,
    MessageItem,
    NamedTool,
    ReasoningItem,
    ResponsesRequest,
    SchemaFormat,
)
from rorqual.serve.schemas import JsonObjectFormat

__all__ = ["own_items", "pack_reasoning", "responses_conversation", "unpack_reasoning"]

_TOOL_FIELDS = {"name", "description", "parameters", "strict"}

PACKED = "rq1."
DIGEST_BYTES = 8
_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[Item])


def pack_reasoning(text: str) -> str:
    """Reasoning as encrypted_content."""
    data = text.encode("utf-8", "surrogatepass")
    return PACKED + base64.b64encode(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest() + data).decode()


def unpack_reasoning(content: str) -> str:
    """The reasoning again. Raises ValueError for what `pack_reasoning` did not make."""
    if not content.startswith(PACKED):
        raise ValueError("it was not made by this server")
    try:
        data = base64.b64decode(content[len(PACKED) :], validate=True)
    except binascii.Error:
        raise ValueError("it is damaged") from None
    digest, text = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest() != digest:
        raise ValueError("it is damaged")
    return text.decode("utf-8", "surrogatepass")


def own_items(request: ResponsesRequest, store: ResponseStore, tenant: str) -> list[Any]:
    """The request's own input as items, references resolved. Raises NotFound for one that is not kept."""
    if isinstance(request.input, str):
        return [MessageItem(role="user", content=request.input)]
    return [
        _referenced(item, store, tenant, index) if isinstance(item, ItemReference) else item
        for index, item in enumerate(request.input)
    ]


def responses_conversation(
    request: ResponsesRequest, own: Sequence[Any], store: ResponseStore, tenant: str
) -> Conversation:
    """The conversation of a request; own: its `own_items`. Raises BadRequest, NotFound."""
    items: list[tuple[Any, str]] = []
    if request.previous_response_id is not None:
        history = store.history(tenant, request.previous_response_id)
        if history is None:
            raise NotFound(
                f"no response {request.previous_response_id!r} is kept: send the conversation itself",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        items += [(item, "previous_response_id") for item in _ITEMS.validate_python(history)]
    items += [(item, f"input.{index}") for index, item in enumerate(own)]
    turns = _Turns()
    if request.instructions is not None:
        turns.add({"role": "system", "content": request.instructions}, "instructions")
    for item, place in items:
        turns.item(item, place)
    choice: ToolChoice = "auto"
    forced = None
    if isinstance(request.tool_choice, NamedTool):
        choice, forced = "required", request.tool_choice.name
    elif request.tool_choice is not None:
        choice = request.tool_choice
    effort = request.reasoning.effort if request.reasoning else None
    return Conversation(
        messages=turns.messages,
        places=turns.places,
        tools=[
            {
                "type": "function",
                "function": tool.model_dump(include=_TOOL_FIELDS, exclude_none=True),
            }
            for tool in request.tools or ()
        ],
        tool_choice=choice,
        forced_tool=forced,
        parallel=request.parallel_tool_calls is not False,
        schema=_schema(request),
        schema_place="text.format",
        thinking=effort != "none",
        effort=effort_level(effort),
    )


def _schema(request: ResponsesRequest) -> dict[str, Any] | None:
    form = request.text.format if request.text else None
    if isinstance(form, SchemaFormat):
        return form.schema_
    return {"type": "object"} if isinstance(form, JsonObjectFormat) else None


def _referenced(reference: ItemReference, store: ResponseStore, tenant: str, index: int) -> Any:
    item = store.item(tenant, reference.id)
    if item is None:
        raise NotFound(f"no item {reference.id!r} is kept: send the item itself", param=f"input.{index}.id")
    return _ITEMS.validate_python([item])[0]


class _Turns:
    """Messages as `chat` takes them, put together item by item."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        self._opening = True

    def add(self, message: dict[str, Any], place: str) -> None:
        """A message of its own."""
        self.messages.append(message)
        self.places.append(place)

    def item(self, item: Any, place: str) -> None:
        """One input item."""
        if isinstance(item, ReasoningItem):
            turn = self._assistant(place, fresh=True)
            turn["reasoning_content"] = (turn["reasoning_content"] or "") + _reasoning(item, place)
        elif isinstance(item, FunctionCallItem):
            function = {"name": item.name, "arguments": item.arguments or "{}"}
            call = {"id": item.call_id, "type": "function", "function": function}
            self._assistant(place)["tool_calls"].append(call)
        elif isinstance(item, FunctionOutputItem):
            self.add({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}, place)
        elif isinstance(item, MessageItem) and item.role == "assistant":
            turn = self._assistant(place, fresh_after_calls=True)
            text = _text(item.content)
            turn["content"] = f"{turn['content']}\n\n{text}" if turn["content"] else text
        else:
            # Later in a conversation the format gives a system turn no cue: it becomes text of the user turn.
            role = "system" if item.role != "user" and self._opening else "user"
            self.add({"role": role, "content": _text(item.content)}, place)
            self._opening = role == "system"
            return
        self._opening = False

    def _assistant(
        self, place: str, *, fresh: bool = False, fresh_after_calls: bool = False
    ) -> dict[str, Any]:
        """The assistant turn that is being put together. fresh: not one that has said something already."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "assistant":
            said = bool(last["tool_calls"]) or (fresh and bool(last["content"]))
            if not (said and (fresh or fresh_after_calls)):
                return last
        turn: dict[str, Any] = {
            "role": "assistant",
            "content": "",
            "reasoning_content": None,
            "tool_calls": [],
        }
        self.add(turn, place)
        return turn


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n\n".join(part.text for part in content)


def _reasoning(item: ReasoningItem, place: str) -> str:
    shown = "".join(part.text for part in item.content or ()) or "".join(part.text for part in item.summary)
    if shown or item.encrypted_content is None:
        return shown
    try:
        return unpack_reasoning(item.encrypted_content)
    except ValueError as error:
        raise BadRequest(
            f"encrypted_content cannot be read: {error}",
            param=f"{place}.encrypted_content",
            code="invalid_encrypted_content",
        ) from None
