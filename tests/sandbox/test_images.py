"""Images: the base skeleton's secrets stay out, OCI archives come in whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.sandbox import AsyncSandbox, ImageNotFound, ImageRejected, InvalidRequest
from rorqual.sandbox.images import Bounds, build_debian, images, import_oci, remove_image, root_file_system
from rorqual.sandbox.images.base import base_image
from rorqual.sandbox.images.layers import in_private_mounts, is_layer, mount_lowers, usable
from rorqual.sandbox.keeper import linux
from rorqual.sandbox.state import StateDir

ARCH = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
Entry = tuple[str, dict[str, Any], bytes]


def file(name: str, data: bytes = b"", **fields: Any) -> Entry:
    return name, {"type": tarfile.REGTYPE, "mode": 0o644, **fields}, data


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> Entry:
    return name, {"type": kind, "linkname": to}, b""


def folder(name: str) -> Entry:
    return name, {"type": tarfile.DIRTYPE, "mode": 0o755}, b""


def tar(entries: list[Entry]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, fields, data in entries:
            info = tarfile.TarInfo(name)
            for key, value in fields.items():
                setattr(info, key, value)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def layout(
    place: Path, layers: list[bytes], *, spoil: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """An OCI image layout written by hand, from the image specification."""
    blobs = place / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, Any]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    config = {
        "architecture": ARCH,
        "os": "linux",
        "config": {"Env": ["PATH=/opt/bin:/bin:/usr/bin", "GREETING=hello"]},
        "rootfs": {
            "type": "layers",
            "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers],
        },
    }
    parts: dict[str, Any] = {"config": config}
    if spoil is not None:
        spoil(parts)
    packed = [gzip.compress(layer, 1) for layer in layers]
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    manifest = {
        "schemaVersion": 2,
        "config": put(json.dumps(config).encode()),
        "layers": [{"mediaType": kind, **put(data)} for data in packed],
    }
    if "manifest" in parts:
        parts["manifest"](manifest, blobs)
    index = {
        "manifests": [
            {**put(json.dumps(manifest).encode()), "platform": {"architecture": ARCH, "os": "linux"}}
        ]
    }
    (place / "index.json").write_text(json.dumps(index))
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return place


def busybox() -> list[Entry]:
    """A root file system of one program: sh from the host with its libraries."""
    entries = [folder("bin"), folder("etc"), folder("lib64"), folder("lib")]
    real = os.path.realpath("/bin/dash")
    entries.append(file("bin/sh", Path(real).read_bytes(), mode=0o755))
    for library in ("/lib/x86_64-linux-gnu/libc.so.6", "/lib/aarch64-linux-gnu/libc.so.6"):
        if Path(library).exists():
            entries.append(file(library.lstrip("/"), Path(library).read_bytes(), mode=0o755))
    for loader in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"):
        if Path(loader).exists():
            entries.append(file(loader.lstrip("/"), Path(loader).read_bytes(), mode=0o755))
    return entries


def rootfs(state: StateDir, name: str, copy: Path) -> Path:
    """What an image's root holds, wherever this host keeps it."""
    ((_, lowers),) = root_file_system(name, state=state).overlays
    if not is_layer(lowers[0]):
        return Path(lowers[0])

    def look() -> None:
        linux.mount("tmpfs", "/mnt", fstype="tmpfs")
        places = mount_lowers(lowers, "/mnt", state=state)
        os.mkdir("/mnt/all")
        linux.mount("overlay", "/mnt/all", fstype="overlay", data=f"lowerdir={':'.join(places)}")
        shutil.copytree("/mnt/all", copy, symlinks=True, ignore=lambda *_: ["fifo"])

    in_private_mounts(look)
    return copy


async def test_an_imported_image_runs_with_its_variables_and_its_whiteouts(
    runtime: str, state: StateDir, tmp_path: Path
) -> None:
    first = tar(
        [
            *busybox(),
            folder("data"),
            file("data/old", b"1"),
            file("data/kept", b"2"),
            folder("opq"),
            file("opq/x", b""),
        ]
    )
    second = tar([file("data/.wh.old"), file("opq/y", b""), file("opq/.wh..wh..opq"), file("data/new", b"3")])
    path = layout(tmp_path / "image", [first, second])
    archive = tmp_path / "image.tar"
    with tarfile.open(archive, "w") as out:
        out.add(path, arcname=".")
    info = import_oci(archive, name="hand-made:1")
    assert info in images() and info.origin == "oci"
    async with await AsyncSandbox.create(image="hand-made:1") as sb:
        result = await sb.commands.run(
            'echo "$GREETING $PATH"; cd /data; echo *; cd /opq; echo *; echo > /tmp/x'
        )
        assert result.stdout == "hello /opt/bin:/bin:/usr/bin\nkept new\ny\n" and result.stderr == ""
        assert await sb.files.read("/data/new") == "3"
    assert remove_image("hand-made:1") and not remove_image("hand-made:1")


