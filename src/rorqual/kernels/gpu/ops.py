"""The ops in Triton, for tensors on a GPU: import this where `gpu_status().available`, else it raises ImportError.

Each checks devices, dtypes, shapes and strides before it launches, and waits for nothing.
"""

from importlib.util import find_spec

if find_spec("triton") is None:
    raise ImportError("the GPU kernels need triton: pip install 'rorqual[gpu]'")

from rorqual.kernels.gpu.attend import attend
from rorqual.kernels.gpu.compressor import pool_entries
from rorqual.kernels.gpu.experts import expert_mlp
from rorqual.kernels.gpu.hyper_connections import hc_post, hc_pre
from rorqual.kernels.gpu.index_topk import index_topk
from rorqual.kernels.gpu.matmul import matmul
from rorqual.kernels.gpu.rms_norm import rms_norm
from rorqual.kernels.gpu.rope import apply_rope

__all__ = [
    "apply_rope",
    "attend",
    "expert_mlp",
    "hc_post",
    "hc_pre",
    "index_topk",
    "matmul",
    "pool_entries",
    "rms_norm",
]
