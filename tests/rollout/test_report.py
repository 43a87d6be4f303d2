"""The reports say what the records say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vat_fast.rollout.evaluate import EvaluationResult
from vat_fast.rollout.records import EpisodeKey, EpisodeRecord
from vat_fast.rollout.report import rows, text_report, write_reports
from vat_fast.rollout.settings import EvaluationSettings
from vat_fast.rollout.video import choose_episodes, parse_choice

SETTINGS = EvaluationSettings("toy", tasks=(4, 1), init_states=(0, 1, 2), max_steps=30)
NAMES = {4: "push <the> cube", 1: "open the drawer"}


def make(successes: dict[tuple[int, int], bool], lost: tuple[EpisodeKey, ...] = ()) -> EvaluationResult:
    records = [
        EpisodeRecord("toy", task, NAMES[task], state, 7, success, 10 + state, "", [5.0, 7.0], [20.0 + state], 2.0)
        for (task, state), success in successes.items()
    ]
    return EvaluationResult(SETTINGS, tuple(records), dict.fromkeys(lost, "it died"), resumed=1, seconds=10)


RESULT = make({(4, 0): True, (4, 1): False, (4, 2): True, (1, 0): False, (1, 1): False}, lost=(EpisodeKey(1, 2),))


class Cells(HTMLParser):
    """The text of a page's table rows, and whether every tag that needs closing is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("table", "tr", "td", "th", "svg", "video", "figure", "h1", "h2", "p"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_rows_count_successes() -> None:
    first, second, total = rows(RESULT)
    assert (first.task, first.successes, first.episodes, first.mean_steps) == (4, 2, 3, 11)
    assert (second.task, second.successes, second.episodes, second.low) == (1, 0, 2, 0.0)
    assert (total.task, total.successes, total.episodes) == (None, 2, 5)
    assert first.low == pytest.approx(0.2077, abs=1e-4)  # Wilson, 2 of 3
    assert first.high == pytest.approx(0.9385, abs=1e-4)
    assert RESULT.success_rate == pytest.approx(0.4)
    assert RESULT.episodes_per_hour == pytest.approx(4 * 360)


def test_the_table_in_the_terminal() -> None:
    text = text_report(RESULT)
    assert re.search(r"4 +push <the> cube +2/3 +66\.7 % +20\.8 % to 93\.9 % +11$", text, re.M)
    assert re.search(r"all tasks +2/5 +40\.0 %", text)
    assert "predict: median 6.0, p90 7.0, p99 7.0, max 7.0 ms (10)" in text
    assert "observe: median 21.0, p90 21.6" in text
    assert text.endswith("run the command again to try once more: task01_init002")


def test_page_and_json_have_tables_conditions_videos_and_baseline(tmp_path: Path) -> None:
    baseline = make({(4, 0): False, (4, 1): True, (4, 2): False, (1, 0): False, (1, 1): False})
    videos = [tmp_path / "videos" / "a.mp4"]
    page = write_reports(
        tmp_path,
        RESULT,
        {"cpu": "a <fast> one"},
        title="x & y",
        videos=videos,
        baseline=baseline,
        baseline_name="blind",
    )
    text = page.read_text()
    cells = Cells(text)
    assert not cells.open
    assert ["4", "push <the> cube", "2/3", "66.7 %", "20.8 % to 93.9 %", "", "11", "1/3"] in cells.rows
    assert ["", "all tasks", "2/5", "40.0 %", "11.8 % to 76.9 %", "", "11", "1/5"] in cells.rows
    assert ["predict", "6.0", "7.0", "7.0", "7.0", "10"] in cells.rows
    assert ["cpu", "a <fast> one"] in cells.rows
    assert ["task01_init002", "it died"] in cells.rows
    assert "blind" in cells.rows[0]
    assert '<video src="videos/a.mp4"' in text
    assert "x &amp; y" in text
    content = json.loads((tmp_path / "result.json").read_text())
    assert [row["rate"] for row in content["tasks"]] == pytest.approx([2 / 3, 0, 0.4])
    assert content["tasks"][1]["mean_steps"] is None
    assert content["settings"]["init_states"] == [0, 1, 2]
    assert content["baseline"][0]["successes"] == 1
    assert content["unfinished"] == {"task01_init002": "it died"}


def test_episodes_for_videos() -> None:
    records = RESULT.records
    assert choose_episodes("failures", records) == [(4, 1), (1, 0), (1, 1)]
    assert choose_episodes("first", records) == [(4, 0), (1, 0)]
    assert choose_episodes("1:1, 4:2", records) == [(4, 2), (1, 1)]
    for wrong in ("all", "3", "0:x", "0:1,"):
        with pytest.raises(ValueError, match=r"first, failures or TASK:STATE"):
            parse_choice(wrong)
