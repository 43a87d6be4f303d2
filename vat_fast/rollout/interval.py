"""How sure a success rate is."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion (E. B. Wilson, 1927): (low, high), both in [0, 1].

    It keeps its coverage near 0 and 1 and with few trials, where the normal interval does not. Without trials nothing
    is known: (0, 1).

    Raises:
        ValueError: more successes than trials, a negative count, or a confidence outside (0, 1).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be from 0 to the {trials} trials, got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, squared = successes / trials, z * z / trials
    centre = (rate + squared / 2) / (1 + squared)
    half = z * sqrt(rate * (1 - rate) / trials + squared / (4 * trials)) / (1 + squared)
    # At the ends the bound is exact; rounding must not push it past the rate.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high
