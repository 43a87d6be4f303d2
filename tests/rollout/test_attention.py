"""Attention maps: what they average, where they lie in a camera's image, and a sheet of a real episode."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.rollout.toys import NAMES, ToyScenes, make_policy
from vat_fast.cli import main
from vat_fast.model import VAT
from vat_fast.observation import ImageProcessing, Rotation
from vat_fast.rollout.attention import attention_maps, heat_on_camera, spread, watch_episode
from vat_fast.rollout.attention_cli import parse_layers
from vat_fast.rollout.attention_sheet import attention_sheet, heat_colours, overlay
from vat_fast.rollout.evaluate import evaluate
from vat_fast.rollout.records import EpisodeKey
from vat_fast.rollout.settings import EvaluationSettings

SETTINGS = EvaluationSettings("toy", tasks=(1,), init_states=(3,), max_steps=14)


@pytest.mark.parametrize("options", [{}, {"proprio": False}, {"action_stream": "last_layer"}, {"class_token": True}])
def test_maps_are_the_mean_over_heads_and_action_tokens(options: dict) -> None:
    vat = make_policy(NAMES, **options).vat
    assert isinstance(vat, VAT)
    c = vat.config
    torch.manual_seed(1)
    proprio = torch.randn(1, 8) if c.proprio_dim else None
    with torch.inference_mode():
        weights = vat.details(torch.randn(1, 2, 3, 32, 32), 0, proprio).attention
    maps = attention_maps(c, weights)
    assert maps.shape == (c.layers, 2, 2, 2)
    prefix = 0 if c.action_stream == "last_layer" else c.num_prefix
    for layer in range(c.layers):
        mean = weights[layer][0, :, : c.num_action_tokens].mean((0, 1)).numpy()
        for view in range(2):
            for patch in range(4):
                key = c.num_extra_tokens + view * (prefix + 4) + prefix + patch
                assert maps[layer, view, patch // 2, patch % 2] == pytest.approx(mean[key], rel=1e-5)


def test_a_view_that_nothing_attends_to_is_empty() -> None:
    vat = make_policy(NAMES, action_stream="shared", shared_keys="last_view").vat
    assert isinstance(vat, VAT)
    with torch.inference_mode():
        weights = vat.details(torch.randn(1, 2, 3, 32, 32), 0, torch.zeros(1, 8)).attention
    maps = attention_maps(vat.config, weights)
    assert (maps[:, 0] == 0).all()
    assert (maps[:, 1] > 0).all()


@pytest.mark.parametrize("rotation", ["none", "rotate_180", "flip_vertical"])
@pytest.mark.parametrize("crop_area", [None, 0.9, 0.5])
def test_heat_lies_where_the_patch_came_from(rotation: Rotation, crop_area: float | None) -> None:
    """A bright spot in a camera's image goes through the image pipeline; the patch that shows it leads back to it."""
    processing = ImageProcessing(rotation=rotation, crop_area=crop_area, image_size=64)
    height, width, grid = 120, 160, 8
    for row, column in ((40, 50), (85, 60), (60, 118), (36, 110)):
        camera = np.zeros((height, width, 3), np.uint8)
        camera[row - 2 : row + 3, column - 2 : column + 3] = 255
        levels = processing.grey_levels(camera).mean(0)
        patches = levels.reshape(grid, 8, grid, 8).mean((1, 3)).astype(np.float32)
        heat = heat_on_camera(patches / patches.sum(), height, width, processing)
        assert heat.shape == (height, width)
        centre = (heat * np.indices(heat.shape)).sum((1, 2)) / heat.sum()
        # A patch is 15 by 20 pixels of the uncropped image; the centre of the heat may be off by half of one.
        assert np.abs(centre - (row, column)).max() < 10
    corner = heat_on_camera(np.ones((grid, grid), np.float32), height, width, processing)[0, 0]
    assert corner == (1 if crop_area is None else 0)


