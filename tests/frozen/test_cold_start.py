"""Cold starts of a small model, each in a process of its own."""

import json
from pathlib import Path

import pytest

from benchmarks import cold_start, report
from benchmarks.step import save

SMALL = {"width": 64, "num_heads": 1, "depth": 3, "image_size": 32}


def test_every_part_is_timed_and_shown(tmp_path: Path) -> None:
    result = cold_start.measure("vit-tiny", ["reference fp32", "frozen fp32"], 1, **SMALL)
    assert result["skipped"] == {}
    result = json.loads(save(result, "cold", tmp_path).read_text())
    reference, frozen = result["rows"]
    for row in (reference, frozen):
        parts = [row[f"{part}_s"] for part in ("import", "load", "freeze", "first_step")]
        assert all(part > 0 for part in parts)
        # What is missing is the interpreter's own start.
        assert sum(parts) < row["total_s"]
        assert 50 < row["ready_mb"] <= row["peak_mb"] < 4000
    assert reference["import_s"] > 0.2  # torch is imported while the clock runs
    assert frozen["freeze_s"] > 10 * reference["freeze_s"]
    text = report.render([result])
    assert "## Cold start" in text
    assert "| **frozen fp32** |" in text


def test_who_cannot_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"frozen fp32 could not start: .*nowhere"):
        cold_start.start(tmp_path / "nowhere", "frozen fp32")
