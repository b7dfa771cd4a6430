"""Rounding, scales and byte layouts of rorqual.model.quant against tests/oracles/quant.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.model import quant
from rorqual.model.errors import CheckpointError
from tests.oracles import quant as oracle

BOTH = [
    pytest.param(quant.quant_dequant_fp8, oracle.fp8, 64, id="fp8"),
    pytest.param(quant.quant_dequant_fp4, oracle.fp4, 32, id="fp4"),
]


def check(ours, theirs, x):
    got = ours(torch.from_numpy(x)).double().numpy()
    np.testing.assert_array_equal(got, theirs(x))


@pytest.mark.parametrize("ours, theirs, block", BOTH)
@pytest.mark.parametrize("exponent", [-140, -126, -60, -14, -1, 0, 3, 60, 118])
def test_random_blocks_round_as_the_oracle_says(ours, theirs, block, exponent):
    rng = np.random.default_rng(exponent + 200)
    x = (rng.standard_normal(block * 4) * 2.0**exponent).astype(np.float32)
    check(ours, theirs, x)


@pytest.mark.parametrize("ours, theirs, block", BOTH)
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=150))
def test_any_finite_values_and_any_length_round_as_the_oracle_says(ours, theirs, block, values):
    check(ours, theirs, np.array(values, dtype=np.float32))


@pytest.mark.parametrize("ours, theirs, block", BOTH)
def test_zeros_stay_zero(ours, theirs, block):
    assert torch.equal(ours(torch.zeros(3, block)), torch.zeros(3, block))


def test_all_e4m3_codes_survive_and_their_midpoints_go_to_the_even_code():
    values = np.sort(oracle.E4M3[np.isfinite(oracle.E4M3)])
    ties = (values[1:] + values[:-1]) / 2
    for x in (values, ties):
        for start in range(0, len(x), 63):
            part = np.concatenate([x[start : start + 63], [448]]).astype(
                np.float32
            )  # 448 pins the scale to 1
            check(quant.quant_dequant_fp8, oracle.fp8, part)
            if x is values:
                assert np.array_equal(oracle.fp8(part), part)


def test_all_e2m1_codes_survive_and_their_midpoints_go_to_the_even_code():
    values = np.sort(oracle.E2M1)
    ties = (values[1:] + values[:-1]) / 2
    for x in (values, ties):
        check(quant.quant_dequant_fp4, oracle.fp4, np.append(x, 6).astype(np.float32))
    got = quant.quant_dequant_fp4(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]))
    assert got.tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("top, shift, fn", [(448.0, 8, quant.fp8_block), (6.0, 2, quant.fp4_block)])
def test_scale_steps_up_just_above_the_top_of_the_grid(top, shift, fn):
    for power in range(-10, 100, 7):
        amax = torch.tensor([top * 2.0**power], dtype=torch.float32)
        above = torch.nextafter(amax, torch.tensor(torch.inf))
        assert fn(amax)[1].item() == 127 + power
        assert fn(above)[1].item() == 128 + power


@pytest.mark.parametrize("ours, theirs, block", BOTH)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nan_or_infinity_makes_its_whole_block_nan_and_no_other(ours, theirs, block, bad):
    x = torch.ones(2, 3 * block)
    x[1, block + 5] = bad
    got = ours(x)
    assert got[1, block : 2 * block].isnan().all()
    assert got.isnan().sum() == block


def test_nan_survives_packing():
    kv = torch.ones(512)
    kv[70] = torch.nan
    back = quant.unpack_entry(quant.pack_entry(kv, rope_dim=64), head_dim=512, rope_dim=64)
    assert back[64:128].isnan().all() and back.isnan().sum() == 64
    key = torch.ones(128)
    key[3] = torch.inf
    back = quant.unpack_index_key(quant.pack_index_key(key), head_dim=128)
    assert back[:32].isnan().all() and back.isnan().sum() == 32


@pytest.mark.parametrize("ours, theirs, block", BOTH)
def test_gradient_passes_straight_through(ours, theirs, block):
    x = torch.randn(5, block + 3, requires_grad=True)
    weight = torch.randn(5, block + 3)
    (ours(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("ours, theirs, block", BOTH)
def test_dtype_shape_and_input_are_kept(ours, theirs, block):
    x = torch.randn(2, 3, 70).to(torch.bfloat16)
    before = x.clone()
    got = ours(x)
    assert got.dtype == torch.bfloat16 and got.shape == x.shape and torch.equal(x, before)
    assert torch.equal(got, ours(x.float()).to(torch.bfloat16))
    assert torch.equal(got.float(), ours(x.float())), "4 significant bits fit bf16: nothing is rounded twice"
    assert torch.equal(ours(x.transpose(0, 1)), got.transpose(0, 1))


@pytest.mark.parametrize(
    "head_dim, rope_dim, size", [(512, 64, 584), (64, 32, 104), (64, 64, 128), (48, 16, 72), (600, 88, 696)]
)
def test_entry_has_the_size_of_the_format_and_comes_back_as_simulated(head_dim, rope_dim, size):
    torch.manual_seed(1)
    kv = torch.randn(2, 7, head_dim) * torch.logspace(-3, 3, 7)[:, None]
    packed = quant.pack_entry(kv, rope_dim=rope_dim)
    assert packed.shape == (2, 7, size) and packed.dtype == torch.uint8
    back = quant.unpack_entry(packed, head_dim=head_dim, rope_dim=rope_dim)
    assert torch.equal(back, quant.quant_dequant_entry(kv, rope_dim=rope_dim))
    assert torch.equal(back[..., head_dim - rope_dim :], kv[..., head_dim - rope_dim :].bfloat16().float())
    if head_dim > rope_dim:
        expected = oracle.fp8(kv[0, 3, : head_dim - rope_dim].numpy())
        np.testing.assert_array_equal(back[0, 3, : head_dim - rope_dim].numpy(), expected)


def test_entry_bytes_lie_as_the_format_says():
    kv = torch.zeros(512)
    kv[:64] = 1.0
    kv[448] = 1.0
    packed = quant.pack_entry(kv, rope_dim=64).numpy()
    assert packed[0] == 0x78  # 1 / 2^-8 = 256 = e4m3 code 0x78
    assert packed[448:450].tobytes() == b"\x80\x3f"  # bf16 1.0, little-endian
    assert packed[576] == 127 - 8
    assert packed[583] == 0


def test_index_key_has_the_size_of_the_format_and_comes_back_as_simulated():
    torch.manual_seed(2)
    for dim, size in ((128, 68), (32, 17), (48, 26), (33, 19)):
        key = torch.randn(3, 5, dim)
        packed = quant.pack_index_key(key)
        assert packed.shape == (3, 5, size)
        assert torch.equal(quant.unpack_index_key(packed, head_dim=dim), quant.quant_dequant_fp4(key))
        np.testing.assert_array_equal(
            quant.quant_dequant_fp4(key)[1, 2].numpy(), oracle.fp4(key[1, 2].numpy())
        )


def test_nibbles_lie_low_first():
    packed, scale = quant.pack_fp4_weight(torch.tensor([[0.5, -6.0] + [0.0] * 30]))
    assert packed.dtype == torch.int8 and packed.view(torch.uint8)[0, 0].item() == 0xF1
    assert scale.item() == 127


def test_all_e8m0_bytes_decode():
    got = quant.decode_e8m0(torch.arange(256, dtype=torch.uint8)).double().numpy()
    np.testing.assert_array_equal(got[:255], 2.0 ** (np.arange(255) - 127.0))
    assert np.isnan(got[255])
    as_dtype = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    np.testing.assert_array_equal(quant.decode_e8m0(as_dtype).double().numpy(), got)


def test_all_fp4_bytes_unpack_as_the_oracle_says():
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    got = quant.unpack_fp4_weight(
        packed.view(torch.int8), torch.full((1, 16), 128, dtype=torch.uint8), dtype=torch.float32
    )
    expected = (
        np.stack([oracle.E2M1[np.arange(256) & 15], oracle.E2M1[np.arange(256) >> 4]], 1).reshape(1, 512) * 2
    )
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (5, 7), (256, 1)])
def test_fp8_weight_blocks_each_have_their_own_scale(shape):
    torch.manual_seed(3)
    weight = torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None]
    codes, scale = quant.pack_fp8_weight(weight)
    assert codes.shape == shape and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = quant.unpack_fp8_weight(codes, scale, dtype=torch.float32)
    for i in range(0, shape[0], 128):
        for j in range(0, shape[1], 128):
            tile = weight[i : i + 128, j : j + 128]
            expected = oracle.fp8(tile.flatten().numpy(), block=128 * 128)
            np.testing.assert_array_equal(back[i : i + 128, j : j + 128].flatten().numpy(), expected)
    assert torch.equal(quant.unpack_fp8_weight(codes, quant.decode_e8m0(scale), dtype=torch.float32), back)


def test_fp4_weight_round_trip_is_the_simulation_and_repacks_to_the_same_bytes():
    weight = torch.randn(3, 8, 64)
    packed, scale = quant.pack_fp4_weight(weight)
    assert packed.shape == (3, 8, 32) and scale.shape == (3, 8, 2)
    back = quant.unpack_fp4_weight(packed, scale, dtype=torch.float32)
    assert torch.equal(back, quant.quant_dequant_fp4(weight))
    # a block whose values all round below the top may shrink its scale: values stay
    assert torch.equal(quant.unpack_fp4_weight(*quant.pack_fp4_weight(back), dtype=torch.float32), back)


def test_misfitting_scales_and_widths_are_refused_with_both_shapes():
    with pytest.raises(CheckpointError, match=r"scale has shape \[1, 1\].*expects \[2, 3\]"):
        quant.unpack_fp8_weight(torch.zeros(200, 300).to(torch.float8_e4m3fn), torch.zeros(1, 1))
    with pytest.raises(CheckpointError, match=r"scale has shape \[4, 3\].*expects \[4, 2\]"):
        quant.unpack_fp4_weight(torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected uint8 x 584"):
        quant.unpack_entry(torch.zeros(583, dtype=torch.uint8), head_dim=512, rope_dim=64)
    with pytest.raises(ValueError, match="expected uint8 x 68"):
        quant.unpack_index_key(torch.zeros(67, dtype=torch.uint8), head_dim=128)
    with pytest.raises(ValueError, match="even number"):
        quant.pack_fp4_weight(torch.zeros(2, 3))


def test_all_lists_every_public_function():
    public = {
        n
        for n, v in vars(quant).items()
        if not n.startswith("_") and getattr(v, "__module__", "") == quant.__name__
    }
    assert sorted(quant.__all__) == quant.__all__ and public == set(quant.__all__)
