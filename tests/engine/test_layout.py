"""Offsets and byte counts of the cache, against the cost model."""

import pytest

from rorqual.engine.layout import CacheLayout
from rorqual.model import Config, cost


@pytest.mark.parametrize("name", ["pro", "flash", "tiny"])
def test_packed_content_is_what_the_cost_model_predicts_to_the_byte(name):
    config = Config.preset(name)
    layout = CacheLayout(config, "packed")
    for tokens in (0, 1, 3, 4, 127, 128, 129, 5000, 2**20):
        assert layout.content_bytes(tokens) == cost.kv_bytes(config, context=tokens)
    parts = cost.kv_breakdown(config, context=2**20)
    assert layout.pages(2**20) * layout.page_bytes == parts.csa + parts.index + parts.hca


def test_the_formats_sizes_are_those_of_the_report():
    layout = CacheLayout(Config.preset("pro"), "packed")
    assert (layout.entry_bytes, layout.key_bytes) == (584, 68)
    csa, hca = layout.layers[2], layout.layers[3]
    assert (csa.ratio, csa.entries_page, csa.keys_page) == (4, 32 * 584, 32 * 68)
    assert (hca.ratio, hca.entries_page, hca.keys_page) == (128, 584, 0)
    assert (csa.window.rows, csa.tail.rows, hca.tail.rows) == (128 + 16, 8 + 16, 128 + 16)
    assert csa.tail.row_bytes == 2 * 2 * 512 * 4 and csa.index_tail.row_bytes == 2 * 2 * 128 * 4


@pytest.mark.parametrize("cache_format", ["exact", "packed"])
def test_rings_are_aligned_and_do_not_overlap(cache_format):
    layout = CacheLayout(Config.preset("tiny"), cache_format, slack=5, mtp_layers=1)
    assert len(layout.layers) == 6
    rings = [r for layer in layout.layers for r in (layer.window, layer.tail, layer.index_tail) if r]
    rings.sort(key=lambda ring: ring.at)
    assert all(ring.at % 64 == 0 for ring in rings)
    ends = [ring.at + ring.nbytes for ring in rings]
    assert all(end <= ring.at for end, ring in zip(ends, rings[1:], strict=False))
    assert ends[-1] <= layout.slab_bytes


@pytest.mark.parametrize(("kwargs", "match"), [({"cache_format": "fp8"}, "fp8"), ({"slack": -1}, "slack")])
def test_bad_choices_are_refused_by_name(kwargs, match):
    with pytest.raises(ValueError, match=match):
        CacheLayout(Config.preset("tiny"), **kwargs)
