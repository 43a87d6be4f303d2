"""Whether a frozen policy still acts like the model it came from: the gate that a lossy precision has to pass.

    report = accept(vat, vat.freeze(dtype="int8", calibration=some, record_layers=True), others, statistics)
    print(report)
    if not report.accepted: ...

The samples should be recorded observations, and others than those of the calibration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vat_fast.actions import Statistics
from vat_fast.files import write_text
from vat_fast.frozen.engine import FrozenVAT

if TYPE_CHECKING:
    from vat_fast.model import VAT


class Limits(NamedTuple):
    """What a precision may change."""

    relative: float
    """Largest |frozen - VAT| / |VAT| of all actions, in the 2-norm."""
    cosine: float
    """Smallest cosine between the action tokens of a layer and VAT's."""


LIMITS: dict[str, Limits] = {
    "fp32": Limits(1e-4, 0.99999),
    "fp16": Limits(0.01, 0.9999),
    "bf16": Limits(0.03, 0.999),
    "int16": Limits(0.01, 0.9999),
    "int8": Limits(0.10, 0.99),
    "fp8": Limits(0.10, 0.99),
}
"""By dtype of the frozen policy. bf16 of the plain reference itself is at 0.01 on random weights."""


@dataclass(frozen=True)
class GateReport:
    """Errors of a frozen policy against its VAT."""

    dtype: str
    executor: str
    samples: int
    mean_error: float
    """Mean absolute error of the actions, normalised units."""
    max_error: float
    relative_error: float
    """In the 2-norm over all actions."""
    robot_mean_error: tuple[float, ...] | None
    """Mean absolute error of each action dimension, robot units; None without statistics."""
    robot_max_error: tuple[float, ...] | None
    cosines: tuple[float, ...] | None
    """Of each layer's action tokens, the worst sample; None where the policy does not record layers."""
    limits: Limits

    @property
    def failures(self) -> list[str]:
        """What is over its limit, a sentence each."""
        found = []
        if not self.relative_error <= self.limits.relative:
            found.append(f"the actions differ by {self.relative_error:.3g}, the limit is {self.limits.relative:g}")
        for layer, cosine in enumerate(self.cosines or ()):
            if not cosine >= self.limits.cosine:
                found.append(f"layer {layer}: cosine {cosine:.5f}, the limit is {self.limits.cosine:g}")
        return found

    @property
    def accepted(self) -> bool:
        """Whether every error is within its limit."""
        return not self.failures

    def __str__(self) -> str:
        lines = [
            f"{self.dtype} by {self.executor}, {self.samples} samples: {'accepted' if self.accepted else 'REFUSED'}",
            f"  actions, normalised: mean error {self.mean_error:.3g}, largest {self.max_error:.3g}, "
            f"relative {self.relative_error:.3g} (limit {self.limits.relative:g})",
        ]
        if self.robot_mean_error is not None and self.robot_max_error is not None:
            lines.append("  robot units, mean error: " + " ".join(f"{x:.2g}" for x in self.robot_mean_error))
            lines.append("  robot units, largest:    " + " ".join(f"{x:.2g}" for x in self.robot_max_error))
        if self.cosines is not None:
            lines.append(f"  cosine of the layers: {min(self.cosines):.5f} or more (limit {self.limits.cosine:g})")
        return "\n".join(lines + [f"  {failure}" for failure in self.failures])

    def to_dict(self) -> dict[str, object]:
        """The report for JSON."""
        return {**asdict(self), "limits": self.limits._asdict(), "accepted": self.accepted, "failures": self.failures}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, replacing the file atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")


@torch.inference_mode()
def accept(
    vat: VAT,
    frozen: FrozenVAT,
    samples: Iterable[Mapping[str, Tensor]],
    statistics: Statistics | None = None,
    limits: Limits | None = None,
) -> GateReport:
    """Compare `frozen` with the `vat` it was made from, sample by sample.

    Args:
        vat: in float32, in eval mode.
        frozen: of it; with `record_layers` its layers are compared too.
        samples: mappings with `pixels` (B, V, 3, H, W) and what else a call takes.
        statistics: for errors in robot units.
        limits: None: those of the frozen policy's dtype.

    Raises:
        ValueError: no samples, or a policy that was frozen for raw images.
    """
    if frozen.target.images != "float":
        raise ValueError('the gate compares on normalised pixels: freeze with images="float"')
    layers = frozen.records_layers
    got, expected, cosines = list[Tensor](), list[Tensor](), list[list[float]]()
    for batch in samples:
        for i in range(len(batch["pixels"])):
            one = {name: batch[name][i : i + 1] for name in ("pixels", "task_id", "proprio") if name in batch}
            seeds = [torch.Generator().manual_seed(len(got)) for _ in range(3)]
            details = vat.details(**one, generator=seeds[0])
            expected.append(details.actions.float())
            got.append(frozen(**one, generator=seeds[1]).cpu())
            if layers:
                tokens = zip(frozen.action_tokens(**one, generator=seeds[2]), details.action_tokens, strict=True)
                cosines.append([float(F.cosine_similarity(a.flatten(), b.float().flatten(), 0)) for a, b in tokens])
    if not got:
        raise ValueError("the gate has no samples; give some recorded observations")
    actions, truth = torch.cat(got), torch.cat(expected)
    error = (actions - truth).abs()
    robot = None
    if statistics is not None:
        robot = np.abs(statistics.action.unnormalize(actions) - statistics.action.unnormalize(truth))
        robot = robot.reshape(-1, robot.shape[-1])
    return GateReport(
        dtype=frozen.target.dtype,
        executor=frozen.target.executor,
        samples=len(got),
        mean_error=float(error.mean()),
        max_error=float(error.max()),
        relative_error=float((actions - truth).norm() / truth.norm()),
        robot_mean_error=None if robot is None else tuple(float(x) for x in robot.mean(axis=0)),
        robot_max_error=None if robot is None else tuple(float(x) for x in robot.max(axis=0)),
        cosines=tuple(min(column) for column in zip(*cosines, strict=True)) if layers else None,
        limits=limits or LIMITS[frozen.target.dtype],
    )
