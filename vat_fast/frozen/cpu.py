"""Which executor a CPU gets, and binding plans to it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from vat_fast.config import VATConfig
from vat_fast.frozen import executor_trial
from vat_fast.frozen.calibration import Calibration
from vat_fast.frozen.int8 import QuantisedLinear, quantise_weights
from vat_fast.frozen.plan import Plan
from vat_fast.frozen.target import Executor, Precision, Target
from vat_fast.frozen.weights import Folded
from vat_fast.native import library
from vat_fast.precision import computes_bfloat16_in_onednn, multiplies_bfloat16

if TYPE_CHECKING:
    from vat_fast.model import VAT

_PRECISIONS: dict[str, tuple[str, ...]] = {
    "openvino": ("fp32", "bf16", "int8"),
    "onednn": ("fp32", "bf16"),
    "native": ("fp32", "int16", "int8"),
    "torch": ("fp32", "bf16", "fp16"),
}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Choice:
    """An executor and, in a few words, why it."""

    executor: Executor
    reason: str


def candidates(dtype: str, calibrated: bool = True) -> list[Executor]:
    """The executors that this machine has for a precision, in the order of the memory they need.

    Args:
        dtype: the precision.
        calibrated: whether there are samples for int8, which OpenVINO's ranges come from.
    """
    found: list[Executor] = []
    if dtype in _PRECISIONS["native"] and (has_integers() if dtype != "fp32" else library.why_not() is None):
        found.append("native")
    has_onednn = torch.backends.mkldnn.is_available() and (dtype != "bf16" or computes_bfloat16_in_onednn())
    if dtype in _PRECISIONS["onednn"] and has_onednn:
        found.append("onednn")
    if dtype in _PRECISIONS["openvino"] and find_spec("openvino") is not None and (calibrated or dtype != "int8"):
        found.append("openvino")
    return found


def has_integers() -> bool:
    """Whether the native operators have fast products of integers here: x86 with AVX2 or AVX-512BW."""
    return library.why_not() is None and bool(library.load().vat_integers())


def cpu_executor(dtype: Precision, config: VATConfig, calibrated: bool = True) -> Choice:
    """The fastest executor that this machine has for a precision and a model, by a trial (`executor_trial`).

    PyTorch's operators where nothing else is there: in fp16, and in bf16 without the package openvino on processors
    for which oneDNN has no such products.
    """
    able = candidates(dtype, calibrated)
    if not able:
        # int16 and int8 have their reasons told by `check_precision`, which knows whom they are missing.
        fallback: Executor = "native" if dtype == "int16" else "openvino" if dtype == "int8" else "torch"
        return Choice(fallback, f"nothing else here computes in {dtype}")
    if len(able) == 1:
        return Choice(able[0], f"the only one here for {dtype}")
    if config.width < executor_trial.SMALLEST_WIDTH:
        return Choice(able[0], f"a model {config.width} wide is too small for a trial")
    taken = executor_trial.milliseconds(config, dtype, able)
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in taken.items())
    name = executor_trial.choose(taken)
    return Choice(next(one for one in able if one == name), f"{executor_trial.LAYERS} layers took {times}")


def check_precision(target: Target) -> None:
    """Raise a ValueError if the target's executor, one for CPUs, cannot compute in the target's precision.

    Warns where it can, but slower than in float32.
    """
    able = _PRECISIONS[target.executor]
    if target.dtype not in able:
        hint = ""
        if target.dtype == "int8":
            has_it = [name for name in ("native", "openvino") if name in candidates("int8")]
            hint = "".join(f'; executor="{name}" has it' for name in has_it[:1]) or "; pip install openvino for it"
        raise ValueError(f"the {target.executor} executor has no {target.dtype}, only {', '.join(able)}{hint}")
    if target.executor == "onednn" and target.dtype == "bf16" and not computes_bfloat16_in_onednn():
        raise ValueError(
            "oneDNN has no bf16 products for this processor (they need AVX-512 or AVX-NE-CONVERT): "
            'take dtype="fp32", or executor="openvino", which computes bf16 weights in float32'
        )
    if target.executor == "native" and (missing_library := library.why_not()):
        raise ValueError(f"the native executor cannot run: {missing_library}")
    if target.executor == "native" and target.quantised and not has_integers():
        raise ValueError(
            f"the native executor has {target.dtype} on x86 processors with AVX2 or AVX-512BW alone, which this one "
            'is not: take dtype="fp32"'
        )
    if target.executor == "openvino" and find_spec("openvino") is None:
        raise ValueError('the openvino executor needs the package openvino: pip install openvino, or executor="onednn"')
    if target.dtype == "bf16" and target.executor != "openvino" and not multiplies_bfloat16(_CPU):
        others = 'dtype="int16" is faster; ' if has_integers() else ""
        warnings.warn(
            f"this processor does not multiply bfloat16 itself, so the {target.executor} executor emulates it, several "
            f'times slower than dtype="fp32"; {others}executor="openvino" computes bf16 weights in float32',
            stacklevel=4,
        )


def bind_openvino(
    vat: VAT, plans: Mapping[int, Plan], target: Target, calibration: Calibration | None
) -> dict[int, Any]:
    """An OpenVINO executor per plan; each holds its own packed weights.

    Args:
        vat: whose weights to fold.
        plans: by batch size.
        target: what the plans are made for.
        calibration: samples for the ranges of int8's activations; None in other precisions.
    """
    from vat_fast.frozen.openvino_executor import OpenVINOExecutor

    largest = plans[max(plans)]
    quantised: dict[str, QuantisedLinear] = {}
    folded = Folded(largest, vat.state_dict(), torch.bfloat16 if target.dtype == "bf16" else torch.float32, _CPU)
    observed = calibration.observed(folded) if calibration is not None else None
    weights = dict(folded)
    if observed is not None:
        quantised = quantise_weights(largest, weights, observed)
        in_8_bits = {step.weights["weight"] for step in largest.all_steps if step.name in quantised}
        kept = {step.weights.get("weight") for step in largest.all_steps if step.name not in quantised}
        for name in in_8_bits - kept:
            del weights[name]
    return {B: OpenVINOExecutor(plan, weights, folded.constants(plan), quantised) for B, plan in plans.items()}


def bind_onednn(vat: VAT, plans: Mapping[int, Plan], target: Target) -> dict[int, Any]:
    """A oneDNN executor per plan, over one set of packed weights."""
    from vat_fast.frozen.onednn_executor import OneDNNExecutor, pack

    largest = plans[max(plans)]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[target.dtype]
    folded = Folded(largest, vat.state_dict(), dtype, _CPU)
    packed = pack(largest, folded, largest.batch * largest.config.num_views * largest.config.tokens_per_view)
    weights = folded.but({name for name, _ in packed})
    return {B: OneDNNExecutor(plan, weights, folded.constants(plan), packed) for B, plan in plans.items()}


def bind_native(vat: VAT, plans: Mapping[int, Plan], calibration: Calibration | None) -> dict[int, Any]:
    """A native executor per plan, over one set of packed weights.

    Args:
        vat: whose weights to fold.
        plans: by batch size.
        calibration: samples by which channels are evened out; None: by the weights alone.
    """
    from vat_fast.frozen.native_executor import NativeExecutor, pack

    folded = Folded(plans[max(plans)], vat.state_dict(), torch.float32, _CPU)
    observed = calibration.observed(folded) if calibration is not None else None
    packed = pack(plans[max(plans)], folded, observed)
    weights = folded.but({name for name, _ in packed})
    return {B: NativeExecutor(plan, weights, folded.constants(plan), packed) for B, plan in plans.items()}
