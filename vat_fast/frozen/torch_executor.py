"""Runs a plan with PyTorch's operators over static buffers, on any device: the plain executor, and the yardstick.

Every form of every step runs here, so a plan with any passes switched off can be run and compared. Steps write into
their buffers (`out=`). In float32 on CPUs a step allocates nothing; what does, because PyTorch has no form of it that
writes into a given tensor (`tests/frozen/test_allocations.py` counts them):

- 16-bit norms and attention, and float32 ones on other devices: `layer_norm`, `scaled_dot_product_attention`;
- 16-bit matrix products: oneDNN's own scratch, a weight in its layout;
- a diffusion head's denoising formula, on a few dozen numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vat_fast.frozen.plan import Access, Plan, Step
from vat_fast.heads import DDIM

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def allocate(
    plan: Plan, constants: Mapping[str, Tensor], device: torch.device, but: Collection[str] = ()
) -> dict[str, Tensor]:
    """A tensor for every buffer but those named; activations are views of one block where the plan places them."""
    block = torch.empty(plan.memory if plan.storage else 0, dtype=torch.uint8, device=device)
    tensors = {}
    for name, buffer in plan.buffers.items():
        if name in but:
            continue
        dtype = DTYPES[buffer.dtype]
        if buffer.role == "constant":
            tensors[name] = constants[name].to(device, dtype).expand(buffer.shape).contiguous()
        elif name in plan.storage:
            begin = plan.storage[name]
            tensors[name] = block[begin : begin + buffer.bytes].view(dtype).view(buffer.shape)
        else:
            tensors[name] = torch.zeros(buffer.shape, dtype=dtype, device=device)
    return tensors


def view(tensor: Tensor, access: Access) -> Tensor:
    """The part of a buffer's tensor that is accessed."""
    if access.tokens is not None:
        tensor = tensor[:, access.tokens[0] : access.tokens[1]]
    if access.columns is not None:
        tensor = tensor[..., access.columns[0] : access.columns[1]]
    return tensor


