"""Where a model's parameters are: in a released file, in the model here, and in a frozen one."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from vat_fast.config import VATConfig
from vat_fast.model import VAT
from vat_fast.released_layout import layout
from vat_fast.without_values import without_values


@dataclass(frozen=True)
class ParameterRow:
    """One group of parameters, in counts.

    released: in the authors' files of this model.
    model: in `VAT`, which holds what its output depends on.
    frozen: still needed when FiLM is folded into a table of gamma and beta per task.
    """

    group: str
    released: int
    model: int
    frozen: int


_BACKBONE = ("vision", "action", "FiLM", "pooling")
_GROUPS = (*_BACKBONE, "head", "projectors")


def parameter_table(config: VATConfig) -> list[ParameterRow]:
    """Rows by group, the sum of the backbone's, and the total; counted from the layouts of files and module.

    The action group holds action tokens, their positions and the task table too; final norms count with their stream.
    """
    shapes = layout(config, has_film=config.action_stream != "shared" or config.task_conditioning == "film")
    released = dict.fromkeys(_GROUPS, 0)
    for role, keys in shapes.items():
        for key, shape in keys.items():
            released[_released_group(role, key)] += prod(shape)
    model, frozen = dict.fromkeys(_GROUPS, 0), dict.fromkeys(_GROUPS, 0)
    with without_values():
        vat = VAT(config)
    for name, p in vat.named_parameters():
        group = _model_group(name)
        model[group] += p.numel()
        # Frozen, the task id picks rows of a table of gamma and beta; FiLM and the task embedding are gone.
        if group != "FiLM" and (config.task_conditioning != "film" or not name.startswith("task_embedding")):
            frozen[group] += p.numel()
    if config.task_conditioning == "film":
        frozen["FiLM"] = config.num_tasks * config.layers * 2 * config.action_width

    def row(title: str, groups: tuple[str, ...]) -> ParameterRow:
        return ParameterRow(title, *(sum(column[g] for g in groups) for column in (released, model, frozen)))

    rows = [row(group, (group,)) for group in _GROUPS]
    rows.insert(len(_BACKBONE), row("backbone file", _BACKBONE))
    return [*(r for r in rows if r.released or r.model), row("total", _GROUPS)]


def format_parameter_table(config: VATConfig) -> str:
    """The table as text, in millions."""
    lines = [f"{'parameters, millions':22}{'released files':>16}{'this model':>14}{'FiLM as table':>16}"]
    for row in parameter_table(config):
        counts = (f"{count / 1e6:,.1f}" for count in (row.released, row.model, row.frozen))
        lines.append("{:22}{:>16}{:>14}{:>16}".format(row.group, *counts))
    return "\n".join(lines)


def _released_group(role: str, key: str) -> str:
    if role == "action_head":
        return "head"
    if role.endswith("projector"):
        return "projectors"
    if key.startswith("attn_pool."):
        return "pooling"
    if "film_modulator" in key:
        return "FiLM"
    if role == "vat" and key.startswith("blocks."):
        return "action"
    if key.startswith(("action_", "task_embedding", "norm_act")):
        return "action"
    return "action" if "_act." in key and "non_act" not in key else "vision"


def _model_group(name: str) -> str:
    top = name.split(".")[0]
    if top == "action_blocks":
        return "FiLM" if ".film." in name else "action"
    if top in ("action_tokens", "action_position", "task_embedding"):
        return "action"
    if top.endswith("projector"):
        return "projectors"
    return "head" if top == "head" else "vision"
