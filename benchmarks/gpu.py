"""Checks, then times, every kernel and the whole layer on the GPU of whoever has one.

    python -m benchmarks.gpu                          everything, results in results/gpu-<device>-<date>.json
    python -m benchmarks.gpu --ops gemm layers        some ops
    python -m benchmarks.gpu --device cpu --dry-run   the same checks in Triton's interpreter, small shapes, no times

Every production case that the proofs know (kernels/proof/cases) is launched on random data and compared with plain
PyTorch in fp64: its error may be at most twice that of the same maths in eager low precision. A case that fails is
reported and not timed, and the exit status is 1. Then each provider is timed: our kernel, eager PyTorch, torch.compile,
and where the maths is attention, scaled_dot_product_attention and flash-attn if it is installed.

The op called "step" is the whole policy step: the frozen plan in two streams and one graph (benchmarks/gpu_step.py).

Timing: each provider is captured in a CUDA graph (so launch overhead of Python is not measured), warmed up, and
replayed once per sample with the L2 cache overwritten before each, between two CUDA events. Median, 20th and 80th
percentile over the samples. torch.compile and eager get the same treatment. The JSON file holds the conditions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vat_fast.kernels import timing
    from vat_fast.kernels.proof.case import Case

# vat_fast.kernels is imported inside functions: Triton must not be before main has chosen the interpreter or the GPU.
ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1
STEP = "step"
"""The name of the whole policy step (`benchmarks.gpu_step`) among the ops."""
NO_GPU = 2


@dataclass
class Row:
    """One case: errors relative to fp64 (root mean square), and timings if they are small enough."""

    op: str
    case: str
    error: float | None = None
    eager_error: float | None = None
    passed: bool = False
    message: str = ""
    useful_flops: int = 0
    useful_bytes: int = 0
    timings: list[timing.Timing] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """provider -> why it was not timed"""


# ---------------------------------------------------------------------------------------------------------------
# Correctness
# ---------------------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Root mean square of the error over that of the truth."""
    return ((actual.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with every float tensor in fp64; 8-bit floats stay, they are codes."""
    wide = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {name: value.double() if value.dtype in wide else value for name, value in tensors.items()}


def on_device(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Copies with the same strides: a slice of a packed projection stays one, with its gaps."""
    moved = {}
    for name, value in tensors.items():
        moved[name] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        moved[name].copy_(value)
    return moved


def check(case: Case, tensors: dict[str, Tensor]) -> Row:
    """Launch once and compare. A case without a reference must at least write every output, finite."""
    row = Row(case.op, case.name, useful_flops=case.useful_flops, useful_bytes=case.useful_bytes)
    inputs = {name: value.clone() for name, value in tensors.items()}
    try:
        case.launch(tensors)
        for name in case.outputs:
            value = tensors[name]
            if value.dtype.is_floating_point and not torch.isfinite(value.float()).all():
                row.message = f"{name} has elements that are not finite"
                return row
        if case.reference is None:
            row.passed, row.message = True, "finite; no reference in this form"
            return row
        eager, truth = case.reference(inputs), case.reference(widened(inputs))
    except Exception as error:  # whatever stops one case must not stop the others; it fails the run
        row.message = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
        return row
    results = case.results(tensors)
    row.error = max(relative_error(results[name], truth[name]) for name in truth)
    row.eager_error = max(relative_error(eager[name], truth[name]) for name in truth)
    floor = 1e-5 if all(results[name].dtype == torch.float32 for name in truth) else 0.0
    row.passed = all(
        relative_error(results[name], truth[name]) <= max(2 * relative_error(eager[name], truth[name]), floor)
        for name in truth
    )
    if not row.passed:
        row.message = f"relative error {row.error:.2e} is more than twice eager's {row.eager_error:.2e}"
    return row


# ---------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------


def providers(case: Case, tensors: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """What computes this case, by name. Ours first."""
    calls: dict[str, Callable[[], object]] = {"vat_fast": lambda: case.launch(tensors)}
    reference = case.reference
    if reference is None:
        return calls
    calls["eager"] = lambda: reference(tensors)
    compiled = torch.compile(reference, dynamic=False)
    calls["torch.compile"] = lambda: compiled(tensors)
    return calls | attention_providers(case, tensors)


def attention_providers(case: Case, tensors: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """SDPA and flash-attn for forward attention cases; nothing for others."""
    if case.op == "vision_attention" and "out" in case.outputs:
        views, patches, packed = tensors["qkv"].shape
        heads = tensors["lse"].shape[1]
        qkv = tensors["qkv"].view(views, patches, 3, heads, packed // (3 * heads))
        q, k, v = qkv.unbind(2)
    elif case.op == "cross_attention" and "out" in case.outputs and "kv_extra" not in tensors:
        batch, queries, width = tensors["q"].shape
        heads = tensors["lse"].shape[1]
        kv = tensors["kv"].unflatten(-1, (2, heads, width // heads))
        q = tensors["q"].view(batch, queries, heads, width // heads)
        k, v = kv.unbind(2)
    else:
        return {}

    def sdpa() -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).flatten(2)

    calls: dict[str, Callable[[], object]] = {"sdpa": sdpa}
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        calls["flash-attn"] = lambda: flash_attn_func(q, k, v)
    return calls


def measure(case: Case, row: Row, tensors: dict[str, Tensor], samples: int) -> None:
    """Fill in the row's timings. Refuses a row whose check failed: a fast wrong kernel has no speed."""
    from vat_fast.kernels import timing

    if not row.passed:
        raise ValueError(f"{case.key} failed its check ({row.message}); it is not timed")
    for name, call in providers(case, tensors).items():
        try:
            row.timings.append(timing.time_graph(name, call, samples))
        except Exception as error:
            if name == "vat_fast":
                raise
            torch.cuda.synchronize()
            row.left_out[name] = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"


# ---------------------------------------------------------------------------------------------------------------
# Conditions and report
# ---------------------------------------------------------------------------------------------------------------


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def conditions(device: str, seed: int, dry_run: bool) -> dict[str, Any]:
    """Everything that a reader needs to repeat the run."""
    from vat_fast.kernels import timing

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("torch", "triton", "flash-attn", "numpy")
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "device": platform.processor() or platform.machine(),
        "dtype": "the cases' own: bfloat16, int8 and float8_e4m3fn where named",
        "seed": seed,
        "dry_run": dry_run,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
            "nvidia_smi": {
                "query": query,
                "answer": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
            },
            "warm_up": timing.WARM_UP,
            "l2_flushed_bytes": timing.FLUSH_BYTES,
            "method": timing.METHOD,
        }
    return facts


def markdown(result: dict[str, Any]) -> str:
    """A table to paste: one row per case, median microseconds per provider, spread of ours, achieved rates."""
    rows = result["rows"]
    names = list(dict.fromkeys(entry["provider"] for row in rows for entry in row["timings"]))
    if not names:
        lines = ["| case | check | error | eager error |", "| --- | --- | --- | --- |"]
        for row in rows:
            errors = [f"{row[key]:.1e}" if row[key] is not None else "-" for key in ("error", "eager_error")]
            state = "passed" if row["passed"] else f"FAILED: {row['message']}"
            lines.append(f"| {row['op']}/{row['case']} | {state} | {errors[0]} | {errors[1]} |")
        return "\n".join(lines)
    heading = ["case", "error / eager's", *(f"{name} us" for name in names), "ours p20-p80", "TFLOP/s", "GB/s"]
    lines = ["| " + " | ".join(heading) + " |", "| " + " | ".join("---" for _ in heading) + " |"]
    for row in rows:
        times = {entry["provider"]: entry for entry in row["timings"]}
        ours = times.get("vat_fast")
        cells = [f"{row['op']}/{row['case']}"]
        cells.append(f"{row['error']:.1e} / {row['eager_error']:.1e}" if row["error"] is not None else row["message"])
        cells += [f"{times[name]['median_us']:.1f}" if name in times else "-" for name in names]
        if ours:
            cells.append(f"{ours['p20_us']:.1f}-{ours['p80_us']:.1f}")
            cells.append(f"{row['useful_flops'] / ours['median_us'] / 1e6:.1f}")
            cells.append(f"{row['useful_bytes'] / ours['median_us'] / 1e3:.0f}")
        else:
            cells += ["-", "-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all checks passed, 1 some failed, 2 nothing could run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="check small shapes, time nothing; needed with cpu")
    parser.add_argument("--ops", nargs="+", help="only these ops")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file; default results/gpu-<device>-<date>.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu needs a CUDA or ROCm device and PyTorch sees none; to check the logic without one, run "
            "python -m benchmarks.gpu --device cpu --dry-run",
            file=sys.stderr,
        )
        return NO_GPU
    if options.device == "cpu" and not options.dry_run:
        print("a CPU has no kernel speeds to measure: add --dry-run to check the kernels there", file=sys.stderr)
        return NO_GPU
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from vat_fast.kernels.proof import interpreter

        interpreter.install()
    result = run(options.device, options.ops, options.dry_run, options.samples, options.seed)
    name = "-".join(result["conditions"]["device"].split()) or "cpu"
    out = options.out or ROOT / "results" / f"gpu-{name}-{result['conditions']['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    print(f"wrote {out}")
    failed = [row for row in result["rows"] if not row["passed"]]
    for row in failed:
        print(f"FAILED {row['op']}/{row['case']}: {row['message']}", file=sys.stderr)
    return 1 if failed else 0


def run(device: str, ops: Sequence[str] | None, dry_run: bool, samples: int, seed: int) -> dict[str, Any]:
    """Check and, unless dry, time the cases of `ops` (all if None). Returns the result file's content."""
    from vat_fast.kernels.configs import current_arch
    from vat_fast.kernels.proof.case import all_cases

    torch.manual_seed(seed)
    arch = current_arch()
    chosen = [op for op in ops if op != STEP] if ops else None
    cases = all_cases() if chosen is None else [case for op in chosen for case in all_cases(op)]
    rows = []
    for case in cases:
        if device == "cuda" and isinstance(arch, int) and arch < min(a for a in case.archs if isinstance(a, int)):
            continue  # fp8 on a card without it
        tensors = on_device(case.edge() if dry_run else case.make(), device)
        row = check(case, tensors)
        if row.passed and not dry_run:
            measure(case, row, tensors, samples)
        rows.append(asdict(row))
        print(f"{case.key}: {'ok' if row.passed else 'FAILED ' + row.message}", file=sys.stderr, flush=True)
    if ops is None or STEP in ops:
        from benchmarks.gpu_step import step_rows

        for row in step_rows(device, dry_run, samples, seed):
            rows.append(asdict(row))
            print(
                f"{row.op}/{row.case}: {'ok' if row.passed else 'FAILED ' + row.message}", file=sys.stderr, flush=True
            )
    return {"format": FORMAT, "conditions": conditions(device, seed, dry_run), "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
