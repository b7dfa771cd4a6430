"""Cache report: what the prefix cache knew of a prompt, and if not all of it, why: `x_v4.cache` and a metric.

    hit        it began with everything that is kept of it
    diverged   it is like a kept prefix up to a token, and goes on otherwise: something in the history was changed
    evicted    more of it was kept once, and went for want of memory
    new        nothing of it is kept: another conversation
    empty      nothing is kept at all for this holder of a key
    short      it is too short to be kept
(spec/agent_and_serving.md 1.3: cache_miss_reason, first_divergence, kv_tier)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from rorqual import chat
from rorqual.engine import BatchFound

__all__ = ["cache_reason", "cache_report", "cache_tier"]

EXCERPT_TOKENS = 32
ROLES = {"<｜User｜>": "user", "<｜Assistant｜>": "assistant"}


def cache_reason(found: BatchFound) -> str:
    """Why not more of the prompt was found, in one word; `hit` where all that can be was."""
    match = found.match
    if match.evicted:
        return "evicted"
    return "diverged" if match.diverged is not None else match.reason


def cache_tier(found: BatchFound) -> str:
    """Where the prefix lay: `live` (a running request has it too), `ram`, `disk`, or `none`."""
    if not found.match.tokens:
        return "none"
    return "disk" if found.from_disk else "live" if found.match.live else "ram"


def cache_report(found: BatchFound, prompt: Sequence[int], tokenizer: chat.Tokenizer) -> dict[str, Any]:
    """`x_v4.cache` of one request. `first_divergence` is there where the prompt leaves a kept prefix: the index of
    the token and of the character in the rendered prompt, whose turn it is in, and a hash of the text from there."""
    match = found.match
    out: dict[str, Any] = {
        "tier": cache_tier(found),
        "reason": cache_reason(found),
        "cached_tokens": match.tokens,
        "disk_tokens": found.from_disk,
        "replayed_tokens": match.replay,
    }
    if match.diverged is not None:
        at = match.diverged
        excerpt = tokenizer.decode_bytes(prompt[at : at + EXCERPT_TOKENS])
        out["first_divergence"] = {
            "token": at,
            "char": len(tokenizer.decode(prompt[:at])),
            "role": _role(prompt, at, tokenizer),
            "excerpt_hash": hashlib.blake2b(excerpt, digest_size=8).hexdigest(),
        }
    return out


def _role(prompt: Sequence[int], at: int, tokenizer: chat.Tokenizer) -> str:
    names = {tokenizer.token_id(text): role for text, role in ROLES.items()}
    return next((names[token] for token in reversed(prompt[: at + 1]) if token in names), "system")
