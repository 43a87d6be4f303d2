"""From a model in its engine to a policy folder that `Policy.from_pretrained` and `vat-fast act` load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vat_fast.actions import Statistics, save_statistics
from vat_fast.checkpoint import build
from vat_fast.model import VAT
from vat_fast.policy import STATISTICS_FILE, Policy, PolicyConfig, Predictor
from vat_fast.train.adapters import LoRAOptions, merge_lora


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
        if (
            masters
            and parameter.requires_grad
            and hasattr(parameter, "_hp_mapping")
            and parameter.dtype != torch.float32
        ):
            value = safe_get_full_fp32_param(parameter)
        if value is None:
            with zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else torch.no_grad():
                value = parameter.detach().float().cpu().clone()
        state[name] = value.detach().float().cpu()
    return state


def make_policy(
    state: dict[str, Tensor],
    vat: VAT,
    config: PolicyConfig,
    statistics: Sequence[Statistics],
    lora: LoRAOptions | None = None,
) -> Policy:
    """A policy of its own from the weights of a model in training, float32 on the CPU; adapters are merged.

    Args:
        state: of `full_state`.
        vat: whose configuration the state has.
        config: cameras, images, tasks, gripper.
        statistics: of every dataset; `config.statistics_key` names the one that un-normalises.
        lora: of the run's adapters.
    """
    plain = state if lora is None else merge_lora(state, lora)
    model = build(vat.config, plain, Path("the model in training")).eval()
    chosen = next(entry for entry in statistics if entry.key == config.statistics_key)
    return Policy(cast(Predictor, model), config, chosen)


def write_policy(policy: Policy, statistics: Sequence[Statistics], folder: Path) -> None:
    """Write the policy folder with the statistics of every dataset; its files are replaced one by one."""
    policy.save_pretrained(folder)
    save_statistics(folder / STATISTICS_FILE, statistics)
