"""What does attention of one layer cost at 2^20 tokens on two threads, and what share of this machine's bound is that?

Layers: V4 Pro's CSA (index 262,144 FP4 keys with 64 heads x 128, best 1024, core of 128 heads x 512 over 128 + 1024
rows of 584 bytes) and HCA (8192 + 128 rows). Peers, on the same tiles (attention_peers.cpp): V3.2's sparse MLA layer
(2^20 FP8 keys of 132 bytes, best 2048, rows of 656 bytes) and a GQA layer in bf16 (64 heads of 128, 8 KV heads; its
4.29 GB are read from a quarter of that, four times, to leave memory to others; no cache holds that quarter).

Bound, printed beside: the larger of FLOP / (2 x one core's vdpbf16ps rate) and bytes / (2 x one core's read rate), both
measured in this run. V4's index multiplies integers of 8 bits, at twice the bf16 rate, so it may pass 100%.
Time: each thread's own CPU time, the slower thread's counted, best of the repeats; wall time beside. On a busy machine
only the CPU times mean something. Layers take turns. Random data of the true formats and sizes. Needs avx512_bf16.

    python benchmarks/attention.py [--repeats 5] [--out benchmarks/results/attention.json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.packed import AttendJob, IndexJob, native_core

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 2**20
THREADS = 2
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -ffp-contract=off -fno-exceptions -fno-rtti -mavx2 -mfma -mf16c -mavx512f "
    "-mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni -mavx512vbmi"
)
Work = Callable[[int], None]
"""One thread's share of a phase."""


def compile_peers(place: Path, cxx: str) -> tuple[ctypes.CDLL, ctypes.CDLL, ctypes.CDLL]:
    """attention_peers.cpp twice (attention, index) and machine_peak.cpp."""
    here = ROOT / "benchmarks"
    built = []
    for name, extra, sources in (
        ("attend", ["-DPEER=1", "-DRQ_NS=peer_one"], ["attention_peers.cpp", "../native/cpu/rows.cpp"]),
        ("index", ["-DPEER=2", "-DRQ_NS=peer_two"], ["attention_peers.cpp", "../native/cpu/rows.cpp"]),
        ("peak", [], ["machine_peak.cpp"]),
    ):
        out = place / f"{name}.so"
        subprocess.run(
            [cxx, *FLAGS.split(), "-w", *extra, *(str(here / s) for s in sources), "-o", str(out)], check=True
        )
        built.append(ctypes.CDLL(str(out)))
    attend, index, peak = built
    for function in (attend.peer_attend_bytes, index.peer_index_bytes, index.peer_index):
        function.restype = ctypes.c_int64
    peak.peak_dot512.restype = peak.peak_read.restype = ctypes.c_double
    peak.peak_dot512.argtypes = [ctypes.c_int64]
    peak.peak_read.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
    return attend, index, peak


def scratch(size: int) -> Tensor:
    return torch.empty(size + 64, dtype=torch.uint8)


