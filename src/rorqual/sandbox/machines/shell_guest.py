"""A guest without our agent: the agent's interface, by a POSIX shell alone.

Whoever can run a short script as root in the guest and get its output (qga.py through qemu-guest-agent, console.py
through a serial line) gets commands and files from here. A command is a directory in the guest:

    <base>/<id>/run          what runs, in a session of its own
    <base>/<id>/out, err     its output, at most max_output bytes each; om, em: how many bytes came after
    <base>/<id>/pid, rc      its process group; its exit code, once it has ended
    <base>/<id>/meta         one JSON line: argv, tag, when it was started (host's clock)

so a command outlives its client, and another client finds it. Output is fetched by asking again and again; a deadline
is kept by the host. No terminal: that needs the agent. The guest is not trusted: every answer is bounded and checked.
Needs inside: sh, setsid, stat, readlink, mkfifo, base64 and md5sum (coreutils or busybox).
"""

from __future__ import annotations

import abc
import asyncio
import errno
import json
import os
import posixpath
import re
import secrets
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from shlex import quote
from typing import Any, Literal, NoReturn, TypeAlias

from rorqual.sandbox._guest import (
    MAX_ENTRIES,
    MAX_OUTPUT,
    MAX_READ,
    FileInfo,
    GuestClient,
    GuestExit,
    GuestInfo,
    GuestProcess,
    GuestProcessInfo,
    PtySize,
    StreamName,
)
from rorqual.sandbox.errors import GuestFileError, GuestProtocolError, GuestRefused, Unsupported

_KEPT_MINUTES = 30
"""A command that ended earlier is forgotten."""
_FAILED = 81
"""Exit code of a file script whose output is the reason."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ERRNOS = {os.strerror(number).lower(): number for number in (
    errno.ENOENT, errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EROFS, errno.ENOSPC,
    errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV, errno.EBUSY, errno.EINVAL, errno.EFBIG,
    errno.ETXTBSY, errno.EDQUOT,
)} | {"no such file": errno.ENOENT, "directory nonexistent": errno.ENOENT}  # fmt: skip
"""What programs say -> errno; the last two are dash's words."""
_STREAMS: tuple[StreamName, StreamName] = ("stdout", "stderr")
_FIRST_POLL_S, _LAST_POLL_S = 0.02, 0.5
_NO_PTY = "it needs our guest agent in the machine, which is not reached"

_Processes: TypeAlias = list[GuestProcessInfo]  # inside ShellGuest, `list` is the method
_Jobs: TypeAlias = list[tuple[str, GuestProcessInfo]]
_Files: TypeAlias = list[FileInfo]


