"""What an evaluation found: the table for the terminal, `result.json`, and one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from vat_fast.files import write_text
from vat_fast.rollout.evaluate import EvaluationResult
from vat_fast.rollout.interval import wilson_interval
from vat_fast.rollout.latency import LatencySummary, summarise
from vat_fast.rollout.records import EpisodeRecord

RESULT_FILE = "result.json"
REPORT_FILE = "report.html"
CONTROL_STEP_MS = 50.0
"""A control step at LIBERO's 20 Hz."""


class Row(NamedTuple):
    """Success in one task, or in all (`task` None)."""

    task: int | None
    name: str
    successes: int
    episodes: int
    low: float
    high: float
    """Ends of the 95 % interval."""
    mean_steps: float
    """Of the successful episodes; not a number where there are none."""

    @property
    def rate(self) -> float:
        """Successes per episode; not a number without episodes."""
        return self.successes / self.episodes if self.episodes else float("nan")


def rows(result: EvaluationResult) -> list[Row]:
    """One row per task with finished episodes, in the order of the settings, and last all of them together."""
    out = []
    for task in result.settings.tasks:
        records = result.of_task(task)
        if records:
            out.append(_row(task, records[0].task_name, records))
    return [*out, _row(None, "all tasks", result.records)]


def latencies(result: EvaluationResult) -> dict[str, LatencySummary | None]:
    """Percentiles inside the loop, by what was timed; None where it did not happen."""
    records = result.records
    return {
        "predict": summarise([ms for record in records for ms in record.predict_ms]),
        "observe": summarise([ms for record in records for ms in record.observe_ms]),
        "step, mean of each episode": summarise([record.step_ms for record in records]),
    }


def text_report(result: EvaluationResult) -> str:
    """The table and the latencies, for the terminal."""
    table = rows(result)
    width = max(len(row.name) for row in table)
    lines = [f"{'task':>4}  {'':{width}}  {'success':>9}  {'rate':>6}  95 % interval   steps"]
    for row in table:
        number = "" if row.task is None else str(row.task)
        lines.append(
            f"{number:>4}  {row.name:{width}}  {row.successes:>4}/{row.episodes:<4}  {_percent(row.rate):>6}  "
            f"{_percent(row.low):>6} to {_percent(row.high):>6}  {_whole(row.mean_steps):>4}"
        )
    lines += [f"{name}: {summary}" for name, summary in latencies(result).items() if summary is not None]
    if result.unfinished:
        names = ", ".join(key.name for key in result.unfinished)
        lines.append(f"not finished, run the command again to try once more: {names}")
    return "\n".join(lines)


def result_dict(
    result: EvaluationResult, conditions: Mapping[str, Any], baseline: EvaluationResult | None = None
) -> dict[str, Any]:
    """Everything of the report as values JSON knows."""
    out: dict[str, Any] = {
        "settings": {
            **result.settings.to_dict(),
            "tasks": list(result.settings.tasks),
            "init_states": list(result.settings.init_states),
        },
        "conditions": dict(conditions),
        "tasks": [_row_dict(row) for row in rows(result)],
        "latency_ms": {name: summary and summary.to_dict() for name, summary in latencies(result).items()},
        "resumed": result.resumed,
        "seconds": round(result.seconds, 1),
        "start_seconds": round(result.start_seconds, 1),
        "unfinished": {key.name: reason for key, reason in result.unfinished.items()},
    }
    if baseline is not None:
        out["baseline"] = [_row_dict(row) for row in rows(baseline)]
    return out


