"""The four substrates by name. Those that a later issue builds exist as names and refuse with a reason."""

from __future__ import annotations

from rorqual.sandbox.errors import InvalidRequest, Unsupported
from rorqual.sandbox.substrates.base import Launched, Substrate
from rorqual.sandbox.substrates.container import Container
from rorqual.sandbox.substrates.fullvm import FullVm
from rorqual.sandbox.substrates.function import Functions
from rorqual.sandbox.substrates.microvm import MicroVm

SUBSTRATES = ("function", "container", "microvm", "fullvm")
_BUILT: dict[str, Substrate] = {
    "container": Container(),
    "function": Functions(),
    "microvm": MicroVm(),
    "fullvm": FullVm(),
}


def substrate(name: str) -> Substrate:
    """The substrate of this name.

    Raises:
        InvalidRequest: no such name.
        Unsupported: the name is known, the substrate is not built yet.
    """
    if name not in SUBSTRATES:
        raise InvalidRequest(f"substrate: {name!r} must be one of {', '.join(SUBSTRATES)}")
    if name not in _BUILT:
        raise Unsupported(
            f"substrate={name!r}", reason="this version does not have it yet", available=tuple(_BUILT)
        )
    return _BUILT[name]


__all__ = ["SUBSTRATES", "Launched", "Substrate", "substrate"]
