"""Runs a plan on CPUs with the operators compiled for the processor: weights packed once, nothing allocated.

Activations are float32 throughout; products run in float32, or in integers of 16 or 8 bits (`native_integers`).

Products write straight into the plan's buffers, with bias, activation and residual in the same pass; attention reads
the packed projection where it lies. Every call's arguments are addresses that do not change, so they are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vat_fast.frozen.int8 import ALPHAS, Range, evening, smoothing
from vat_fast.frozen.native_integers import BITS, LEVELS, IntegerWeight, pack_integers, words
from vat_fast.frozen.plan import Plan, Step
from vat_fast.frozen.torch_executor import TorchExecutor, matrices, view
from vat_fast.native.calls import Count, Integers, call, native
from vat_fast.native.library import load

Packed = dict[tuple[str, tuple[int, int] | None], Tensor | IntegerWeight]
"""(weight, rows) -> packed weight."""

_ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


def pack(plan: Plan, weights: Mapping[str, Tensor], observed: Mapping[str, Range] | None = None) -> Packed:
    """Every linear's weight in panels.

    Args:
        plan: what is run.
        weights: of the plan, in float32.
        observed: each linear's inputs, by step, so that integers' channels can be evened out.
    """
    packed: Packed = {}
    ranges: dict[tuple[str, tuple[int, int] | None], Range] = {}
    for step in plan.all_steps if observed else ():
        key, own = _key(step), observed[step.name] if observed and step.name in observed else None
        if own is not None:
            ranges[key] = ranges[key].joined(own) if key in ranges else own
    for step in plan.all_steps:
        if step.op in ("linear", "patch_embed") and (key := _key(step)) not in packed:
            name, part = key
            weight, bits = weights[name].flatten(1), BITS.get(step.option("quantised", ""))
            weight = weight if part is None else weight[slice(*part)]
            if bits is None:
                packed[key] = pack_weight(weight)
            else:
                smooth = smoothing(weight, ranges[key], ALPHAS, *LEVELS[bits]) if key in ranges else evening(weight)
                packed[key] = pack_integers(weight, bits, smooth)
    return packed


def _key(step: Step) -> tuple[str, tuple[int, int] | None]:
    return step.weights.get("weight", ""), step.option("rows")


def pack_weight(weight_NK: Tensor) -> Tensor:
    """A linear's weight in the panels that `vat_step_linear` reads; flat."""
    N, K = weight_NK.shape
    packed = weight_NK.new_empty(load().vat_packed_size(native(N), native(K)))
    call("vat_pack", weight_NK.contiguous(), N, K, packed)
    return packed


