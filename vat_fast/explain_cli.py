"""`vat-fast explain`: what a model is made of, the plan of a forward step by step, and what bounds it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, get_args

from vat_fast.config import PRESETS, VATConfig

if TYPE_CHECKING:
    from vat_fast.cli import Commands


def add_command(commands: Commands) -> None:
    """Register the command."""
    from vat_fast.frozen.target import Executor, Precision

    p = commands.add_parser("explain", help="what a model is made of, what a forward runs, and what bounds it")
    p.add_argument("--preset", choices=PRESETS, default="siglip2-so400m")
    p.add_argument("--checkpoint", help="explain the model of this folder or Hub id instead")
    p.add_argument("--views", type=int, help="camera views (default: the preset's 2)")
    p.add_argument("--batch", type=int, default=1, help="samples per forward (default 1)")
    p.add_argument("--dtype", choices=get_args(Precision), default="bf16")
    p.add_argument(
        "--executor", choices=get_args(Executor), default="triton", help="who runs the plan (default triton)"
    )
    p.add_argument("--images", choices=("float", "uint8"), default="uint8", help="form of the camera images")
    p.add_argument("--device", help="bounds for this device alone, such as H100 (default: all known)")
    p.add_argument("--without", default="", metavar="PASSES", help="comma-separated passes to leave out")
    p.add_argument("--summary", action="store_true", help="passes, totals and bounds, without the steps")
    p.add_argument("--json", action="store_true", help="as JSON: steps, passes, totals, bounds, notes")
    p.add_argument("--params", action="store_true", help="the parameter table instead")
    p.add_argument(
        "--train", action="store_true", help="memory per rank and a bound on the step time of training instead"
    )
    # The estimator is a floor above this one; the command line is where a user finds it.
    from vat_fast.train.estimate import add_arguments

    add_arguments(p.add_argument_group("with --train"))
    p.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> None:
    from vat_fast.frozen.explain import explain
    from vat_fast.frozen.target import Target
    from vat_fast.parameters import format_parameter_table

    if args.train:
        from vat_fast.train.estimate import report

        print(report(args))
        return
    if args.checkpoint is not None:
        from vat_fast.checkpoint import load_model

        config = load_model(args.checkpoint).config
    else:
        config = VATConfig.from_preset(args.preset)
    if args.views is not None:
        config = config.replace(num_views=args.views)
    if args.params:
        print(format_parameter_table(config))
        return
    target = Target(executor=args.executor, dtype=args.dtype, images=args.images)
    without = [name for name in args.without.split(",") if name]
    explanation = explain(config, target, batch=args.batch, device=args.device, without=without)
    print(explanation.json() if args.json else explanation.text(every_step=not args.summary))
