"""The exponential moving average of the weights, in float32, shared out over the ranks.

Where every rank holds the whole model (ZeRO 0 to 2), rank r averages every world-size-th parameter. With ZeRO-3 each
rank averages its own shard of every parameter. Either way an update communicates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, for every parameter that trains.

    In the first steps the decay is lower, min(decay, (1 + n) / (10 + n)) at update n, so that the starting weights
    are soon forgotten (the rule of TensorFlow's ExponentialMovingAverage with `num_updates`).

    Args:
        model: inside its engine already, since ZeRO-3 shards it there; its names are the average's.
        decay: 0.999 for example.
        rank, world_size: of this process.
    """

    def __init__(self, model: nn.Module, decay: float, rank: int = 0, world_size: int = 1) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay must be above 0 and below 1, got {decay}")
        self.decay, self.updates = decay, 0
        self._rank, self._world = rank, world_size
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {
            name: _local(self._parameters[name]).detach().to(torch.float32, copy=True) for name in self._mine()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages = list(self._average.values())
        weights = [_local(self._parameters[name]).detach() for name in self._average]
        wide = [w.float() if w.dtype != torch.float32 else w for w in weights]
        torch._foreach_lerp_(averages, wide, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights, on every rank; afterwards its own again, bit for bit.

        Call it on all ranks together. Only forwards, validation and export belong inside, no optimiser step.
        """
        own = {name: _local(p).detach().clone() for name, p in self._parameters.items()}
        try:
            for index, (name, parameter) in enumerate(self._parameters.items()):
                local = _local(parameter)
                if name in self._average:
                    local.data.copy_(self._average[name])
                if self._world > 1 and not _is_sharded(parameter):
                    dist.broadcast(local.data, src=index % self._world)
                _forget_gathered(parameter)
            yield
        finally:
            for name, parameter in self._parameters.items():
                _local(parameter).data.copy_(own[name])
                _forget_gathered(parameter)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part, float32, by parameter name, and `updates`, an int64 scalar."""
        return {**self._average, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved part: this rank's own, or for another number of ranks all parts in one mapping.

        Raises:
            ValueError: a parameter is missing or has another shape, as after a change from or to ZeRO-3.
        """
        for name, average in self._average.items():
            saved = state.get(name)
            if saved is None or saved.shape != average.shape:
                given = "nothing" if saved is None else tuple(saved.shape)
                raise ValueError(
                    f"the saved moving average of {name} should be {tuple(average.shape)}, got {given}: resume with "
                    "the same number of ranks and kind of sharding, or turn train.ema off"
                )
        for name, average in self._average.items():
            average.copy_(state[name])
        self.updates = int(state["updates"])

    def _mine(self) -> list[str]:
        """Names of which this rank keeps something."""
        return [
            name
            for index, (name, p) in enumerate(self._parameters.items())
            if _is_sharded(p) or index % self._world == self._rank
        ]


def _is_sharded(parameter: Any) -> bool:
    """ZeRO-3 keeps this rank's shard in `ds_tensor` and empties the parameter itself."""
    return hasattr(parameter, "ds_tensor")


def _local(parameter: Any) -> Tensor:
    """What this rank holds of a parameter."""
    local: Tensor = parameter.ds_tensor if _is_sharded(parameter) else parameter
    return local


def _forget_gathered(parameter: Any) -> None:
    """ZeRO-3 keeps small parameters gathered; after a change of the shards they must be gathered anew."""
    if _is_sharded(parameter) and parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
