"""From a training to a policy folder that `Policy.from_pretrained` and `vat-fast act` load.

    python -m vat_fast.train.export RUN OUT                  # the newest whole checkpoint of a run's folder
    python -m vat_fast.train.export RUN OUT --step 4000 --released

The command needs the run's folder alone, not its data and no other ranks, and gives what the run itself exports.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vat_fast import released
from vat_fast.actions import Statistics, load_statistics, save_statistics
from vat_fast.checkpoint import CheckpointError as ModelError
from vat_fast.checkpoint import build
from vat_fast.config import ConfigError, VATConfig
from vat_fast.model import VAT
from vat_fast.policy import POLICY_FILE, STATISTICS_FILE, Policy, PolicyConfig, Predictor
from vat_fast.train.adapters import LoRAOptions, merge_lora
from vat_fast.train.checkpoints import CheckpointError, Checkpoints, load_tensors, rank_file, read_manifest, verify
from vat_fast.train.config import load_config
from vat_fast.train.plain_load import UnsafeFileError, data_only

CHECKPOINTS, CONFIG_FILE, MODEL_CONFIG_FILE = "checkpoints", "config.yaml", "config.json"
"""What a run's folder holds beside `policy.json`, `dataset_statistics.json` and its logs."""

_UNTOLD = (
    "num_heads",
    "num_views",
    "num_layers",
    "shared_keys",
    "vision_gelu",
    "action_scale",
    "task_conditioning",
    "diffusion_steps",
    "norm_eps",
)
_WRAPPER = "vat."


def full_state(vat: VAT, masters: bool = True) -> dict[str, Tensor]:
    """All weights, float32 on the CPU, by their names in `vat`, from however DeepSpeed shards them.

    Args:
        vat: inside its engine. Call it on all ranks together.
        masters: take the optimiser's float32 copies where the model's own are narrower.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, Tensor] = {}
    for name, parameter in vat.named_parameters():
        value: Tensor | None = None
        is_sharded = hasattr(parameter, "ds_id")
        has_master = parameter.requires_grad and (is_sharded or hasattr(parameter, "_hp_mapping"))
        if masters and has_master and parameter.dtype != torch.float32:
            value = safe_get_full_fp32_param(parameter)
        if value is None:
            with zero.GatheredParameters([parameter]) if is_sharded else torch.no_grad():
                value = parameter.detach().float().cpu().clone()
        state[name] = value.detach().float().cpu()
    return state


def saved_state(path: Path) -> dict[str, Tensor]:
    """What `full_state` would give of a checkpoint's training; averaged weights where it has a moving average.

    Args:
        path: a whole checkpoint, of any number of ranks and any ZeRO stage.

    Raises:
        CheckpointError: it is not whole, damaged, or holds more than data.
    """
    manifest = read_manifest(path)
    verify(path, manifest)
    try:
        with data_only():
            state = _model_state(path) if manifest["stage"] == 0 else _optimizer_state(path)
    except UnsafeFileError as error:
        raise CheckpointError(f"{path} was not loaded: {error}") from error
    weights = {name.removeprefix(_WRAPPER): value.float() for name, value in state.items()}
    # The run averages in float32 and puts the result into the model, whose precision it then has.
    dtype = torch.bfloat16 if manifest["dtype"] == "bf16" else torch.float32
    ranks = [load_tensors(path / rank_file(rank)) for rank in range(manifest["world_size"])]
    for name in weights:
        parts = [part[name].flatten() for part in ranks if name in part]
        if parts:
            # One rank has it, or with ZeRO-3 each a part, the last one filled up.
            average = torch.cat(parts)[: weights[name].numel()].view_as(weights[name])
            weights[name] = average.to(dtype).float()
    return weights


def make_policy(
    state: dict[str, Tensor],
    model: VATConfig,
    config: PolicyConfig,
    statistics: Sequence[Statistics],
    lora: LoRAOptions | None = None,
) -> Policy:
    """A policy of its own from the weights of a model in training, float32 on the CPU; adapters are merged.

    Args:
        state: of `full_state` or `saved_state`.
        model: whose weights they are.
        config: cameras, images, tasks, gripper.
        statistics: of every dataset; `config.statistics_key` names the one that un-normalises.
        lora: of the run's adapters.
    """
    plain = state if lora is None else merge_lora(state, lora)
    vat = build(model, plain, Path("the model in training")).eval()
    chosen = next(entry for entry in statistics if entry.key == config.statistics_key)
    return Policy(cast(Predictor, vat), config, chosen)


def write_policy(policy: Policy, statistics: Sequence[Statistics], folder: Path) -> None:
    """Write the policy folder with the statistics of every dataset; its files are replaced one by one."""
    policy.save_pretrained(folder)
    save_statistics(folder / STATISTICS_FILE, statistics)


def write_released(policy: Policy, statistics: Sequence[Statistics], folder: Path, step: int) -> list[str]:
    """Write the policy in the authors' layout, whose files are named by the step, with policy.json beside them.

    Returns:
        What somebody who loads it has to say, since the authors' files do not: a sentence each, most often none.

    Raises:
        ValueError: a model that the authors' code does not have (`released.check_exportable`).
    """
    config = policy.vat.config
    released.export(cast(VAT, policy.vat), folder, step=step)
    save_statistics(folder / STATISTICS_FILE, statistics)
    policy.config.save(folder / POLICY_FILE)
    try:
        read = released.load(folder).vat.config
    except (ModelError, ConfigError) as error:
        return [f"the authors' files do not tell everything of this model: {error}"]
    return [
        f"the authors' files do not tell {name}: it is {getattr(config, name)!r} here and would be taken for "
        f"{getattr(read, name)!r}"
        for name in _UNTOLD
        if getattr(config, name) != getattr(read, name)
    ]


def released_folder(run: Path, step: int) -> Path:
    """Where a run writes the authors' layout at its end, named as they name theirs."""
    return run / f"policy--{step}_ckpt"


