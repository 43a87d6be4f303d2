"""Compiles every candidate of the attention tables for every target, and notes what `attention_model` asks about them.

    python -m vat_fast.kernels.proof.attention_facts            those whose code has changed
    python -m vat_fast.kernels.proof.attention_facts --all      every one

Some 400 kernels, a quarter of an hour on two cores; the file is written as it goes, and a run that was interrupted goes
on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import triton
from tqdm import tqdm

from vat_fast.files import write_text
from vat_fast.kernels import attention_model
from vat_fast.kernels.attention_model import ATTENTION_TABLES, HEAD_DIMS, TWINS
from vat_fast.kernels.proof import worker
from vat_fast.kernels.proof.aot import target_name
from vat_fast.kernels.proof.attention_case import attention_case
from vat_fast.kernels.proof.case import Case
from vat_fast.kernels.static_model import DEVICES

MODULE = "vat_fast.kernels.proof.attention_facts"
AT_ONCE = 16
"""Rows between two writes of the file."""
KEPT = ("digest", "registers", "shared", "blocks", "local", "stack", "instructions", "mma", "mma_kind")


def _candidates() -> list[Case]:
    """Each tile of each table at each head dim, for the targets that it is a candidate of."""
    cases: dict[str, Case] = {}
    for table in {table.op: table for table in reversed(ATTENTION_TABLES.values())}.values():  # each op's first
        split = table.splits[len(table.splits) // 2]  # how many splits does not change the loop
        for (_, head_dim, patches), device in itertools.product(HEAD_DIMS, DEVICES.values()):
            if device.arch in TWINS:
                continue
            for blocks in table.candidates(device.arch):
                if split != blocks.SPLITS:
                    continue
                case = attention_case(table, table.problem(head_dim, patches, 1), vars(blocks))
                case = replace(case, name=f"{head_dim} {blocks.name}", archs=())
                before = cases.get(case.key, case)
                cases[case.key] = replace(before, archs=(*before.archs, device.arch))
    return list(cases.values())


CASES = _candidates()
"""What `worker` looks for."""


Rows = Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""What `worker` says of a case: a row per launch, or {"error": line}."""


def _main_kernel(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    names = ("_attention_forward_kernel", "_attention_backward_kernel")
    return next(row for row in rows if row["kernel"] in names)


def fact(rows: Rows) -> dict[str, Any]:
    """What the model reads, from the gate's rows of one candidate."""
    if isinstance(rows, Mapping):
        return {"digest": None, "error": rows["error"]}
    row = _main_kernel(rows)
    loop = row["loop"] or {"instructions": 0, "mma": 0, "narrow_share": row["narrow_share"]}
    return {
        **{name: row[name] for name in KEPT},
        "loop_instructions": loop["instructions"],
        "loop_mma": loop["mma"],
        "narrow_share": loop["narrow_share"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="also candidates whose code has not changed")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    path = attention_model.FACTS
    known = json.loads(path.read_text())["facts"] if path.exists() and not options.all else {}
    digests = worker.run("digest", [(c.key, a) for c in CASES for a in c.archs], options.workers, MODULE)
    facts: dict[str, dict[str, Any]] = {case.key: {} for case in CASES}
    changed = []
    for (key, arch), rows in digests.items():
        there = known.get(key, {}).get(target_name(arch))
        if there is not None and not isinstance(rows, Mapping) and there["digest"] == _main_kernel(rows)["digest"]:
            facts[key][target_name(arch)] = there
        else:
            changed.append((key, arch))
    with tqdm(total=len(changed), unit="kernel", disable=not changed) as bar:
        for first in range(0, len(changed), AT_ONCE):
            some = changed[first : first + AT_ONCE]
            for (key, arch), rows in worker.run("compile", some, options.workers, MODULE).items():
                facts[key][target_name(arch)] = fact(rows)
            write_text(path, _text(facts))
            bar.update(len(some))
    print(f"{len(changed)} of {len(digests)} candidates were compiled; the others' code has not changed")
    return 0


def _text(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """One candidate and target per line, so that a change reads well in a diff."""
    lines = []
    for key, targets in sorted(facts.items()):
        rows = ",\n".join(f"  {json.dumps(target)}: {json.dumps(row)}" for target, row in sorted(targets.items()))
        lines.append(f" {json.dumps(key)}: {{\n{rows}}}")
    return f'{{"triton": {json.dumps(triton.__version__)}, "facts": {{\n' + ",\n".join(lines) + "}}\n"


if __name__ == "__main__":
    sys.exit(main())
