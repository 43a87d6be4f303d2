"""One step instead of several that do the same to the same, or to neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vat_fast.frozen import recipes
from vat_fast.frozen.passes.rewrite import whole
from vat_fast.frozen.plan import Access, Plan, Step, Weight
from vat_fast.frozen.target import Target


def views_as_batch(plan: Plan, target: Target) -> Plan:
    """Views are a batch dimension of the vision stream: one patch embedding and one attention for all of them."""
    groups: dict[str, list[Step]] = {}
    for step in plan.all_steps:
        if "of" in step.options:
            groups.setdefault(step.options["of"], []).append(step)
    change: dict[str, tuple[Step, ...]] = {}
    for name, steps in groups.items():
        first = steps[0]
        merged = first.replace(
            name=name,
            inputs={role: replace(access, tokens=None) for role, access in first.inputs.items()},
            outputs={role: replace(access, tokens=None) for role, access in first.outputs.items()},
            options={**{k: v for k, v in first.options.items() if k != "of"}, "views": len(steps)},
        )
        change.update({step.name: () for step in steps})
        change[first.name] = (merged,)
    return plan.rewritten(change)


def share_steps(plan: Plan, target: Target) -> Plan:
    """Steps that compute the same from the same become one: the baseline's norms once their weights are folded."""
    first: dict[tuple[object, ...], Step] = {}
    change: dict[str, tuple[Step, ...]] = {}
    renamed: dict[str, str] = {}
    for step in plan.all_steps:
        inputs = {role: replace(a, buffer=renamed.get(a.buffer, a.buffer)) for role, a in step.inputs.items()}
        key = (
            step.op,
            *(tuple(sorted(part.items(), key=lambda item: item[0])) for part in (inputs, step.weights, step.options)),
        )
        found = first.setdefault(key, step)
        if (
            found is not step
            and whole(plan, step.outputs["y"])
            and plan.buffers[step.outputs["y"].buffer].role == "activation"
        ):
            renamed[step.outputs["y"].buffer] = found.outputs["y"].buffer
            change[step.name] = ()
        elif inputs != step.inputs:
            change[step.name] = (step.replace(inputs=inputs),)
    return plan.rewritten(change)


def merge_projections(plan: Plan, target: Target) -> Plan:
    """Linears without activation that read the same rows become one, their outputs its columns.

    With Triton, keys and values of the extra tokens join the query though they need fewer rows: the option `last` says
    so, and saves a launch.
    """
    groups: dict[tuple[object, ...], list[Step]] = {}
    readers = plan.readers()
    for step in plan.all_steps:
        if step.op == "linear" and _mergeable(plan, step, readers):
            tokens = None if target.executor == "triton" else step.inputs["x"].tokens
            groups.setdefault((step.inputs["x"].buffer, tokens, step.stream), []).append(step)
    change: dict[str, tuple[Step, ...]] = {}
    buffers, weights = dict(plan.buffers), dict(plan.weights)
    moved: dict[str, tuple[str, int, int]] = {}  # old buffer -> (new buffer, first column, first token)
    for steps in groups.values():
        if len(steps) < 2:
            continue
        main = max(steps, key=lambda step: plan.shape(step.inputs["x"])[1])
        prefix = main.name.rsplit(".", 1)[0]
        name = f"{prefix}.project"
        merged = {}
        for role, kind in (("weight", "matrix"), ("bias", "vector")):
            parts = []
            for step in steps:
                recipe = plan.weights[step.weights[role]].recipe
                parts.append(recipes.rows(recipe, *step.options["rows"]) if "rows" in step.options else recipe)
            width = sum(plan.shape(step.outputs["y"])[-1] for step in steps)
            shape = (width,) if role == "bias" else (width, plan.weights[main.weights[role]].shape[1])
            weights[f"{name}.{role}"] = Weight(f"{name}.{role}", shape, kind, recipes.stack(*parts))  # type: ignore[arg-type]
            merged[role] = f"{name}.{role}"
        out = plan.buffers[main.outputs["y"].buffer]
        buffers[name] = replace(out, name=name, shape=(*out.shape[:-1], width))
        column = 0
        for step in steps:
            old = step.outputs["y"].buffer
            first = (step.inputs["x"].tokens or (0, 0))[0] - (main.inputs["x"].tokens or (0, 0))[0]
            moved[old] = (name, column, first)
            column += plan.buffers[old].shape[-1]
            change[step.name] = ()
        joined = Step(
            name, "linear", {"x": main.inputs["x"]}, {"y": Access(name)}, merged, _last(plan, steps), stream=main.stream
        )
        change[steps[0].name] = (joined,)
    for step in plan.all_steps:
        if step.name not in change and any(access.buffer in moved for access in step.inputs.values()):
            inputs = {role: _moved(plan, access, buffers, moved) for role, access in step.inputs.items()}
            change[step.name] = (step.replace(inputs=inputs),)
    return plan.replace(buffers=buffers, weights=weights).rewritten(change)


def _last(plan: Plan, steps: list[Step]) -> dict[str, tuple[int, int]]:
    """The option `last` of merged linears of which the last ones read no more than the same last tokens."""
    tokens = plan.buffers[steps[0].inputs["x"].buffer].shape[1]
    begins = [(step.inputs["x"].tokens or (0, tokens))[0] for step in steps]
    ends = {(step.inputs["x"].tokens or (0, tokens))[1] for step in steps}
    all_rows = [step for step, begin in zip(steps, begins, strict=True) if begin == 0]
    few = set(begins[len(all_rows) :])
    if not all_rows or ends != {tokens} or len(few) != 1 or 0 in few:
        return {}
    return {"last": (tokens - few.pop(), sum(plan.shape(step.outputs["y"])[-1] for step in all_rows))}


def _mergeable(plan: Plan, step: Step, readers: Mapping[str, list[Step]]) -> bool:
    plain = not any(role in step.inputs for role in ("residual", "task_id")) and "activation" not in step.options
    return (
        plain
        and whole(plan, step.outputs["y"])
        and plan.buffers[step.outputs["y"].buffer].role == "activation"
        # Attention reads columns of a wider buffer; everything else reads whole buffers.
        and all(reader.op in ("attention", "cross_attention") for reader in readers.get(step.outputs["y"].buffer, []))
    )


def _moved(plan: Plan, access: Access, buffers: dict, moved: dict[str, tuple[str, int, int]]) -> Access:
    """The same elements in the merged buffer."""
    if access.buffer not in moved:
        return access
    name, column, token = moved[access.buffer]
    tokens, width = plan.buffers[access.buffer].shape[1:]
    low, high = access.columns or (0, width)
    begin, end = access.tokens or (0, tokens)
    every = (begin + token, end + token) == (0, buffers[name].shape[1])
    return Access(name, None if every else (begin + token, end + token), (column + low, column + high))
