"""Packed matrix products and expert MLPs in Triton, against model/quant.py's values in torch."""

import pytest
import torch

from rorqual.model.moe import swiglu
from rorqual.model.quant import pack_fp4_weight, pack_fp8_weight, unpack_fp4_weight, unpack_fp8_weight
from tests.kernels.gpu_device import DEVICE

from rorqual.kernels.gpu import ops  # isort: skip


def weight_of(kind, outputs, width, *, block=None, seed=0):
    """(stored, scale, values fp32) of a random weight; scales differ from block to block."""
    generator = torch.Generator().manual_seed(seed)
    full = (
        torch.randn(outputs, width, generator=generator)
        * torch.rand(outputs, 1, generator=generator).exp2() ** 3
    )
    if kind == "f32":
        return full, None, full
    if kind == "bf16":
        return full.bfloat16(), None, full.bfloat16().float()
    if kind == "fp8":
        codes, scale = pack_fp8_weight(full, block=block or 128)
        return codes, scale, unpack_fp8_weight(codes, scale, block=block or 128, dtype=torch.float32)
    codes, scale = pack_fp4_weight(full)
    return codes, scale, unpack_fp4_weight(codes, scale, dtype=torch.float32)


CASES = [
    ("f32", None, 5, 33),
    ("bf16", None, 40, 130),
    ("fp8", 128, 130, 200),
    ("fp8", 32, 40, 33),
    ("fp4", 32, 40, 200),
    ("fp4", 32, 3, 34),
]


@pytest.mark.parametrize(("kind", "block", "outputs", "width"), CASES)
def test_products_equal_torch_and_a_row_its_product_alone(kind, block, outputs, width):
    weight, scale, values = weight_of(kind, outputs, width, block=block)
    x = torch.randn(37, width, generator=torch.Generator().manual_seed(1))
    on = [None if part is None else part.to(DEVICE) for part in (weight, scale)]
    got = ops.matmul(x.to(DEVICE), *on, kind=kind, block=block)
    want = (x if kind == "f32" else x.bfloat16().float()).double() @ values.double().T
    torch.testing.assert_close(got.cpu().double(), want, atol=1e-6 * want.abs().max().item(), rtol=1e-5)
    alone = ops.matmul(x[35].to(DEVICE), *on, kind=kind, block=block)
    assert torch.equal(alone, got[35])


def test_every_code_and_scale_byte_means_what_quant_says():
    codes = torch.arange(256, dtype=torch.uint8)
    for kind, data, unpack in (
        ("fp8", codes.view(torch.float8_e4m3fn)[:, None].expand(-1, 32), unpack_fp8_weight),
        ("fp4", codes[:, None].expand(-1, 16), unpack_fp4_weight),
    ):
        data = data.contiguous()
        scale = torch.full((8, 1) if kind == "fp8" else (256, 1), 124, dtype=torch.uint8)
        want = unpack(data, scale, block=32, dtype=torch.float32)
        got = ops.matmul(torch.eye(32)[:2].to(DEVICE), data.to(DEVICE), scale.to(DEVICE), kind=kind, block=32)
        # a NaN code makes its whole row NaN, through 0 * NaN
        assert torch.equal(got.cpu().T.nan_to_num(7e9), want[:, :2].nan_to_num(7e9))
    ones, scales = torch.full((256, 16), 0x22, dtype=torch.uint8), codes[:, None].contiguous()
    got = ops.matmul(torch.eye(32)[:1].to(DEVICE), ones.to(DEVICE), scales.to(DEVICE), kind="fp4")[0].cpu()
    assert torch.equal(got[1:255], torch.exp2(torch.arange(1, 255).float() - 127)) and got[255].isnan()
    assert got[0].item() == 2.0**-127


