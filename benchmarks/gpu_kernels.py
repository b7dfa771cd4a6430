"""How far are the Triton kernels from what the GPU's memory and tensor cores allow, at V4-Pro's sizes?

Each op runs beside the torch reference of the same numbers on the same GPU (torch decodes the rows and weights first,
which is what it costs without these kernels), A B A B, medians of 20 after 3 warm-up runs, timed with CUDA events.
Bound: bytes over the bandwidth or operations over the arithmetic rate, whichever takes longer; both rates are given
(defaults: H100 SXM's published 3350 GB/s and 989 dense bf16 TFLOP/s), not measured here. Refuses where there is no GPU.
Not run yet: no GPU was at hand when this was written.

    python benchmarks/gpu_kernels.py [--context 1048576] [--tokens 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual import kernels
from rorqual.kernels import Paged, gpu_status
from rorqual.model import Config
from rorqual.model.hyper_connections import HyperConnection
from rorqual.model.layers import rms_norm
from rorqual.model.moe import swiglu
from rorqual.model.quant import (
    pack_entry,
    pack_index_key,
    quant_dequant_fp4,
    unpack_entry,
    unpack_fp4_weight,
    unpack_fp8_weight,
    unpack_index_key,
)

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, HEADS, WIDTH, ROPE, WINDOW = 7168, 128, 512, 64, 128
INDEX_HEADS, INDEX_WIDTH, TOP_K = 64, 128, 1024
EXPERTS, PICKS, EXPERT_WIDTH = 384, 6, 3072


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one size."""

    name: str
    ours: Callable[[], Any]
    torch: Callable[[], Any]
    bytes: float
    flops: float = 0.0


def pages_of(rows: Tensor, page_rows: int) -> Paged:
    """Rows [n, bytes], n a multiple of `page_rows`, in shuffled pages."""
    count = len(rows) // page_rows
    order = torch.randperm(count, device=rows.device)
    pool = torch.empty(count, page_rows * rows.shape[1], dtype=torch.uint8, device=rows.device)
    pool[order] = rows.view(count, -1)
    return Paged(pool=pool, table=order.int(), page_rows=page_rows)


def attention_cases(ops: Any, device: torch.device, *, tokens: int, context: int) -> list[Case]:
    q = (torch.randn(tokens, HEADS, WIDTH, device=device) / WIDTH**0.5).bfloat16()
    sink, place = torch.zeros(HEADS, device=device), context - tokens
    row = pack_entry(torch.randn(WINDOW + tokens - 1, WIDTH, device=device), rope_dim=ROPE)
    shared = {"sink": sink, "position": place, "window_size": WINDOW, "rope_dim": ROPE}
    found = []
    for name, ratio in (("attend, HCA, all entries", 128), ("attend, CSA, picks", 4)):
        count, per_page = context // ratio, 128 // ratio
        packed = pack_entry(torch.randn(count, WIDTH, device=device), rope_dim=ROPE)
        pages, seen = pages_of(packed, per_page), torch.full((tokens,), count, device=device)
        extra, keys = {}, count
        index = torch.arange(count, device=device)
        if ratio == 4:
            keys = min(TOP_K, count)
            index = torch.randperm(count, device=device)[:keys].sort().values
            extra = {
                "picks": index.int().repeat(tokens, 1),
                "pick_counts": torch.full((tokens,), keys, dtype=torch.int32, device=device),
            }
        steps = torch.arange(tokens, device=device)[:, None]
        span = torch.arange(len(row), device=device)
        near = ((span >= steps) & (span < steps + WINDOW))[None]
        every = torch.ones(1, tokens, keys, dtype=torch.bool, device=device)

        def ours(pages: Paged = pages, seen: Tensor = seen, extra: dict[str, Tensor] = extra) -> Tensor:
            return ops.attend(q, row, **shared, entries=pages, seen=seen, **extra)

        def plain(
            packed: Tensor = packed, index: Tensor = index, every: Tensor = every, near: Tensor = near
        ) -> Tensor:
            rows = unpack_entry(packed[index], head_dim=WIDTH, rope_dim=ROPE, dtype=torch.bfloat16)
            window = unpack_entry(row, head_dim=WIDTH, rope_dim=ROPE, dtype=torch.bfloat16)
            return kernels.attend(
                q[None] * WIDTH**0.5, window[None], near, sink=sink, entries=rows[None], entries_mask=every
            )

        size = (keys + WINDOW) * packed.shape[1] * (tokens if ratio == 4 else 1)
        work = 4.0 * tokens * HEADS * WIDTH * (keys + WINDOW)
        found.append(Case(name=name, ours=ours, torch=plain, bytes=size, flops=work))
    return found


