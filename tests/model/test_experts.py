"""Experts on demand: the same bytes as resident ones, within the budget, from any file system, under a memory limit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rorqual.model import CheckpointError, Config, experts
from rorqual.model.experts import ExpertCache, Region
from rorqual.model.packed import PackedWeights
from rorqual.model.synth import synth
from tests.model.test_checkpoint import SMALL, random_state, write
from tests.oracles.official_checkpoint import official


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("experts"), official(random_state(SMALL)))


@pytest.fixture(scope="module")
def slot(directory: Path) -> int:
    """Bytes of a slot for SMALL's experts."""
    with PackedWeights(directory, expert_bytes=1 << 24) as weights:
        return weights.expert_stats().slot_bytes  # type: ignore[union-attr]


@pytest.fixture
def resident(directory: Path) -> PackedWeights:
    return PackedWeights(directory)


def test_streamed_experts_are_the_resident_ones_to_the_byte(
    directory: Path, slot: int, resident: PackedWeights
) -> None:
    draw = random.Random(1)
    for reads in ("direct", "drop", "cached"):
        with PackedWeights(directory, expert_bytes=8 * slot, reads=reads) as weights:  # type: ignore[arg-type]
            assert not weights.experts_resident
            for _ in range(60):
                layer, ids = draw.randrange(5), [draw.randrange(4) for _ in range(draw.randrange(1, 4))]
                got, expected = weights.load_experts(layer, ids), resident.load_experts(layer, ids)
                for one, other in zip(got, expected, strict=True):
                    for mine, theirs in zip(one, other, strict=True):
                        assert mine.kind == theirs.kind == "fp4" and mine.shape == theirs.shape
                        assert torch.equal(mine.data, theirs.data) and mine.scale is not None
                        assert theirs.scale is not None and torch.equal(mine.scale, theirs.scale)
            stats = weights.expert_stats()
            assert stats is not None and stats.held_bytes <= 8 * slot and stats.evictions > 0 < stats.hits
            assert stats.overflow == 0 and stats.bytes_read >= stats.misses * 3 * (1024 + 64)
    assert resident.expert_stats() is None


