"""The policy step under pytest-benchmark: each rival paired, round by round, with the eager fp32 reference.

    pytest benchmarks --benchmark-only                                  # or: make bench
    pytest benchmarks --benchmark-only --benchmark-json out.json        # with conditions, ratio and error in the file
    pytest benchmarks --benchmark-only --presets vit-tiny --batches 1,4,16 --views 1,2,3

A rival that computes something else, or whose package is missing, is skipped with the reason. `python -m
benchmarks.step` measures all rivals in one run and writes the files behind docs/performance.md.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.interleave import conditions, summarise
from benchmarks.rivals import Problem, build
from benchmarks.step import FEW_ROUNDS, ROUNDS


@pytest.fixture(scope="module")
def problem(shape: tuple[str, int, int]) -> Problem:
    """Weights and inputs of one preset, batch and number of views, made once for all its rivals."""
    return Problem.make(*shape)


def test_step(benchmark: Any, problem: Problem, shape: tuple[str, int, int], rival: str) -> None:
    preset, batch, views = shape
    try:
        made = build(rival, problem)
    except (ImportError, ArithmeticError, RuntimeError, ValueError) as error:
        pytest.skip(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    theirs: list[float] = []

    def time_reference() -> None:
        start = time.perf_counter()
        problem.reference(problem.pixels, problem.task_id)
        theirs.append(time.perf_counter() - start)

    rounds = max(ROUNDS.get(preset, FEW_ROUNDS) // (5 * batch), 3)
    with torch.inference_mode():
        benchmark.pedantic(made.call, setup=time_reference, rounds=rounds, warmup_rounds=2)
    own = benchmark.stats.stats.data
    timing = summarise(own, theirs[-len(own) :])
    benchmark.extra_info.update(
        preset=preset,
        batch=batch,
        views=views,
        rival=rival,
        error=made.error,
        build_seconds=made.build_seconds,
        speedup_median=timing.ratio,
        speedup_range=[timing.ratio_low, timing.ratio_high],
        **conditions(0),
    )