class TorchExecutor:
    """A plan bound to tensors.

    Args:
        plan: any plan without 8-bit steps.
        weights: of the plan, in its dtype, on `device`.
        constants: values of the plan's constant buffers.
        moving: buffers without a tensor of their own; the steps that write them bring one.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        device: torch.device,
        moving: Collection[str] = (),
    ) -> None:
        self.plan, self.device = plan, device
        self.weights = weights
        self.tensors = allocate(plan, constants, device, moving)
        # Forms of norm and attention that allocate nothing: as fast in float32 on CPUs, slower elsewhere.
        self._in_parts = device.type == "cpu" and plan.dtype == "fp32"
        self._kept: dict[tuple[object, ...], Tensor] = {}
        self._steps = [self._bind(step) for step in plan.steps]
        self._loop = [self._bind(step) for step in plan.loop]
        self._round = 0
        if plan.loop:
            self._sampler = DDIM(plan.repeats)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Actions (B, C, A) for the plan's inputs; the tensor is overwritten by the next run."""
        for name, value in inputs.items():
            self.tensors[name].copy_(value.view(self.tensors[name].shape))
        for step in self._steps:
            step()
        for t in reversed(range(self.plan.repeats)):
            self._round = t  # also on the host: its coefficients are numbers there
            self.tensors["timestep"].fill_(t)
            for step in self._loop:
                step()
            self.tensors["sample"].copy_(self.tensors["actions"])
        return self.tensors["actions"]

    def output(self, name: str) -> Tensor:
        """What the last run left in the plan's output `name`."""
        return self.tensors[name]

    def _bind(self, step: Step) -> Callable[[], None]:
        """The step as a call without arguments."""
        inputs = {role: view(self.tensors[access.buffer], access) for role, access in step.inputs.items()}
        outputs = {role: view(self.tensors[access.buffer], access) for role, access in step.outputs.items()}
        weights = {role: self.weights[name] for role, name in step.weights.items()}
        compute, y = getattr(self, f"_{step.op}"), outputs["y"]

        def run() -> None:
            compute(step, inputs, weights, y)
            if "film" in outputs:
                self._modulate(y, weights["film"], inputs["task_id"], outputs["film"])

        return run

    # Memory beside the buffers, alive as long as the executor and shared by steps: each forgets it at its end.

    def _scratch(self, what: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Contiguous memory for `what`, in the plan's dtype or another."""
        key = (what, shape, dtype)
        if key not in self._kept:
            self._kept[key] = torch.empty(shape, dtype=dtype or DTYPES[self.plan.dtype], device=self.device)
        return self._kept[key]

    def _number(self, value: float) -> Tensor:
        """A number as a tensor: PyTorch makes one in every call that is given a Python number."""
        key = ("number", value)
        if key not in self._kept:
            self._kept[key] = torch.tensor(value, dtype=DTYPES[self.plan.dtype], device=self.device)
        return self._kept[key]

    # One method per op: (step, inputs, weights, y), which writes y.

    def _patch_embed(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        """The convolution as one product with rows of pixels."""
        prefix = step.options["prefix"]
        rows, patches = self._patches(x["pixels"], step.options["patch"])
        rows.copy_(patches)
        images, high, wide = rows.shape[:3]
        tokens = _as(y, (images, prefix + high * wide, y.shape[-1]))
        tokens[:, :prefix] = w["table"][:prefix]
        _multiply(rows.view(images, high * wide, -1), w["weight"].flatten(1), w["bias"], tokens[:, prefix:])
        tokens[:, prefix:].add_(w["table"][prefix:])

    def _patches(self, pixels: Tensor, P: int) -> tuple[Tensor, Tensor]:
        """(room for the patches of all images as rows, the patches): (images, high, wide, 3, P, P) both."""
        pixels = pixels.flatten(0, 1)
        if pixels.dtype == torch.uint8:
            pixels = pixels.permute(0, 3, 1, 2)
        high, wide = (size // P for size in pixels.shape[2:])
        patches = pixels[:, :, : high * P, : wide * P].unflatten(3, (wide, P)).unflatten(2, (high, P))
        rows = self._scratch("patches", len(pixels), high, wide, 3, P, P)
        return rows, patches.permute(0, 2, 4, 1, 3, 5)

    def _norm(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        h = x["x"]
        if "table" in w or "gamma_beta" in x:
            h = self._scratch("modulated", *h.shape)
            self._film(step, x, w, h)
        if "group" in step.options:
            h = h.unflatten(1, (-1, step.options["group"])).flatten(2)
        self._normalise(h, step.options["eps"], _as(y, h.shape), w.get("weight"), w.get("bias"))

    def _normalise(
        self, x: Tensor, eps: float, y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        """y = (x - mean) / sqrt(variance + eps) of each row [* weight + bias]."""
        if not self._in_parts:
            y.copy_(F.layer_norm(x, x.shape[-1:], weight, bias, eps))
            return
        one, two = (self._scratch(what, *x.shape[:-1], 1) for what in ("row means", "row deviations"))
        share = self._number(1 / x.shape[-1])  # `mean` itself would make a tensor of the count
        torch.sum(x, -1, keepdim=True, out=one)
        torch.sub(x, one.mul_(share), out=y)
        torch.linalg.vector_norm(y, dim=-1, keepdim=True, out=two)
        y.mul_(two.mul_(two).mul_(share).add_(self._number(eps)).rsqrt_())
        if weight is not None and bias is not None:
            y.mul_(weight).add_(bias)

    def _linear(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        h, weight, bias = x["x"], w["weight"], w["bias"]
        if "norm" in step.options:
            normed = self._scratch("normed", *h.shape)
            if "table" in w:
                modulated = self._scratch("modulated", *h.shape)
                self._modulate(h, w["table"], x["task_id"], modulated)
                h = modulated
            self._normalise(h, step.options["norm"], normed)
            h = normed
        if "rows" in step.options:
            rows = slice(*step.options["rows"])
            weight, bias = weight[rows], bias[rows]
        _multiply(h, weight, bias, y)
        if "activation" in step.options:
            _activate(y, step.options["activation"], y)
        if "scale" in w:
            y.mul_(w["scale"])
        if "residual" in x:
            y.add_(x["residual"])

    def _activation(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        _activate(x["x"], step.options["kind"], y)

    def _residual(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        if "scale" in w:
            torch.mul(x["h"], w["scale"], out=y)
            y.add_(x["x"])
        else:
            torch.add(x["x"], x["h"], out=y)

    def _attention(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        o = step.options
        qkv = x["qkv"].unflatten(1, (o["views"], -1)).unflatten(-1, (3, o["heads"], -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
        out = y.unflatten(1, (o["views"], -1)).unflatten(-1, (o["heads"], -1)).flatten(0, 1).transpose(1, 2)
        self._attend(q, k, v, o["scale"], out)

    def _cross_attention(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        heads, kv = step.options["heads"], x["kv"]
        q = x["q"].unflatten(-1, (heads, -1)).transpose(1, 2)
        if "kv_extra" in x:
            extra = x["kv_extra"]
            both = self._scratch("keys", len(kv), extra.shape[1] + kv.shape[1], kv.shape[2])
            kv = torch.cat([extra, kv], dim=1, out=both)
        k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        self._attend(q, k, v, step.options["scale"], y.unflatten(-1, (heads, -1)).transpose(1, 2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, y: Tensor) -> None:
        """softmax(scale q k^T) v: (groups, heads, queries, width) from as many heads of keys and values."""
        if not self._in_parts:
            y.copy_(F.scaled_dot_product_attention(q, k, v, scale=scale))
            return
        scores = self._scratch("scores", *q.shape[1:3], k.shape[2])
        for one in range(len(q)):
            torch.baddbmm(scores, q[one], k[one].transpose(1, 2), beta=0, alpha=scale, out=scores)
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, v[one], out=y[one])

    def _film(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        if "table" in w:
            self._modulate(x["x"], w["table"], x["task_id"], y)
        else:
            self._modulate(x["x"], x["gamma_beta"], None, y)

    def _modulate(self, x: Tensor, gamma_beta: Tensor, index: Tensor | None, y: Tensor) -> None:
        """y = x (1 + gamma) + beta; gamma | beta per sample, or rows of a table."""
        rows = self._scratch("gamma and beta", len(x), gamma_beta.shape[-1])
        if index is None:
            rows.copy_(gamma_beta)
        else:
            torch.index_select(gamma_beta, 0, index, out=rows)
        gamma, beta = rows[:, None].chunk(2, dim=-1)
        torch.addcmul(beta, x, gamma.add_(self._number(1.0)), out=y)

    def _lookup(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        table, index = w["table"], x["index"]
        rows = self._scratch("table rows", len(index), *table.shape[1:])
        y.copy_(torch.index_select(table, 0, index, out=rows).view(y.shape))

    def _broadcast(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        y.copy_(w["weight"].expand(self.plan.batch, -1, -1))
        if "vector" in x:
            y.add_(x["vector"][:, None])

    def _add(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        torch.add(x["x"], w["weight"], out=y)

    def _reshape(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        _as(y, x["x"].shape).copy_(x["x"])

    def _select(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        tokens = x["x"].unflatten(1, (step.options["views"], -1))[:, :, step.options["prefix"] :]
        _as(y, tokens.shape).copy_(tokens)

    def _ddim(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        y.copy_(self._sampler.step(x["noise"].float(), self._round, x["sample"]))


def _as(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """x seen in another shape, without a copy."""
    return x if x.shape == shape else x.view(shape)


def _multiply(x: Tensor, weight_NK: Tensor, bias_N: Tensor, y: Tensor) -> None:
    """y (..., N) = x (..., K) W^T + b, one product where rows are evenly spaced, else one per sample."""
    for x_MK, y_MN in matrices(x, y):
        torch.addmm(bias_N, x_MK, weight_NK.t(), out=y_MN)


def matrices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (B, tokens, width) or alike as matrices: one each where rows are evenly spaced, else one per sample."""
    if all(x.ndim == 2 for x in tensors):
        yield tensors
    elif all(_even(x) for x in tensors):
        yield tuple(x.flatten(0, -2) for x in tensors)
    else:
        yield from zip(*(x.unbind(0) for x in tensors), strict=True)


def _even(x: Tensor) -> bool:
    """Whether the rows of all samples are evenly spaced, so that they are one matrix."""
    return all(x.shape[i] == 1 or x.stride(i) == x.shape[i + 1] * x.stride(i + 1) for i in range(x.ndim - 2))


def _activate(x: Tensor, kind: str, y: Tensor) -> None:
    """y = activation of x; they may be the same."""
    if kind == "relu":
        torch.clamp_min(x, 0, out=y)
    else:
        torch.ops.aten.gelu.out(x, approximate="none" if kind == "gelu" else "tanh", out=y)
