"""Statistics for policies that nobody trained: robot units are the normalised ones, the last dimension is a gripper."""

from __future__ import annotations

import numpy as np

from vat_fast.actions import FieldStatistics, Statistics


def unit_statistics(action_dim: int) -> Statistics:
    """Under which un-normalising changes nothing."""
    one = np.ones(action_dim)
    mask = np.arange(action_dim) < action_dim - 1
    return Statistics("untrained", FieldStatistics(0 * one, one, -one, one, -one, one, mask))
