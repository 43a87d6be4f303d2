"""Places divided between patches, and a locator that learns to find coloured squares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vat_fast import VAT, VATConfig
from vat_fast.checkpoint import CheckpointError
from vat_fast.train import pretrain as pretrain_module
from vat_fast.train.build import build_model
from vat_fast.train.config import config_from_dict
from vat_fast.train.data.episode import DataError
from vat_fast.train.data.frames import read_frames
from vat_fast.train.locator import Labels, Locator, location_errors, locator_loss, patch_shares
from vat_fast.train.pretrain import PretrainSettings, pretrain
from vat_fast.vision_weights import load_vision, save_vision, vision_state

OPTIONS = {"image_size": 32, "patch_size": 8, "depth": 3, "mlp_hidden": 96, "width": 48, "class_token": False}


def test_shares_of_patches_give_the_place_back() -> None:
    rng = np.random.default_rng(0)
    places = torch.from_numpy(rng.uniform(0.2, 0.8, (3, 2, 5, 2)))
    shares = patch_shares(places, 7)
    assert torch.allclose(shares.sum(2), torch.ones(3, 2, 5, dtype=torch.float64))
    centres = (torch.arange(7) + 0.5) / 7
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).flatten(0, 1).double()
    assert torch.allclose(shares.transpose(-1, -2) @ grid, places)
    assert (shares > 0).sum(2).max() <= 4


def test_what_is_out_of_view_is_in_no_patch() -> None:
    places = torch.tensor([[[[-0.1, 0.5], [0.5, 1.0], [float("nan"), 0.5], [0.999, 0.0]]]])
    assert patch_shares(places, 4).sum(2)[0, 0].tolist() == [0, 0, 0, 1]


def test_a_perfect_locator_has_no_loss_and_no_error() -> None:
    """Tokens that are one-hot codes of what they show, and a locator that reads the code."""
    kinds, width = torch.tensor([0, 1]), 4
    # In the middle between two patches, and out of the second view.
    places = torch.tensor([[[[0.5, 0.125], [0.875, 0.625]], [[0.125, 0.125], [2.0, 0.5]]]])
    positions = torch.tensor([[[0.05, -0.1, 0.2], [0.1, 0.2, 0.3]]])
    labels = Labels(places, positions - 0.1, positions, kinds)
    locator = Locator(width, 2, 2)
    tokens = torch.randn(1, 2, 16, width)
    found = locator(tokens, labels)
    found = found._replace(
        scores=torch.cat([found.targets, (found.targets.sum(2, keepdim=True) == 0).float()], 2).log().clamp(min=-100),
        located=torch.cat([labels.offsets, labels.positions], -1)[:, None].expand(-1, 2, -1, -1) / 0.1,
    )
    where, far = locator_loss(found, labels)
    assert far == 0
    assert where == pytest.approx(np.log(2) / 4)  # the entropy of lying between two patches, in one of four cases


def _write_squares(path: Path, count: int, seed: int) -> None:
    """A file of frames: a red and a green square on grey, somewhere in each of two views."""
    rng = np.random.default_rng(seed)
    images = rng.integers(100, 120, (count, 2, 32, 32, 3), np.uint8)
    corners = rng.integers(0, 26, (count, 2, 2, 2))
    for frame in range(count):
        for view in range(2):
            for kind in range(2):
                column, row = corners[frame, view, kind]
                images[frame, view, row : row + 6, column : column + 6] = (230, 20, 20) if kind else (20, 230, 20)
    places = (corners + 3) / 32
    positions = np.concatenate([places[:, 0], np.zeros((count, 2, 1))], -1) * 0.3
    with h5py.File(path, "w") as f:
        group = f.create_group("frames")
        group["main"], group["wrist"] = images[:, 0], images[:, 1]
        group["positions"], group["gripper"] = positions.astype(np.float32), np.zeros((count, 3), np.float32)
        group["places"] = np.concatenate([places, np.ones((count, 2, 2, 1))], -1).astype(np.float32)
        group.attrs["names"], group.attrs["cameras"] = json.dumps(["green_1", "red_1"]), json.dumps(["main", "wrist"])


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files, of which the last is held out."""
    folder = tmp_path_factory.mktemp("squares")
    for number in range(12):
        _write_squares(folder / f"{number:02d}.hdf5", 60, number)
    return folder


