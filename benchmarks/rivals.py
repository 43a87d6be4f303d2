"""What a policy step is compared with: ways to run the same weights on the same inputs, by name.

Each rival is built from one ReferenceVAT (or the VAT with the same weights), checked against the reference's own
actions, and only then handed out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from benchmarks.parity import relative
from benchmarks.variants import random_batch, randomise
from vat_fast import VAT, ReferenceVAT, VATConfig

REFERENCE = "reference eager fp32"
MOST_ERROR = {"fp32": 1e-5, "bf16": 0.03, "int16": 0.01, "int8": 0.1}
"""Relative error of the actions beyond which a rival is not timed."""


@dataclass
class Problem:
    """One configuration, batch and set of random weights; what every rival computes."""

    vat: VAT
    reference: ReferenceVAT
    pixels: Tensor
    task_id: Tensor
    truth: Tensor

    @classmethod
    def make(cls, preset: str, batch: int, views: int, seed: int = 0) -> Problem:
        """Random weights that matter, random pixels."""
        config = VATConfig.from_preset(preset, num_views=views)
        vat = VAT(config).eval()
        randomise(vat, seed)
        reference = ReferenceVAT(config).eval()
        reference.load_state_dict(vat.state_dict(), assign=True)
        inputs = random_batch(config, batch, seed + 1)
        with torch.inference_mode():
            truth = reference(inputs["pixels"], inputs["task_id"])
        return cls(vat, reference, inputs["pixels"], inputs["task_id"], truth)


@dataclass
class Rival:
    """A way to run the step: `call` returns actions (B, C, A); `build_seconds` and `build_mb` are what it took."""

    name: str
    dtype: str
    call: Callable[[], Any]
    error: float
    build_seconds: float
    build_mb: float


def build(name: str, problem: Problem) -> Rival:
    """The rival called `name`.

    Raises:
        KeyError: no rival has that name.
        ImportError: the package it needs is not installed.
        ArithmeticError: it computes something else than the reference.
    """
    dtype = next((d for d in ("bf16", "int16", "int8", "fp16") if d in name), "fp32")
    gc.collect()
    memory, start = psutil.Process().memory_info().rss, time.perf_counter()
    with torch.inference_mode():
        call = RIVALS[name](problem)
        actions = call()
        seconds = time.perf_counter() - start
    error = relative(torch.as_tensor(actions).float().reshape(problem.truth.shape), problem.truth)
    if not error < MOST_ERROR[dtype]:
        raise ArithmeticError(f"{name}: relative error {error:.1e}; no speed is reported for a wrong result")
    return Rival(name, dtype, call, error, seconds, (psutil.Process().memory_info().rss - memory) / 2**20)


def _reference(problem: Problem) -> Callable[[], Any]:
    return lambda: problem.reference(problem.pixels, problem.task_id)


def _autocast(problem: Problem) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return problem.reference(problem.pixels, problem.task_id)

    return call


def _compiled(mode: str) -> Callable[[Problem], Callable[[], Any]]:
    def make(problem: Problem) -> Callable[[], Any]:
        torch._dynamo.reset()
        compiled = torch.compile(problem.reference, mode=mode)
        return lambda: compiled(problem.pixels, problem.task_id)

    return make


def _vat(problem: Problem) -> Callable[[], Any]:
    return lambda: problem.vat(problem.pixels, problem.task_id)


def _frozen(dtype: str, executor: str | None = None) -> Callable[[Problem], Callable[[], Any]]:
    def make(problem: Problem) -> Callable[[], Any]:
        options: dict[str, Any] = {"batch": len(problem.pixels), "dtype": dtype, "executor": executor}
        if dtype == "int8":
            # Other samples than the one that is timed.
            samples = random_batch(problem.vat.config, 4, seed=99)
            options["calibration"] = [{name: samples[name] for name in ("pixels", "task_id")}]
        frozen = problem.vat.freeze(**options)
        return lambda: frozen(problem.pixels, problem.task_id)

    return make


def _openvino(precision: str) -> Callable[[Problem], Callable[[], Any]]:
    def make(problem: Problem) -> Callable[[], Any]:
        import openvino

        model = openvino.convert_model(problem.reference, example_input=(problem.pixels, problem.task_id))
        model.reshape({model.input(0): list(problem.pixels.shape), model.input(1): list(problem.task_id.shape)})
        hints = {
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "ENABLE_CPU_PINNING": "NO",
        }
        request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
        request.set_input_tensor(0, openvino.Tensor(problem.pixels.numpy(), shared_memory=True))
        request.set_input_tensor(1, openvino.Tensor(problem.task_id.numpy()))

        def call() -> np.ndarray:
            request.infer()
            return np.array(request.get_output_tensor(0).data)

        return call

    return make


def _onnxruntime(problem: Problem) -> Callable[[], Any]:
    import tempfile
    from pathlib import Path

    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        arguments = (problem.pixels, problem.task_id)
        torch.onnx.export(problem.reference, arguments, path, input_names=["pixels", "task_id"], dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would spin on after each call and slow the reference and everybody else in the round.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"pixels": problem.pixels.numpy(), "task_id": problem.task_id.numpy()}
    return lambda: session.run(None, feed)[0]


RIVALS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    REFERENCE: _reference,
    # Large models run two at a time: who is compared most is next to each other.
    "reference autocast bf16": _autocast,
    "VAT fp32": _vat,
    "OpenVINO fp32": _openvino("f32"),
    "frozen fp32": _frozen("fp32"),
    "OpenVINO bf16": _openvino("bf16"),
    "frozen bf16": _frozen("bf16"),
    "frozen int16": _frozen("int16"),
    "frozen int8": _frozen("int8"),
    "frozen openvino int8": _frozen("int8", "openvino"),
    "frozen native fp32": _frozen("fp32", "native"),
    "frozen onednn fp32": _frozen("fp32", "onednn"),
    "frozen onednn bf16": _frozen("bf16", "onednn"),
    "torch.compile fp32": _compiled("default"),
    "torch.compile max-autotune fp32": _compiled("max-autotune"),
    "ONNX Runtime fp32": _onnxruntime,
}
"""The reference exported to ONNX Runtime and OpenVINO is what a CPU user would pick."""