def address(tensor: Tensor) -> int:
    """Of the first 64-byte boundary in it."""
    return -(-tensor.data_ptr() // 64) * 64


def run(phases: list[Work], pool: ThreadPoolExecutor) -> tuple[float, float]:
    """Wall and CPU seconds of phases that THREADS threads share; CPU: the slower thread of each phase."""

    def timed(phase: Work, thread: int) -> float:
        start = time.thread_time()
        phase(thread)
        return time.thread_time() - start

    start, spent = time.perf_counter(), 0.0
    for phase in phases:
        spent += max(pool.map(timed, [phase] * THREADS, range(THREADS)))
    return time.perf_counter() - start, spent


class V4:
    """Jobs over random Pro rows in pages, and the phases that two threads share."""

    def __init__(self) -> None:
        self.core = native_core("avx512_bf16")
        self.keep: list[Any] = []

    def _tensor(self, tensor: Tensor) -> int:
        self.keep.append(tensor)
        return tensor.data_ptr()

    def attend(self, *, rows: int, page_rows: int, picks: Tensor | None) -> tuple[AttendJob, Tensor]:
        heads, width, window = 128, 512, 128
        pages = rows // page_rows
        some = self.core.pack_entries(torch.randn(min(rows, 8192), width), rope_dim=64)
        pool = some.repeat(rows // len(some), 1).view(pages, page_rows * 584)
        out = torch.empty(heads, width)
        near = self.core.pack_entries(torch.randn(window, width), rope_dim=64)
        places = (ctypes.c_void_p * window)(*(near.data_ptr() + i * 584 for i in range(window)))
        self.keep += [near, places]
        job = AttendJob(
            heads=heads,
            width=width,
            rope=64,
            window=window,
            format=1,
            page_rows=page_rows,
            queries=1,
            q=self._tensor(torch.randn(heads, width) * width**-0.5),
            out=self._tensor(out),
            sink=self._tensor(torch.zeros(heads)),
            window_rows=ctypes.addressof(places),
            window_own=2**62,
            entries=self._tensor(pool),
            page_bytes=page_rows * 584,
            pages=self._tensor(torch.randperm(pages).int()),
            seen=self._tensor(torch.tensor([rows])),
        )
        if picks is not None:
            job.picks, job.picks_step = picks.data_ptr(), len(picks)
            job.pick_counts = self._tensor(torch.tensor([len(picks)], dtype=torch.int32))
        return job, out

    def attend_phase(self, job: AttendJob) -> Work:
        rooms = [scratch(self.core.call.attend_scratch(job)) for _ in range(THREADS)]
        share = job.heads // THREADS
        self.keep += rooms
        call = self.core.call.attend_heads

        def core(
            thread: int, layer: V4 = self
        ) -> None:  # the jobs hold addresses only: `layer` keeps the tensors
            call(job, 0, thread * share, share, address(rooms[thread]))

        return core

    def index(self, *, keys: int, top_k: int) -> tuple[list[Work], Tensor]:
        heads, width, page_rows = 64, 128, 32
        pages = keys // page_rows
        pool = torch.cat([self.core.pack_keys(torch.randn(8192, width)) for _ in range(keys // 8192)])
        picks = torch.zeros(top_k, dtype=torch.int32)
        job = IndexJob(
            heads=heads,
            width=width,
            format=1,
            top_k=top_k,
            page_rows=page_rows,
            queries=1,
            q=self._tensor(torch.randn(heads, width)),
            weights=self._tensor(torch.randn(heads)),
            keys=self._tensor(pool),
            page_bytes=page_rows * 68,
            pages=self._tensor(torch.randperm(pages).int()),
            seen=self._tensor(torch.tensor([keys])),
            picks=self._tensor(picks),
            picks_step=top_k,
            pick_counts=self._tensor(torch.zeros(1, dtype=torch.int32)),
        )
        call, share = self.core.call, keys // THREADS
        rooms = [scratch(call.index_scratch(job)) for _ in range(THREADS)]
        size = call.index_partial_bytes(job)
        best = scratch(THREADS * size)
        self.keep += [*rooms, best]

        def score(thread: int, layer: V4 = self) -> None:
            begin, room = thread * share, address(rooms[thread])
            call.index_part(job, 0, begin, begin + share, address(best) + thread * size, room)

        def merge(thread: int) -> None:
            if not thread:
                call.index_merge(job, 0, address(best), THREADS, address(rooms[0]))

        return [score, merge], picks


def v4_csa() -> tuple[list[Work], Callable[[], None]]:
    layer = V4()
    index, picks = layer.index(keys=TOKENS // 4, top_k=1024)
    job, out = layer.attend(rows=TOKENS // 4, page_rows=32, picks=picks)

    def check() -> None:
        assert bool((picks.diff() > 0).all()), "picks are not ascending"
        assert bool(out.isfinite().all())

    return [*index, layer.attend_phase(job)], check


def v4_hca() -> tuple[list[Work], Callable[[], None]]:
    layer = V4()
    job, out = layer.attend(rows=TOKENS // 128, page_rows=1, picks=None)

    def check() -> None:
        assert bool(out.isfinite().all())

    return [layer.attend_phase(job)], check


def v32(attend: ctypes.CDLL, index: ctypes.CDLL) -> tuple[list[Work], Callable[[], None]]:
    """Index over 2^20 keys, merge, sparse MLA over 2048 rows."""
    top_k, heads = 2048, 128
    q_index = torch.randn(64, 128).bfloat16()
    weights = torch.randn(64)
    codes = torch.randn(8192, 128).to(torch.float8_e4m3fn).view(torch.uint8)
    keys = torch.cat([codes, torch.rand(8192, 1).view(torch.uint8)], 1).repeat(TOKENS // 8192, 1)
    latent = torch.randn(8192, 512).to(torch.float8_e4m3fn).view(torch.uint8)
    scales, rope = torch.rand(8192, 4).view(torch.uint8), torch.randn(8192, 64).bfloat16().view(torch.uint8)
    rows = torch.cat([latent, scales, rope], 1).repeat(TOKENS // 8192, 1)
    q = torch.randn(heads, 576) * 192**-0.5
    out, picks = torch.empty(heads, 512), torch.zeros(top_k, dtype=torch.int32)
    ranks = torch.zeros(THREADS, top_k, dtype=torch.int64)
    share, columns = TOKENS // THREADS, heads // THREADS
    index_room = [scratch(index.peer_index_bytes(top_k)) for _ in range(THREADS)]
    room = [scratch(attend.peer_attend_bytes(heads, 576)) for _ in range(THREADS)]
    c, n = ctypes.c_void_p, ctypes.c_int64
    counts = [0] * THREADS

    def score(thread: int) -> None:
        begin, to = thread * share, ranks[thread].data_ptr()
        counts[thread] = index.peer_index(
            c(q_index.data_ptr()),
            c(weights.data_ptr()),
            n(64),
            c(keys.data_ptr()),
            n(begin),
            n(begin + share),
            n(top_k),
            c(to),
            c(address(index_room[thread])),
        )

    def merge(thread: int) -> None:
        if not thread:
            both = torch.cat([ranks[t, : counts[t]] for t in range(THREADS)]) ^ (-(2**63))  # unsigned order
            best = both.topk(top_k, largest=False).values & 0xFFFFFFFF
            picks.copy_(best.sort().values)

    def core(thread: int) -> None:
        first = thread * columns
        attend.peer_mla(
            c(q[first].data_ptr()),
            n(columns),
            c(rows.data_ptr()),
            c(picks.data_ptr()),
            n(top_k),
            c(out[first].data_ptr()),
            c(address(room[thread])),
        )

    def check() -> None:
        near = rows[picks.long()]
        values = near[:, :512].contiguous().view(torch.float8_e4m3fn).float()
        values = values * near[:, 512:528].contiguous().view(torch.float32).repeat_interleave(128, 1)
        whole = torch.cat([values, near[:, 528:].contiguous().view(torch.bfloat16).float()], 1)
        want = (q @ whole.T).softmax(1) @ values
        torch.testing.assert_close(out, want, rtol=0, atol=2e-2)
        scored = torch.relu(q_index.float() @ codes.view(torch.float8_e4m3fn).float().T)
        scored = (weights @ scored) * keys[:8192, 128:].contiguous().view(torch.float32)[:, 0]
        every = scored.repeat(TOKENS // 8192)  # equal keys tie: compare scores, not places
        torch.testing.assert_close(
            every[picks.long()].sort().values, every.topk(top_k).values.sort().values, rtol=1e-4, atol=1e-4
        )

    return [score, merge, core], check


def gqa(attend: ctypes.CDLL) -> tuple[list[Work], Callable[[], None]]:
    """64 heads of 128 over 8 KV heads; a quarter of the tokens, four times."""
    heads, quarter = 8, TOKENS // 4
    some = torch.randn(2, heads, 4096, 128).bfloat16()
    keys, values = some.repeat(1, 1, quarter // 4096, 1)
    q, out = torch.randn(heads, 8, 128) * 128**-0.5, torch.empty(heads, 8, 128)
    room = [scratch(attend.peer_attend_bytes(16, 128)) for _ in range(THREADS)]
    c, n = ctypes.c_void_p, ctypes.c_int64

    def core(thread: int) -> None:
        for head in range(thread, heads, THREADS):
            attend.peer_gqa(
                c(q[head].data_ptr()),
                c(keys[head].data_ptr()),
                c(values[head].data_ptr()),
                n(quarter),
                n(4),
                c(out[head].data_ptr()),
                c(address(room[thread])),
            )

    def check() -> None:
        near, far = some.float()
        want = (q @ near.transpose(1, 2)).softmax(2) @ far  # the rows repeat, so their average is the same
        torch.testing.assert_close(out, want, rtol=0, atol=2e-2)

    return [core], check


def costs() -> dict[str, tuple[float, float]]:
    """FLOP and bytes of a layer and token (spec/engines.md 3)."""
    keys, wide = TOKENS // 4, 128 * 512
    return {
        "v4_pro_csa": (2 * 64 * 128 * keys + 4 * wide * (128 + 1024), 68 * keys + 584 * (128 + 1024)),
        "v4_pro_hca": (4 * wide * (128 + TOKENS // 128), 584 * (128 + TOKENS // 128)),
        "v32_mla": (2 * 64 * 128 * TOKENS + 2 * 128 * (576 + 512) * 2048, 132 * TOKENS + 656 * 2048),
        "gqa8_bf16": (4 * 64 * 128 * TOKENS, 2 * 8 * 128 * 2 * TOKENS),
    }


def host() -> dict[str, str]:
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], check=False, cwd=ROOT, capture_output=True, text=True
    ).stdout
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "level": "avx512_bf16",
        "torch": torch.__version__,
        "commit": commit.strip(),
        "load": f"{os.getloadavg()[0]:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cxx", default="g++")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    about = host()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(THREADS) as pool:
        attend, index, peak = compile_peers(Path(place), args.cxx)
        buffer = torch.ones(64 << 20)  # 256 MiB
        layers = {"v4_pro_csa": v4_csa(), "v4_pro_hca": v4_hca(), "v32_mla": v32(attend, index)}
        layers["gqa8_bf16"] = gqa(attend)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
        flops, read = 0.0, 0.0
        for turn in range(args.repeats + 1):
            flops = max(flops, peak.peak_dot512(10_000_000))
            read = max(read, peak.peak_read(buffer.data_ptr(), buffer.numel() * 4, 1, 1 << 16))
            for name, (phases, check) in layers.items():
                measured = run(phases, pool)
                if turn:
                    times[name].append(measured)
                else:
                    check()
    bound_flops, bound_read = THREADS * flops, THREADS * read
    print(
        f"{about['cpu']}: a core {flops:.0f} GFLOP/s bf16, {read:.1f} GB/s; load {about['load']}; {THREADS} threads"
    )
    results = []
    for name, (work, moved) in costs().items():
        wall, spent = (min(column) for column in zip(*times[name], strict=True))
        by_flops, by_read = work / bound_flops / 1e9, moved / bound_read / 1e9
        bound = max(by_flops, by_read)
        results.append(
            {
                "layer": name,
                "cpu_ms": spent * 1e3,
                "cpu_ms_all": [c * 1e3 for _, c in times[name]],
                "wall_ms": wall * 1e3,
                "gflop": work / 1e9,
                "mb": moved / 1e6,
                "bound_ms": bound * 1e3,
                "bound_by": "flops" if by_flops > by_read else "bytes",
                "share_of_bound": bound / spent,
            }
        )
        print(
            f"{name:12} {spent * 1e3:8.2f} ms a thread (wall {wall * 1e3:8.2f})  {work / 1e9:6.2f} GFLOP "
            f"{moved / 1e6:8.1f} MB  bound {bound * 1e3:7.2f} ms by {results[-1]['bound_by']}: {bound / spent:4.0%}"
        )
    if args.out:
        document = {
            "question": __doc__.splitlines()[0],
            "host": about,
            "threads": THREADS,
            "tokens": TOKENS,
            "peak_gflops_a_core": flops,
            "peak_read_gb_s_a_core": read,
            "layers": results,
        }
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
