"""The V4 format as data: special strings, tag names, the tool instructions, the effort texts.

Owns every byte the format prescribes (spec/encoding.md 1, 3.4, 3.6); never decides when one is written:
renderer.py does. Revisions of the format are `Profile` values, so that a new one is a table, not code.
The bar is U+FF5C, the low line in BOS and EOS is U+2581; neither is ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .errors import RenderError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
EXTRACTED_URL = "<｜extracted_url｜>"

TASK_TOKENS: Mapping[str, str] = MappingProxyType(
    {
        "action": "<｜action｜>",
        "query": "<｜query｜>",
        "authority": "<｜authority｜>",
        "domain": "<｜domain｜>",
        "title": "<｜title｜>",
        "read_url": "<｜read_url｜>",
    }
)

# Order = ids of our own tokenizers (tokenizer.py): 0 BOS, 1 EOS, 2 pad as in V4, then what the format uses.
SPECIAL_TOKENS: tuple[str, ...] = (
    BOS,
    EOS,
    PAD,
    USER,
    ASSISTANT,
    THINK,
    THINK_END,
    DSML,
    LATEST_REMINDER,
    *TASK_TOKENS.values(),
    EXTRACTED_URL,
)
"""Every string the renderer may write as one token. A tokenizer that splits one of them is refused."""

TOOL_RESULT_OPEN = "<tool_result>"
TOOL_RESULT_CLOSE = "</tool_result>"

TOOLS_HEAD = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
TOOLS_TAIL = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""

RESPONSE_FORMAT_HEAD = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

_EFFORT_A = """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root \
cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial \
scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered \
alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
_EFFORT_B = """Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively \
decompose the problem into its most fundamental components, trace every causal chain to its root, and \
resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are \
certain that no assumption remains unchecked and no error remains undiscovered.

"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One published revision of the format (spec/encoding.md, table of profiles)."""

    name: str
    """`v4` (V4-Pro, V4-Flash preview) or `v4-0731` (V4-Flash-0731)."""
    effort_texts: Mapping[str | None, str]
    """Level to the text after BOS in thinking mode. A level that is missing is refused."""
    block: str = "tool_calls"
    """Tag of the block of calls."""
    invoke: str = "invoke"
    """Tag of one call."""
    parameter: str = "parameter"
    """Tag of one argument."""

    def effort_text(self, level: str | None) -> str:
        """The text of an effort level. Raises RenderError for a level this profile does not know."""
        try:
            return self.effort_texts[level]
        except (KeyError, TypeError):
            known = ", ".join(repr(k) for k in self.effort_texts)
            raise RenderError(
                f"reasoning_effort {level!r} does not exist in profile {self.name!r}: use one of {known}"
            ) from None


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "v4": Profile(name="v4", effort_texts=MappingProxyType({None: "", "high": "", "max": _EFFORT_A})),
        "v4-0731": Profile(
            name="v4-0731",
            effort_texts=MappingProxyType({None: "", "low": "", "high": _EFFORT_A, "max": _EFFORT_B}),
        ),
    }
)


def get_profile(name: str) -> Profile:
    """The profile of that name. Raises RenderError naming the known ones."""
    try:
        return PROFILES[name]
    except KeyError:
        known = ", ".join(PROFILES)
        raise RenderError(f"unknown format profile {name!r}: use one of {known}") from None


_INSTRUCTION_MARKERS = re.compile(f"({DSML}|{THINK}|{THINK_END})")


def _split(text: str) -> tuple[tuple[str, bool], ...]:
    return tuple((p, bool(i % 2)) for i, p in enumerate(_INSTRUCTION_MARKERS.split(text)) if p)


TOOLS_HEAD_PIECES: tuple[tuple[str, bool], ...] = _split(TOOLS_HEAD)
"""TOOLS_HEAD cut into (text, is_special): its markers are real tokens (spec/encoding.md 1)."""