def test_watching_changes_nothing_but_the_last_bits(tmp_path: Path) -> None:
    policy = make_policy(NAMES)
    evaluate(policy, SETTINGS, names=NAMES, scenes=ToyScenes(), folder=tmp_path, processes=1, progress=False)
    key = EpisodeKey(1, 3)
    moments, end = watch_episode(policy, ToyScenes()(1), NAMES[1], key, SETTINGS)
    played = np.load(next((tmp_path / "actions").iterdir()))
    np.testing.assert_allclose(end.actions, played, rtol=1e-4, atol=1e-4)
    assert [moment.step for moment in moments] == [0, 4, 8, 12]
    first = ToyScenes()(1)
    first.reset(3)
    first.settle(SETTINGS.settling_steps)
    np.testing.assert_array_equal(moments[0].images[0], first.observe()["agentview_image"])
    assert [moment.step for moment in spread(moments, 3)] == [0, 8, 12]
    assert spread(moments, 9) == moments


def test_the_sheet_shows_every_camera_layer_and_moment() -> None:
    policy = make_policy(NAMES)
    moments, _ = watch_episode(policy, ToyScenes()(0), NAMES[0], EpisodeKey(0, 0), SETTINGS)
    count, cameras = len(moments[0].maps), policy.config.cameras
    few = attention_sheet(moments, cameras, [("mean", range(count))], policy.config.image, "title")
    more = attention_sheet(moments, cameras, [("0", [0]), ("1", [1])], policy.config.image, "title")
    wider = attention_sheet([*moments, moments[0]], cameras, [("0", [0])], policy.config.image, "title")
    assert few.dtype == np.uint8
    assert len(more) > len(few)
    assert wider.shape[1] > few.shape[1]
    with pytest.raises(ValueError, match=f"the model has action layers 0 to {count - 1}, got 9"):
        attention_sheet(moments, cameras, [("9", [9])], policy.config.image, "title")
    with pytest.raises(ValueError, match="at least one moment"):
        attention_sheet([], cameras, [("0", [0])], policy.config.image, "title")


def test_heat_is_bright_where_attention_is() -> None:
    assert heat_colours(np.array([0, 1 / 3, 2 / 3, 1], np.float32)).tolist() == [
        [0, 0, 0],
        [255, 0, 0],
        [255, 255, 0],
        [255, 255, 255],
    ]
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2] = 1
    shown = overlay(np.full((4, 4, 3), 100, np.uint8), heat)
    np.testing.assert_allclose(shown[1, 2], 0.7 * 255 + 0.3 * 60, atol=0.5)
    assert shown[0, 0].tolist() == [60, 60, 60]


def test_layers_and_policies_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_layers("mean") == "mean"
    assert parse_layers("0,2-3") == (0, 2, 3)
    with pytest.raises(argparse.ArgumentTypeError):
        parse_layers("most")
    policy = make_policy(NAMES)
    policy.vat = policy.vat.freeze(batch=1)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="attention maps need an eager VAT, got FrozenVAT; load with frozen=False"):
        watch_episode(policy, ToyScenes()(0), NAMES[0], EpisodeKey(0, 0), SETTINGS)


def test_the_command_draws_a_real_episode(simulator: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vat_fast.rollout.suites import task_names

    make_policy(task_names("libero_object"), size=32).save_pretrained(tmp_path / "policy")
    out = tmp_path / "sheets" / "sheet.png"
    options = ["--suite", "object", "--task", "1", "--init-state", "4", "--displace", "3", "--max-steps", "10"]
    options += ["--render", "fast", "--size", "64", "--layers", "all", "--moments", "3", "--out", str(out)]
    assert main(["attention", str(tmp_path / "policy"), *options]) == 0
    printed = capsys.readouterr().out
    assert "libero_object 1, initial state 4, moved by up to 3 cm: no success after 10 steps" in printed
    sheet = np.asarray(Image.open(out))
    # Three looks (steps 0, 4 and 8) beside the labels, and on the images more than one colour.
    assert sheet.shape[1] >= 110 + 3 * 164
    assert len(np.unique(sheet[200:300, 150:250].reshape(-1, 3), axis=0)) > 20
    assert main(["attention", str(tmp_path / "policy"), *options, "--layers", "0,9"]) == 2
    assert "the model has action layers 0 to 1, got 9" in capsys.readouterr().err
    assert main(["attention", str(tmp_path / "policy"), *options, "--task", "10"]) == 2
    assert "suite libero_object has tasks 0 to 9, got 10" in capsys.readouterr().err
