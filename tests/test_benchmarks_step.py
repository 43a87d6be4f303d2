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
    # The gate's verdict on every precision, on weights with outliers.
    assert set(read["gate"]) >= set(step.DTYPES) - {"int8"}
    assert read["gate"]["fp32"]["accepted"]
    assert all(len(verdict["cosines"]) == 11 for verdict in read["gate"].values())
    text = report.render([read])
    assert "frozen onednn fp32" in text
    assert "Error gate, outlier channels planted in the weights: fp32 accepted" in text
    assert "Bounds, not measurements" in text


def test_a_run_that_was_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, int, int]] = []

    def measure(preset: str, batch: int, views: int, *rest: object, **options: object) -> dict[str, object]:
        if (batch, views) == (4, 1) and len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((preset, batch, views))
        return {"rivals": [], "skipped": options["dropped"]}

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "gemm_gflops", lambda *shape: 100.0)
    call = ["--presets", "vit-tiny", "--batches", "1", "4", "--views", "1", "2", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        step.main(call)
    assert ran == [("vit-tiny", 1, 1), ("vit-tiny", 1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-vit-tiny-B1-V{v}.json" for v in (1, 2)]
    ran.append(("", 0, 0))  # a third: no interruption now
    step.main(call)
    assert ran[3:] == [("vit-tiny", 4, 1), ("vit-tiny", 4, 2)]
    out = capsys.readouterr().out
    assert "step-vit-tiny-B1-V1.json is there; --again measures it again" in out
    assert "2 shapes to go, about" in out
    step.main([*call, "--again"])
    assert len(ran) == 9


def test_all_is_the_whole_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: dict[tuple[str, int, int], dict[str, str]] = {}

    def measure(preset: str, batch: int, views: int, *rest: object, **options: dict[str, str]) -> dict[str, object]:
        dropped[preset, batch, views] = options["dropped"]
        return {"rivals": [], "skipped": options["dropped"]}

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "gemm_gflops", lambda *shape: 170.0)
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda device: True)
    step.main(["--all", "--out", str(tmp_path)])
    assert len(dropped) == 27
    # Who is left out is in the file, with the reason.
    big = json.loads((tmp_path / "step-siglip2-so400m-B16-V2.json").read_text())["skipped"]
    assert "torch.compile fp32" in big
    assert step.END_TO_END in big
    assert "a forward of the reference takes about" in big["VAT fp32"]
    assert not any(dropped["vit-tiny", batch, 2] for batch in (1, 4, 16))
    assert set(dropped["siglip2-so400m", 1, 2]) == set(step.SLOW)
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda device: False)
    assert set(step.default_rivals("vit-tiny")[1]) == set(step.EMULATED)
