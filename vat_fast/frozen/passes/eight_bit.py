"""8-bit matrix products with the project's kernels: activations are rounded by the launch that makes them."""

from __future__ import annotations

from vat_fast.frozen.costs import in_triton
from vat_fast.frozen.passes.epilogues import stats_buffer
from vat_fast.frozen.passes.rewrite import whole
from vat_fast.frozen.plan import Access, Buffer, Plan, Step
from vat_fast.frozen.target import Target
from vat_fast.frozen.tiles import blocks


def quantise_in_epilogues(plan: Plan, target: Target) -> Plan:
    """Projections, fc1 and fc2 read 8-bit weights and activations (`kernels.low_precision`).

    The launch before leaves 8 bits of its result, a scale per token and tile of columns, in place of the floats where
    nobody else reads those. Behind patch embedding and after attention nothing can: there one step quantises, or the
    product stays in 16 bits (the output projection: a head's columns are no group of the 8-bit loop). The head stays
    wide: it is small and its result is the action.
    """
    writers, readers = plan.writers(), plan.readers()
    steps = {step.name: step for step in plan.all_steps}
    after_attention = {s.outputs["y"].buffer for s in plan.all_steps if s.op in ("attention", "cross_attention")}
    sources: dict[str, Step] = {}  # buffer in 8 bits -> who writes it
    quantised: dict[str, Step] = {}
    for step in plan.all_steps:
        x = step.inputs.get("x")
        if step.op != "linear" or x is None or not in_triton(step.op, step.options) or not whole(plan, x):
            continue
        before = writers.get(x.buffer, [])
        if len(before) != 1 or x.buffer in after_attention or step.name.startswith("head.") or "projector" in step.name:
            continue
        if before[0].op in ("linear", "patch_embed", "norm") and plan.buffers[x.buffer].role == "activation":
            sources[x.buffer] = before[0]
            quantised[step.name] = step
    buffers, new, inserted = dict(plan.buffers), dict[str, Step](), dict[str, Step]()
    for step in plan.all_steps:  # writers before readers: a reader's group is its writer's tile
        now = step
        if step.name in quantised:
            name = step.inputs["x"].buffer
            inputs = {**step.inputs, "x": Access(f"{name}.eight"), "scales": Access(f"{name}.scales")}
            group = buffers[f"{name}.scales"].shape[0]
            width = plan.buffers[name].shape[-1]
            columns = width if group == 1 else blocks(plan, new[sources[name].name], target.arch)["BLOCK_N"]
            now = now.replace(inputs=inputs, options={**now.options, "quantised": target.dtype, "group": columns})
        for name, source in sources.items():
            if source.name != step.name:
                continue
            shape = plan.buffers[name].shape
            rows = shape[0] * shape[1]
            buffers[f"{name}.eight"] = Buffer(f"{name}.eight", shape, target.dtype)
            pair = {"eight": Access(f"{name}.eight"), "scales": Access(f"{name}.scales")}
            if step.op == "linear":
                now = now.replace(outputs={**now.outputs, **pair})
                tile = blocks(plan, now, target.arch)["BLOCK_N"]
                buffers[f"{name}.scales"] = Buffer(f"{name}.scales", (-(-shape[-1] // tile), rows), "fp32")
            else:
                buffers[f"{name}.scales"] = Buffer(f"{name}.scales", (1, rows), "fp32")
                inserted[step.name] = Step(
                    f"{step.name}.quantise", "quantise", {"x": Access(name)}, pair, stream=step.stream
                )
        new[step.name] = now
    for name, step in new.items():
        if "stats" in step.outputs and step.op == "linear":
            stats = step.outputs["stats"].buffer
            shape = plan.buffers[steps[name].outputs["y"].buffer].shape
            buffers[stats] = stats_buffer(
                stats, shape, blocks(plan.replace(buffers=buffers), step, target.arch)["BLOCK_N"]
            )
        unread = {
            role: access
            for role, access in step.outputs.items()
            if role in ("y", "film") and all(r.name in quantised for r in readers.get(access.buffer, []))
        }
        wide = [a.buffer for a in unread.values() if f"{a.buffer}.eight" in buffers and not _used(new, a.buffer)]
        if wide and step.op == "linear":
            outputs = {role: access for role, access in step.outputs.items() if access.buffer not in wide}
            new[name] = step.replace(outputs=outputs)
    change = {name: (step, *([inserted[name]] if name in inserted else [])) for name, step in new.items()}
    return plan.replace(buffers=buffers).rewritten(change)


def _used(steps: dict[str, Step], buffer: str) -> bool:
    """Whether any step still reads the floats of a buffer, as its residual for instance."""
    return any(access.buffer == buffer for step in steps.values() for access in step.inputs.values())
