"""The ahead-of-time gate: compiles every registered case, and every shipped configuration, and holds the code to its
promises.

    python -m vat_fast.kernels.proof.aot              compile what changed, print the table, fail on a broken promise
    python -m vat_fast.kernels.proof.aot --all        compile everything again
    python -m vat_fast.kernels.proof.aot --update     and write baseline.json (a broken promise still fails)

The baseline holds one row per launch, case and target with a digest of everything the compiled code depends on. A row
whose digest still holds need not be compiled again, so that the baseline is the cache too. Only shapes are looked at:
the figures say what was compiled, never how fast it is.

Promises
- compiles; a compiler crash is one failed row
- no spills: no local memory, no stack
- fits, and at least two blocks share a multiprocessor, or the case says why not
- tensor-core instructions where the case expects them
- global accesses in hot loops are 16 bytes wide: at most `NARROW_SHARE` of the bytes may move in narrower ones (row
  scalars), or the case says why
- matrix flops issued, padding included, are at most `ISSUED_FLOPS` times the useful ones, or the case says why and at
  most how many
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from vat_fast.kernels.attention_model import ISSUED_FLOPS, NARROW_SHARE
from vat_fast.kernels.proof import worker
from vat_fast.kernels.proof.case import Case
from vat_fast.kernels.proof.code import GFX942_LDS, LIMITS
from vat_fast.kernels.proof.configurations import gate_cases

BASELINE = Path(__file__).with_name("baseline.json")
# A new baseline row may exceed the old one by this much before it counts as growth: the compiler's own noise when
# unrelated lines move.
GROWTH_REGISTERS = 4
GROWTH_SHARED = 0
GROWTH_LOOP = 0.03
GROWTH_FLOPS = 0.001

Arch = int | str
Table = dict[str, dict[str, dict[str, Any]]]
"""case key -> target -> {"launches": [row, ...], "issued_flops": float} or {"error": line}"""


def target_name(arch: Arch) -> str:
    """90 -> "sm_90", "gfx942" -> "gfx942"."""
    return f"sm_{arch}" if isinstance(arch, int) else arch


def load_baseline(path: Path = BASELINE) -> Table:
    """The checked-in rows.

    Raises:
        RuntimeError: they come from another Triton, whose compiler gives other code.
    """
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    if stored["triton"] != triton.__version__:
        raise RuntimeError(
            f"{path.name} was made with Triton {stored['triton']} and {triton.__version__} is installed: "
            "install that version, or make a new baseline with python -m vat_fast.kernels.proof.aot --all --update"
        )
    return stored["cases"]


def save_baseline(table: Table, path: Path = BASELINE) -> None:
    """Writes the rows, one launch per line so that a change reads well in a diff."""
    lines = []
    for key, targets in sorted(table.items()):
        inner = []
        for target, entry in sorted(targets.items()):
            rows = ",\n    ".join(json.dumps(row) for row in entry["launches"])
            flops = json.dumps(entry["issued_flops"])
            inner.append(f'  {json.dumps(target)}: {{"issued_flops": {flops}, "launches": [\n    {rows}]}}')
        lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(inner) + "}")
    version = json.dumps(triton.__version__)
    path.write_text(f'{{"triton": {version}, "cases": {{\n' + ",\n".join(lines) + "}}\n")


def digests(cases: Sequence[Case], workers: int = 2, module: str = "") -> dict[tuple[str, str], Any]:
    """Digests of every launch by (case key, target), or {"error": line}."""
    tasks = [(case.key, arch) for case in cases for arch in case.archs]
    found = worker.run("digest", tasks, workers, module)
    return {
        (key, target_name(arch)): result if isinstance(result, dict) else [row["digest"] for row in result]
        for (key, arch), result in found.items()
    }


def measure(
    cases: Sequence[Case], known: Table | None = None, workers: int = 2, module: str = ""
) -> tuple[Table, list[str]]:
    """(rows of all cases, keys of those that were compiled): rows of `known` whose digests still hold are reused."""
    known = known or {}
    table: Table = {}
    current = digests(cases, workers, module) if known else {}
    changed: list[worker.Task] = []
    for case in cases:
        for arch in case.archs:
            old = known.get(case.key, {}).get(target_name(arch))
            same = old is not None and [r["digest"] for r in old["launches"]] == current[case.key, target_name(arch)]
            if same and old is not None:
                table.setdefault(case.key, {})[target_name(arch)] = old
            else:
                changed.append((case.key, arch))
    compiled = worker.run("compile", changed, workers, module)
    by_key = {case.key: case for case in cases}
    counted = worker.run("flops", [task for task in changed if by_key[task[0]].useful_flops], workers, module)
    for task in changed:
        rows, flops = compiled[task], counted.get(task, [0.0])
        entry: dict[str, Any]
        if isinstance(rows, dict):
            entry = rows
        elif isinstance(flops, dict):
            entry = flops
        else:
            entry = {"launches": rows, "issued_flops": sum(flops)}
        table.setdefault(task[0], {})[target_name(task[1])] = entry
    return table, [f"{key} {target_name(arch)}" for key, arch in changed]


def broken_promises(table: Table, cases: Sequence[Case]) -> list[str]:
    """One sentence for each promise that a row of `table` breaks."""
    broken = []
    for case in cases:
        for arch in case.archs:
            where = f"{case.key} on {target_name(arch)}"
            entry = table.get(case.key, {}).get(target_name(arch))
            if entry is None:
                broken.append(f"{where}: no row; compile it")
            elif "error" in entry:
                broken.append(f"{where}: {entry['error']}")
            else:
                broken += [f"{where}: {fault}" for fault in _faults(case, arch, entry)]
    return broken


def _faults(case: Case, arch: Arch, entry: dict[str, Any]) -> list[str]:
    faults = []
    for row in entry["launches"]:
        name = row["kernel"]
        if row["shared"] > (LIMITS[arch].shared_per_block if isinstance(arch, int) else GFX942_LDS):
            faults.append(f"{name} asks for {row['shared']} bytes of shared memory, more than a block may")
        if case.for_checking:
            continue
        if row["local"] or row["stack"]:
            faults.append(f"{name} spills: {row['local']} local accesses, {row['stack']} bytes of stack")
        if row["blocks"] < (1 if case.few_blocks else 2):
            faults.append(f"{name}: {row['blocks']} block(s) per multiprocessor, limited by {row['limit']}")
        loop = row["loop"]
        excused = case.narrow or (isinstance(arch, str) and case.narrow_amd)
        if loop and loop["narrow_share"] > NARROW_SHARE and not excused:
            faults.append(f"{name}: {loop['narrow_share']:.0%} of the hot loop's bytes move in narrow accesses")
    if case.mma and not any(row["mma"] for row in entry["launches"]):
        faults.append("no tensor-core instruction")
    if case.useful_flops:
        share = entry["issued_flops"] / case.useful_flops
        if share > most_issued(case, arch):
            faults.append(f"issues {share:.2f} times the useful flops")
        if share < 0.98:
            faults.append(f"issues {share:.2f} times the useful flops: the case counts more than the maths needs")
    return faults


def most_issued(case: Case, arch: Arch) -> float:
    """Times the useful flops that the case may issue on a target."""
    if isinstance(arch, str) and case.extra_flops_amd:
        return case.most_issued_amd
    return case.most_issued if case.extra_flops else ISSUED_FLOPS


def growth(old: Table, new: Table) -> list[str]:
    """One sentence for each figure that grew beyond the tolerance, launches matched by their order."""
    grown = []
    for key, targets in new.items():
        for target, entry in targets.items():
            before = old.get(key, {}).get(target)
            if before is None or "error" in entry:
                continue
            if entry["issued_flops"] > before["issued_flops"] * (1 + GROWTH_FLOPS):
                grown.append(f"{key} on {target}: issued flops {before['issued_flops']:g} -> {entry['issued_flops']:g}")
            for was, row in zip(before["launches"], entry["launches"], strict=False):
                where = f"{key} on {target}, {row['kernel']}"
                grown += [f"{where}: {change}" for change in _growth(was, row)]
    return grown


def _growth(was: dict[str, Any], row: dict[str, Any]) -> list[str]:
    changes = []
    if row["registers"] > was["registers"] + GROWTH_REGISTERS:
        changes.append(f"registers {was['registers']} -> {row['registers']}")
    if row["shared"] > was["shared"] + GROWTH_SHARED:
        changes.append(f"shared memory {was['shared']} -> {row['shared']}")
    if row["blocks"] < was["blocks"]:
        changes.append(f"blocks per multiprocessor {was['blocks']} -> {row['blocks']}")
    if was["loop"] and row["loop"]:
        before, after = was["loop"]["instructions"], row["loop"]["instructions"]
        if after > before * (1 + GROWTH_LOOP):
            changes.append(f"hot loop {before} -> {after} instructions")
    return changes


def print_table(table: Table, cases: Sequence[Case]) -> None:
    """One line per launch and target."""
    print(
        f"{'case':46s} {'kernel':34s} {'target':7s} {'progs':>6s} {'regs':>4s} {'spill':>5s} {'smem':>7s} "
        f"{'blk/SM':>6s} {'limit':9s} {'loop':>5s} {'mma':>4s} {'narrow':>6s} {'flops':>6s}  MMA"
    )
    for case in cases:
        for arch in case.archs:
            entry = table[case.key][target_name(arch)]
            if "error" in entry:
                print(f"{case.key:46s} {'':34s} {target_name(arch):7s} ERROR {entry['error']}")
                continue
            share = entry["issued_flops"] / case.useful_flops if case.useful_flops else 0.0
            for row in entry["launches"]:
                loop = row["loop"] or {"instructions": 0, "mma": row["mma"], "narrow_share": 0.0}
                print(
                    f"{case.key:46s} {row['kernel'][:34]:34s} {target_name(arch):7s} {row['programs']:6d} "
                    f"{row['registers']:4d} {row['local'] + row['stack']:5d} {row['shared']:7d} {row['blocks']:6d} "
                    f"{row['limit']:9s} {loop['instructions']:5d} {loop['mma']:4d} {loop['narrow_share']:6.0%} "
                    f"{share:6.2f}  {row['mma_kind']}"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if a promise is broken or something grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="compile every row, even where its digest still holds")
    parser.add_argument("--update", action="store_true", help="write baseline.json; growth is accepted")
    parser.add_argument("--op", help="only the cases of this op")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    cases = [case for case in gate_cases() if options.op in (None, case.op)]
    if not cases:
        parser.error(f"no case has op {options.op!r}")
    baseline = {} if options.all and options.update and not options.op else load_baseline()
    stored = {key: rows for key, rows in baseline.items() if options.op or key in {case.key for case in cases}}
    broken, grown, compiled = [], [], 0
    for op in dict.fromkeys(case.op for case in cases):
        chosen = [case for case in cases if case.op == op]
        table, changed = measure(chosen, {} if options.all else baseline, options.workers)
        print_table(table, chosen)
        broken += broken_promises(table, chosen)
        grown += growth(baseline, table)
        compiled += len(changed)
        stored = {key: rows for key, rows in stored.items() if not key.startswith(f"{op}/")} | _sound_rows(table)
        if options.update:
            save_baseline(stored)
    print(f"{compiled} of {sum(len(case.archs) for case in cases)} rows were compiled")
    for line in broken:
        print(f"BROKEN {line}")
    for line in grown:
        print(f"GREW   {line}")
    if options.update:
        print(f"wrote {BASELINE}")
    return 1 if broken or (grown and not options.update) else 0


def _sound_rows(table: Table) -> Table:
    """Without the rows that are errors."""
    return {
        key: {target: entry for target, entry in targets.items() if "error" not in entry}
        for key, targets in table.items()
    }


if __name__ == "__main__":
    sys.exit(main())
