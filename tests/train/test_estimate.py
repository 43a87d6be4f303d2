"""The estimate counts what autograd really keeps, and shards as ZeRO does."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.variants import VARIANTS, small_config
from vat_fast import VAT, VATConfig
from vat_fast.config import ConfigError
from vat_fast.cost import forward_cost
from vat_fast.train.adapters import LoRAOptions
from vat_fast.train.config import Precision
from vat_fast.train.estimate import (
    TrainingPlan,
    activation_bytes,
    add_arguments,
    estimate,
    report,
    saved_bytes,
    training_flops,
)


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("depth", [4, 8])
def test_activations_are_what_a_real_forward_keeps(precision: Precision, depth: int) -> None:
    config = small_config("siglip2-so400m", "VAT").replace(depth=depth)
    vat = VAT(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    real = saved_bytes(vat, 3, torch.bfloat16 if precision == "autocast" else None)
    counted = activation_bytes(config, TrainingPlan(micro_batch=3, precision=precision, kind="cpu"))
    assert counted == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_an_estimate(variant: str) -> None:
    config = small_config("dinov2-large", variant)
    found = estimate(config, TrainingPlan(ranks=2, zero=2, micro_batch=2))
    assert 0 < found.trained_parameters <= found.total_parameters
    assert found.device_total > found.parameters > 0
    assert found.flops > 0


def test_stages_shard() -> None:
    config = VATConfig.from_preset("vit-tiny")
    stages = [estimate(config, TrainingPlan(ranks=4, zero=stage, micro_batch=1)) for stage in (0, 1, 2, 3)]
    count = stages[0].total_parameters
    assert count == sum(p.numel() for p in VAT(config).parameters())
    assert [s.parameters for s in stages] == [4 * count] * 3 + [count]
    assert [s.gradients for s in stages] == [4 * count] * 2 + [count] * 2
    assert [s.optimizer for s in stages] == [8 * count] + [4 * count] * 3
    assert stages[3].sent == pytest.approx(1.5 * stages[2].sent, rel=1e-6)
    offloaded = estimate(config, TrainingPlan(ranks=4, zero=3, micro_batch=1, offload="all"))
    assert offloaded.host == stages[3].optimizer + stages[3].parameters
    assert offloaded.device_total == stages[3].device_total - offloaded.host


@pytest.mark.parametrize(("stage", "precision"), [(2, "autocast"), (3, "fp32")])
def test_the_sum_is_what_a_run_takes(stage: int, precision: str, tmp_path: Path) -> None:
    """Within 20 %, of some 900 MB: the growth of a process's resident memory while a model trains in it."""
    script = Path(__file__).with_name("memory_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(stage), precision],
        cwd=script.parents[2],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=400,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] - found["baseline"] == pytest.approx(found["estimate"]["device_total"], rel=0.2)


def test_recompute_and_lora_save_memory() -> None:
    config = small_config("siglip2-so400m", "VAT").replace(depth=8)
    plain = estimate(config, TrainingPlan(micro_batch=4))
    less = estimate(config, TrainingPlan(micro_batch=4, recompute=True))
    assert less.activations < plain.activations / 2
    assert less.flops == pytest.approx(plain.flops * 4 / 3)
    lora = estimate(config, TrainingPlan(micro_batch=4, lora=LoRAOptions(rank=2, alpha=4.0)))
    assert lora.trained_parameters < plain.trained_parameters
    assert lora.optimizer == 16 * lora.trained_parameters
    assert lora.flops < plain.flops


def test_flops() -> None:
    config = small_config("siglip2-so400m", "VAT")
    assert training_flops(config) == 3 * forward_cost(config).total
    diffusion = config.replace(head="diffusion")
    assert training_flops(diffusion) < 4 * forward_cost(config).total
    assert training_flops(config.replace(trainable="frozen_vision")) < training_flops(config)


def test_report_and_mistakes() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="vit-tiny")
    parser.add_argument("--json", action="store_true")
    add_arguments(parser)
    text = report(parser.parse_args(["--gpus", "4", "--zero", "2"]))
    assert "ZeRO-2" in text
    assert "H100" in text
    found = json.loads(report(parser.parse_args(["--json", "--lora", "8", "--micro-batch", "2"])))
    assert found["plan"]["lora"]["rank"] == 8
    assert found["device_total"] > found["activations"] > 0
    with pytest.raises(ConfigError, match="unknown"):
        report(parser.parse_args(["--preset", "vit-huge"]))
    with pytest.raises(ConfigError, match="micro_batch"):
        TrainingPlan(micro_batch=0)
    with pytest.raises(ConfigError, match="offload"):
        TrainingPlan(zero=1, offload="all")
