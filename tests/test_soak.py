"""Many steps of a frozen policy in a row, and that the soak would see a leak."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch

from benchmarks.soak import MOST_GROWTH_MB, Soak, frozen_step, soak, unsteadiness
from vat_fast import VATConfig
from vat_fast.frozen.cpu import has_integers

CLEAN = Soak(100, p50_ms=1.0, p90_ms=1.1, p99_ms=1.2, worst_ms=2.0, first_mb=50.0, last_mb=50.5, growth_mb=0.5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int16", "int8"])
def test_memory_does_not_grow(dtype: str) -> None:
    if dtype == "int8":
        pytest.importorskip("openvino")
    if dtype == "int16" and not has_integers():
        pytest.skip("the native operators have no integers here")
    step = frozen_step(VATConfig.from_preset("vit-tiny", width=64, num_heads=1, depth=3, image_size=32), dtype)
    found = soak(step, 300, warm_up=100, progress=False)
    assert found.growth_mb < MOST_GROWTH_MB
    assert 0 < found.p50_ms <= found.p90_ms <= found.p99_ms <= found.worst_ms


def test_a_leak_is_seen() -> None:
    kept: list[bytearray] = []
    found = soak(lambda: kept.append(bytearray(b"x" * 200_000)), 300, warm_up=10, progress=False)
    assert found.growth_mb == pytest.approx(300 * 200_000 / 2**20, rel=0.15)
    assert "memory grows" in found.failures[0]


def test_limits() -> None:
    assert CLEAN.failures == []
    slow = dataclasses.replace(CLEAN, p99_ms=1.31)
    assert slow.failures == ["p99 is 1.31 times p50, limit 1.3"]
    slow = dataclasses.replace(slow, machine_p99_over_p50=1.25)
    assert slow.failures[0].endswith("; for plain matrix products of that length it is 1.25 times")


def test_the_machines_own_unsteadiness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 1 ms, every tenth of which takes 10."""
    calls = itertools.count()
    monkeypatch.setattr(torch, "mm", lambda *_, **__: time.sleep(0.01 if next(calls) % 10 == 0 else 0.001))
    assert 3 < unsteadiness(1.0, runs=50) < 30
    monkeypatch.setattr(torch, "mm", lambda *_, **__: time.sleep(0.005))
    assert unsteadiness(5.0, runs=20) < 3


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 10 steps, got 9"):
        soak(lambda: None, 9)
