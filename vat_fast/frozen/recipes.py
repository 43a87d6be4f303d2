"""How frozen weights follow from a model's parameters: exact algebra, written down first and computed later.

A recipe is an expression over parameter names. Passes compose recipes without touching a weight, so a plan can be made,
printed and checked for a model that was never loaded; `evaluate` computes one when the policy is frozen, in float64, or
in float32 where that is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vat_fast.heads import timestep_embedding


@dataclass(frozen=True)
class Recipe:
    """`op` applied to `args`: recipes, names and numbers."""

    op: str
    args: tuple[Any, ...] = ()

    def parameters(self) -> set[str]:
        """Names of the parameters it reads."""
        if self.op == "parameter":
            return {self.args[0]}
        inner = (arg for arg in self.args if isinstance(arg, Recipe))
        return set().union(*(recipe.parameters() for recipe in inner))


def parameter(name: str) -> Recipe:
    """The parameter `name` of the model."""
    return Recipe("parameter", (name,))


def evaluate(recipe: Recipe, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """The value, computed in `dtype`, or as the parameter is where the recipe is nothing but a parameter.

    Raises:
        KeyError: the model holds no parameter of that name.
    """
    if recipe.op == "parameter":
        (name,) = recipe.args
        if name not in state:
            raise KeyError(name)
        return state[name]
    args = [evaluate(arg, state, dtype).to(dtype) if isinstance(arg, Recipe) else arg for arg in recipe.args]
    return _OPERATIONS[recipe.op](*args)


_MOVES, _MULTIPLIES = ("parameter", "rows", "stack"), ("norm_into_weight", "scale_rows")


def rounds_once(recipe: Recipe) -> bool:
    """Whether every number of the value is a parameter's, or the product of two: rounded the same in float32 as in
    float64 and then to float32, since the product of two float32 numbers is exact in float64."""
    return _multiplications(recipe) <= 1


def _multiplications(recipe: Recipe) -> float:
    """How many follow each other at most; infinite with other arithmetic."""
    if recipe.op not in _MOVES + _MULTIPLIES:
        return float("inf")
    inner = (_multiplications(arg) for arg in recipe.args if isinstance(arg, Recipe))
    return max(inner, default=0) + (recipe.op in _MULTIPLIES)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {}


def _operation(function: Callable[..., Tensor]) -> Callable[..., Recipe]:
    """Register a computation; what it leaves under its name builds the recipe."""
    name = function.__name__
    _OPERATIONS[name] = function

    def build(*args: Any) -> Recipe:
        return Recipe(name, args)

    build.__doc__, build.__name__ = function.__doc__, name
    return build


@_operation
def rows(x: Tensor, begin: int, end: int) -> Tensor:
    """x[begin:end]."""
    return x[begin:end]


@_operation
def stack(*parts: Tensor) -> Tensor:
    """The parts, one below the other."""
    return torch.cat(parts)


@_operation
def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y."""
    return x + y


@_operation
def token_rows(x: Tensor) -> Tensor:
    """(1, T, D) -> (T, D)."""
    return x.flatten(0, 1)


@_operation
def action_position(step_CD: Tensor, dim_KD: Tensor) -> Tensor:
    """Factored position of action token c * K + k: step[c] + dim[k], (T, D)."""
    return (step_CD[:, None] + dim_KD[None]).flatten(0, 1)


@_operation
def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """Row i (or element i) times scale[i]: a LayerScale behind a linear, in its weight and bias."""
    return x * (scale[:, None] if x.ndim > 1 else scale)


@_operation
def norm_into_weight(weight: Tensor, norm_weight: Tensor) -> Tensor:
    """W diag(w): W (w * n + c) + b = (W diag(w)) n + (W c + b)."""
    return weight * norm_weight


@_operation
def norm_into_bias(weight: Tensor, norm_bias: Tensor, bias: Tensor) -> Tensor:
    """W c + b."""
    return weight @ norm_bias + bias


@_operation
def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b."""
    return F.linear(x, weight, bias)


@_operation
def gelu(x: Tensor) -> Tensor:
    """Exact GELU."""
    return F.gelu(x)


@_operation
def normalise(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without its affine part."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


@_operation
def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x * w + b: the affine part of a LayerNorm."""
    return x * weight + bias


@_operation
def modulate(x: Tensor, gamma_beta: Tensor) -> Tensor:
    """FiLM for every task: tokens (T, D) or (tasks, T, D), table (tasks, 2D) -> (tasks, T, D)."""
    gamma, beta = gamma_beta[:, None].chunk(2, dim=-1)
    return x * (1 + gamma) + beta


@_operation
def each_plus(x_TD: Tensor, vector_KD: Tensor) -> Tensor:
    """x + vector for every row of the vectors: (K, T, D)."""
    return x_TD + vector_KD[:, None]


@_operation
def timesteps(count: int, width: int) -> Tensor:
    """Sinusoidal embedding of denoising steps 0 .. count - 1."""
    return timestep_embedding(torch.arange(count), width).double()


@_operation
def position_table(position_PD: Tensor, *prefix: Tensor) -> Tensor:
    """Prefix tokens, then patch positions: what patch embedding adds to each token of a view, (N, D)."""
    return torch.cat([*(p.flatten(0, 1) for p in prefix), position_PD.flatten(0, 1)])


@_operation
def pixels_into_weight(weight_D3PP: Tensor, std: tuple[float, ...]) -> Tensor:
    """Patch weight for raw bytes: W / (255 std) per channel."""
    return weight_D3PP / (255 * torch.tensor(std, dtype=weight_D3PP.dtype))[:, None, None]


@_operation
def pixels_into_bias(weight_D3PP: Tensor, bias_D: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Patch bias for raw bytes: b - sum W mean / std."""
    shift = torch.tensor(mean, dtype=weight_D3PP.dtype) / torch.tensor(std, dtype=weight_D3PP.dtype)
    return bias_D - torch.einsum("dcij,c->d", weight_D3PP, shift)
