"""Validation equals a computation by hand, and rollouts during training are asked for in one place."""

import numpy as np
import pytest
import torch

from vat_fast import VAT, VATConfig
from vat_fast.config import ConfigError
from vat_fast.observation import ImageProcessing
from vat_fast.train.data.loader import DemonstrationLoader
from vat_fast.train.data.pack import PackOptions, pack
from vat_fast.train.data.packed import PackedDataset
from vat_fast.train.data.targets import Samples, held_out
from vat_fast.train.datasets import thinned
from vat_fast.train.step import TrainingModel
from vat_fast.train.synthetic import SyntheticOptions, write_demonstrations
from vat_fast.train.validate import RolloutOptions, check_rollout, validate

SIZE = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "num_heads": 3, "mlp_hidden": 96, "num_tasks": 2}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("validate")
    write_demonstrations(folder / "demos", SyntheticOptions(demos=3, steps=14, image_size=40))
    pack([folder / "demos"], folder / "packed", PackOptions(), progress=False)
    return PackedDataset(folder / "packed")


def make_model(**options: object) -> TrainingModel:
    torch.manual_seed(0)
    return TrainingModel(VAT(VATConfig.from_preset("vit-tiny", **{**SIZE, **options}))).eval()


def make_loader(samples: Samples, batch: int) -> DemonstrationLoader:
    return DemonstrationLoader([samples], batch, 32, shuffle=False, drop_last=False)


def test_it_equals_a_computation_by_hand(packed: PackedDataset) -> None:
    """Sample by sample, from the files: the images as a policy sees them, the errors in robot units."""
    out = held_out([episode.name for episode in packed.episodes], 0.5, 0)
    samples = Samples(packed, 8, episodes=out)
    model = make_model()
    # 5 does not divide the number of samples: the last batch is padded, and padding must not count.
    assert len(samples) % 5
    found = validate(model, make_loader(samples, 5), packed.statistics)

    see = ImageProcessing(rotation="none", jpeg_quality=None, image_size=32)
    normalised, robot = [], []
    for episode, is_out in zip(packed.episodes, out, strict=True):
        for step in range(episode.start, episode.start + episode.length - 7) if is_out else ():
            pixels = torch.from_numpy(np.stack([see.pixels(packed.image(camera, step)) for camera in packed.cameras]))
            with torch.no_grad():
                action = model.vat(pixels[None].float(), packed.task_id(episode))[0].numpy()
            recorded = np.array(packed.actions[step : step + 8])
            recorded[:, -1] = 1 - np.clip(recorded[:, -1], 0, 1)
            normalised.append(np.abs(action - packed.statistics.action.normalize(recorded)))
            true = packed.statistics.action.unnormalize(packed.statistics.action.normalize(recorded))
            robot.append(np.abs(packed.statistics.action.unnormalize(action) - true))
    assert found.errors.samples == len(samples) == len(normalised)
    figures = found.to_dict()
    assert found.loss == pytest.approx(np.mean(normalised), rel=1e-5)
    np.testing.assert_allclose(figures["l1_per_dimension"], np.mean(normalised, axis=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(figures["l1_per_step"], np.mean(normalised, axis=(0, 2)), rtol=1e-4)
    np.testing.assert_allclose(figures["robot_l1_per_dimension"], np.mean(robot, axis=(0, 1)), rtol=1e-4)


def test_it_repeats_and_does_not_depend_on_the_batch(packed: PackedDataset) -> None:
    samples = Samples(packed, 8)
    model = make_model()
    loader = make_loader(samples, 4)
    once, again = (validate(model, loader, packed.statistics) for _ in range(2))
    assert once.to_dict() == again.to_dict()
    other = validate(model, make_loader(samples, 7), packed.statistics)
    assert other.loss == pytest.approx(once.loss, rel=1e-5)


def test_a_diffusion_head_is_measured_by_the_actions_it_samples(packed: PackedDataset) -> None:
    samples = thinned(Samples(packed, 8), 6)
    model = make_model(head="diffusion", diffusion_steps=5)
    found, again = (
        validate(model, make_loader(samples, 3), packed.statistics, samples_actions=True, seed=1) for _ in range(2)
    )
    assert found.to_dict() == again.to_dict()
    # Sampled actions are clipped to [-1, 1], the noise whose error is the loss is not.
    assert 0 < found.errors.l1 <= 2
    assert found.loss != pytest.approx(found.errors.l1, rel=1e-3)


def test_thinning_spreads_evenly(packed: PackedDataset) -> None:
    whole, few = Samples(packed, 8), thinned(Samples(packed, 8), 5)
    assert len(few) == 5
    assert {few.steps[0], few.steps[-1]} == {whole.steps[0], whole.steps[-1]}
    at = np.searchsorted(whole.steps, few.steps)
    np.testing.assert_array_equal(few.task_id, whole.task_id[at])
    assert np.ptp(np.diff(at)) <= 1
    assert len(thinned(Samples(packed, 8), 10**6)) == len(whole)


def test_rollouts_that_cannot_be_had_are_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown key validate\.rollout\.suit; it has suite, episodes"):
        RolloutOptions.from_dict({"suit": "libero_goal"})
    with pytest.raises(ConfigError, match=r"validate\.rollout\.suite is missing"):
        RolloutOptions.from_dict({"episodes": 2})
    with pytest.raises(ConfigError, match=r"validate\.rollout\.episodes must be a whole number of at least 1, got 0"):
        RolloutOptions.from_dict({"suite": "libero_goal", "episodes": 0})

    def missing(rendering: bool) -> None:
        raise ImportError("there is no simulator")

    monkeypatch.setattr("vat_fast.rollout.install_check.check_simulator", missing)
    with pytest.raises(ConfigError, match=r"cannot run here: there is no simulator; set it to null"):
        check_rollout(RolloutOptions("libero_goal"))
