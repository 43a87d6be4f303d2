"""Proof that a plan computes what its steps say, however the streams run against each other.

Two things can go wrong. A step may read a value that is not there yet, or is being written: a race. And memory may be
given to another buffer while somebody still needs the first: a lost value. `check` finds both, by the order that
streams and waits guarantee (`order.HappensBefore`) and by the bytes that buffers occupy. No device is involved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vat_fast.frozen.order import HappensBefore
from vat_fast.frozen.plan import Access, Plan, Step


def check(plan: Plan) -> None:
    """Raise a ValueError with every fault of the plan, a line each; see `faults`."""
    found = list(faults(plan))
    if found:
        raise ValueError(f"the plan has {len(found)} faults:\n" + "\n".join(found))


def faults(plan: Plan) -> Iterator[str]:
    """What is wrong with the plan, in words.

    - a read of a part that no step certainly wrote before (and that is no input or constant);
    - two steps that write, or write and read, a part in common without being ordered;
    - a write to memory that another buffer occupies between that one's writes and its last reads;
    - a write to a caller's input or to a constant; a name used twice.

    A denoising loop is looked at as two rounds, one after the other.
    """
    names = [step.name for step in plan.all_steps]
    if len(set(names)) != len(names):
        yield f"step names repeat: {sorted({name for name in names if names.count(name) > 1})}"
        return
    plan, again = _second_round(plan)
    loop = {step.name for step in plan.loop} | {step.name for step in again}
    steps = (*plan.steps, *plan.loop, *again)
    try:
        before = HappensBefore(_joined(plan, steps, loop))
    except ValueError as error:
        yield str(error)
        return
    writes = [(step, access) for step in steps for access, written in step.accesses if written]
    reads = [(step, access) for step in steps for access, written in step.accesses if not written]
    for step, access in writes:
        role = plan.buffers[access.buffer].role
        if role in ("input", "constant"):
            yield f"{step.name} writes {access}, which is {role}"
    yield from _reads(plan, writes, reads, before)
    yield from _overlaps(plan, steps, before)


def _second_round(plan: Plan) -> tuple[Plan, tuple[Step, ...]]:
    """The loop's steps once more, and what they write under other names in the same memory."""
    suffix = " (next round)"
    written = {access.buffer for step in plan.loop for access in step.outputs.values()}

    def renamed(access: Access) -> Access:
        return replace(access, buffer=access.buffer + suffix) if access.buffer in written else access

    again = tuple(
        step.replace(
            name=step.name + suffix,
            inputs={role: renamed(access) for role, access in step.inputs.items()},
            outputs={role: renamed(access) for role, access in step.outputs.items()},
            waits=(),
        )
        for step in plan.loop
    )
    buffers = {**plan.buffers, **{name + suffix: replace(plan.buffers[name], name=name + suffix) for name in written}}
    places = {name + suffix: plan.storage[name] for name in written if name in plan.storage}
    return plan.replace(buffers=buffers, storage={**plan.storage, **places}), again


def _joined(plan: Plan, steps: tuple[Step, ...], loop: set[str]) -> list[Step]:
    """The steps, the loop's first waiting for everything before it: streams join between body and loop."""
    last = {step.stream: step.name for step in plan.steps}
    joined, first = [], True
    for step in steps:
        if step.name in loop and first:
            step = step.replace(waits=tuple(last.values()))
            first = False
        joined.append(step)
    return joined


def _reads(
    plan: Plan, writes: list[tuple[Step, Access]], reads: list[tuple[Step, Access]], before: HappensBefore
) -> Iterator[str]:
    by_buffer: dict[str, list[tuple[Step, Access]]] = {}
    for step, access in writes:
        by_buffer.setdefault(access.buffer, []).append((step, access))
    for found in by_buffer.values():
        for i, (one, a) in enumerate(found):
            for other, b in found[i + 1 :]:
                if a.overlaps(b) and not (before(one.name, other.name) or before(other.name, one.name)):
                    yield f"{one.name} and {other.name} both write {a}, in no certain order"
    for step, access in reads:
        sources = [(s, a) for s, a in by_buffer.get(access.buffer, []) if a.overlaps(access)]
        if plan.buffers[access.buffer].role in ("input", "constant"):
            continue
        earlier = [(s, a) for s, a in sources if before(s.name, step.name)]
        for source, part in sources:
            if not before(source.name, step.name) and not before(step.name, source.name):
                yield f"{step.name} reads {access} while {source.name} may be writing {part}"
        if not _covers(plan, access, [a for _, a in earlier]):
            yield f"{step.name} reads {access}, which is not certainly written before"


def _covers(plan: Plan, wanted: Access, parts: list[Access]) -> bool:
    """Whether the parts, each over all columns or all tokens of what is wanted, cover it."""
    shape = plan.buffers[wanted.buffer].shape
    tokens = wanted.tokens or (0, shape[1] if len(shape) > 1 else 1)
    columns = wanted.columns or (0, shape[-1])
    full = [
        p
        for p in parts
        if (p.columns or (0, shape[-1]))[0] <= columns[0] and (p.columns or (0, shape[-1]))[1] >= columns[1]
    ]
    at = tokens[0]
    for low, high in sorted(p.tokens or (0, tokens[1]) for p in full):
        if low > at:
            break
        at = max(at, high)
    return at >= tokens[1]


def _overlaps(plan: Plan, steps: tuple[Step, ...], before: HappensBefore) -> Iterator[str]:
    """Writes into memory that another buffer still needs."""
    if not plan.storage:
        return
    missing = [b.name for b in plan.buffers.values() if b.role == "activation" and b.name not in plan.storage]
    if missing:
        yield f"buffers without a place in memory: {', '.join(missing)}"
        return
    places = sorted(
        (offset, offset + plan.buffers[name].bytes, name)
        for name, offset in plan.storage.items()
        if name in plan.buffers
    )
    writers: dict[str, list[Step]] = {}
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for access, written in step.accesses:
            (writers if written else readers).setdefault(access.buffer, []).append(step)
    for i, (begin, end, name) in enumerate(places):
        for other_begin, _, other in places[i + 1 :]:
            if other_begin >= end:
                break
            assert begin <= other_begin
            for held, taker in ((name, other), (other, name)):
                yield from _lost(held, taker, writers, readers, before)


def _lost(
    held: str,
    taker: str,
    writers: dict[str, list[Step]],
    readers: dict[str, list[Step]],
    before: HappensBefore,
) -> Iterator[str]:
    """Whether some write to `taker` may fall between a write and a read of `held`, or onto the write itself."""
    for thief in writers.get(taker, []):
        for writer in writers.get(held, []):
            clear = before(thief.name, writer.name)
            for reader in readers.get(held, []):
                if before(writer.name, reader.name) and not clear and not before(reader.name, thief.name):
                    yield f"{thief.name} writes {taker} into memory of {held}, which {reader.name} still reads"
                    return
            if not clear and not before(writer.name, thief.name):
                both = f"{thief.name} writes {taker} and {writer.name} writes {held}"
                yield f"{both} into the same memory, in no certain order"
                return