async def test_an_unknown_image_names_those_that_exist() -> None:
    with pytest.raises(ImageNotFound, match=r"no image 'nope' on this host; there are: base"):
        await AsyncSandbox.create(image="nope")
    with pytest.raises(InvalidRequest, match="not an image name"):
        await AsyncSandbox.create(image="../../etc")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([file("../evil", b"x")], "leaves the image"),
        ([file("a/../../evil", b"x")], "leaves the image"),
        ([folder("d"), link("h", "../../etc/passwd", tarfile.LNKTYPE)], "leaves the image"),
        ([link("h", "nothing", tarfile.LNKTYPE)], "not there"),
        ([folder("d"), link("h", "d", tarfile.LNKTYPE)], "hard link to the directory"),
        ([file("f", b"x"), file("f/below", b"y")], "goes through a file"),
        ([link("loop", "loop"), file("loop/x", b"y")], "loop/x"),
        ([link("gone", "nowhere"), file("gone/x", b"y")], "dangling"),
        ([file(".wh...", b"")], "whiteout"),
        ([file("big", b"x" * 70_000)], "more than 65536 bytes"),
        ([file(f"f{n}") for n in range(40)], "more than 32 entries"),
    ],
)
def test_a_hostile_layer_is_refused_and_nothing_is_kept(
    entries: list[Entry], says: str, state: StateDir, tmp_path: Path
) -> None:
    path = layout(tmp_path / "image", [tar([file("below", says.encode())]), tar(entries)])
    before = set((state.root / "layers").glob("*.erofs"))
    with pytest.raises(ImageRejected, match=says):
        import_oci(path, name="hostile", bounds=Bounds(max_bytes=65536, max_entries=32))
    assert not (state.images / "hostile").exists()
    assert set((state.root / "layers").glob("*.erofs")) <= before
    assert not list(state.images.glob(".building-*"))
    assert not (state.images / "evil").exists() and not (tmp_path / "evil").exists()


def test_absolute_and_climbing_symlinks_never_lead_writes_out(state: StateDir, tmp_path: Path) -> None:
    """A later entry through a link lands where chroot would put it: inside the image."""
    outside = tmp_path / "outside"
    outside.mkdir()
    entries = [
        folder("inside"),
        link("abs", str(outside)),
        link("up", "../../../../../../inside"),
        file("up/a", b"in"),
        folder(str(outside).lstrip("/")),
        file("abs/b", b"in"),
    ]
    import_oci(layout(tmp_path / "image", [tar(entries)]), name="links")
    root = rootfs(state, "links", tmp_path / "copy")
    assert (root / "inside/a").read_bytes() == b"in"
    assert (root / str(outside).lstrip("/") / "b").read_bytes() == b"in"
    assert not list(outside.iterdir())
    remove_image("links")


def test_a_symlinked_passwd_is_not_written_through(state: StateDir, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("host")
    entries = [folder("etc"), link("etc/passwd", str(victim)), link("etc/group", "/etc/fifo")]
    entries.append(("etc/fifo", {"type": tarfile.FIFOTYPE}, b""))
    import_oci(layout(tmp_path / "image", [tar(entries)]), name="passwd")
    assert victim.read_text() == "host"
    remove_image("passwd")


def test_a_bomb_stops_at_its_bound(tmp_path: Path) -> None:
    info = tarfile.TarInfo("zeros")
    info.size = 1 << 40
    head = info.tobuf(format=tarfile.GNU_FORMAT)
    bomb = head + bytes(1 << 24)
    with pytest.raises(ImageRejected, match="more than"):
        import_oci(layout(tmp_path / "a", [bomb]), name="bomb", bounds=Bounds(max_bytes=1 << 20))
    longest = tarfile.TarInfo("././@LongLink")
    longest.type, longest.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with pytest.raises(ImageRejected, match="header of"):
        import_oci(layout(tmp_path / "b", [longest.tobuf() + bytes(1 << 20)]), name="bomb")


def test_directories_nested_without_end_are_refused_and_removed(state: StateDir, tmp_path: Path) -> None:
    deep = "/".join("d" * 1500)
    entries = [
        folder(deep),
        link("l", deep),
        folder("l/" + deep),
        link("m", "l/" + deep),
        folder("m/" + deep),
    ]
    with pytest.raises(ImageRejected, match=r"nested too deep|too long|File name"):
        import_oci(layout(tmp_path / "image", [tar(entries), tar([file(".wh.d")])]), name="deep")
    assert not list(state.images.glob(".building-*"))


def _wrong_digest(manifest: dict[str, Any], blobs: Path) -> None:
    name = manifest["layers"][0]["digest"].removeprefix("sha256:")
    data = bytearray((blobs / name).read_bytes())
    data[len(data) // 2] ^= 1
    (blobs / name).write_bytes(data)


def _bad_name(manifest: dict[str, Any], blobs: Path) -> None:
    manifest["layers"][0]["digest"] = "sha256:../../../../etc/passwd"


def _missing(manifest: dict[str, Any], blobs: Path) -> None:
    manifest["layers"][0]["digest"] = "sha256:" + "0" * 64


def _linked(manifest: dict[str, Any], blobs: Path) -> None:
    place = blobs / manifest["layers"][0]["digest"].removeprefix("sha256:")
    place.unlink()
    place.symlink_to("/etc/passwd")


def _zstd(manifest: dict[str, Any], blobs: Path) -> None:
    manifest["layers"][0]["mediaType"] += "+zstd"


def _size(manifest: dict[str, Any], blobs: Path) -> None:
    manifest["layers"][0]["size"] = 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_wrong_digest, "another digest"),
        (_bad_name, "not sha256:<64 hex digits>"),
        (_missing, "No such file"),
        (_linked, "symbolic links"),
        (_zstd, "are not read"),
        (_size, "the manifest says 1"),
    ],
)
def test_a_manifest_that_does_not_fit_its_blobs_is_refused(
    change: Callable[[dict[str, Any], Path], None], says: str, tmp_path: Path
) -> None:
    def spoil(parts: dict[str, Any]) -> None:
        parts["manifest"] = change

    with pytest.raises(ImageRejected, match=says):
        import_oci(layout(tmp_path / "image", [tar([file("a", b"x" * 1000)])], spoil=spoil), name="bad")


