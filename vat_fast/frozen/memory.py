"""Buffers share memory where the order of the steps allows it."""

from __future__ import annotations

from vat_fast.frozen.order import HappensBefore
from vat_fast.frozen.plan import Buffer, Plan

ALIGNMENT = 256
"""Bytes; what CUDA allocations have, and four cache lines of a CPU."""


def unshared(plan: Plan) -> Plan:
    """Every activation in memory of its own."""
    return plan.replace(storage={})


def reuse_buffers(plan: Plan) -> Plan:
    """Place activations in one block; two may overlap if all readers of one are over before the other is written.

    Greedy by size, each at the lowest offset that conflicts with nothing placed (Pisarchyk and Lee, "Efficient memory
    management for deep neural net inference", 2020, "greedy by size for offset calculation").
    """
    steps = plan.all_steps
    before = HappensBefore(steps)
    touching: dict[str, list[str]] = {}
    writing: dict[str, list[str]] = {}
    for step in steps:
        for access, written in step.accesses:
            touching.setdefault(access.buffer, []).append(step.name)
            if written:
                writing.setdefault(access.buffer, []).append(step.name)
    in_loop = {step.name for step in plan.loop}
    in_body = {step.name for step in plan.steps}

    def lives_through_loop(name: str) -> bool:
        """Whether a later round of the loop reads what an earlier one, or the body, left."""
        return any(s in in_loop for s in touching[name]) and any(s in in_body for s in writing[name])

    def over_before(a: str, b: str) -> bool:
        """Whether everything that touches a is over before anything writes b."""
        if lives_through_loop(a) and any(s in in_loop for s in writing[b]):
            return False
        return all(before(x, y) for x in touching[a] for y in writing[b])

    own = [b for b in plan.buffers.values() if b.role == "activation"]
    placed: list[tuple[Buffer, int]] = []
    storage: dict[str, int] = {}
    for buffer in sorted(own, key=lambda b: (-b.bytes, b.name)):
        taken = sorted(
            (offset, offset + _padded(other.bytes))
            for other, offset in placed
            if not over_before(other.name, buffer.name) and not over_before(buffer.name, other.name)
        )
        offset = 0
        for begin, end in taken:
            if begin - offset >= _padded(buffer.bytes):
                break
            offset = max(offset, end)
        storage[buffer.name] = offset
        placed.append((buffer, offset))
    return plan.replace(storage=storage, applied=(*plan.applied, "reuse_buffers"))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
