"""A forward pass as data: named buffers, named weights, and an ordered list of steps.

A plan is in single-assignment form: every element of a buffer is written by one step. So a pass can move, merge and
drop steps by looking at who writes and who reads; where buffers share memory is decided last (`memory`), and streams
and events are decided by `streams`. `checker` proves that both are right.

    build.base_plan(config, ...)  ->  passes  ->  executor

Shapes: B batch, V views, N tokens of one view, T action tokens, E extra tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from vat_fast.config import VATConfig
from vat_fast.frozen.recipes import Recipe

Role = Literal["input", "output", "activation", "constant"]
Stream = Literal["vision", "action"]

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int16": 2, "int8": 1, "fp8": 1, "uint8": 1, "int64": 8}


@dataclass(frozen=True)
class Buffer:
    """A tensor that steps read and write.

    Activations of a stream are (B, tokens, width). `role`: "input" and "output" are the caller's; "constant" holds the
    value of `recipe` from the start and is never written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role = "activation"
    recipe: Recipe | None = None

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Weight:
    """A tensor that is computed once from a model's parameters, by `recipe`.

    kind: "matrix" (the large ones: cast to the plan's dtype or quantised), "vector" (biases and norms), or "table"
    (rows chosen by task id or denoising step).
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["matrix", "vector", "table"]
    recipe: Recipe

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Access:
    """A buffer, or the part of it in a range of tokens (second dimension) and of columns (last dimension)."""

    buffer: str
    tokens: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def overlaps(self, other: Access) -> bool:
        """Whether the two touch an element in common."""

        def meet(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
            return a is None or b is None or (a[0] < b[1] and b[0] < a[1])

        return self.buffer == other.buffer and meet(self.tokens, other.tokens) and meet(self.columns, other.columns)

    def __str__(self) -> str:
        def part(bounds: tuple[int, int] | None) -> str:
            return ":" if bounds is None else f"{bounds[0]}:{bounds[1]}"

        if self.tokens is None and self.columns is None:
            return self.buffer
        return f"{self.buffer}[{part(self.tokens)},{part(self.columns)}]"


@dataclass(frozen=True)
class Step:
    """One operation.

    op: a name of `OPS`. inputs, outputs: role -> what it reads and writes. weights: role -> weight. options: numbers
    and switches of the op. waits: steps of the other stream that must be over before this one begins.
    """

    name: str
    op: str
    inputs: Mapping[str, Access] = field(default_factory=dict)
    outputs: Mapping[str, Access] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    stream: Stream = "vision"
    waits: tuple[str, ...] = ()

    def replace(self, **changes: Any) -> Step:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def option(self, name: str, default: Any = None) -> Any:
        """An option, or `default` where the step does not set it."""
        return self.options.get(name, default)

    @property
    def accesses(self) -> Iterator[tuple[Access, bool]]:
        """(what, whether it is written) for everything the step touches."""
        yield from ((access, False) for access in self.inputs.values())
        yield from ((access, True) for access in self.outputs.values())


OPS: dict[str, str] = {
    "patch_embed": "x = patches(pixels) W + b + position behind prefix tokens; float (B,V,3,H,W) or uint8 (B,V,H,W,3)",
    "norm": "y = (x - mean) / sqrt(var + eps) [* weight + bias]; `group` tokens make one row",
    "linear": "y = residual + scale * act(x W^T + b), W's rows `rows`; with `norm`, x is normalised first; `last` "
    "(rows, column): the columns from `column` on are read of the last `rows` tokens alone",
    "activation": "y = act(x)",
    "residual": "y = x + scale * h",
    "attention": "self-attention within each of `views` views, from packed q | k | v",
    "cross_attention": "action queries on packed k | v: extra tokens first, then vision tokens",
    "film": "y = x * (1 + gamma) + beta, gamma | beta per sample, or from a table by task id",
    "lookup": "y = table[index]",
    "broadcast": "y = weight for every sample [+ a vector per sample]",
    "add": "y = x + weight",
    "reshape": "y = x in another shape and dtype",
    "select": "y = the tokens of each view without its prefix",
    "quantise": "8 bits of x, a scale per token",
    "ddim": "one reverse diffusion step on the sample, by the predicted noise",
}
"""What an executor must know; the roles and options of each are those that `build` writes."""


@dataclass(frozen=True)
class Plan:
    """Buffers, weights and steps of one forward at one batch size.

    steps: run once. loop: with a diffusion head, run `repeats` times afterwards, the denoising step counting down.
    storage: buffer -> byte offset in the one block of memory that activations share; empty until `memory` ran.
    applied: names of the passes behind this plan.
    """

    config: VATConfig
    batch: int
    dtype: str
    steps: tuple[Step, ...]
    buffers: Mapping[str, Buffer]
    weights: Mapping[str, Weight]
    loop: tuple[Step, ...] = ()
    repeats: int = 0
    storage: Mapping[str, int] = field(default_factory=dict)
    applied: tuple[str, ...] = ()

    def replace(self, **changes: Any) -> Plan:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """Every step once, those of the loop last."""
        return self.steps + self.loop

    def rewritten(self, change: Mapping[str, Iterable[Step]]) -> Plan:
        """The plan with each named step replaced by others (by none: dropped); unused buffers and weights go."""

        def steps(old: tuple[Step, ...]) -> tuple[Step, ...]:
            return tuple(new for step in old for new in change.get(step.name, (step,)))

        return self.replace(steps=steps(self.steps), loop=steps(self.loop)).tidied()

    def tidied(self) -> Plan:
        """Without buffers and weights that no step names; inputs and outputs stay."""
        buffers = {access.buffer for step in self.all_steps for access, _ in step.accesses}
        weights = {name for step in self.all_steps for name in step.weights.values()}
        return self.replace(
            buffers={
                name: buffer
                for name, buffer in self.buffers.items()
                if name in buffers or buffer.role in ("input", "output")
            },
            weights={name: weight for name, weight in self.weights.items() if name in weights},
        )

    def writers(self) -> dict[str, list[Step]]:
        """Buffer -> the steps that write it, in order."""
        return self._users(written=True)

    def readers(self) -> dict[str, list[Step]]:
        """Buffer -> the steps that read it, in order."""
        return self._users(written=False)

    def _users(self, written: bool) -> dict[str, list[Step]]:
        found: dict[str, list[Step]] = {}
        for step in self.all_steps:
            for access, writes in step.accesses:
                if writes == written and (access.buffer not in found or found[access.buffer][-1] is not step):
                    found.setdefault(access.buffer, []).append(step)
        return found

    def shape(self, access: Access) -> tuple[int, ...]:
        """The shape of what is accessed."""
        shape = list(self.buffers[access.buffer].shape)
        if access.tokens is not None:
            shape[1] = access.tokens[1] - access.tokens[0]
        if access.columns is not None:
            shape[-1] = access.columns[1] - access.columns[0]
        return tuple(shape)

    @property
    def parameters(self) -> int:
        """Elements of all weights and constants."""
        constants = (prod(b.shape[1:]) for b in self.buffers.values() if b.role == "constant")
        return sum(weight.elements for weight in self.weights.values()) + sum(constants)

    @property
    def memory(self) -> int:
        """Bytes of activations: of the shared block where there is one, else of every buffer."""
        own = [b for b in self.buffers.values() if b.role == "activation"]
        return (
            max((self.storage.get(b.name, 0) + b.bytes for b in own), default=0)
            if self.storage
            else sum(b.bytes for b in own)
        )
