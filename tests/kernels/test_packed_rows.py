"""Cache rows of the native library against model/quant.py, byte for byte, at every level this machine runs."""

import pytest
import torch

from rorqual.kernels import cpu_status, hadamard, native_core
from rorqual.model import cost, quant

status = cpu_status()
pytestmark = pytest.mark.skipif(not status.available, reason=status.reason)
# head_dim, rope_dim: Pro and Flash, the embedded model, blocks that are not full, nothing quantised, all quantised.
WIDTHS = [(512, 64), (64, 16), (44, 12), (256, 64), (16, 16), (192, 0)]


@pytest.fixture(params=status.levels)
def rows(request):
    return native_core(request.param)


def values(count, width, seed=0):
    """Rows over sixty powers of two, with what rounding gets wrong first: ties, zeros, subnormals, large numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) * torch.logspace(-30, 30, count, base=2)[:, None]
    x[0] = 0.0
    x[1] = -0.0
    x[2] = torch.randint(-8, 9, (width,), generator=generator) / 16  # ties of both formats
    x[3] = 1e-40
    x[4] = 3e38
    x[5, :: max(1, width // 7)] = -3.4e38
    x[6] = torch.randn(width, generator=generator) * 2.0**-126
    return x


@pytest.mark.parametrize(("width", "rope"), WIDTHS)
def test_entries_are_the_bytes_of_the_torch_reference(rows, width, rope):
    x = values(64, width)
    packed = rows.pack_entries(x, rope_dim=rope)
    assert packed.shape[-1] == cost.entry_bytes(width, rope)
    assert torch.equal(packed, quant.pack_entry(x, rope_dim=rope))
    back = rows.unpack_entries(packed, width=width, rope_dim=rope)
    assert torch.equal(back, quant.unpack_entry(packed, head_dim=width, rope_dim=rope))
    assert torch.equal(rows.round_entries(x, rope_dim=rope), back)
    bf16 = rows.entries_to_bf16(packed, width=width, rope_dim=rope)
    normal = (back.abs() >= 2.0**-126) | (
        back == 0
    )  # below, the conversion may round a number that bf16 cannot hold
    assert torch.equal(bf16.float()[normal], back[normal])


@pytest.mark.parametrize("width", [128, 32, 64, 40, 7])
def test_keys_are_the_bytes_of_the_torch_reference(rows, width):
    x = values(64, width, seed=1)
    packed = rows.pack_keys(x)
    assert packed.shape[-1] == cost.index_key_bytes(width)
    assert torch.equal(packed, quant.pack_index_key(x))
    back = rows.unpack_keys(packed, width=width)
    assert torch.equal(back, quant.unpack_index_key(packed, head_dim=width))
    assert torch.equal(rows.round_keys(x), back)


@pytest.mark.parametrize("boundary", [448.0, 1.75, 6.0, 1.5, 1e-4, 6 * 2.0**-126])
def test_scales_change_exactly_where_the_reference_changes_them(rows, boundary):
    """amax one ulp below, at and above what a scale can hold, at many exponents."""
    amax = torch.tensor([boundary * 2.0**e for e in range(-60, 61, 7) if boundary * 2.0**e < 3e38])
    amax = torch.cat([amax.nextafter(torch.zeros(())), amax, amax.nextafter(torch.tensor(torch.inf))])
    x = torch.rand(len(amax), 128, generator=torch.Generator().manual_seed(2)) * amax[:, None]
    x[:, 5] = -amax
    x[:, 100] = amax
    assert torch.equal(rows.pack_entries(x, rope_dim=0), quant.pack_entry(x, rope_dim=0))
    assert torch.equal(rows.pack_keys(x), quant.pack_index_key(x))


def test_every_code_at_every_kind_of_scale(rows):
    codes = torch.arange(256, dtype=torch.uint8)
    for scale in (0, 1, 8, 9, 10, 11, 127, 128, 239, 240, 246, 247, 254, 255):
        scales = torch.tensor([scale] * 4 + [0] * 4, dtype=torch.uint8)
        row = torch.cat([codes, torch.zeros(128, dtype=torch.uint8), scales])[None]
        back = rows.unpack_entries(row, width=320, rope_dim=64)
        want = quant.unpack_entry(row, head_dim=320, rope_dim=64)
        assert torch.equal(back.isnan(), want.isnan())
        assert torch.equal(back.nan_to_num(7.0), want.nan_to_num(7.0)), scale
        bf16, rounded = rows.entries_to_bf16(row, width=320, rope_dim=64), want.bfloat16()
        same = bf16.view(torch.int16) == rounded.view(torch.int16)
        assert bool((same | (bf16.isnan() & rounded.isnan())).all()), scale
        key = torch.cat([codes[:64], scales[:4]])[None]
        back, want = rows.unpack_keys(key, width=128), quant.unpack_index_key(key, head_dim=128)
        assert torch.equal(back.isnan(), want.isnan())
        assert torch.equal(back.nan_to_num(7.0), want.nan_to_num(7.0)), scale


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_a_bad_number_is_bad_as_a_whole(rows, bad):
    x = values(16, 192, seed=3)
    x[7, 70] = bad
    packed = rows.pack_entries(x, rope_dim=64)
    assert torch.equal(packed, quant.pack_entry(x, rope_dim=64))
    back = rows.unpack_entries(packed, width=192, rope_dim=64)
    assert bool(back[7, 64:128].isnan().all())
    assert not bool(back[7, :64].isnan().any())
    keys = rows.pack_keys(x)
    assert torch.equal(keys, quant.pack_index_key(x))
    assert bool(rows.unpack_keys(keys, width=192)[7, 64:96].isnan().all())


def test_exact_rows_keep_every_bit(rows):
    x = values(16, 44, seed=4)
    packed = rows.pack_entries(x, rope_dim=12, cache_format="exact")
    assert packed.shape[-1] == 4 * 44
    assert torch.equal(rows.unpack_entries(packed, width=44, rope_dim=12, cache_format="exact"), x)
    assert torch.equal(
        rows.unpack_keys(rows.pack_keys(x, cache_format="exact"), width=44, cache_format="exact"), x
    )


@pytest.mark.parametrize("width", [1, 32, 128, 512])
def test_hadamard_is_the_reference(rows, width):
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(rows.hadamard(x), hadamard(x), rtol=0, atol=2e-6)


def test_bad_rows_are_refused(rows):
    with pytest.raises(ValueError, match="expected uint8"):
        rows.unpack_entries(torch.zeros(2, 583, dtype=torch.uint8), width=512, rope_dim=64)
    with pytest.raises(ValueError, match="expected fp32"):
        rows.pack_entries(torch.zeros(2, 512, dtype=torch.bfloat16), rope_dim=64)
    with pytest.raises(ValueError, match="expected fp32"):
        rows.pack_keys(torch.zeros(2, 2000))
    with pytest.raises(ValueError, match="rotating"):
        rows.pack_entries(torch.zeros(2, 64), rope_dim=65)
    with pytest.raises(ValueError, match="power of two"):
        rows.hadamard(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="cache format"):
        rows.pack_keys(torch.zeros(2, 32), cache_format="fp8")
    with pytest.raises(ValueError, match="does not run here"):
        native_core("avx9000")
