"""A static cost model of the GEMMs, for choosing block sizes on cards that nobody here can time.

For a configuration it counts what the hardware must do: tensor-core cycles of the tiles issued (edges included), bytes
from L2, shared-memory reads of the older MMA, latency that too few stages leave uncovered, waves (a multiprocessor with
two programs while another has one keeps everybody waiting), the split-K reduction, and HBM traffic. The estimate ranks
configurations. It is no measurement and is not to be quoted as a speed.

``python -m vat_fast.kernels.choose`` writes the shipped tables, ``python -m vat_fast.kernels.retune`` replaces them by
measured ones. `attention_model` does the same for attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vat_fast.kernels.configs import Arch


@dataclass(frozen=True)
class Device:
    """What the model knows of a card. Vendor figures: data sheets, and CUDA's table of limits per capability.

    fma: bf16 multiply-adds per clock and multiprocessor, fp32 accumulation. smem: KB per multiprocessor, and the
    most that one block may use. bandwidth: GB/s of HBM. clock: boost GHz. l2: bytes per clock that each of the
    multiprocessors takes from L2 when all do. A100: 5120 for all 108 by its white paper, taken for its successors too,
    which publish none; 4090: the 5 TB/s that microbenchmarks report; MI300X: 2048 for each 38 by AMD's CDNA 3 paper.
    """

    name: str
    arch: Arch
    multiprocessors: int
    fma: int
    bandwidth: float
    clock: float
    warps: int
    smem: int
    smem_block: int
    l2: int

    @property
    def tflops(self) -> float:
        """Dense bf16 TFLOP/s."""
        return 2e-3 * self.multiprocessors * self.fma * self.clock


DEVICES = {
    device.name: device
    for device in (
        Device("A100", 80, 108, 1024, 2039, 1.41, 64, 164, 163, 47),
        Device("Orin", 87, 16, 1024, 204.8, 1.30, 48, 164, 163, 47),
        Device("4090", 89, 128, 256, 1008, 2.52, 48, 100, 99, 16),
        Device("H100", 90, 132, 2048, 3350, 1.83, 64, 228, 227, 47),
        Device("B200", 100, 148, 4096, 8000, 1.85, 64, 228, 227, 47),
        Device("Thor", 110, 20, 4096, 273, 1.575, 48, 228, 227, 47),
        Device("MI300X", "gfx942", 304, 1024, 5300, 2.1, 32, 64, 64, 54),
    )
}

# Bytes per clock of shared memory.
SHARED_PORT = 128
# Architectures whose MMA reads operands from shared memory without passing registers, from 64 rows on.
DIRECT = (90, 100, 110)
# Fewer rows than this become the MMA's columns, of which NVIDIA's take 8.
MMA_ROWS = 16
# Cycles from asking for data in L2 or HBM to having it; between the published figures of the two.
LATENCY = 700
# Cycles before a program's first product and after its last: launch, addresses, scheduling.
FIXED = 1000
# Cycles per loop step for waiting on the copies and synchronising the warps.
STEP = 40
# Instructions per element of a tile's epilogue.
EPILOGUE = 15
FP32_LANES = 128


@dataclass(frozen=True, order=True)
class Blocks:
    """One configuration of the GEMM kernels, the fields in the order of a row of kernels/tables.py."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    SPLIT_K: int
    num_warps: int
    num_stages: int


def reads_shared_memory_directly(blocks: Blocks, arch: Arch) -> bool:
    """Whether the compiler can use asynchronous MMA; below 64 rows it falls back to the older kind at half rate."""
    return arch in DIRECT and (blocks.BLOCK_N if blocks.BLOCK_M < MMA_ROWS else blocks.BLOCK_M) >= 64


def shared_bytes(blocks: Blocks, element: int, arch: Arch) -> int:
    """Shared memory of the pipelined loop. Asynchronous MMA keeps one buffer more in flight."""
    buffers = blocks.num_stages - (0 if reads_shared_memory_directly(blocks, arch) else 1)
    return buffers * (blocks.BLOCK_M + blocks.BLOCK_N) * blocks.BLOCK_K * element


