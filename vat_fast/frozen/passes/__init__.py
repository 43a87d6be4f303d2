"""Passes from plan to plan, each exact unless it says otherwise, each to be switched off by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches

from vat_fast.frozen.passes.constants import film_table, first_layer_constants
from vat_fast.frozen.passes.dead import drop_dead_layer
from vat_fast.frozen.passes.eight_bit import quantise_in_epilogues
from vat_fast.frozen.passes.epilogues import fuse_epilogues, fuse_norms, norms_in_linears
from vat_fast.frozen.passes.merge import merge_projections, share_steps, views_as_batch
from vat_fast.frozen.passes.norms import fold_layer_scale, fold_norms
from vat_fast.frozen.passes.pixels import uint8_input
from vat_fast.frozen.passes.quantise import quantise
from vat_fast.frozen.plan import Plan
from vat_fast.frozen.target import Target


@dataclass(frozen=True)
class Pass:
    """One rewriting, and what it is good for."""

    name: str
    run: Callable[[Plan, Target], Plan]
    purpose: str
    when: Callable[[Target], bool] = lambda target: True


PASSES: tuple[Pass, ...] = (
    Pass("drop_dead_layer", drop_dead_layer, "steps whose result nothing reads: the rest of the last vision layer"),
    Pass("views_as_batch", views_as_batch, "one patch embedding and one attention for all views"),
    Pass("film_table", film_table, "gamma and beta from a table by task id instead of a network per layer"),
    Pass("fold_norms", fold_norms, "LayerNorm's weight and bias into the linear that follows"),
    Pass("fold_layer_scale", fold_layer_scale, "LayerScale into the linear before it"),
    Pass("first_layer_constants", first_layer_constants, "what depends on the task id alone is looked up"),
    Pass("share_steps", share_steps, "steps that compute the same from the same run once"),
    Pass("merge_projections", merge_projections, "linears that read the same rows become one: D -> 5D"),
    Pass(
        "fuse_epilogues", fuse_epilogues, "activation and residual inside the linear before them, FiLM inside the norm"
    ),
    Pass(
        "uint8_input",
        uint8_input,
        "raw camera bytes in; crop and normalisation inside patch embedding",
        lambda target: target.images == "uint8",
    ),
    Pass(
        "fuse_norms",
        fuse_norms,
        "norms and FiLM inside the linears around them, by row statistics",
        lambda target: target.executor == "triton",
    ),
    Pass(
        "fuse_norms",
        norms_in_linears,
        "norms and FiLM inside the linears that read them",
        lambda target: target.executor == "native",
    ),
    Pass(
        "quantise",
        quantise,
        "weights and activations of the products in fewer bits (changes the result; accepted by measured error)",
        lambda target: target.quantised and target.executor != "triton",
    ),
    Pass(
        "quantise",
        quantise_in_epilogues,
        "8-bit weights, and activations rounded by the launch before (accepted by measured error)",
        lambda target: target.quantised and target.executor == "triton",
    ),
)
"""In the order they run. `streams.split_streams` and `memory.reuse_buffers` follow, under these names."""

SCHEDULING = ("split_streams", "reuse_buffers")


def check_names(without: Collection[str]) -> None:
    """Raise a ValueError for a name that no pass has."""
    known = [p.name for p in PASSES] + list(SCHEDULING)
    for name in without:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"no pass is named {name!r}{hint}; passes are {', '.join(known)}")


def run_passes(plan: Plan, target: Target, without: Collection[str] = ()) -> list[tuple[Pass, Plan]]:
    """Every pass that applies to `target` with the plan after it, in order; those in `without` are left out.

    Raises:
        ValueError: a name in `without` is no pass's.
    """
    check_names(without)
    history = []
    for p in PASSES:
        if p.name in without or not p.when(target):
            continue
        plan = p.run(plan, target)
        plan = plan.replace(applied=(*plan.applied, p.name))
        history.append((p, plan))
    return history
