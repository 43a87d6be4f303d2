"""Two streams: which steps run beside each other, and which wait.

Both streams of layer l read what vision layer l - 1 left, so the action stream runs beside the vision stream, which
gets ahead of it by at most `RING` layers: so few sets of keys and values exist at once.
"""

from __future__ import annotations

from vat_fast.frozen.plan import Plan, Step

RING = 3
"""Vision layers whose keys and values may wait for the action stream. Two already let the streams overlap fully when
each keeps its pace; a third absorbs unevenness, at a few megabytes."""


def one_stream(plan: Plan) -> Plan:
    """Every step in one stream, in the plan's order."""
    steps = tuple(step.replace(stream="vision", waits=()) for step in plan.steps)
    return plan.replace(steps=steps, loop=tuple(step.replace(stream="vision", waits=()) for step in plan.loop))


def split_streams(plan: Plan) -> Plan:
    """Vision and action steps in streams of their own, with the fewest waits that keep every read behind its write.

    The plan's order stays one that a single stream may run in. A denoising loop runs in the action stream alone, after
    both.
    """
    steps = _with_waits(plan, plan.steps, _back_pressure(plan))
    loop = tuple(step.replace(stream="action", waits=()) for step in plan.loop)
    return plan.replace(steps=steps, loop=loop, applied=(*plan.applied, "split_streams"))


def _back_pressure(plan: Plan) -> dict[str, str]:
    """Vision step that writes keys and values -> the action step that must have read those of RING layers before."""
    if plan.loop:
        return {}  # every step of the loop reads all keys and values
    writers = plan.writers()
    pairs = []
    for step in plan.steps:
        if step.op == "cross_attention":
            (before,) = writers[step.inputs["kv"].buffer]
            pairs.append((before.name, step.name))
    order = {step.name: index for index, step in enumerate(plan.steps)}
    waits = {}
    for (writer, _), (_, reader) in zip(pairs[RING:], pairs, strict=False):
        if order[reader] < order[writer]:
            waits[writer] = reader
    return waits


def _with_waits(plan: Plan, steps: tuple[Step, ...], extra: dict[str, str]) -> tuple[Step, ...]:
    writers = plan.writers()
    position = {step.name: index for index, step in enumerate(steps)}
    stream = {step.name: step.stream for step in steps}
    # Per stream: the latest step of the other stream that it has already waited for.
    waited = {"vision": -1, "action": -1}
    result = []
    for step in steps:
        needed = -1
        for access, written in step.accesses:
            if written:
                continue
            for writer in writers.get(access.buffer, []):
                if writer.name in position and stream[writer.name] != step.stream:
                    needed = max(needed, position[writer.name])
        if step.name in extra:
            needed = max(needed, position[extra[step.name]])
        waits: tuple[str, ...] = ()
        if needed > waited[step.stream]:
            waited[step.stream] = needed
            waits = (steps[needed].name,)
        result.append(step.replace(waits=waits))
    return tuple(result)
