"""Counts the matrix-product flops that a launch issues, padding and masked tiles included, at production shapes.

The kernel runs in the interpreter with every load answered by zeros and every store dropped, so that only its control
flow and the sizes of its products count. Of large grids some programs run. Along the first two axes programs differ
(tiles, key blocks, splits), along the third (samples) they do not: one of the third for all of the first two, or where
those are many, `SAMPLE` at random (fixed seed).
Needs a process in which Triton was imported with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
from collections.abc import Iterator
from itertools import product

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

MOST, SAMPLE = 1024, 128
# Targets often share block sizes: flops by kernel, grid and every argument that is no tensor.
_known: dict[tuple, float] = {}


def sampled(grid: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """The programs that stand for a grid."""
    if grid[0] * grid[1] <= MOST:
        return [(*tile, 0) for tile in product(range(grid[0]), range(grid[1]))]
    return random.Random(0).sample(list(product(*(range(n) for n in grid))), SAMPLE)


@contextlib.contextmanager
def count_flops() -> Iterator[list[float]]:
    """Within this context launches only count: the list gets the issued flops of each, in launch order."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = (
        "create_masked_load",
        "create_masked_store",
        "create_atomic_rmw",
        "create_atomic_cas",
        "create_dot",
    )
    stock = {name: getattr(builder, name) for name in names}
    stock_call = executor.__call__
    launches: list[float] = []

    def zeros(ptrs):
        kind = ptrs.get_element_ty()
        return interpreter.TensorHandle(np.zeros(ptrs.data.shape, interpreter._get_np_dtype(kind)), kind)

    def dot(self, a, b, d, *rest):
        launches[-1] += 2.0 * d.data.size * a.data.shape[-1]
        return d

    def call(self, *args_dev, **kwargs):
        known = inspect.getfullargspec(self.fn).args
        args, kwargs = self._init_args_hst(args_dev, {k: v for k, v in kwargs.items() if k in known})
        scope = interpreter._patch_lang(self.fn)
        try:
            bound = inspect.getcallargs(self.fn, *args, **kwargs)
            numbers = tuple((k, v) for k, v in bound.items() if v is None or isinstance(v, (int, float, str)))
            bound = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in bound.items()}
            grid = self.grid(bound) if callable(self.grid) else self.grid
            grid = tuple(grid) + (1,) * (3 - len(grid))
            interpreter.interpreter_builder.set_grid_dim(*grid)
            chosen = sampled(grid)
            key = (self.fn.__name__, grid, numbers)
            if key in _known:
                launches.append(_known[key])
                return
            launches.append(0.0)
            for program in chosen:
                interpreter.interpreter_builder.set_grid_idx(*program)
                self.fn(**bound)
            launches[-1] *= math.prod(grid) / len(chosen)
            _known[key] = launches[-1]
        finally:
            scope.restore()

    replacements = {
        "create_masked_load": lambda self, ptrs, mask, *rest, **kwargs: zeros(ptrs),
        "create_masked_store": lambda self, ptrs, value, mask, *rest, **kwargs: None,
        "create_atomic_rmw": lambda self, op, ptr, value, mask, *rest: zeros(ptr),
        "create_atomic_cas": lambda self, ptr, *rest: zeros(ptr),
        "create_dot": dot,
    }
    try:
        for name, replacement in replacements.items():
            setattr(builder, name, replacement)
        executor.__call__ = call
        with np.errstate(all="ignore"), _cheap_reductions():
            yield launches
    finally:
        for name, original in stock.items():
            setattr(builder, name, original)
        executor.__call__ = stock_call


@contextlib.contextmanager
def _cheap_reductions() -> Iterator[None]:
    """erf is the one slow elementwise operation; its value does not matter here."""
    stock = interpreter.InterpreterBuilder.create_erf
    interpreter.InterpreterBuilder.create_erf = lambda self, arg: interpreter.TensorHandle(
        np.zeros_like(arg.data), tl.float32
    )
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_erf = stock
