"""Root file systems: the host's own (`base`), built from Debian packages, imported from OCI archives."""

from __future__ import annotations

from rorqual.sandbox.images.base import RootFs
from rorqual.sandbox.images.store import ImageInfo, images, remove_image, root_file_system

__all__ = ["ImageInfo", "RootFs", "images", "remove_image", "root_file_system"]
