"""Build hook: compiles the native parts into the package. Runs for wheels and for `pip install -e`.

The guest agent (native/guest, C, static) must be there: needs a C compiler with a static libc (Debian: gcc libc6-dev).
The CPU kernels (native/cpu, C++17) make decoding fast: without a C++ compiler (Debian: g++) the build says so and goes
on, and the package decodes in torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        self.guest_agent(root, build_data)
        self.cpu_kernels(root, build_data)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def guest_agent(self, root: Path, build_data: dict[str, Any]) -> None:
        out = root / "src" / "rorqual" / "sandbox" / "_bin" / "rorqual-guest"
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError(
                "no C compiler found, and the sandbox guest agent is built from native/guest: "
                "apt-get install gcc libc6-dev"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["make", "-s", "-C", str(root / "native" / "guest"), f"CC={compiler}", f"OUT={out}"], check=True
        )
        build_data["force_include"][str(out)] = "rorqual/sandbox/_bin/rorqual-guest"

    def cpu_kernels(self, root: Path, build_data: dict[str, Any]) -> None:
        spec = importlib.util.spec_from_file_location(
            "rorqual_cpu_build", root / "native" / "cpu" / "build.py"
        )
        assert spec is not None and spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        out = root / "src" / "rorqual" / "kernels" / "_bin" / "librorqual_cpu.so"
        cxx = native.compiler()
        try:
            if cxx is None:
                raise OSError("no C++ compiler found (apt-get install g++)")
            native.build(out, cxx)
        except (OSError, subprocess.CalledProcessError) as error:
            out.unlink(missing_ok=True)  # an older build's would be of other sources
            self.app.display_warning(
                f"native/cpu was not built, rorqual will decode in torch, slower: {error}"
            )
            return
        build_data["force_include"][str(out)] = "rorqual/kernels/_bin/librorqual_cpu.so"
