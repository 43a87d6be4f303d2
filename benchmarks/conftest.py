"""Options of the step benchmark, and what its table cannot say: the ratio in the same rounds, and the error."""

from __future__ import annotations

from typing import Any

import pytest

LISTS = {
    "--presets": ("vit-tiny,vit-small", "presets to run"),
    "--batches": ("1", "batch sizes"),
    "--views": ("2", "camera views"),
    "--rivals": ("", "names in benchmarks.rivals (default: those that build in seconds)"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Comma-separated lists."""
    group = parser.getgroup("policy step")
    for name, (default, what) in LISTS.items():
        group.addoption(name, default=default, help=f"comma-separated {what}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every shape with every rival."""
    if "rival" not in metafunc.fixturenames:
        return
    from benchmarks.rivals import REFERENCE, RIVALS

    def listed(name: str) -> list[str]:
        return [part.strip() for part in metafunc.config.getoption(name).split(",") if part.strip()]

    shapes = [(p, int(b), int(v)) for p in listed("--presets") for b in listed("--batches") for v in listed("--views")]
    rivals = listed("--rivals") or [name for name in RIVALS if name != REFERENCE and "compile" not in name]
    metafunc.parametrize("shape", shapes, ids=[f"{p}-B{b}-V{v}" for p, b, v in shapes], scope="module")
    metafunc.parametrize("rival", rivals)


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """One line for each benchmark that measured a rival beside itself."""
    session = getattr(config, "_benchmarksession", None)
    for bench in getattr(session, "benchmarks", []):
        info = bench.extra_info
        if "speedup_median" in info:
            low, high = info["speedup_range"]
            terminalreporter.write_line(
                f"{bench.name}: {info['speedup_median']:.2f}x ReferenceVAT eager fp32 (80 % of rounds {low:.2f} to "
                f"{high:.2f}), error {info['error']:.1e}, {info['threads']} threads"
            )
