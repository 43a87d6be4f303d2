"""Runs a plan on CPUs as one compiled OpenVINO graph (two with a diffusion head: before the loop, and one round).

What it is good for was measured: see `cpu.cpu_executor`. It keeps the weights more than once in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import openvino as ov
import torch
from torch import Tensor

from vat_fast.frozen.int8 import QuantisedLinear
from vat_fast.frozen.openvino_graph import build_graph
from vat_fast.frozen.plan import Plan, Step
from vat_fast.heads import DDIM
from vat_fast.precision import multiplies_bfloat16

_CORE = ov.Core()


class OpenVINOExecutor:
    """A plan compiled for the CPU, with as many threads as PyTorch has.

    Args:
        plan: any plan.
        weights: of the plan, float32 or bfloat16.
        constants: values of the plan's constant buffers.
        quantised: the 8-bit steps, by name.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        quantised: Mapping[str, QuantisedLinear] | None = None,
    ) -> None:
        self.plan = plan
        self.weights: Mapping[str, Tensor] = {}  # OpenVINO holds its own, packed
        # Denoising accumulates in float32, outside the graph.
        loop = [step for step in plan.loop if step.op != "ddim"]
        self._ddim = next((step for step in plan.loop if step.op == "ddim"), None)
        written = {access.buffer for step in plan.steps for access in step.outputs.values()}
        memory = sorted({a.buffer for step in loop for a in step.inputs.values()} & written)

        computed = arithmetic(plan)

        def part(steps: Sequence[Step], results: list[str]) -> _Compiled:
            return _Compiled(build_graph(computed, steps, weights, constants, results, quantised), computed.dtype)

        layers = [name for name, b in plan.buffers.items() if b.role == "output" and name != "actions"]
        if self._ddim is None:
            self._once: _Compiled | None = part(plan.steps, ["actions", *layers])
        else:
            self._once = part(plan.steps, memory) if memory else None
            self._round = part(loop, [self._ddim.inputs["noise"].buffer, *layers])
            self._sampler = DDIM(plan.repeats)
            if self._once is not None:
                for name in memory:
                    self._round.connect(name, self._once)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Actions (B, C, A) for the plan's inputs; the tensor is overwritten by the next run."""
        if self._once is not None:
            for name, value in inputs.items():
                self._once.set(name, value)
            self._once.run()
        if self._ddim is None:
            assert self._once is not None
            return self._once.result("actions")
        for name, value in inputs.items():
            self._round.set(name, value)
        sample, noise = inputs["sample"].float(), self._ddim.inputs["noise"].buffer
        for t in reversed(range(self.plan.repeats)):
            self._round.set("sample", sample)
            self._round.fill("timestep", t)
            self._round.run()
            sample = self._sampler.step(self._round.result(noise), t, sample)
        return sample

    def output(self, name: str) -> Tensor:
        """What the last run left in the plan's output `name`."""
        last = self._once if self._ddim is None else self._round
        assert last is not None
        return last.result(name)


def arithmetic(plan: Plan) -> Plan:
    """The plan as it is computed: in float32 where the processor does not multiply bfloat16.

    OpenVINO's own answer to bfloat16 there is its reference code, 35 times slower than float32 (vit-tiny, Xeon with
    AVX-512 but without AVX512-BF16). The weights stay bfloat16, and an 8-bit plan's products 8-bit.
    """
    return plan if multiplies_bfloat16("cpu") else plan.replace(dtype="fp32")


def compile_for_cpu(graph: ov.Model, dtype: str) -> ov.InferRequest:
    """A request for one run of a graph at a time, in "fp32" or "bf16", with as many threads as PyTorch has."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        # Pinned threads of several processes would meet on the same cores.
        "ENABLE_CPU_PINNING": "NO",
    }
    return _CORE.compile_model(graph, "CPU", settings).create_infer_request()


class _Compiled:
    """A compiled graph with memory for its parameters and results, bound once: a run neither makes nor moves any."""

    def __init__(self, graph: ov.Model, dtype: str) -> None:
        self._request = compile_for_cpu(graph, dtype)
        self._inputs = {port.get_any_name(): self._bind(port) for port in self._request.model_inputs}
        self._results = {port.get_any_name(): self._bind(port) for port in self._request.model_outputs}

    def _bind(self, port: ov.ConstOutput) -> Tensor:
        """Memory that the graph reads a parameter from, or writes a result to."""
        array = np.zeros(tuple(port.shape), dtype=port.element_type.to_dtype())
        self._request.set_tensor(port.get_any_name(), ov.Tensor(array, shared_memory=True))
        return torch.from_numpy(array)

    def set(self, name: str, value: Tensor) -> None:
        """Copy an input in; one that the graph does not read is ignored."""
        if name in self._inputs:
            self._inputs[name].copy_(value.view(self._inputs[name].shape))

    def fill(self, name: str, value: int) -> None:
        """Set every element of an input; one that the graph does not read is ignored."""
        if name in self._inputs:
            self._inputs[name].fill_(value)

    def connect(self, name: str, source: _Compiled) -> None:
        """Read parameter `name` from the result of another graph, in place."""
        if name in self._inputs:
            shared = ov.Tensor(source._results[name].numpy(), shared_memory=True)
            self._request.set_tensor(name, shared)
            del self._inputs[name]

    def run(self) -> None:
        """Compute the results."""
        self._request.infer()

    def result(self, name: str) -> Tensor:
        """A result, float32, in the graph's memory."""
        return self._results[name]
