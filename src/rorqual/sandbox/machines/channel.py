"""How a full machine is reached: by our agent, by qemu-guest-agent, by its serial console, or by screen and keyboard.

`reach` finds out at the first client and writes it down beside the machine, so that every later client takes the same
way, and `info()` can tell. Who asks for one channel gets that one or an error, never another. Owns the choice.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, NoReturn

from rorqual.sandbox._guest import GuestClient, GuestInfo
from rorqual.sandbox.errors import GuestError, GuestGone, Unsupported
from rorqual.sandbox.machines.agent_service import PORTS
from rorqual.sandbox.machines.console import ConsoleGuest, Login
from rorqual.sandbox.machines.qga import QgaGuest

CHANNELS = ("agent", "qemu-guest-agent", "console", "screen")
FILE = "channel"
_GRACE_S = 20.0
"""How much longer our agent is waited for once qemu-guest-agent has answered: it may start a little later."""
_CONSOLE_S = 45.0
_ASK_S = 8.0


class NoGuest(GuestClient):
    """A machine that nothing answers in: screen and keyboard are all there is."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self._reason = reason
        self.info = GuestInfo(protocol=0, agent="", pid=0, boot_id="")

    async def start(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("commands")

    async def attach(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("commands")

    async def _call(self, kind: Any, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("commands, files and pty")

    def _expect(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("commands, files and pty")

    def _refuse(self, what: str) -> NoReturn:
        raise Unsupported(what, reason=self._reason, available=["screen", "keyboard"])


def is_pc(address: str) -> bool:
    """Whether this address of a guest is a full machine's, `pc:<its directory>/vm`."""
    return address.startswith("pc:")


async def reach(address: str, *, patience: float) -> GuestClient:
    """A client of the machine. What is wished for is in its record.

    Raises GuestGone (no answer in `patience` s), GuestProtocolError, Unsupported (no shell to run commands with).
    """
    vm = Path(address.removeprefix("pc:"))
    place = vm.parent / FILE
    try:
        record = json.loads((vm.parent / "record.json").read_text("utf-8"))
        wish, login = record["machine"]["channel"], Login(**(record["spec"]["console"] or {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuestGone(f"the machine of {vm.parent.name} has no record: {error}") from error
    if found := chosen(vm.parent):
        return await _open(found, vm, patience=patience, login=login)
    name, guest = await _choose(wish, vm, patience=patience, login=login)
    temporary = place.with_name(f"{FILE}.new")
    temporary.write_text(name, encoding="ascii")
    os.rename(temporary, place)
    return guest


def chosen(directory: Path) -> str:
    """The channel in use, '' while none is."""
    try:
        return (directory / FILE).read_text(encoding="ascii")
    except OSError:
        return ""


async def _open(name: str, vm: Path, *, patience: float, login: Login) -> GuestClient:
    if name == "agent":
        return await _agent(f"ports:{vm}/agent-%d.sock?n={PORTS}", patience=patience)
    if name == "qemu-guest-agent":
        return await QgaGuest.open(vm / "qga.sock", timeout=patience)
    if name == "console":
        return await ConsoleGuest.open(vm / "console.sock", login=login, timeout=patience)
    return NoGuest("no agent and no console answers in this machine, or channel='screen' was asked for")


async def _agent(address: str, *, patience: float) -> GuestClient:
    """Asks anew every few seconds: what a client says to a port that a guest is just opening may be lost."""
    loop = asyncio.get_running_loop()
    end = loop.time() + patience
    while True:
        left = end - loop.time()
        try:
            return await GuestClient.connect(address, timeout=min(_ASK_S, max(1.0, left)))
        except GuestGone:
            if left <= _ASK_S:
                raise


async def _choose(wish: str, vm: Path, *, patience: float, login: Login) -> tuple[str, GuestClient]:
    if wish != "auto":
        return wish, await _open(wish, vm, patience=patience, login=login)
    ours = asyncio.ensure_future(_open("agent", vm, patience=patience, login=login))
    theirs = asyncio.ensure_future(_open("qemu-guest-agent", vm, patience=patience, login=login))
    tasks = {"agent": ours, "qemu-guest-agent": theirs}
    kept = ""
    try:
        await asyncio.wait([ours, theirs], return_when=asyncio.FIRST_COMPLETED)
        if not ours.done():
            worked = theirs.exception() is None
            await asyncio.wait([ours], timeout=_GRACE_S if worked else None)
        elif ours.exception() is not None:
            await asyncio.wait([theirs])
        kept = next((name for name, task in tasks.items() if task.done() and task.exception() is None), "")
        if kept:
            return kept, tasks[kept].result()
    finally:
        for name, task in tasks.items():
            if name == kept:
                continue
            task.cancel()
            (got,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(got, GuestClient):
                await got.close()
    try:
        return "console", await _open("console", vm, patience=_CONSOLE_S, login=login)
    except (GuestError, Unsupported):
        return "screen", await _open("screen", vm, patience=0, login=login)
