"""8-bit integers for the large products: weights by output channel, activations by tensor, outliers smoothed.

W8A8 with static ranges: x W^T = sum over K of (x / s) (W s)^T, where s evens out the input channels (SmoothQuant, Xiao
et al., arXiv 2211.10438), W s is rounded to int8 with one scale per output channel, and x / s to uint8 with a zero
point from ranges that calibration observed. How much s evens out is chosen for each linear, by the error to expect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vat_fast.frozen.plan import Plan, Step
from vat_fast.precision import saturates_int8

ALPHAS = (0.0, 0.35, 0.5, 0.65, 0.8)
_EVEN = 4.0
"""Where no channel of x or W is further from the median one than by this factor, nothing is tried."""
_FAR = 4096.0
"""Channels further from the others than this are not followed: dead ones."""
_WORTH_IT = 0.5
"""Dividing by s costs a pass over the input, so it must halve the mean square error."""


@dataclass(frozen=True)
class Range:
    """What one linear's input was over all calibration inputs."""

    low: Tensor
    """Smallest value of each input channel, float32 (K,)."""
    high: Tensor
    """Largest value of each input channel, float32 (K,)."""
    square: Tensor
    """Mean square of each input channel, float32 (K,)."""

    def joined(self, other: Range) -> Range:
        """Over both sets of inputs, of equally many rows."""
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Range(low, high, (self.square + other.square) / 2)


@dataclass(frozen=True)
class QuantisedLinear:
    """y = ((x / smooth) rounded to uint8 in [low, high]) (scale weight)^T."""

    weight: Tensor
    """int8 (N, K), -127 to 127, or -63 to 63 where processors saturate."""
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


def weight_levels() -> int:
    """The largest quantised weight on this CPU: 127, or 63 where 16-bit sums of 8-bit products would overflow."""
    return 63 if saturates_int8() else 127


def quantise_linear(
    weight_NK: Tensor, observed: Range, alphas: Sequence[float] = ALPHAS, levels: int = 127
) -> QuantisedLinear:
    """8-bit form of a linear.

    Args:
        weight_NK: float.
        observed: what its input was.
        alphas: how much of the input's unevenness may move into the weight, from 0 none to 1 all; the best is taken,
            and 0, which costs no time, where the best is hardly better.
        levels: the largest quantised weight.
    """
    weight = weight_NK.float()
    smooth = smoothing(weight, observed, alphas, levels)
    weight, low, high = _smoothed(weight, observed, smooth)
    scale = _scale(weight, levels)
    rounded = (weight / scale[:, None]).round().clamp(-levels, levels).to(torch.int8)
    return QuantisedLinear(rounded, scale, low, high, smooth)


def smoothing(
    weight_NK: Tensor, observed: Range, alphas: Sequence[float] = ALPHAS, levels: int = 127, input_levels: int = 255
) -> Tensor | None:
    """By what to divide a linear's input so that its channels are even, (K,), or None; see `quantise_linear`.

    Args:
        input_levels: between the smallest and the largest number of the input.
    """
    largest_K = torch.maximum(observed.low.abs(), observed.high.abs()).float()
    if largest_K.max() <= _EVEN * largest_K.median() and evening(weight_NK) is None:
        return None
    candidates = [_smoothing(weight_NK, largest_K, alpha) for alpha in alphas if alpha > 0]
    errors = [_expected_error(weight_NK, observed, candidate, levels, input_levels) for candidate in candidates]
    unsmoothed = _expected_error(weight_NK, observed, None, levels, input_levels)
    if errors and (0 not in alphas or min(errors) < _WORTH_IT * unsmoothed):
        return candidates[errors.index(min(errors))]
    return None


def evening(weight_NK: Tensor) -> Tensor | None:
    """By what to divide a linear's input where no samples tell its channels' sizes, (K,), or None.

    A channel whose weights are far from the others' is probably as far the other way: what trained models have, since
    the products matter alike, and what folded norms leave. Half of the distance, s_k = (median / max_n |w_nk|)^(1/2),
    makes neither worse than it was by more than that.
    """
    largest_K = weight_NK.abs().amax(dim=0).float()
    distance_K = (largest_K.median() / largest_K.clamp(min=1e-12)).clamp(1 / _FAR, _FAR)
    if max(distance_K.max(), 1 / distance_K.min()) <= _EVEN:
        return None
    return distance_K.sqrt()


def _smoothed(weight: Tensor, observed: Range, smooth: Tensor | None) -> tuple[Tensor, float, float]:
    """(W s, the range of x / s)."""
    low_K, high_K = observed.low.float(), observed.high.float()
    if smooth is not None:
        weight, low_K, high_K = weight * smooth, low_K / smooth, high_K / smooth
    low, high = min(float(low_K.min()), 0.0), max(float(high_K.max()), 0.0)
    return weight, low, max(high, low + 1e-6)


def _scale(weight: Tensor, levels: int) -> Tensor:
    return torch.linalg.vector_norm(weight, torch.inf, dim=1).clamp(min=1e-12) / levels


def _expected_error(weight_NK: Tensor, observed: Range, smooth: Tensor | None, levels: int, input_levels: int) -> float:
    """Mean square error of y to expect, rounding being uniform noise of variance step^2 / 12 on every input and weight.

    E (y' - y)_n^2 = dx^2 / 12 sum_k (W s)_nk^2 + dw_n^2 / 12 sum_k E x_k^2 / s_k^2; the sum of it over n.
    """
    weight, low, high = _smoothed(weight_NK, observed, smooth)
    square_K = observed.square.float() if smooth is None else observed.square.float() / smooth**2
    from_inputs = ((high - low) / input_levels) ** 2 * torch.linalg.vector_norm(weight) ** 2
    from_weights = torch.linalg.vector_norm(_scale(weight, levels)) ** 2 * square_K.sum()
    return float(from_inputs + from_weights) / 12


def quantise_weights(
    plan: Plan, weights: Mapping[str, Tensor], observed: Mapping[str, Range]
) -> dict[str, QuantisedLinear]:
    """The 8-bit form of every quantised step, by step name; `weights` and `observed` as float tensors by name."""
    quantised, levels = {}, weight_levels()
    for step in quantised_steps(plan):
        rows = slice(*step.options.get("rows", (None, None)))
        weight = weights[step.weights["weight"]][rows]
        quantised[step.name] = quantise_linear(weight, observed[step.name], levels=levels)
    return quantised


def _smoothing(weight_NK: Tensor, largest_K: Tensor, alpha: float) -> Tensor:
    """s_K = max|x_k|^alpha / max|w_k|^(1 - alpha), around 1."""
    x, w = largest_K.clamp(min=1e-5), weight_NK.abs().amax(dim=0).clamp(min=1e-5)
    smooth = x**alpha / w ** (1 - alpha)
    return smooth / smooth.log().mean().exp()
