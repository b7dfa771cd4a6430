"""Kernels: one op per file. Today each has its torch reference face; CPU and GPU faces join beside it.

Ops: `attention` (window, compressed entries and sink in one softmax), `indexer` (scores and top-k),
`pooling` (the compressor step), `sinkhorn` (mHC mixing matrices), `rope`, `hadamard`. Needs torch.
"""

from rorqual.kernels.attention import attend, attend_blocks
from rorqual.kernels.hadamard import hadamard
from rorqual.kernels.indexer import index_scores, select_top_k
from rorqual.kernels.pooling import overlap_rows, pool
from rorqual.kernels.rope import apply_rope, rope_frequencies, rope_table
from rorqual.kernels.sinkhorn import sinkhorn

__all__ = [
    "apply_rope",
    "attend",
    "attend_blocks",
    "hadamard",
    "index_scores",
    "overlap_rows",
    "pool",
    "rope_frequencies",
    "rope_table",
    "select_top_k",
    "sinkhorn",
]
