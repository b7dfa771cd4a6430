"""The boundary of the forward call: structure sizes, levels, and calls that C itself must refuse.

Numbers and bits: tests/engine/test_native_runner.py.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual import kernels
from rorqual.kernels import cpu

available = kernels.cpu_status()
pytestmark = pytest.mark.skipif(not available.available, reason=available.reason)


def test_the_structures_have_the_size_of_the_header():
    """The same sizes are asserted in native/cpu/library.cpp when it compiles."""
    mirrors = {
        cpu.MatrixPointers: 24,
        cpu.ModelPointers: 200,
        cpu.CompressorPointers: 64,
        cpu.LayerPointers: 512,
        cpu.LayerCache: 64,
        cpu.SegmentPointers: 56,
        cpu.Forward: 112,
        cpu.MtpPointers: 112,
    }
    assert {mirror: ctypes.sizeof(mirror) for mirror in mirrors} == mirrors


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    return done.stdout.strip()


def test_the_environment_forces_a_level_and_an_unknown_one_is_told():
    code = "from rorqual.kernels import cpu_status; s = cpu_status(); print(s.level, s.reason)"
    assert run(code, RORQUAL_CPU_LEVEL="portable") == "portable native CPU kernels, portable"
    told = run(code, RORQUAL_CPU_LEVEL="sse9")
    assert told.startswith("None torch path: RORQUAL_CPU_LEVEL=sse9: this CPU runs portable")


GOOD = {
    **{"layers": 1, "hidden": 8, "vocab": 9, "heads": 2, "head_dim": 8, "rope_dim": 4, "q_rank": 4},
    **{"groups": 1, "o_rank": 4, "window": 4, "index_heads": 2, "index_dim": 32, "index_topk": 4},
    **{"experts": 2, "per_token": 1, "expert_width": 4, "shared_width": 0, "streams": 2, "iters": 2},
}


def call_of(**changes):
    """A call of sound dimensions but for `changes`, with no weights, and what keeps it alive."""
    model = cpu.ModelPointers(**{**GOOD, **{k: v for k, v in changes.items() if k in GOOD}})
    layers = (cpu.LayerPointers * 1)()
    call = cpu.Forward(
        model=ctypes.addressof(model),
        layers=ctypes.addressof(layers),
        block_tokens=changes.get("block_tokens", 4),
        cache_format=changes.get("cache_format", 0),
        threads=changes.get("threads", 1),
        level=changes.get("level", 0),
    )
    return call, (model, layers)


@pytest.mark.parametrize(
    "changes",
    [
        *[
            {name: value}
            for name in GOOD
            if name not in ("shared_width", "iters", "rope_dim")
            for value in (0, -1)
        ],
        *[
            {"shared_width": -1},
            {"iters": -1},
            {"head_dim": 7},
            {"head_dim": 2048},
            {"rope_dim": 10},
            {"rope_dim": -2},
        ],
        *[{"rope_dim": 3}, {"groups": 3}, {"per_token": 3}, {"streams": 17}, {"index_dim": 1024}],
        *[{"cache_format": 2}, {"cache_format": 1, "index_dim": 24, "rope_dim": 2}],
        *[{"threads": 0}, {"block_tokens": 0}, {"level": 99}, {"level": -1}],
    ],
)
def test_dimensions_that_do_not_fit_together_get_no_scratch(changes):
    library = cpu.load_library()
    sound, _kept = call_of()
    assert library.forward_scratch(sound, tokens=4, positions=4) > 0
    call, _kept = call_of(**changes)
    with pytest.raises(ValueError, match="dimensions"):
        library.forward_scratch(call, tokens=4, positions=4)


def test_a_call_without_weights_or_scratch_is_refused():
    library = cpu.load_library()
    call, _kept = call_of()
    segment = cpu.SegmentPointers()
    call.segments, call.segment_count = ctypes.addressof(segment), 1
    assert library.forward(call, None) == -2  # the call itself: one segment and one
    call.level = 99
    assert library.forward(call, None) == -2


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++ to build the program with: apt-get install g++"
)
def test_every_task_of_every_phase_runs_once(tmp_path):
    here = Path(__file__).parent
    native = here.parents[1] / "native" / "cpu"
    program = tmp_path / "team_stress"
    sources = [os.fspath(here / "team_stress.cpp"), os.fspath(native / "team.cpp")]
    subprocess.run(
        ["g++", "-std=c++17", "-O2", f"-I{native}", *sources, "-o", program, "-lpthread"], check=True
    )
    for threads in ("1", "2", "5"):
        done = subprocess.run(
            [program, threads, "20000"], capture_output=True, text=True, check=False, timeout=120
        )
        assert (done.returncode, done.stdout) == (0, "ok\n")