@pytest.mark.parametrize(("kind", "tokens", "limit"), [("fp4", 3, 10.0), ("bf16", 40, 0.5), ("fp8", 1, 0.0)])
def test_expert_mlp_equals_torch(kind, tokens, limit):
    torch.manual_seed(2)
    experts, hidden, width, top_k = 5, 70, 36, 2
    sizes = ((width, hidden), (width, hidden), (hidden, width))
    stacks, values = [], []
    for number, size in enumerate(sizes):
        parts = [weight_of(kind, *size, seed=10 * number + e) for e in range(experts)]
        scale = None if parts[0][1] is None else torch.stack([part[1] for part in parts]).to(DEVICE)
        stacks.append(
            (
                torch.stack([part[0].view(torch.uint8) if kind == "fp8" else part[0] for part in parts]).to(
                    DEVICE
                ),
                scale,
            )
        )
        values.append([part[2] for part in parts])
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    picked = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    picked[:, 0] = (
        torch.where(picked[:, 0] == 3, 3, 0) if tokens > 32 else picked[:, 0]
    )  # more than a tile of one

    def call(part):
        return ops.expert_mlp(
            *(x[part].to(DEVICE), picked[part].to(DEVICE), weights[part].to(DEVICE)),
            w1=stacks[0],
            w3=stacks[1],
            w2=stacks[2],
            kind=kind,
            limit=limit,
        ).cpu()

    got, want = call(slice(None)), torch.zeros(tokens, hidden)
    narrow = x.bfloat16().float()
    for t in range(tokens):
        for k, e in enumerate(picked[t].tolist()):
            inner = swiglu(narrow[t] @ values[0][e].T, narrow[t] @ values[1][e].T, limit)
            want[t] += weights[t, k] * (inner.bfloat16().float() @ values[2][e].T)
    # an inner value on the edge between two bf16 may fall to either side
    torch.testing.assert_close(got, want, atol=1e-3 * want.abs().max().item(), rtol=1e-3)
    assert torch.equal(call(slice(tokens - 1, tokens))[0], got[-1])


def test_a_pick_of_no_expert_is_nan_for_its_token_only():
    stacks = [(torch.ones(2, *size, device=DEVICE), None) for size in ((4, 8), (4, 8), (8, 4))]
    picked = torch.tensor([[0, 1], [0, 2], [-1, 0], [1, 0]], device=DEVICE)
    out = ops.expert_mlp(
        *(torch.ones(4, 8, device=DEVICE), picked, torch.ones(4, 2, device=DEVICE)),
        w1=stacks[0],
        w3=stacks[1],
        w2=stacks[2],
        kind="f32",
        limit=0.0,
    )
    assert out.isnan().all(1).tolist() == [False, True, True, False] and not out[[0, 3]].isnan().any()


def test_products_refuse_what_does_not_fit():
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(8, 32, dtype=torch.uint8, device=DEVICE)
    scale = torch.zeros(8, 2, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="kind 'fp5'"):
        ops.matmul(x, weight, scale, kind="fp5")
    with pytest.raises(ValueError, match="a fp4 weight needs its scale"):
        ops.matmul(x, weight, kind="fp4")
    with pytest.raises(ValueError, match=r"scale torch.uint8 \[7, 2\], expected contiguous ue8m0 \[8, 2\]"):
        ops.matmul(x, weight, scale[:7], kind="fp4")
    with pytest.raises(ValueError, match=r"this fp4 weight expects float32 \[..., 64\]"):
        ops.matmul(x[:, :63], weight, scale, kind="fp4")
    with pytest.raises(ValueError, match="blocks of 64"):
        ops.matmul(x, weight, scale, kind="fp8", block=64)
    with pytest.raises(ValueError, match="expected contiguous"):
        ops.matmul(x, weight.T, scale, kind="fp4")
    with pytest.raises(ValueError, match="do not fit x"):
        stack = (torch.zeros(2, 4, 64, device=DEVICE), None)
        picks = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
        ops.expert_mlp(x, picks, x[:, :1], w1=stack, w3=stack, w2=stack, kind="f32", limit=0.0)
