"""8-bit integers for the large products: weights by output channel, activations by tensor, outliers smoothed.

W8A8 with static ranges: x W^T = sum over K of (x / s) (W s)^T, where s evens out the input channels (SmoothQuant, Xiao
et al., arXiv 2211.10438), W s is rounded to int8 with one scale per output channel, and x / s to uint8 with a zero
point from ranges that calibration observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vat_fast.frozen.plan import Plan, Step


@dataclass(frozen=True)
class Range:
    """What one linear's input was over all calibration inputs."""

    low: Tensor
    """Smallest value of each input channel, float32 (K,)."""
    high: Tensor
    """Largest value of each input channel, float32 (K,)."""


@dataclass(frozen=True)
class QuantisedLinear:
    """y = ((x / smooth) rounded to uint8 in [low, high]) (scale weight)^T."""

    weight: Tensor
    """int8 (N, K), -127 to 127."""
    scale: Tensor
    """float32 (N,)."""
    low: float
    high: float
    """Range of x / smooth; 0 lies inside."""
    smooth: Tensor | None = None
    """float32 (K,), or None where channels are even enough."""


def quantised_steps(plan: Plan) -> list[Step]:
    """The linears that run in 8 bits."""
    return [step for step in plan.all_steps if "quantised" in step.options]


def quantise_linear(weight_NK: Tensor, observed: Range, alpha: float = 0.5) -> QuantisedLinear:
    """8-bit form of a linear.

    Args:
        weight_NK: float.
        observed: ranges of its input.
        alpha: how much of the input's unevenness moves into the weight: 0 none, 1 all.
    """
    weight = weight_NK.float()
    smooth = _smoothing(weight, observed, alpha)
    low_K, high_K = observed.low.float(), observed.high.float()
    if smooth is not None:
        weight, low_K, high_K = weight * smooth, low_K / smooth, high_K / smooth
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    rounded = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    low, high = min(float(low_K.min()), 0.0), max(float(high_K.max()), 0.0)
    return QuantisedLinear(rounded, scale, low, max(high, low + 1e-6), smooth)


def quantise_weights(
    plan: Plan, weights: Mapping[str, Tensor], observed: Mapping[str, Range]
) -> dict[str, QuantisedLinear]:
    """The 8-bit form of every quantised step, by step name; `weights` and `observed` as float tensors by name."""
    quantised = {}
    for step in quantised_steps(plan):
        rows = slice(*step.options.get("rows", (None, None)))
        quantised[step.name] = quantise_linear(weights[step.weights["weight"]][rows], observed[step.name])
    return quantised


_EVEN = 8.0
"""Channels whose largest values differ by less than this factor from the median are left as they are."""


def _smoothing(weight_NK: Tensor, observed: Range, alpha: float) -> Tensor | None:
    """s_K = max|x_k|^alpha / max|w_k|^(1 - alpha), around 1; None where no channel sticks out."""
    largest = torch.maximum(observed.low.abs(), observed.high.abs()).float()
    if alpha == 0 or largest.max() < _EVEN * largest.median():
        return None
    x, w = largest.clamp(min=1e-5), weight_NK.abs().amax(dim=0).clamp(min=1e-5)
    smooth = x**alpha / w ** (1 - alpha)
    return smooth / smooth.log().mean().exp()
