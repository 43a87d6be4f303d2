"""Whether the compiled operators are faster than PyTorch's on this machine: measured once, kept beside the build."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from vat_fast.files import keep_first
from vat_fast.native import functions, library

_ROWS, _WIDTH, _HIDDEN = 1568, 192, 768
_ROUNDS = 7


@functools.cache
def speed() -> float:
    """How many times as fast as PyTorch a training MLP of vit-tiny is in one thread; 1.0 is equal.

    All processes that use the build see the same answer, that of the first: which operators run must not change from
    one start to the next. Where nothing can be written beside the build, each process measures for itself.

    Raises:
        BuildError: there are no compiled operators.
    """
    path = library.path().with_suffix(".trial.json")
    if not path.exists():
        kept = keep_first(path, json.dumps({"speed": round(_measure(), 3)}) + "\n")
    else:
        kept = path.read_text()
    return float(json.loads(kept)["speed"])


def _measure() -> float:
    # Whatever mode the caller is in, the trial runs on real tensors, in float32, with gradients.
    with unset_fake_temporarily(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        return _compare()


def _compare() -> float:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x, norm, norm_bias = randn(_ROWS, _WIDTH), randn(_WIDTH), randn(_WIDTH)
    fc1, fc2 = (randn(_HIDDEN, _WIDTH), randn(_HIDDEN)), (randn(_WIDTH, _HIDDEN), randn(_WIDTH))
    leaves = [x, norm, norm_bias, *fc1, *fc2]

    def ours() -> Tensor:
        return functions.mlp(x, norm, norm_bias, 1e-6, fc1, fc2)

    def theirs() -> Tensor:
        h = F.layer_norm(x, (_WIDTH,), norm, norm_bias, 1e-6)
        return x + F.linear(F.gelu(F.linear(h, *fc1)), *fc2)

    def seconds(forward: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(forward().sum(), leaves)
        return time.perf_counter() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            ratios = [seconds(theirs) / seconds(ours) for _ in range(2 + _ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    return statistics.median(ratios[2:])
