"""How often a step asks for memory: every allocation of one run, counted by PyTorch's profiler."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.variants import random_batch, small_config
from tests.frozen.marks import needs_onednn_bf16
from tests.frozen.test_passes import models
from vat_fast import VATConfig
from vat_fast.frozen.cpu import has_integers
from vat_fast.frozen.engine import FrozenVAT
from vat_fast.frozen.target import Executor, Precision


def allocations(call: Callable[[], Any], folder: Path) -> list[int]:
    """Bytes of each allocation on the CPU during the third call."""
    with torch.inference_mode():
        call()
        call()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [int(event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    return [size for size in sizes if size > 0]


def one_step(frozen: FrozenVAT, batch: int) -> Callable[[], Tensor]:
    """The executor's own run: without what `FrozenVAT` checks before it and copies behind it."""
    inputs = executor_inputs(frozen.config, batch, frozen.target.images)
    runner = frozen._runners[batch]
    return lambda: runner.run(dict(inputs))


def executor_inputs(config: VATConfig, batch: int, images: str) -> Mapping[str, Tensor]:
    inputs = random_batch(config, batch, 1)
    del inputs["actions"]
    if images == "uint8":
        shape = (batch, config.num_views, config.image_size, config.image_size, 3)
        inputs["pixels"] = torch.randint(0, 256, shape, dtype=torch.uint8)
    if config.head == "diffusion":
        inputs["sample"] = torch.randn(batch, config.chunk_size, config.action_dim)
    return inputs


def test_the_count_sees_every_one(tmp_path: Path) -> None:
    assert sorted(allocations(lambda: torch.empty(1000).add(torch.empty(10, 1)), tmp_path)) == [40, 4000, 40000]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("images", ["float", "uint8"])
@pytest.mark.parametrize("variant", ["VAT", "proprio", "shared weights", "last-layer baseline", "additive task"])
@pytest.mark.parametrize("preset", ["siglip2-so400m", "dinov2-large"])
@pytest.mark.parametrize(
    ("executor", "dtype"), [("torch", "fp32"), ("native", "fp32"), ("native", "int16"), ("native", "int8")]
)
def test_a_step_in_float32_or_integers_allocates_nothing(
    executor: Executor, dtype: Precision, preset: str, variant: str, images: str, batch: int, tmp_path: Path
) -> None:
    """Prefix tokens and LayerScale (dinov2), extra tokens, FiLM in the residual: all of it."""
    if dtype != "fp32" and not has_integers():
        pytest.skip("the native operators have no integers here")
    vat, _ = models(small_config(preset, variant))
    frozen = vat.freeze(batch=batch, executor=executor, images=images, dtype=dtype)
    assert allocations(one_step(frozen, batch), tmp_path) == []


def test_denoising_allocates_its_formula_alone(tmp_path: Path) -> None:
    """Seven chunks of actions and eight numbers in a round."""
    config = small_config("siglip2-so400m", "diffusion")
    vat, _ = models(config)
    found = allocations(one_step(vat.freeze(executor="torch"), 1), tmp_path)
    assert len(found) <= 15 * config.diffusion_steps
    assert max(found) <= 4 * config.chunk_size * config.action_dim


def by_op(frozen: FrozenVAT, **each: int) -> int:
    """How many allocations a step has if every op of its plan has so many."""
    return sum(each.get(step.op, 0) for step in frozen.plan.all_steps)


@pytest.mark.parametrize("variant", ["VAT", "last-layer baseline"])
def test_onednn_allocates_the_results_of_its_products(variant: str, tmp_path: Path) -> None:
    """Two for each: what comes out, and under a kilobyte for each thread of its own notes."""
    vat, _ = models(small_config("siglip2-so400m", variant))
    frozen = vat.freeze(executor="onednn")
    found = allocations(one_step(frozen, 1), tmp_path)
    assert len(found) == by_op(frozen, linear=2)
    assert sum(size >= 1024 * torch.get_num_threads() for size in found) <= by_op(frozen, linear=1)


@pytest.mark.parametrize(("executor", "linear"), [("torch", 1), pytest.param("onednn", 2, marks=needs_onednn_bf16)])
def test_bf16_allocates_in_three_ops(executor: str, linear: int, tmp_path: Path) -> None:
    """Products (oneDNN's scratch), norms and attention, which PyTorch has no other form of."""
    vat, _ = models(small_config("dinov2-large", "VAT"))
    frozen = vat.freeze(executor=executor, dtype="bf16")
    most = by_op(frozen, patch_embed=2, linear=linear, norm=3, attention=5, cross_attention=5)
    assert len(allocations(one_step(frozen, 1), tmp_path)) <= most


def test_onednn_forgets_what_has_been_read() -> None:
    """Between runs no result of a product is alive; every run brings its own."""
    for variant in ("VAT", "diffusion"):
        vat, _ = models(small_config("siglip2-so400m", variant))
        runner = (frozen := vat.freeze(executor="onednn"))._runners[1]
        before = set(runner.tensors)
        one_step(frozen, 1)()
        left = set(runner.tensors) - before
        # A diffusion head's keys and values are read in every round, so the last one cannot know.
        assert all(name in {a.buffer for s in frozen.plan.loop for a in s.inputs.values()} for name in left)
        assert variant == "diffusion" or not left


def test_openvino_keeps_its_tensors() -> None:
    """What goes in and comes out lies in the same memory in every run."""
    pytest.importorskip("openvino")
    for variant in ("VAT", "diffusion"):
        vat, _ = models(small_config("siglip2-so400m", variant))
        frozen = vat.freeze(executor="openvino", record_layers=True)
        run, runner = one_step(frozen, 1), frozen._runners[1]
        names = [f"action.{layer}.out" for layer in range(frozen.config.layers)]
        before = [runner.output(name) for name in names]
        run()
        # The very tensors that were there before the first run hold what it computed.
        assert all(tensor is runner.output(name) for name, tensor in zip(names, before, strict=True))
        first = [tensor.clone() for tensor in before]
        assert all(tensor.abs().max() > 0 for tensor in first)
        run()
        assert all(torch.equal(old, new) for old, new in zip(first, before, strict=True))
