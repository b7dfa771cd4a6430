"""Imports an image from a registry: skopeo fetches, oci.py checks and unpacks. Credentials are skopeo's own."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from rorqual.sandbox.errors import HostUnfit, ImageError, InvalidRequest
from rorqual.sandbox.host import find_program
from rorqual.sandbox.images.oci import import_oci
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
    program = find_program("skopeo")
    if program is None:
        raise HostUnfit("skopeo is not installed.", fix="apt-get install skopeo")
    tag, at, digest = reference.rpartition("@")
    if at and ":" in tag.rpartition("/")[2]:  # skopeo takes one of the two; the digest is the one that binds
        reference = f"{tag.rpartition(':')[0]}@{digest}"
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=state.images))
    try:
        command = [program, "copy", "--quiet", "--override-os=linux", f"--src-tls-verify={str(tls).lower()}"]
        command += [f"docker://{reference}", f"oci:{building}/layout:image"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ImageError(f"{reference}: skopeo was not done after {timeout:g} s") from error
        if done.returncode:
            words = [line for line in done.stderr.splitlines() if line.strip()]
            raise ImageError(f"{reference}: skopeo failed: {(words or ['no message'])[-1][-500:]}")
        return import_oci(building / "layout", name=name, bounds=bounds, state=state)
    finally:
        remove_tree(str(building))
