"""Registries: the real skopeo against a small static one."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import AsyncSandbox, ImageError, InvalidRequest
from rorqual.sandbox.host import find_program
from rorqual.sandbox.images import import_registry, remove_image
from rorqual.sandbox.state import StateDir
from tests.sandbox.test_images import ARCH, busybox, file, tar

pytestmark = pytest.mark.skipif(find_program("skopeo") is None, reason="apt-get install skopeo")
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Registry:
    """Serves one repository, read-only (OCI distribution-spec: end-1, end-2, end-3)."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = self.path.split("/")
                kind, name = (parts[-2], parts[-1]) if len(parts) > 4 else ("", "")
                table = {"blobs": registry.blobs, "manifests": registry.manifests}.get(kind)
                data = b"{}" if self.path == "/v2/" else (table or {}).get(name)
                self.send_response(200 if data is not None else 404)
                data = data or b"{}"
                self.send_header(
                    "Content-Type", MANIFEST if kind == "manifests" else "application/octet-stream"
                )
                self.send_header("Docker-Content-Digest", digest(data))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def push(self, tag: str, layers: list[bytes]) -> str:
        config = {
            "architecture": ARCH,
            "os": "linux",
            "config": {"Env": ["GREETING=hello"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        }
        kind = "application/vnd.oci.image."
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.put(json.dumps(config).encode(), kind + "config.v1+json"),
            "layers": [self.put(gzip.compress(layer, 1), kind + "layer.v1.tar+gzip") for layer in layers],
        }
        data = json.dumps(manifest).encode()
        self.manifests[tag] = self.manifests[digest(data)] = data
        return digest(data)

    def put(self, data: bytes, kind: str) -> dict[str, object]:
        self.blobs[digest(data)] = data
        return {"mediaType": kind, "digest": digest(data), "size": len(data)}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def registry() -> Iterator[Registry]:
    running = Registry()
    yield running
    running.close()


async def test_an_image_of_a_registry_runs_by_tag_and_by_digest(registry: Registry, runtime: str) -> None:
    pin = registry.push("1.0", [tar(busybox()), tar([file("hello", b"from a registry\n")])])
    for reference in (f"{registry.address}/team/app:1.0", f"{registry.address}/team/app:1.0@{pin}"):
        info = import_registry(reference, name="app:1", tls=False)
        assert info.origin == "oci"
        async with await AsyncSandbox.create(image="app:1") as sb:
            result = await sb.commands.run('read line < /hello; echo "$GREETING $line"')
            assert result.stdout == "hello from a registry\n"
    remove_image("app:1")


def test_a_blob_that_is_not_what_its_digest_says_is_refused(
    registry: Registry, state: StateDir, tmp_path: Path
) -> None:
    registry.push("bad", [tar([file("a", b"1")])])
    for name in registry.blobs:
        registry.blobs[name] = registry.blobs[name][:-1] + b"?"
    with pytest.raises(ImageError, match="skopeo failed"):
        import_registry(f"{registry.address}/x:bad", name="bad", tls=False)
    assert not list(state.images.glob(".building-*")) and not (state.images / "bad").exists()


@pytest.mark.parametrize(
    ("reference", "error", "says"),
    [
        ("", InvalidRequest, "is not HOST"),
        ("--help", InvalidRequest, "is not HOST"),
        ("host/x y", InvalidRequest, "is not HOST"),
        ("host/../x", InvalidRequest, "is not HOST"),
        ("docker://host/x", InvalidRequest, "is not HOST"),
        ("host/x@sha256:12", InvalidRequest, "is not HOST"),
        ("127.0.0.1:9/x:1", ImageError, "skopeo failed.*refused"),
    ],
)
def test_a_wrong_reference_is_one_clear_line(reference: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        import_registry(reference, name="x", tls=False)
    assert "\n" not in str(caught.value)