def write_reports(
    folder: str | Path,
    result: EvaluationResult,
    conditions: Mapping[str, Any],
    *,
    title: str,
    videos: Sequence[Path] = (),
    baseline: EvaluationResult | None = None,
    baseline_name: str = "baseline",
) -> Path:
    """Write result.json and report.html into `folder`; returns the path of the page.

    Args:
        conditions: versions, machine, policy: what the figures hold for.
        title: of the page.
        videos: files inside `folder`, shown on the page.
        baseline: an evaluation of the same episodes to stand beside, a blind policy's for example.
        baseline_name: what to call it.
    """
    folder = Path(folder)
    content = result_dict(result, conditions, baseline)
    write_text(folder / RESULT_FILE, json.dumps(_without_nan(content), indent=2) + "\n")
    shown = [video.relative_to(folder).as_posix() for video in videos]
    page = html_report(result, conditions, title, shown, baseline, baseline_name)
    write_text(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def html_report(
    result: EvaluationResult,
    conditions: Mapping[str, Any],
    title: str,
    videos: Sequence[str] = (),
    baseline: EvaluationResult | None = None,
    baseline_name: str = "baseline",
) -> str:
    """The page, without anything from elsewhere but the videos, which it links by their relative names."""
    table = rows(result)
    beside = {row.task: row for row in rows(baseline)} if baseline is not None else {}
    total = table[-1]
    head = ["task", "", "success", "rate", "95 % interval", "", "steps to success"]
    if beside:
        head.append(baseline_name)
    body = []
    for row in table:
        cells = [
            "" if row.task is None else str(row.task),
            escape(row.name),
            f"{row.successes}/{row.episodes}",
            _percent(row.rate),
            f"{_percent(row.low)} to {_percent(row.high)}",
            _bar(row, beside.get(row.task)),
            _whole(row.mean_steps),
        ]
        if beside:
            other = beside.get(row.task)
            cells.append("" if other is None else f"{other.successes}/{other.episodes}")
        body.append(_tr("td", cells, " class=total" if row.task is None else ""))
    timing = [
        _tr("td", [escape(name), *(f"{value:.1f}" for value in (s.p50, s.p90, s.p99, s.max)), str(s.count)])
        for name, s in latencies(result).items()
        if s is not None
    ]
    settings = {**conditions, **result.settings.to_dict()}
    facts = [_tr("td", [escape(name), escape(_plain(value))]) for name, value in settings.items()]
    films = [
        f'<figure><video src="{escape(name, quote=True)}" controls muted loop></video>'
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for name in videos
    ]
    lost = [_tr("td", [key.name, escape(reason)]) for key, reason in result.unfinished.items()]
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p><b>{_percent(total.rate)}</b> of {total.episodes} episodes succeeded, 95 % interval "
        f"{_percent(total.low)} to {_percent(total.high)} (Wilson).</p>",
        _table(_tr("th", head), body),
        "<h2>Inside the loop, milliseconds</h2>",
        _table(_tr("th", ["", "median", "p90", "p99", "max", "count"]), timing),
        f"<p>A control step lasts {CONTROL_STEP_MS:.0f} ms on the robot.</p>",
        *(["<h2>Not finished</h2>", _table("", lost)] if lost else []),
        *(["<h2>Episodes</h2>", *films] if films else []),
        "<h2>Conditions</h2>",
        _table("", facts),
    ]
    newline = "\n"
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(title)}</title>\n"
        f"<style>{_STYLE}</style>\n<body>\n{newline.join(sections)}\n</body></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
    ".total td{font-weight:bold;border-top:2px solid #222}video{width:32em;max-width:100%}"
    "figure{display:inline-block;margin:.5em}"
)
_BAR_WIDTH = 160


def _bar(row: Row, other: Row | None) -> str:
    """The rate as a bar with its interval as a line; the baseline's rate as a red tick."""
    if not row.episodes:
        return ""
    x = [round(_BAR_WIDTH * value, 1) for value in (row.rate, row.low, row.high)]
    tick = ""
    if other is not None and other.episodes:
        at = round(_BAR_WIDTH * other.rate, 1)
        tick = f"<line x1={at} x2={at} y1=0 y2=14 stroke=#c22 stroke-width=2 />"
    return (
        f"<svg width={_BAR_WIDTH} height=14><rect width={_BAR_WIDTH} height=14 fill=#eee />"
        f"<rect width={x[0]} height=14 fill=#6a9fd4 />"
        f"<line x1={x[1]} x2={x[2]} y1=7 y2=7 stroke=#222 stroke-width=2 />{tick}</svg>"
    )


def _table(head: str, body: Sequence[str]) -> str:
    return "<table>\n" + "\n".join([head, *body] if head else body) + "\n</table>"


def _tr(cell: str, values: Sequence[str], attributes: str = "") -> str:
    return f"<tr{attributes}>" + "".join(f"<{cell}>{value}</{cell}>" for value in values) + "</tr>"


def _row(task: int | None, name: str, records: Sequence[EpisodeRecord]) -> Row:
    steps = [record.steps for record in records if record.success]
    low, high = wilson_interval(len(steps), len(records))
    mean = sum(steps) / len(steps) if steps else float("nan")
    return Row(task, name, len(steps), len(records), low, high, mean)


def _row_dict(row: Row) -> dict[str, Any]:
    return {**row._asdict(), "rate": row.rate}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _percent(value: float) -> str:
    return "" if value != value else f"{100 * value:.1f} %"


def _whole(value: float) -> str:
    return "" if value != value else f"{value:.0f}"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
