"""Weights of a torch model: in place, live, under the official names."""

from __future__ import annotations

import pytest
import torch

from rorqual.model import CheckpointError, Config, Model
from rorqual.model.quant import pack_fp4_weight, pack_fp8_weight
from rorqual.model.weights import ModelWeights, Packed, split_expert


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(Config.preset("tiny")).initialize(3)


def test_matrices_are_the_parameters_themselves(model: Model) -> None:
    weights = ModelWeights(model)
    packed = weights.matrix("layers.1.attn.wq_a")
    assert packed.data.data_ptr() == model.layers[1].attn.wq_a.weight.data_ptr()
    assert (packed.kind, packed.shape, packed.block, packed.scale) == ("f32", (64, 128), 0, None)
    assert weights.matrix("embed.weight").data.data_ptr() == model.embed.weight.data_ptr()


def test_experts_are_views_of_the_stacked_parameter(model: Model) -> None:
    weights = ModelWeights(model)
    stacked = model.layers[2].ffn.experts.w2
    (expert,) = weights.load_experts(2, [5])
    assert expert.w2.data.data_ptr() == stacked[5].data_ptr()
    assert expert.w2.shape == (128, 96) and expert.w1.shape == expert.w3.shape == (96, 128)
    assert weights.matrix("layers.2.ffn.experts.5.w2").data.data_ptr() == stacked[5].data_ptr()


def test_every_tensor_of_the_model_is_reachable(model: Model) -> None:
    weights = ModelWeights(model)
    for name, tensor in model.official_state().items():
        if ".ffn.experts." in name:
            prefix, leaf = name.split("experts.")
            got = torch.stack([weights.matrix(f"{prefix}experts.{e}.{leaf}").data for e in range(8)])
        else:
            got = weights.table(name) if name.endswith("tid2eid") else weights.vector(name)
        assert torch.equal(got, tensor), name


def test_a_replaced_parameter_is_seen() -> None:
    model = Model(Config.preset("tiny")).initialize(0)
    weights = ModelWeights(model)
    before = weights.matrix("head").data
    model.head.weight = torch.nn.Parameter(torch.zeros_like(before))
    assert not weights.matrix("head").data.any() and before.any()


def test_bf16_matrices_stay_and_bf16_vectors_become_fp32() -> None:
    model = Model(Config.preset("tiny")).initialize(0).bfloat16()
    weights = ModelWeights(model)
    assert weights.matrix("head").kind == "bf16"
    assert weights.vector("layers.0.attn_norm").dtype == torch.float32


def test_mtp_blocks_follow_the_layers(model: Model) -> None:
    weights = ModelWeights(model)
    assert weights.drafter == "mtp"
    last = len(model.layers)
    got = weights.load_experts(last, [1])[0].w1.data
    assert got.data_ptr() == model.mtp[0].ffn.experts.w1[1].data_ptr()
    with pytest.raises(IndexError, match="5 layers and 1 MTP blocks"):
        weights.load_experts(last + 1, [0])
    bare = ModelWeights(Model(Config.preset("tiny"), mtp=False))
    assert bare.drafter is None
    with pytest.raises(IndexError, match="0 MTP blocks"):
        bare.load_experts(last, [0])


def test_bad_names_and_parameters_are_refused(model: Model) -> None:
    weights = ModelWeights(model)
    with pytest.raises(CheckpointError, match=r"layers\.9\.attn\.wq_a: the model has no such tensor"):
        weights.matrix("layers.9.attn.wq_a")
    with pytest.raises(IndexError, match="experts 0 to 7"):
        weights.matrix("layers.0.ffn.experts.8.w1")
    with pytest.raises(CheckpointError, match="expected a contiguous float32"):
        weights.matrix("norm")
    with pytest.raises(CheckpointError, match="float64"):
        ModelWeights(Model(Config.preset("tiny")).double()).matrix("head")


def test_expert_names_are_split() -> None:
    assert split_expert("layers.3.ffn.experts.7.w1") == ("layers.3.ffn.experts.w1", 7)
    assert split_expert("mtp.0.ffn.experts.12.w3.weight") == ("mtp.0.ffn.experts.w3", 12)
    assert split_expert("layers.3.ffn.shared_experts.w1") is None


@pytest.mark.parametrize("block", [32, 128])
def test_packed_matrices_give_their_values_back(block: int) -> None:
    values = torch.randn(160, 192, generator=torch.Generator().manual_seed(1))
    codes, scale = pack_fp8_weight(values, block=block)
    fp8 = Packed(data=codes.view(torch.uint8), scale=scale, kind="fp8", shape=(160, 192), block=block)
    assert (fp8.unpack() - values).abs().max() <= values.abs().max() / 16
    pairs, scale = pack_fp4_weight(values)
    fp4 = Packed(data=pairs.view(torch.uint8), scale=scale, kind="fp4", shape=(160, 192), block=32)
    assert fp4.nbytes == 160 * 96 + 160 * 6
    assert (fp4.unpack() - values).abs().max() <= values.abs().max() / 4
