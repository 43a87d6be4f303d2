"""FrozenVAT: a trained VAT as the fastest policy step a device allows, with the plan that says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vat_fast.config import VATConfig
from vat_fast.frozen.build import base_plan
from vat_fast.frozen.calibration import Calibration
from vat_fast.frozen.checker import check
from vat_fast.frozen.cpu import Choice, bind_native, bind_onednn, bind_openvino, check_precision, cpu_executor
from vat_fast.frozen.memory import reuse_buffers
from vat_fast.frozen.passes import check_names, run_passes
from vat_fast.frozen.plan import Plan
from vat_fast.frozen.streams import one_stream, split_streams
from vat_fast.frozen.target import TAKES_SAMPLES, Executor, Precision, Target
from vat_fast.host_memory import freed_memory_kept

if TYPE_CHECKING:
    from vat_fast.model import VAT


class Runner(Protocol):
    """What an executor is to the engine: a plan bound to weights and memory."""

    plan: Plan
    weights: Mapping[str, Tensor]

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Actions (B, C, A) for the plan's inputs; may be overwritten by the next run."""
        ...

    def output(self, name: str) -> Tensor:
        """What the last run left in the plan's output `name`."""
        ...


class FrozenVAT:
    """Made by `VAT.freeze`; called like a VAT.

        frozen = vat.freeze(batch=1, dtype="bf16")
        actions = frozen(pixels, task_id)           # (B, C, A), normalised
        print(frozen.explain())

    Weights are folded once and shared by the plans of all batch sizes; OpenVINO packs them once per batch size. A call
    with another number of samples runs in pieces of the sizes there are, largest first, so a sample's result depends on
    the pieces only through rounding; with `batch=1` alone it does not depend on the other samples at all.

    Args:
        vat: the trained model; it is not kept.
        batch: batch sizes to make plans for; 1 is always among them.
        views: camera views; None: as the model was configured.
        dtype: "fp32", "bf16", "fp16", "int16" (x86 CPUs), "int8" or "fp8".
        device: where to run.
        executor: who runs the plan; None: the fastest for the device (see `default_executor`).
        images: "float" for VAT's own signature, "uint8" for raw images (B, V, H, W, 3), with `mean` and `std`.
        without: names of passes to leave out.
        calibration: for "int8" and "int16" on CPUs: recorded samples, 32 or more over all tasks, each a mapping with
            `pixels`, `task_id`, `proprio` as they are passed to a call. OpenVINO takes the ranges of activations from
            them and needs them; the native executor, which rounds each token by itself, evens out input channels
            better than by the weights alone.
        record_layers: keep the action tokens of every layer for `action_tokens`, at some cost in speed.

    Raises:
        ValueError: something that cannot be, in one sentence.
    """

    def __init__(
        self,
        vat: VAT,
        *,
        batch: int | Sequence[int] = 1,
        views: int | None = None,
        dtype: Precision = "fp32",
        device: str | torch.device = "cpu",
        executor: Executor | None = None,
        images: str = "float",
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        without: Collection[str] = (),
        calibration: Iterable[Mapping[str, Tensor]] | None = None,
        record_layers: bool = False,
    ) -> None:
        self.config: VATConfig = vat.config if views is None else vat.config.replace(num_views=views)
        self.device = torch.device(device)
        sizes = sorted({1, *([batch] if isinstance(batch, int) else batch)}, reverse=True)
        if sizes[-1] < 1:
            raise ValueError(f"batch sizes must be at least 1, got {batch}")
        if images not in ("float", "uint8"):
            raise ValueError(f'images must be "float" or "uint8", got {images!r}')
        choice = (
            Choice(executor, "as asked")
            if executor
            else default_executor(self.device, dtype, self.config, calibration is not None)
        )
        executor, self.executor_reason = choice.executor, choice.reason
        self.target = Target(
            executor=executor,
            dtype=dtype,
            images=images,  # type: ignore[arg-type]
            mean=mean,
            std=std,
            arch=None if executor == "triton" else Target.arch,
        )
        if executor != "triton" and self.device.type == "cpu":
            check_precision(self.target)
        if calibration is None and executor == "openvino" and dtype == "int8":
            raise ValueError(
                "int8 needs calibration=[...]: recorded samples from which to take the ranges of activations"
            )
        plans = {B: make_plan(self.config, B, self.target, without, record_layers) for B in sizes}
        self.plans: dict[int, Plan] = plans
        self.records_layers = record_layers
        with freed_memory_kept():
            self._runners: Mapping[int, Runner] = self._bound(vat, without, calibration)

    def _bound(
        self, vat: VAT, without: Collection[str], calibration: Iterable[Mapping[str, Tensor]] | None
    ) -> Mapping[int, Runner]:
        """An executor for each plan."""
        plans, target = self.plans, self.target
        samples: Calibration | None = None
        if calibration is not None and target.dtype in TAKES_SAMPLES and target.executor in ("openvino", "native"):
            wide = Target(images=target.images, mean=target.mean, std=target.std)
            samples = Calibration(make_plan(self.config, 1, wide, without), self._samples(calibration))
        if target.executor == "openvino":
            return bind_openvino(vat, plans, target, samples)
        if target.executor == "onednn":
            return bind_onednn(vat, plans, target)
        if target.executor == "native":
            return bind_native(vat, plans, samples)
        return _bind(vat, plans, target, self.device)

    def __call__(
        self,
        pixels: Tensor,
        task_id: Tensor | int | None = None,
        proprio: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normalised actions (B, C, A), float32; arguments as `VAT.forward`, or uint8 images (B, V, H, W, 3).

        Raises:
            ValueError: an input of another shape than the configuration's, or missing.
        """
        inputs = self._check(pixels, task_id, proprio)
        B, c = len(inputs["pixels"]), self.config
        if c.head == "diffusion":
            shape = (B, c.chunk_size, c.action_dim)
            inputs["sample"] = torch.randn(shape, device=self.device, generator=generator)
        parts, done = [], 0
        while done < B:
            size = next(size for size in self._runners if size <= B - done)
            piece = {name: value[done : done + size] for name, value in inputs.items()}
            parts.append(self._runners[size].run(piece).to(torch.float32, copy=True))
            done += size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def action_tokens(
        self,
        pixels: Tensor,
        task_id: Tensor | int | None = None,
        proprio: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """Action tokens (1, T + E, D) after each layer for one sample, float32; as `VAT.details` has them.

        Raises:
            ValueError: more than one sample, or frozen without `record_layers`.
        """
        if not self.records_layers:
            raise ValueError("the action tokens of the layers are not kept: freeze with record_layers=True")
        if len(pixels) != 1:
            raise ValueError(f"give one sample, got {len(pixels)}")
        self(pixels, task_id, proprio, generator)
        outputs = (self._runners[1].output(f"action.{layer}.out") for layer in range(self.config.layers))
        return tuple(output.to("cpu", torch.float32, copy=True) for output in outputs)

    def parameters(self) -> Iterator[Tensor]:
        """The folded weights, each once."""
        yield from {id(w): w for runner in self._runners.values() for w in runner.weights.values()}.values()

    @property
    def plan(self) -> Plan:
        """The plan of one sample."""
        return self.plans[1]

    def explain(self, batch: int = 1, device: str | None = None) -> str:
        """Every step with its cost, the passes with what each saved, and the bounds; see `explain.Explanation`."""
        from vat_fast.frozen.explain import explain

        text = explain(self.config, self.target, batch=batch, device=device).text()
        return f"{text}\n\nRun by {self.target.executor}: {self.executor_reason}."

    def _samples(self, calibration: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Checked calibration inputs, one sample each."""
        c = self.config
        for entry in calibration:
            inputs = self._check(entry["pixels"], entry.get("task_id"), entry.get("proprio"))
            if c.head == "diffusion":
                inputs["sample"] = torch.randn(len(inputs["pixels"]), c.chunk_size, c.action_dim)
            for i in range(len(inputs["pixels"])):
                yield {name: value[i : i + 1] for name, value in inputs.items()}

    def _check(self, pixels: Tensor, task_id: Tensor | int | None, proprio: Tensor | None) -> dict[str, Tensor]:
        c = self.config
        S = c.image_size
        if self.target.images == "uint8":
            if pixels.dtype != torch.uint8 or pixels.ndim != 5 or pixels.shape[1:] != (c.num_views, S, S, 3):
                raise ValueError(
                    f"images must be uint8 (batch, {c.num_views}, {S}, {S}, 3), got {pixels.dtype} "
                    f"{tuple(pixels.shape)}; "
                    'freeze with images="float" for normalised pixels'
                )
        else:
            if pixels.ndim == 4 and pixels.shape[1] == 3 * c.num_views:
                pixels = pixels.unflatten(1, (c.num_views, 3))
            if pixels.ndim != 5 or pixels.shape[1:] != (c.num_views, 3, S, S):
                raise ValueError(
                    f"pixels must be (batch, {c.num_views}, 3, {S}, {S}) or (batch, {3 * c.num_views}, {S}, {S}), "
                    f"got {tuple(pixels.shape)}"
                )
        B = len(pixels)
        if B == 0:
            raise ValueError("the batch is empty")
        inputs = {"pixels": pixels.to(self.device)}
        if c.task_conditioning != "none":
            if task_id is None:
                raise ValueError(f"task_id is missing: this model is conditioned on one of {c.num_tasks} tasks")
            ids = torch.as_tensor(task_id).long()
            ids = ids.expand(B) if ids.ndim == 0 else ids
            if ids.shape != (B,):
                raise ValueError(f"task_id must be one integer or ({B},), got shape {tuple(ids.shape)}")
            # Ids that lie on a GPU already are the caller's to check: reading them back would wait for the device.
            on_host = not (isinstance(task_id, Tensor) and task_id.is_cuda)
            if on_host and not 0 <= int(ids.min()) <= int(ids.max()) < c.num_tasks:
                raise ValueError(f"task ids must be 0 to {c.num_tasks - 1}, got {ids.tolist()}")
            inputs["task_id"] = ids.to(self.device)
        if c.proprio_dim:
            if proprio is None or proprio.shape != (B, c.proprio_dim):
                got = "none" if proprio is None else f"shape {tuple(proprio.shape)}"
                raise ValueError(f"proprio must be ({B}, {c.proprio_dim}), got {got}")
            inputs["proprio"] = proprio.to(self.device)
        elif proprio is not None:
            raise ValueError("this model reads no proprio (proprio_dim is 0), but proprio was given")
        return inputs


def default_executor(device: torch.device, dtype: Precision, config: VATConfig, calibrated: bool = True) -> Choice:
    """The fastest executor for a device: Triton's kernels on CUDA and ROCm, see `cpu.cpu_executor` on CPUs."""
    if device.type == "cpu":
        return cpu_executor(dtype, config, calibrated)
    if device.type == "cuda":
        return Choice("triton", "the kernels for CUDA and ROCm")
    return Choice("torch", f"nothing else here runs on {device.type}")


def make_plan(
    config: VATConfig, batch: int, target: Target, without: Collection[str] = (), record_layers: bool = False
) -> Plan:
    """The plan for a target, its passes run, scheduled and proven; the layers' action tokens as outputs if asked for.

    Raises:
        ValueError: unknown pass names.
    """
    check_names(without)
    plan = base_plan(config, batch, target.compute)
    history = run_passes(plan, target, without)
    plan = history[-1][1] if history else plan
    if record_layers:
        kept = {f"action.{layer}.out" for layer in range(config.layers)}
        roles = {name: "output" if name in kept else buffer.role for name, buffer in plan.buffers.items()}
        plan = plan.replace(
            buffers={name: dataclasses.replace(b, role=roles[name]) for name, b in plan.buffers.items()}
        )
    return schedule(plan, target, without)


def schedule(plan: Plan, target: Target, without: Collection[str] = ()) -> Plan:
    """Streams and memory for a plan, checked."""
    two_streams = target.executor == "triton" and "split_streams" not in without
    plan = split_streams(plan) if two_streams else one_stream(plan)
    if "reuse_buffers" not in without:
        plan = reuse_buffers(plan)
    check(plan)
    return plan


def _bind(vat: VAT, plans: dict[int, Plan], target: Target, device: torch.device) -> dict[int, Runner]:
    """An executor per plan, over one set of weights."""
    from vat_fast.frozen.torch_executor import DTYPES, TorchExecutor
    from vat_fast.frozen.weights import Folded, in_eight_bits, materialise, vectors

    largest = plans[max(plans)]
    kind: type[TorchExecutor] = TorchExecutor
    wide, eight_bit = set[str](), dict[str, torch.dtype]()
    if target.executor == "triton":
        from vat_fast.frozen.triton_executor import TritonExecutor

        kind, wide, eight_bit = TritonExecutor, vectors(largest), in_eight_bits(largest)
    elif target.quantised:
        raise ValueError(f"the torch executor has no {target.dtype}; use fp32, bf16 or fp16")
    folded = Folded(largest, vat.state_dict(), DTYPES[target.compute], device, wide | eight_bit.keys())
    weights = materialise(folded, eight_bit)
    return {B: kind(plan, weights, folded.constants(plan), device) for B, plan in plans.items()}
