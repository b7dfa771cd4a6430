"""The native CPU library: finds, loads and describes librorqual_cpu.so (native/cpu), over ctypes.

Owns the mirror of native/cpu/rorqual_cpu.h, the choice of instruction level and the thread pool's life. Knows no model:
engine/native_weights.py and native_runner.py fill the structures. A library that is missing or does not load is told
once in the log and by `cpu_status`; torch then does the work.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import weakref
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "LIBRARY",
    "RESOLVE",
    "CompressorPointers",
    "CpuStatus",
    "Forward",
    "LayerCache",
    "LayerPointers",
    "MatrixPointers",
    "ModelPointers",
    "MtpPointers",
    "NativeLibrary",
    "Pool",
    "SegmentPointers",
    "SitePointers",
    "cpu_status",
    "load_library",
]

log = logging.getLogger(__name__)

LIBRARY = Path(__file__).parent / "_bin" / "librorqual_cpu.so"
ABI = 3


@dataclass(frozen=True, slots=True)
class CpuStatus:
    """Whether the native CPU kernels run here, and how."""

    available: bool
    level: str | None
    """The instruction level that runs: `portable`, `avx2`, `avx512` or `avx512_bf16`; None when unavailable."""
    levels: tuple[str, ...]
    """All levels this CPU can run, ascending."""
    reason: str
    """One line for people: what runs, or why the torch path does and what to do about it."""


class MatrixPointers(ctypes.Structure):
    """RqMatrix: a weight in place; a zeroed one is absent."""

    _fields_ = (("data", c_void_p), ("scale", c_void_p), ("type", c_int32), ("block", c_int32))


class SitePointers(ctypes.Structure):
    """RqSite."""

    _fields_ = tuple((name, c_void_p) for name in ("fn", "base", "scale"))


class ModelPointers(ctypes.Structure):
    """RqModel."""

    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "vocab", "heads", "head_dim", "rope_dim")),
        *((name, c_int32) for name in ("q_rank", "groups", "o_rank", "window", "index_heads", "index_dim")),
        *((name, c_int32) for name in ("index_topk", "experts", "per_token", "expert_width")),
        *((name, c_int32) for name in ("shared_width", "streams", "iters")),
        *((name, c_float) for name in ("hc_eps", "norm_eps", "route_scale", "limit")),
        *((name, c_float) for name in ("head_scale", "index_scale")),
        ("reserved", c_int32),
        *((name, c_void_p) for name in ("freqs_window", "freqs_compressed")),
        *((name, MatrixPointers) for name in ("embed", "head")),
        ("mix", SitePointers),
        ("norm", c_void_p),
    )


class CompressorPointers(ctypes.Structure):
    """RqCompressor."""

    _fields_ = (
        *((name, MatrixPointers) for name in ("wkv", "wgate")),
        *((name, c_void_p) for name in ("ape", "norm")),
    )


class LayerPointers(ctypes.Structure):
    """RqLayer."""

    _fields_ = (
        ("ratio", c_int32),
        ("overlap", c_int32),
        ("attn_site", SitePointers),
        *((name, c_void_p) for name in ("attn_norm", "q_norm", "kv_norm", "sink")),
        *((name, MatrixPointers) for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")),
        ("main", CompressorPointers),
        *((name, MatrixPointers) for name in ("index_wq_b", "index_proj")),
        ("index", CompressorPointers),
        ("ffn_site", SitePointers),
        *((name, c_void_p) for name in ("ffn_norm", "bias", "tid2eid")),
        ("gate", MatrixPointers),
        ("experts", c_void_p),
        *((name, MatrixPointers) for name in ("shared1", "shared3", "shared2")),
    )


class LayerCache(ctypes.Structure):
    """RqLayerCache."""

    _fields_ = (
        *(("entries", c_void_p), ("entries_page", c_int64), ("keys", c_void_p), ("keys_page", c_int64)),
        *((name, c_int64) for name in ("window_at", "tail_at", "index_tail_at")),
        *((name, c_int32) for name in ("window_rows", "tail_rows")),
    )


class SegmentPointers(ctypes.Structure):
    """RqSegment."""

    _fields_ = (
        *(("tokens", c_void_p), ("count", c_int64), ("position", c_int64)),
        *(("pages", c_void_p), ("slab", c_void_p)),
        *((name, c_int32) for name in ("logits", "hidden", "frozen", "reserved")),
    )


RESOLVE = ctypes.CFUNCTYPE(
    c_int32, c_void_p, c_int32, ctypes.POINTER(c_int32), c_int32, ctypes.POINTER(MatrixPointers)
)
"""RqResolve."""


class Forward(ctypes.Structure):
    """RqForward."""

    _fields_ = (
        *((name, c_void_p) for name in ("model", "layers", "caches", "segments")),
        *(("segment_count", c_int64), ("pages", c_int64)),
        *((name, c_void_p) for name in ("logits", "hidden", "scratch")),
        ("scratch_bytes", c_int64),
        *(("resolve", RESOLVE), ("context", c_void_p)),
        *((name, c_int32) for name in ("cache_format", "block_tokens", "threads", "level")),
    )


class MtpPointers(ctypes.Structure):
    """RqMtp."""

    _fields_ = (
        *((name, c_void_p) for name in ("layer", "cache", "enorm", "hnorm")),
        *((name, MatrixPointers) for name in ("e_proj", "h_proj")),
        ("mix", SitePointers),
        ("norm", c_void_p),
    )


class NativeLibrary:
    """The loaded library: `levels` it can run here, ascending, and its entry points."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when `path` cannot be loaded or is of another ABI, and for a RORQUAL_CPU_LEVEL it lacks."""
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: no C++ compiler was there when the package was built. "
                "Install g++ and reinstall rorqual"
            )
        library = ctypes.CDLL(os.fspath(path))
        try:
            abi = library.rq_abi()
        except AttributeError as error:
            raise OSError(f"{path} is not the native library of rorqual") from error
        if abi != ABI:
            raise OSError(f"{path} has ABI {abi}, this version of rorqual needs {ABI}: reinstall rorqual")
        library.rq_level_name.restype = ctypes.c_char_p
        library.rq_pool_create.restype = c_void_p
        library.rq_pool_destroy.argtypes = [c_void_p]
        library.rq_pool_destroy.restype = None
        library.rq_forward_scratch.argtypes = [ctypes.POINTER(Forward), c_int64, c_int64]
        library.rq_forward_scratch.restype = c_int64
        library.rq_forward.argtypes = [ctypes.POINTER(Forward), c_void_p]
        library.rq_forward.restype = c_int64
        library.rq_mtp.argtypes = [ctypes.POINTER(Forward), ctypes.POINTER(MtpPointers), c_void_p, c_void_p]
        library.rq_mtp.restype = c_int64
        self._library = library
        self.levels: dict[str, int] = {
            library.rq_level_name(level).decode(): level
            for level in range(library.rq_level_count())
            if library.rq_level_runs(level)
        }
        forced = os.environ.get("RORQUAL_CPU_LEVEL")
        if forced and forced not in self.levels:
            raise OSError(f"RORQUAL_CPU_LEVEL={forced}: this CPU runs {', '.join(self.levels)}")
        self.level: str = forced or next(reversed(self.levels))
        """The level that runs where the caller names none."""

    def forward_scratch(self, call: Forward, *, tokens: int, positions: int) -> int:
        """Bytes of working memory for a call of `tokens` tokens, all at positions below `positions`.

        Raises ValueError for a model whose numbers do not fit together, or a level that does not run here.
        """
        need = int(self._library.rq_forward_scratch(call, tokens, positions))
        if need < 0:
            raise ValueError("the native forward refuses these model dimensions (native/cpu/check.cpp)")
        return need

    def forward(self, call: Forward, pool: Pool | None) -> int:
        """Runs one call; 0, -1 - segment for one out of range (then nothing has changed), or what resolve gave."""
        return int(self._library.rq_forward(call, None if pool is None else pool.handle))

    def mtp(self, call: Forward, mtp: MtpPointers, *, streams: int, pool: Pool | None) -> int:
        """As `forward`, through the MTP head; `streams` is the address of fp32 [tokens, streams, hidden]."""
        return int(self._library.rq_mtp(call, mtp, streams, None if pool is None else pool.handle))


