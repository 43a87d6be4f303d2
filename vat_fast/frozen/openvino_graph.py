"""A plan as an OpenVINO graph: every step becomes the few operators that OpenVINO's CPU plugin fuses best.

    graph = build_graph(plan, plan.steps, weights, constants, results=["actions"])
    compiled = openvino.Core().compile_model(graph, "CPU")

Opset: docs.openvino.ai/latest/documentation/openvino-ir-format/operation-sets.html.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import openvino as ov
import openvino.opset13 as op
import torch
from torch import Tensor

from vat_fast.frozen.int8 import QuantisedLinear
from vat_fast.frozen.plan import Access, Plan, Step

_TYPES = {"fp32": ov.Type.f32, "bf16": ov.Type.f32, "int64": ov.Type.i64, "uint8": ov.Type.u8}


def build_graph(
    plan: Plan,
    steps: Sequence[Step],
    weights: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    results: Iterable[str],
    quantised: Mapping[str, QuantisedLinear] | None = None,
) -> ov.Model:
    """The graph of `steps`: its parameters are the buffers they read and do not write, its results are named buffers.

    Graphs are float32; in which precision they run is said when they are compiled.

    Args:
        plan: whose buffers and weights the steps name.
        steps: all of the plan, or a part of it in its order.
        weights: float32, or bfloat16 to save memory; by name.
        constants: values of the constant buffers.
        results: buffers to return, in this order.
        quantised: 8-bit weights and ranges of the steps that run in int8, by step.
    """
    return _Graph(plan, weights, constants, quantised or {}).build(steps, results)


class _Graph:
    """Keeps the operator that holds each buffer while steps are translated one by one."""

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        quantised: Mapping[str, QuantisedLinear],
    ) -> None:
        self.plan, self.weights, self.constants, self.quantised = plan, weights, constants, quantised
        self.parts: dict[str, list[tuple[int, ov.Output]]] = {}
        self.parameters: list[ov.op.Parameter] = []
        self.splits: dict[str, dict[tuple[int, int], ov.Output]] = {}
        self.cuts: dict[str, set[int]] = {}

    def build(self, steps: Sequence[Step], results: Iterable[str]) -> ov.Model:
        self._find_cuts(steps)
        for step in steps:
            value = getattr(self, f"_{step.op}")(step)
            access = step.outputs["y"]
            value = op.reshape(value, _ints(*self.plan.shape(access)), False).output(0)
            self.parts.setdefault(access.buffer, []).append(((access.tokens or (0, 0))[0], value))
        outputs = []
        for name in results:
            result = op.result(self.whole(name))
            result.get_output_tensor(0).set_names({name})
            outputs.append(result)
        return ov.Model(outputs, self.parameters, "vat")

    # Buffers.

    def whole(self, name: str) -> ov.Output:
        """All of a buffer: what steps wrote, joined along tokens, a constant, or a parameter of the graph."""
        if name not in self.parts:
            buffer = self.plan.buffers[name]
            if buffer.role == "constant":
                value = _constant(self.constants[name].expand(buffer.shape))
            else:
                parameter = op.parameter(list(buffer.shape), _TYPES[buffer.dtype], name)
                parameter.output(0).get_tensor().set_names({name})
                self.parameters.append(parameter)
                value = parameter.output(0)
            self.parts[name] = [(0, value)]
        parts = sorted(self.parts[name], key=lambda part: part[0])
        if len(parts) > 1:
            self.parts[name] = [(0, op.concat([value for _, value in parts], 1).output(0))]
        return self.parts[name][0][1]

    def read(self, access: Access, columns: tuple[int, int] | None = None) -> ov.Output:
        """What is accessed, or columns of it; the columns that anybody reads of a buffer come from one split."""
        low, high = access.columns or (0, self.plan.buffers[access.buffer].shape[-1])
        if columns is not None:
            low, high = low + columns[0], low + columns[1]
        value = self.whole(access.buffer)
        cuts = sorted(self.cuts.get(access.buffer, ()))
        if len(cuts) > 2:
            if access.buffer not in self.splits:
                widths = _ints(*np.diff(cuts))
                outputs = op.variadic_split(value, op.constant(np.int64(-1)), widths).outputs()
                self.splits[access.buffer] = dict(zip(pairwise(cuts), outputs, strict=True))
            value = self.splits[access.buffer][(low, high)]
        if (
            access.tokens is not None
            and self.plan.buffers[access.buffer].shape[1] != access.tokens[1] - access.tokens[0]
        ):
            value = op.slice(value, _ints(access.tokens[0]), _ints(access.tokens[1]), _ints(1), _ints(1)).output(0)
        return value

    def _find_cuts(self, steps: Sequence[Step]) -> None:
        """Where the columns of each buffer are cut: at the borders of queries, keys and values."""
        for step in steps:
            for role, access in step.inputs.items():
                width = self.plan.buffers[access.buffer].shape[-1]
                low, high = access.columns or (0, width)
                pieces = {"qkv": 3, "kv": 2, "kv_extra": 2}.get(role, 1)
                if pieces > 1 or access.columns is not None:
                    borders = {low + (high - low) * i // pieces for i in range(pieces + 1)}
                    self.cuts.setdefault(access.buffer, {0, width}).update(borders)

    def weight(self, step: Step, role: str) -> ov.Output:
        return _constant(self.weights[step.weights[role]])

    # One method per op: step -> y, before it is brought into y's shape.

    def _patch_embed(self, step: Step) -> ov.Output:
        access, o = step.inputs["pixels"], step.options
        pixels = self.read(access)
        V = o["views"]
        if self.plan.buffers[access.buffer].dtype == "uint8":
            _, _, H, W, _ = self.plan.buffers[access.buffer].shape
            pixels = op.reshape(op.convert(pixels, "f32"), _ints(-1, H, W, 3), False)
            pixels = op.transpose(pixels, _ints(0, 3, 1, 2))
        else:
            _, _, _, H, W = self.plan.buffers[access.buffer].shape
            pixels = op.reshape(pixels, _ints(-1, 3, H, W), False)
        x = op.convolution(pixels, self.weight(step, "weight"), [o["patch"]] * 2, [0, 0], [0, 0], [1, 1])
        B, D = self.plan.batch, self.plan.buffers[step.outputs["y"].buffer].shape[-1]
        x = op.transpose(op.reshape(x, _ints(B * V, D, -1), False), _ints(0, 2, 1))
        table, prefix = self.weights[step.weights["table"]].float(), o["prefix"]
        x = op.add(x, _constant(table[prefix:] + self.weights[step.weights["bias"]].float()))
        if prefix:
            x = op.concat([_constant(table[:prefix].expand(B * V, -1, -1)), x], 1)
        return x.output(0)

    def _norm(self, step: Step) -> ov.Output:
        x = self.read(step.inputs["x"])
        if "table" in step.weights or "gamma_beta" in step.inputs:
            x = self._film(step)
        if "group" in step.options:
            B, tokens, width = self.plan.shape(step.inputs["x"])
            group = step.options["group"]
            x = op.reshape(x, _ints(B, tokens // group, group * width), False)
        y = op.mvn(x, _ints(-1), True, step.options["eps"], "inside_sqrt")
        if "weight" in step.weights:
            y = op.add(op.multiply(y, self.weight(step, "weight")), self.weight(step, "bias"))
        return y.output(0)

    def _linear(self, step: Step) -> ov.Output:
        x = self.read(step.inputs["x"])
        rows = slice(*step.options.get("rows", (None, None)))
        bias = self.weights[step.weights["bias"]].float()[rows]
        scale = self.weights[step.weights["scale"]].float() if "scale" in step.weights else None
        if step.name in self.quantised:
            x, weight = self._quantised(x, self.quantised[step.name])
        else:
            weight = _constant(self.weights[step.weights["weight"]][rows])
        y = op.add(op.matmul(x, weight, False, True), _constant(bias))
        if "activation" in step.options:
            y = _activate(y, step.options["activation"])
        elif self.plan.dtype == "fp32" and step.name not in self.quantised:
            # Plain float32 products go to a slower library; one with something to fuse goes to oneDNN.
            y = op.clamp(y, -_HUGE, _HUGE)
        if scale is not None:
            y = op.multiply(y, _constant(scale))
        return (op.add(y, self.read(step.inputs["residual"])) if "residual" in step.inputs else y).output(0)

    def _quantised(self, x: ov.Output, q: QuantisedLinear) -> tuple[ov.Output, ov.Output]:
        """Input and weight in the form that OpenVINO turns into one product of 8-bit integers."""
        if q.smooth is not None:
            x = op.multiply(x, _constant(1 / q.smooth)).output(0)
        low, high = (op.constant(np.float32(value)) for value in (q.low, q.high))
        x = op.fake_quantize(x, low, high, low, high, 256).output(0)
        weight = op.convert(op.constant(q.weight.numpy()), "f32")
        return x, op.multiply(weight, _constant(q.scale[:, None])).output(0)

    def _activation(self, step: Step) -> ov.Output:
        return _activate(self.read(step.inputs["x"]), step.options["kind"]).output(0)

    def _residual(self, step: Step) -> ov.Output:
        h = self.read(step.inputs["h"])
        if "scale" in step.weights:
            h = op.multiply(h, self.weight(step, "scale"))
        return op.add(self.read(step.inputs["x"]), h).output(0)

    def _attention(self, step: Step) -> ov.Output:
        access, heads = step.inputs["qkv"], step.options["heads"]
        B, tokens, width3 = self.plan.shape(access)
        D, N = width3 // 3, tokens // step.options["views"]
        q, k, v = (
            _heads(self.read(access, (i * D, (i + 1) * D)), B * step.options["views"], N, heads, D) for i in range(3)
        )
        return _attend(q, k, v, step.options["scale"])

    def _cross_attention(self, step: Step) -> ov.Output:
        heads = step.options["heads"]
        B, T, D = self.plan.shape(step.inputs["q"])
        keys_values = [step.inputs[role] for role in ("kv_extra", "kv") if role in step.inputs]
        k, v = (
            op.concat([self.read(access, (i * D, (i + 1) * D)) for access in keys_values], 1)
            if len(keys_values) > 1
            else self.read(keys_values[0], (i * D, (i + 1) * D))
            for i in range(2)
        )
        S = sum(self.plan.shape(access)[1] for access in keys_values)
        q = _heads(self.read(step.inputs["q"]), B, T, heads, D)
        return _attend(q, _heads(k, B, S, heads, D), _heads(v, B, S, heads, D), step.options["scale"])

    def _film(self, step: Step) -> ov.Output:
        x = self.read(step.inputs["x"])
        width = self.plan.shape(step.inputs["x"])[-1]
        if "table" in step.weights:
            both = self._rows(self.weights[step.weights["table"]], step.inputs["task_id"])
        else:
            both = self.read(step.inputs["gamma_beta"])
        both = op.reshape(both, _ints(self.plan.batch, 1, 2 * width), False)
        gamma, beta = op.split(both, op.constant(np.int64(-1)), 2).outputs()
        gamma = op.add(gamma, op.constant(np.float32(1)))
        return op.add(op.multiply(x, gamma), beta).output(0)

    def _lookup(self, step: Step) -> ov.Output:
        return self._rows(self.weights[step.weights["table"]], step.inputs["index"])

    def _rows(self, table: Tensor, index: Access) -> ov.Output:
        return op.gather(_constant(table), self.read(index), op.constant(np.int64(0))).output(0)

    def _broadcast(self, step: Step) -> ov.Output:
        tokens = self.weight(step, "weight")
        if "vector" not in step.inputs:
            return op.broadcast(tokens, _ints(*self.plan.shape(step.outputs["y"]))).output(0)
        vector = op.unsqueeze(self.read(step.inputs["vector"]), _ints(1))
        return op.add(vector, tokens).output(0)

    def _add(self, step: Step) -> ov.Output:
        return op.add(self.read(step.inputs["x"]), self.weight(step, "weight")).output(0)

    def _reshape(self, step: Step) -> ov.Output:
        return self.read(step.inputs["x"])

    def _select(self, step: Step) -> ov.Output:
        B, tokens, width = self.plan.shape(step.inputs["x"])
        V, prefix = step.options["views"], step.options["prefix"]
        x = op.reshape(self.read(step.inputs["x"]), _ints(B, V, tokens // V, width), False)
        return op.slice(x, _ints(prefix), _ints(tokens // V), _ints(1), _ints(2)).output(0)


_HUGE = 3.0e38
"""Just inside float32: clamping to it changes no number that a network computes."""


def _ints(*values: int) -> ov.Output:
    return op.constant(np.array(values, dtype=np.int64)).output(0)


def _constant(x: Tensor) -> ov.Output:
    """A float32 constant; bfloat16 values are kept in 16 bits and widened inside the graph."""
    x = x.detach().contiguous()
    if x.dtype == torch.bfloat16:
        bits = ov.Tensor(ov.Type.bf16, ov.Shape(list(x.shape)))  # its own memory: a view would outlive x
        bits.data.view(np.int16)[...] = x.view(torch.int16).numpy()
        return op.convert(op.constant(bits), "f32").output(0)
    return op.constant(x.float().numpy()).output(0)


def _heads(x: ov.Output, batch: int, tokens: int, heads: int, width: int) -> ov.Output:
    """(..., D) -> (batch, heads, tokens, D / heads)."""
    x = op.reshape(x, _ints(batch, tokens, heads, width // heads), False)
    return op.transpose(x, _ints(0, 2, 1, 3)).output(0)


def _attend(q: ov.Output, k: ov.Output, v: ov.Output, scale: float) -> ov.Output:
    """softmax(scale q k^T) v, back in the order of tokens; OpenVINO compiles it to one kernel."""
    scores = op.multiply(op.matmul(q, k, False, True), op.constant(np.float32(scale)))
    return op.transpose(op.matmul(op.softmax(scores, -1), v, False, False), _ints(0, 2, 1, 3)).output(0)


_ACTIVATIONS: dict[str, Callable[[ov.Output], ov.Node]] = {
    "relu": op.relu,
    "gelu": lambda x: op.gelu(x, "erf"),
    "gelu_tanh": lambda x: op.gelu(x, "tanh"),
}


def _activate(x: ov.Output, kind: str) -> ov.Node:
    return _ACTIVATIONS[kind](x)
