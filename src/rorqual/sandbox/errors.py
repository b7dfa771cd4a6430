"""Errors of the sandbox room. Libraries raise them; only the command line exits.

SandboxError
└── GuestError                    the guest agent's side of things (block at the end of this file)
    ├── GuestGone                 the connection, the agent or its sandbox died
    ├── GuestProtocolError        the guest sent something the protocol does not allow; the connection is closed
    ├── GuestRefused              the agent refused a call (limits, unknown command, busy)
    └── GuestFileError            a file call failed in the guest: errno and path
"""

from __future__ import annotations

import os


class SandboxError(Exception):
    """Base of every error this room raises."""


# --- guest agent: raised by sandbox/_guest.py and sandbox/_protocol.py ---------------------------------------


class GuestError(SandboxError):
    """Base of the errors of one guest connection."""


class GuestGone(GuestError):
    """The connection to the guest agent ended: the agent died, its sandbox died, or the host closed it."""


class GuestProtocolError(GuestError):
    """The guest sent bytes the protocol does not allow. The connection is closed and must not be reused."""


class GuestRefused(GuestError):
    """The agent refused a call: `errno` says why in numbers, the text says it in words."""

    def __init__(self, message: str, *, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class GuestFileError(GuestError):
    """A file call failed inside the guest. Carries `errno` and `path`, both as the guest saw them."""

    def __init__(self, errno: int, path: str, *, call: str = "") -> None:
        super().__init__(f"{call + ' ' if call else ''}{path}: {os.strerror(errno)} (errno {errno})")
        self.errno = errno
        self.path = path
        self.call = call


# --- end of the guest agent's block --------------------------------------------------------------------------
