"""A static cost model of the attention kernels, for choosing tiles on cards that nobody here can time.

Registers of an attention kernel follow no line that ``static_model`` could draw, so each candidate is compiled for each
target and the model reads what came out (``attention_facts.json``): programs that share a multiprocessor, spills, and
the instructions of the hot loop. To these it adds what the shape asks for: tensor-core cycles, exponentials, shared
memory reads of the MMA, bytes from L2, waves, the latency of a program's own chain of products and softmax, and
the combination of split keys or of the backward's shares of dq. The estimate ranks configurations. It is no measurement
and is not to be quoted as a speed.

    python -m vat_fast.kernels.proof.attention_facts             compiles the candidates, where their code has changed
    python -m vat_fast.kernels.choose                            writes the shipped tables
    python -m vat_fast.kernels.retune                            replaces them by measured ones
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vat_fast.kernels.attention_tiles import (
    ACTION_TOKENS,
    MIN_TILE,
    min_output_tile,
    query_tails,
    query_tiles,
    warps_of_rows,
)
from vat_fast.kernels.configs import Arch
from vat_fast.kernels.proof.code import occupancy
from vat_fast.kernels.static_model import (
    DEVICES,
    DIRECT,
    EPILOGUE,
    FEWEST_RESIDENT,
    FIXED,
    FP32_LANES,
    LATENCY,
    SHARED_PORT,
    STEP,
    Device,
)

FACTS = Path(__file__).with_name("attention_facts.json")
# Exponentials per clock and multiprocessor (CUDA programming guide, throughput of native instructions; CDNA 3 alike).
EXPONENTIALS = 16
# Instructions per clock and multiprocessor: four schedulers, each one warp; AMD's take four clocks for 64 lanes.
ISSUED = 4
ISSUED_AMD = 1
# Clocks per instruction of a warp that has its scheduler for itself: it waits for its own results.
ALONE = 2
# Of what a multiprocessor could do beside its longest task, the share that it does after it all the same.
EXPOSED = 0.3
# Targets that the compiler treats as another, but for how much a multiprocessor holds. The gate compiles what ships
# for them all.
TWINS: Mapping[Arch, Arch] = {87: 89, 110: 100}
# Of code that a twin is judged by: the compiler may give it a few more, and 255 is all there are.
MOST_REGISTERS = 252
# (op, head dim, tile, target) that spill a little at a smaller head dim or with more extra tokens than their facts'.
SPILLS_ELSEWHERE = {("cross_attention", 64, "32x64 w4 s2", 89)}
# Matrix flops issued over useful ones; the gate holds what ships to it.
ISSUED_FLOPS = 1.2
# Times the fastest estimate that a configuration which keeps to it may take: nearer ones the model cannot tell apart.
WASTE_COSTS = 1.25
# Of the bytes that the hot loop moves, in accesses narrower than 16; the gate holds what ships to it.
NARROW_SHARE = 0.25


@dataclass(frozen=True, order=True)
class AttentionBlocks:
    """One configuration of the attention kernels, the fields in the order of a row of kernels/tables.py."""

    BLOCK_M: int
    BLOCK_N: int
    SPLITS: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """As in the names of ``attention_facts.json``, where the keys' split counts for nothing."""
        return f"{self.BLOCK_M}x{self.BLOCK_N} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class Problem:
    """B batch elements (vision: views) of H heads; T queries against S keys each."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int

    @property
    def programs(self) -> int:
        """What the tables' rules look at: programs of 64 queries."""
        return self.batch * self.heads * math.ceil(self.queries / 64)


# Head dims of the backbones, the bound of the rule that each stands for, and its patches per view.
HEAD_DIMS = ((64, 64, 261), (80, 72, 256), (None, 96, 256))
HEADS, VIEWS = 16, 2
# (BLOCK_M, BLOCK_N, num_warps, num_stages)
Tile = tuple[int, int, int, int]
FORWARD: tuple[Tile, ...] = (
    (64, 32, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 32, 4, 2),
    (128, 64, 4, 2),
    (128, 64, 8, 2),
)
SHORT: tuple[Tile, ...] = ((32, 64, 2, 2), (32, 64, 4, 2), (32, 128, 4, 2), *FORWARD[:4])
BACKWARD: tuple[Tile, ...] = (
    (16, 32, 2, 2),
    (32, 32, 2, 2),
    (32, 32, 4, 2),
    (32, 64, 4, 2),
    (64, 32, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 8, 2),
)


