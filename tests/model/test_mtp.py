"""The MTP head against an oracle of its own: HF's model has none (spec/model.md 6.1)."""

import dataclasses
import itertools

import pytest
import torch

from rorqual._cli.embedded import EMBEDDED_DIR
from rorqual.chat import Tokenizer
from rorqual.model import AttentionMode, Config, Model
from rorqual.rl import samples, traces
from tests.oracles import mtp as oracle

CONFIG = Config.preset("tiny").replace(
    vocab_size=50,
    hidden_size=32,
    head_dim=24,
    hc_mult=3,
    hc_sinkhorn_iters=4,
    swiglu_limit=0.5,
    sliding_window=5,
)
# fp32 against float64: 1.5e-6 seen at values around 1.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model():
    model = Model(CONFIG).initialize(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in model.mtp.named_parameters():  # its own initialisation leaves many at 0 or 1
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.add_(0.3 * noise)
            elif name.endswith(("sink", "base", "scale", "bias")):
                tensor.copy_(0.5 * noise)
    return model.eval()


def _run(model, ids):
    """Ours; and the oracle's inputs: the streams [T, N, D] and the next tokens' embeddings [T, D]."""
    seen = {}
    handle = model.hc_head.register_forward_pre_hook(lambda _, args: seen.update(streams=args[0]))
    with torch.no_grad():
        out = model.train_pass(ids, mode=AttentionMode(), mtp=True)
    handle.remove()
    streams = torch.stack([stream[0, :-1] for stream in seen["streams"]], 1)
    return out.mtp_hidden[0], streams.double(), model.embed.weight[ids[0, 1:]].detach().double()


def _parameters(model):
    state = {name: tensor.double() for name, tensor in model.official_state().items()}
    return {
        name.removeprefix("mtp.0."): tensor for name, tensor in state.items() if name.startswith("mtp.0.")
    }


def test_mtp_hidden_equals_the_oracle(model):
    ids = torch.randint(0, 50, (1, 23), generator=torch.Generator().manual_seed(5))
    got, streams, embedded = _run(model, ids)
    numbers = dataclasses.asdict(CONFIG)
    expected = oracle.hidden(streams, embedded, _parameters(model), numbers)
    assert got.shape == (22, 32) and expected.std() > 0.5
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE, rtol=0)
    for name, tensor in _parameters(model).items():  # the comparison sees every tensor of the head
        if tensor.numel() > 1:
            changed = oracle.hidden(
                streams, embedded, _parameters(model) | {name: tensor.roll(1, 0)}, numbers
            )
            assert (changed - expected).abs().max() > 2 * TOLERANCE, name


def test_row_t_is_trained_on_token_t_plus_2_and_sees_no_later_one(model):
    ids = torch.randint(0, 50, (1, 23), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        whole = model.train_pass(ids, mode=AttentionMode(), mtp=True).mtp_hidden
        other = ids.clone()
        other[:, 12:] = (other[:, 12:] + 1) % 50
        changed = model.train_pass(other, mode=AttentionMode(), mtp=True).mtp_hidden
    # Row 10 is made from tokens 0..11, row 11 is the first that sees token 12.
    torch.testing.assert_close(changed[:, :11], whole[:, :11], atol=1e-5, rtol=0)
    assert (changed[:, 11] - whole[:, 11]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["", "rl"])
def test_the_shipped_heads_predict_what_their_models_say_next(name):
    """On expert traces 99.8% of the first model's next tokens and 98.8% of the second's are the head's first choice."""
    directory = EMBEDDED_DIR / name
    model, tokenizer = Model.from_pretrained(directory), Tokenizer.from_file(directory)
    drawn = itertools.islice(traces.stream("test", seed=5, style="expert"), 6)
    batch = samples.batch([samples.encode(trace, tokenizer) for trace in drawn], pad_id=2, multiple=16)
    with torch.no_grad():
        out = model.train_pass(batch.ids, mode=AttentionMode(), mtp=True)
        main = model.logits(out.hidden[:, 1:-1]).argmax(-1)
        drafted = model.logits(out.mtp_hidden[:, :-1]).argmax(-1)
    written = batch.mask[:, 2:]
    assert int(written.sum()) > 300
    assert float((main == drafted)[written].float().mean()) > 0.95
