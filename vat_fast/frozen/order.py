"""Which steps of a plan are certainly over before another begins, whatever the speed of the streams."""

from __future__ import annotations

from collections.abc import Sequence

from vat_fast.frozen.plan import Step


class HappensBefore:
    """The order that streams and waits guarantee, by vector clocks.

    A step comes after every earlier step of its stream and after each step it waits for, and after all that those come
    after. Whole-plan inputs are there before, and the caller reads outputs after all streams have joined.

    Raises:
        ValueError: a step waits for one that is not in the list before it, which could never be certain.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._clock: dict[str, dict[str, int]] = {}
        """step -> stream -> how many steps of that stream are certainly over when it ends"""
        self._index: dict[str, tuple[str, int]] = {}
        latest: dict[str, dict[str, int]] = {}
        counts: dict[str, int] = {}
        for step in steps:
            clock = dict(latest.get(step.stream, {}))
            for name in step.waits:
                if name not in self._clock:
                    raise ValueError(f"step {step.name!r} waits for {name!r}, which is not among the steps before it")
                for stream, count in self._clock[name].items():
                    clock[stream] = max(clock.get(stream, 0), count)
            counts[step.stream] = counts.get(step.stream, 0) + 1
            clock[step.stream] = counts[step.stream]
            self._index[step.name] = (step.stream, counts[step.stream])
            self._clock[step.name] = latest[step.stream] = clock

    def __call__(self, first: str, second: str) -> bool:
        """Whether `first` is certainly over when `second` begins."""
        if first == second:
            return False
        stream, index = self._index[first]
        own, own_index = self._index[second]
        if own == stream:
            return index < own_index
        return self._clock[second].get(stream, 0) >= index
