"""What a kernel proves itself on: one production shape of one op, with everything the instruments need.

Access tracing, the ahead-of-time gate, the PTX runs, the documentation table and the GPU benchmark all iterate over the
cases that `kernels/proof/cases/*.py` list in their `CASES`.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One production shape of one op.

    Args:
        op: name of the op, as in `vat_fast.kernels`.
        name: what is special about this case, unique within the op.
        make: returns the inputs (random, non-zero) and the outputs (NaN-filled) by name, on the CPU. Use `random` and
            `unwritten` below: they cost nothing when only shapes matter.
        launch: runs the real launcher on what `make` or `edge` returned. Must read shapes from the tensors.
        outputs: names of the tensors that `launch` must write completely.
        useful_flops: floating-point operations the maths needs at this shape (matrix products only).
        useful_bytes: bytes that must cross HBM at this shape: every input once, every output once.
        mma: whether tensor cores are expected.
        edge: like `make`, but small: few blocks, the ragged ones of the production shape among them. Traced and run
            block by block.
        reference: the outputs in plain PyTorch from the same dictionary, in the precision of its tensors. Called once
            with the tensors as made (eager error) and once in fp64 (the truth).
        result: what `reference` is compared with, from the tensors after the launch, where outputs are 8-bit codes
            rather than values; None where the outputs themselves are.
        archs: targets that the op is meant for, as compute capability (90) or AMD name ("gfx942").
        few_blocks: the written reason where fewer than two blocks fit on a multiprocessor; empty where two must fit.
        narrow: the written reason where global accesses in a hot loop are narrower than 16 bytes.
        narrow_amd: the same where only AMD's wider waves make them narrower.
        extra_flops: the written reason where issued flops exceed `aot.ISSUED_FLOPS` times the useful ones.
        most_issued: with `extra_flops`, what they may not exceed.
        extra_flops_amd, most_issued_amd: the same on AMD's targets alone.
        for_checking: the case checks results and is not meant to be fast: it need only compile and fit.
    """

    op: str
    name: str
    make: Callable[[], Tensors]
    launch: Callable[[Tensors], object]
    outputs: tuple[str, ...]
    useful_flops: int
    useful_bytes: int
    mma: bool
    edge: Callable[[], Tensors]
    reference: Callable[[Tensors], Tensors] | None = None
    result: Callable[[Tensors], Tensors] | None = None
    archs: tuple[int | str, ...] = (80, 87, 89, 90, 100, 110, "gfx942")
    few_blocks: str = ""
    narrow: str = ""
    narrow_amd: str = ""
    extra_flops: str = ""
    most_issued: float = 0.0
    extra_flops_amd: str = ""
    most_issued_amd: float = 0.0
    for_checking: bool = False

    def results(self, tensors: Tensors) -> Tensors:
        """What to compare with `reference`, from the tensors after the launch."""
        return {name: tensors[name] for name in self.outputs} if self.result is None else self.result(tensors)

    @property
    def key(self) -> str:
        """`op/name`, the row's name in every table."""
        return f"{self.op}/{self.name}"


_shapes_only = False


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within this context `random` and `unwritten` allocate without touching memory: for compiling, not for running."""
    global _shapes_only
    before, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = before


def random(
    *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, shift: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """A CPU tensor of normal numbers times `scale` plus `shift`, the same for the same seed.

    Integer dtypes draw uniformly from their whole range (at most +-2**31) and ignore `scale` and `shift`.
    """
    if _shapes_only:
        return torch.empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        low, high = max(info.min, -(2**31)), min(info.max, 2**31 - 1)
        return torch.randint(low, high + 1, shape, dtype=dtype, generator=generator)
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype)


def unwritten(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A CPU tensor filled with NaN (integers: the smallest value), so that a missed element shows."""
    if _shapes_only:
        return torch.empty(shape, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.full(shape, torch.iinfo(dtype).min, dtype=dtype)
    return torch.full(shape, float("nan"), dtype=torch.float32).to(dtype)


def all_cases(op: str | None = None) -> list[Case]:
    """Every registered case, in the order of the files' names; only those of `op` if given.

    Raises:
        ValueError: two cases share a key, or no case has the op asked for.
    """
    package = importlib.import_module("vat_fast.kernels.proof.cases")
    cases: list[Case] = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        cases += importlib.import_module(f"{package.__name__}.{info.name}").CASES
    keys = [case.key for case in cases]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"two cases are called {twice[0]}: give each case of an op its own name")
    if op is None:
        return cases
    chosen = [case for case in cases if case.op == op]
    if not chosen:
        known = ", ".join(sorted({case.op for case in cases}))
        raise ValueError(f"no case is registered for op {op!r}; registered ops: {known}")
    return chosen
