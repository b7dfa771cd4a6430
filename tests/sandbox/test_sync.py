"""The synchronous twin: generated, complete, and usable from any thread, loop or fork."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest

import rorqual.sandbox as room
from rorqual.sandbox import AsyncSandbox, InvalidRequest, Sandbox, SandboxEnded

ROOT = Path(__file__).resolve().parents[2]


def test_the_generated_files_are_up_to_date_and_the_check_can_fail(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/unasync.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0
    copy = tmp_path / "repo"
    for name in ("scripts/unasync.py", "pyproject.toml"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("_async", "_sync"):
        place = copy / "src/rorqual/sandbox" / folder
        place.mkdir(parents=True)
        for file in (ROOT / "src/rorqual/sandbox" / folder).glob("*.py"):
            (place / file.name).write_bytes(file.read_bytes())
    target = copy / "src/rorqual/sandbox/_sync/files.py"
    target.write_text(target.read_text() + "# edited\n")
    done = subprocess.run(
        [sys.executable, str(copy / "scripts/unasync.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "_sync/files.py differs" in done.stderr


def test_the_twin_has_every_public_method_with_the_same_parameters() -> None:
    with_twin = [(AsyncSandbox, Sandbox)]
    for name in ("commands", "files", "pty"):
        module = sys.modules[f"rorqual.sandbox._async.{name}"]
        other = sys.modules[f"rorqual.sandbox._sync.{name}"]
        title = name.capitalize()
        with_twin.append((getattr(module, f"Async{title}"), getattr(other, title)))
    for one, two in with_twin:
        names = {name for name in vars(one) if not name.startswith("_")}
        assert names == {name for name in vars(two) if not name.startswith("_")}
        for name in names:
            left, right = getattr(one, name), getattr(two, name)
            if callable(left):
                ours = list(inspect.signature(left).parameters)
                assert ours == list(inspect.signature(right).parameters), name
                assert not inspect.iscoroutinefunction(right)


def test_all_is_what_is_there() -> None:
    assert len(set(room.__all__)) == len(room.__all__)
    public = {
        name
        for name, value in vars(room).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert public == set(room.__all__)


def test_the_room_loads_without_torch() -> None:
    code = "import sys, rorqual.sandbox; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_sync_works_without_a_loop_and_from_inside_one(runtime: str) -> None:
    with Sandbox.create() as sb:
        seen: list[str] = []
        result = sb.commands.run("echo a; echo b >&2; exit 4", on_stdout=seen.append)
        assert (result.stdout, result.stderr, result.exit_code) == ("a\n", "b\n", 4) and seen == ["a\n"]
        sb.files.write("x", "1")
        assert sb.files.read("x") == "1"
        assert sb.id in [info.id for info in Sandbox.list()]

        async def inside() -> str:
            return sb.commands.run("echo loop").stdout

        assert asyncio.run(inside()) == "loop\n"
        with Sandbox.connect(sb.id) as other:
            assert other.files.exists("x")
        assert [entry.kind for entry in sb.trajectory.list()][:2] == ["created", "command"]
    assert sb.cause == "killed"
    with pytest.raises(SandboxEnded):
        sb.commands.run("true")


def test_background_handles_and_threads(runtime: str) -> None:
    with Sandbox.create() as sb:
        handle = sb.commands.run("cat", background=True, stdin=True)
        handle.send_stdin("one\n")
        handle.close_stdin()
        assert handle.wait().stdout == "one\n"
        results: list[str] = []
        threads = [
            threading.Thread(target=lambda n=n: results.append(sb.commands.run(f"echo {n}").stdout))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [f"{n}\n" for n in range(8)]


def test_a_sync_call_inside_a_callback_is_refused_instead_of_hanging(runtime: str) -> None:
    with Sandbox.create() as sb, pytest.raises(RuntimeError, match="AsyncSandbox"):
        sb.commands.run("echo x", on_stdout=lambda text: sb.commands.run("true") and None)


def test_errors_come_through_unchanged() -> None:
    with pytest.raises(InvalidRequest, match="memory_mb"):
        Sandbox.create(memory_mb=-1)


def test_a_forked_child_has_its_own_keeper_and_does_not_hold_ours(runtime: str) -> None:
    with Sandbox.create() as sb:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with Sandbox.create() as child:
                    code = 0 if child.commands.run("echo c").stdout == "c\n" else 2
                from rorqual.sandbox.keeper.client import close_all

                close_all()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert sb.commands.run("echo p").stdout == "p\n"
