"""Folding the affine parts of norms, and LayerScale, into linears."""

from __future__ import annotations

from dataclasses import replace

from vat_fast.frozen import recipes
from vat_fast.frozen.passes.rewrite import only_reader
from vat_fast.frozen.plan import Plan, Step, Weight
from vat_fast.frozen.recipes import Recipe
from vat_fast.frozen.target import Target


def fold_norms(plan: Plan, target: Target) -> Plan:
    """W (w * n + c) + b = (W diag(w)) n + (W c + b): the norm keeps only mean and variance."""
    readers, change = plan.readers(), dict[str, tuple[Step, ...]]()
    weights = _Weights(plan)
    for step in plan.all_steps:
        if step.op != "norm" or not step.weights:
            continue
        after = readers[step.outputs["y"].buffer]
        if not all(reader.op == "linear" for reader in after):
            continue
        scale, shift = (plan.weights[step.weights[role]].recipe for role in ("weight", "bias"))
        change[step.name] = (step.replace(weights={}),)
        for reader in after:
            matrix = plan.weights[reader.weights["weight"]]
            bias = plan.weights[reader.weights["bias"]]
            folded = {
                "weight": weights.add(matrix, recipes.norm_into_weight(matrix.recipe, scale)),
                "bias": weights.add(bias, recipes.norm_into_bias(matrix.recipe, shift, bias.recipe)),
            }
            change[reader.name] = (reader.replace(weights={**reader.weights, **folded}),)
    # A later norm may stand behind a linear that is itself rewritten; every step is rewritten once at most.
    return weights.into(plan).rewritten(change)


def fold_layer_scale(plan: Plan, target: Target) -> Plan:
    """s * (W x + b) = (diag(s) W) x + s * b."""
    writers, readers, change = plan.writers(), plan.readers(), dict[str, tuple[Step, ...]]()
    weights = _Weights(plan)
    for step in plan.all_steps:
        if step.op != "residual" or "scale" not in step.weights:
            continue
        (before,) = writers[step.inputs["h"].buffer]
        if before.op != "linear" or only_reader(plan, readers, step.inputs["h"].buffer) is not step:
            continue
        scale = plan.weights[step.weights["scale"]].recipe
        folded = {}
        for role in ("weight", "bias"):
            weight = plan.weights[before.weights[role]]
            folded[role] = weights.add(weight, recipes.scale_rows(weight.recipe, scale))
        change[before.name] = (before.replace(weights={**before.weights, **folded}),)
        change[step.name] = (step.replace(weights={}),)
    return weights.into(plan).rewritten(change)


class _Weights:
    """New weights of a plan, those with equal recipes once."""

    def __init__(self, plan: Plan) -> None:
        self._weights = dict(plan.weights)
        self._names: dict[Recipe, str] = {}

    def add(self, old: Weight, recipe: Recipe) -> str:
        """The name of a weight like `old` with another recipe."""
        if recipe not in self._names:
            name = f"{old.name}'"
            while name in self._weights:
                name += "'"
            self._names[recipe] = name
            self._weights[name] = replace(old, name=name, recipe=recipe)
        return self._names[recipe]

    def into(self, plan: Plan) -> Plan:
        """The plan with them."""
        return plan.replace(weights=self._weights)
