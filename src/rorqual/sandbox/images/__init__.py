"""Root file systems: the host's own (`base`), Debian packages, OCI images, directories, and images of layer stores."""

from __future__ import annotations

from rorqual.sandbox.images.base import RootFs
from rorqual.sandbox.images.debian import build_debian
from rorqual.sandbox.images.debian_disk import DiskImage, build_debian_disk, disks, remove_disk
from rorqual.sandbox.images.directory import import_directory
from rorqual.sandbox.images.layers import holder_directory, layer_events, prepare
from rorqual.sandbox.images.oci import import_oci
from rorqual.sandbox.images.pull import Fetched, fetch, fetched, remote
from rorqual.sandbox.images.push import publish, publish_trace
from rorqual.sandbox.images.registry import import_registry
from rorqual.sandbox.images.store import ImageInfo, images, remove_image, root_file_system
from rorqual.sandbox.images.unpack import Bounds

__all__ = [
    "Bounds",
    "DiskImage",
    "Fetched",
    "ImageInfo",
    "RootFs",
    "build_debian",
    "build_debian_disk",
    "disks",
    "fetch",
    "fetched",
    "holder_directory",
    "images",
    "import_directory",
    "import_oci",
    "import_registry",
    "layer_events",
    "prepare",
    "publish",
    "publish_trace",
    "remote",
    "remove_disk",
    "remove_image",
    "root_file_system",
]
