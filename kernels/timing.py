"""Timing of a call on the GPU, the same way everywhere: CUDA graph, cold L2, events, median and spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARM_UP = 20
# Overwritten before each sample; larger than any L2 so far.
FLUSH_BYTES = 256 * 1024 * 1024
METHOD = "one CUDA graph replay between two events, L2 overwritten before each; median, 20th and 80th percentile"


@dataclass(frozen=True)
class Timing:
    """Microseconds of one provider over `samples` replays."""

    provider: str
    median_us: float
    p20_us: float
    p80_us: float
    samples: int


def summarise(provider: str, microseconds: Sequence[float]) -> Timing:
    """Median and spread of samples.

    Raises:
        ValueError: fewer than two samples have no spread.
    """
    if len(microseconds) < 2:
        raise ValueError(f"{provider}: {len(microseconds)} sample(s), at least 2 are needed for a spread")
    tenths = statistics.quantiles(microseconds, n=10, method="inclusive")
    return Timing(provider, statistics.median(microseconds), tenths[1], tenths[7], len(microseconds))


def time_graph(provider: str, call: Callable[[], object], samples: int = 100) -> Timing:
    """Time `call`, captured in a CUDA graph, on the current device; it must be capturable."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and allocates before capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_calls(provider, graph.replay, samples)


def time_calls(provider: str, call: Callable[[], object], samples: int = 100) -> Timing:
    """Time `call` as it is, on the current device and stream: what it does on the host counts where the GPU waits."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(WARM_UP):
        call()
    begin, end = ([torch.cuda.Event(enable_timing=True) for _ in range(samples)] for _ in range(2))
    for first, last in zip(begin, end, strict=True):
        flush.zero_()
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return summarise(provider, [1e3 * first.elapsed_time(last) for first, last in zip(begin, end, strict=True)])
