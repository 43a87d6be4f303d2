"""8-bit tensors, int8 or fp8 e4m3: one scale per row and group of columns, in memory and in registers.

A scale per row is what SmoothQuant calls per token (Xiao et al., 2023, section 3). Where a GEMM's epilogue rounds to 8
bits no program sees a whole row, so each column tile gets its own scale: a channel of huge values then costs precision
in its own group alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Largest value that a scale maps to. e4m3 as OCP defines it ("fn"): no infinities, largest finite 448.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Quantized:
    """An 8-bit (M, K) tensor: value = values * scales[column // group, row].

    values: (M, K) int8 or float8_e4m3fn, last stride 1. scales: (ceil(K / group), >= M) fp32, last stride 1.
    """

    values: Tensor
    scales: Tensor
    group: int

    @classmethod
    def empty(cls, M: int, K: int, group: int, dtype: torch.dtype, device: torch.device | str) -> Quantized:
        """Room for an (M, K) tensor in groups of `group` columns."""
        scales = torch.empty(triton.cdiv(K, group), M, dtype=torch.float32, device=device)
        return cls(torch.empty(M, K, dtype=dtype, device=device), scales, group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (M, K) values in `dtype`."""
        M, K = self.values.shape
        wide = self.scales[:, :M].to(dtype).t().repeat_interleave(self.group, 1)[:, :K]
        return self.values.to(dtype) * wide


def quantize_ref(x_MK: Tensor, dtype: torch.dtype, group: int | None = None) -> Quantized:
    """Round x to 8 bits with one scale per row and `group` columns (all columns if None). Scales are fp32."""
    K = x_MK.shape[1]
    group = K if group is None else group
    wide = x_MK.float()
    parts = F.pad(wide, (0, -K % group)).unflatten(1, (-1, group))
    scales_MG = _scale_of(parts.abs().amax(-1), dtype)
    scaled = wide / scales_MG.repeat_interleave(group, 1)[:, :K]
    values = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return Quantized(values, scales_MG.t().contiguous(), group)


def quantize_weight(weight_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values (N, K) in `dtype` and scales (N,) fp32, one per output channel."""
    if dtype not in LARGEST:
        raise ValueError(f"weights are quantised to torch.int8 or torch.float8_e4m3fn, got {dtype}")
    quantized = quantize_ref(weight_NK, dtype)
    return quantized.values, quantized.scales[0]


def check_scales(x: Quantized) -> None:
    """Reject scales that do not fit the values."""
    (M, K), groups = x.values.shape, triton.cdiv(x.values.shape[1], x.group)
    shape = x.scales.shape
    if shape[0] != groups or shape[1] < M or x.scales.stride(1) != 1 or x.scales.dtype != torch.float32:
        raise ValueError(
            f"8-bit ({M}, {K}) in groups of {x.group} needs fp32 scales ({groups}, {M}) with last stride 1, "
            f"got {x.scales.dtype} {tuple(shape)}"
        )


def _scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    # A row of zeros needs some scale; any will do.
    return torch.where(largest > 0, largest / LARGEST[dtype], torch.ones_like(largest))


@triton.jit
def quantize_rows(v, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """(values in 8 bits, scale per row) of a fp32 tile."""
    largest = tl.max(tl.abs(v), 1)
    scale = tl.where(largest > 0.0, largest / LARGEST, 1.0)
    scaled = v * (1.0 / scale)[:, None]
    if dtype == tl.int8:
        # Nearest; the product above can pass 127 by one rounding, never reach 127.5.
        q = tl.floor(scaled + 0.5).to(tl.int8)
    else:
        # e4m3 has no room above 448: keep a rounding of the product from leaving it.
        q = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST).to(dtype)
    return q, scale
