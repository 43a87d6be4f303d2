"""Wilson's interval against published values, and the percentiles of latencies."""

from __future__ import annotations

import pytest

from vat_fast.rollout.interval import wilson_interval
from vat_fast.rollout.latency import summarise


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_is_symmetric_and_narrows() -> None:
    low, high = wilson_interval(9, 10)
    assert wilson_interval(1, 10) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(90, 100)[0] > low
    assert wilson_interval(9, 10, confidence=0.5)[0] > low
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_impossible_counts() -> None:
    with pytest.raises(ValueError, match="from 0 to the 3 trials, got 4"):
        wilson_interval(4, 3)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 95"):
        wilson_interval(1, 3, confidence=95)


def test_percentiles() -> None:
    summary = summarise([float(ms) for ms in range(101)])
    assert summary is not None
    assert (summary.count, summary.p50, summary.p90, summary.p99, summary.max) == (101, 50, 90, 99, 100)
    assert str(summary) == "median 50.0, p90 90.0, p99 99.0, max 100.0 ms (101)"
    assert summarise([]) is None
