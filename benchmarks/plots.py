"""Pictures of the result files: a waterfall of the passes, and the rivals' latency beside their errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"fp32": "#4c78a8", "bf16": "#f58518", "int16": "#e45756", "int8": "#54a24b", "fp16": "#b279a2"}


def dtype_of(name: str) -> str:
    """The precision that a name ends in; fp32 where it says none."""
    return next((dtype for dtype in COLOURS if name.endswith(dtype)), "fp32")


def processor(conditions: dict[str, Any]) -> str:
    """The processor's name, which alone may not tell what it can, and its widest instructions."""
    return f"{conditions['cpu'].replace('(R)', '')} with {conditions['instructions']}"


def waterfall(result: dict[str, Any], path: Path) -> None:
    """One bar per pass, milliseconds of the step with it and all before it; the error at its end."""
    bars = [{"name": "reference eager fp32", "p50_ms": result["reference_p50_ms"], "error": None}, *result["bars"]]
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(bars) + 1.4), layout="constrained")
    for index, bar in enumerate(bars):
        colour = "#bbbbbb" if bar["error"] is None else COLOURS[dtype_of(bar["name"])]
        axes.barh(index, bar["p50_ms"], color=colour)
        speed = f"{bar['p50_ms']:.1f} ms"
        if bar["error"] is not None:
            speed += f", {bar['ratio']:.2f}x, error {bar['error']:.0e}"
        axes.text(bar["p50_ms"], index, f" {speed}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(bar["p50_ms"] for bar in bars))
    axes.set_xlabel("milliseconds per step (median)")
    axes.set_title(f"{result['preset']}, one sample, two views, {result['conditions']['threads']} threads", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(result: dict[str, Any]) -> tuple[str, str]:
    return result["preset"], processor(result["conditions"])


def _name(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Names beside points; of near ones in turns to the right and to the left, those further on beyond the others."""
    ordered = sorted(points.items(), key=lambda item: item[1])
    span = math.log(ordered[-1][1][0] / ordered[0][1][0]) or 1.0
    place, before = 0, 0.0
    for name, (x, y) in ordered:
        place = place + 1 if before and math.log(x / before) < 0.05 * span else 0
        before = x
        right, further = place % 2 == 0, 8 * (place // 2)
        offset, side = ((5, 3 - further), "left") if right else ((-5, -6 - further), "right")
        axes.annotate(name, (x, y), fontsize=7, xytext=offset, textcoords="offset points", ha=side)


def latency(results: list[dict[str, Any]], path: Path) -> None:
    """Latency by throughput of every rival at every batch size, a panel per preset and processor, two views; lines join
    a rival's batch sizes."""
    panels = sorted({_panel(result) for result in results if result["views"] == 2})
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6 * columns, 4.6 * rows), layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        chosen = sorted((r for r in results if _panel(r) == panel and r["views"] == 2), key=lambda r: r["batch"])
        points: dict[str, list[tuple[float, float]]] = {}
        for result in chosen:
            batch = result["batch"]
            reference = result["reference_p50_ms"]
            points.setdefault("reference eager fp32", []).append((reference, 1e3 * batch / reference))
            for row in result["rivals"]:
                points.setdefault(row["name"], []).append((row["p50_ms"], row["samples_per_second"]))
        for name, line in points.items():
            frozen = name.startswith("frozen")
            style = {"marker": "o" if frozen else "x", "color": COLOURS[dtype_of(name)], "alpha": 1 if frozen else 0.6}
            axes.plot(*zip(*line, strict=True), label=name, linestyle="-" if frozen else ":", **style)
        _name(axes, {name: line[0] for name, line in points.items()})
        axes.set(xscale="log", yscale="log", xlabel="latency of a step, ms (median)", ylabel="samples per second")
        axes.set_title(", ".join(panel), fontsize=10)
        axes.margins(x=0.25)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