def index_case(ops: Any, device: torch.device, *, tokens: int, context: int) -> Case:
    count = context // 4
    packed = pack_index_key(torch.randn(count, INDEX_WIDTH, device=device))
    pages, seen = pages_of(packed, 32), torch.full((tokens,), count, device=device)
    q = torch.randn(tokens, INDEX_HEADS, INDEX_WIDTH, device=device)
    weights = torch.randn(tokens, INDEX_HEADS, device=device)

    def plain() -> Tensor:
        keys = unpack_index_key(packed, head_dim=INDEX_WIDTH)
        rounded = quant_dequant_fp4(kernels.hadamard(q))
        visible = torch.ones(1, 1, count, dtype=torch.bool, device=device)
        scores = kernels.index_scores(rounded[None], keys[None], weights[None])
        return kernels.select_top_k(scores, visible, top_k=TOP_K)

    return Case(
        name="index_topk",
        ours=lambda: ops.index_topk(q, weights, pages, seen=seen, top_k=TOP_K),
        torch=plain,
        bytes=packed.numel(),
        flops=2.0 * tokens * INDEX_HEADS * INDEX_WIDTH * count,
    )


def weight_cases(ops: Any, device: torch.device, *, tokens: int) -> list[Case]:
    found = []
    x = torch.randn(tokens, HIDDEN, device=device)
    for kind, outputs in (("fp8", 1536), ("fp4", 3072)):
        pairs = 2 if kind == "fp4" else 1
        data = torch.randint(0, 120, (outputs, HIDDEN // pairs), dtype=torch.uint8, device=device)
        shape = (outputs, HIDDEN // 32) if kind == "fp4" else (outputs // 128, HIDDEN // 128)
        scale = torch.full(shape, 120, dtype=torch.uint8, device=device)

        def plain(kind: str = kind, data: Tensor = data, scale: Tensor = scale) -> Tensor:
            if kind == "fp4":
                return x.bfloat16() @ unpack_fp4_weight(data, scale).T
            return x.bfloat16() @ unpack_fp8_weight(data.view(torch.float8_e4m3fn), scale).T

        def ours(kind: str = kind, data: Tensor = data, scale: Tensor = scale) -> Tensor:
            return ops.matmul(x, data, scale, kind=kind)

        size = data.numel() + scale.numel() + 4 * tokens * (HIDDEN + outputs)
        work = 2.0 * tokens * HIDDEN * outputs
        found.append(
            Case(name=f"matmul, {kind}, {outputs} outputs", ours=ours, torch=plain, bytes=size, flops=work)
        )
    return found


def small_cases(ops: Any, device: torch.device, *, tokens: int) -> list[Case]:
    x, weight = torch.randn(tokens, HIDDEN, device=device), torch.ones(HIDDEN, device=device)
    values, scores = torch.randn(2, tokens, 128, WIDTH, device=device)
    norm = torch.ones(WIDTH, device=device)
    cos, sin = torch.ones(tokens, ROPE, device=device), torch.zeros(tokens, ROPE, device=device)
    heads = torch.randn(tokens, HEADS, WIDTH, device=device)
    return [
        Case(
            name="apply_rope, query",
            ours=lambda: ops.apply_rope(heads, cos[:, None], sin[:, None]),
            torch=lambda: kernels.apply_rope(heads, cos[:, None], sin[:, None]),
            bytes=8.0 * heads.numel(),
        ),
        Case(
            name="rms_norm",
            ours=lambda: ops.rms_norm(x, weight, eps=1e-6),
            torch=lambda: rms_norm(x, 1e-6) * weight,
            bytes=8.0 * x.numel(),
        ),
        Case(
            name="pool_entries, HCA",
            ours=lambda: ops.pool_entries(values, scores, norm, cos=cos, sin=sin, eps=1e-6),
            torch=lambda: kernels.apply_rope(rms_norm(kernels.pool(values, scores), 1e-6) * norm, cos, sin),
            bytes=8.0 * values.numel(),
        ),
    ]


def expert_case(ops: Any, device: torch.device, *, tokens: int) -> Case:
    """As many experts as can be picked; each token picks K of them."""
    total = min(EXPERTS, PICKS * tokens)
    x, weights = torch.randn(tokens, HIDDEN, device=device), torch.full((tokens, PICKS), 0.2, device=device)
    picked = torch.stack([torch.randperm(total, device=device)[:PICKS] for _ in range(tokens)])
    stacks = []
    for outputs, width in ((EXPERT_WIDTH, HIDDEN), (EXPERT_WIDTH, HIDDEN), (HIDDEN, EXPERT_WIDTH)):
        data = torch.randint(0, 256, (total, outputs, width // 2), dtype=torch.uint8, device=device)
        stacks.append(
            (data, torch.full((total, outputs, width // 32), 118, dtype=torch.uint8, device=device))
        )
    w1, w3, w2 = stacks

    def plain() -> Tensor:
        out = torch.zeros(tokens, HIDDEN, device=device)
        for expert in picked.unique().tolist():
            where, slot = (picked == expert).nonzero(as_tuple=True)
            rows = x[where].bfloat16()
            up = [rows @ unpack_fp4_weight(data[expert], scale[expert]).T for data, scale in (w1, w3)]
            inner = swiglu(up[0].float(), up[1].float(), 10.0).bfloat16()
            part = (inner @ unpack_fp4_weight(w2[0][expert], w2[1][expert]).T).float()
            out.index_add_(0, where, part * weights[where, slot, None])
        return out

    size = len(picked.unique()) * sum((data[0].numel() + scale[0].numel()) for data, scale in stacks)
    return Case(
        name="expert_mlp, fp4",
        ours=lambda: ops.expert_mlp(x, picked, weights, w1=w1, w3=w3, w2=w2, kind="fp4", limit=10.0),
        torch=plain,
        bytes=size,
        flops=6.0 * tokens * PICKS * HIDDEN * EXPERT_WIDTH,
    )


def mixing_cases(ops: Any, device: torch.device, *, tokens: int) -> list[Case]:
    config = Config.preset("pro").replace(hidden_size=HIDDEN)
    count, site = config.hc_mult, HyperConnection(config).to(device).requires_grad_(False)
    torch.nn.init.normal_(site.fn, std=0.02)
    streams = torch.randn(tokens, count, HIDDEN, device=device)
    apart = tuple(streams[None, :, i] for i in range(count))
    options = {"scale": site.scale, "iters": site.iters, "eps": site.eps, "norm_eps": site.norm_eps}
    y, post, comb = site(apart)
    mine = ops.hc_pre(streams, site.fn, site.base, **options)
    return [
        Case(
            name="hc_pre",
            ours=lambda: ops.hc_pre(streams, site.fn, site.base, **options),
            torch=lambda: site(apart)[0][0],
            bytes=4.0 * (site.fn.numel() + streams.numel() + y.numel()),
        ),
        Case(
            name="hc_post",
            ours=lambda: ops.hc_post(streams, mine[0], *mine[1:]),
            torch=lambda: torch.stack(site.merge(apart, y, post, comb), 2)[0],
            bytes=4.0 * (2 * streams.numel() + y.numel()),
        ),
    ]


def milliseconds(call: Callable[[], Any]) -> float:
    """One run, by the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(case: Case, *, bandwidth: float, rate: float) -> dict[str, Any]:
    """Medians and spreads in milliseconds, and the share of the bound."""
    for _ in range(3):
        case.ours()
        case.torch()
    pairs = [(milliseconds(case.ours), milliseconds(case.torch)) for _ in range(20)]
    ours, plain = ([pair[side] for pair in pairs] for side in (0, 1))
    bound = 1000 * max(case.bytes / bandwidth, case.flops / rate)
    middle = statistics.median(ours)
    return {
        "op": case.name,
        "ms": round(middle, 4),
        "ms_spread": [round(min(ours), 4), round(max(ours), 4)],
        "torch_ms": round(statistics.median(plain), 4),
        "ratio": round(statistics.median(plain) / middle, 2),
        "bound_ms": round(bound, 5),
        "share_of_bound": round(bound / middle, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=1 << 20)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--bandwidth-gb-s", type=float, default=3350.0)
    parser.add_argument("--tflop-s", type=float, default=989.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.context % 128 or options.context < 128 or not 1 <= options.tokens <= 64:
        parser.error("--context is a multiple of 128 from 128 on, --tokens 1 to 64")
    status = gpu_status()
    if not status.available or status.device == "interpreter":
        print(f"gpu_kernels: needs a GPU: {status.reason}", file=sys.stderr)
        return 3
    from rorqual.kernels.gpu import ops

    torch.manual_seed(0)
    device = torch.device("cuda")
    cases = [
        *attention_cases(ops, device, tokens=options.tokens, context=options.context),
        index_case(ops, device, tokens=options.tokens, context=options.context),
        *weight_cases(ops, device, tokens=options.tokens),
        expert_case(ops, device, tokens=options.tokens),
        *mixing_cases(ops, device, tokens=options.tokens),
        *small_cases(ops, device, tokens=options.tokens),
    ]
    rates = {"bandwidth": options.bandwidth_gb_s * 1e9, "rate": options.tflop_s * 1e12}
    rows = []
    for case in cases:
        rows.append(measure(case, **rates))
        print(json.dumps(rows[-1]))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    report = {
        "gpu": status.device,
        "host": platform.node(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "context": options.context,
        "tokens": options.tokens,
        "assumed": {"bandwidth_gb_s": options.bandwidth_gb_s, "tflop_s": options.tflop_s},
        "ops": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
