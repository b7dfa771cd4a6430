"""QMP, QEMU's control language, through the `qemu.qmp` library: one monitor at a time, every wait with a deadline.

    async with monitor(directory / "qmp.sock") as qmp:
        await qmp.execute("query-status")

QEMU serves one client; a file lock beside the socket makes the others wait instead of hang. QEMU may be taken over by
its guest: its answers are data, the library bounds their size, and no link in its directory is followed.
Source: the QEMU QMP Reference Manual, 7.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.sandbox._dial import Address, dial
from rorqual.sandbox.errors import HostUnfit, SandboxError

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

COMMAND_S = 20.0


class MonitorError(SandboxError):
    """QEMU refused a command, or did not answer. `command` names it, `kind` is QEMU's class of error or ''."""

    def __init__(self, command: str, reason: str, *, kind: str = "") -> None:
        self.command = command
        self.kind = kind
        super().__init__(f"QEMU: {command}: {reason}")


class Monitor:
    """One open monitor."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline: float = COMMAND_S
    ) -> Any:
        """The command's return value. Raises MonitorError."""
        from qemu.qmp import ExecuteError, QMPError

        try:
            async with asyncio.timeout(deadline):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise MonitorError(command, str(error), kind=error.error_class) from error
        except TimeoutError as error:
            raise MonitorError(command, f"no answer in {deadline:g} s") from error
        except (QMPError, EOFError, OSError) as error:
            raise MonitorError(command, f"the monitor is gone: {error}") from error

    async def send_fd(self, name: str, fd: int) -> None:
        """Gives QEMU a copy of a descriptor, as `fd:name` in later commands. Raises MonitorError."""
        self._client.send_fd_scm(fd)
        await self.execute("getfd", {"fdname": name})

    async def wait_for_migration(self, *, deadline: float) -> Mapping[str, Any]:
        """Until a migration has completed; QEMU's figures about it. Raises MonitorError."""
        pause = 0.002
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline
        while True:
            answer: Mapping[str, Any] = await self.execute("query-migrate")
            if answer.get("status") == "completed":
                return answer
            if answer.get("status") in ("failed", "cancelled"):
                raise MonitorError("migrate", str(answer.get("error-desc", f"it has {answer['status']}")))
            if loop.time() > end:
                raise MonitorError("migrate", f"not done in {deadline:g} s")
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.05)


@contextlib.asynccontextmanager
async def monitor(path: Path, *, deadline: float = COMMAND_S) -> AsyncIterator[Monitor]:
    """Connects to a monitor's socket, waiting for whoever has it now.

    Raises:
        HostUnfit: the qemu.qmp library is not installed.
        MonitorError: nobody listens, or no greeting came before the deadline.
    """
    try:
        from qemu.qmp import QMPClient, QMPError
    except ImportError as error:
        raise HostUnfit(
            "virtual machines need the qemu.qmp library.", fix="pip install 'rorqual[machines]'"
        ) from error
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    lock = os.open(
        f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600
    )
    client = QMPClient("rorqual")
    client.logger.disabled = True  # it logs every refused command as an error; we raise it
    try:
        pause = 0.002
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if loop.time() > end:
                    raise MonitorError("connect", f"another client has held it for {deadline:g} s") from None
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.05)
        sock = await _connect(path, end - loop.time())
        try:
            async with asyncio.timeout(max(0.0, end - loop.time())):
                await client.connect(sock)
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            sock.close()
            raise MonitorError("connect", f"no greeting: {error or type(error).__name__}") from error
        except BaseException:
            sock.close()
            raise
        try:
            yield Monitor(client)
        finally:
            with contextlib.suppress(Exception):
                await asyncio.shield(client.disconnect())
    finally:
        os.close(lock)


async def _connect(path: Path, seconds: float) -> socket.socket:
    """A connected socket; waits until somebody listens."""
    address = Address(kind="unix", path=str(path))
    pause, end = 0.002, asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return (await dial(address)).sock
        except OSError as error:
            if (
                not isinstance(error, FileNotFoundError | ConnectionRefusedError)
                or asyncio.get_running_loop().time() > end
            ):
                raise MonitorError("connect", f"{path}: {error.strerror or error}") from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.05)
