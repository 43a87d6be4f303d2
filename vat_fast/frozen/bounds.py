"""What no implementation of a plan can beat on a device: per step, and along the streams. Bounds, not predictions.

A step takes at least the time of its matrix products, in whole waves of tiles over the multiprocessors, and at least
the time of its DRAM traffic. DRAM traffic follows from a model of L2 as a least-recently-used cache of whole buffers:
every weight comes in once, an activation again only if more than L2 holds was touched in between.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from vat_fast.frozen.costs import attention_shape, gemm_shape, step_cost, weight_bytes
from vat_fast.frozen.plan import BYTES, Plan, Step
from vat_fast.frozen.tiles import blocks, last_rows
from vat_fast.kernels.static_model import DEVICES, Device

L2_MB = {"A100": 40, "Orin": 4, "4090": 72, "H100": 50, "B200": 126, "Thor": 32, "MI300X": 256}
"""L2 (MI300X: Infinity Cache), by the vendors' papers; Thor's is not published and taken as 32."""

SPLITS = (1, 2, 3, 4, 6, 8)
"""Over how many programs an attention kernel may split the keys."""


def device(name: str) -> Device:
    """The device called `name`.

    Raises:
        ValueError: unknown; the message lists the known ones.
    """
    for known, found in DEVICES.items():
        if known.lower() == name.lower():
            return found
    raise ValueError(f"unknown device {name!r}; bounds are known for {', '.join(DEVICES)}")


@dataclass(frozen=True)
class Bounds:
    """Microseconds and bytes for one forward of a plan on one device.

    floor: the larger of all useful operations at peak rate and all needed bytes (weights once, inputs, outputs) at
    full bandwidth. path: the longest chain of steps through streams and waits, each at its own bound. work: the time
    all steps together keep the whole device busy. plan: the larger of path and work.
    """

    device: str
    floor_us: float
    path_us: float
    work_us: float
    floor_bytes: int
    dram_bytes: int
    steps_us: dict[str, float]

    @property
    def plan_us(self) -> float:
        """Below this the plan cannot be."""
        return max(self.path_us, self.work_us)

    @property
    def share(self) -> float:
        """The plan's bound over the floor, 1 at best."""
        return self.plan_us / self.floor_us

    @property
    def traffic(self) -> float:
        """Modelled DRAM traffic over the floor's, 1 at best."""
        return self.dram_bytes / self.floor_bytes


def bounds(plan: Plan, name: str, executor: str = "triton") -> Bounds:
    """The bounds of one forward (with a diffusion head: of all its rounds) on a known device."""
    part = device(name)
    dram = dram_traffic(plan, int(L2_MB[part.name] * 1e6), executor)
    rate = part.tflops * 1e6  # flops per microsecond
    bandwidth = part.bandwidth * 1e3  # bytes per microsecond
    times, work = {}, {}
    for step in plan.all_steps:
        cost = step_cost(plan, step, executor)
        narrow = 2 if "quantised" in step.options else 1
        memory = dram[step.name] / bandwidth
        waves, whole = _tiles(plan, step, part)
        times[step.name] = max(memory, waves / (rate * narrow))
        work[step.name] = max(memory, whole / (rate * narrow)) if cost.flops else memory
    rounds = {step.name: plan.repeats for step in plan.loop}
    flops = sum(
        step_cost(plan, s, executor).flops * rounds.get(s.name, 1) / (2 if "quantised" in s.options else 1)
        for s in plan.all_steps
    )
    weights = _weight_bytes(plan)
    caller = sum(b.bytes for b in plan.buffers.values() if b.role in ("input", "output"))
    floor_bytes = weights + caller
    total = sum(dram[s.name] * rounds.get(s.name, 1) for s in plan.all_steps)
    return Bounds(
        device=part.name,
        floor_us=max(flops / rate, floor_bytes / bandwidth),
        path_us=_longest_path(plan, times),
        work_us=sum(work[s.name] * rounds.get(s.name, 1) for s in plan.all_steps),
        floor_bytes=floor_bytes,
        dram_bytes=int(total),
        steps_us=times,
    )


