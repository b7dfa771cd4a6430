import random

import pytest
import torch

from rorqual.engine import Engine
from rorqual.engine.layout import CacheLayout
from rorqual.engine.pool import PagePool
from rorqual.engine.sequence import PagedSequence, Paging
from rorqual.engine.torch_runner import TorchRunner
from rorqual.model import Config, Model

TINY = Config.preset("tiny").replace(vocab_size=97, index_topk=6, max_position_embeddings=512)
"""Every kind of layer, short window, so that edges come early."""
SMALL = TINY.replace(
    num_hidden_layers=3,
    compress_ratios=(4, 0, 32),
    num_hash_layers=0,
    hc_sinkhorn_iters=2,
    n_routed_experts=4,
)
"""The same in a third of the operations, for tests that run many schedules."""


@pytest.fixture(scope="session")
def engine():
    """An engine over a tiny random model."""
    return Engine(Model(TINY).initialize(0), prefill_chunk=32)


@pytest.fixture
def prompt():
    def make(length, seed=0):
        return [random.Random(f"{seed}|{length}").randrange(97) for _ in range(length)]

    return make


@pytest.fixture(scope="session")
def models():
    """The same parameters, exact and with simulated rounding: what each cache format must compute."""
    exact = Model(SMALL).initialize(0).eval()
    rounded = Model(SMALL, simulate_quant=True).eval()
    rounded.load_state_dict(exact.state_dict())
    return {"exact": exact, "packed": rounded}


@pytest.fixture(params=["exact", "packed"])
def cache_format(request):
    return request.param


@pytest.fixture
def make_paging(models):
    def make(cache_format="exact", *, kv_bytes=64 << 20, chunk=64, snapshot_tokens=256, slack=16):
        pool = PagePool(CacheLayout(SMALL, cache_format, slack=slack), kv_bytes=kv_bytes)
        runner = TorchRunner(models["exact"], pool)
        return Paging(pool=pool, runner=runner, prefill_chunk=chunk, snapshot_tokens=snapshot_tokens)

    return make


@pytest.fixture
def paging(make_paging, cache_format):
    return make_paging(cache_format)


@pytest.fixture
def plain(models):
    """fp32 [1, V] after `ids`, without any cache: the whole sequence at once."""

    @torch.no_grad()
    def compute(ids, cache_format="exact"):
        return models[cache_format](torch.tensor([ids]))[:, -1]

    return compute


@pytest.fixture
def opened():
    def make(paging, ids):
        sequence = PagedSequence(paging)
        return sequence, sequence.append(ids)

    return make
