"""Runs a plan with PyTorch's operators over static buffers, on any device: the plain executor, and the yardstick.

Every form of every step runs here, so a plan with any passes switched off can be run and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


def allocate(plan: Plan, constants: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A tensor for every buffer; activations are views of one block where the plan places them."""
    block = torch.empty(plan.memory if plan.storage else 0, dtype=torch.uint8, device=device)
    tensors = {}
    for name, buffer in plan.buffers.items():
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
        weights: as `weights.materialise` gives them, in the plan's dtype, on `device`.
        constants: values of the plan's constant buffers.
    """

    def __init__(
        self, plan: Plan, weights: Mapping[str, Tensor], constants: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self.plan, self.device = plan, device
        self.weights = weights
        self.tensors = allocate(plan, constants, device)
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
        compute, out = getattr(self, f"_{step.op}"), outputs["y"]

        def run() -> None:
            out.copy_(compute(step, inputs, weights).view(out.shape))
            if "film" in outputs:
                gamma, beta = weights["film"][inputs["task_id"]][:, None].chunk(2, -1)
                outputs["film"].copy_(torch.addcmul(beta, out, gamma + 1))

        return run

    # One method per op: (step, inputs, weights) -> y.

    def _patch_embed(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        pixels, weight = x["pixels"].flatten(0, 1), w["weight"]
        if pixels.dtype == torch.uint8:
            pixels = pixels.permute(0, 3, 1, 2).to(weight.dtype)
        patches = F.conv2d(pixels, weight, w["bias"], stride=step.options["patch"]).flatten(2).transpose(1, 2)
        prefix = step.options["prefix"]
        tokens = patches + w["table"][prefix:]
        if prefix:
            tokens = torch.cat([w["table"][:prefix].expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens.reshape(x["pixels"].shape[0], -1, tokens.shape[-1])

    def _norm(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        y = self._film(step, x, w) if "table" in w or "gamma_beta" in x else x["x"]
        if "group" in step.options:
            y = y.unflatten(1, (-1, step.options["group"])).flatten(2)
        return F.layer_norm(y, y.shape[-1:], w.get("weight"), w.get("bias"), step.options["eps"])

    def _linear(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        h, weight, bias = x["x"], w["weight"], w["bias"]
        if "norm" in step.options:
            h = F.layer_norm(h, h.shape[-1:], eps=step.options["norm"])
        if "rows" in step.options:
            rows = slice(*step.options["rows"])
            weight, bias = weight[rows], bias[rows]
        y = F.linear(h, weight, bias)
        if "activation" in step.options:
            y = _activate(y, step.options["activation"])
        if "scale" in w:
            y = y * w["scale"]
        return x["residual"] + y if "residual" in x else y

    def _activation(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        return _activate(x["x"], step.options["kind"])

    def _residual(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        return x["x"] + (x["h"] * w["scale"] if "scale" in w else x["h"])

    def _attention(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        o = step.options
        qkv = x["qkv"].unflatten(1, (o["views"], -1)).unflatten(-1, (3, o["heads"], -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=o["scale"]).transpose(1, 2).reshape(len(x["qkv"]), -1)

    def _cross_attention(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        heads = step.options["heads"]
        q = x["q"].unflatten(-1, (heads, -1)).transpose(1, 2)
        kv = torch.cat([x["kv_extra"], x["kv"]], dim=1) if "kv_extra" in x else x["kv"]
        k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, scale=step.options["scale"]).transpose(1, 2).flatten(2)

    def _film(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        both = w["table"][x["task_id"]] if "table" in w else x["gamma_beta"]
        gamma, beta = both[:, None].chunk(2, dim=-1)
        return torch.addcmul(beta, x["x"], gamma + 1)

    def _lookup(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        return w["table"][x["index"]]

    def _broadcast(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        tokens = w["weight"].expand(self.plan.batch, -1, -1)
        return (tokens + x["vector"][:, None] if "vector" in x else tokens).contiguous()

    def _add(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        return x["x"] + w["weight"]

    def _reshape(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        return x["x"]

    def _select(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        return x["x"].unflatten(1, (step.options["views"], -1))[:, :, step.options["prefix"] :].flatten(1, 2)

    def _ddim(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        return self._sampler.step(x["noise"].float(), self._round, x["sample"])


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="none" if kind == "gelu" else "tanh")
