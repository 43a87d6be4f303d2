"""Train a VAT.

    deepspeed --num_gpus 4 train/main.py --config train/configs/libero_goal.yaml --set zero.stage=2
    python -m vat_fast.train.main --config train/configs/smoke.yaml

Run the same command again after a kill: it goes on from the newest whole checkpoint.
"""

# Loader workers import this file once more, so it imports what a run needs only when there is one.
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="train/main.py", description="Train a VAT.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML, see train/configs")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change keys; may be repeated",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: from the newest whole checkpoint, if there is one; never: refuse a folder that has one",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a training; returns the exit status: 0, 2 for a mistake in the input, or what `launch` says for a stop."""
    args = parse_arguments(arguments)
    from vat_fast.train import launch
    from vat_fast.train.config import load_config

    try:
        config = load_config(args.config, args.set)
    except (ValueError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    with launch.start(config.train.threads) as place:
        from vat_fast.train.run import run

        return run(config, place, args.resume)


if __name__ == "__main__":
    sys.exit(main())