class Pool:
    """Threads that sleep between steps; ended when the object goes. Not for use after a fork (`pid`)."""

    def __init__(self, library: NativeLibrary, threads: int) -> None:
        """Raises OSError when the threads cannot be made."""
        native = library._library
        self.handle, self.threads, self.pid = native.rq_pool_create(threads), threads, os.getpid()
        if not self.handle:
            raise OSError(f"cannot make {threads - 1} threads for the native CPU kernels")
        self._close = weakref.finalize(self, _destroy, native, self.handle, self.pid)


def _destroy(native: ctypes.CDLL, handle: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has the memory and not the threads
        native.rq_pool_destroy(handle)


@functools.lru_cache(maxsize=4)
def _load(path: Path) -> NativeLibrary | OSError:
    try:
        return NativeLibrary(path)
    except OSError as error:
        log.warning(
            "native CPU kernels are not available, decoding uses the slower torch path: %s",
            error,
            extra={"library": str(path)},
        )
        return error


def load_library(path: Path = LIBRARY) -> NativeLibrary | None:
    """The library, or None when it cannot be used; the reason is logged once and is in `cpu_status`."""
    loaded = _load(path)
    return loaded if isinstance(loaded, NativeLibrary) else None


def cpu_status(path: Path = LIBRARY) -> CpuStatus:
    """Which native CPU kernels run here, or why none do."""
    loaded = _load(path)
    if isinstance(loaded, OSError):
        return CpuStatus(False, None, (), f"torch path: {loaded}")
    levels = tuple(loaded.levels)
    return CpuStatus(True, loaded.level, levels, f"native CPU kernels, {loaded.level}")
