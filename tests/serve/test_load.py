"""The load benchmark for 20 seconds: 64 clients that hang up at random, a cache too small; every answer is right."""

import pytest
from benchmarks import serve_load


@pytest.mark.slow
def test_no_answer_is_lost_or_mixed_up_under_load():
    report = serve_load.run(serve_load.EMBEDDED, clients=64, seconds=20, count=12, kv="4m")
    assert report["answers"]["wrong"] == report["answers"]["lost"] == report["answers"]["refused"] == 0, (
        report
    )
    assert report["answers"]["right"] > 20 and report["answers"]["hung_up"] > 0
    assert report["cache"].get("from disk", 0) > 0, report["cache"]
    assert report["resident_mb"]["growth"] < 0.15
