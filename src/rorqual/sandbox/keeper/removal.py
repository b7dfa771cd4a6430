"""Removes a directory that something hostile may have filled: any depth, never through a link, never an exception."""

from __future__ import annotations

import os
import shutil
import subprocess


def remove_tree(path: str) -> bool:
    """True when nothing is left. Python's rmtree recurses, so a tree thousands of levels deep is left to rm(1)."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return not os.path.lexists(path)
    except (OSError, RecursionError):
        subprocess.run(
            ["rm", "-rf", "--one-file-system", "--", path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin"},
            check=False,
        )
    return not os.path.lexists(path)
