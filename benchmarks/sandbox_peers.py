"""The other ways to run a command isolated on this host, for benchmarks/sandbox.py: the bare OCI runtimes, bubblewrap,
podman, and fork+exec as the floor. Each is tried once, and left out with its reason when it fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rorqual.sandbox.host import find_program
from rorqual.sandbox.images import root_file_system
from rorqual.sandbox.state import StateDir

Measure = Callable[[], float]
"""Does it once; seconds."""
NULL: dict[str, Any] = {
    "stdin": subprocess.DEVNULL,
    "stdout": subprocess.DEVNULL,
    "stderr": subprocess.DEVNULL,
}


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, **NULL)
    return time.perf_counter() - start


class Peers:
    """`create()` and `live()` give what works here by name; `not_run` says why the others do not. `close` it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.not_run: dict[str, str] = {}
        base = dict(root_file_system("base", state=StateDir.from_environment()).overlays)
        self.rootfs = place / "rootfs"
        shutil.copytree(base["/"][0], self.rootfs, symlinks=True)
        self.unified = "/sys/fs/cgroup/unified" if os.path.ismount("/sys/fs/cgroup/unified") else ""
        self._live: list[str] = []

    def create(self) -> dict[str, Measure]:
        """A fresh one that runs /bin/true, and its end."""
        found: dict[str, Measure] = {"fork+exec": lambda: timed(["/bin/true"])}
        for name in ("crun", "runc"):
            if (path := find_program(name)) is None:
                self.not_run[f"{name} run"] = "not installed"
            else:
                self._offer(found, f"{name} run", self._bundle(name, path))
        if (path := find_program("runsc")) is None:
            self.not_run["runsc run"] = "not installed"
        else:
            bundle = self._config("runsc", "runsc", ["/bin/true"])
            base = [path, "--platform=ptrace", "--network=none", "--root", str(self.place / "runsc-state")]
            self._offer(found, "runsc run", [*base, "run", "--bundle", str(bundle), "bench-runsc"])
        if find_program("bwrap") is None:
            self.not_run["bwrap --unshare-all"] = "not installed"
        else:
            links = [("usr/bin", "/bin"), ("usr/lib64", "/lib64"), ("usr/lib", "/lib")]
            binds = ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
            binds += [word for pair in links for word in ("--symlink", *pair)]
            self._offer(found, "bwrap --unshare-all", ["bwrap", "--unshare-all", *binds, "/bin/true"])
        if find_program("podman") is None:
            self.not_run["podman run"] = "not installed"
        else:
            self._offer(found, "podman run", self._podman())
        return found

    def _podman(self) -> list[str]:
        (self.rootfs / "usr").rmdir()
        (self.rootfs / "usr").mkdir()
        # Not crun: podman cannot take /sys/fs/cgroup/unified away from it on a hybrid host.
        runtime = ["--runtime", "runc"] if self.unified else []
        places = ["--root", str(self.place / "podman"), "--runroot", str(self.place / "podman-run")]
        options = ["--network=none", "--memory=512m", "--pids-limit=256", "--ulimit=nofile=1024:1024"]
        options += ["--ulimit=nproc=1024:1024", "-v", "/usr:/usr:ro", "--rootfs", str(self.rootfs)]
        command = ["podman", *runtime, *places, "--cgroup-manager=cgroupfs", "run", "--rm"]
        return [*command, *options, "/bin/true"]

    def _offer(self, found: dict[str, Measure], name: str, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            self.not_run[name] = (done.stderr.strip().splitlines() or ["?"])[-1][:200]
        else:
            found[name] = lambda: timed(command)

    def _config(self, place: str, name: str, argv: list[str]) -> Path:
        """A bundle with the runtime's own default configuration, on the host's /usr."""
        bundle = self.place / place
        bundle.mkdir()
        path = find_program(name)
        assert path is not None
        subprocess.run([path, "spec"], cwd=bundle, check=True)
        config = json.loads((bundle / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": argv}
        config["root"] = {"path": str(self.rootfs), "readonly": True}
        usr = {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]}
        config["mounts"].append(usr)
        config["linux"]["resources"] = {"memory": {"limit": 512 << 20}, "pids": {"limit": 256}}
        (bundle / "config.json").write_text(json.dumps(config))
        return bundle

    def _bundle(self, name: str, path: str) -> list[str]:
        bundle = self._config(name, name, ["/bin/true"])
        run = f"{path} --root {bundle}/state run --bundle {bundle} bench-{name}"
        if (
            self.unified and name == "crun"
        ):  # it refuses hybrid hosts otherwise; the unshare is part of the price
            return ["unshare", "-m", "sh", "-c", f"umount {self.unified}; exec {run}"]
        return ["sh", "-c", f"exec {run}"]

    def live(self) -> dict[str, list[str]]:
        """A container of runc that runs: the command lines that do something with it."""
        path = find_program("runc")
        if path is None:
            self.not_run["runc exec"] = "not installed"
            return {}
        bundle = self._config("runc-live", "runc", ["/bin/sleep", "10000"])
        runc = [path, "--root", str(bundle / "state")]
        done = subprocess.run(
            [*runc, "run", "--detach", "--bundle", str(bundle), "bench-live"], check=False, **NULL
        )
        if done.returncode:
            self.not_run["runc exec"] = "it starts no container here"
            return {}
        self._live = [*runc, "delete", "--force", "bench-live"]
        return {
            "exec": [*runc, "exec", "bench-live"],
            "pause": [*runc, "pause", "bench-live"],
            "resume": [*runc, "resume", "bench-live"],
        }

    def close(self) -> None:
        if self._live:
            subprocess.run(self._live, check=False, **NULL)
        # podman keeps its storage directory mounted onto itself
        for name in ("podman/overlay", "podman"):
            subprocess.run(["umount", "-R", "-l", str(self.place / name)], check=False, **NULL)
