"""Layers under sandboxes: they stack, they are shared, and a loader that dies is missed by nobody."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rorqual.sandbox import (
    AsyncSandbox,
    HostUnfit,
    ImageError,
    InvalidRequest,
    LaunchFailed,
    Sandbox,
    Unsupported,
)
from rorqual.sandbox.images import (
    fetch,
    fetched,
    holder_directory,
    images,
    import_directory,
    layer_events,
    publish,
    publish_trace,
    remote,
    remove_image,
    root_file_system,
)
from rorqual.sandbox.images import layers as layers_module
from rorqual.sandbox.images.erofs import layers_directory, mount_erofs
from rorqual.sandbox.images.layers import remove_unused, usable
from rorqual.sandbox.keeper import linux
from rorqual.sandbox.loader import client
from rorqual.sandbox.machines.rootfs import machine_root
from rorqual.sandbox.state import StateDir
from tests.sandbox.layer_server import Store, serve

pytestmark = pytest.mark.skipif(not usable(), reason="needs root, mkfs.erofs and a kernel with EROFS")


def tree(place: Path, files: dict[str, str | bytes]) -> Path:
    place.mkdir(exist_ok=True)
    place.chmod(0o755)  # it becomes a directory inside, with the mode it has here
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        path.chmod(0o755)
    return place


def wait_for(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def holder(state: StateDir) -> dict[str, object]:
    return client.status(holder_directory(state))


@pytest.fixture(scope="module")
def stacked(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place = tmp_path_factory.mktemp("trees")
    tool = {"bin/tool": "#!/bin/sh\necho tool 1\n", "share/data": random.Random(1).randbytes(3 << 20)}
    import_directory(tree(place / "tool", tool), name="toolkit:one", at="/usr/local", owner=0)
    import_directory(
        tree(place / "next", {"bin/tool": "#!/bin/sh\necho tool 2\n"}),
        name="toolkit:two",
        at="/usr/local",
        owner=0,
    )
    import_directory(
        tree(place / "work", {"src/main.py": "print(6 * 7)\n"}),
        name="workspace:w",
        at="/home/user/w",
        owner=1000,
    )
    yield
    for name in ("toolkit:one", "toolkit:two", "workspace:w"):
        remove_image(name)


async def test_workspace_and_toolkits_lie_on_base_the_later_over_the_earlier(stacked: None) -> None:
    layers = ["workspace:w", "toolkit:one"]
    async with await AsyncSandbox.create(layers=layers) as sb:
        result = await sb.commands.run(
            "tool; python3 w/src/main.py; echo x >> w/src/main.py; stat -c %u:%g w/src"
        )
        assert result.stdout == "tool 1\n42\n1000:1000\n"
    async with await AsyncSandbox.create(layers=[*layers, "toolkit:two"]) as sb:
        assert (await sb.commands.run("tool; cat w/src/main.py; ls /usr/local/share")).stdout == (
            "tool 2\nprint(6 * 7)\ndata\n"
        )


async def test_snapshots_and_forks_keep_their_layers_and_what_was_written_over_them(stacked: None) -> None:
    async with await AsyncSandbox.create(layers=["workspace:w", "toolkit:one"]) as sb:
        await sb.commands.run("echo 'print(1)' > w/src/main.py; touch w/new")
        (twin,) = await sb.fork(count=1)
        async with twin:
            assert (
                await twin.commands.run("tool; python3 w/src/main.py; ls w")
            ).stdout == "tool 1\n1\nnew\nsrc\n"
            (grandchild,) = await twin.fork(count=1)
            await grandchild.kill()
            deep = await twin.snapshot()
        snapshot = await sb.snapshot()
    for name in (snapshot.name, deep.name):
        async with await AsyncSandbox.create(image=name, layers=["toolkit:two"]) as sb:
            result = await sb.commands.run("tool; python3 w/src/main.py; stat -c %u w/new")
            assert (
                result.stdout == "tool 2\n1\n1000\n"
            )  # a new layer lies under what the snapshot had written
    with pytest.raises(ImageError, match="is built on it"):
        remove_image("workspace:w")
    assert remove_image(snapshot.name) and remove_image(deep.name)


@pytest.mark.parametrize(
    ("layers", "error", "says"),
    [
        (["base"], InvalidRequest, "cannot lie on another image"),
        ("toolkit:one", InvalidRequest, "a sequence of image names"),
        (["toolkit:one"] * 33, InvalidRequest, "at most 32"),
        (["toolkit:none"], ImageError, "no image 'toolkit:none'"),
        (["../x"], InvalidRequest, "not an image name"),
    ],
)
async def test_wrong_layers_are_one_clear_line(
    layers: list[str], error: type[Exception], says: str, stacked: None
) -> None:
    with pytest.raises(error, match=says):
        await AsyncSandbox.create(layers=layers)


async def test_a_layer_that_links_out_of_itself_shows_nothing_of_the_host(
    runtime: str, tmp_path: Path
) -> None:
    """A layer's /usr/local that is a link is not followed when it is put on the base image's /usr/local."""
    place = tree(tmp_path / "evil", {"usr/keep": "x"})
    (place / "usr/local").symlink_to("/etc")
    import_directory(place, name="evil")
    with pytest.raises(LaunchFailed, match="local is a symlink in the image"):
        await AsyncSandbox.create(layers=["evil"])
    remove_image("evil")


def resident(path: str) -> int:
    """Pages of a file that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view,
    ):
        pages = (len(view) + 4095) // 4096
        vector = (ctypes.c_ubyte * pages)()
        libc.mmap.restype = ctypes.c_void_p
        address = libc.mmap(None, ctypes.c_size_t(len(view)), 1, 2, file.fileno(), ctypes.c_long(0))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(view)), vector) == 0
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(len(view)))
        return sum(byte & 1 for byte in vector)


