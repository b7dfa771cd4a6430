"""Renderer: a conversation as the text a V4 model was trained on.

Owns the grammar of the output (spec/encoding.md 3.2) and the transition after each turn (3.8). Merging,
sorting and dropping happen before, in turns.py; the fixed texts are in profile.py. `render` and
`render_segments` write the same bytes; `render_bridge` writes what follows a finished completion, so that
prompts only grow (section 6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from .errors import RenderError
from .messages import CallText, MessageLike, ToolCall, field_of, read_call, to_json
from .profile import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    EXTRACTED_URL,
    LATEST_REMINDER,
    RESPONSE_FORMAT_HEAD,
    TASK_TOKENS,
    THINK,
    THINK_END,
    TOOL_RESULT_CLOSE,
    TOOL_RESULT_OPEN,
    TOOLS_HEAD_PIECES,
    TOOLS_TAIL,
    USER,
    Profile,
    get_profile,
)
from .segments import Segment, SegmentWriter, join
from .turns import KNOWN_ROLES, Turn, drop_turns, last_query, merge, sort_results, tools_in_play

ThinkingMode: TypeAlias = Literal["thinking", "chat"]
Keep: TypeAlias = Literal["auto", "official"]


def render(
    messages: Sequence[MessageLike],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking_mode: str = "thinking",
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    context: Sequence[MessageLike] | None = None,
    keep: str = "auto",
    profile: str = "v4",
) -> str:
    """The conversation as prompt text; see `render_segments` for the arguments and errors."""
    return join(
        render_segments(
            messages,
            tools=tools,
            thinking_mode=thinking_mode,
            reasoning_effort=reasoning_effort,
            drop_thinking=drop_thinking,
            add_default_bos_token=add_default_bos_token,
            context=context,
            keep=keep,
            profile=profile,
        )
    )


def render_segments(
    messages: Sequence[MessageLike],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking_mode: str = "thinking",
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    context: Sequence[MessageLike] | None = None,
    keep: str = "auto",
    profile: str = "v4",
) -> list[Segment]:
    """The conversation in segments (spec/encoding.md 3). A list that ends in user, tool or developer ends in
    a generation cue; there is no separate switch.

    messages: OpenAI-shaped dicts or `Message`.
    tools: request-level tools: written on message 0 if it is a system message, else on an inserted empty one.
    thinking_mode: `thinking` or `chat`.
    reasoning_effort: None or a level of the profile.
    drop_thinking: False keeps all reasoning. True drops that of earlier turns, unless tools are in play.
    add_default_bos_token: whether BOS is written (never with a context).
    context: messages already rendered; only what follows is written (spec 3.11; prefer `render_bridge`).
    keep: `auto`: nothing is dropped once a tools list, a call or a result occurs, and string arguments that
        hold the DSML marker are written escaped; `official`: the published encoder's rule, byte for byte.
    Raises RenderError, naming the message and the field.
    """
    if thinking_mode not in ("thinking", "chat"):
        raise RenderError(f"thinking_mode {thinking_mode!r}: use 'thinking' or 'chat'")
    if keep not in ("auto", "official"):
        raise RenderError(f"keep {keep!r}: use 'auto' or 'official'")
    format_profile = get_profile(profile)
    effort = format_profile.effort_text(reasoning_effort)
    thinking, official = thinking_mode == "thinking", keep == "official"
    head = list(context or ())
    body = list(messages)

    before = merge(head)
    turns = before + merge(body, first=len(head))
    if tools:
        turns, before = _with_request_tools(turns, before, tools)
    sort_results(turns)
    drop = drop_thinking and not tools_in_play(turns, official=official)
    if thinking and drop:
        turns, before = drop_turns(turns), drop_turns(before)

    out = SegmentWriter()
    if add_default_bos_token and not head:
        out.special(BOS)
    if thinking and turns and not before:
        out.text(effort)
    writer = _TurnWriter(
        out, turns, thinking=thinking, drop=drop, escape_markers=not official, profile=format_profile
    )
    for i in range(len(before), len(turns)):
        writer.write(i)
    return out.segments


def render_bridge(
    new_messages: Sequence[MessageLike],
    *,
    previous_calls: Sequence[ToolCall | Mapping[str, Any]] = (),
    thinking_mode: str = "thinking",
    first_turn: int = 0,
) -> list[Segment]:
    """What follows a completion that ended in EOS, up to the next cue (spec/encoding.md 6).

    prev_prompt + prev_completion + bridge is the render of the longer history whenever nothing is dropped
    (tools in play, or chat mode), so a session never re-renders and never re-tokenizes what it has.

    new_messages: user, tool, developer or latest_reminder messages, the last not a reminder: all results of
        `previous_calls` (the calls of the completion; they give the results their order) come in one bridge.
    first_turn: index of new_messages[0] in the whole conversation, for `Segment.turn`.
    Raises RenderError for other roles, and for an empty list.
    """
    if thinking_mode not in ("thinking", "chat"):
        raise RenderError(f"thinking_mode {thinking_mode!r}: use 'thinking' or 'chat'")
    if not new_messages:
        raise RenderError("a bridge needs at least one new message")
    for index, message in enumerate(new_messages, first_turn):
        role = field_of(message, "role")
        if role not in ("user", "tool", "developer", "latest_reminder"):
            raise RenderError(
                f"role {role!r} cannot follow in a bridge: pass user, tool, developer or latest_reminder"
                " messages, or render the whole conversation",
                message_index=index,
                field="role",
            )
    if field_of(new_messages[-1], "role") == "latest_reminder":
        raise RenderError(
            "a bridge cannot end in a latest_reminder: it has no cue; put it before the user message",
            message_index=first_turn + len(new_messages) - 1,
        )
    turns = merge(new_messages, first=first_turn)
    sort_results(turns, calls=[read_call(c, index=first_turn - 1) for c in previous_calls])
    out = SegmentWriter()
    writer = _TurnWriter(
        out,
        turns,
        thinking=thinking_mode == "thinking",
        drop=False,
        escape_markers=True,
        profile=get_profile("v4"),
    )
    for i in range(len(turns)):
        writer.write(i)
    return out.segments


def _with_request_tools(
    turns: list[Turn], before: list[Turn], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Turn], list[Turn]]:
    first = turns[0] if turns else None
    if first is not None and first.role == "system" and first.message == 0:
        if first.tools and list(first.tools) != list(tools):
            raise RenderError(
                "has tools of its own that differ from the request's: give them in one place",
                message_index=0,
                field="tools",
            )
        first.tools = tools
        return turns, before
    inserted = Turn(role="system", message=-1, tools=tools)
    return [inserted, *turns], ([inserted, *before] if before else before)


class _TurnWriter:
    """Writes turn after turn; knows the whole list because cues depend on what comes next."""

    def __init__(
        self,
        out: SegmentWriter,
        turns: Sequence[Turn],
        *,
        thinking: bool,
        drop: bool,
        escape_markers: bool,
        profile: Profile,
    ) -> None:
        self.out = out
        self.turns = turns
        self.k = last_query(turns)
        self.thinking = thinking
        self.drop = drop
        self.escape_markers = escape_markers
        self.profile = profile

    def write(self, i: int) -> None:
        """Turn i and its transition."""
        turn, out = self.turns[i], self.out
        out.turn, out.generated = turn.message, False
        if turn.role == "system":
            out.text(turn.content)
            self._tools_and_format(turn)
        elif turn.role == "developer":
            if not turn.content:
                raise RenderError(
                    "a developer message needs content", message_index=turn.message, field="content"
                )
            out.special(USER)
            out.text(turn.content)
            self._tools_and_format(turn)
        elif turn.role == "user":
            self._user(turn)
        elif turn.role == "latest_reminder":
            out.special(LATEST_REMINDER)
            out.text(turn.content)
        elif turn.role == "assistant":
            self._assistant(i)
        else:
            raise RenderError(
                f"unknown role {turn.role!r}: use one of {', '.join(sorted(KNOWN_ROLES))}",
                message_index=turn.message,
                field="role",
            )
        self._transition(i)

    def _user(self, turn: Turn) -> None:
        out = self.out
        out.special(USER)
        for n, block in enumerate(turn.blocks):
            out.turn = block.message
            if n:
                out.text("\n\n")
            if block.is_result:
                out.text(TOOL_RESULT_OPEN + block.text + TOOL_RESULT_CLOSE)
            elif turn.task == "read_url" and EXTRACTED_URL in block.text:
                # The caller writes {prompt}<marker>{url}; only the last one can be the format's (spec 3.9).
                prompt, _, url = block.text.rpartition(EXTRACTED_URL)
                out.text(prompt)
                out.special(EXTRACTED_URL)
                out.text(url)
            else:
                out.text(block.text)
        out.turn = max(b.message for b in turn.blocks)

    def _tools_and_format(self, turn: Turn) -> None:
        out = self.out
        if turn.tools:
            out.text("\n\n")
            out.pieces(TOOLS_HEAD_PIECES)
            out.text("\n".join(self._schema(t, turn.message) for t in turn.tools) + TOOLS_TAIL)
        if turn.response_format:
            out.text("\n\n" + RESPONSE_FORMAT_HEAD)
            out.text(self._json(turn.response_format, turn.message, "response_format"))

    def _schema(self, tool: Any, index: int) -> str:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise RenderError(
                'a tool is {"type": "function", "function": {...}}', message_index=index, field="tools"
            )
        return self._json(function, index, "tools")

    def _json(self, value: Any, index: int, field: str) -> str:
        try:
            return to_json(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise RenderError(
                f"cannot be written as JSON: {error}", message_index=index, field=field
            ) from None

    def _assistant(self, i: int) -> None:
        turn, out = self.turns[i], self.out
        out.generated = True
        answers_task = i > 0 and self.turns[i - 1].task is not None
        if self.thinking and not answers_task and (not self.drop or i > self.k):
            out.text(turn.reasoning)
            out.special(THINK_END)
        out.text(turn.content)
        if turn.calls:
            self._calls(turn)
        if not turn.wo_eos:
            out.special(EOS)
        out.generated = False

    def _calls(self, turn: Turn) -> None:
        out, tags = self.out, self.profile
        out.text("\n\n<")
        out.special(DSML)
        out.text(f"{tags.block}>\n")
        for n, call in enumerate(turn.calls):
            self._call(call, turn.message, lead="\n" if n else "")
        out.text("\n</")
        out.special(DSML)
        out.text(f"{tags.block}>")

    def _call(self, call: CallText, index: int, *, lead: str) -> None:
        out, tags = self.out, self.profile
        out.text(lead + "<")
        out.special(DSML)
        out.text(f'{tags.invoke} name="{call.name}">\n')
        for n, (key, value) in enumerate(call.parameters):
            is_string, text = self._value(value, index)
            out.text(("\n" if n else "") + "<")
            out.special(DSML)
            out.text(f'{tags.parameter} name="{key}" string="{is_string}">{text}</')
            out.special(DSML)
            out.text(f"{tags.parameter}>")
        out.text("\n</")
        out.special(DSML)
        out.text(f"{tags.invoke}>")

    def _value(self, value: Any, index: int) -> tuple[str, str]:
        """(string attribute, text). A marker inside a value would read as a tag in plain text: it is written
        as JSON with the bar as \\uff5c, which the official parser reads back exactly (spec 4.2, rule 1)."""
        if isinstance(value, str) and not (self.escape_markers and DSML in value):
            return "true", value
        text = self._json(value, index, "tool_calls")
        if self.escape_markers and DSML in text:
            text = text.replace("｜", "\\uff5c")
        return "false", text

    def _transition(self, i: int) -> None:
        turn, out = self.turns[i], self.out
        if i + 1 < len(self.turns) and self.turns[i + 1].role not in ("assistant", "latest_reminder"):
            return
        if turn.task is not None:
            if turn.task not in TASK_TOKENS:
                raise RenderError(
                    f"unknown task {turn.task!r}: use one of {', '.join(TASK_TOKENS)}",
                    message_index=turn.message,
                    field="task",
                )
            if turn.task == "action":
                out.special(ASSISTANT)
                out.special(THINK if self.thinking else THINK_END)
            out.special(TASK_TOKENS[turn.task])
        elif turn.role in ("user", "developer"):
            out.special(ASSISTANT)
            out.special(THINK if self.thinking and (not self.drop or i >= self.k) else THINK_END)
