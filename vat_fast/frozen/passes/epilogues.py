"""Fusing what surrounds a linear into it."""

from __future__ import annotations

from dataclasses import replace

from vat_fast.frozen.costs import in_triton
from vat_fast.frozen.passes.rewrite import only_reader, whole
from vat_fast.frozen.plan import Access, Buffer, Plan, Step
from vat_fast.frozen.target import Target
from vat_fast.frozen.tiles import blocks


def fuse_epilogues(plan: Plan, target: Target) -> Plan:
    """linear - activation - residual becomes one step, FiLM - norm another."""
    for fuse in (_activation, _residual, _film):
        plan = fuse(plan)
    return plan


def _activation(plan: Plan) -> Plan:
    readers, change = plan.readers(), dict[str, tuple[Step, ...]]()
    for step in plan.all_steps:
        if step.op == "linear" and whole(plan, step.outputs["y"]):
            after = only_reader(plan, readers, step.outputs["y"].buffer)
            if after is not None and after.op == "activation":
                options = {**step.options, "activation": after.options["kind"]}
                change[step.name] = (step.replace(outputs=after.outputs, options=options),)
                change[after.name] = ()
    return plan.rewritten(change)


def _residual(plan: Plan) -> Plan:
    readers, change = plan.readers(), dict[str, tuple[Step, ...]]()
    for step in plan.all_steps:
        if step.op == "linear" and whole(plan, step.outputs["y"]):
            after = only_reader(plan, readers, step.outputs["y"].buffer)
            if after is not None and after.op == "residual" and after.inputs["h"].buffer == step.outputs["y"].buffer:
                inputs = {**step.inputs, "residual": after.inputs["x"]}
                fused = step.replace(inputs=inputs, outputs=after.outputs, weights={**step.weights, **after.weights})
                change[step.name] = (fused,)
                change[after.name] = ()
    return plan.rewritten(change)


def _film(plan: Plan) -> Plan:
    readers, change = plan.readers(), dict[str, tuple[Step, ...]]()
    for step in plan.all_steps:
        if step.op == "film":
            after = only_reader(plan, readers, step.outputs["y"].buffer)
            if after is not None and after.op == "norm" and "group" not in after.options:
                weights = {**after.weights, **step.weights}
                change[after.name] = (after.replace(inputs=dict(step.inputs), weights=weights),)
                change[step.name] = ()
    return plan.rewritten(change)


def fuse_norms(plan: Plan, target: Target) -> Plan:
    """A norm without affine part becomes row statistics: left by the step that writes x, applied by those that read it.

    rstd * (x W^T - mean * rowsum(W)) is linear(norm(x)) exactly. FiLM in front of the norm is written by the same step
    as x. A norm whose input several steps write, or that groups tokens, stays.
    """
    writers, readers, change = plan.writers(), plan.readers(), dict[str, tuple[Step, ...]]()
    buffers = dict(plan.buffers)

    def current(step: Step) -> Step:
        return change.get(step.name, (step,))[0]

    for step in plan.all_steps:
        film = "table" in step.weights
        x = step.inputs.get("x")
        if step.op != "norm" or x is None or "group" in step.options or {"weight", "bias"} & set(step.weights):
            continue
        before, after = writers.get(x.buffer, []), readers[step.outputs["y"].buffer]
        if len(before) != 1 or before[0].op not in ("linear", "patch_embed") or not whole(plan, before[0].outputs["y"]):
            continue
        if not all(reader.op == "linear" for reader in after) or (film and before[0].op != "linear"):
            continue
        source = current(before[0])
        if not in_triton(source.op, source.options):
            continue  # PyTorch's operators leave no statistics
        outputs, inputs, weights = dict(source.outputs), dict(source.inputs), dict(source.weights)
        read = x.buffer
        if film:
            read = f"{step.name}.film"
            buffers[read] = replace(plan.buffers[x.buffer], name=read)
            outputs["film"], inputs["task_id"], weights["film"] = (
                Access(read),
                step.inputs["task_id"],
                step.weights["table"],
            )
        stats = f"{step.name}.stats"
        shape = plan.buffers[x.buffer].shape
        buffers[stats] = stats_buffer(stats, shape, blocks(plan, before[0], target.arch)["BLOCK_N"])
        outputs["stats"] = Access(stats)
        change[source.name] = (source.replace(outputs=outputs, inputs=inputs, weights=weights),)
        change[step.name] = ()
        for reader in after:
            old = current(reader)
            new_inputs = {**old.inputs, "x": replace(old.inputs["x"], buffer=read), "stats": Access(stats)}
            change[reader.name] = (
                old.replace(inputs=new_inputs, options={**old.options, "norm": step.options["eps"]}),
            )
    return plan.replace(buffers=buffers).rewritten(change)


def norms_in_linears(plan: Plan, target: Target) -> Plan:
    """A norm without affine part, and FiLM in front of it, runs inside the only linear that reads it."""
    readers, change = plan.readers(), dict[str, tuple[Step, ...]]()
    for step in plan.all_steps:
        x, y = step.inputs.get("x"), step.outputs.get("y")
        own_weights = set(step.weights) - {"table"}
        if step.op != "norm" or x is None or y is None or own_weights or {"group"} & set(step.options):
            continue
        if "gamma_beta" in step.inputs or not whole(plan, y):
            continue
        after = only_reader(plan, readers, y.buffer)
        if after is None or after.op != "linear" or after.inputs["x"] != y:
            continue
        # x, and with FiLM the task id and its table, in the place of what the norm has written.
        after = change.get(after.name, (after,))[0]
        change[after.name] = (
            after.replace(
                inputs={**after.inputs, **step.inputs},
                weights={**after.weights, **step.weights},
                options={**after.options, "norm": step.options["eps"]},
            ),
        )
        change[step.name] = ()
    return plan.rewritten(change)


def stats_buffer(name: str, shape: tuple[int, ...], width: int) -> Buffer:
    """Means and squared deviations of rows (B, tokens, D), in parts of `width` columns."""
    return Buffer(name, (2, -(-shape[-1] // width), shape[0] * shape[1]), "fp32")
