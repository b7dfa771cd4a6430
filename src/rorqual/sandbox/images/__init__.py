"""Root file systems: the host's own (`base`), Debian packages, OCI images, directories, and layers of remote stores."""

from __future__ import annotations

from rorqual.sandbox.images.base import RootFs
from rorqual.sandbox.images.debian import build_debian
from rorqual.sandbox.images.directory import import_directory
from rorqual.sandbox.images.layers import holder_directory, layer_events, prepare
from rorqual.sandbox.images.oci import import_oci
from rorqual.sandbox.images.store import ImageInfo, images, remove_image, root_file_system
from rorqual.sandbox.images.unpack import Bounds

__all__ = [
    "Bounds",
    "ImageInfo",
    "RootFs",
    "build_debian",
    "holder_directory",
    "images",
    "import_directory",
    "import_oci",
    "layer_events",
    "prepare",
    "remove_image",
    "root_file_system",
]
