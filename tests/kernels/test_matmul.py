"""The native matrix kernels, level by level: against torch and float64, every code, any cut, and bad input.

Tolerance: fp32 sums in another order differ by some units of 2^-24 of the sum of magnitudes, growing with the length of
a lane's chain; 4 units and 1 more per 16 products are far above what is seen and far below one wrong weight.
The float64 oracle decodes the formats by their definition, not by the code under test.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import cpu_status, matmul, matmul_cpu

available = cpu_status()
pytestmark = pytest.mark.skipif(not available.available, reason=available.reason)
KINDS = [("f32", None), ("bf16", None), ("fp8", 128), ("fp8", 32), ("fp4", 32)]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture(params=available.levels)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def e4m3(code: int) -> float:
    exponent, fraction = code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    magnitude = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return -magnitude if code & 128 else magnitude


FP8 = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)
FP4 = torch.tensor([v * sign for sign in (1, -1) for v in E2M1], dtype=torch.float64)


def make(
    kind: str, outputs: int, k: int, *, block: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Weights of every code but NaN, scales around 1."""
    g = torch.Generator().manual_seed(seed)
    if kind in ("f32", "bf16"):
        return torch.randn(outputs, k, generator=g).to(
            torch.float32 if kind == "f32" else torch.bfloat16
        ), None
    if kind == "fp8":
        assert block
        codes = torch.randint(0, 254, (outputs, k), generator=g, dtype=torch.uint8)
        codes = torch.where(codes >= 127, codes + 1, codes)  # without 127 and 255
        shape = (-(-outputs // block), -(-k // block))
        return codes, torch.randint(118, 124, shape, generator=g, dtype=torch.uint8)
    codes = torch.randint(0, 256, (outputs, k // 2), generator=g, dtype=torch.uint8)
    return codes, torch.randint(122, 130, (outputs, -(-k // 32)), generator=g, dtype=torch.uint8)


def oracle(
    x: Tensor, weight: Tensor, scale: Tensor | None, *, kind: str, block: int | None
) -> tuple[Tensor, Tensor]:
    """The product in float64, and the product of the magnitudes."""
    rows, w = x.double(), weight.double() if scale is None else None
    if kind != "f32":
        rows = x.bfloat16().double()
    if scale is not None:
        assert block
        nibbles = torch.stack((weight & 15, weight >> 4), -1).flatten(1)
        w = FP8[weight.long()] if kind == "fp8" else FP4[nibbles.long()]
        outputs, k = w.shape
        factor = torch.where(scale == 255, torch.nan, 2.0 ** (scale.double() - 127)).repeat_interleave(
            block, 1
        )
        if kind == "fp8":
            factor = factor.repeat_interleave(block, 0)
        w = w * factor[:outputs, :k]
    assert w is not None
    return rows @ w.T, rows.abs() @ w.abs().T


def close(y: Tensor, expected: Tensor, magnitude: Tensor, k: int) -> bool:
    return bool(((y.double() - expected).abs() <= (4 + k / 16) * 2.0**-24 * magnitude + 1e-37).all())


def shapes() -> Iterator[tuple[int, int, int]]:
    """Rows, outputs, K: odd outputs, K below and beside every vector length, block edges, more rows than a block."""
    yield from (
        (1, 1, 2),
        (2, 3, 6),
        (5, 9, 30),
        (7, 130, 34),
        (1, 133, 66),
        (6, 17, 96),
        (13, 40, 126),
        (3, 129, 190),
    )
    yield from ((1, 64, 512), (97, 12, 258), (100, 71, 320), (4, 8, 2050))


@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_every_level_computes_what_the_formats_say(level: str, kind: Any, block: int | None) -> None:
    for rows, outputs, k in shapes():
        weight, scale = make(kind, outputs, k, block=block, seed=k)
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1))
        y = matmul_cpu(x, weight, scale, kind=kind, block=block, level=level)
        assert close(y, *oracle(x, weight, scale, kind=kind, block=block), k), (rows, outputs, k)
        reference = matmul(x, weight, scale, kind=kind, block=block)
        assert close(reference, *oracle(x, weight, scale, kind=kind, block=block), k), (rows, outputs, k)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_odd_widths(level: str, kind: Any) -> None:
    for k in (1, 3, 15, 17, 31, 33, 63, 65, 127):
        weight, _ = make(kind, 11, k)
        x = torch.randn(8, k, generator=torch.Generator().manual_seed(k))
        y = matmul_cpu(x, weight, kind=kind, level=level)
        assert close(y, *oracle(x, weight, None, kind=kind, block=None), k), k


@pytest.mark.parametrize("block", [128, 32])
@pytest.mark.parametrize("k", [33, 63, 95, 161])
def test_fp8_of_odd_width(level: str, block: int, k: int) -> None:
    weight, scale = make("fp8", 35, k, block=block)
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(k))
    y = matmul_cpu(x, weight, scale, kind="fp8", block=block, level=level)
    assert close(y, *oracle(x, weight, scale, kind="fp8", block=block), k)


@pytest.mark.parametrize(("kind", "block"), KINDS)
def test_a_result_has_the_same_bits_among_any_rows_and_outputs(
    level: str, kind: Any, block: int | None
) -> None:
    for outputs, k in ((150, 290), (37, 128), (9, 1026)):
        weight, scale = make(kind, outputs, k, block=block)
        x = torch.randn(103, k, generator=torch.Generator().manual_seed(2))
        whole = matmul_cpu(x, weight, scale, kind=kind, block=block, level=level)
        for rows in (*range(1, 14), 24, 96, 97):
            some = matmul_cpu(x[:rows], weight, scale, kind=kind, block=block, level=level)
            assert torch.equal(some, whole[:rows]), rows
        for row in (50, 102):
            assert torch.equal(
                matmul_cpu(x[row], weight, scale, kind=kind, block=block, level=level), whole[row]
            )
        cuts = [0, 1, 6, 7, 33, 36, 37, 127, 129, 150]
        for first, last in itertools.pairwise(c for c in cuts if c <= outputs):
            for rows in (1, 5, 103):
                part = matmul_cpu(
                    x[:rows], weight, scale, kind=kind, block=block, level=level, outputs=range(first, last)
                )
                assert torch.equal(part, whole[:rows, first:last]), (rows, first, last)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("block", [128, 32])
def test_all_fp8_codes_under_all_scales(level: str, rows: int, block: int) -> None:
    """Output c is code c of one column; subnormals count, 127 and 255 are NaN, so is scale 255."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    x = torch.full((rows, 1), 0.5)
    for byte in range(256):
        scale = torch.full((256 // block, 1), byte, dtype=torch.uint8)
        y = matmul_cpu(x, codes, scale, kind="fp8", block=block, level=level)
        _same_weights(y, FP8 * (torch.nan if byte == 255 else 2.0 ** (byte - 127)))


@pytest.mark.parametrize("rows", [1, 2])
def test_all_fp4_codes_under_all_scales(level: str, rows: int) -> None:
    """Output 16 h + l has low nibble l in its first column, high nibble h in its second."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    for byte, column in itertools.product(range(256), range(2)):
        x = torch.zeros(rows, 2)
        x[:, column] = 0.5
        scale = torch.full((256, 1), byte, dtype=torch.uint8)
        y = matmul_cpu(x, codes, scale, kind="fp4", level=level)
        nibbles = torch.arange(256) >> 4 * column & 15
        expected = FP4[nibbles] * (torch.nan if byte == 255 else 2.0 ** (byte - 127))
        if byte > 252:  # the other column may be infinite, and 0 times infinity is NaN
            other = FP4[torch.arange(256) >> 4 * (1 - column) & 15] * 2.0 ** (byte - 127)
            expected = torch.where(other.abs() >= 2.0**128, torch.nan, expected)
        _same_weights(y, expected)


def _same_weights(y: Tensor, weight: Tensor) -> None:
    """y is half of each weight, or 0 or near where the weight is below bf16's normal range; 2^128 is infinite."""
    weight = torch.where(weight.abs() >= 2.0**128, weight.sign() * torch.inf, weight)
    tiny = weight.abs() < 2.0**-125  # half of it, the product, may be flushed too
    for row in y.double():
        assert torch.equal(row.isnan(), weight.isnan())
        assert torch.equal(row[~tiny].nan_to_num(7.0), (weight / 2)[~tiny].nan_to_num(7.0))
        assert bool((row[tiny].abs() <= 2.0**-126).all())


def test_scales_of_neighbouring_blocks_stay_apart(level: str) -> None:
    """Blocks of 0, NaN and huge scales beside ordinary ones: only their own products see them."""
    for kind, block in (("fp8", 32), ("fp8", 128), ("fp4", 32)):
        k = 4 * block + 6
        weight, scale = make(kind, 2 * block, k, block=block)
        assert scale is not None
        scale[:, 1], scale[:, 3] = 0, 255
        x = torch.randn(3, k, generator=torch.Generator().manual_seed(3))
        x[:2, 3 * block : 4 * block] = 0
        y = matmul_cpu(x, weight, scale, kind=kind, block=block, level=level)  # type: ignore[arg-type]
        assert bool(y.isnan().all())  # 0 times NaN
        scale[:, 3] = 1
        y = matmul_cpu(x, weight, scale, kind=kind, block=block, level=level)  # type: ignore[arg-type]
        assert close(y, *oracle(x, weight, scale, kind=kind, block=block), k)


def test_not_a_number_and_infinities_of_x_pass(level: str) -> None:
    for kind, block in KINDS:
        weight, scale = make(kind, 5, 70, block=block)
        if kind == "fp8":
            weight[:] = 56  # 1.0
        elif kind == "fp4":
            weight[:] = 0x22  # 1.0, 1.0
        else:
            weight[:] = 1.0
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.ones(3, 70)
            x[1, 69] = bad
            y = matmul_cpu(x, weight, scale, kind=kind, block=block, level=level)  # type: ignore[arg-type]
            assert bool(y[[0, 2]].isfinite().all())
            assert bool(y[1].isnan().all() if bad != bad else (y[1] == bad).all())


def test_rounding_of_activations_is_to_nearest_even(level: str) -> None:
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, -0x407E8000], dtype=torch.int32
    )
    x = bits.view(torch.float32)[:, None]
    assert torch.equal(matmul_cpu(x, weight, kind="bf16", level=level), x.bfloat16().float())


def test_empty_products(level: str) -> None:
    weight, _ = make("bf16", 6, 32)
    assert matmul_cpu(torch.ones(0, 32), weight, kind="bf16", level=level).shape == (0, 6)
    assert matmul_cpu(torch.ones(2, 32), weight, kind="bf16", outputs=range(3, 3), level=level).shape == (
        2,
        0,
    )
    assert matmul_cpu(torch.ones(2, 3, 32), weight, kind="bf16", level=level).shape == (2, 3, 6)


@pytest.mark.parametrize("face", [matmul, matmul_cpu])
def test_bad_input_is_refused_before_pointers_cross(face: Any) -> None:
    x, (weight, scale) = torch.ones(2, 64), make("fp8", 130, 64, block=128)
    assert scale is not None
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((x, weight, scale), {"kind": "int8"}, "kind 'int8'"),
        ((x.double(), weight, scale), {"kind": "fp8"}, "x: torch.float64"),
        ((torch.ones(2, 63), weight, scale), {"kind": "fp8"}, r"expects float32 \[..., 64\]"),
        ((x, weight), {"kind": "fp8"}, "needs its scale"),
        ((x, weight, scale), {"kind": "fp8", "block": 64}, "blocks of 64"),
        ((x, weight, scale), {"kind": "fp8", "block": 32}, r"expected contiguous uint8 \[5, 2\]"),
        ((x, weight, scale.float()), {"kind": "fp8"}, "scale of this fp8 weight: torch.float32"),
        ((x, weight, scale[:1]), {"kind": "fp8"}, r"\[1, 1\]"),
        ((x, weight[:, ::2], scale), {"kind": "fp8"}, "contiguous"),
        ((x, weight.float(), scale), {"kind": "fp8"}, "fp8 weight: torch.float32"),
        ((x, weight.float(), scale), {"kind": "f32"}, "has no scale"),
        ((x, weight, scale), {"kind": "fp4"}, r"expects float32 \[..., 128\]"),
        ((x[0, 0], weight, scale), {"kind": "fp8"}, "x: "),
        ((torch.ones(2, 0), torch.ones(3, 0)), {"kind": "f32"}, "x: "),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            face(*args, **options)


def test_outputs_and_levels_that_are_not_there() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    for outputs in (range(0, 5), range(-1, 2), range(0, 4, 2), range(3, 2)):
        with pytest.raises(ValueError, match="outputs"):
            matmul_cpu(x, weight, kind="f32", outputs=outputs)
    with pytest.raises(ValueError, match="does not run here"):
        matmul_cpu(x, weight, kind="f32", level="mmx")
