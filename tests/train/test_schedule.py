"""The schedule is the authors', step by step."""

import math

import pytest
import torch

from vat_fast.train.schedule import learning_rate


@pytest.mark.parametrize("total", [1, 7, 50, 1234])
def test_equals_the_authors_lambda_lr(total: int) -> None:
    """AdamW at 2e-5 under LambdaLR as in github.com/sellerbubble/V_A_T, stepped once per optimiser step."""
    peak, lowest, warmup = 2e-5, 1e-7, int(total * 0.1)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = (step - warmup) / max(1, total - warmup)
        return lowest / peak + (1 - lowest / peak) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=peak)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(total + 3):
        assert learning_rate(step, total, peak, 0.1, lowest) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_marks() -> None:
    assert learning_rate(0, 100, 1.0) == 0
    assert learning_rate(5, 100, 1.0) == 0.5
    assert learning_rate(10, 100, 1.0) == 1.0
    assert learning_rate(55, 100, 1.0, final=0.0) == pytest.approx(0.5)
    assert learning_rate(100, 100, 1.0) == learning_rate(500, 100, 1.0) == pytest.approx(1e-7)
    assert learning_rate(0, 100, 1.0, warmup_fraction=0.0) == 1.0


@pytest.mark.parametrize(("step", "total", "fraction"), [(-1, 10, 0.1), (0, 0, 0.1), (0, 10, 1.0), (0, 10, -0.1)])
def test_impossible(step: int, total: int, fraction: float) -> None:
    with pytest.raises(ValueError, match="warm-up fraction"):
        learning_rate(step, total, 1.0, fraction)
