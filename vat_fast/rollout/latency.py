"""Percentiles of what was timed inside the control loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class LatencySummary:
    """Percentiles of some latencies, in milliseconds; `count` is how many there were."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float

    def to_dict(self) -> dict[str, float]:
        """The fields as JSON knows them."""
        return asdict(self)

    def __str__(self) -> str:
        return f"median {self.p50:.1f}, p90 {self.p90:.1f}, p99 {self.p99:.1f}, max {self.max:.1f} ms ({self.count})"


def summarise(milliseconds: Sequence[float]) -> LatencySummary | None:
    """Percentiles (linear interpolation) of latencies in milliseconds; None where there are none."""
    if not len(milliseconds):
        return None
    p50, p90, p99 = np.percentile(milliseconds, [50, 90, 99])
    return LatencySummary(len(milliseconds), float(p50), float(p90), float(p99), float(max(milliseconds)))
