"""Every Triton kernel compiles to machine code for NVIDIA's H100, at release sizes, without a GPU (gpu_compile.py).

Slow (1.5 minutes of CPU), so it is marked; `make test-gpu` runs it.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rorqual.kernels import gpu_status

SHARED_LIMIT = 227 << 10
"""Bytes of shared memory a block may have at compute capability 9.0."""
KERNELS = {
    "small_ops": {
        *("compressor._entry", "hyper_connections._merge", "hyper_connections._mix"),
        *("hyper_connections._project", "rms_norm._norm", "rope._rotate"),
    },
    "matmul": {"matmul._matmul"},
    "experts": {"experts._down", "experts._gate_up", "experts._sum_picks"},
    "attend_bf16": {"attend._attend", "attend._merge"},
    "attend_f32": {"attend._attend", "attend._merge"},
    "index_topk": {
        *("index_topk._count", "index_topk._narrow", "index_topk._place"),
        *("index_topk._round_queries", "index_topk._score", "index_topk._tally"),
    },
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("triton") is None, reason=gpu_status().reason)
@pytest.mark.parametrize("call", sorted(KERNELS))
def test_kernels_compile_at_release_sizes(call, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("gpu_compile.py")
    done = subprocess.run(
        [sys.executable, script, "90", call], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    assert set(compiled) == KERNELS[call]
    for versions in compiled.values():
        assert all(version["shared"] <= SHARED_LIMIT for version in versions)