def _weight_bytes(plan: Plan) -> int:
    """Every weight once; of a table, the rows that one forward reads."""
    seen: dict[str, int] = {}
    for step in plan.all_steps:
        for role, name in step.weights.items():
            seen[name] = max(seen.get(name, 0), weight_bytes(plan, step, role))
    return sum(seen.values())


def _tiles(plan: Plan, step: Step, part: Device) -> tuple[float, float]:
    """(operations of the busiest multiprocessor times their number, operations issued), both in flops.

    The first is what the step takes alone, in whole waves of tiles; the second what it takes of a device that other
    steps fill up.
    """
    if step.op in ("linear", "patch_embed"):
        M, N, K = gemm_shape(plan, step)
        tile = blocks(plan, step, part.arch)
        last = last_rows(plan, step)
        tiles = math.ceil(M / tile["BLOCK_M"]) * math.ceil((last.column if last else N) / tile["BLOCK_N"])
        # Tiles of the last rows alone are small: together they count as so many whole ones.
        few = last.tiles(M, N, tile, part.arch) * last.block_m(part.arch) if last else 0
        programs = (tiles + math.ceil(few / tile["BLOCK_M"])) * tile["SPLIT_K"]
        program = 2.0 * tile["BLOCK_M"] * tile["BLOCK_N"] * K / tile["SPLIT_K"]
        return math.ceil(programs / part.multiprocessors) * program * part.multiprocessors, programs * program
    if step.op in ("attention", "cross_attention"):
        groups, queries, keys, width = attention_shape(plan, step)
        heads = step.options["heads"]
        best = (math.inf, math.inf)
        for rows in (16, 32, 64, 128):
            for split in SPLITS if step.op == "cross_attention" else (1,):
                tiles = groups * heads * math.ceil(queries / rows) * split
                tile = 4.0 * rows * math.ceil(keys / split) * (width // heads)
                best = min(best, (math.ceil(tiles / part.multiprocessors) * tile * part.multiprocessors, tiles * tile))
        return best
    return 0.0, 0.0


def dram_traffic(plan: Plan, l2_bytes: int, executor: str) -> dict[str, float]:
    """Bytes that each step moves between DRAM and an L2 of `l2_bytes`, steps in the plan's order."""
    cache: OrderedDict[str, tuple[int, bool]] = OrderedDict()  # name -> (bytes, to be written back)
    readers = plan.readers()
    last_read = {name: steps[-1].name for name, steps in readers.items()}
    traffic: dict[str, float] = {}

    def touch(name: str, size: int, written: bool) -> float:
        """Bytes moved because `name` is used."""
        moved = 0.0
        if name in cache:
            written = written or cache.pop(name)[1]
        elif not written:
            moved += size
        cache[name] = (size, written)
        held = sum(entry[0] for entry in cache.values())
        while held > l2_bytes and len(cache) > 1:
            _, (old, dirty) = cache.popitem(last=False)
            held -= old
            moved += old if dirty else 0
        return moved

    for step in plan.all_steps:
        moved = 0.0
        for role, name in step.weights.items():
            moved += touch(name, weight_bytes(plan, step, role), False)
        for access, written in step.accesses:
            size = math.prod(plan.shape(access)) * BYTES[plan.buffers[access.buffer].dtype]
            moved += touch(access.buffer, size, written)
        for access, _ in step.accesses:
            buffer = plan.buffers[access.buffer]
            if buffer.role == "output" and access.buffer in cache:
                moved += cache.pop(access.buffer)[0]
            elif last_read.get(access.buffer) == step.name and buffer.role == "activation":
                cache.pop(access.buffer, None)  # nobody needs it again: its memory is reused before it is written back
        traffic[step.name] = moved
    return traffic


def _longest_path(plan: Plan, times: dict[str, float]) -> float:
    end: dict[str, float] = {}
    latest: dict[str, float] = {}
    for step in plan.steps:
        begin = max([latest.get(step.stream, 0.0), *(end[name] for name in step.waits)])
        end[step.name] = latest[step.stream] = begin + times[step.name]
    return max(latest.values(), default=0.0) + plan.repeats * sum(times[step.name] for step in plan.loop)
