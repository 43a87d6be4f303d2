"""A whole layer of each stream at batch 1, two views: the launch sequences that rollout replays."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vat_fast.kernels import layers
from vat_fast.kernels.attention_forward import SplitWorkspace
from vat_fast.kernels.eight_bit import Quantized, quantize_ref, quantize_weight
from vat_fast.kernels.gemm import RowStats, Workspace
from vat_fast.kernels.layers import LayerWeights, NormLinear, StreamBuffers
from vat_fast.kernels.proof.case import Case, Tensors, random
from vat_fast.kernels.proof.cases.low_precision import FP8, FP8_ARCHS, INT8_ARCHS, ROW_SCALES

EPS = 1e-6
TASKS = 30
# Static buffers of a stream that are tensors of their own.
PLAIN = ("x", "projected", "attended", "lse")
# Those that are 8-bit where the weights are.
EIGHT = ("hidden", "x_eight", "read_eight")


Eight = torch.dtype | None


def _weights(D: int, hidden: int, projected: int, eight: Eight) -> Tensors:
    """Folded weights; in 8 bits with scales, and `exact_*`: what they stand for, read by the reference alone."""
    tensors = {
        "project_weight": random(projected, D, scale=D**-0.5, seed=1),
        "proj_weight": random(D, D, scale=D**-0.5, seed=2),
        "fc1_weight": random(hidden, D, scale=D**-0.5, seed=3),
        "fc2_weight": random(D, hidden, scale=hidden**-0.5, seed=4),
    }
    for seed, name in enumerate(("project", "proj", "fc1", "fc2"), start=5):
        rows = tensors[f"{name}_weight"].shape[0]
        tensors[f"{name}_bias"] = random(rows, dtype=torch.float32, scale=0.2, seed=seed)
    for name in ("project", "fc1", "fc2"):
        if eight is None:
            break
        tensors[f"exact_{name}"] = tensors[f"{name}_weight"]
        values, scale = quantize_weight(tensors[f"{name}_weight"], eight)
        tensors |= {f"{name}_weight": values, f"{name}_scale": scale}
    for name in ("project", "fc1"):
        sums = tensors[f"{name}_weight"].float().sum(1)
        tensors[f"{name}_row_sum"] = sums * tensors.get(f"{name}_scale", torch.ones(1))
    return tensors


def _layer(t: Tensors) -> LayerWeights:
    def normed(name: str) -> NormLinear:
        return NormLinear(t[f"{name}_weight"], t[f"{name}_bias"], t[f"{name}_row_sum"], t.get(f"{name}_scale"))

    return LayerWeights(
        project=normed("project"),
        proj_weight=t["proj_weight"],
        proj_bias=t["proj_bias"],
        fc1=normed("fc1"),
        fc2_weight=t["fc2_weight"],
        fc2_bias=t["fc2_bias"],
        scale1=None,
        scale2=None,
        fc2_scale=t.get("fc2_scale"),
    )


def _sizes(t: Tensors) -> LayerWeights:
    """The weights' shapes alone: buffers made from them have sizes and cost nothing."""
    return _layer({name: value.to("meta") for name, value in t.items()})


def _product(x: Tensor, t: Tensors, name: str) -> Tensor:
    """The linear of that name. In 8 bits eager rounds weight and activations too, one scale per token; the truth, in
    fp64, rounds neither."""
    weight, bias = t.get(f"exact_{name}", t[f"{name}_weight"]), t[f"{name}_bias"].to(x.dtype)
    if f"exact_{name}" in t and x.dtype != torch.float64:
        scale = t[f"{name}_scale"].to(x.dtype)[:, None]
        x = _rounded(x, t[f"{name}_weight"].dtype)
        weight = t[f"{name}_weight"].to(x.dtype) * scale
    return F.linear(x, weight, bias)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return quantize_ref(x.flatten(0, -2), dtype).dequantize(x.dtype).view(x.shape)


def _tensors(buffers: StreamBuffers) -> Tensors:
    tensors = {name: getattr(buffers, name) for name in PLAIN}
    tensors |= {"read_stats": buffers.read_stats.values, "x_stats": buffers.x_stats.values}
    tensors |= {"partials": buffers.split.partials, "counters": buffers.split.counters}
    if buffers.attention_split is not None:
        tensors |= {f"attention_{name}": value for name, value in vars(buffers.attention_split).items()}
    if buffers.read is not buffers.x:
        tensors["read"] = buffers.read
    for name in EIGHT:
        eight = getattr(buffers, name)
        if isinstance(eight, Quantized):
            tensors |= {name: eight.values, f"{name}_scales": eight.scales}
        elif eight is not None:
            tensors[name] = eight
    return tensors


