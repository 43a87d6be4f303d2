"""Runs a plan with the project's kernels on CUDA and ROCm: two streams, events, and one graph for the whole step.

What the kernels do not cover runs as PyTorch operators in the same streams (`costs.in_triton` says which; `explain`
shows it). Under Triton's interpreter the same launches run one after the other on CPU tensors: that is how they are
tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vat_fast.frozen.costs import gemm_shape, in_triton
from vat_fast.frozen.plan import Plan, Step
from vat_fast.frozen.tiles import blocks, last_rows
from vat_fast.frozen.torch_executor import TorchExecutor, view
from vat_fast.frozen.weights import SCALE
from vat_fast.kernels.cross_attention import launch_cross_attention, make_workspace
from vat_fast.kernels.eight_bit import Quantized
from vat_fast.kernels.film_norm import launch_film_layernorm
from vat_fast.kernels.gemm import Film, RowStats, Workspace, launch_linear
from vat_fast.kernels.low_precision import launch_quant_linear, launch_quantize
from vat_fast.kernels.patch_embed import launch_patch_embed
from vat_fast.kernels.vision_attention import launch_vision_attention

Launch = Callable[[], None]


class TritonExecutor(TorchExecutor):
    """A plan bound to tensors, as launches in two streams.

    Args:
        plan: scheduled.
        weights: as `materialise` gives them: matrices in the plan's dtype or in 8 bits, vectors in float32.
        constants: values of the plan's constant buffers.
        device: of a CUDA or ROCm GPU; a CPU under the interpreter.
        graph: capture the whole step in one graph at the first run (not under the interpreter).
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        device: torch.device,
        graph: bool = True,
    ) -> None:
        self._workspaces = _split_workspaces(plan, device)
        self._scratch_tensors: list[Tensor] = []
        self._producer = {a.buffer: step for step in plan.all_steps for a in step.outputs.values()}
        self._prepared: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        super().__init__(plan, weights, constants, device)
        on_gpu = device.type == "cuda"
        self._action_stream = torch.cuda.Stream(device) if on_gpu else None
        self._wants_graph = graph and on_gpu
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Actions (B, C, A) for the plan's inputs; the tensor is overwritten by the next run."""
        for name, value in inputs.items():
            self.tensors[name].copy_(value.view(self.tensors[name].shape), non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        elif self._wants_graph:
            self._capture()
        else:
            self._launch()
        return self.tensors["actions"]

    def _capture(self) -> None:
        """Run once, so that kernels are compiled, then record."""
        start = self.tensors["sample"].clone() if "sample" in self.tensors else None
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._launch()
        torch.cuda.current_stream(self.device).wait_stream(side)
        if start is not None:
            self.tensors["sample"].copy_(start)  # denoising works in place
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            self._launch()
        if start is not None:
            self.tensors["sample"].copy_(start)
        self._graph = recorded
        recorded.replay()

    def _launch(self) -> None:
        """Every step in its stream, in the plan's order, with events where a step waits."""
        if self._action_stream is None:
            for call in self._steps:
                call()
        else:
            self._launch_in_streams(torch.cuda.current_stream(self.device), self._action_stream)
        for t in reversed(range(self.plan.repeats)):
            self._round = t
            self.tensors["timestep"].fill_(t)
            for call in self._loop:
                call()
            self.tensors["sample"].copy_(self.tensors["actions"])

    def _launch_in_streams(self, main: torch.cuda.Stream, action: torch.cuda.Stream) -> None:
        events: dict[str, torch.cuda.Event] = {}
        awaited = {name for step in self.plan.steps for name in step.waits}
        action.wait_stream(main)
        for step, call in zip(self.plan.steps, self._steps, strict=True):
            stream = action if step.stream == "action" else main
            with torch.cuda.stream(stream):
                for name in step.waits:
                    stream.wait_event(events[name])
                call()
                if step.name in awaited:
                    events[step.name] = torch.cuda.Event()
                    events[step.name].record(stream)
        main.wait_stream(action)

    # Binding.

    def _bind(self, step: Step) -> Launch:
        if not in_triton(step.op, step.options):
            return super()._bind(step)
        inputs = {role: view(self.tensors[access.buffer], access) for role, access in step.inputs.items()}
        outputs = {role: view(self.tensors[access.buffer], access) for role, access in step.outputs.items()}
        return getattr(self, f"_launch_{step.op}")(step, inputs, outputs)

    def _launch_linear(self, step: Step, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Launch:
        name = step.weights["weight"]
        weight, bias = self.weights[name], self.weights[step.weights["bias"]].float()
        scale = self.weights.get(f"{name}{SCALE}")
        if "rows" in step.options:
            rows = slice(*step.options["rows"])
            weight, bias = weight[rows], bias[rows]
            scale = None if scale is None else scale[rows]
        y = _matrix(outputs["y"]) if "y" in outputs else None
        film = None
        if "film" in step.weights:
            gamma, beta = self.weights[step.weights["film"]].chunk(2, dim=-1)
            modulated = _matrix(outputs["film"]) if "film" in outputs else None
            rows_per_sample = gemm_shape(self.plan, step)[0] // self.plan.batch
            film = Film(gamma, beta, modulated, rows_per_sample, inputs["task_id"])
        tile = blocks(self.plan, step)
        arguments: dict[str, Any] = {
            "bias_N": bias,
            "activation": step.options.get("activation", "none"),
            "layer_scale_N": self.weights[step.weights["scale"]] if "scale" in step.weights else None,
            "residual_MN": _matrix(inputs["residual"]) if "residual" in inputs else None,
            "film": film,
            "stats_out": self._stats(step, outputs),
            "eight_out": _quantized(outputs["eight"], outputs["scales"], tile["BLOCK_N"])
            if "eight" in outputs
            else None,
            "workspace": self._workspaces.get(step.stream),
            "config": tile,
        }
        if last := last_rows(self.plan, step):
            arguments["last"] = last
        if "norm" in step.options:
            # Of the rounded weight: the sums must cancel the row mean as the tensor cores see it.
            sums = weight.double().sum(1) * (1.0 if scale is None else scale.double())
            arguments["row_sum_N"] = sums.float()
            arguments["norm"] = RowStats(inputs["stats"], self._stats_width(step.inputs["stats"].buffer))
            arguments["eps"] = step.options["norm"]
        if scale is not None:
            x8 = _quantized(inputs["x"], inputs["scales"], step.options["group"])
            return lambda: launch_quant_linear(x8, weight, scale, y, **arguments)
        x = _matrix(inputs["x"])
        return lambda: launch_linear(x, weight, y, **arguments)

    def _launch_quantise(self, step: Step, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Launch:
        x = _matrix(inputs["x"])
        eight = _quantized(outputs["eight"], outputs["scales"], x.shape[1])
        return lambda: launch_quantize(x, eight, norm=False)

    def _launch_attention(self, step: Step, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Launch:
        o, views = step.options, self.plan.batch * step.options["views"]
        qkv, out = (_split_views(x, views) for x in (inputs["qkv"], outputs["y"]))
        lse = self._keep(views, o["heads"], qkv.shape[1])
        return lambda: launch_vision_attention(qkv, o["heads"], o["scale"], out, lse)

    def _launch_cross_attention(self, step: Step, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Launch:
        o, q, kv, out = step.options, inputs["q"], inputs["kv"], outputs["y"]
        lse = self._keep(q.shape[0], o["heads"], q.shape[1])
        workspace = make_workspace(q, kv, o["heads"])
        extra = inputs.get("kv_extra")
        return lambda: launch_cross_attention(q, kv, o["heads"], o["scale"], out, lse, extra, workspace)

    def _launch_norm(self, step: Step, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Launch:
        x, y = inputs["x"], outputs["y"]
        if "group" in step.options:
            x = x.unflatten(1, (-1, step.options["group"])).flatten(2)
        D = x.shape[-1]
        ones, zeros = (torch.full((D,), value, device=self.device) for value in (1.0, 0.0))
        weight = self.weights[step.weights["weight"]] if "weight" in step.weights else ones
        bias = self.weights[step.weights["bias"]] if "bias" in step.weights else zeros
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        gamma = beta = task_id = None
        if "table" in step.weights:
            gamma, beta = self.weights[step.weights["table"]].chunk(2, dim=-1)
            task_id = inputs["task_id"]
        elif "gamma_beta" in inputs:
            gamma, beta = inputs["gamma_beta"].chunk(2, dim=-1)
        mean, rstd = self._keep(*x.shape[:2]), self._keep(*x.shape[:2])
        eps = step.options["eps"]
        return lambda: launch_film_layernorm(x, gamma, beta, weight, bias, eps, task_id, y, mean, rstd)

    def _launch_patch_embed(self, step: Step, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Launch:
        o, images = step.options, inputs["pixels"]
        own = {role: self.weights[name] for role, name in step.weights.items()}
        weight, table = _pack_patches(own["weight"], own["bias"], own["table"], o["prefix"])
        weight = weight.to(outputs["y"].dtype)
        out = outputs["y"].unflatten(1, (o["views"], -1))
        stats = self._stats(step, outputs)
        patch, prefix = o["patch"], o["prefix"]
        return lambda: launch_patch_embed(images, weight, table, out, patch=patch, prefix=prefix, stats_out=stats)

    # Statistics and scratch.

    def _stats(self, step: Step, outputs: dict[str, Tensor]) -> RowStats | None:
        if "stats" not in outputs:
            return None
        return RowStats(outputs["stats"], self._stats_width(step.outputs["stats"].buffer))

    def _stats_width(self, buffer: str) -> int:
        """Columns per part of the statistics in `buffer`: the tile width of the step that writes them."""
        return blocks(self.plan, self._producer[buffer])["BLOCK_N"]

    def _keep(self, *shape: int) -> Tensor:
        """Float32 scratch that the kernel writes and nobody reads, alive as long as the executor."""
        self._scratch_tensors.append(torch.empty(shape, dtype=torch.float32, device=self.device))
        return self._scratch_tensors[-1]


def _split_workspaces(plan: Plan, device: torch.device) -> dict[str, Workspace]:
    """Scratch for split products, one per stream: launches that may overlap must not share it."""
    sizes: dict[str, tuple[int, int]] = {}
    for step in plan.all_steps:
        if step.op == "linear" and in_triton(step.op, step.options):
            M, N, _ = gemm_shape(plan, step)
            need = Workspace.sizes(M, N, blocks(plan, step), last_rows(plan, step))
            have = sizes.get(step.stream, (0, 0))
            sizes[step.stream] = (max(have[0], need[0]), max(have[1], need[1]))
    return {stream: Workspace.allocate(size, device) for stream, size in sizes.items()}


def _quantized(values: Tensor, scales: Tensor, group: int) -> Quantized:
    return Quantized(_matrix(values), scales, group)


def _matrix(x: Tensor) -> Tensor:
    """(..., D) as (rows, D), rows evenly spaced."""
    if x.ndim == 2:
        return x
    if x.shape[0] == 1:
        return x[0]
    return x.flatten(0, 1) if x.is_contiguous() else x.view(-1, x.shape[-1])


def _split_views(x: Tensor, views: int) -> Tensor:
    """(B, V * N, D) as (B * V, N, D), a view: rows of a wider buffer stay where they are."""
    row = x.stride(1)
    tokens = x.shape[0] * x.shape[1] // views
    return x.as_strided((views, tokens, x.shape[2]), (tokens * row, row, 1), x.storage_offset())


def _pack_patches(weight_D3PP: Tensor, bias_D: Tensor, table_ND: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Weights for raw bytes in the form of `kernels.patch_embed`, which subtracts 128 from every byte.

    (D, K) in image order (row, column, channel), padded to a multiple of 16; and what each token of a view adds.
    """
    wide = weight_D3PP.double()
    weight = wide.permute(0, 2, 3, 1).flatten(1)
    table = table_ND.double().clone()
    table[prefix:] += bias_D.double() + 128 * weight.sum(1)
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % 16)).contiguous(), table.float().contiguous()
