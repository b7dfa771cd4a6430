"""Compiles the Triton kernels at release sizes for one GPU architecture, without a GPU.

    python tests/kernels/gpu_compile.py 90 [attend_f32 ...]      # compute capability; names of CALLS, or all

The ops run on CPU tensors with every launch turned into a compilation, ptxas included, so that the signatures are the
real ones; what the ops return means nothing here. Prints one JSON document: per kernel its shared memory, registers and
spilled bytes. A process of its own: it must import triton without the interpreter.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from rorqual.kernels.gpu import checks, ops

compiled = {}


class Driver:
    """What Triton asks of a driver up to the launch."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def ptxas_report(ptx, capability):
    """(registers, spilled bytes) of the kernel."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        suffix = "a" if capability >= 90 else ""
        tool = triton.knobs.nvidia.ptxas_blackwell if capability >= 100 else triton.knobs.nvidia.ptxas
        command = [tool.path, "-v", f"-arch=sm_{capability}{suffix}", file.name, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", text))
    return int(re.search(r"Used (\d+) registers", text).group(1)), spills


def install(capability):
    triton.runtime.driver.set_active(Driver(capability))
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        registers, spills = ptxas_report(kernel.asm["ptx"], capability)
        name = f"{self.fn.__module__.rsplit('.', 1)[1]}.{self.fn.__name__}"
        compiled.setdefault(name, []).append(
            {"shared": kernel.metadata.shared, "registers": registers, "spills": spills}
        )
        return kernel

    JITFunction.run = compile_only
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    real = checks.ready
    for module in list(sys.modules.values()):
        if getattr(module, "ready", None) is real:
            module.ready = lambda **tensors: torch.device("cpu")


def small_ops():
    x = torch.zeros(1, HIDDEN)
    ops.rms_norm(x, torch.ones(HIDDEN), eps=1e-6)
    ops.rms_norm(x.bfloat16(), eps=1e-6)
    ops.apply_rope(torch.zeros(1, HEADS, WIDTH), torch.ones(1, 1, ROPE), torch.ones(1, 1, ROPE))
    for rows, size in ((8, WIDTH), (128, WIDTH), (8, 128)):
        part, table = torch.zeros(1, rows, size), torch.ones(1, ROPE)
        ops.pool_entries(part, part, torch.ones(size), cos=table, sin=table, eps=1e-6)
    streams = torch.zeros(1, 4, HIDDEN)
    site = {"scale": torch.ones(3), "iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
    _, post, comb = ops.hc_pre(streams, torch.zeros(24, 4 * HIDDEN), torch.zeros(24), **site)
    ops.hc_post(streams, x, post, comb)


def matmul():
    weights = {
        "f32": (torch.zeros(384, HIDDEN), None),
        "bf16": (torch.zeros(512, HIDDEN, dtype=torch.bfloat16), None),
        "fp8": (zeros(1536, HIDDEN), zeros(12, 56)),
        "fp4": (zeros(64, HIDDEN // 2), zeros(64, HIDDEN // 32)),
    }
    for kind, weight in weights.items():
        ops.matmul(torch.zeros(1, HIDDEN), *weight, kind=kind)


def experts():
    ff = 3072
    up = (zeros(2, ff, HIDDEN // 2), zeros(2, ff, HIDDEN // 32))
    down = (zeros(2, HIDDEN, ff // 2), zeros(2, HIDDEN, ff // 32))
    picked = torch.zeros(1, 6, dtype=torch.int64)
    x = torch.zeros(1, HIDDEN)
    ops.expert_mlp(x, picked, torch.ones(1, 6), w1=up, w3=up, w2=down, kind="fp4", limit=10.0)


def attend(dtype):
    q, window = torch.zeros(1, HEADS, WIDTH, dtype=dtype), zeros(128, 584)
    shared = {"sink": torch.zeros(HEADS), "position": 127, "window_size": 128, "rope_dim": ROPE}
    seen, picks = torch.tensor([2000]), torch.zeros(1, 1024, dtype=torch.int32)
    count = torch.tensor([1024], dtype=torch.int32)
    ops.attend(q, window, **shared, entries=pages(584), seen=seen)
    ops.attend(q, window, **shared, entries=pages(584), seen=seen, picks=picks, pick_counts=count)


def index_topk():
    for queries in (1, 4):
        q, weights = torch.zeros(queries, 64, 128), torch.zeros(queries, 64)
        ops.index_topk(q, weights, pages(68), seen=torch.full((queries,), 2000), top_k=1024)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


def pages(row_bytes):
    table = torch.zeros(64, dtype=torch.int32)
    return SimpleNamespace(pool=zeros(2, 32 * row_bytes), table=table, page_rows=32)


HIDDEN, HEADS, WIDTH, ROPE = 7168, 128, 512, 64
CALLS = {
    "small_ops": small_ops,
    "matmul": matmul,
    "experts": experts,
    "attend_bf16": lambda: attend(torch.bfloat16),
    "attend_f32": lambda: attend(torch.float32),
    "index_topk": index_topk,
}

if __name__ == "__main__":
    install(int(sys.argv[1]))
    for name in sys.argv[2:] or CALLS:
        CALLS[name]()
    print(json.dumps(compiled))