def _with_tensors(buffers: StreamBuffers, t: Tensors) -> StreamBuffers:
    """The same buffers in the tensors that the proof watches."""
    split = None
    if buffers.attention_split is not None:
        split = SplitWorkspace(**{name: t[f"attention_{name}"] for name in vars(buffers.attention_split)})

    def eight(name: str) -> Quantized | None:
        was = getattr(buffers, name)
        return Quantized(t[name], t[f"{name}_scales"], was.group) if isinstance(was, Quantized) else None

    return replace(
        buffers,
        x=t["x"],
        projected=t["projected"],
        attended=t["attended"],
        lse=t["lse"],
        hidden=eight("hidden") or t["hidden"],
        x_eight=eight("x_eight"),
        read_eight=eight("read_eight"),
        read=t.get("read", t["x"]),
        read_stats=RowStats(t["read_stats"], buffers.read_stats.width),
        x_stats=RowStats(t["x_stats"], buffers.x_stats.width),
        split=Workspace(t["partials"], t["counters"]),
        attention_split=split,
    )


def _poison(tensors: Tensors) -> Tensors:
    def poison(value: Tensor) -> Tensor:
        return value.fill_(float("nan")) if value.dtype.is_floating_point else value.fill_(torch.iinfo(value.dtype).min)

    return {name: value if "counters" in name else poison(value) for name, value in tensors.items()}


def _stats_of(x: Tensor) -> Tensor:
    rows = x.flatten(0, -2).float()
    return torch.stack([rows.mean(1), rows.var(1, correction=0) * rows.shape[1]])[:, None]


def _in_8_bits(name: str, x: Tensor, like: Quantized) -> Tensors:
    """x as the launch before left it."""
    eight = quantize_ref(x.flatten(0, -2), like.values.dtype, like.group)
    return {name: eight.values, f"{name}_scales": eight.scales}


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    out = F.scaled_dot_product_attention(_heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads))
    return out.transpose(1, 2).flatten(2)


def _finish(x: Tensor, attended: Tensor, t: Tensors) -> Tensor:
    x = x + _product(attended, t, "proj")
    hidden = F.gelu(_product(F.layer_norm(x, x.shape[-1:], eps=EPS), t, "fc1"))
    return x + _product(hidden, t, "fc2")


def _vision(name: str, views: int, tokens: int, D: int, num_heads: int, hidden: int, eight: Eight = None) -> Case:
    def make(tokens: int, D: int, num_heads: int, hidden: int) -> Tensors:
        weights = _weights(D, hidden, 5 * D, eight)
        allocated = layers.vision_buffers(1, views, tokens, _layer(weights), num_heads, EPS)
        buffers = _poison(_tensors(allocated))
        buffers["x"] = random(views, tokens, D, seed=9, shift=0.1)
        if allocated.read_eight is not None:
            buffers |= _in_8_bits("read_eight", buffers["x"], allocated.read_eight)
        return weights | buffers | {"first_stats": _stats_of(buffers["x"])}

    def launch(t: Tensors) -> None:
        D, num_heads = t["x"].shape[-1], t["lse"].shape[1]
        weights = _layer(t)
        allocated = layers.vision_buffers(1, views, t["x"].shape[1], _sizes(t), num_heads, EPS)
        layers.vision_layer(_with_tensors(allocated, t), weights, RowStats(t["first_stats"], D))

    def reference(t: Tensors) -> Tensors:
        x, num_heads = t["x"], t["lse"].shape[1]
        D = x.shape[-1]
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
        projected = _product(normed, t, "project")
        q, k, v = projected[..., : 3 * D].chunk(3, -1)
        attended = _attend(q, k, v, num_heads)
        return {"x": _finish(x, attended, t), "projected": projected}

    M = views * tokens
    linears = 5 * D * D + D * D + 2 * D * hidden
    weight_bytes = 2 * linears if eight is None else linears + D * D
    return Case(
        op="layers",
        name=name,
        make=lambda: make(tokens, D, num_heads, hidden),
        edge=lambda: make(37, 144, 2, 208),
        launch=launch,
        reference=reference,
        outputs=("x", "projected", "attended", "hidden", "x_stats", "read_stats"),
        useful_flops=2 * M * linears + 4 * M * tokens * D,
        useful_bytes=weight_bytes + 2 * (2 * M * D + 2 * M * D),
        mma=True,
        archs=_archs(eight),
        narrow=ROW_SCALES if eight else "",
    )