@dataclass(frozen=True)
class AttentionTable:
    """What one table of kernels/tables.py is for.

    Args:
        op: as in ``vat_fast.kernels.proof.cases``.
        batches: views or samples; each makes a rule up to its number of programs, the last an open one.
        splits: over how many programs the keys of a head may be spread.
        queries: of cross-attention.
    """

    op: str
    batches: tuple[int, ...]
    tiles: tuple[Tile, ...]
    backward: bool = False
    splits: tuple[int, ...] = (1,)
    queries: int = ACTION_TOKENS

    def problem(self, head_dim: int, patches: int, batch: int) -> Problem:
        """The shape that stands for a rule."""
        if self.op.startswith("vision"):
            return Problem(batch, HEADS, patches, patches, head_dim)
        return Problem(batch, HEADS, self.queries, VIEWS * patches, head_dim)

    def problems(self) -> Iterator[tuple[tuple[int | None, int | None], Problem]]:
        """((head dim, programs) bounds, the shape that stands for them) of each rule."""
        for bound, head_dim, patches in HEAD_DIMS:
            for batch in self.batches:
                problem = self.problem(head_dim, patches, batch)
                yield (bound, None if batch == self.batches[-1] else problem.programs), problem

    def candidates(self, arch: Arch) -> list[AttentionBlocks]:
        """Configurations worth compiling; MI300 pipelines through registers, in one stage."""
        stages = 0 if isinstance(arch, int) else 1
        found = {
            AttentionBlocks(m, n, split, warps, stages or own)
            for m, n, warps, own in self.tiles
            for split in self.splits
            if stages == 0 or warps >= 4
        }
        return sorted(found)

    def table_of(self, choose: Callable[[Problem], AttentionBlocks]) -> list[tuple[int | None, ...]]:
        """Rows (head dim and programs bounds, then the fields of AttentionBlocks) from a choice per shape."""
        table: list[tuple[int | None, ...]] = []
        for bounds, problem in self.problems():
            row = (*bounds, *vars(choose(problem)).values())
            if table and table[-1][0] == bounds[0] and table[-1][2:] == row[2:]:
                table.pop()  # the next bound covers it
            table.append(row)
        return table


ATTENTION_TABLES = {
    "VISION_ATTENTION": AttentionTable("vision_attention", (2, 8, 32), FORWARD),
    "VISION_ATTENTION_BACKWARD": AttentionTable("vision_attention_backward", (8, 32), BACKWARD, backward=True),
    "CROSS_ATTENTION": AttentionTable("cross_attention", (1, 4, 16), SHORT, splits=(1, 2, 4, 8)),
    # Action and extra tokens that nearly fill their last 64, where smaller tiles save nothing.
    "CROSS_ATTENTION_FULL": AttentionTable(
        "cross_attention", (1, 4, 16), SHORT, splits=(1, 2, 4, 8), queries=ACTION_TOKENS + 1
    ),
    "CROSS_ATTENTION_BACKWARD": AttentionTable("cross_attention_backward", (4, 16), BACKWARD, backward=True),
}


@lru_cache
def facts() -> Mapping[str, Mapping[str, Any]]:
    """What the candidates compiled to: "op/head dim tile" -> target -> row of the main kernel, or {"error": line}."""
    return json.loads(FACTS.read_text())["facts"]


def fact_of(op: str, head_dim: int, blocks: AttentionBlocks, arch: Arch) -> Mapping[str, Any]:
    """The compiled code of one candidate.

    Raises:
        KeyError: it was not compiled; ``python -m vat_fast.kernels.proof.attention_facts`` does.
    """
    compiled_for = TWINS.get(arch, arch)
    target = f"sm_{compiled_for}" if isinstance(compiled_for, int) else compiled_for
    fact = facts()[f"{op}/{head_dim} {blocks.name}"][target]
    if isinstance(arch, int) and arch in TWINS and "error" not in fact:
        if fact["registers"] > MOST_REGISTERS:
            return {"error": f"no register to spare on {target}, and its twin may want one more"}
        held, _ = occupancy(arch, fact["registers"], fact["shared"], blocks.num_warps)
        return {**fact, "blocks": held}
    return fact


