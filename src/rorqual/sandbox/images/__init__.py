"""Root file systems: the host's own (`base`), built from Debian packages, imported from OCI archives."""

from __future__ import annotations

from rorqual.sandbox.images.base import RootFs
from rorqual.sandbox.images.debian import build_debian
from rorqual.sandbox.images.oci import import_oci
from rorqual.sandbox.images.store import ImageInfo, images, remove_image, root_file_system
from rorqual.sandbox.images.unpack import Bounds

__all__ = [
    "Bounds",
    "ImageInfo",
    "RootFs",
    "build_debian",
    "images",
    "import_oci",
    "remove_image",
    "root_file_system",
]
