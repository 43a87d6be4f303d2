"""Which executor a CPU gets, and binding plans to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vat_fast.frozen.calibration import observe
from vat_fast.frozen.int8 import QuantisedLinear, quantise_weights
from vat_fast.frozen.plan import Plan
from vat_fast.frozen.target import Executor, Target
from vat_fast.frozen.weights import materialise
from vat_fast.native import library
from vat_fast.precision import computes_bfloat16_in_onednn, multiplies_bfloat16

if TYPE_CHECKING:
    from vat_fast.model import VAT

_PRECISIONS: dict[str, tuple[str, ...]] = {
    "openvino": ("fp32", "bf16", "int8"),
    "onednn": ("fp32", "bf16"),
    "native": ("fp32",),
    "torch": ("fp32", "bf16", "fp16"),
}
_CPU = torch.device("cpu")


def cpu_executor(dtype: str, width: int) -> Executor:
    """The fastest executor that this machine has for a precision and a model width.

    Measured on 2 cores with AVX-512 (one sample, 2 views), times as fast as the eager reference in fp32: vit-tiny fp32
    OpenVINO 1.53, oneDNN 1.31; bf16 2.42, 1.90; so400m fp32 oneDNN 1.43, equal with OpenVINO on 4 of its layers, in a
    third of the memory; bf16 OpenVINO 2.72, oneDNN 2.59 in a third of the memory; int8 OpenVINO alone, 3.16 and 5.07.
    On a processor that does not multiply bfloat16 (one core, vit-tiny: fp32 OpenVINO 47 ms, oneDNN 67) bf16 takes
    oneDNN 212 ms, and OpenVINO, which computes it in float32 there, 48; int8 26.
    Without AVX-512 (AMD Zen 3, vit-tiny) in fp32 native 1.92, OpenVINO 1.60, oneDNN 1.26; int8 1.41.
    Without the package openvino: oneDNN; in fp16, which neither has on CPUs: PyTorch.
    """
    if dtype == "fp32" and torch.backends.cpu.get_cpu_capability() == "AVX2" and library.why_not() is None:
        return "native"
    has_onednn = dtype in _PRECISIONS["onednn"] and torch.backends.mkldnn.is_available()
    has_onednn = has_onednn and (dtype != "bf16" or computes_bfloat16_in_onednn())
    if has_onednn and dtype == "fp32" and width >= _WIDE:
        return "onednn"
    if dtype in _PRECISIONS["openvino"] and find_spec("openvino") is not None:
        return "openvino"
    return "onednn" if has_onednn else "torch"


_WIDE = 1024
"""Between the widths that were measured, 192 and 1152."""


def check_precision(target: Target) -> None:
    """Raise a ValueError if the target's executor, one for CPUs, cannot compute in the target's precision.

    Warns where it can, but slower than in float32.
    """
    able = _PRECISIONS[target.executor]
    if target.dtype not in able:
        hint = ""
        if target.dtype == "int8":
            missing = find_spec("openvino") is None
            hint = "; pip install openvino for int8 on CPUs" if missing else '; executor="openvino" has it'
        raise ValueError(f"the {target.executor} executor has no {target.dtype}, only {', '.join(able)}{hint}")
    if target.executor == "onednn" and target.dtype == "bf16" and not computes_bfloat16_in_onednn():
        raise ValueError(
            "oneDNN has no bf16 products for this processor (they need AVX-512 or AVX-NE-CONVERT): "
            'take dtype="fp32", or executor="openvino", which computes bf16 weights in float32'
        )
    if target.executor == "native" and (missing_library := library.why_not()):
        raise ValueError(f"the native executor cannot run: {missing_library}")
    if target.executor == "openvino" and find_spec("openvino") is None:
        raise ValueError('the openvino executor needs the package openvino: pip install openvino, or executor="onednn"')
    if target.dtype == "bf16" and target.executor != "openvino" and not multiplies_bfloat16(_CPU):
        warnings.warn(
            f"this processor does not multiply bfloat16 itself, so the {target.executor} executor emulates it, several "
            'times slower than dtype="fp32"; executor="openvino" computes bf16 weights in float32',
            stacklevel=4,
        )


def bind_openvino(
    vat: VAT, plans: Mapping[int, Plan], target: Target, wide_plan: Plan, calibration: Iterable[Mapping[str, Tensor]]
) -> dict[int, Any]:
    """An OpenVINO executor per plan; each holds its own packed weights.

    Args:
        vat: whose weights to fold.
        plans: by batch size.
        target: what the plans are made for.
        wide_plan: the plan of one sample in float32, for calibration (read in int8 only).
        calibration: samples for `calibration.observe` (read in int8 only).
    """
    from vat_fast.frozen.openvino_executor import OpenVINOExecutor

    largest, state = plans[max(plans)], vat.state_dict()
    quantised: dict[str, QuantisedLinear] = {}
    dtype = torch.bfloat16 if target.dtype == "bf16" else torch.float32
    weights, _ = materialise(largest, state, dtype, _CPU)
    if target.dtype == "int8":
        constants = materialise(wide_plan.replace(weights={}), state, dtype, _CPU)[1]
        quantised = quantise_weights(largest, weights, observe(wide_plan, weights, constants, calibration))
        in_8_bits = {step.weights["weight"] for step in largest.all_steps if step.name in quantised}
        kept = {step.weights.get("weight") for step in largest.all_steps if step.name not in quantised}
        for name in in_8_bits - kept:
            del weights[name]
    return {
        B: OpenVINOExecutor(plan, weights, materialise(plan.replace(weights={}), state, dtype, _CPU)[1], quantised)
        for B, plan in plans.items()
    }


def bind_onednn(vat: VAT, plans: Mapping[int, Plan], target: Target) -> dict[int, Any]:
    """A oneDNN executor per plan, over one set of packed weights."""
    from vat_fast.frozen.onednn_executor import OneDNNExecutor, pack

    largest, state = plans[max(plans)], vat.state_dict()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[target.dtype]
    weights, _ = materialise(largest, state, dtype, _CPU)
    packed = pack(largest, weights, largest.batch * largest.config.num_views * largest.config.tokens_per_view)
    return {
        B: OneDNNExecutor(plan, weights, materialise(plan.replace(weights={}), state, dtype, _CPU)[1], packed)
        for B, plan in plans.items()
    }


def bind_native(vat: VAT, plans: Mapping[int, Plan], target: Target) -> dict[int, Any]:
    """A native executor per plan, over one set of packed weights."""
    from vat_fast.frozen.native_executor import NativeExecutor, pack

    largest, state = plans[max(plans)], vat.state_dict()
    weights, _ = materialise(largest, state, torch.float32, _CPU)
    packed = pack(largest, weights)
    return {
        B: NativeExecutor(plan, weights, materialise(plan.replace(weights={}), state, torch.float32, _CPU)[1], packed)
        for B, plan in plans.items()
    }
