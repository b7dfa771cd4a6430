"""Exit codes, and how an error becomes one line on stderr.

0 done, 1 the task failed, 2 wrong use, 3 the host lacks something, 130 interrupted.
"""

from __future__ import annotations

__all__ = ["DONE", "FAILED", "INTERRUPTED", "UNFIT", "WRONG_USE", "CliError", "describe"]

DONE, FAILED, WRONG_USE, UNFIT, INTERRUPTED = 0, 1, 2, 3, 130

EXTRAS = {
    "torch": "model",
    "safetensors": "model",
    "tokenizers": "model",
    "numpy": "model",
    "matplotlib": "train",
}
"""Optional package -> the extra that brings it."""


class CliError(Exception):
    """A command cannot go on. One line for the user, and the exit code."""

    def __init__(self, text: str, *, code: int) -> None:
        super().__init__(text)
        self.code = code


def describe(error: BaseException) -> tuple[str, int]:
    """The line and the exit code for an error that reached the top."""
    # Imported here: what a command did not need must not be loaded to report its error.
    from rorqual.agent.errors import AgentError, SetupError
    from rorqual.sandbox.errors import HostUnfit, ImageNotFound, InvalidRequest, SandboxError, Unsupported

    text = " ".join(str(error).split())
    if isinstance(error, CliError):
        return text, error.code
    if isinstance(error, HostUnfit):
        fix = f" Try: {error.fix}" if error.fix and error.fix not in text else ""
        return f"{text}{fix} (`rorqual doctor` tells more)", UNFIT
    if isinstance(error, Unsupported):
        return f"{text} (`rorqual doctor` tells what this host can do)", UNFIT
    if isinstance(error, SetupError | InvalidRequest | ImageNotFound):
        return text, WRONG_USE
    if isinstance(error, AgentError | SandboxError) or _is_ours(error):
        return text, FAILED
    room = type(error).__module__.split(".")[:2]
    if room in (["rorqual", "model"], ["rorqual", "engine"], ["rorqual", "rl"], ["rorqual", "chat"]):
        return text, FAILED  # by name: these rooms load torch, which a command may not have needed
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"this needs {error.name}: pip install 'rorqual[{EXTRAS[error.name]}]'", UNFIT
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", FAILED
    kind = type(error).__name__
    return f"internal error: {kind}: {text} (set RORQUAL_DEBUG=1 for the traceback)", FAILED


def _is_ours(error: BaseException) -> bool:
    """An error that a room of ours raises on purpose: its text is written for the user."""
    module = type(error).__module__.split(".")
    return module[0] == "rorqual" and module[-1] == "errors"
