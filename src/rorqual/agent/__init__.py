"""The agent: an append-only event log, a loop, tools, guards, model adapters. Needs no torch.

result = Agent(model=RemoteModel(RemoteConfig(url=..., model=...)), sandbox=sb).run("TASK")
"""

from __future__ import annotations

from rorqual.agent.environment import CommandEnded, Environment, SandboxEnvironment
from rorqual.agent.errors import (
    AgentError,
    ContextFull,
    EnvironmentGone,
    EventLogError,
    ModelError,
    SetupError,
)
from rorqual.agent.events import Event, EventLog, project, read_log
from rorqual.agent.guards import GuardConfig, LoopGuard
from rorqual.agent.loop import Agent, AgentResult, AsyncAgent, Budget
from rorqual.agent.models import (
    ChatModel,
    Completion,
    EmbeddedConfig,
    EmbeddedModel,
    RemoteConfig,
    RemoteModel,
    Usage,
)
from rorqual.agent.prompts import REMOTE_SYSTEM_PROMPT, SYSTEM_PROMPT
from rorqual.agent.tools import DEFAULT_TOOLS, TASK_TOOLS, Tool, ToolContext, ToolOutput, format_result

__all__ = [
    "DEFAULT_TOOLS",
    "REMOTE_SYSTEM_PROMPT",
    "SYSTEM_PROMPT",
    "TASK_TOOLS",
    "Agent",
    "AgentError",
    "AgentResult",
    "AsyncAgent",
    "Budget",
    "ChatModel",
    "CommandEnded",
    "Completion",
    "ContextFull",
    "EmbeddedConfig",
    "EmbeddedModel",
    "Environment",
    "EnvironmentGone",
    "Event",
    "EventLog",
    "EventLogError",
    "GuardConfig",
    "LoopGuard",
    "ModelError",
    "RemoteConfig",
    "RemoteModel",
    "SandboxEnvironment",
    "SetupError",
    "Tool",
    "ToolContext",
    "ToolOutput",
    "Usage",
    "format_result",
    "project",
    "read_log",
]
