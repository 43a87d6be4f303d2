"""Weights in 16 or 8 bits for the native executor: rounded, bounded so that no sum overflows, laid out in panels.

y = x W^T with W_nk = scale_n q_nk, and each row of x rounded when it is read, to 2 * 16,383 + 1 levels around zero or to
256 between its smallest and largest number. Nothing is measured beforehand; x may be evened out by calibration first
(`int8.smoothing`). Sums of products are exact. What keeps them in range are bounds on the weights that are added up
together, which hold for every x (docs/frozen.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vat_fast.native.library import load

BITS = {"int16": 16, "int8": 8}

_PART, _PART_MOST = 256, (2**31 - 1) // 16383
"""16 bits: so many numbers of K are summed in 32 bits before they become floats, and so large may they be together."""
_TOGETHER = {16: 2, 8: 4}
_LARGEST = {16: 32767, 8: 127}
_SHRUNK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Scales that are tried where the bound is on few weights, as parts of the one at which no weight has to give way."""


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
    shared = load().vat_shared_most()
    scale, numbers = _round_shared(weight, shared) if bits == 8 and shared else _round(weight, bits)
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
    scale = weight_NK.abs().amax(dim=1) / _LARGEST[bits]
    if bits == 16:
        # Rounding may add a half for each number.
        most = _PART_MOST - _PART / 2
        parts = [part.abs().sum(dim=1) for part in weight_NK.split(_PART, dim=1)]
        scale = torch.maximum(scale, torch.stack(parts).amax(dim=0) / most)
    scale = scale.clamp(min=1e-30)
    return scale, (weight_NK / scale[:, None]).round()


def _round_shared(weight_NK: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(scale, whole numbers) in 8 bits, of which four that share a 16-bit sum are at most `most` together.

    One group of large weights would take levels from a whole row, so groups give way: of a few scales each row takes
    the one with the least square error.
    """
    groups = weight_NK.unflatten(1, (-1, 2, 2, 2))  # K / 8, quad, pair, one of two: a group is a pair of both quads
    together = groups.abs().sum(dim=(2, 4), keepdim=True)
    widest = torch.maximum(together.amax(dim=(1, 2, 3, 4)) / most, weight_NK.abs().amax(dim=1) / _LARGEST[8])
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for part in _SHRUNK:
        scale = (part * widest).clamp(min=1e-30)
        by_group = scale.view(-1, 1, 1, 1, 1)
        numbers = (groups / by_group).round().clamp(-_LARGEST[8], _LARGEST[8])
        too_much = numbers.abs().sum(dim=(2, 4), keepdim=True) > most
        numbers = torch.where(too_much, (groups * (most / together)).trunc(), numbers).flatten(1)
        error = (numbers * scale[:, None] - weight_NK).square().sum(dim=1)
        if best is None:
            best = error, scale, numbers
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better[:, None], numbers, best[2]),
            )
    assert best is not None
    return best[1], best[2]
