"""What does an image cost before its first command, and what do twenty sandboxes on it cost together?

An image of 1 GB and more, made of this host's own /usr (compilers, interpreters, libraries), lies on an HTTP server
that is throttled to a stated bandwidth and answers after a stated delay. Four ways to a first command, each from an
empty state directory: the OCI archive fetched and unpacked (what most platforms do), the whole EROFS layer fetched,
the layer on demand, and on demand with the trace of the run before it fetched ahead. Then twenty sandboxes on it: the
page cache they share through one mount, and what twenty mounts of the same image hold. Bound of the eager ways: bytes
by bandwidth.

    python benchmarks/images.py [--mbit 1000] [--delay-ms 5] [--runs 3] [--output benchmarks/results/images.json]

Needs root, mkfs.erofs and 8 GB of disk in $TMPDIR. Figures of a busy machine are upper bounds.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import hashlib
import http.client
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from rorqual.sandbox import Sandbox
from rorqual.sandbox.images import (
    Bounds,
    fetched,
    import_directory,
    import_oci,
    publish,
    publish_trace,
    remote,
    root_file_system,
)
from rorqual.sandbox.images.erofs import mount_erofs
from rorqual.sandbox.images.layers import in_private_mounts
from rorqual.sandbox.keeper.client import close_all
from rorqual.sandbox.loader import client
from rorqual.sandbox.state import StateDir

PARTS = (
    "usr/bin",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/python3.11",
    "usr/lib/gcc",
)
FIRST = "python3 -c 'import json, ssl, sqlite3; print(42)'"
TASK = "echo 'int puts(const char *); int main(){puts(\"built\");}' > /tmp/a.c && gcc /tmp/a.c -o /tmp/a && /tmp/a"
TOUCHED = (
    "usr/bin/python3.11",
    "usr/lib/x86_64-linux-gnu/libc.so.6",
    "usr/lib/x86_64-linux-gnu/libcrypto.so.3",
)
SANDBOXES = 20
_SERVER = r"""
import http.server, os, re, sys, threading, time
root, bits, delay = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
lock, free, sent = threading.Lock(), [0.0], [0]
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path == "/-/sent":
            data = str(sent[0]).encode(); sent[0] = 0
            self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers()
            self.wfile.write(data); return
        path = os.path.join(root, self.path.lstrip("/").replace("%40", "@"))
        time.sleep(delay)
        if not os.path.isfile(path):
            self.send_error(404); return
        size = os.path.getsize(path); first, last = 0, size - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), size - 1)
            self.send_response(206); self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(last - first + 1)); self.end_headers()
        with open(path, "rb") as file:
            file.seek(first); left = last - first + 1
            while left:
                piece = file.read(min(65536, left)); left -= len(piece)
                with lock:
                    now = time.monotonic(); free[0] = max(now, free[0]) + len(piece) * 8 / bits
                    sent[0] += len(piece); wait = free[0] - now
                if wait > 0.002: time.sleep(wait)
                self.wfile.write(piece)
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
"""


class Server:
    def __init__(self, root: Path, *, mbit: float, delay_ms: float) -> None:
        command = [sys.executable, "-c", _SERVER, str(root), str(mbit * 1e6), str(delay_ms / 1e3)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def sent(self) -> int:
        """Bytes since the last call."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/-/sent")
        count = int(connection.getresponse().read())
        connection.close()
        return count

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def fresh(place: Path, name: str) -> StateDir:
    close_all()
    client.close_all()
    os.environ["RORQUAL_STATE"] = str(place / name)
    return StateDir.from_environment()