class NativeExecutor(TorchExecutor):
    """A plan bound to packed weights.

    Args:
        plan: any plan whose activations are float32.
        weights: those of the plan that are not packed.
        constants: values of the plan's constant buffers.
        packed: weights of the linears; shared by the plans of all batch sizes.
    """

    def __init__(
        self, plan: Plan, weights: Mapping[str, Tensor], constants: Mapping[str, Tensor], packed: Packed
    ) -> None:
        self._packed = packed
        super().__init__(plan, weights, constants, torch.device("cpu"))

    def _bind(self, step: Step) -> Callable[[], None]:
        bind = {
            "linear": self._bind_linear,
            "attention": self._bind_attention,
            "cross_attention": self._bind_cross,
            "patch_embed": self._bind_patches,
        }
        return bind[step.op](step) if step.op in bind else super()._bind(step)

    def _tensors(self, step: Step) -> tuple[dict[str, Tensor], Tensor]:
        inputs = {role: view(self.tensors[access.buffer], access) for role, access in step.inputs.items()}
        output = step.outputs["y"]
        return inputs, view(self.tensors[output.buffer], output)

    def _bind_linear(self, step: Step) -> Callable[[], None]:
        x, y = self._tensors(step)
        rows = step.options.get("rows")
        packed, bias = self._packed[step.weights["weight"], rows], self.weights[step.weights["bias"]]
        bias = bias if rows is None else bias[slice(*rows)]
        activation = Count(_ACTIVATIONS[step.options.get("activation")])
        scale = self.weights[step.weights["scale"]] if "scale" in step.weights else None
        residual = x.get("residual")
        eps = float(step.option("norm", -1.0))
        film = self.weights[step.weights["table"]] if "table" in step.weights else None
        tokens = x["x"].shape[1]
        products: list[Callable[[], None]] = []
        first = 0  # of the samples whose rows make the next matrix
        for x_MK, y_MN, *added in matrices(x["x"], y, *([] if residual is None or scale is not None else [residual])):
            (M, K), N = x_MK.shape, y_MN.shape[1]
            ids = None if film is None else Integers(x["task_id"][first:])
            first += M // tokens
            r, r_row = (added[0], added[0].stride(0)) if added else (None, 0)
            inputs = x_MK, x_MK.stride(0), M, K, eps, film, ids, tokens
            outputs = bias, N, activation, r, r_row, y_MN, y_MN.stride(0)
            if isinstance(packed, Tensor):
                normalised = self._scratch("normed", M, K) if eps >= 0 else None
                products.append(_Call("vat_step_linear", *inputs, *outputs, packed, normalised))
            else:
                weight = Count(packed.bits), packed.even, Integers(packed.numbers), packed.scale, packed.sums
                room = self._scratch("numbers", M, words(K, packed.bits), dtype=torch.int32)
                rounded = Integers(room), self._scratch("rows", M, 2)
                products.append(_Call("vat_integer_linear", *inputs, *outputs, *weight, *rounded))

        def run() -> None:
            for product in products:
                product()
            if scale is not None:  # LayerScale that no pass has folded into the weight
                y.mul_(scale)
                if residual is not None:
                    y.add_(residual)

        return products[0] if len(products) == 1 and scale is None else run

    def _bind_patches(self, step: Step) -> Callable[[], None]:
        """The convolution as one product for each image, onto the position embedding."""
        x, y = self._tensors(step)
        prefix = step.options["prefix"]
        rows, patches = self._patches(x["pixels"], step.options["patch"])
        table, bias, packed = (
            self.weights[step.weights["table"]],
            self.weights[step.weights["bias"]],
            self._packed[_key(step)],
        )
        tokens = y.view(len(rows), -1, y.shape[-1])
        products = []
        for x_MK, y_MN in zip(rows.flatten(1, 2).flatten(2), tokens[:, prefix:], strict=True):
            inputs = x_MK, x_MK.stride(0), *x_MK.shape, -1.0, None, None, 1
            outputs = bias, y_MN.shape[1], Count(0), table[prefix:], table.stride(0), y_MN, y_MN.stride(0)
            products.append(_Call("vat_step_linear", *inputs, *outputs, packed, None))

        def run() -> None:
            rows.copy_(patches)
            tokens[:, :prefix] = table[:prefix]
            for product in products:
                product()

        return run

    def _bind_attention(self, step: Step) -> Callable[[], None]:
        x, y = self._tensors(step)
        views = step.options["views"]
        q, k, v = (part.unflatten(1, (views, -1)).flatten(0, 1) for part in x["qkv"].chunk(3, dim=-1))
        return self._attention_call(q, k, v, y.unflatten(1, (views, -1)).flatten(0, 1), step)

    def _bind_cross(self, step: Step) -> Callable[[], None]:
        x, y = self._tensors(step)
        kv = x["kv"]
        if "kv_extra" not in x:
            k, v = kv.chunk(2, dim=-1)
            return self._attention_call(x["q"], k, v, y, step)
        extra = x["kv_extra"]
        both = self._scratch("keys", len(kv), extra.shape[1] + kv.shape[1], kv.shape[2])
        k, v = both.chunk(2, dim=-1)
        attend = self._attention_call(x["q"], k, v, y, step)

        def run() -> None:
            torch.cat([extra, kv], dim=1, out=both)
            attend()

        return run

    def _attention_call(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor, step: Step) -> Callable[[], None]:
        (B, T, D), S, H = q.shape, k.shape[1], step.options["heads"]
        return _Call(
            "vat_attention_forward",
            *(q, *q.stride()[:2], k, v, *k.stride()[:2], B, T, S, H, D // H, float(step.options["scale"])),
            *(y, *y.stride()[:2], None),
        )

    def _normalise(
        self, x: Tensor, eps: float, y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        if x.is_contiguous() and y.is_contiguous():
            call("vat_step_normalise", x, x.numel() // x.shape[-1], x.shape[-1], float(eps), y)
            if weight is not None and bias is not None:
                y.mul_(weight).add_(bias)
        else:
            super()._normalise(x, eps, y, weight, bias)


class _Call:
    """A call with its arguments made once, all but the number of threads."""

    def __init__(self, name: str, *arguments: Any) -> None:
        self._function, self._values = getattr(load(), name), [native(argument) for argument in arguments]
        self._alive = arguments  # addresses alone would not keep tensors

    def __call__(self) -> None:
        self._function(*self._values, torch.get_num_threads())