def test_frames_are_turned_with_their_labels(squares: Path) -> None:
    frames = read_frames([squares], progress=False)
    assert frames.kinds == ("green", "red")
    assert frames.images.shape == (720, 2, 32, 32, 3)
    for kind, channel in ((0, 1), (1, 0)):
        column, row = (frames.places[5, 1, kind] * 32).astype(int)
        pixel = frames.images[5, 1, row, column]
        assert pixel[channel] == 230 or pixel[1 - channel] == 230, "neither this square nor the other on top of it"
        assert frames.kind_of_object.tolist() == [0, 1]


def test_the_eyes_learn_and_a_training_starts_from_them(squares: Path, tmp_path: Path) -> None:
    settings = PretrainSettings((str(squares),), options=OPTIONS, steps=320, batch=32, lr=3e-3, ema=0.97, every=1)
    errors = pretrain(settings, tmp_path / "eyes", progress=False)
    # A patch is 8 pixels; a guess is 1.5 patches off.
    assert errors["patches_view0_p50"] < 0.6, errors
    assert errors["position_cm_view0_p50"] < 4, errors
    assert pretrain(settings, tmp_path / "eyes", progress=False) == errors, "a finished one is not done again"
    vat = VAT(VATConfig.from_preset("vit-tiny", **OPTIONS))
    before = vision_state(vat)["patch_embed.weight"].clone()
    load_vision(vat, tmp_path / "eyes")
    assert not torch.equal(before, vat.patch_embed.weight)
    config = config_from_dict(
        {
            "output": "x",
            "model": {"preset": "vit-tiny", "weights": "random", "vision": str(tmp_path / "eyes"), "options": OPTIONS},
            "data": {"paths": ["x"]},
            "train": {"steps": 1},
        }
    )
    assert torch.equal(build_model(config).patch_embed.weight, vat.patch_embed.weight)


def test_an_interrupted_pretraining_goes_on_and_eyes_start_others(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PretrainSettings((str(squares),), options=OPTIONS, steps=130, batch=32, lr=3e-3, ema=0.97, every=1)
    pretrain(settings, tmp_path / "whole", progress=False)
    monkeypatch.setattr("vat_fast.train.pretrain._SAVE_EVERY_S", -1.0)
    write_log = pretrain_module._log

    def pulled_plug(out: Path, line: dict[str, Any]) -> None:
        write_log(out, line)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vat_fast.train.pretrain._log", pulled_plug)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings, tmp_path / "again", progress=False)
    assert torch.load(tmp_path / "again" / "state.pt", weights_only=True)["step"] == 99
    pretrain(settings, tmp_path / "again", progress=False)
    one, other = (load_file(tmp_path / name / "vision.safetensors") for name in ("whole", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(CheckpointError, match="a training with other settings"):
        pretrain(replace(settings, lr=1e-3), tmp_path / "again", progress=False)

    started = replace(settings, vision=str(tmp_path / "whole"), steps=1, lr=1e-9)
    pretrain(started, tmp_path / "started", progress=False)
    first = load_file(tmp_path / "started" / "vision.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)


def test_errors_speak(squares: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.hdf5 files"):
        read_frames([tmp_path], progress=False)
    vat = VAT(VATConfig.from_preset("vit-tiny", **OPTIONS))
    with pytest.raises(CheckpointError, match=r"has no vision\.safetensors"):
        load_vision(vat, tmp_path)
    save_vision(vat, tmp_path)
    with pytest.raises(CheckpointError, match=r"mlp_hidden 96, the model has 64: set model\.options\.mlp_hidden"):
        load_vision(VAT(VATConfig.from_preset("vit-tiny", **{**OPTIONS, "mlp_hidden": 64})), tmp_path)
    with pytest.raises(CheckpointError, match="2 vision layers, too few for a model with 3"):
        load_vision(VAT(VATConfig.from_preset("vit-tiny", **{**OPTIONS, "depth": 4})), tmp_path)


def test_a_locator_that_is_told_nothing_finds_nothing_out_of_view() -> None:
    locator, kinds = Locator(8, 1, 1), torch.tensor([0])
    labels = Labels(torch.tensor([[[[2.0, 0.5]]]]), torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), kinds)
    errors = location_errors(locator, torch.randn(1, 1, 4, 8), labels)
    assert all(values.isnan().all() for values in errors.values())
