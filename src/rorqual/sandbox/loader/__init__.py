"""The layer holder: one process per state directory that mounts each layer once, for all sandboxes of the host.

It mounts EROFS images in a private mount namespace and hands out detached copies of the mounts, so that every
sandbox, whichever client it belongs to, reads through the same page cache. Layers that lie in a remote store are
files of a FUSE mount below the EROFS mount; a worker process fetches their chunks when they are first read. Runs on
the standard library, without the package's `__init__` (see `client.py`). See docs/decisions/0017-layers.md.
"""
