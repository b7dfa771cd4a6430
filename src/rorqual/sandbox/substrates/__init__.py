"""The four substrates by name."""

from __future__ import annotations

from rorqual.sandbox.errors import InvalidRequest
from rorqual.sandbox.substrates.base import Launched, Substrate
from rorqual.sandbox.substrates.container import Container
from rorqual.sandbox.substrates.fullvm import FullVm
from rorqual.sandbox.substrates.function import Functions
from rorqual.sandbox.substrates.microvm import MicroVm

_SUBSTRATES: dict[str, Substrate] = {
    "function": Functions(),
    "container": Container(),
    "microvm": MicroVm(),
    "fullvm": FullVm(),
}
SUBSTRATES = tuple(_SUBSTRATES)


def substrate(name: str) -> Substrate:
    """The substrate of this name. Raises InvalidRequest when there is none."""
    if name not in _SUBSTRATES:
        raise InvalidRequest(f"substrate: {name!r} must be one of {', '.join(SUBSTRATES)}")
    return _SUBSTRATES[name]


__all__ = ["SUBSTRATES", "Launched", "Substrate", "substrate"]
