"""The GPU face of the kernels, in Triton, one op per file (docs/kernels.md, "GPU (Triton)").

`gpu_status()` says whether they run here, or why not; `runs_on_gpu(*tensors)` is the dispatch; the ops are in
`rorqual.kernels.gpu.ops`, which needs triton. Importing this does not.
"""

from rorqual.kernels.gpu.status import GpuStatus, gpu_status, runs_on_gpu

__all__ = ["GpuStatus", "gpu_status", "runs_on_gpu"]
