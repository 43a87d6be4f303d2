"""`vat-fast`: the command line. Each command is a thin wrapper; the work is in the module it names."""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vat_fast.config import PRESETS

if TYPE_CHECKING:
    from vat_fast.policy import Policy


class UsageError(Exception):
    """Something the user can put right; shown as one line, without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for input that cannot be used, 1 if `gate` refuses."""
    parser = argparse.ArgumentParser(prog="vat-fast", description="Vision Action Transformer, made fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_act,
        _add_convert,
        _add_explain,
        _add_gate,
        _add_data,
        _add_collect,
        _add_eval,
        _add_attention,
        _add_doctor,
    ):
        add(commands)
    args = parser.parse_args(arguments)
    try:
        return args.run(args) or 0
    except (UsageError, ValueError, OSError, ImportError) as error:
        print(f"vat-fast {args.command}: {error}", file=sys.stderr)
        return 2


Commands = argparse._SubParsersAction  # the type argparse gives `add_subparsers`, which has no public name


def _add_act(commands: Commands) -> None:
    p = commands.add_parser(
        "act", help="the actions a checkpoint predicts for given camera images, with time and memory"
    )
    p.add_argument("checkpoint", help="a folder (ours or a released one) or a Hub id")
    p.add_argument(
        "--image",
        action="append",
        type=Path,
        metavar="FILE",
        help="one per view, main camera first; default: the packaged LIBERO frames",
    )
    p.add_argument("--task", required=True, help="task name or id")
    p.add_argument("--proprio", help="comma-separated state in robot units, for models that take it")
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "int16", "int8", "fp8"), default="fp32")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    p.add_argument("--suite", help="LIBERO suite of a released folder, where its statistics do not tell")
    p.add_argument("--steps", type=int, default=3, help="timed predictions after a warm-up (default 3)")
    p.set_defaults(run=_act)


def _act(args: argparse.Namespace) -> None:
    from vat_fast.policy import Policy

    start = time.perf_counter()
    policy = Policy.from_pretrained(args.checkpoint, device=args.device, dtype=args.dtype, suite=args.suite)
    print(f"loaded {args.checkpoint} in {time.perf_counter() - start:.1f} s ({args.dtype})", flush=True)
    config = policy.vat.config
    paths = args.image
    if paths is not None and len(paths) != config.num_views:
        raise UsageError(f"the model has {config.num_views} views, got {len(paths)} --image")
    images = _sample_images(config.num_views) if paths is None else [_read_image(path) for path in paths]
    proprio = None if args.proprio is None else [float(x) for x in args.proprio.split(",")]
    task = int(args.task) if args.task.isdecimal() else args.task
    _show_prediction(policy, images, proprio, task, args.steps)


def _show_prediction(policy: Policy, images: list, proprio: list | None, task: str | int, steps: int) -> None:
    """Print one chunk of actions, then latency and memory of `steps` predictions from raw images to actions."""
    import numpy as np
    import torch

    observation = dict(zip(policy.config.cameras, images, strict=True))
    if proprio is not None:
        observation["state"] = np.asarray(proprio, dtype=np.float32)
    actions = policy.act(observation, task)  # the first one warms up
    latencies = []
    for _ in range(steps):
        start = time.perf_counter()
        actions = policy.act(observation, task)
        latencies.append(1e3 * (time.perf_counter() - start))
    sizes = ", ".join("x".join(map(str, image.shape[:2])) for image in images)
    print(f"{len(images)} images ({sizes}), task {task!r} -> {len(actions)} actions")
    with np.printoptions(precision=4, suppress=True, linewidth=120):
        print(actions)
    low, mid, high = min(latencies), statistics.median(latencies), max(latencies)
    threads = torch.get_num_threads()
    print(f"images to actions: median {mid:,.0f} ms ({low:,.0f} to {high:,.0f} over {steps} runs), {threads} threads")
    print(f"peak memory of this process: {peak_memory_bytes() / 2**30:.2f} GiB")


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _sample_images(count: int) -> list:
    """`count` packaged 256 x 256 LIBERO camera frames, uint8 (256, 256, 3): main camera, then wrist, repeated."""
    folder = Path(__file__).parent / "samples"
    files = [folder / "agentview.png", folder / "wrist.png"]
    return [_read_image(files[min(i, 1)]) for i in range(count)]


def _read_image(path: Path) -> object:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UsageError(f"no image file {path}") from error
    except OSError as error:
        raise UsageError(f"{path} is not an image that can be read: {error}") from error


def _add_convert(commands: Commands) -> None:
    p = commands.add_parser("convert", help="released checkpoint folder to ours, or ours to the released layout")
    p.add_argument("input", metavar="IN", help="a folder or a Hub id")
    p.add_argument("output", type=Path, metavar="OUT")
    p.add_argument("--task-conditioning", choices=("film", "additive", "none"), help="what the file was trained with")
    p.add_argument("--last-view-only", action="store_true", help="shared weights: attend to the last view, as released")
    p.add_argument("--stop-block", type=int, metavar="N", help="index of the last block that runs (depth - 2)")
    p.add_argument("--preset", choices=PRESETS, help="backbone, where its sizes do not tell")
    p.add_argument("--num-heads", type=int, metavar="H", help="attention heads of a backbone that is no preset's")
    p.add_argument("--views", type=int, default=2, help="camera views the policy was trained with (default 2)")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    p.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from vat_fast.convert import convert

    summary = convert(
        args.input,
        args.output,
        preset=args.preset,
        num_heads=args.num_heads,
        num_views=args.views,
        task_conditioning=args.task_conditioning,
        last_view_only=args.last_view_only,
        stop_block=args.stop_block,
        overwrite=args.overwrite,
    )
    print(summary)


def _add_explain(commands: Commands) -> None:
    from vat_fast.explain_cli import add_command

    add_command(commands)


def _add_gate(commands: Commands) -> None:
    from vat_fast.gate_cli import add_command

    add_command(commands)


def _add_data(commands: Commands) -> None:
    # The data tools are a floor above this one; the command line is where a user finds them.
    from vat_fast.train.data.cli import add_commands

    add_commands(commands)


def _add_collect(commands: Commands) -> None:
    from vat_fast.rollout.cli import add_commands

    add_commands(commands)


def _add_eval(commands: Commands) -> None:
    from vat_fast.rollout.eval_cli import add_command

    add_command(commands)


def _add_attention(commands: Commands) -> None:
    from vat_fast.rollout.attention_cli import add_command

    add_command(commands)


def _add_doctor(commands: Commands) -> None:
    p = commands.add_parser("doctor", help="what runs where on this machine, and what is missing")
    p.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from vat_fast.doctor import report

    print(report())


if __name__ == "__main__":
    sys.exit(main())
