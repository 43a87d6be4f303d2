"""Computing beforehand what depends on nothing but weights and the task id.

Such values are followed from step to step as recipes. Where one reaches a step that also reads images or state, it
becomes a table by task id (or, if it does not even depend on the task, a constant buffer) and the steps behind it go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from vat_fast.frozen import recipes
from vat_fast.frozen.passes.rewrite import whole
from vat_fast.frozen.plan import Access, Plan, Step, Weight
from vat_fast.frozen.recipes import Recipe
from vat_fast.frozen.target import Target


def film_table(plan: Plan, target: Target) -> Plan:
    """FiLM's networks read the task embedding alone: gamma and beta become a table (tasks, 2D) per layer."""
    return _fold(plan, lambda shape: len(shape) == 2)


def first_layer_constants(plan: Plan, target: Target) -> Plan:
    """Without extra tokens the first action layer's FiLM, norm and query are constants per task."""
    return _fold(plan, lambda shape: True)


@dataclass(frozen=True)
class _Value:
    recipe: Recipe
    by_task: bool
    """Whether the recipe gives one value per task (first dimension), or one for all."""


def _fold(plan: Plan, wanted: Callable[[tuple[int, ...]], bool]) -> Plan:
    """Fold every value whose buffer's shape is wanted."""
    known: dict[str, _Value] = {}
    for step in plan.all_steps:
        out = step.outputs["y"]
        if whole(plan, out) and wanted(plan.buffers[out.buffer].shape):
            value = _value(plan, step, known)
            if value is not None:
                known[out.buffer] = value
    readers, change = plan.readers(), dict[str, tuple[Step, ...]]()
    buffers, weights = dict(plan.buffers), dict(plan.weights)
    for step in plan.all_steps:
        name = step.outputs["y"].buffer
        if name not in known or not whole(plan, step.outputs["y"]):
            continue
        value, outside = known[name], [r for r in readers.get(name, []) if not _is_known(plan, r, known)]
        if value.by_task and all(r.op == "film" and r.inputs["gamma_beta"].buffer == name for r in outside):
            change[step.name] = ()
            for reader in outside:
                table = _table(plan, f"{reader.name}.table", value, name)
                weights[table.name] = table
                inputs = {"x": reader.inputs["x"], "task_id": Access("task_id")}
                change[reader.name] = (reader.replace(inputs=inputs, weights={"table": table.name}),)
        elif not value.by_task:
            change[step.name] = ()
            buffers[name] = replace(plan.buffers[name], role="constant", recipe=value.recipe)
        elif step.op != "lookup":
            table = _table(plan, f"{name}.table", value, name)
            weights[table.name] = table
            lookup = Step(
                step.name,
                "lookup",
                {"index": Access("task_id")},
                step.outputs,
                {"table": table.name},
                stream=step.stream,
            )
            change[step.name] = (lookup,)
    return plan.replace(buffers=buffers, weights=weights).rewritten(change)


def _is_known(plan: Plan, step: Step, known: dict[str, _Value]) -> bool:
    return step.outputs["y"].buffer in known and whole(plan, step.outputs["y"])


def _table(plan: Plan, name: str, value: _Value, buffer: str) -> Weight:
    shape = (plan.config.num_tasks, *plan.buffers[buffer].shape[1:])
    return Weight(name, shape, "table", value.recipe)


def _value(plan: Plan, step: Step, known: dict[str, _Value]) -> _Value | None:
    """What a step computes, if it reads known values alone."""

    def weight(role: str) -> Recipe:
        return plan.weights[step.weights[role]].recipe

    if step.op == "lookup" and step.inputs["index"].buffer == "task_id":
        return _Value(weight("table"), True)
    if step.op == "film" and "table" in step.weights:
        x = known.get(step.inputs["x"].buffer)
        return None if x is None else _Value(recipes.modulate(x.recipe, weight("table")), True)
    for access in step.inputs.values():
        if access.buffer not in known or not whole(plan, access):
            return None
    inputs = {role: known[access.buffer] for role, access in step.inputs.items()}
    by_task = any(value.by_task for value in inputs.values())
    if step.op == "broadcast":
        if "vector" in inputs:
            return _Value(recipes.each_plus(weight("weight"), inputs["vector"].recipe), by_task)
        return _Value(weight("weight"), False)
    if step.op == "film":
        return _Value(recipes.modulate(inputs["x"].recipe, inputs["gamma_beta"].recipe), by_task)
    if step.op == "linear":
        matrix, bias = weight("weight"), weight("bias")
        if "rows" in step.options:
            matrix, bias = recipes.rows(matrix, *step.options["rows"]), recipes.rows(bias, *step.options["rows"])
        return _Value(recipes.linear(inputs["x"].recipe, matrix, bias), by_task)
    if step.op == "activation" and step.options["kind"] == "gelu":
        return _Value(recipes.gelu(inputs["x"].recipe), by_task)
    if step.op == "norm" and "group" not in step.options:
        normed = recipes.normalise(inputs["x"].recipe, step.options["eps"])
        if "weight" in step.weights:
            normed = recipes.affine(normed, weight("weight"), weight("bias"))
        return _Value(normed, by_task)
    return None