def export(run: str | Path, out: str | Path, step: int | None = None, as_released: bool = False) -> list[str]:
    """Write the policy of one checkpoint of a run, and say in a few sentences what was done.

    Args:
        run: the run's folder.
        out: a new or empty folder.
        step: of the checkpoint; None: the newest whole one.
        as_released: in the authors' layout.

    Raises:
        FileNotFoundError: no such run.
        FileExistsError: `out` holds something.
        CheckpointError: there is no such whole checkpoint, or it is damaged.
        ConfigError, StatisticsError: the run's own files are not what a run writes.
        ValueError: a model that the authors' code does not have.
    """
    run, out = Path(run), Path(out)
    needed = (CONFIG_FILE, MODEL_CONFIG_FILE, POLICY_FILE, STATISTICS_FILE)
    missing = [name for name in needed if not (run / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{run} is no run's folder: it has no {', '.join(missing)}; give the `output` of a training's configuration"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and not an empty folder; choose another name")
    path = _find(Checkpoints(run / CHECKPOINTS), step)
    model = VATConfig.from_json_file(run / MODEL_CONFIG_FILE)
    if as_released:
        released.check_exportable(model)
    lora = load_config(run / CONFIG_FILE).train.lora
    statistics = list(load_statistics(run / STATISTICS_FILE).values())
    policy = make_policy(
        saved_state(path),
        model,
        PolicyConfig.load(run / POLICY_FILE),
        statistics,
        None if lora is None else LoRAOptions.from_dict(lora),
    )
    notes = []
    if as_released:
        notes = write_released(policy, statistics, out, read_manifest(path)["step"])
    else:
        write_policy(policy, statistics, out)
    return [f"the policy of {path} is in {out}", *notes]


def _find(checkpoints: Checkpoints, step: int | None) -> Path:
    """The checkpoint of a step, or the newest."""
    whole = {read_manifest(path)["step"]: path for path in checkpoints.whole()}
    if not whole:
        raise CheckpointError(f"{checkpoints.folder} has no whole checkpoint")
    step = max(whole) if step is None else step
    if step not in whole:
        raise CheckpointError(
            f"{checkpoints.folder} has no whole checkpoint of step {step}; it has {', '.join(map(str, whole))}"
        )
    return whole[step]


def _model_state(path: Path) -> dict[str, Tensor]:
    """The model of ZeRO-0, which every rank has and one has written."""
    (file,) = path.glob("*_model_states.pt")
    module: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True)["module"]
    return module


def _optimizer_state(path: Path) -> dict[str, Tensor]:
    """The float32 weights from the optimiser's shards, and what is frozen."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It reports its progress in print and on a bar.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m vat_fast.train.export", description="Export a run's policy.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, `output` of its configuration")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest whole one)")
    parser.add_argument("--released", action="store_true", help="in the authors' layout")
    args = parser.parse_args(arguments)
    try:
        lines = export(args.run, args.out, args.step, args.released)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
