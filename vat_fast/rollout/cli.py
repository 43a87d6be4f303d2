"""`vat-fast collect`: demonstrations of the scripted experts. The work is in collect.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from vat_fast.rollout.eval_cli import parse_indices

Commands = argparse._SubParsersAction  # the type argparse gives `add_subparsers`, which has no public name


def add_commands(commands: Commands) -> None:
    """Add `collect`; it sets `run`, which takes the parsed arguments and returns the exit status."""
    p = commands.add_parser(
        "collect",
        help="demonstrations of scripted experts in LIBERO's scenes, in LIBERO's HDF5 layout",
        description="Run the same command again after a kill: it goes on where it stopped, with the same result.",
    )
    p.add_argument("--suite", required=True, help="spatial, object or goal, or a perturbed one of these")
    p.add_argument("--tasks", type=parse_indices, required=True, help="indices in the suite, such as 0,3 or 0-4")
    p.add_argument("--episodes", type=int, default=50, help="per task (default 50)")
    p.add_argument("--init-states", type=parse_indices, help="official initial states to use in turn (default 0-49)")
    p.add_argument("--size", type=int, default=128, help="side of the camera images in pixels (default 128)")
    p.add_argument("--render", choices=("official", "fast"), default="official", help="fast: no antialiasing, mirrors")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--displace", type=float, default=0.0, metavar="CM", help="move the objects of the goal up to CM")
    p.add_argument("--noise", type=float, default=0.0, metavar="S", help="standard deviation on executed actions")
    p.add_argument("--recoveries", action="store_true", help="push the hand aside now and then; the expert recovers")
    p.add_argument("--disturbed-share", type=float, default=1.0, help="of episodes with noise and pushes (default 1)")
    p.add_argument("--seed", type=int, default=0, help="of displacements, noise and pushes")
    p.add_argument("--learner", metavar="CHECKPOINT", help="this policy drives first, then the expert shows the way on")
    p.add_argument("--learner-steps", type=int, nargs=2, default=(10, 120), metavar=("LEAST", "MOST"))
    p.add_argument("--processes", type=int, default=2, help="simulators side by side (default 2), 2.5 GB each")
    p.add_argument("--timeout", type=float, default=300.0, help="seconds until a simulator counts as hung")
    p.set_defaults(run=_collect)

    p = commands.add_parser(
        "frames",
        help="images of LIBERO's scenes with everything moved, and where each object is: to pretrain a vision stream",
        description="Run the same command again after a kill: it goes on where it stopped.",
    )
    p.add_argument("--suite", required=True, help="spatial, object or goal")
    p.add_argument("--tasks", type=parse_indices, required=True, help="indices in the suite, such as 0,3 or 0-4")
    p.add_argument("--frames", type=int, default=1000, help="per task (default 1000)")
    p.add_argument("--displace", type=float, default=10.0, metavar="CM", help="of every object (default 10)")
    p.add_argument("--size", type=int, default=128, help="side of the camera images in pixels (default 128)")
    p.add_argument("--render", choices=("official", "fast"), default="official", help="fast: no antialiasing, mirrors")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--processes", type=int, default=2, help="simulators side by side (default 2), 2.5 GB each")
    p.set_defaults(run=_frames)


def _collect(args: argparse.Namespace) -> int:
    from vat_fast.rollout.collect import CollectSettings, collect

    settings = CollectSettings(
        suite=args.suite,
        tasks=args.tasks,
        episodes=args.episodes,
        init_states=args.init_states or tuple(range(50)),
        size=args.size,
        render=args.render,
        displace_cm=args.displace,
        noise=args.noise,
        pushes=args.recoveries,
        disturbed_share=args.disturbed_share,
        seed=args.seed,
        learner=args.learner,
        learner_steps=tuple(args.learner_steps),
    )
    reports = collect(settings, args.out, processes=args.processes, timeout=args.timeout)
    for report in reports:
        where = report.file or "no file"
        failed = f", failed: {', '.join(map(str, report.failed))}" if report.failed else ""
        print(f"{report.task} {report.name}: {report.collected} of {settings.episodes}{failed}; {where}")
        for episode, reason in report.lost.items():
            print(f"  episode {episode} was lost: {reason}; run the command again")
    return 1 if any(report.lost for report in reports) else 0


def _frames(args: argparse.Namespace) -> int:
    from vat_fast.rollout.frames import FrameSettings, collect_frames

    settings = FrameSettings(
        suite=args.suite,
        tasks=args.tasks,
        frames=args.frames,
        size=args.size,
        render=args.render,
        displace_cm=args.displace,
        seed=args.seed,
    )
    files = collect_frames(settings, args.out, processes=args.processes)
    print(f"{len(files)} files in {args.out}")
    return 0
