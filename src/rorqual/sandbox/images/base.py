"""The `base` image: the host's own system directories, read-only, under a small clean root. No download.

/usr is the host's, as an overlay's lower layer; /etc is made anew from a list of harmless files; /usr/local
is empty, so that what somebody installed on this host by hand is not part of the image (unless Python lives
there). Nothing of /root, /home, /tmp, /var, /opt, /srv or /etc/shadow is ever seen. Owns the skeleton
directory in the state directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.sandbox.errors import HostUnfit

VERSION = 2
"""Part of the skeleton's name: a change of its content makes a new one."""
USER_ID = 1000
_EMPTY = (
    "dev",
    "etc",
    "home",
    "mnt",
    "opt",
    "proc",
    "run",
    "srv",
    "sys",
    "tmp",
    "usr",
    "var",
    ".rorqual",
    "root",
)
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC_FILES = (
    "alternatives",
    "bash.bashrc",
    "ca-certificates.conf",
    "debian_version",
    "environment",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "magic",
    "mime.types",
    "networks",
    "os-release",
    "profile",
    "protocols",
    "python3",
    "python3.11",
    "python3.12",
    "python3.13",
    "services",
    "shells",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "timezone",
)
_PASSWD = f"""root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
user:x:{USER_ID}:{USER_ID}:user:/home/user:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP = f"root:x:0:\ndaemon:x:1:\ntty:x:5:\nuser:x:{USER_ID}:\nnogroup:x:65534:\n"
HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 sandbox\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class RootFs:
    """What a sandbox's root is made of."""

    overlays: tuple[tuple[str, tuple[str, ...]], ...]
    """(target inside, lowers, top layer first). A lower is a host directory or a layer (images/layers.py)."""
    binds: tuple[tuple[str, str], ...] = ()
    """(host path, path inside), read-only, ids unshifted."""
    envs: Mapping[str, str] = field(default_factory=dict)
    """Variables the image sets; the request's own come after them."""
    notes: tuple[str, ...] = field(default=())
    """What `info()` and `doctor` say about it."""
    plain: Mapping[str, int] = field(default_factory=dict)
    """Per target: how many of its directories, from the top, are snapshots' layers, whose owners are host ids."""
    id_base: int | None = None
    """The first host id of the sandboxes those layers came from; None where they had none of their own."""
    leases: tuple[str, ...] = ()
    """Lease files of those layers (keeper/leases.py)."""


def python_home(environ_prefix: str = sys.base_prefix) -> tuple[str, str]:
    """Where Python 3 comes from: ('usr', path), ('local', path), ('bind', prefix) or ('none', '')."""
    for candidate in ("/usr/bin/python3", "/usr/local/bin/python3"):
        real = os.path.realpath(candidate)
        if os.access(real, os.X_OK) and real.startswith("/usr/"):
            return ("local" if real.startswith("/usr/local/") else "usr"), real
    if os.access(f"{environ_prefix}/bin/python3", os.X_OK) and environ_prefix not in ("/usr", "/usr/local"):
        return "bind", environ_prefix
    return "none", ""


def _copy(source: Path, target: Path) -> None:
    """Copies a file, link or tree; what only root may read stays out."""
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir(mode=0o755, exist_ok=True)
        for entry in source.iterdir():
            with contextlib.suppress(OSError):
                _copy(entry, target / entry.name)
    elif source.is_file() and source.stat().st_mode & 0o004:
        shutil.copyfile(source, target)
        target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)


def _fingerprint() -> str:
    parts = [str(VERSION), *python_home()]
    for name in (*_ETC_FILES, *(f"/{merged}" for merged in _MERGED)):
        path = Path("/etc") / name
        with contextlib.suppress(OSError):
            stat = path.lstat()
            parts.append(f"{path}:{stat.st_mtime_ns}:{stat.st_size}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _build(place: Path) -> None:
    root = place / "root"
    for name in _EMPTY:
        (root / name).mkdir(parents=True, mode=0o755)
    for name in _MERGED:
        source = Path("/") / name
        if source.is_symlink():
            (root / name).symlink_to(os.readlink(source))
        elif source.is_dir():
            (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    for name in ("lib", "cache", "log", "tmp", "opt"):
        (root / "var" / name).mkdir(parents=True)
    (root / "var/tmp").chmod(0o1777)
    (root / "var/run").symlink_to("/run")
    etc = root / "etc"
    (etc / "ssl").mkdir()
    for name in _ETC_FILES:
        source = Path("/etc") / name
        if source.is_symlink() or source.exists():
            _copy(source, etc / name)
    for name, text in (
        ("passwd", _PASSWD),
        ("group", _GROUP),
        ("hosts", HOSTS),
        ("hostname", "sandbox\n"),
        ("resolv.conf", ""),
        ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    ):
        (etc / name).write_text(text)
    (place / "local").mkdir()
    for name in ("bin", "lib", "sbin", "share", "include", "etc", "src"):
        (place / "local" / name).mkdir()
    kind, path = python_home()
    if kind == "bind":
        (root / "root").chmod(0o755)  # the prefix may lie under it
        for name in ("python3", "python"):
            (place / "local" / "bin" / name).symlink_to(f"{path}/bin/python3")
    else:
        (root / "root").chmod(0o700)


def base_image(images: Path) -> RootFs:
    """The base image, its skeleton built when missing or when the host's /etc has changed.

    Raises:
        HostUnfit: the skeleton cannot be written.
    """
    place = images / f".base-{_fingerprint()}"
    if not place.is_dir():
        try:
            temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=images))
            temporary.chmod(0o755)
            _build(temporary)
            try:
                os.rename(temporary, place)
            except OSError:  # another client was faster
                shutil.rmtree(temporary)
        except OSError as error:
            raise HostUnfit(f"cannot build the base image in {images}: {error}.") from error
    kind, path = python_home()
    overlays: list[tuple[str, tuple[str, ...]]] = [("/", (str(place / "root"),)), ("/usr", ("/usr",))]
    for name in _MERGED:  # a host without merged /usr
        if (Path("/") / name).is_dir() and not (Path("/") / name).is_symlink():
            overlays.append((f"/{name}", (f"/{name}",)))
    notes = []
    if kind != "local":
        overlays.append(("/usr/local", (str(place / "local"),)))
    else:
        notes.append("base shows the host's /usr/local, since Python lives there")
    binds: tuple[tuple[str, str], ...] = ()
    if kind == "bind":
        binds = ((path, path),)
        notes.append(f"base has no Python in /usr; {path} is shown read-only")
    elif kind == "none":
        notes.append("base has no python3: apt-get install python3")
    return RootFs(overlays=tuple(overlays), binds=binds, notes=tuple(notes))