def test_sandboxes_of_two_clients_read_a_layer_through_one_page_cache(stacked: None, state: StateDir) -> None:
    code = (
        "from rorqual.sandbox import Sandbox\n"
        "with Sandbox.create(layers=['toolkit:one']) as sb:\n"
        "    print(sb.id, flush=True); input()\n"
    )
    # Another client, with a keeper of its own.
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None and other.stdout is not None
    try:
        sandbox_id = other.stdout.readline().strip()
        pid = json.loads((state.sandboxes / sandbox_id / "record.json").read_text())["init_pid"]
        path = f"/proc/{pid}/root/usr/local/share/data"
        drop(path)
        before = resident(path)
        with Sandbox.create(layers=["toolkit:one"]) as sb:
            sb.commands.run("cat /usr/local/share/data > /dev/null")
            after = resident(path)
        assert before < 100 and after == 768
    finally:
        other.communicate("\n", timeout=30)


def drop(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


async def test_layers_without_an_image_are_removed_and_a_running_sandbox_keeps_them(
    runtime: str, state: StateDir, tmp_path: Path
) -> None:
    import_directory(tree(tmp_path / "a", {"f": b"a" * 100_000}), name="going", at="/opt/going")
    (name,) = json.loads((state.images / "going/image.json").read_text())["layers"]
    async with await AsyncSandbox.create(layers=["going"]) as sb:
        assert remove_image("going")
        assert not (layers_directory(state) / name).exists()
        wait_for(lambda: name not in str(holder(state)))
        assert (await sb.commands.run("wc -c < /opt/going/f")).stdout == "100000\n"
    assert remove_unused(state) == 0
    with pytest.raises(ImageError, match="no image 'going'"):
        await AsyncSandbox.create(layers=["going"])


async def test_an_image_whose_layer_is_gone_says_so(runtime: str, state: StateDir, tmp_path: Path) -> None:
    import_directory(tree(tmp_path / "a", {"f": "1"}), name="broken", at="/opt/b")
    (name,) = json.loads((state.images / "broken/image.json").read_text())["layers"]
    (layers_directory(state) / name).unlink()
    with pytest.raises(ImageError, match="lacks its layer"):
        await AsyncSandbox.create(layers=["broken"])
    remove_image("broken")


async def test_a_layer_file_that_is_damaged_is_one_clear_line(
    runtime: str, state: StateDir, tmp_path: Path
) -> None:
    import_directory(tree(tmp_path / "a", {"f": "damaged"}), name="damaged", at="/opt/d")
    (name,) = json.loads((state.images / "damaged/image.json").read_text())["layers"]
    path = layers_directory(state) / name
    for data in (b"", bytes(5000), path.read_bytes()[:1100], random.Random(1).randbytes(8192)):
        path.unlink()
        path.write_bytes(data)
        with pytest.raises(HostUnfit, match=r"its layers cannot be mounted: .*mount erofs"):
            await AsyncSandbox.create(layers=["damaged"])
    remove_image("damaged")


def test_without_root_or_tools_images_are_plain_directories_that_say_so(
    state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_module, "probe", lambda: (False, "no mkfs.erofs here", ""))
    import_directory(tree(tmp_path / "a", {"f": "1"}), name="flat", at="/opt/flat")
    root = root_file_system("flat", state=state)
    assert (Path(root.overlays[0][1][0]) / "opt/flat/f").read_text() == "1"
    assert any("plain directory: no mkfs.erofs here" in note for note in root.notes)
    with pytest.raises(HostUnfit, match="remote layers need EROFS"):
        remote(str(tmp_path), "x")
    with Sandbox.create(layers=["flat"]) as sb:
        assert sb.commands.run("cat /opt/flat/f").stdout == "1"
    remove_image("flat")


# -- remote
# ----------------------------------------------------------------------------------------------------


@pytest.fixture
def far(state: StateDir, runtime: str, tmp_path: Path) -> Iterator[tuple[Store, bytes]]:
    """A store with an image `far` that this host has never seen, and the content of its /opt/far/big."""
    data = random.randbytes(6 << 20)  # fresh in every test: what was read once stays in the page cache
    files: dict[str, str | bytes] = {"big": data, "small": "small\n", "bin/run": "#!/bin/sh\necho ran\n"}
    import_directory(tree(tmp_path / "tree", files), name="far", at="/opt/far")
    publish("far", tmp_path / "store", compress=0)
    remove_image("far")
    with serve(tmp_path / "store") as running:
        yield running, data
    remove_image("far")


async def test_a_remote_layer_is_used_before_it_is_here(far: tuple[Store, bytes]) -> None:
    server, data = far
    info = remote(server.url, "far")
    assert info in images()
    async with await AsyncSandbox.create(layers=["far"]) as sb:
        assert (await sb.commands.run("/opt/far/bin/run; cat /opt/far/small; ls /opt/far")).stdout == (
            "ran\nsmall\nbig\nbin\nsmall\n"
        )
        assert fetched("far").here <= 2 < fetched("far").chunks
        result = await sb.commands.run("sha256sum < /opt/far/big")
        assert result.stdout.split()[0] == hashlib.sha256(data).hexdigest()
        wait_for(lambda: any(event["event"] == "complete" for event in layer_events()))
    asked = len(server.ranges)
    async with await AsyncSandbox.create(layers=["far"]) as sb:
        assert (await sb.commands.run("cat /opt/far/small")).stdout == "small\n"
    assert len(server.ranges) == asked
    wait_for(lambda: publish_trace("far", server.root) > 0)
    (trace,) = (server.root / "traces").iterdir()
    assert len(trace.read_bytes()) // 4 == fetched("far").chunks
    remove_image("far")
    remote(server.url, "far")  # as a host that has never seen it
    assert fetched("far").here == 0
    async with await AsyncSandbox.create(layers=["far"]) as sb:
        assert (await sb.commands.run("cat /opt/far/small")).stdout == "small\n"
        wait_for(lambda: fetched("far").here == fetched("far").chunks)  # nobody has read them


def test_a_remote_layer_is_a_machine_s_disk_once_it_is_here(
    far: tuple[Store, bytes], state: StateDir
) -> None:
    remote(far[0].url, "far")
    with pytest.raises(Unsupported, match="not all on this host"):
        machine_root("far", state=state)
    fetch("far")
    (disk,) = machine_root("far", state=state).layers
    assert disk == machine_root("far", state=state).layers[0]

    def look() -> bytes:
        linux.mount("tmpfs", "/mnt", fstype="tmpfs")
        mount_erofs(str(disk), "/mnt")
        return Path("/mnt/opt/far/big").read_bytes()

    assert layers_module.in_private_mounts(look) == far[1]
    remove_unused(state)
    assert disk.exists()


async def test_a_store_that_goes_away_is_an_io_error_with_a_cause_and_comes_back(
    far: tuple[Store, bytes],
) -> None:
    server, data = far
    remote(server.url, "far", deadline_s=0.5, attempts=1)
    async with await AsyncSandbox.create(layers=["far"]) as sb:
        server.fault = "down"
        start = time.time()
        result = await sb.commands.run("cat /opt/far/big | wc -c", timeout=30)
        assert "Input/output error" in result.stderr
        causes = [
            event for event in layer_events() if event["event"] == "unreachable" and event["time"] >= start
        ]
        assert causes and server.url in causes[0]["detail"]
        server.fault = "corrupt"
        result = await sb.commands.run("cat /opt/far/big > /dev/null", timeout=30)
        assert "Input/output error" in result.stderr
        assert any(event["event"] == "corrupt" and event["time"] >= start for event in layer_events())
        server.fault = ""
        result = await sb.commands.run("sha256sum < /opt/far/big", timeout=30)
        assert result.stdout.split()[0] == hashlib.sha256(data).hexdigest()


async def test_a_loader_killed_in_the_middle_of_reads_is_replaced_and_no_read_is_lost(
    far: tuple[Store, bytes], state: StateDir
) -> None:
    server, data = far
    remote(server.url, "far")
    async with await AsyncSandbox.create(layers=["far"]) as sb:
        server.delay_s = 0.1
        reading = await sb.commands.run("sha256sum < /opt/far/big", background=True)
        wait_for(lambda: len(server.ranges) > 1)
        first = holder(state)["worker"]
        assert isinstance(first, int)
        os.kill(first, signal.SIGKILL)
        result = await reading.wait()
        assert result.stdout.split()[0] == hashlib.sha256(data).hexdigest()
        assert holder(state)["worker"] != first
    assert any("the loader died" in event.get("detail", "") for event in layer_events())


async def test_a_loader_killed_while_a_layer_is_mounted_is_replaced(
    far: tuple[Store, bytes], state: StateDir, tmp_path: Path
) -> None:
    remote(far[0].url, "far")
    async with await AsyncSandbox.create(layers=["far"]):
        first, pid = holder(state)["worker"], holder(state)["pid"]
        assert isinstance(first, int)
        import_directory(tree(tmp_path / "second", {"f": "second\n"}), name="near", at="/opt/near")
        publish("near", tmp_path / "near")
        remove_image("near")
        remote(str(tmp_path / "near"), "near")
        os.kill(first, signal.SIGSTOP)  # so that the mount has to wait for it
        creating = asyncio.ensure_future(AsyncSandbox.create(layers=["near"]))
        children = Path(f"/proc/{pid}/task/{pid}/children")
        await asyncio.to_thread(wait_for, lambda: len(children.read_text().split()) >= 2)
        os.kill(first, signal.SIGKILL)
        async with await asyncio.wait_for(creating, timeout=30) as sb:
            assert (await sb.commands.run("cat /opt/near/f")).stdout == "second\n"
    remove_image("near")


async def test_a_killed_holder_is_replaced_and_running_sandboxes_keep_their_local_layers(
    stacked: None, state: StateDir
) -> None:
    async with await AsyncSandbox.create(layers=["workspace:w"]) as old:
        pid = holder(state)["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        async with await AsyncSandbox.create(layers=["workspace:w"]) as new:
            for sb in (old, new):
                assert (await sb.commands.run("python3 w/src/main.py")).stdout == "42\n"
        assert holder(state)["pid"] != pid


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"op": "trees", "layers": ["../../../etc"]}', "not the name of a layer"),
        (b'{"op": "trees", "layers": ["/etc/passwd"]}', "not the name of a layer"),
        (b'{"op": "trees", "layers": ["' + b"0" * 64 + b'.erofs"]}', "is not on this host"),
        (b'{"op": "trees", "layers": "x"}', "at most 200 layers"),
        (b'{"op": "trees", "layers": [' + b",".join([b'"x"'] * 201) + b"]}", "at most 200 layers"),
        (b'{"op": "format"}', "unknown operation"),
        (b'{"layers": []}', "op"),
        (b"[]", "list indices"),
        (b"nonsense", "Expecting value"),
    ],
)
def test_a_holder_refuses_what_is_no_request_and_goes_on(
    line: bytes, says: str, stacked: None, state: StateDir
) -> None:
    client.prepare(holder_directory(state), str(layers_directory(state)), [])
    with client.connect(holder_directory(state)) as sock:
        sock.sendall(line + b"\n")
        assert says in sock.recv(1 << 16).decode()
    with client.connect(holder_directory(state)) as sock, contextlib.suppress(OSError):
        sock.sendall(b"x" * (1 << 20))
        while sock.recv(1 << 16):  # it hangs up on a line without an end
            pass
    assert holder(state)["mounted"] is not None