def test_the_least_recently_used_expert_leaves(directory: Path, slot: int) -> None:
    with PackedWeights(directory, expert_bytes=3 * slot) as weights:
        slots = weights.expert_stats().slots  # type: ignore[union-attr]
        assert slots >= 3
        for expert in range(slots):
            weights.load_experts(expert // 4, [expert % 4])
        weights.load_experts(0, [0])
        weights.load_experts(4, [3])  # takes the place of (0, 1)
        before = weights.expert_stats()
        weights.load_experts(0, [0])
        weights.load_experts(0, [1])
        after = weights.expert_stats()
        assert before is not None and after is not None
        assert (before.evictions, after.hits - before.hits, after.misses - before.misses) == (1, 1, 1)


def test_more_experts_than_slots_come_mapped_and_are_counted(
    directory: Path, slot: int, resident: PackedWeights
) -> None:
    with PackedWeights(directory, expert_bytes=2 * slot) as weights:
        slots = weights.expert_stats().slots  # type: ignore[union-attr]
        assert slots < 4
        got = weights.load_experts(2, [3, 1, 0, 2, 1])
        for one, other in zip(got, resident.load_experts(2, [3, 1, 0, 2, 1]), strict=True):
            assert all(torch.equal(a.data, b.data) for a, b in zip(one, other, strict=True))
        stats = weights.expert_stats()
        assert stats is not None and stats.overflow == 4 - slots and stats.misses == 4
        assert stats.held_bytes <= 2 * slot


def test_what_a_call_gave_stays_until_the_next(directory: Path, slot: int, resident: PackedWeights) -> None:
    with PackedWeights(directory, expert_bytes=2 * slot) as weights:
        (held,) = weights.load_experts(0, [2])
        weights.prefetch(range(96))  # may not take the slot that was just given out
        weights.prefetch(range(96))
        (expected,) = resident.load_experts(0, [2])
        assert torch.equal(held.w1.data, expected.w1.data) and torch.equal(held.w2.data, expected.w2.data)


def test_prefetched_experts_of_hash_layers_are_hits(directory: Path, slot: int) -> None:
    with PackedWeights(directory, expert_bytes=8 * slot) as weights:
        table = weights.table("layers.0.ffn.gate.tid2eid")
        weights.prefetch([5, -1, 96, 1 << 40])
        weights.load_experts(0, table[5].tolist())
        stats = weights.expert_stats()
        assert stats is not None and stats.misses == 0
        assert stats.prefetched == stats.prefetch_hits == stats.hits == len(set(table[5].tolist()))


def test_a_budget_below_one_token_is_refused(directory: Path, slot: int) -> None:
    with pytest.raises(
        CheckpointError, match=r"bytes for experts hold 1 of \d+ bytes each, a token needs 2: allow"
    ):
        PackedWeights(directory, expert_bytes=slot)
    with pytest.raises(CheckpointError, match="hold 0 of"):
        PackedWeights(directory, expert_bytes=0)


def test_experts_that_would_need_a_copy_are_refused_on_demand(tmp_path: Path) -> None:
    state = {n: t if t.dtype == torch.int64 else t.half() for n, t in random_state(SMALL).items()}
    write(tmp_path, state)
    PackedWeights(tmp_path)
    with pytest.raises(CheckpointError, match=r"experts in F16 at offset .*rorqual model convert"):
        PackedWeights(tmp_path, expert_bytes=1 << 20)


def test_damaged_experts_are_named_every_time_and_leave_the_cache_usable(tmp_path: Path, slot: int) -> None:
    tensors = official(random_state(SMALL))
    tensors["layers.2.ffn.experts.1.w3.scale"] = torch.full((32, 2), 255).byte()
    with PackedWeights(write(tmp_path, tensors), expert_bytes=16 * slot) as weights:
        for _ in range(3):
            with pytest.raises(CheckpointError, match=r"layers.2.ffn.experts.1.w3: 64 of 64 scales are NaN"):
                weights.load_experts(2, [0, 1])
        assert len(weights.load_experts(2, [0, 2, 3])) == 3


def test_a_file_cut_short_while_in_use_is_an_error_not_a_crash(tmp_path: Path, slot: int) -> None:
    file = write(tmp_path, official(random_state(SMALL))) / "model.safetensors"
    with PackedWeights(tmp_path, expert_bytes=4 * slot) as weights:
        os.truncate(file, 4096)
        with pytest.raises(CheckpointError, match="its header says it goes on: it was changed while in use"):
            for layer in range(5):
                weights.load_experts(layer, [0, 1, 2])


def test_a_file_system_without_direct_reads_falls_back(
    directory: Path,
    slot: int,
    resident: PackedWeights,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECT | os.O_ASYNC | 0o20000000)  # not so opened: EINVAL
    caplog.set_level("INFO")
    with PackedWeights(directory, expert_bytes=4 * slot) as weights:
        got, expected = weights.load_experts(1, [2])[0], resident.load_experts(1, [2])[0]
        assert torch.equal(got.w2.data, expected.w2.data)
    assert "refuses O_DIRECT" in caplog.text


def test_closing_twice_is_fine_and_tensors_stay(directory: Path, slot: int, resident: PackedWeights) -> None:
    weights = PackedWeights(directory, expert_bytes=4 * slot)
    (got,) = weights.load_experts(1, [2])
    weights.close()
    weights.close()
    assert torch.equal(got.w1.data, resident.load_experts(1, [2])[0].w1.data)


def test_regions_of_any_place_are_read_right(tmp_path: Path) -> None:
    """Against slices of the file: regions that touch, overlap a page, lie far apart, in two files, at the end."""
    draw = random.Random(7)
    contents = {}
    for name in ("a", "b"):
        contents[tmp_path / name] = draw.randbytes(300_000 if name == "a" else 9_000_001)
        (tmp_path / name).write_bytes(contents[tmp_path / name])
    regions: dict[tuple[int, int], list[Region]] = {}
    for key in range(12):
        own = regions[0, key] = []
        for _ in range(draw.randrange(1, 7)):
            file = draw.choice(list(contents))
            size = len(contents[file])
            begin = draw.choice([0, 4095, 4096, size - 5, draw.randrange(size - 5)])
            own.append(Region(file, begin, draw.randrange(1, min(size - begin, 70_000) + 1)))
    regions[0, 12] = [Region(tmp_path / "b", 3, 9_000_001 - 3)]  # several pieces, to the last byte
    for reads in ("direct", "drop"):
        cache: ExpertCache[list[bytes]] = ExpertCache(
            regions,
            build=lambda key, tensors: [bytes(tensor.tolist()) for tensor in tensors],
            check=lambda key, value: None,
            budget_bytes=40 << 20,
            reads=reads,  # type: ignore[arg-type]
            threads=3,
        )
        loaded = cache.load(list(regions))
        for key, wanted in regions.items():
            if loaded[key] is None:
                continue
            assert loaded[key] == [contents[r.file][r.begin : r.begin + r.nbytes] for r in wanted]
        assert sum(value is not None for value in loaded.values()) == min(cache.slots, 13) > 0
        assert loaded[0, 12] is not None or cache.slots < 13
        assert cache.load([(0, 12)])[0, 12] == [contents[tmp_path / "b"][3:]]
        cache.close()


def test_an_engine_gives_the_same_logits_whatever_is_resident(tmp_path: Path) -> None:
    from rorqual.engine import Engine
    from rorqual.kernels import cpu_status

    if not cpu_status().available:
        pytest.skip("the native library is not built here")
    synth(tmp_path, Config.preset("tiny"), seed=1)
    ids, logits = list(range(5, 90)), []
    for budget in (None, 300_000, 120_000):
        with PackedWeights(tmp_path, expert_bytes=budget) as weights:
            engine = Engine(weights, kv_bytes=64 << 20, cache_format="packed")
            sequence = engine.open(ids)
            for token in (7, 8, 9):
                sequence.append([token])
            assert sequence.logits is not None
            logits.append(sequence.logits.clone())
            sequence.close()
            stats = weights.expert_stats()
            assert stats is None or (
                stats.misses > 0 < stats.prefetch_hits and stats.held_bytes <= (budget or 0)
            )
            engine.close()
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


# --- under a memory limit ---

CHILD = """
import resource, sys
import torch
from pathlib import Path
from rorqual.model.packed import PackedWeights
torch.set_num_threads(1)

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

directory, budget, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with PackedWeights(directory, expert_bytes=budget, threads=4) as weights:
    config = weights.config
    weights.load_experts(0, [0])
    before = anonymous() - weights.expert_stats().held_bytes
    slack = 60 << 20  # four thread stacks, torch's scratch
    if sys.argv[4] == "rlimit":
        lines = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + budget + slack,) * 2)
    else:
        Path(sys.argv[4]).write_text(str(anonymous() + budget + slack))
    total = 0.0
    for step in range(rounds):
        for layer in range(config.num_hidden_layers):
            ids = [(7 * step + 3 * layer + 5 * k) % config.n_routed_experts for k in range(4)]
            for expert in weights.load_experts(layer, ids):
                total += float(expert.w2.data[::64].float().sum())
    stats = weights.expert_stats()
    print(stats.misses, stats.bytes_read, stats.held_bytes, max(0, anonymous() - before), total)
"""
BIG = SMALL.replace(
    hidden_size=512,
    num_hidden_layers=4,
    n_routed_experts=32,
    moe_intermediate_size=1024,
    num_nextn_predict_layers=0,
    vocab_size=64,
)
BUDGET = 24 << 20


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 experts of 0.8 MiB in FP4: 102 MiB."""
    directory = tmp_path_factory.mktemp("big")
    state = random_state(SMALL.replace(hidden_size=512, num_nextn_predict_layers=0, vocab_size=64), mtp=False)
    tensors = {
        name: tensor for name, tensor in official(state, experts=None).items() if ".ffn.experts." not in name
    }
    generator = torch.Generator().manual_seed(3)

    def codes(*shape: int, high: int = 256) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)

    width, hidden = BIG.moe_intermediate_size, BIG.hidden_size
    for layer in range(4):
        for name, tensor in list(tensors.items()):
            if name.startswith(f"layers.{layer}.ffn.gate.") and "tid2eid" not in name:
                tensors[name] = torch.zeros(32, *tensor.shape[1:])
        for matrix in ("w1", "w2", "w3"):
            rows, columns = (hidden, width) if matrix == "w2" else (width, hidden)
            tensors[f"layers.{layer}.ffn.shared_experts.{matrix}.weight"] = torch.zeros(rows, columns)
            for expert in range(32):
                stem = f"layers.{layer}.ffn.experts.{expert}.{matrix}"
                tensors[f"{stem}.weight"] = codes(rows, columns // 2).view(torch.int8)
                tensors[f"{stem}.scale"] = codes(rows, columns // 32, high=128)
    write(directory, {}, config=BIG)
    save_file(tensors, directory / "model.safetensors")
    return directory


def expected_sum(directory: Path, rounds: int) -> float:
    weights, total = PackedWeights(directory), 0.0
    for step in range(rounds):
        for layer in range(4):
            ids = [(7 * step + 3 * layer + 5 * k) % 32 for k in range(4)]
            for expert in weights.load_experts(layer, ids):
                total += float(expert.w2.data[::64].float().sum())
    return total


def judge(directory: Path, text: str) -> None:
    misses, read, held, anonymous, total = text.split()
    assert int(held) <= BUDGET and int(misses) > 50 and int(read) > 2 * BUDGET
    assert int(anonymous) <= BUDGET + (8 << 20), "more memory than the budget and what Python needs"
    assert float(total) == expected_sum(directory, 24)


def test_the_budget_holds_under_a_limit_of_the_process(big: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(big), str(BUDGET), "24", "rlimit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    judge(big, done.stdout)


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory cgroup (v1, or v2 with the controller on), removed afterwards."""
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / f"rorqual-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            break
        group.rmdir()
    else:
        pytest.skip("no memory cgroup can be made here (needs root and the memory controller)")
    yield group / limit
    group.rmdir()


def test_a_model_bigger_than_its_memory_group_runs(big: Path, memory_group: Path) -> None:
    """102 MiB of experts, in a group that takes what Python with torch holds and 84 MiB more."""
    procs = memory_group.parent / "cgroup.procs"
    command = ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh", sys.executable, "-c", CHILD]
    command += [str(big), str(BUDGET), "24", str(memory_group)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    judge(big, done.stdout)


def test_all_lists_every_public_name() -> None:
    public = {
        n
        for n, v in vars(experts).items()
        if not n.startswith("_") and getattr(v, "__module__", "") == experts.__name__
    }
    assert public | {"Key", "Reads"} == set(experts.__all__)