def registers(blocks: Blocks, arch: Arch) -> int:
    """Registers per thread, a line through what compiled kernels use: accumulators, their epilogue, addresses."""
    accumulators = blocks.BLOCK_M * blocks.BLOCK_N / (32 * blocks.num_warps)
    return math.ceil(40 + 1.9 * accumulators if arch in DIRECT else 80 + 1.4 * accumulators)


def blocks_per_multiprocessor(blocks: Blocks, element: int, device: Device) -> int:
    """How many programs share a multiprocessor; 0 if one does not fit."""
    smem = shared_bytes(blocks, element, device.arch)
    if smem > device.smem_block * 1024:
        return 0
    by_registers = 65536 // (min(registers(blocks, device.arch), 255) * 32 * blocks.num_warps)
    return min(device.warps // blocks.num_warps, by_registers, device.smem * 1024 // (smem + 1024))


def microseconds(M: int, N: int, K: int, blocks: Blocks, element: int, device: Device) -> tuple[float, float]:
    """Estimated time of one launch of y (M, N) = x (M, K) @ W (N, K)^T, and the same with endless HBM bandwidth.

    Args:
        element: bytes of an operand's element; 1 doubles the tensor-core rate.

    Raises:
        ValueError: the blocks do not fit the device.
    """
    resident = blocks_per_multiprocessor(blocks, element, device)
    if resident == 0:
        raise ValueError(f"{blocks} does not fit {device.name}: {shared_bytes(blocks, element, device.arch)} bytes")
    tile = blocks.BLOCK_M * blocks.BLOCK_N
    programs = math.ceil(M / blocks.BLOCK_M) * math.ceil(N / blocks.BLOCK_N) * blocks.SPLIT_K
    steps = math.ceil(math.ceil(K / blocks.BLOCK_K) / blocks.SPLIT_K)
    rate = device.fma * (2 / element)
    smem = 0.0
    if not reads_shared_memory_directly(blocks, device.arch):
        rate /= 2 if device.arch in DIRECT else 1
        warps_m = 1 if blocks.BLOCK_M < 32 else 2
        warps_n = blocks.num_warps // warps_m
        read = warps_n * blocks.BLOCK_M + warps_m * blocks.BLOCK_N  # every warp loads its own rows and columns
        smem = read * blocks.BLOCK_K * element / SHARED_PORT
    mma = max(tile * blocks.BLOCK_K / rate, smem)
    load = (blocks.BLOCK_M + blocks.BLOCK_N) * blocks.BLOCK_K * element / device.l2
    uncovered = LATENCY / max(1, blocks.num_stages - 1)
    after = tile * EPILOGUE / FP32_LANES
    if blocks.SPLIT_K > 1:
        after += (blocks.SPLIT_K + 1) * tile * 4 / device.l2 + 2 * LATENCY / resident

    cycles = 0.0
    left = math.ceil(programs / device.multiprocessors)  # on the busiest multiprocessor
    while left > 0:
        together = min(left, resident)
        cycles += FIXED + LATENCY + steps * max(together * max(mma, load) + STEP, uncovered) + together * after
        left -= together
    hbm = (M * K + N * K) * element + M * N * 2
    on_chip = cycles / (device.clock * 1e3)
    return max(on_chip, hbm / (device.bandwidth * 1e3) + (FIXED + LATENCY) / (device.clock * 1e3)), on_chip


# For at most 8 rows.
FEW_ROWS = 8
FEW_ROWS_TILES = ((8, 64, 64, 4, 4), (8, 64, 128, 4, 3), (8, 128, 64, 4, 4))
# Tiles worth considering: (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), BLOCK_K in 2-byte elements.
TILES = (
    (16, 64, 64, 4, 4),
    (16, 64, 128, 4, 3),
    (16, 128, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (64, 32, 64, 4, 4),
    (64, 32, 128, 4, 3),
    (64, 64, 32, 4, 4),
    (64, 64, 64, 4, 3),
    (64, 64, 64, 4, 4),
    (64, 128, 32, 4, 4),
    (64, 128, 64, 4, 3),
    (128, 64, 32, 4, 4),
    (128, 64, 64, 4, 3),
)
SPLITS = (1, 2, 3, 4, 6, 8)
# Two programs a multiprocessor hide each other's start and end.
FEWEST_RESIDENT = 2
# Of K, by its last step.
MOST_PADDING = 1.03
# 128 x 128 with four warps leaves no registers for GELU or for adding splits. The narrow layers, output projection
# and fc2, have no GELU. On 11.0 the compiler spills even there.
WIDEST_WITHOUT_GELU = 2048


def group_of(N: int) -> int:
    """Columns per scale where a GEMM of N columns also writes 8 bits: its column tile, the same on every target.

    128 columns leave the reader fewest scales; a narrow layer would fill no machine with them.
    """
    return 64 if N <= 2048 else 128


def candidates(
    M: int,
    N: int,
    K: int,
    element: int,
    device: Device,
    block_n: int | None = None,
    tiles: Sequence[tuple[int, ...]] = TILES,
    splits: Sequence[int] = SPLITS,
) -> Iterator[Blocks]:
    """Configurations that fit the device at least twice and waste no tile on few rows; only of block_n if given."""
    for block_m, tile_n, block_k, warps, stages in tiles:
        if block_m > max(MMA_ROWS, 2 ** math.ceil(math.log2(M))) or block_n not in (None, tile_n):
            continue
        if block_m < MMA_ROWS and (M > FEW_ROWS or not isinstance(device.arch, int)):
            continue
        if not isinstance(device.arch, int):
            stages = 2  # MI300 pipelines through registers; more stages only fill its 64 KB
        if block_m > 64 and block_n is not None and element == 1:
            continue  # partial product, running sum and a residual, statistics and 8 bits in the epilogue spill there
        largest = block_m * tile_n >= 128 * 128
        if largest and (N > WIDEST_WITHOUT_GELU or device.arch == 110):
            continue
        for split in (1,) if largest else splits:
            blocks = Blocks(block_m, tile_n, block_k * 2 // element, 8, split, warps, stages)
            steps = math.ceil(K / blocks.BLOCK_K)
            padded = steps * blocks.BLOCK_K > MOST_PADDING * K
            if split <= steps and not padded and blocks_per_multiprocessor(blocks, element, device) >= FEWEST_RESIDENT:
                yield blocks


def choose(M: int, N: int, K: int, element: int, device: Device) -> Blocks:
    """The fastest candidate by the estimate; of those that HBM makes equal, the one with most room on chip."""
    return fastest(M, N, K, element, device, candidates(M, N, K, element, device))


def fastest(M: int, N: int, K: int, element: int, device: Device, blocks: Iterable[Blocks]) -> Blocks:
    """The best of some configurations, as ``choose``."""
    return min(
        blocks,
        key=lambda blocks: (*microseconds(M, N, K, blocks, element, device), blocks.SPLIT_K, blocks),
    )


# A rule covers everything up to its bound; the bound itself is what the model looks at. The last bounds are open.
ROWS = (16, 64, 128, 256, 512, 768, 1024, 4096, 16384)
LAYERS = ((2048, 2048, 1152, 1152), (2048, None, 1152, 4304), (None, None, 4304, 1152))  # N, K bounds; N, K modelled
# GEMMs that also write 8 bits: of 16-bit operands the output projection, of 8-bit ones fc2 and fc1.
GROUPED_ROWS = (64, 256, 768, 1024, 16384)


@dataclass(frozen=True)
class TableSpec:
    """What one table of kernels/tables.py is for. grouped: its GEMMs also write 8 bits, BLOCK_N is ``group_of``(N)."""

    element: int
    layers: tuple[tuple[int | None, int | None, int, int], ...] = LAYERS
    rows: tuple[int, ...] = ROWS
    grouped: bool = False
    tiles: tuple[tuple[int, ...], ...] = TILES
    splits: tuple[int, ...] = SPLITS

    def candidates(self, M: int, N: int, K: int, device: Device) -> Iterator[Blocks]:
        """Configurations worth timing at one shape."""
        block_n = group_of(N) if self.grouped else None
        return candidates(M, N, K, self.element, device, block_n, self.tiles, self.splits)

    def choose(self, M: int, N: int, K: int, device: Device) -> Blocks:
        """The model's choice at one shape."""
        return fastest(M, N, K, self.element, device, self.candidates(M, N, K, device))

    def table_of(self, choose: Callable[[int, int, int], Blocks]) -> list[tuple[int | None, ...]]:
        """Rows (M, N, K bounds, then the fields of Blocks) from a choice per (M, N, K); None is no bound."""
        table: list[tuple[int | None, ...]] = []
        for n_bound, k_bound, N, K in self.layers:
            layer: list[tuple[int | None, ...]] = []
            for M in self.rows:
                fields = tuple(vars(choose(M, N, K)).values())
                if layer and layer[-1][3:] == fields:
                    layer.pop()  # the next bound covers it
                layer.append((None if self.rows[-1] == M else M, n_bound, k_bound, *fields))
            table += layer
        return table


TABLES = {
    "LINEAR": TableSpec(2, rows=(FEW_ROWS, *ROWS), tiles=(*FEW_ROWS_TILES, *TILES)),
    "QUANT_LINEAR": TableSpec(1),
    "GROUPED_LINEAR": TableSpec(2, ((None, None, 1152, 1152),), GROUPED_ROWS, grouped=True),
    "GROUPED_QUANT_LINEAR": TableSpec(1, LAYERS[1:], GROUPED_ROWS, grouped=True),
    # Pixels are gathered byte by byte and converted in registers: short steps, no more than 64 rows, no split K.
    "PATCH_EMBED": TableSpec(
        2,
        ((None, None, 1152, 592),),
        (512, 1024, 2048, 16384),
        tiles=((64, 64, 32, 4, 4), (64, 128, 32, 4, 4)),
        splits=(1,),
    ),
}


def choose_table(name: str, device: Device) -> list[tuple[int | None, ...]]:
    """The rows that the model chooses for one device and one of ``TABLES``."""
    return TABLES[name].table_of(lambda M, N, K: TABLES[name].choose(M, N, K, device))


HEADER = '''"""Configurations: what ``choose`` took from the static models or ``retune`` measured. Not edited by hand.

Rows: at most this M, N, K (None: any), then BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, num_warps, num_stages.
Attention: at most this head dim, so many programs of 64 queries, then BLOCK_M, BLOCK_N, SPLITS, num_warps, num_stages.
MEASURED says on which card and when a target was retuned; all others are the models'.
"""

from vat_fast.kernels.configs import Arch

Row = tuple[int | None, ...]
'''


def format_table(name: str, table: dict[Arch, list[tuple[int | None, ...]]]) -> str:
    """A table as Python source."""
    lines = [f"{name}: dict[Arch, list[Row]] = {{"]
    for arch, rows in table.items():
        key = f'"{arch}"' if isinstance(arch, str) else str(arch)
        lines += [f"    {key}: [", *(f"        {row}," for row in rows), "    ],"]
    return "\n".join([*lines, "}"])


FLASH_HEADER = """# Vision self-attention, Triton's and flash-attn's, as ``retune`` measured them where it could.
# Rows: head dim, at most so many tokens (None: any), microseconds of Triton, microseconds of flash-attn.
FLASH_ATTENTION: dict[Arch, list[tuple[int, int | None, float, float]]] = {"""


def format_tables(
    contents: Mapping[str, dict[Arch, list[tuple[int | None, ...]]]],
    measured: dict[Arch, str],
    flash: Mapping[Arch, Sequence[tuple[int, int | None, float, float]]],
) -> str:
    """The whole of kernels/tables.py; `measured` says of retuned targets on what and when."""
    lines = [f"    {arch!r}: {note!r}," for arch, note in measured.items()]
    notes = "\n".join(["MEASURED: dict[Arch, str] = {", *lines, "}"]) if lines else "MEASURED: dict[Arch, str] = {}"
    rows = [f"    {arch!r}: {list(rows)!r}," for arch, rows in flash.items()]
    choice = "\n".join([FLASH_HEADER, *rows, "}"]) if rows else FLASH_HEADER + "}"
    return "\n\n".join([HEADER + "\n" + notes, choice, *(format_table(*item) for item in contents.items())]) + "\n"


def all_tables() -> dict[str, dict[Arch, list[tuple[int | None, ...]]]]:
    """Every table of kernels/tables.py, by architecture."""
    return {name: {device.arch: choose_table(name, device) for device in DEVICES.values()} for name in TABLES}
