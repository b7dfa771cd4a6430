"""Build hook: compiles the guest agent (native/guest, C, static) into the package.

Runs for wheels and for `pip install -e`. Needs a C compiler with a static libc (Debian: gcc libc6-dev).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GuestAgentHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        out = root / "src" / "rorqual" / "sandbox" / "_bin" / "rorqual-guest"
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError(
                "no C compiler found, and the sandbox guest agent is built from native/guest: apt-get install gcc libc6-dev"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["make", "-s", "-C", str(root / "native" / "guest"), f"CC={compiler}", f"OUT={out}"], check=True
        )
        build_data["force_include"][str(out)] = "rorqual/sandbox/_bin/rorqual-guest"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
