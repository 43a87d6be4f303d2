"""Weights in 16 or 8 bits for the native executor: rounded, bounded so that no sum overflows, laid out in panels.

y = x W^T with W_nk = scale_n q_nk, and each row of x rounded when it is read: to 32,767 levels around zero, or to 256
between its smallest and its largest number (182 on processors without VNNI). Channels of x are evened out by samples
(`int8.smoothing`), or without any by the weights (`int8.evening`). Sums are exact: the weights that are added up
together are bounded so that no x, however large its numbers, brings a sum out of range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vat_fast.native.library import load

BITS = {"int16": 16, "int8": 8}
LEVELS = {16: (2500, 32767), 8: (127, 255)}
"""Bits -> (`levels`, `input_levels`) of `int8.smoothing`; in 16 bits, what the bound on sums leaves normal weights."""

_PART = 256
"""In 16 bits so many numbers of K are summed in 32 bits before they become floats."""
_TOGETHER = {16: 2, 8: 4}
_LARGEST = {16: 32767, 8: 127}


@dataclass(frozen=True)
class IntegerWeight:
    """A linear's weight as `vat_integer_linear` reads it."""

    bits: int
    numbers: Tensor
    """int32, flat: (columns / panel, words of K, panel); 2 or 4 numbers to a word."""
    scale: Tensor
    """float32 (N,)."""
    sums: Tensor
    """float32 (N,): the sum of each row of W as it was rounded, for the smallest number of a row of x."""
    even: Tensor | None
    """float32 (K,): what x is multiplied by before it is rounded, or None."""


def pack_integers(weight_NK: Tensor, bits: int, smooth: Tensor | None = None) -> IntegerWeight:
    """A weight in `bits`; with `smooth` (K,) for x / smooth."""
    weight = weight_NK.float() if smooth is None else weight_NK.float() * smooth
    N, K = weight.shape
    lanes, together = load().vat_lanes(), _TOGETHER[bits]
    weight = F.pad(weight, (0, words(K, bits) * together - K))
    # A word's numbers are `lanes` apart.
    weight = weight.unflatten(1, (-1, together, lanes)).transpose(2, 3).flatten(1)
    scale, numbers = _round(weight, bits)
    sums = scale * numbers.sum(dim=1)
    kind = torch.int16 if bits == 16 else torch.int8
    numbers = F.pad(numbers.to(kind), (0, 0, 0, -N % (2 * lanes))).view(torch.int32)
    panels = numbers.unflatten(0, (-1, 2 * lanes)).transpose(1, 2).flatten()
    return IntegerWeight(bits, panels.contiguous(), scale, sums, None if smooth is None else 1 / smooth)


def words(K: int, bits: int) -> int:
    """32-bit words of a row of K numbers, whole vectors of them."""
    lanes = load().vat_lanes()
    return -(-K // (_TOGETHER[bits] * lanes)) * lanes


def _round(weight_NK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, whole numbers), each row with as many levels as it can have."""
    magnitude = weight_NK.abs()
    scale = magnitude.amax(dim=1) / _LARGEST[bits]
    if bits == 16:
        together, most = (
            torch.stack([part.sum(dim=1) for part in magnitude.split(_PART, dim=1)], dim=1),
            (2**31 - 1) // load().vat_input_most(16),
        )
        weights_together = _PART
    elif most := load().vat_shared_most():
        # Two quads of K, two pairs in each: a pair of both is summed in 16 bits.
        quads = magnitude.unflatten(1, (-1, 2, 2, 2))
        pairs = quads[:, :, 0] + quads[:, :, 1]
        together = (pairs[..., 0] + pairs[..., 1]).flatten(1)
        weights_together = 4
    else:
        return _rounded(weight_NK, scale)
    # Rounding may add a half for each weight.
    return _rounded(weight_NK, torch.maximum(scale, together.amax(dim=1) / (most - weights_together / 2)))


def _rounded(weight_NK: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scale = scale.clamp(min=1e-30)
    return scale, (weight_NK / scale[:, None]).round()
