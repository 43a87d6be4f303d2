"""`vat-fast eval`: success rates in LIBERO. The work is in libero.py, evaluate.py, report.py and video.py."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from vat_fast.rollout.settings import OFFICIAL_INIT_STATES, EvaluationSettings

if TYPE_CHECKING:
    from vat_fast.policy import Policy
    from vat_fast.rollout.drivers import ChunkPolicy, ScriptedPolicy
    from vat_fast.rollout.episode import Script
    from vat_fast.rollout.evaluate import EvaluationResult

Commands = argparse._SubParsersAction  # the type argparse gives `add_subparsers`, which has no public name
EXPERT = "expert"
ENSEMBLING_HELP = "average the chunks that reach a step with weights exp(-M * i), or none (default: as the policy says)"
_CALIBRATION_SAMPLES = 32


def add_command(commands: Commands) -> None:
    """Add `eval`; it sets `run`, which takes the parsed arguments and returns the exit status."""
    p = commands.add_parser(
        "eval",
        help="success rate of a policy in LIBERO, with intervals, latencies and videos",
        description="The authors' protocol unless told otherwise. Run the same command again after a kill: it goes on "
        "where it stopped.",
    )
    p.add_argument("checkpoint", help=f"a policy's folder or Hub id, a blind policy's folder, or {EXPERT!r}")
    p.add_argument("--suite", required=True, help="spatial, object, goal, 10, 90, or one `libero-pro list` shows")
    p.add_argument("--tasks", type=parse_indices, help="indices in the suite, such as 0,3 or 0-4 (default all)")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--trials", type=int, help="episodes per task, from the first initial state on (default 50)")
    which.add_argument("--init-states", type=parse_indices, help="indices of initial states, such as 40-49")
    p.add_argument("--seed", type=int, default=7, help="of noise and displacements (default 7)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="episodes.jsonl, result.json, report.html")
    p.add_argument("--processes", type=int, default=2, help="simulators side by side (default 2)")
    p.add_argument("--replan-every", type=int, metavar="K", help="execute only K actions of each chunk")
    p.add_argument("--temporal-ensembling", type=parse_ensembling, metavar="M", help=ENSEMBLING_HELP)
    p.add_argument("--displace", type=float, default=0.0, metavar="CM", help="move what the task is about")
    p.add_argument("--render", choices=("official", "fast"), help="default: as the policy says, else official")
    p.add_argument("--size", type=int, help="side of the camera images in pixels (default: the policy's, else 256)")
    p.add_argument("--max-steps", type=int, help="step limit (default: the authors' for the suite)")
    p.add_argument("--settling-steps", type=int, default=10, help="before the policy takes over (default 10)")
    p.add_argument("--batched", action="store_true", help="one forward pass for all robots that wait: not bit-exact")
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "int16", "int8", "fp8"), default="fp32")
    p.add_argument(
        "--calibration",
        type=Path,
        metavar="PATH",
        help="observations to calibrate integers on CPUs with: a packed dataset or LIBERO's HDF5",
    )
    p.add_argument("--device", default="cpu", help="where the policy runs (default cpu)")
    p.add_argument("--video", metavar="WHICH", help="first, failures, or TASK:STATE,... such as 0:3,2:17")
    p.add_argument("--baseline", type=Path, metavar="DIR", help="evaluation of the same episodes to show beside it")
    p.add_argument("--timeout", type=float, default=120.0, help="seconds until a simulator counts as hung")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, report; 0, or 1 where episodes could not be finished.

    Raises:
        ValueError, ImportError, OSError: input that cannot be used, or a simulator that is missing.
    """
    from vat_fast.rollout.conditions import conditions
    from vat_fast.rollout.evaluate import EvaluationError
    from vat_fast.rollout.libero import evaluate_libero, libero_settings
    from vat_fast.rollout.report import text_report, write_reports

    size, render = image_options(args.checkpoint, args.size, args.render)
    settings = libero_settings(
        args.suite,
        args.tasks,
        step_limit=args.max_steps,
        init_states=_init_states(args),
        seed=args.seed,
        settling_steps=args.settling_steps,
        image_size=size,
        render=render,
        replan_every=args.replan_every,
        temporal_ensembling=args.temporal_ensembling,
        displace_cm=args.displace,
        batched=args.batched,
    )
    if args.video is not None:
        check_video_choice(args.video, settings)
    baseline = None if args.baseline is None else _baseline(args.baseline, settings)
    policy = _load(args, settings.suite)
    description = {"policy": args.checkpoint, "weights": _fingerprint(args.checkpoint), "dtype": args.dtype}
    try:
        result = evaluate_libero(
            policy,
            settings,
            folder=args.out,
            description=description,
            processes=args.processes,
            timeout=args.timeout,
            start_timeout=max(300.0, args.timeout),
        )
    except EvaluationError as error:
        raise ValueError(str(error)) from error
    print(text_report(result))
    facts = {**description, "device": args.device, "processes": args.processes, **conditions()}
    title = f"{args.checkpoint} on {settings.suite}"
    # Before the videos, which take longer and may fail.
    page = write_reports(args.out, result, facts, title=title, baseline=baseline)
    if args.video is not None:
        videos = _videos(args.video, result, args.out)
        write_reports(args.out, result, facts, title=title, videos=videos, baseline=baseline)
    print(page)
    return 1 if result.unfinished else 0


