"""`rorqual sandbox` and `rorqual edge`, as a user types them: on this host, through an edge, under a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rorqual._cli.sandbox_copy import _unpack
from rorqual.cli import main
from rorqual.sandbox import Sandbox, SandboxError, trajectory
from rorqual.sandbox.keeper.client import close_all
from tests.sandbox.edge_process import EdgeProcess

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory of this module's own."""
    root = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RORQUAL_STATE", str(root))
        for name in ("RORQUAL_EDGE", "RORQUAL_EDGE_TOKEN"):
            patch.delenv(name, raising=False)
        try:
            with Sandbox.create(timeout=60) as sandbox:
                sandbox.commands.run("true")
        except SandboxError as error:
            pytest.skip(f"no container on this host: {error}")
        yield root
        left = [info.id for info in Sandbox.list()]
        for sandbox_id in left:
            Sandbox.connect(sandbox_id).kill()
        close_all()
        trajectory.close_all()
    assert not left


@pytest.fixture(scope="module", params=["here", "edge"])
def where(
    request: pytest.FixtureRequest, state: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """What --edge is given."""
    if request.param == "here":
        yield "local"
        return
    edge = EdgeProcess("cli", tmp_path_factory.mktemp("edge"))
    edge.start()
    yield edge.socket
    assert edge.stop() == 0


@pytest.fixture
def run(where: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit code, stdout, stderr) of `rorqual sandbox ...`."""
    monkeypatch.setenv("RORQUAL_EDGE", where)

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code: object = 0
        try:
            main(["sandbox", *arguments])
        except SystemExit as end:
            code = end.code or 0
        return (code if isinstance(code, int) else 1, *capfd.readouterr())

    return call


@pytest.fixture
def made(run: Run) -> Iterator[str]:
    code, out, err = run("create", "--timeout", "300", "--env", "A=1", "--metadata", "job=7")
    assert code == 0, err
    sandbox_id = out.strip()
    assert re.fullmatch(r"sb-(local|cli)-[0-9a-f]{12}", sandbox_id)
    yield sandbox_id
    run("kill", sandbox_id)


def test_a_command_has_its_streams_its_input_and_its_exit_code(run: Run, made: str) -> None:
    assert run("exec", made, "echo $A; echo err >&2; exit 3") == (3, "1\n", "err\n")
    assert run("exec", "--user", "root", "--workdir", "/tmp", made, "id", "-u") == (0, "0\n", "")
    code, out, _ = run("exec", "--json", made, "printf '%s' '-x'; pwd")
    assert code == 0 and json.loads(out)["stdout"] == "-x/home/user\n"
    code, out, err = run("exec", "--timeout", "0.3", made, "echo begun; sleep 60")
    assert (code, out) == (137, "begun\n") and "killed after 0.3 s" in err
    code, _, err = run("exec", made, "no-such-program", "x")
    assert code == 127 and "rorqual: " in err


def test_standard_input_is_fed_as_it_comes(where: str, made: str) -> None:
    argv = [sys.executable, "-m", "rorqual.cli", "sandbox", "exec", "-i", "--edge", where, made, "wc", "-c"]
    done = subprocess.run(argv, input=b"x" * 300_000, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"300000\n"), done.stderr


def test_it_is_listed_with_what_it_is(run: Run, made: str) -> None:
    code, out, _ = run("ps")
    assert code == 0 and re.search(
        rf"{made} +container +base +running +\d+s +\S+ \S+ +512 +offline +job=7", out
    )
    (info,) = [one for one in json.loads(run("ps", "--json")[1]) if one["id"] == made]
    assert info["memory_mb"] == 512 and info["metadata"] == {"job": "7"}


def test_files_and_directories_are_copied_both_ways(run: Run, made: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "a.bin").write_bytes(bytes(range(256)) * 500)
    (tree / "sub" / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "sub" / "run.sh").chmod(0o755)
    (tree / "link").symlink_to("a.bin")
    assert run("cp", str(tree / "a.bin"), f"{made}:alone.bin")[0] == 0
    code, _, err = run("cp", str(tree), f"{made}:/home/user")
    assert code == 0 and "3 files -> /home/user/tree" in err
    assert (
        run("exec", made, "tree/sub/run.sh; cmp alone.bin tree/link && stat -c %U tree/a.bin")[1]
        == "ran\nuser\n"
    )
    assert run("cp", f"{made}:tree", str(tmp_path / "back"))[0] == 0
    back = tmp_path / "back"
    assert (back / "a.bin").read_bytes() == (tree / "a.bin").read_bytes()
    assert (back / "link").readlink() == Path("a.bin") and os.access(back / "sub" / "run.sh", os.X_OK)
    assert (
        run("cp", f"{made}:alone.bin", str(back))[0] == 0 and (back / "alone.bin").stat().st_size == 128_000
    )
    assert run("exec", made, "ls -A /tmp")[1] == ""  # no archive is left
    assert run("cp", f"{made}:no-such", str(back))[0] == 1
    assert run("cp", str(tmp_path / "no-such"), f"{made}:x")[0] == 2
    assert run("cp", "a", "b")[0] == 2
    code, _, err = run("cp", "--max-mb", "1", f"{made}:/usr/bin", str(tmp_path / "bin"))
    assert code != 0 and "max" in err


@pytest.mark.parametrize("name", ["../out", "/abs/out", "link/../../out"])
def test_an_archive_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    import io

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("l")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    with pytest.raises(Exception, match="refused to unpack"):
        _unpack(packed.getvalue(), tmp_path / "place", 1 << 20)
    assert not (tmp_path / "out").exists() and not (tmp_path / "place" / "l").exists()


def test_pause_fork_snapshot_and_kill(run: Run, made: str) -> None:
    run("exec", made, "echo kept > f")
    code, out, err = run("pause", made)
    if code:
        pytest.skip(err)  # no freezer
    assert "paused" in out and "paused" in run("ps")[1]
    assert run("resume", made)[0] == 0 and "paused" not in run("ps")[1]
    children = run("fork", "--count", "2", made)[1].split()
    assert len(children) == 2 and run("exec", children[1], "cat f")[1] == "kept\n"
    code, name, _ = run("snapshot", made)
    assert code == 0 and name.startswith("snap-")
    assert name.strip() in run("images")[1]
    again = run("create", name.strip())[1].strip()
    assert run("exec", again, "cat f")[1] == "kept\n"
    code, out, _ = run("kill", *children, again)
    assert code == 0 and out.count("killed") == 3
    code, _, err = run("kill", again)
    assert code == 1 and "killed" in err
    assert run("images", "--edge", "local", "--remove", name.strip())[0] == 0


def test_the_log_is_shown_and_followed_to_the_end(run: Run, where: str, made: str) -> None:
    run("exec", made, "echo one; exit 4")
    code, out, _ = run("logs", made)
    assert code == 0 and re.search(r"2 +\S+ +command +echo one; exit 4 +exit 4", out)
    argv = [sys.executable, "-m", "rorqual.cli", "sandbox", "logs", "-f", "--edge", where, "--json", made]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        first = [json.loads(following.stdout.readline()) for _ in range(2)]
        assert [one["kind"] for one in first] == ["created", "command"] and first[1]["stdout"] == "one\n"
        run("exec", made, "echo two")
        assert run("kill", made)[0] == 0
        rest = [json.loads(line) for line in following.stdout]
    assert following.returncode == 0 and rest[-1]["kind"] == "ended"
    assert "two" in rest[-2]["stdout"]
    assert "killed" in run("logs", made)[1]  # readable after the end
    assert run("logs", f"{made[:-12]}000000000000")[0] == 1


def test_wrong_use_names_what_is_wrong(run: Run) -> None:
    for arguments, says in (
        (("create", "--env", "novalue"), "NAME=VALUE"),
        (("create", "--mount", "x"), "HOST:INSIDE"),
        (("create", "--option", "nonsense=1"), "none of"),
        (("create", "--option", "pids=x"), "JSON"),
        (("create", "--option", "pids=-1"), "pids"),
        (("create", "no-such-image"), "no image"),
        (("kill",), "--all"),
        (("exec", "../x", "true"), "sandbox id"),
        (("shell", "sb-local-000000000000"), "terminal"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and says in err, (arguments, err)


def test_without_an_edge_the_way_out_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sandbox", "ps", "--edge", "unix:/no/such"])
    assert end.value.code == 1 and "rorqual edge" in capfd.readouterr().err
    for arguments in (["--listen", "127.0.0.1:0"], ["--listen", "nowhere"], ["--name", "local"]):
        with pytest.raises(SystemExit) as end:
            main(["edge", *arguments])
        assert end.value.code == 2


# -- the terminal -------------------------------------------------------------------------------------------


class Terminal:
    """A user in front of a program."""

    def __init__(self, argv: list[str]) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(30, 90)
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        self._theirs = theirs
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait_for(self, pattern: bytes) -> None:
        deadline = time.monotonic() + 30
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.ours], [], [], 0.1)[0]:
                self.seen += os.read(self.ours, 4096)

    def settings(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self._theirs)


def test_a_shell_is_a_real_terminal(where: str, made: str) -> None:
    terminal = Terminal([sys.executable, "-m", "rorqual.cli", "sandbox", "shell", "--edge", where, made])
    try:
        terminal.wait_for(rb"\$ ")
        assert terminal.settings() != terminal.before  # raw: keys go inside, one by one
        terminal.type("stty size; echo be''gun\r")
        terminal.wait_for(rb"30 90\r\nbegun")
        terminal.resize(20, 50)
        os.kill(terminal.process.pid, signal.SIGWINCH)
        terminal.type("sleep 0.3; stty size\r")
        terminal.wait_for(rb"20 50")
        terminal.type("sleep 300\r")
        time.sleep(0.3)
        terminal.type("\x03")  # Ctrl-C is the program's inside, not ours
        terminal.type("echo un''harmed; exit 7\r")
        terminal.wait_for(rb"unharmed")
        assert terminal.process.wait(timeout=30) == 7
        assert terminal.settings() == terminal.before
    finally:
        terminal.close()