def ships(fact: Mapping[str, Any], arch: Arch) -> bool:
    """Whether compiled code keeps the gate's promises: no spills, two programs a multiprocessor, wide accesses."""
    if "error" in fact or fact["local"] or fact["stack"] or fact["blocks"] < FEWEST_RESIDENT:
        return False
    return fact["narrow_share"] <= NARROW_SHARE or not isinstance(arch, int)


def _step(
    table: AttentionTable, head_dim: int, blocks: AttentionBlocks, fact: Mapping[str, Any], device: Device
) -> tuple[float, float]:
    """Cycles of one step of the hot loop: (what a program takes from its multiprocessor, its own chain of results)."""
    owned, walked = _owned_and_walked(table, blocks.BLOCK_M, blocks.BLOCK_N)
    # Queries too few for all warps are the products' columns, keys and head columns the rows.
    swapped = not table.backward and owned < MIN_TILE * warps_of_rows(blocks.num_warps, device.arch)
    asynchronous = device.arch in DIRECT and (owned >= 64 or swapped)
    inner, outer = _columns(table, head_dim, blocks, owned, device.arch)
    products = 2 * inner + 3 * outer if table.backward else inner + outer
    tile = owned * walked
    mma = repeats(table, blocks, device.arch) * tile * products
    mma /= device.fma if asynchronous or device.arch not in DIRECT else device.fma / 2
    if table.backward:
        # Five products, of which each reads both operands; of the older MMA two warps read each.
        read = (1 if asynchronous else 2) * 5 * (owned + walked) * inner
    elif swapped:  # every warp, all queries and weights
        read = walked * products + (1 if asynchronous else blocks.num_warps) * owned * (inner + walked)
    elif asynchronous:
        read = owned * inner + math.ceil(owned / 64) * walked * products  # 64 rows at a time
    else:
        read = min(blocks.num_warps, owned // 16) * walked * products  # every warp, all keys and values
    mma = max(mma, 2 * read / SHARED_PORT)
    instructions = fact["loop_instructions"] or fact["instructions"]
    issued = instructions * blocks.num_warps / (ISSUED if isinstance(device.arch, int) else ISSUED_AMD)
    moved = walked * head_dim * (2 * 2 + (4 if table.backward else 0))  # two 16-bit tiles, and dq's share in 32 bits
    costs = (mma, issued, tile / EXPONENTIALS, moved / device.l2)
    taken = max(costs) + EXPOSED * (sum(costs) - max(costs))
    return taken, mma + ALONE * instructions * max(1, blocks.num_warps // 4)


def _owned_and_walked(table: AttentionTable, queries: int, keys: int) -> tuple[int, int]:
    """What a program owns and what it walks over: forward queries and keys, backward keys and queries."""
    return (keys, queries) if table.backward else (queries, keys)


def microseconds(
    table: AttentionTable, problem: Problem, blocks: AttentionBlocks, fact: Mapping[str, Any], device: Device
) -> float:
    """Estimated time of one forward launch, or of a backward's main launch and the sum of dq.

    Args:
        fact: of `blocks` on the device, see ``fact_of``.
    """
    owned, walked = _owned_and_walked(table, blocks.BLOCK_M, blocks.BLOCK_N)
    own, other = _owned_and_walked(table, problem.queries, problem.keys)
    tiles, rows_issued = math.ceil(own / owned), math.ceil(own / owned) * owned
    if not table.backward:  # the last queries' tiles are smaller
        tiles = query_tiles(own, owned, device.arch)
        rows_issued = own // owned * owned + sum(query_tails(own, owned, device.arch))
    share = rows_issued / (tiles * owned)  # of a full tile's work, the mean over tiles
    programs = problem.batch * problem.heads * tiles * blocks.SPLITS
    steps = math.ceil(math.ceil(other / walked) / blocks.SPLITS)
    taken, chain = _step(table, problem.head_dim, blocks, fact, device)
    taken *= share
    uncovered = LATENCY / max(1, blocks.num_stages - 1)
    after = share * owned * problem.head_dim * EPILOGUE * (2 if table.backward else 1) / FP32_LANES
    if blocks.SPLITS > 1:
        after += (blocks.SPLITS + 1) * share * owned * problem.head_dim * 4 / device.l2 + 2 * LATENCY

    cycles, left = 0.0, math.ceil(programs / device.multiprocessors)  # on the busiest multiprocessor
    while left > 0:
        together = min(left, fact["blocks"])
        cycles += FIXED + LATENCY + steps * (max(together * taken, chain, uncovered) + STEP) + together * after
        left -= together
    width = problem.heads * problem.head_dim
    rows = problem.batch * 2 * (problem.queries + problem.keys)
    hbm = rows * width * 2 * (2 if table.backward else 1) / (device.bandwidth * 1e3)
    total = max(cycles / (device.clock * 1e3), hbm + (FIXED + LATENCY) / (device.clock * 1e3))
    if table.backward:  # every key block leaves a share of dq, which a launch of its own adds up
        shares = math.ceil(problem.keys / owned) * problem.batch * problem.queries * width * 4
        total += 2 * shares / (device.bandwidth * 1e3)
    return total


def choose(table: AttentionTable, problem: Problem, device: Device) -> AttentionBlocks:
    """The fastest candidate by the estimate, of those whose code keeps the gate's promises.

    The promise about issued flops is kept where that costs less than `WASTE_COSTS` by the estimate.

    Raises:
        ValueError: none does.
    """
    found = []
    for blocks in table.candidates(device.arch):
        fact = fact_of(table.op, problem.head_dim, blocks, device.arch)
        if (table.op, problem.head_dim, blocks.name, device.arch) in SPILLS_ELSEWHERE:
            continue
        if ships(fact, device.arch) and problem.keys // blocks.BLOCK_N >= blocks.SPLITS:
            found.append((microseconds(table, problem, blocks, fact, device), blocks))
    if not found:
        raise ValueError(f"no candidate of {table.op} at head dim {problem.head_dim} ships on {device.name}")
    fastest = min(found)
    thrifty = [
        (time, blocks)
        for time, blocks in found
        if time < WASTE_COSTS * fastest[0] and issued(table, problem, blocks, device.arch) <= ISSUED_FLOPS
    ]
    return min(thrifty, default=fastest)[1]


def issued(table: AttentionTable, problem: Problem, blocks: AttentionBlocks, arch: Arch) -> float:
    """Matrix flops issued over the useful ones; of a backward, whose tiles all waste alike, only its ``repeats``."""
    if table.backward:
        return repeats(table, blocks, arch)
    rows = [blocks.BLOCK_M] * (problem.queries // blocks.BLOCK_M)
    rows += query_tails(problem.queries, blocks.BLOCK_M, arch)
    flops = sum(count * sum(_columns(table, problem.head_dim, blocks, count, arch)) for count in rows)
    return flops / (problem.queries * 2 * problem.head_dim)


def repeats(table: AttentionTable, blocks: AttentionBlocks, arch: Arch) -> float:
    """How many warps do the same products: in a backward's, but for dq's, a warp takes 16 keys at least.

    A forward has none, see ``attention_tiles.warps_of_rows``. AMD's and asynchronous MMAs are not known to.
    """
    if not table.backward or not isinstance(arch, int) or (arch in DIRECT and blocks.BLOCK_N >= 64):
        return 1.0
    return 1 + 0.8 * (max(1.0, MIN_TILE * blocks.num_warps / blocks.BLOCK_N) - 1)


def _columns(table: AttentionTable, head_dim: int, blocks: AttentionBlocks, rows: int, arch: Arch) -> tuple[int, int]:
    """Head columns of a tile of `rows`: as a product's contraction, and as its output."""
    inner = 16 * math.ceil(head_dim / 16)
    swapped = not table.backward and rows < MIN_TILE * warps_of_rows(blocks.num_warps, arch)
    least = 16 if swapped else min_output_tile(arch)
    return inner, least * math.ceil(head_dim / least)


def choose_attention_table(name: str, device: Device) -> list[tuple[int | None, ...]]:
    """The rows that the model chooses for one device and one of ``ATTENTION_TABLES``."""
    table = ATTENTION_TABLES[name]
    return table.table_of(lambda problem: choose(table, problem, device))


def all_attention_tables() -> dict[str, dict[Arch, list[tuple[int | None, ...]]]]:
    """Every attention table of kernels/tables.py, by architecture."""
    return {
        name: {device.arch: choose_attention_table(name, device) for device in DEVICES.values()}
        for name in ATTENTION_TABLES
    }
