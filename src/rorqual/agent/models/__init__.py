"""Model adapters: a remote endpoint, or an engine in this process, behind one interface."""

from __future__ import annotations

from rorqual.agent.models.base import ChatModel, Completion, Delta, OnDelta, Usage
from rorqual.agent.models.embedded import EmbeddedConfig, EmbeddedModel, Sampling, TokenEngine, TokenEvent
from rorqual.agent.models.remote import RemoteConfig, RemoteModel

__all__ = [
    "ChatModel",
    "Completion",
    "Delta",
    "EmbeddedConfig",
    "EmbeddedModel",
    "OnDelta",
    "RemoteConfig",
    "RemoteModel",
    "Sampling",
    "TokenEngine",
    "TokenEvent",
    "Usage",
]
