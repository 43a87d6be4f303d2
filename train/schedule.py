"""The learning rate over a run: linear warm-up, then half a cosine.

The authors' code (github.com/sellerbubble/V_A_T, scripts/train_vat.py, read at commit 7e2374e) trains with PyTorch's
AdamW at its defaults (weight decay 0.01 on every parameter, betas 0.9 and 0.999, eps 1e-8), one parameter group, no
gradient clipping, and a `LambdaLR` that is stepped once per optimiser step: the first step has a rate of zero, the
peak is reached after int(0.1 * total) steps, and the cosine would reach 1e-7 one step behind the last.
"""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, warmup_fraction: float = 0.1, final: float = 1e-7) -> float:
    """The learning rate of one optimiser step.

    Args:
        step: counted from 0.
        total: optimiser steps of the run; a step behind the last has the rate `final`.
        peak: the highest rate.
        warmup_fraction: of the steps, rounded down, over which the rate rises linearly from 0.
        final: the rate that the cosine ends at.

    Raises:
        ValueError: a negative step, no steps at all, or a fraction that is none.
    """
    if step < 0 or total < 1 or not 0 <= warmup_fraction < 1:
        raise ValueError(
            "a schedule needs a step of at least 0, a total of at least 1 and a warm-up fraction from 0 to below 1, "
            f"got step {step}, total {total}, warm-up {warmup_fraction}"
        )
    warmup = int(total * warmup_fraction)
    if step < warmup:
        return peak * step / warmup
    progress = min((step - warmup) / max(1, total - warmup), 1.0)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
