"""Errors of the rl room.

RlError
├── TaskError      a task was asked for that does not exist, or its files could not be put into the sandbox
├── TraceError     a demonstration could not be built (unknown style, a command the simulator does not know)
├── SampleError    a trace cannot become a training sample (a masked value is not there, sequences too long)
├── TrainError     a training run cannot start or go on (a checkpoint of another run, no usable group)
└── RolloutError   episodes cannot be run (the sandboxes do not start)
"""

from __future__ import annotations

__all__ = ["RlError", "RolloutError", "SampleError", "TaskError", "TraceError", "TrainError"]


class RlError(Exception):
    """Base of everything this room raises on bad input."""


class TaskError(RlError):
    """A task was asked for that does not exist, or its files could not be put into the sandbox."""


class TraceError(RlError):
    """A demonstration could not be built: names the style or the command."""


class SampleError(RlError):
    """A trace cannot become a training sample: names the message and the value."""


class TrainError(RlError):
    """A training run cannot start or go on: names the file and what to do."""


class RolloutError(RlError):
    """Episodes cannot be run: the sandboxes do not start."""