def _action(
    name: str, tokens: int, extra: int, keys: int, D: int, num_heads: int, hidden: int, eight: Eight = None
) -> Case:
    def make(tokens: int, keys: int, D: int, num_heads: int, hidden: int) -> Tensors:
        weights = _weights(D, hidden, 3 * D, eight)
        allocated = layers.action_buffers(1, tokens, extra, keys, _layer(weights), num_heads, EPS)
        buffers = _poison(_tensors(allocated))
        buffers["x"] = random(1, tokens + extra, D, seed=9)
        # What start_action leaves: FiLM of x, normalised.
        buffers["read"] = random(1, tokens + extra, D, seed=10)
        if allocated.read_eight is not None:
            buffers |= _in_8_bits("read_eight", buffers["read"], allocated.read_eight)
        return (
            weights
            | buffers
            | {
                "vision": random(1, keys, 5 * D, seed=11),
                "gamma": random(TASKS, D, scale=0.5, seed=12),
                "beta": random(TASKS, D, scale=0.5, seed=13),
                "task_id": torch.tensor([7]),
            }
        )

    def launch(t: Tensors) -> None:
        D, num_heads = t["x"].shape[-1], t["lse"].shape[1]
        weights, keys_values = _layer(t), t["vision"][..., 3 * D :]
        tokens = t["x"].shape[1] - extra
        keys = keys_values.shape[1]
        allocated = layers.action_buffers(1, tokens, extra, keys, _sizes(t), num_heads, EPS)
        film = (t["gamma"], t["beta"], t["task_id"])
        layers.action_layer(_with_tensors(allocated, t), weights, keys_values, *film, first=True)

    def reference(t: Tensors) -> Tensors:
        x, num_heads = t["x"], t["lse"].shape[1]
        D = x.shape[-1]
        q, k_extra, v_extra = _product(t["read"], t, "project").chunk(3, -1)
        k, v = t["vision"][..., 3 * D :].chunk(2, -1)
        if extra:
            k, v = torch.cat([k_extra[:, -extra:], k], 1), torch.cat([v_extra[:, -extra:], v], 1)
        out = _finish(x, _attend(q, k, v, num_heads), t)
        modulated = out * (1 + t["gamma"][t["task_id"]][:, None]) + t["beta"][t["task_id"]][:, None]
        if eight and x.dtype != torch.float64:
            modulated = _rounded(modulated, eight)
        # `read` is read before it is written: launches follow each other. In 8 bits its next value is read_eight alone.
        return {"x": out, "read_eight" if eight else "read": modulated}

    def result(t: Tensors) -> Tensors:
        group = next(n for n in (64, 128) if -(-t["x"].shape[-1] // n) == t["read_eight_scales"].shape[0])
        read = Quantized(t["read_eight"], t["read_eight_scales"], group).dequantize()
        return {"x": t["x"], "read_eight": read.view(t["x"].shape)}

    M = tokens + extra
    linears = 2 * D * D + 2 * D * hidden
    extra_weights = 2 * D * D if extra else 0  # keys and values of the extra tokens
    weight_bytes = 2 * (linears + extra_weights) if eight is None else linears + extra_weights + D * D
    return Case(
        op="layers",
        name=name,
        make=lambda: make(tokens, keys, D, num_heads, hidden),
        edge=lambda: make(14, 41, 144, 2, 208),
        launch=launch,
        reference=reference,
        result=result if eight else None,
        # With extra tokens, nothing reads or writes the others' keys and values in `projected`.
        outputs=(
            *("x", "read_eight" if eight else "read", "attended", "hidden", "x_stats", "read_stats"),
            *(() if extra else ("projected",)),
        ),
        useful_flops=2 * (M * linears + extra * extra_weights) + 4 * M * (keys + extra) * D,
        useful_bytes=weight_bytes + 2 * (2 * keys * D + 3 * M * D),
        mma=True,
        archs=_archs(eight),
        narrow=ROW_SCALES if eight else "",
    )


def _archs(eight: Eight) -> tuple[int | str, ...]:
    return FP8_ARCHS if eight == FP8 else INT8_ARCHS


CASES = [
    _vision("so400m vision V2", 2, 256, 1152, 16, 4304),
    _action("so400m action T56", 56, 0, 512, 1152, 16, 4304),
    _action("so400m action T56 E1", 56, 1, 512, 1152, 16, 4304),
    _vision("so400m vision V2 int8", 2, 256, 1152, 16, 4304, torch.int8),
    _action("so400m action T56 int8", 56, 0, 512, 1152, 16, 4304, torch.int8),
    _vision("so400m vision V2 fp8", 2, 256, 1152, 16, 4304, FP8),
    _action("so400m action T56 fp8", 56, 0, 512, 1152, 16, 4304, FP8),
]
