"""The arithmetic of the step benchmark, and a short soak."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report, step
from benchmarks.interleave import interleave, summarise
from benchmarks.rivals import Problem, build


def test_ratios_pair_rounds() -> None:
    timing = summarise([1.0, 2.0, 4.0], [4.0, 4.0, 4.0])
    assert timing.p50_ms == 2.0
    assert timing.ratio == 2.0
    assert timing.ratio_low == pytest.approx(np.percentile([4, 2, 1], 10))
    with pytest.raises(ValueError, match="rounds must pair up"):
        summarise([1.0], [1.0, 2.0])


def test_every_round_runs_everybody() -> None:
    order: list[str] = []
    calls = {name: (lambda n: lambda: order.append(n))(name) for name in ("a", "b")}
    timings, own = interleave(lambda: order.append("reference"), calls, rounds=3, warm_up=1)
    assert order == ["reference", "a", "b"] * 4
    assert len(own) == timings["a"].rounds == 3


def test_a_wrong_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import rivals

    problem = Problem.make("vit-tiny", 1, 1)
    monkeypatch.setitem(rivals.RIVALS, "wrong fp32", lambda p: lambda: p.truth * 1.001)
    with pytest.raises(ArithmeticError, match="no speed is reported for a wrong result"):
        build("wrong fp32", problem)


def test_results_become_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One real measurement of a few rounds, written, read and rendered."""
    monkeypatch.setattr(step, "floor_ms", lambda plan, dtype: (1.0, {"1x1x1": 1.0}))
    result = step.measure("vit-tiny", 1, 2, 2, ["VAT fp32", "frozen onednn fp32"])
    read = json.loads(step.save(result, "step", tmp_path).read_text())
    assert {row["name"] for row in read["rivals"]} == {"VAT fp32", "frozen onednn fp32"}
    assert all(row["error"] < 1e-5 for row in read["rivals"])
    assert {row["name"] for row in read["end_to_end"]} >= {"VAT fp32", "frozen fp32"}
    assert all(row["error"] < 1e-5 for row in read["end_to_end"] if row["name"].endswith("fp32"))
    text = report.render([read])
    assert "frozen onednn fp32" in text
    assert "Bounds, not measurements" in text
