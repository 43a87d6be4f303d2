"""Seconds from a fresh process to the first action, part by part, and peak memory: frozen and not, in each precision.

    python -m benchmarks.cold_start                                          vit-tiny, vit-small, siglip2-so400m
    python -m benchmarks.cold_start --presets vit-tiny --dtypes fp32 --repeats 5

Every start is a process of its own, on a policy that was saved before (random weights; its files are in the page
cache). Writes benchmarks/results/cold-<preset>.json; `python -m benchmarks.report` puts it into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.cold_child import WHO, Start
from benchmarks.interleave import ROOT, conditions
from benchmarks.step import RESULTS, save
from vat_fast.config import PRESETS, VATConfig


def start(folder: Path, who: str) -> Start:
    """One fresh process.

    Raises:
        RuntimeError: it failed; the message has the last line that it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.cold_child", str(folder), who, repr(time.time())]
    # The folder in front: run by path, a child would find neither benchmarks nor the tree that is measured.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        last = (done.stderr.strip() or f"status {done.returncode}, perhaps out of memory").splitlines()[-1]
        raise RuntimeError(f"{who} could not start: {last}")
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def save_policy(preset: str, folder: Path, **overrides: Any) -> None:
    """A policy of a preset with random weights, as a user would have it saved."""
    from benchmarks.unit_statistics import unit_statistics
    from benchmarks.variants import randomise
    from vat_fast import VAT
    from vat_fast.observation import ImageProcessing
    from vat_fast.policy import Policy, PolicyConfig

    config = VATConfig.from_preset(preset, **overrides)
    vat = VAT(config).eval()
    randomise(vat, 0)
    cameras = tuple(f"camera_{view}" for view in range(config.num_views))
    settings = PolicyConfig(image=ImageProcessing(image_size=config.image_size), cameras=cameras)
    Policy(vat, settings, unit_statistics(config.action_dim)).save_pretrained(folder)


def measure(preset: str, names: Sequence[str], repeats: int, **overrides: Any) -> dict[str, Any]:
    """The result file's content: of each part the median over `repeats` processes; rounds run everybody once.

    Args:
        overrides: VATConfig fields, for a smaller model.
    """
    where = conditions(0)
    found: dict[str, list[Start]] = {name: [] for name in names}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_policy(preset, Path(folder), **overrides)
        for name in tqdm([*names] * repeats, desc=preset, unit="start", mininterval=5):
            if name not in skipped:
                try:
                    found[name].append(start(Path(folder), name))
                except RuntimeError as error:
                    skipped[name] = str(error)
    rows = []
    for name, starts in found.items():
        if name not in skipped:
            each = [asdict(one) for one in starts]
            total = [one.total_s for one in starts]
            rows.append(
                {
                    "name": name,
                    **{key: median(one[key] for one in each) for key in each[0]},
                    "total_low_s": min(total),
                    "total_high_s": max(total),
                    "repeats": repeats,
                }
            )
    return {"kind": "cold_start", "preset": preset, "conditions": where, "rows": rows, "skipped": skipped}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; status 1 if somebody could not start."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_start", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--presets", nargs="+", choices=PRESETS, default=["vit-tiny", "vit-small", "siglip2-so400m"], metavar="PRESET"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=("fp32", "bf16", "int16", "int8"), default=["fp32", "bf16", "int8"]
    )
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each row (default 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    failed = False
    for preset in options.presets:
        names = [name for name in WHO if name.startswith("reference") or name.split()[-1] in options.dtypes]
        result = measure(preset, names, options.repeats)
        print(f"wrote {save(result, f'cold-{preset}', options.out)}")
        for name, why in result["skipped"].items():
            print(f"  {name} left out: {why}")
        failed = failed or bool(result["skipped"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
