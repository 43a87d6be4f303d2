"""`vat-fast attention`: where a policy looks in an episode. The work is in attention.py and attention_sheet.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from vat_fast.rollout.eval_cli import ENSEMBLING_HELP, image_options, load_vat, parse_ensembling, parse_indices

Commands = argparse._SubParsersAction  # the type argparse gives `add_subparsers`, which has no public name


def add_command(commands: Commands) -> None:
    """Add `attention`; it sets `run`, which takes the parsed arguments and returns the exit status."""
    p = commands.add_parser(
        "attention",
        help="plays a LIBERO episode and draws where the policy's action tokens attend in the camera images",
    )
    p.add_argument("checkpoint", help="a policy's folder or Hub id")
    p.add_argument("--suite", required=True, help="spatial, object, goal, 10, 90, or one `libero-pro list` shows")
    p.add_argument("--task", type=int, required=True, help="index in the suite")
    p.add_argument("--init-state", type=int, default=0, help="index of the official initial state (default 0)")
    p.add_argument("--displace", type=float, default=0.0, metavar="CM", help="move what the task is about")
    p.add_argument("--seed", type=int, default=7, help="of noise and displacements (default 7)")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, a PNG file")
    p.add_argument(
        "--layers",
        type=parse_layers,
        default="mean",
        metavar="WHICH",
        help="mean of all (default), all: a row each, or indices such as 0,5-7",
    )
    p.add_argument("--moments", type=int, default=8, help="looks to show, evenly spread (default 8)")
    p.add_argument("--replan-every", type=int, metavar="K", help="execute only K actions of each chunk")
    p.add_argument("--temporal-ensembling", type=parse_ensembling, metavar="M", help=ENSEMBLING_HELP)
    p.add_argument("--render", choices=("official", "fast"), help="default: as the policy says, else official")
    p.add_argument("--size", type=int, help="side of the camera images in pixels (default: the policy's, else 256)")
    p.add_argument("--max-steps", type=int, help="step limit (default: the authors' for the suite)")
    p.add_argument("--device", default="cpu", help="where the policy runs (default cpu)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Play, draw, write; 0, whether the episode succeeded or not.

    Raises:
        ValueError, ImportError, OSError: input that cannot be used, or a simulator that is missing.
    """
    from vat_fast.files import write_bytes
    from vat_fast.rollout.attention import spread, watch_episode
    from vat_fast.rollout.attention_sheet import Rows, attention_sheet, check_rows, png
    from vat_fast.rollout.libero import LiberoScenes, libero_settings, simulator_cameras
    from vat_fast.rollout.records import EpisodeKey
    from vat_fast.rollout.suites import task_names

    if args.moments < 1:
        raise ValueError(f"--moments must be at least 1, got {args.moments}")
    size, render = image_options(args.checkpoint, args.size, args.render)
    settings = libero_settings(
        args.suite,
        [args.task],
        step_limit=args.max_steps,
        init_states=[args.init_state],
        seed=args.seed,
        image_size=size,
        render=render,
        replan_every=args.replan_every,
        temporal_ensembling=args.temporal_ensembling,
        displace_cm=args.displace,
    )
    names = task_names(settings.suite)
    if args.task >= len(names):
        raise ValueError(f"suite {settings.suite} has tasks 0 to {len(names) - 1}, got {args.task}")
    policy = load_vat(args.checkpoint, args.device, suite=settings.suite, frozen=False)
    count = policy.vat.config.layers
    chosen: Rows = [("mean of layers", range(count))]
    if args.layers != "mean":
        chosen = [(f"layer {layer}", [layer]) for layer in (range(count) if args.layers == "all" else args.layers)]
    check_rows(chosen, count)
    cameras = simulator_cameras(policy.config.cameras)
    name = names[args.task]
    with LiberoScenes(settings.suite, size, render, cameras)(args.task) as scene:
        key = EpisodeKey(args.task, args.init_state)
        moments, end = watch_episode(policy, scene, name, key, settings)
    outcome = f"{'success' if end.success else 'no success'} after {len(end.actions)} steps"
    moved = f", moved by up to {args.displace:g} cm" if args.displace else ""
    place = f"{settings.suite} {args.task}, initial state {args.init_state}{moved}"
    title = f"{name}\n{place}: {outcome}"
    sheet = attention_sheet(spread(moments, args.moments), policy.config.cameras, chosen, policy.config.image, title)
    write_bytes(args.out, png(sheet))
    print(f"{title}\n{args.out}")
    return 0


def parse_layers(text: str) -> str | tuple[int, ...]:
    """ "mean", "all", or indices as `parse_indices` reads them.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    return text if text in ("mean", "all") else parse_indices(text)
