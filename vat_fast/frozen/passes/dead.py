"""Dropping what nothing reads."""

from __future__ import annotations

from dataclasses import replace

from vat_fast.frozen.plan import Plan, Step
from vat_fast.frozen.target import Target


def drop_dead_layer(plan: Plan, target: Target) -> Plan:
    """Without the steps that no output depends on.

    The action stream reads the last vision layer through its keys and values alone, so that layer's attention,
    projection and MLP go, and with shared weights its queries too.
    """
    needed = {name for name, buffer in plan.buffers.items() if buffer.role == "output"}
    keep: list[Step] = []
    for step in reversed(plan.all_steps):
        if any(access.buffer in needed for access in step.outputs.values()):
            keep.append(step)
            needed |= {access.buffer for access in step.inputs.values()}
    kept = {step.name for step in keep}
    plan = plan.rewritten({step.name: () for step in plan.all_steps if step.name not in kept})
    return _drop_unread_columns(plan)


def _drop_unread_columns(plan: Plan) -> Plan:
    """A linear whose leading output columns are never read computes only the rest (shared weights, last layer)."""
    readers, writers = plan.readers(), plan.writers()
    change: dict[str, tuple[Step, ...]] = {}
    buffers = dict(plan.buffers)
    for step in plan.all_steps:
        if step.op != "linear" or len(writers[step.outputs["y"].buffer]) != 1:
            continue
        name = step.outputs["y"].buffer
        width = plan.buffers[name].shape[-1]
        found = [
            access for reader in readers.get(name, []) for access in reader.inputs.values() if access.buffer == name
        ]
        first = min((access.columns[0] if access.columns else 0 for access in found), default=0)
        if not first:
            continue
        begin, end = step.option("rows", (0, width))
        change[step.name] = (step.replace(options={**step.options, "rows": (begin + first, end)}),)
        buffer = plan.buffers[name]
        buffers[name] = replace(buffer, shape=(*buffer.shape[:-1], width - first))
        for reader in readers[name]:
            inputs = {
                role: replace(access, columns=(access.columns[0] - first, access.columns[1] - first))
                if access.buffer == name and access.columns
                else access
                for role, access in reader.inputs.items()
            }
            change[reader.name] = (reader.replace(inputs=inputs),)
    return plan.replace(buffers=buffers).rewritten(change)