def parse_ensembling(text: str) -> float | Literal["none"]:
    """ "none", or the m of temporal ensembling; `EvaluationSettings` says which can be."""
    return "none" if text == "none" else float(text)


def parse_indices(text: str) -> tuple[int, ...]:
    """ "0,3,40-42" -> (0, 3, 40, 41, 42).

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"expected indices such as 0,3 or 40-49, got {text!r}")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def check_video_choice(choice: str, settings: EvaluationSettings) -> None:
    """Raise one ValueError before hours of evaluation where the choice of videos names none of its episodes."""
    from vat_fast.rollout.video import parse_choice

    for key in parse_choice(choice) or ():
        if key not in settings.episodes:
            raise ValueError(f"--video {choice}: {key.task}:{key.init_state} is not among the episodes to evaluate")


def _init_states(args: argparse.Namespace) -> tuple[int, ...]:
    if args.init_states is not None:
        return args.init_states
    count = OFFICIAL_INIT_STATES if args.trials is None else args.trials
    if count < 1:
        raise ValueError(f"--trials must be at least 1, got {count}")
    return tuple(range(count))


def image_options(checkpoint: str, size: int | None, render: str | None) -> tuple[int, str]:
    """Size and rendering of the images: as asked for, else as the policy was trained, else the authors'."""
    from vat_fast.policy import POLICY_FILE, PolicyConfig

    file = Path(checkpoint) / POLICY_FILE
    if file.is_file():
        config = PolicyConfig.load(file)
        size, render = size or config.simulated_size, render or config.simulated_render
    return size or 256, render or "official"


def load_vat(checkpoint: str, device: str, *, suite: str, **options: Any) -> Policy:
    """The policy with a VAT in a folder or Hub repository; `options` are of `Policy.from_pretrained`.

    Raises:
        ConfigError, FileNotFoundError, ...: as `Policy.from_pretrained`.
    """
    from vat_fast.hub import local_folder
    from vat_fast.policy import POLICY_FILE, STATISTICS_FILE, Policy
    from vat_fast.rollout.suites import base_suite

    folder = local_folder(checkpoint, [POLICY_FILE, STATISTICS_FILE])
    # A released folder does not say which of its suites it is asked for.
    released = None if (folder / POLICY_FILE).is_file() else base_suite(suite)
    return Policy.from_pretrained(checkpoint, device, suite=released, **options)


def _load(args: argparse.Namespace, suite: str) -> ChunkPolicy | ScriptedPolicy:
    """The policy that the command line names."""
    if args.checkpoint == EXPERT:
        from vat_fast.rollout.drivers import ScriptedPolicy
        from vat_fast.rollout.experts import expert_actions

        return ScriptedPolicy(EXPERT, cast("Script", expert_actions))
    from vat_fast.rollout.blind import BLIND_FILE, BlindPolicy

    if (Path(args.checkpoint) / BLIND_FILE).is_file():
        return BlindPolicy.from_pretrained(args.checkpoint)
    options: dict[str, Any] = {"batch": [1, args.processes]} if args.batched else {}
    if args.calibration is not None:
        from vat_fast.gate_cli import recorded_samples

        whole = load_vat(args.checkpoint, "cpu", suite=suite, frozen=False)
        options["calibration"] = recorded_samples(args.calibration, whole, [_CALIBRATION_SAMPLES])[0]
    return load_vat(args.checkpoint, args.device, suite=suite, dtype=args.dtype, **options)


def _fingerprint(checkpoint: str) -> str | None:
    """SHA-256 over the files of a local checkpoint; None for one that has none here."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".pt", ".json"):
            total.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    total.update(block)
    return total.hexdigest()


def _baseline(folder: Path, settings: EvaluationSettings) -> EvaluationResult:
    """The episodes of another evaluation that are among this one's."""
    from vat_fast.rollout.evaluate import EvaluationResult
    from vat_fast.rollout.records import read_records

    wanted = set(settings.episodes)
    records = [r for r in read_records(folder) if r.suite == settings.suite and r.key in wanted]
    if not records:
        raise ValueError(f"--baseline {folder} has no finished episode of those to evaluate")
    return EvaluationResult(settings, tuple(records))


def _videos(choice: str, result: EvaluationResult, out: Path) -> list[Path]:
    """Replay the chosen episodes into `out`/videos."""
    from tqdm import tqdm

    from vat_fast.rollout.libero import LiberoScenes
    from vat_fast.rollout.records import EpisodeRecord, load_actions
    from vat_fast.rollout.video import choose_episodes, replay, write_video

    settings = result.settings
    by_key = {record.key: record for record in result.records}
    chosen: Sequence[EpisodeRecord] = [by_key[key] for key in choose_episodes(choice, result.records)]
    scenes = LiberoScenes(settings.suite, settings.image_size, settings.render)
    scene, videos = None, []
    for record in tqdm(sorted(chosen, key=lambda record: record.key), unit="video", file=sys.stderr):
        if scene is None or scene.task_id != record.task:
            if scene is not None:
                scene.close()
            scene = scenes(record.task)
        path = out / "videos" / f"{record.key.name}_{'success' if record.success else 'failure'}.mp4"
        videos.append(write_video(path, replay(scene, record, load_actions(out, record), settings)))
    if scene is not None:
        scene.close()
    return videos