class ShellGuest(GuestClient, abc.ABC):
    """See the module. What is not overridden here (refreshing identity, forwarding ports) is Unsupported."""

    channel = ""
    """How the guest is reached, in words."""
    chunk = 1 << 20
    """Bytes that one script may be given or may answer."""

    def __init__(self) -> None:
        super().__init__()
        self._base = ""
        self._started = 0

    @abc.abstractmethod
    async def script(self, text: str, *, feed: bytes = b"", limit: int = 65536) -> tuple[int, bytes]:
        """Runs it with /bin/sh as the channel's user; (exit code, stdout). feed: its standard input.

        Raises:
            GuestGone: no answer. GuestProtocolError: more than `limit` bytes, or nonsense.
        """

    async def prepare(self) -> None:
        """Finds a place for the commands' directories. Call once, first."""
        code, out = await self.script(
            "umask 077; for d in /run /tmp; do b=$d/.rorqual-$(id -u); "
            'mkdir -p -m 700 "$b" 2>/dev/null && [ -O "$b" ] && [ ! -L "$b" ] && { echo "$b"; exit 0; }; done; exit 1'
        )
        base = out.decode("ascii", "replace").strip()
        if code or not re.fullmatch(r"/(run|tmp)/\.rorqual-[0-9]{1,10}", base):
            raise Unsupported(
                "commands",
                reason=f"the guest reached by {self.channel} has no POSIX shell with a place to write ({base[:80]!r})",
                available=["screen", "keyboard"],
            )
        self._base = base
        self.info = GuestInfo(protocol=0, agent=self.channel, pid=0, boot_id="")

    # --- commands ---

    async def start(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
        stdin: bool = False,
        pty: PtySize | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - a deadline, kept by ShellProcess
        max_output: int = MAX_OUTPUT,
        tag: str = "",
    ) -> GuestProcess:
        if pty is not None:
            self._refuse("pty")
        if timeout is not None and not 0 < timeout < 4e9:
            raise ValueError(f"timeout is {timeout} s; give a positive number, or None for no limit")
        await self._open()
        name = secrets.token_hex(6)
        meta = {"argv": [part[:256] for part in argv][:16], "tag": tag, "started": time.time()}
        run = self._run_file(argv, cwd=cwd, env=env or {}, user=user)
        if len(run) > self.chunk // 2 or len(run) > 256 << 10:
            raise GuestRefused(f"start: arguments and variables of {len(run)} bytes", errno=errno.E2BIG)
        self._started += 1
        text = _START.format(
            base=self._base,
            name=name,
            most=max_output,
            meta=quote(json.dumps(meta)),
            stdin="<i" if stdin else "</dev/null",
            holder="sleep 2147483647 >i & echo $! >ih;" if stdin else "",
            sweep=_SWEEP.format(base=self._base, minutes=_KEPT_MINUTES) if self._started % 32 == 1 else "",
        )
        code, out = await self.script(text, feed=run)
        pid = out.strip()
        if code or not re.fullmatch(rb"[1-9][0-9]{0,9}", pid):
            raise GuestRefused(f"start: {self.channel}: {out[:200]!r} (exit {code})", errno=errno.EIO)
        return ShellProcess(self, name, int(pid), max_output, timeout)

    async def attach(self, pid: int, *, max_output: int = MAX_OUTPUT) -> GuestProcess:
        for name, info in await self._jobs():
            if info.pid == pid:
                return ShellProcess(self, name, pid, max_output, None)
        raise GuestRefused(f"attach: no command {pid}", errno=errno.ESRCH)

    async def list(self) -> _Processes:
        return [info for _, info in await self._jobs()]

    async def _jobs(self) -> _Jobs:
        await self._open()
        _, out = await self.script(_LIST.format(base=self._base), limit=self.chunk)
        found = []
        for line in out.splitlines()[:4096]:
            try:
                name, pid, code, rest = line.decode("utf-8", "replace").split(" ", 3)
                meta = json.loads(rest)
                info = GuestProcessInfo(
                    pid=int(pid),
                    argv=tuple(str(part)[:256] for part in meta["argv"][:16]),
                    tag=str(meta["tag"])[:256],
                    running=code == "-",
                    pty=False,
                    started=max(0.0, time.time() - float(meta["started"])),
                    exit_code=None if code == "-" else _code(code),
                )
            except (ValueError, KeyError, TypeError):
                continue  # a command's directory that is being made or removed
            if re.fullmatch(r"[0-9a-f]{12}", name) and 0 < info.pid < 2**31:
                found.append((name, info))
        return sorted(found, key=lambda item: -item[1].started)

    async def kill(self, pid: int, *, signal: int = 9) -> bool:
        if not 1 <= signal <= 64 or not 1 <= pid < 2**31:
            raise ValueError(f"pid {pid}, signal {signal}: not a process id and a number from 1 to 64")
        await self._open()
        code, _ = await self.script(_KILL.format(base=self._base, pid=pid, signal=signal))
        return code == 0

    def _run_file(
        self, argv: Sequence[str], *, cwd: str | None, env: Mapping[str, str], user: str | int | None
    ) -> bytes:
        if not argv or any("\0" in part for part in argv):
            raise ValueError("argv: an empty list, or a NUL byte in it")
        who = "" if user in (None, "", "root", 0) else str(user)
        lines = [f"export PATH={_PATH}"]
        lines += [f"export {name}={quote(value)}" for name, value in env.items()]
        words = " ".join(quote(part) for part in argv)
        if who:
            lines.append(
                f"[ \"$(id -u)\" = 0 ] || {{ echo 'this channel is not root: cannot become {who}' >&2; exit 126; }}"
            )
            lines.append(
                f"id {quote(who)} >/dev/null 2>&1 || {{ echo 'no such user: {who}' >&2; exit 126; }}"
            )
        place = quote(cwd) if cwd else '"$HOME"'
        lines.append(f"cd {place} 2>/dev/null || {{ echo cannot enter {place} >&2; exit 126; }}")
        if who:
            by = f'exec setpriv --reuid={quote(who)} --regid="$(id -g {quote(who)})" --init-groups'
            lines.append(f"command -v setpriv >/dev/null 2>&1 && {by} {words}")
            inner = quote(f"exec {words}")
            lines.append(f"exec su -p -s /bin/sh {quote(who)} -c {inner}")
        else:
            lines.append(f"exec {words}")
        return "\n".join(lines).encode("utf-8", "surrogateescape") + b"\n"

    # --- files ---

    async def read_file(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        if offset < 0 or (limit is not None and limit < 0):
            raise ValueError(f"offset {offset}, limit {limit}: neither may be negative")
        most = MAX_READ + 1 if limit is None else limit
        data = bytearray()
        while len(data) < most or most == 0:
            size = min(self.chunk, most - len(data))
            part = await self._file_script(
                "read",
                path,
                f'{_THERE}[ -d "$p" ] && fail "Is a directory"; [ -f "$p" ] || fail "Invalid argument"; '
                f'[ -r "$p" ] || fail "Permission denied"; tail -c +{offset + len(data) + 1} "$p" | head -c {size}',
                limit=size,
            )
            data += part
            if len(part) < size or most == 0:
                break
        if limit is None and len(data) > MAX_READ:
            raise GuestFileError(errno.EFBIG, path, call="read without limit")
        return bytes(data)

    async def write_file(
        self,
        path: str,
        data: bytes,
        *,
        mode: int | None = None,
        append: bool = False,
        make_parents: bool = True,
        user: str | int | None = None,
    ) -> None:
        if mode is not None and not 0 <= mode <= 0o7777:
            raise ValueError(f"mode {mode:#o} is not permission bits (0 to 0o7777)")
        who = quote(str(user)) if user not in (None, "") else ""
        temporary = quote(f".rorqual-{secrets.token_hex(6)}")
        head = (
            'umask 022; [ -d "$p" ] && fail "Is a directory"; '
            '[ -L "$p" ] && { t=$(readlink -f "$p") || fail "No such file or directory"; p=$t; }; d=$(dirname "$p"); '
        )
        head += f"id {who} >/dev/null 2>&1 || fail 'no such user'; " if who else ""
        parents = 'm=$(mkdir -p "$d" 2>&1) || fail "$m"; ' if make_parents else ""
        own = f'[ -n "$new" ] && {{ chown {who}: "$f" || fail "Operation not permitted"; }}; ' if who else ""
        bits = f'chmod {mode:o} "$f" || fail "Operation not permitted"; ' if mode is not None else ""
        if parents and who:  # directories made on the way belong to the user, too
            parents = (
                'q=$d; n=; while [ ! -d "$q" ]; do n=$q; q=$(dirname "$q"); done; '
                + parents
                + f'[ -n "$n" ] && chown -R {who}: "$n"; '
            )
        pieces = [data[at : at + self.chunk] for at in range(0, len(data), self.chunk)] or [b""]
        for number, piece in enumerate(pieces):
            first, last = number == 0, number == len(pieces) - 1
            if append:
                text = head + (parents if first else "") + 'new=; [ -e "$p" ] || new=1; f=$p; '
                text += 'm=$({ cat >>"$p"; } 2>&1) || fail "$m"; ' + (own + bits if first else "")
            else:
                text = head + (parents if first else "") + f"f=$d/{temporary}; "
                text += '[ -e "$f" ] && fail "File exists"; ' if first else ""
                text += 'm=$({ cat >>"$f"; } 2>&1) || { rm -f "$f"; fail "$m"; }; '
                if last:
                    text += 'new=1; if [ -e "$p" ]; then new=; chown --reference="$p" "$f" 2>/dev/null || '
                    text += 'chown "$(stat -c %u:%g "$p")" "$f"; chmod "$(stat -c %a "$p")" "$f"; '
                    text += 'else chmod 644 "$f"; fi; ' + own + bits
                    text += 'm=$(mv -f "$f" "$p" 2>&1) || { rm -f "$f"; fail "$m"; }; '
            await self._file_script("write", path, text + ":", feed=piece)

    async def stat(self, path: str) -> FileInfo:
        out = await self._file_script("stat", path, _STAT_ONE)
        line, _, rest = out.partition(b"\n")
        return _stat(line, path, posixpath.basename(path.rstrip("/")) or "/", rest)

    async def list_dir(self, path: str) -> _Files:
        out = await self._file_script("list", path, _LIST_DIR.format(most=MAX_ENTRIES), limit=64 << 20)
        head, _, rest = out.partition(b"\n")
        try:
            count = int(head)
            lines = rest.split(b"\n", count)
            tail = lines.pop().split(b"\0")
            names, targets = tail[:count], iter(tail[count:])
            if not 0 <= count <= MAX_ENTRIES or len(lines) != count or len(names) != count:
                raise ValueError
            found = []
            for line, raw in zip(lines, names, strict=True):
                name = os.fsdecode(raw)
                if not name or "/" in name:
                    raise ValueError
                link = stat.S_ISLNK(int(line.split(b" ")[0], 16))
                found.append(
                    _stat(line, posixpath.join(path, name), name, next(targets, b"") if link else b"")
                )
        except (ValueError, IndexError) as error:
            raise GuestProtocolError(f"{self.channel}: the listing of {path} does not add up") from error
        return sorted(found, key=lambda info: info.name)

    async def make_dir(self, path: str, *, parents: bool = True, user: str | int | None = None) -> bool:
        own = f'chown {quote(str(user))}: "$p" || fail "Operation not permitted"; ' if user else ""
        text = f'm=$(mkdir "$p" 2>&1) || fail "$m"; {own}echo 1'
        if parents:
            text = f'[ -d "$p" ] && {{ echo 0; exit 0; }}; m=$(mkdir -p "$p" 2>&1) || fail "$m"; {own}echo 1'
        return (await self._file_script("mkdir", path, text)).strip() == b"1"

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        tree = 'm=$(rm -rf "$p" 2>&1)' if recursive else 'm=$(rmdir "$p" 2>&1)'
        text = (
            _THERE
            + f'if [ -d "$p" ] && [ ! -L "$p" ]; then {tree}; else m=$(rm -f "$p" 2>&1); fi || fail "$m"'
        )
        await self._file_script("remove", path, text)

    async def rename(self, src: str, dst: str) -> None:
        text = _THERE + f'm=$(mv -fT "$p" {quote(dst)} 2>&1) || fail "$m"'
        await self._file_script("rename", src, text)

    async def _file_script(
        self, call: str, path: str, text: str, *, feed: bytes = b"", limit: int = 65536
    ) -> bytes:
        if not path.startswith("/") or "\0" in path:
            raise GuestFileError(errno.EINVAL, path, call=call)
        await self._open()
        head = f'export LC_ALL=C; fail() {{ printf "%s" "$*"; exit {_FAILED}; }}; p={quote(path)}; '
        code, out = await self.script(head + text, feed=feed, limit=limit + 4096)
        if code == 0 and len(out) <= limit:
            return out
        words = out[:4096].decode("utf-8", "replace").strip()
        if words == "no such user":
            raise GuestRefused(f"{call}: {words}", errno=errno.EUSERS)
        number = next((value for text, value in _ERRNOS.items() if text in words.lower()), errno.EIO)
        raise GuestFileError(number, path, call=call)

    # --- what is not there ---

    async def _open(self) -> None:
        if self._error is not None:
            raise self._error
        if self.gate is not None:
            await self.gate()

    async def _call(
        self, kind: Any, *parts: bytes, read: Callable[..., Any], deadline: float | None = 60.0
    ) -> Any:
        self._refuse(kind.name.lower())

    def _expect(self, kind: Any, read: Callable[..., Any], *, ident: int = 0) -> NoReturn:
        self._refuse(kind.name.lower())

    def _refuse(self, what: str) -> NoReturn:
        raise Unsupported(
            what, reason=f"{_NO_PTY} ({self.channel})", available=["commands", "files", "screen"]
        )


class ShellProcess(GuestProcess):
    """A command of a ShellGuest: fetches output when somebody asks for it."""

    def __init__(self, client: ShellGuest, name: str, pid: int, limit: int, timeout_s: float | None) -> None:
        super().__init__(client, 0, limit, strict=False)
        self.pid = pid
        self._guest = client
        self._name = name
        self._timeout = timeout_s
        self._began = time.monotonic()
        self._pause = _FIRST_POLL_S
        self._at = [0, 0]
        self._timed_out = False
        self._step_lock = asyncio.Lock()

    def events(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        return self._pull()

    async def _pull(self) -> AsyncIterator[tuple[StreamName, bytes]]:
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._exit is not None or self._detached:
                return
            await self._step()

    async def wait(self) -> GuestExit:
        while self._exit is None:
            if self._detached:
                raise GuestRefused("detached from this command: attach again", errno=errno.ESTALE)
            await self._step()
        return self._exit

    async def _step(self) -> None:
        """Fetches what is new; waits a little when nothing is."""
        async with self._step_lock:
            if self._exit is not None:
                return
            late = self._timeout is not None and time.monotonic() - self._began > self._timeout
            if late and not self._timed_out:
                self._timed_out = True
                await self._guest.kill(self.pid)
            if await self._fetch():
                self._pause = _FIRST_POLL_S
            elif self._exit is None:
                pause = self._pause
                if self._timeout is not None and not self._timed_out:
                    pause = min(pause, max(0.01, self._began + self._timeout - time.monotonic()))
                self._pause = min(self._pause * 1.5, _LAST_POLL_S)
                await asyncio.sleep(pause)

    async def _fetch(self) -> bool:
        await self._guest._open()
        room = max(1024, self._guest.chunk // 2 - 256)
        text = _POLL.format(
            base=self._guest._base, name=self._name, out=self._at[0], err=self._at[1], room=room
        )
        code, answer = await self._guest.script(text, limit=2 * room + 256)
        head, _, body = answer.partition(b"\n")
        try:
            if code:
                raise ValueError
            rc, more_out, more_err, kept_out, kept_err = head.decode("ascii").split(" ")
            sizes = [int(kept_out), int(kept_err)]
            fresh = [min(max(0, size - at), room) for size, at in zip(sizes, self._at, strict=True)]
            if len(body) != sum(fresh):
                raise ValueError
        except ValueError as error:
            if code == 91:
                raise GuestRefused(f"command {self.pid} was forgotten", errno=errno.ESRCH) from error
            raise GuestProtocolError(
                f"{self._guest.channel}: the state of command {self.pid} makes no sense: {head[:80]!r}"
            ) from error
        for stream, part in enumerate((body[: fresh[0]], body[fresh[0] :])):
            self._at[stream] += len(part)
            kept = part[: max(0, self._limit - self._got[stream])]
            self._got[stream] += len(kept)
            if kept:
                self._chunks.append((_STREAMS[stream], kept))
        # Its descendants may hold the pipes open for ever: the end of the command itself is the end.
        if rc != "-" and self._at == sizes:
            self._finish(_code(rc), _count(more_out), _count(more_err))
        return bool(body)

    def _finish(self, code: int, more_out: int, more_err: int) -> None:
        self._exit = GuestExit(
            exit_code=code,
            signal=code - 128 if code > 128 else 0,
            timed_out=self._timed_out,
            truncated=more_out + more_err > 0 or self._got != self._at,
            stdout_bytes=self._at[0] + more_out,
            stderr_bytes=self._at[1] + more_err,
            duration=time.monotonic() - self._began,
            error="",
        )

    async def send_stdin(self, data: bytes) -> None:
        async with self._stdin:
            for at in range(0, len(data), self._guest.chunk // 2):
                piece = data[at : at + self._guest.chunk // 2]
                text = _FEED.format(base=self._guest._base, name=self._name)
                await self._guest._open()
                code, _ = await self._guest.script(text, feed=piece)
                pause = 0.01
                while code == 0:  # until the command has read it
                    code, _ = await self._guest.script(_FED.format(base=self._guest._base, name=self._name))
                    if code == 0:
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, 0.5)
                if code != 1:
                    raise GuestRefused(f"command {self.pid} reads no more", errno=errno.EPIPE)

    async def close_stdin(self) -> None:
        async with self._stdin:
            await self._guest._open()
            text = (
                'cd {base}/{name} 2>/dev/null && [ -f ih ] && kill "$(cat ih)" 2>/dev/null; rm -f ih; exit 0'
            )
            await self._guest.script(text.format(base=self._guest._base, name=self._name))

    async def resize(self, size: PtySize) -> None:
        self._guest._refuse("pty.resize")

    async def detach(self) -> None:
        self._detached = True


def _code(text: str) -> int:
    return int(text) % 256 if re.fullmatch(r"[0-9]{1,5}", text) else 255


def _count(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 0


def _stat(line: bytes, path: str, name: str, target: bytes) -> FileInfo:
    try:
        mode_text, size, uid, gid, mtime = line.decode("ascii").split(" ")
        mode = int(mode_text, 16)
        other: Literal["dir", "other"] = "dir" if stat.S_ISDIR(mode) else "other"
        kind: Literal["file", "dir", "symlink", "other"] = (
            "symlink" if stat.S_ISLNK(mode) else "file" if stat.S_ISREG(mode) else other
        )
        return FileInfo(
            path=path,
            name=name,
            type=kind,
            size=int(size),
            mode=mode & 0o7777,
            uid=int(uid),
            gid=int(gid),
            mtime=float(mtime),
            target=os.fsdecode(target) if kind == "symlink" else None,
        )
    except ValueError as error:
        raise GuestProtocolError(f"the guest's stat of {path} makes no sense: {line[:80]!r}") from error


# The reader of each stream keeps `most` bytes, counts the rest, and never holds the command back. `run` is started in
# the background of a shell without job control, so that it is no group leader, setsid does not fork, and $! is its
# process group. head keeps what it reads in a buffer of its own unless stdbuf tells it otherwise: without
# stdbuf (busybox), output comes late, in pieces of 4 KiB.
_START = """umask 077; {sweep}
mkdir {base}/{name} && cd {base}/{name} || exit 90
cat >run; printf '%s\\n' {meta} >meta; mkfifo o e i; : >out; : >err
cat >job <<'JOB'
exec 2>/dev/null
h=head; command -v stdbuf >/dev/null && h='stdbuf -o0 head'
( $h -c {most} >out; wc -c >om.t; mv om.t om ) <o &
a=$!
( $h -c {most} >err; wc -c >em.t; mv em.t em ) <e &
b=$!
{holder}
setsid sh ./run {stdin} >o 2>e &
p=$!
echo $p >pid.t; mv pid.t pid
wait $p; c=$?
[ -f ih ] && kill "$(cat ih)"
n=0; while [ $n -lt 20 ] && {{ [ ! -f om ] || [ ! -f em ]; }}; do sleep 0.05 || sleep 1; n=$((n+1)); done
echo $c >rc.t; mv rc.t rc
JOB
setsid sh ./job </dev/null >/dev/null 2>&1 &
n=0; while [ ! -f pid ]; do [ $n -gt 200 ] && exit 92; sleep 0.02 || sleep 1; n=$((n+1)); done
cat pid
"""
_SWEEP = (
    "find {base} -mindepth 2 -maxdepth 2 -name rc -mmin +{minutes} 2>/dev/null | "
    'while read -r f; do rm -rf "$(dirname "$f")"; done;'
)
_POLL = """cd {base}/{name} 2>/dev/null || exit 91
r=-; [ -f rc ] && r=$(cat rc); x=0; [ -f om ] && x=$(cat om); y=0; [ -f em ] && y=$(cat em)
n=$(wc -c <out); m=$(wc -c <err); echo $r $x $y $n $m
n=$((n-{out})); [ $n -gt {room} ] && n={room}; [ $n -gt 0 ] && {{ tail -c +$(({out}+1)) out | head -c $n; }}
m=$((m-{err})); [ $m -gt {room} ] && m={room}; [ $m -gt 0 ] && {{ tail -c +$(({err}+1)) err | head -c $m; }}
exit 0
"""
_LIST = """cd {base} || exit 1
for d in *; do [ -f "$d/pid" ] || continue; r=-; [ -f "$d/rc" ] && r=$(cat "$d/rc")
echo "$d $(cat "$d/pid") $r $(cat "$d/meta")"; done
"""
_KILL = """cd {base} || exit 1
for d in *; do [ "$(cat "$d/pid" 2>/dev/null)" = {pid} ] || continue; [ -f "$d/rc" ] && exit 1
kill -{signal} -{pid} 2>/dev/null; exit $?; done; exit 1
"""
_FEED = """cd {base}/{name} 2>/dev/null && [ ! -f rc ] && [ -f ih ] || exit 2
cat >in.d; ( cat in.d >i; rm -f in.d ) </dev/null >/dev/null 2>&1 & exit 0
"""
_FED = """cd {base}/{name} 2>/dev/null || exit 2
[ -f in.d ] || exit 1; [ -f rc ] && exit 2; exit 0
"""
_STAT_ONE = (
    'm=$(stat -c "%f %s %u %g %Y" "$p" 2>&1) || fail "$m"; echo "$m"; [ -L "$p" ] && readlink -n "$p"; exit 0'
)
_THERE = '[ -e "$p" ] || [ -L "$p" ] || fail "No such file or directory"; '
_LIST_DIR = """[ -e "$p" ] || fail "No such file or directory"; [ -d "$p" ] || fail "Not a directory"
cd "$p" 2>/dev/null || fail "Permission denied"
set --; for f in .[!.]* ..?* *; do [ -e "$f" ] || [ -L "$f" ] && set -- "$@" "$f"; done
[ $# -gt {most} ] && fail "File too large"; echo $#; [ $# = 0 ] && exit 0
stat -c "%f %s %u %g %Y" -- "$@" || fail "No such file or directory"; printf '%s\\0' "$@"
for f; do [ -L "$f" ] && {{ readlink -n -- "$f"; printf '\\0'; }}; done; exit 0
"""