def test_a_wrong_diff_id_and_wrong_machine_are_refused(tmp_path: Path) -> None:
    def diff(parts: dict[str, Any]) -> None:
        parts["config"]["rootfs"]["diff_ids"] = ["sha256:" + "1" * 64]

    with pytest.raises(ImageRejected, match="diff id"):
        import_oci(layout(tmp_path / "a", [tar([file("a")])], spoil=diff), name="bad")
    place = layout(tmp_path / "b", [tar([file("a")])])
    index = json.loads((place / "index.json").read_text())
    index["manifests"][0]["platform"]["architecture"] = "s390x"
    (place / "index.json").write_text(json.dumps(index))
    with pytest.raises(ImageRejected, match=f"no manifest for linux/{ARCH}"):
        import_oci(place, name="bad")


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\x1f\x8b" + b"x" * 600, b"{" * 2000])
def test_a_file_that_is_no_archive_is_one_clear_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(ImageRejected) as caught:
        import_oci(path, name="bad")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_base_image_holds_no_secret_of_the_host(state: StateDir) -> None:
    state.prepare()
    root = base_image(state.images)
    shown = {target: lower for target, lower in root.overlays}
    skeleton = Path(shown["/"][0])
    for name in ("etc/shadow", "etc/gshadow", "etc/ssh", "etc/sudoers"):
        assert not (skeleton / name).exists(), name
    for name in ("root", "home", "tmp", "opt", "srv", "mnt"):
        assert not list((skeleton / name).iterdir()), name
    for place in skeleton.rglob("*"):
        if place.is_file() and not place.is_symlink():
            assert b"PRIVATE KEY" not in place.read_bytes(), place
    assert base_image(state.images) == root


@pytest.mark.skipif(not usable(), reason="this host makes no EROFS layers")
def test_images_on_one_base_share_its_layers_and_each_keeps_its_whiteouts(
    state: StateDir, tmp_path: Path
) -> None:
    base = tar(
        [
            folder("d"),
            file("d/one", b"1"),
            file("d/two", b"2"),
            link("to", "d"),
            link("d/hard", "d/two", tarfile.LNKTYPE),
        ]
    )
    first = tar([file("d/.wh.one"), file("to/three", b"3")])  # `to/` is a link of the layer below
    second = tar([link("again", "to/hard", tarfile.LNKTYPE), file("d/.wh..wh..opq"), file("d/four", b"4")])
    import_oci(layout(tmp_path / "a", [base, first]), name="a")
    import_oci(layout(tmp_path / "b", [base, first, second]), name="b")
    lowers = {name: root_file_system(name, state=state).overlays[0][1] for name in "ab"}
    assert all(Path(lower).exists() for name in "ab" for lower in lowers[name])
    assert lowers["a"][-2:] == lowers["b"][-2:]
    assert len({*lowers["a"], *lowers["b"]}) <= 5
    shown = {name: rootfs(state, name, tmp_path / f"copy-{name}") for name in "ab"}
    assert sorted(os.listdir(shown["a"] / "d")) == ["hard", "three", "two"]
    assert sorted(os.listdir(shown["b"] / "d")) == ["four"]
    assert (shown["a"] / "to").is_symlink() and (shown["b"] / "again").read_bytes() == b"2"
    for name in "ab":
        remove_image(name)
    assert not [lower for name in "ab" for lower in lowers[name][-2:] if Path(lower).exists()]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_debian_image_is_built_and_runs(runtime: str) -> None:
    try:
        info = build_debian("debian-test", packages=["busybox-static"], timeout=500)
    except Exception as error:
        if any(word in str(error) for word in ("resolve", "connect", "mmdebstrap is not installed")):
            pytest.skip(f"no package mirror: {error}")
        raise
    assert info.size_bytes
    try:
        async with await AsyncSandbox.create(image="debian-test") as sb:
            result = await sb.commands.run(
                "cat /etc/debian_version; busybox echo hi; id -un; stat -c %U /usr/bin"
            )
            assert result.exit_code == 0 and result.stdout.endswith("hi\nuser\nroot\n")
    finally:
        remove_image("debian-test")
