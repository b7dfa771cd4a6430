"""Whether the GPU face says what it can do, with and without triton. Needs neither triton nor a GPU."""

import logging
import subprocess
import sys

import pytest
import torch

from rorqual.kernels import gpu, gpu_status
from rorqual.kernels.gpu import runs_on_gpu, status

BLOCKED = """
import sys
sys.modules["triton"] = None  # as good as not installed: find_spec raises, import fails
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
"""


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_names_are_exported():
    assert sorted(gpu.__all__) == gpu.__all__
    assert all(hasattr(gpu, name) for name in gpu.__all__)


def test_without_triton_the_reason_is_one_line_and_ops_refuse_with_it():
    out = python(
        BLOCKED
        + """
from rorqual.kernels import gpu_status
print(gpu_status())
try:
    import rorqual.kernels.gpu.ops
except ImportError as error:
    print(error)
"""
    )
    told, refused = out.splitlines()
    assert told.startswith("GpuStatus(available=False, device=None, reason=")
    assert "triton is not installed: pip install 'rorqual[gpu]'" in told
    assert refused == "the GPU kernels need triton: pip install 'rorqual[gpu]'"


def test_cpu_tensors_stay_in_torch_and_mixed_devices_are_refused():
    assert not runs_on_gpu(torch.ones(1), torch.ones(2))
    with pytest.raises(ValueError, match="tensors on cpu, meta: expected one device"):
        runs_on_gpu(torch.ones(1), torch.ones(1, device="meta"))


def test_a_gpu_tensor_without_triton_is_told_once(monkeypatch, caplog):
    reason = "no such thing here"
    monkeypatch.setattr(
        status, "gpu_status", lambda: status.GpuStatus(available=False, device=None, reason=reason)
    )
    status._tell_once.cache_clear()
    there = type("There", (), {"device": torch.device("cuda", 0)})()
    with caplog.at_level(logging.WARNING, logger="rorqual.kernels.gpu.status"):
        assert not runs_on_gpu(there) and not runs_on_gpu(there)
    assert [record.reason for record in caplog.records] == [reason]


@pytest.mark.skipif(not gpu_status().available, reason=gpu_status().reason)
def test_ops_export_their_names_and_refuse_the_wrong_device():
    from rorqual.kernels.gpu import ops

    assert sorted(ops.__all__) == ops.__all__ and all(hasattr(ops, name) for name in ops.__all__)
    with pytest.raises(ValueError, match="x is on meta, the Triton kernels run on"):
        ops.rms_norm(torch.ones(2, 2, device="meta"), eps=0.0)