def test_clients_that_start_at_once_start_one_holder(tmp_path: Path) -> None:
    place, layers = tmp_path / "run/layers", tmp_path / "layers"
    layers.mkdir()
    code = (
        "import sys\n"
        "from rorqual.sandbox.loader import client\n"
        "client.prepare(sys.argv[1], sys.argv[2], [])\n"
        "print(client.status(sys.argv[1])['pid'], flush=True); input()\n"
    )
    command = [sys.executable, "-c", code, str(place), str(layers)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    pids = {process.stdout.readline().strip() for process in started if process.stdout is not None}
    for process in started:
        process.communicate("\n", timeout=30)
    (pid,) = pids
    os.unlink(place / "holder.sock")  # nobody can reach it any more: it ends without waiting
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_a_holder_outlives_its_client_and_ends_when_nobody_needs_it(tmp_path: Path, stacked: None) -> None:
    """In a state directory of its own, since this process's own clients keep the holder of the others."""
    environ = {**os.environ, "RORQUAL_STATE": str(tmp_path / "state")}
    code = (
        "import os, sys\n"
        "from rorqual.sandbox import Sandbox\n"
        "from rorqual.sandbox.images import holder_directory, import_directory\n"
        "from rorqual.sandbox.loader import client\n"
        "from rorqual.sandbox.state import StateDir\n"
        "import_directory(sys.argv[1], name='x', at='/opt/x')\n"
        "sb = Sandbox.create(layers=['x'], keep=True)\n"
        "place = holder_directory(StateDir.from_environment())\n"
        "print(sb.id, place, client.status(place)['pid'], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    work = tree(tmp_path / "work", {"f": "1"})
    done = subprocess.run(
        [sys.executable, "-c", code, str(work)], env=environ, stdout=subprocess.PIPE, text=True, check=False
    )
    sandbox_id, place, pid = done.stdout.split()
    assert done.returncode == -signal.SIGKILL
    kill = f"from rorqual.sandbox import Sandbox; sb = Sandbox.connect({sandbox_id!r}); "
    kill += "assert sb.commands.run('cat /opt/x/f').stdout == '1'; sb.kill()"
    assert client.status(place)["pid"] == int(pid)
    subprocess.run([sys.executable, "-c", kill], env=environ, check=True)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
