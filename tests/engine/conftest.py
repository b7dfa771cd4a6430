import random

import pytest

from rorqual.engine import Engine
from rorqual.model import Config, Model


@pytest.fixture(scope="session")
def engine():
    """A tiny random model: every kind of layer, short window, so that edges come early."""
    config = Config.preset("tiny").replace(vocab_size=97, index_topk=6, max_position_embeddings=512)
    return Engine(Model(config).initialize(0), prefill_chunk=32)


@pytest.fixture
def prompt():
    def make(length, seed=0):
        return [random.Random(f"{seed}|{length}").randrange(97) for _ in range(length)]

    return make
