"""Writes docs/kernels.md: what each kernel costs, how exact it is, what the compilers made of it, and what bounds it.

python -m vat_fast.kernels.proof.report             measure the errors again, write errors.json and docs/kernels.md
python -m vat_fast.kernels.proof.report --render    write docs/kernels.md from errors.json and baseline.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vat_fast.kernels.proof import aot, worker
from vat_fast.kernels.proof.case import Case, Tensors, all_cases
from vat_fast.kernels.proof.configurations import OP
from vat_fast.kernels.static_model import DEVICES

ERRORS = Path(__file__).with_name("errors.json")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
ERROR_ARCHS: tuple[int, ...] = (80, 89)
"""Errors are measured with the block sizes of the first of these targets that the case is meant for."""
SOURCES = {
    "A100": "NVIDIA A100 80GB data sheet (SXM)",
    "H100": "NVIDIA H100 data sheet (SXM)",
    "4090": "NVIDIA Ada GPU architecture whitepaper, appendix A",
    "Orin": "NVIDIA Jetson AGX Orin series technical brief (64 GB)",
    "Thor": "NVIDIA Jetson AGX Thor data sheet (T5000)",
    "B200": "NVIDIA DGX B200 data sheet, one of eight GPUs",
}
EIGHT_BIT = ("IMMA", "QMMA", "IGMMA", "QGMMA", "UTCIMMA", "UTCQMMA")
Errors = dict[str, dict[str, tuple[float, float]]]
"""case key -> output -> (error, eager's error)"""


# --- errors -------------------------------------------------------------------------------------------------------


def edge_errors(case: Case) -> dict[str, tuple[float, float]]:
    """(kernel's error, eager PyTorch's error) against fp64 of each output with a reference, at the case's edge twin.

    Errors are root mean square over the reference's root mean square. Needs Triton's interpreter.
    """
    if case.reference is None:
        return {}
    inputs = case.edge()
    eager = case.reference(_copied(inputs))
    truth = case.reference(_copied(inputs, torch.float64))
    actual = case.edge()
    case.launch(actual)
    results = case.results(actual)
    return {
        name: (_relative(results[name], truth[name]), _relative(eager[name], truth[name]))
        for name in truth
        if name in results
    }


def error_arch(case: Case) -> int:
    """The target with whose block sizes the case's errors are measured."""
    return next(arch for arch in ERROR_ARCHS if arch in case.archs)


def _copied(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Clones; floating-point tensors in `dtype` if given."""
    return {
        name: x.to(dtype) if dtype and x.dtype.is_floating_point else x.clone()
        for name, x in tensors.items()
        if isinstance(x, torch.Tensor)
    }


def _relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    difference = x.double().reshape(truth.shape) - truth.double()
    return (difference.norm() / truth.double().norm()).item()


def measure_errors(cases: Sequence[Case]) -> Errors:
    """`edge_errors` of every case, in child processes that interpret.

    Raises:
        RuntimeError: a case failed.
    """
    found = worker.run("errors", [(case.key, error_arch(case)) for case in cases])
    for (key, _), result in found.items():
        if "error" in result:
            raise RuntimeError(f"{key}: {result['error']}")
    return {key: {name: tuple(pair) for name, pair in result.items()} for (key, _), result in found.items()}


def load_errors(path: Path = ERRORS) -> Errors:
    """What `measure_errors` found when errors.json was written."""
    return json.loads(path.read_text())


# --- document -----------------------------------------------------------------------------------------------------


def bound_us(case: Case, entry: dict[str, Any], device: str) -> tuple[float, str]:
    """(lower bound in microseconds, "memory" or "compute"): the larger of flops / peak and bytes / bandwidth."""
    part = DEVICES[device]
    eight_bit = any(row["mma_kind"].split(".")[0] in EIGHT_BIT for row in entry["launches"])
    compute = case.useful_flops / (part.tflops * (2 if eight_bit else 1) * 1e6)
    memory = case.useful_bytes / (part.bandwidth * 1e3)
    return max(compute, memory), "compute" if compute > memory else "memory"


def render(cases: Sequence[Case], table: aot.Table, errors: Errors) -> str:
    """The whole document."""
    lines = [*_head(), *_devices()]
    for op in sorted({case.op for case in cases}):
        chosen = [case for case in cases if case.op == op]
        lines += ["", f"## {op}", "", *_costs(chosen, table, errors), "", *_code(chosen, table), *_reasons(chosen)]
    lines += _configurations(table)
    return "\n".join(lines) + "\n"


def _configurations(table: aot.Table) -> list[str]:
    """What became of the shipped configurations that no case picks."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, targets in table.items():
        if key.startswith(f"{OP}/"):
            kind = key.split("/")[1].split(" ")[0]
            for target, entry in targets.items():
                found.setdefault((kind, target), []).extend(entry["launches"])
    rows = [
        (
            kind,
            target,
            str(len(launches)),
            str(max(row["registers"] for row in launches)),
            str(sum(row["local"] for row in launches)),
            str(min(row["blocks"] for row in launches)),
        )
        for (kind, target), launches in sorted(found.items())
    ]
    return [
        "",
        "## Shipped configurations",
        "",
        "Every distinct row of kernels/tables.py, compiled for its target at a shape that picks it. fp32 is for",
        "checking results: its kernels need only compile and fit. Static models chose the rows, by tensor-core",
        "cycles, waves, occupancy, L2 and HBM traffic; those of attention also by the instructions of each candidate's",
        "hot loop as compiled (kernels/static_model.py, kernels/attention_model.py).",
        "`python -m vat_fast.kernels.retune` replaces them by what it measures on a card.",
        "",
        *_table(("kernels", "target", "launches", "most registers", "spilled accesses", "fewest blocks"), rows),
    ]


def _head() -> list[str]:
    return [
        "# Kernels",
        "",
        "Generated by `python -m vat_fast.kernels.proof.report`; do not edit.",
        "",
        "Nothing here was timed. The figures are what the compilers emitted and what the maths needs:",
        "",
        "- **launches** of a case, **MB** that must cross HBM once, **GFLOP** of its matrix products.",
        "- **error** against fp64 beside **eager's** in the same precision: root mean square, of the output with the",
        "  largest, measured in Triton's interpreter at a small twin of the case with the same ragged edges.",
        "- **bound**: microseconds below which no implementation can be on that device, the larger of GFLOP / peak and",
        "  MB / bandwidth; *c* where compute decides, else memory. Launch latency is not in it.",
        "- **compiled code**, per target: registers a thread / spilled accesses / blocks that fit on a multiprocessor.",
        "- **issued**: matrix flops that the launches issue, padding included, over the useful ones, on the worst of",
        "  NVIDIA's targets, then on **gfx942**. They are counted by tiles; in the compiled loops of attention no",
        "  warp repeats another's products.",
        "",
        "`python -m vat_fast.kernels.proof.aot` compiles everything again and holds it to its promises. Among them are",
        "tensor-core instructions, and 16-byte accesses in the hot loops of all targets, AMD's included; exceptions",
        "stand with their reasons below the tables.",
    ]


def _devices() -> list[str]:
    rows = [
        (
            name,
            aot.target_name(DEVICES[name].arch),
            f"{DEVICES[name].tflops:.0f}",
            f"{DEVICES[name].bandwidth:g}",
            source,
        )
        for name, source in SOURCES.items()
    ]
    return [
        "",
        "## Devices",
        "",
        *_table(("device", "target", "dense bf16 TFLOP/s", "GB/s", "source"), rows),
        "",
        "Peaks at boost clock with fp32 accumulation. int8 and fp8 count double.",
    ]


def _costs(cases: Sequence[Case], table: aot.Table, errors: Errors) -> list[str]:
    rows = []
    for case in cases:
        entry = table[case.key]
        first = next(iter(entry.values()))
        shares = {t: e["issued_flops"] / case.useful_flops for t, e in entry.items()} if case.useful_flops else {}
        nvidia = [share for target, share in shares.items() if target.startswith("sm_")]
        worst = max(errors.get(case.key, {}).values(), default=None)
        bounds = []
        for device in SOURCES:
            target = entry.get(aot.target_name(DEVICES[device].arch))
            if target is None:
                bounds.append("-")
                continue
            time, limit = bound_us(case, target, device)
            bounds.append(f"{_short(time)}{' *c*' if limit == 'compute' else ''}")
        rows.append(
            (
                case.name,
                str(len(first["launches"])),
                _short(case.useful_bytes / 1e6),
                _short(case.useful_flops / 1e9) if case.useful_flops else "-",
                f"{max(nvidia):.2f}" if nvidia else "-",
                f"{shares['gfx942']:.2f}" if "gfx942" in shares else "-",
                f"{worst[0]:.1e}" if worst else "-",
                f"{worst[1]:.1e}" if worst else "-",
                *bounds,
            )
        )
    what = ("case", "launches", "MB", "GFLOP", "issued", "gfx942", "error", "eager's")
    header = (*what, *(f"bound {d}, us" for d in SOURCES))
    return _table(header, rows)


def _code(cases: Sequence[Case], table: aot.Table) -> list[str]:
    targets = sorted({target for case in cases for target in table[case.key]}, key=lambda t: (t[:2] != "sm", len(t), t))
    rows = []
    for case in cases:
        entry = table[case.key]
        for index, launch in enumerate(next(iter(entry.values()))["launches"]):
            cells = []
            for target in targets:
                found = entry[target]["launches"] if target in entry else []
                row = found[index] if index < len(found) else None
                cells.append(f"{row['registers']} / {row['local']} / {row['blocks']}" if row else "-")
            rows.append((case.name, f"`{launch['kernel']}`", *cells))
    return _table(("case", "kernel", *targets), rows)


def _reasons(cases: Sequence[Case]) -> list[str]:
    found: dict[str, list[str]] = {}
    for case in cases:
        for what, reason in (
            ("one block per multiprocessor", case.few_blocks),
            ("accesses narrower than 16 bytes", case.narrow),
            ("accesses narrower than 16 bytes on gfx942", case.narrow_amd),
            (f"at most {case.most_issued:g} times the useful flops, not {aot.ISSUED_FLOPS:g}", case.extra_flops),
            (f"at most {case.most_issued_amd:g} times the useful flops on gfx942", case.extra_flops_amd),
        ):
            if reason:
                found.setdefault(f"{what}: {reason}", []).append(case.name)
    return ["", *(f"- {reason} ({', '.join(names)})" for reason, names in found.items())] if found else []


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" for _ in header) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _short(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--render", action="store_true", help="do not measure the errors again")
    options = parser.parse_args(arguments)
    cases = all_cases()
    if not options.render:
        errors = measure_errors(cases)
        ERRORS.write_text(json.dumps(errors, indent=1, sort_keys=True) + "\n")
    DOCUMENT.write_text(render(cases, aot.load_baseline(), load_errors()))
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
