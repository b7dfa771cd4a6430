"""Errors of the agent room.

AgentError
├── EventLogError       a run's log is missing, damaged in the middle, in use, or cannot be written
├── SetupError          the agent was put together wrongly (no key in the environment, unusable tools or
options)
├── ModelError          the model could not answer: wrong URL or key, refused request, broken stream; carries
fields
│   └── ContextFull     the conversation no longer fits the model's context
└── EnvironmentGone     the sandbox ended or stopped answering under the agent

A failed command, a bad tool argument or malformed markup is none of these: it is text that goes back to the
model.
"""

from __future__ import annotations

__all__ = ["AgentError", "ContextFull", "EnvironmentGone", "EventLogError", "ModelError", "SetupError"]


class AgentError(Exception):
    """Base of everything this room raises."""


class EventLogError(AgentError):
    """A run's event log is missing, damaged before its end, held by another process, or not writable."""


class SetupError(AgentError):
    """The agent was put together wrongly; the text says which option and what it should be."""


class ModelError(AgentError):
    """The model could not answer. One line: what was asked where, what came back, what to check.

    `retryable` says whether the same request may succeed later; `status` is the HTTP status, if there was
    one.
    """

    def __init__(
        self,
        text: str,
        *,
        url: str | None = None,
        status: int | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(text)
        self.url = url
        self.status = status
        self.retryable = retryable
        self.retry_after = retry_after


class ContextFull(ModelError):
    """The conversation no longer fits the model's context; carries both numbers in its text."""


class EnvironmentGone(AgentError):
    """The sandbox ended or stopped answering; the cause is chained."""