def make_tree(place: Path) -> int:
    """The host's directories under a merged root. Returns its bytes."""
    for part in PARTS:
        if Path("/", part).is_dir():
            (place / part).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", "--reflink=auto", f"/{part}", str(place / part)], check=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (place / "usr" / name).mkdir(exist_ok=True)
        (place / name).symlink_to(f"usr/{name}")
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    if loader.exists() and not (place / "usr/lib64/ld-linux-x86-64.so.2").exists():
        (place / "usr/lib64/ld-linux-x86-64.so.2").symlink_to("../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    (place / "etc").mkdir()
    for name in ("alternatives", "ld.so.conf", "ld.so.conf.d"):
        subprocess.run(["cp", "-a", f"/etc/{name}", str(place / "etc" / name)], check=False)
    done = subprocess.run(["du", "-sb", str(place)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def make_archive(tree: Path, store: Path, scratch: Path) -> None:
    """The same tree as an OCI archive of one gzip layer, as a registry would have it."""
    layout = scratch / "layout"
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    tar, packed = scratch / "layer.tar", scratch / "layer.tar.gz"
    subprocess.run(["tar", "-C", str(tree), "--sort=name", "-cf", str(tar), "."], check=True)
    with tar.open("rb") as file:
        diff_id = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    with tar.open("rb") as file, gzip.open(packed, "wb", compresslevel=1) as out:
        shutil.copyfileobj(file, out, 1 << 20)
    tar.unlink()

    def put(data: bytes) -> dict[str, Any]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    with packed.open("rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()
    size = packed.stat().st_size
    packed.rename(blobs / name)
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    config = put(json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}).encode())
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    layer = {"mediaType": kind, "digest": f"sha256:{name}", "size": size}
    manifest = put(json.dumps({"schemaVersion": 2, "config": config, "layers": [layer]}).encode())
    index = {"manifests": [{**manifest, "platform": {"os": "linux", "architecture": arch}}]}
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    with tarfile.open(store / "image.tar", "w") as archive:
        archive.add(layout, arcname=".")
    shutil.rmtree(layout)


def download(server: Server, name: str, target: Path) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", f"/{name}")
    with target.open("wb") as out:
        shutil.copyfileobj(connection.getresponse(), out, 1 << 20)
    connection.close()


def to_first_command(mode: str, server: Server, place: Path, number: int) -> dict[str, float]:
    state = fresh(place, f"state-{mode}-{number}")
    server.sent()
    begun = time.perf_counter()
    if mode == "eager-oci":
        download(server, "image.tar", place / "fetched.tar")
        import_oci(place / "fetched.tar", name="big", bounds=Bounds(max_bytes=8 << 30))
        (place / "fetched.tar").unlink()
    else:
        remote(server.url, "big", eager=mode == "eager-erofs", prefetch=mode == "prefetch")
    result: dict[str, float] = {}
    sent = 0
    with Sandbox.create(image="big", memory_mb=2048, disk_mb=256) as sb:
        result["created_s"] = time.perf_counter() - begun
        for key, command, says in (("first", FIRST, "42\n"), ("task", TASK, "built\n")):
            done = sb.commands.run(command, timeout=300)
            assert done.stdout == says, (mode, done)
            sent += server.sent()
            result[f"{key}_s"] = time.perf_counter() - begun
            result[f"{key}_bytes"] = sent
        if mode == "lazy" and number == 0:
            deadline = time.monotonic() + 10
            while not publish_trace("big", place / "store") and time.monotonic() < deadline:
                time.sleep(0.1)
    if not mode.startswith("eager"):
        result["chunks_here"] = fetched("big").here
    close_all()
    client.close_all()
    shutil.rmtree(state.root, ignore_errors=True)
    return result


def resident(path: str) -> tuple[int, int]:
    """(bytes of a file in the page cache, its size)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        address = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_PRIVATE, file.fileno(), 0)
        vector = (ctypes.c_ubyte * ((size + 4095) // 4096))()
        libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector)
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(byte & 1 for byte in vector) * 4096, size


def cached_mb() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) / 1024
    raise AssertionError


def sharing(server: Server, place: Path) -> dict[str, Any]:
    """Twenty sandboxes read the same files; then twenty mounts of one image do."""
    state = fresh(place, "state-sharing")
    remote(server.url, "big", eager=True)
    command = "cat " + " ".join(f"/{name}" for name in TOUCHED) + " > /dev/null"
    boxes = [Sandbox.create(image="big", memory_mb=256, disk_mb=16) for _ in range(SANDBOXES)]
    try:
        roots = []
        for sb in boxes:
            record = json.loads((state.sandboxes / sb.id / "record.json").read_text())
            roots.append(f"/proc/{record['init_pid']}/root")
        before = cached_mb()
        boxes[0].commands.run(command)
        one = cached_mb() - before
        seen = [sum(resident(f"{root}/{name}")[0] for name in TOUCHED) for root in roots]
        times = []
        for sb in boxes[1:]:
            begun = time.perf_counter()
            sb.commands.run(command)
            times.append((time.perf_counter() - begun) * 1e3)
        total = cached_mb() - before
    finally:
        for sb in boxes:
            sb.kill()
    size = sum(os.stat(os.path.realpath(f"/{name}")).st_size for name in TOUCHED)
    layer = root_file_system("big", state=state).overlays[0][1][-1]

    def alone() -> float:
        held = cached_mb()
        for number in range(SANDBOXES):
            target = place / f"m{number}"
            target.mkdir()
            mount_erofs(f"{layer}/meta.erofs", str(target), devices=[f"{layer}/data"])
            for name in TOUCHED:
                (target / name).resolve().read_bytes()
        return cached_mb() - held

    apart = in_private_mounts(alone)
    return {
        "sandboxes": SANDBOXES,
        "files_mb": size / 2**20,
        "cache_after_one_mb": one,
        "cache_after_all_mb": total,
        "resident_seen_by_others_mb": min(seen[1:]) / 2**20,
        "cache_of_separate_mounts_mb": apart,
        "read_p50_ms": statistics.median(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=float, default=1000.0)
    parser.add_argument("--delay-ms", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/images.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rorqual-images-") as name:
        place = Path(name)
        (place / "store").mkdir()
        (place / "tree").mkdir()
        fresh(place, "state-build")
        tree_bytes = make_tree(place / "tree")
        times = {}
        begun = time.perf_counter()
        import_directory(place / "tree", name="big", bounds=Bounds(max_bytes=8 << 30))
        times["import_directory_s"] = time.perf_counter() - begun
        begun = time.perf_counter()
        publish("big", place / "store")
        times["publish_s"] = time.perf_counter() - begun
        client.close_all()
        shutil.rmtree(place / "state-build")
        make_archive(place / "tree", place / "store", place)
        shutil.rmtree(place / "tree")
        server = Server(place / "store", mbit=options.mbit, delay_ms=options.delay_ms)
        try:
            modes: dict[str, list[dict[str, float]]] = {}
            for mode in ("eager-oci", "eager-erofs"):
                modes[mode] = [to_first_command(mode, server, place, 0)]
            for number in range(options.runs):
                for mode in ("lazy", "prefetch"):
                    modes.setdefault(mode, []).append(to_first_command(mode, server, place, number))
            shared = sharing(server, place)
        finally:
            server.close()
            close_all()
            client.close_all()
    summary = {
        mode: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for mode, runs in modes.items()
    }
    load = os.getloadavg()[0]
    print(
        f"image {tree_bytes / 1e6:.0f} MB; {options.mbit:g} Mbit/s, {options.delay_ms:g} ms; load {load:.1f}"
    )
    print(f"{'':12} {'created':>9} {'first':>9} {'moved':>10} {'task':>9} {'moved':>10}")
    for mode, row in summary.items():
        print(
            f"{mode:12} {row['created_s']:8.2f}s {row['first_s']:8.2f}s {row['first_bytes'] / 1e6:7.1f} MB"
            f" {row['task_s']:8.2f}s {row['task_bytes'] / 1e6:7.1f} MB"
        )
    print(
        f"{SANDBOXES} sandboxes read {shared['files_mb']:.1f} MB: page cache +{shared['cache_after_one_mb']:.0f} MB"
        f" after one, +{shared['cache_after_all_mb']:.0f} MB after all; {SANDBOXES} mounts of their own:"
        f" +{shared['cache_of_separate_mounts_mb']:.0f} MB"
    )
    document = {
        "image_bytes": tree_bytes,
        "mbit": options.mbit,
        "delay_ms": options.delay_ms,
        "summary": summary,
        "runs": modes,
        "sharing": shared,
        "build": times,
        "host": {
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip(),
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
