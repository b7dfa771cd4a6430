"""Kernels: one op per file in torch, the reference; and the native CPU library that runs a decode step in one call.

Ops: `attention` (window, compressed entries and sink in one softmax), `indexer` (scores and top-k),
`pooling` (the compressor step), `sinkhorn` (mHC mixing matrices), `rope`, `hadamard`. Needs torch.
`packed` and `paged` are faces of the native cache rows, attention and index.
`cpu` loads native/cpu's library; `cpu_status()` says which level of it runs, or why none does (docs/kernels.md).
`gpu` holds the ops in Triton; `gpu_status()` says whether they run here, or why not.
"""

from rorqual.kernels.attention import attend, attend_blocks
from rorqual.kernels.cpu import CpuStatus, cpu_status
from rorqual.kernels.gpu import GpuStatus, gpu_status
from rorqual.kernels.hadamard import hadamard
from rorqual.kernels.indexer import index_loss, index_scores, select_entries, select_top_k
from rorqual.kernels.matmul import matmul, matmul_cpu
from rorqual.kernels.packed import native_core
from rorqual.kernels.paged import Paged, attend_cpu, index_topk_cpu
from rorqual.kernels.pooling import overlap_rows, pool
from rorqual.kernels.rope import apply_rope, rope_frequencies, rope_table
from rorqual.kernels.sinkhorn import sinkhorn

__all__ = [
    "CpuStatus",
    "GpuStatus",
    "Paged",
    "apply_rope",
    "attend",
    "attend_blocks",
    "attend_cpu",
    "cpu_status",
    "gpu_status",
    "hadamard",
    "index_loss",
    "index_scores",
    "index_topk_cpu",
    "matmul",
    "matmul_cpu",
    "native_core",
    "overlap_rows",
    "pool",
    "rope_frequencies",
    "rope_table",
    "select_entries",
    "select_top_k",
    "sinkhorn",
]
