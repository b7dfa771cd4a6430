"""Imports an image from a registry: skopeo fetches, oci.py checks and unpacks. Credentials are skopeo's own."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from rorqual.sandbox.errors import InvalidRequest
from rorqual.sandbox.images.oci import import_oci
from rorqual.sandbox.images.programs import run_program
from rorqual.sandbox.images.store import ImageInfo, image_directory
from rorqual.sandbox.images.unpack import Bounds
from rorqual.sandbox.keeper.removal import remove_tree
from rorqual.sandbox.state import StateDir

_REFERENCE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
    r"(@sha256:[0-9a-f]{64})?"
)


def import_registry(
    reference: str,
    *,
    name: str,
    tls: bool = True,
    timeout: float = 1800.0,
    bounds: Bounds | None = None,
    state: StateDir | None = None,
) -> ImageInfo:
    """Fetches `HOST[:PORT]/PATH[:TAG][@sha256:...]` for this machine and imports it as `name`.

    With a digest it is that image and no other. tls: False speaks plain HTTP to the registry.

    Raises:
        InvalidRequest: the reference or the name is not one.
        HostUnfit: no skopeo.
        ImageError: it cannot be fetched; the message ends with skopeo's own words.
        ImageRejected: as import_oci.
    """
    state = state or StateDir.from_environment()
    state.prepare()
    image_directory(name, state=state)
    if not _REFERENCE.fullmatch(reference):
        raise InvalidRequest(
            f"reference: {reference!r} is not HOST[:PORT]/PATH[:TAG][@sha256:<64 hex digits>]"
        )
    tag, at, digest = reference.rpartition("@")
    if at and ":" in tag.rpartition("/")[2]:  # skopeo takes one of the two; the digest is the one that binds
        reference = f"{tag.rpartition(':')[0]}@{digest}"
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=state.images))
    try:
        run_program(
            "skopeo",
            [
                *("copy", "--quiet", "--override-os=linux", f"--src-tls-verify={str(tls).lower()}"),
                *(f"docker://{reference}", f"oci:{building}/layout:image"),
            ],
            package="skopeo",
            about=reference,
            timeout=timeout,
        )
        return import_oci(building / "layout", name=name, bounds=bounds, state=state)
    finally:
        remove_tree(str(building))
