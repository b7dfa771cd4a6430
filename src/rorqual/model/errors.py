"""Errors of the model room.

ModelError
├── ConfigError       config.json is missing, malformed or contradicts itself
└── CheckpointError   tensors are missing, of the wrong shape or dtype, or unreadable
"""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "ModelError"]


class ModelError(Exception):
    """Base of everything this room raises on bad input."""


class ConfigError(ModelError):
    """A configuration is malformed or contradicts itself."""


class CheckpointError(ModelError):
    """A checkpoint cannot be loaded: names the tensor, what was found and what was expected."""
