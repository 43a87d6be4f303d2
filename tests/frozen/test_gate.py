"""The gate: it passes what is close, refuses what is not, and says by how much."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.variants import random_batch, small_config
from tests.frozen.test_passes import models
from vat_fast import VATConfig
from vat_fast.actions import FieldStatistics, Statistics
from vat_fast.frozen.cpu import has_integers
from vat_fast.frozen.gate import Limits, accept
from vat_fast.frozen.gate_inputs import plant_massive_activations, plant_outliers
from vat_fast.frozen.target import Executor, Precision

pytest.importorskip("openvino", reason="needs the package openvino")


def samples(config: VATConfig, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    inputs = random_batch(config, count, seed)
    return [{name: value for name, value in inputs.items() if name != "actions"}]


@pytest.mark.parametrize("executor", ["openvino", "onednn", "torch"])
@pytest.mark.parametrize("variant", ["VAT", "diffusion", "proprio"])
def test_layers_and_actions_are_compared(variant: str, executor: str) -> None:
    config = small_config("siglip2-so400m", variant)
    vat, _ = models(config)
    report = accept(vat, vat.freeze(executor=executor, record_layers=True), samples(config, 2, 1))
    assert report.accepted or variant == "diffusion"
    assert report.samples == 2
    assert report.cosines is not None
    assert len(report.cosines) == config.layers
    assert min(report.cosines) > 0.9999


@pytest.mark.parametrize(
    ("dtype", "executor", "calibrated"),
    [
        ("int8", "openvino", True),
        ("int8", "native", True),
        ("int8", "native", False),
        ("int16", "native", True),
        ("int16", "native", False),
    ],
)
def test_integers_are_accepted_even_with_outlier_channels(
    dtype: Precision, executor: Executor, calibrated: bool
) -> None:
    if executor == "native" and not has_integers():
        pytest.skip("the native operators have no integers here")
    config = small_config("siglip2-so400m", "VAT")
    vat, _ = models(config)
    plant_massive_activations(vat, 60)
    plant_outliers(vat)
    calibration = samples(config, 8, 5) if calibrated else None
    frozen = vat.freeze(dtype=dtype, executor=executor, calibration=calibration, record_layers=True)
    report = accept(vat, frozen, samples(config, 4, 1))
    assert report.accepted, str(report)


def test_samples_bring_8_bits_nearer() -> None:
    if not has_integers():
        pytest.skip("the native operators have no integers here")
    config = small_config("siglip2-so400m", "VAT")
    vat, _ = models(config)
    plant_massive_activations(vat, 60)
    plant_outliers(vat)
    errors = [
        accept(vat, vat.freeze(dtype="int8", executor="native", calibration=some), samples(config, 4, 1)).relative_error
        for some in (None, samples(config, 8, 5))
    ]
    assert errors[1] < 0.8 * errors[0]


def test_what_is_over_its_limit_is_refused() -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, _ = models(config)
    frozen = vat.freeze(dtype="int8", calibration=samples(config, 4, 5), record_layers=True)
    report = accept(vat, frozen, samples(config, 2, 1), limits=Limits(0.001, 0.999999))
    assert not report.accepted
    assert len(report.failures) == 1 + config.layers
    assert "REFUSED" in str(report)
    assert "the actions differ by" in str(report)


def test_ranges_from_other_images_show() -> None:
    """Calibrated on black images, int8 is further off than calibrated on images like those it sees."""
    config = small_config("siglip2-so400m", "VAT")
    vat, _ = models(config)
    like = samples(config, 4, 5)
    black = [{**entry, "pixels": 0 * entry["pixels"]} for entry in like]
    errors = [
        accept(
            vat, vat.freeze(dtype="int8", executor="openvino", calibration=some), samples(config, 2, 1)
        ).relative_error
        for some in (like, black)
    ]
    assert errors[1] > 1.1 * errors[0]


def test_robot_units_and_json(tmp_path: Path) -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, _ = models(config)
    ones = np.ones(7)
    action = FieldStatistics(0 * ones, ones, -10 * ones, 10 * ones, -10 * ones, 10 * ones)
    report = accept(vat, vat.freeze(dtype="bf16"), samples(config, 2, 1), Statistics("made up", action))
    assert report.cosines is None
    assert report.robot_mean_error is not None
    assert np.mean(report.robot_mean_error) == pytest.approx(10 * report.mean_error, rel=1e-3)
    report.save(tmp_path / "gate.json")
    saved = json.loads((tmp_path / "gate.json").read_text())
    assert saved["accepted"] is True
    assert saved["max_error"] == report.max_error


def test_refusals() -> None:
    config = small_config("vit-tiny", "VAT")
    vat, _ = models(config)
    frozen = vat.freeze()
    with pytest.raises(ValueError, match="the gate has no samples"):
        accept(vat, frozen, [])
    with pytest.raises(ValueError, match="freeze with record_layers=True"):
        frozen.action_tokens(samples(config, 1, 1)[0]["pixels"], 0)
    with pytest.raises(ValueError, match="freeze with images"):
        accept(vat, vat.freeze(images="uint8"), samples(config, 1, 1))
