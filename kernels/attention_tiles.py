"""Tiles of the attention kernels: how heads, queries and keys are divided, and what tensors a launcher takes.

Head dims that are no power of two are split, not padded: 72 is a 64-wide main part and a narrow tail, 96 is 64 + 32.
The sizes that a model fixes (tokens, heads, head dim, row strides) are compile-time constants: loads are then 16 bytes
wide, and rows are masked in ragged tiles alone. A ragged edge gets tiles of its own size, so that 261 keys cost
256 + 16 and not 320, and 56 queries in tiles of 32 cost 32 + 16 + 8. A warp multiplies 16 rows at least: queries too
few for all warps are the products' columns, of which 8 are enough, and keys or head columns are the rows.
"""

from __future__ import annotations

import torch
import triton

from vat_fast.kernels import configs

# An MMA wants at least 16 rows and, in 16-bit types, 16 steps along the contraction; the output may be 8 wide.
MIN_TILE = 16
MIN_OUTPUT_TILE = 8
# Of the released models: 8 steps of 7 numbers. Up to so many queries in the last 64, small tiles save rows.
ACTION_TOKENS = 56


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """(main, tail, output tail) widths of one head: 72 -> (64, 16, 8), 96 -> (64, 32, 32), 64 -> (64, 0, 8).

    The tail is a contraction length in Q K^T, where an MMA wants 16, and an output width in P V, where NVIDIA's MMAs
    take 8; AMD's are 16 wide at least.
    """
    main = max(MIN_TILE, 1 << (head_dim.bit_length() - 1))
    rest = triton.next_power_of_2(head_dim - main) if head_dim > main else 0
    return main, max(rest, MIN_TILE) if rest else 0, max(rest, min_output_tile(configs.current_arch()))


def min_output_tile(arch: configs.Arch) -> int:
    """Columns of the narrowest MMA."""
    return MIN_OUTPUT_TILE if isinstance(arch, int) else MIN_TILE


def tail_tile(count: int, block: int) -> int:
    """Width of the tile for the last `count % block` rows: a power of two, at least 16; 0 if nothing is left over."""
    rest = count % block
    return max(MIN_TILE, triton.next_power_of_2(rest)) if rest else 0


def num_tiles(count: int, block: int) -> int:
    """Full tiles and the ragged one."""
    return count // block + (count % block > 0)


def warps_of_rows(num_warps: int, arch: configs.Arch) -> int:
    """Warps that a tile must have 16 queries for if queries are to be a product's rows; else they are its columns.

    AMD's MMAs are as wide as they are high: there queries are always rows.
    """
    return num_warps if isinstance(arch, int) else 1


def query_tails(count: int, block: int, arch: configs.Arch) -> tuple[int, int]:
    """Rows of the one or two tiles for the last `count % block` queries of a forward; 0 where there is none.

    Two where a single power of two would be larger: 24 queries take 16 and 8. NVIDIA's MMAs take 8 of them as columns.
    """
    least = min_output_tile(arch)
    rows = triton.cdiv(count % block, least) * least
    if rows == 0:
        return 0, 0
    whole = triton.next_power_of_2(rows)
    first = whole if whole == rows else whole // 2
    second = triton.next_power_of_2(rows - first) if rows > first else 0
    return (first, second) if first + second < whole else (whole, 0)


def query_tiles(count: int, block: int, arch: configs.Arch) -> int:
    """Tiles of a forward over `count` queries."""
    return count // block + sum(rows > 0 for rows in query_tails(count, block, arch))


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact float32; TF32 would miss the error that float32 users expect."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_dtype(name: str, x: torch.Tensor) -> None:
    """Raise unless the kernels take x's dtype."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name} has dtype {x.dtype}, expected float32, float16 or bfloat16: cast it first.")


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raise unless `x` (B, rows, columns) has contiguous rows and 32-bit offsets within a batch element."""
    if x.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {x.stride(-1)} along its last axis, expected 1: call .contiguous() on it first."
        )
    if x.shape[1] * x.stride(1) >= 2**31:
        raise ValueError(
            f"{name} spans {x.shape[1] * x.stride(1)} elements in one batch element, expected fewer than 2**31: "
            "use fewer rows or a smaller row stride."
        )


def check_outputs(out: torch.Tensor, lse: torch.Tensor, shape: tuple[int, ...], num_heads: int) -> None:
    """Raise unless out (B, T, D) has contiguous rows and lse is contiguous float32 (B, H, T)."""
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {shape}.")
    check_rows("out", out)
    batch, rows, _ = shape
    if tuple(lse.shape) != (batch, num_heads, rows) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(
            f"lse has shape {tuple(lse.shape)} and dtype {lse.dtype}, expected contiguous float32 "
            f"{(batch, num_heads, rows)}."
        )
