"""Where objects are said to be, against where they are seen; frames whose hand and objects are elsewhere every time."""

from __future__ import annotations

import json
from pathlib import Path

import h5py  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import pytest

from vat_fast.rollout import frames as frames_module
from vat_fast.rollout.displace import move_objects, plan_displacement
from vat_fast.rollout.frames import FrameFile, FrameSettings, collect_frames
from vat_fast.rollout.locate import ObjectLocator, kind_of
from vat_fast.rollout.scene import Scene


def test_kinds_of_instances() -> None:
    assert kind_of("akita_black_bowl_2") == "akita_black_bowl"
    assert kind_of("basket") == "basket"


def test_an_object_is_seen_where_it_is_said_to_be(cheese_scene: Scene) -> None:
    """The pixels that change when an object vanishes surround the place that is said."""
    scene, name = cheese_scene, "cream_cheese_1"
    scene.reset(3)
    scene.settle(10)
    locator = ObjectLocator(scene)
    place = locator.places()[0, locator.names.index(name)]
    before = scene.observe()["agentview_image"].astype(int)
    move_objects(scene, {name: (30.0, 0.0)})
    changed = np.abs(scene.observe()["agentview_image"] - before).sum(-1) > 30
    rows, columns = np.nonzero(changed)
    assert 0 < len(rows) < 100
    size = scene.size
    assert columns.min() - 1 <= place[0] * size <= columns.max() + 2
    assert rows.min() - 1 <= place[1] * size <= rows.max() + 2
    assert 0.5 < place[2] < 2


def test_positions_are_in_the_middle_and_labels_change_nothing(cheese_scene: Scene) -> None:
    scene = cheese_scene
    scene.reset(0)
    scene.settle(10)
    state = scene.sim_state()
    locator = ObjectLocator(scene)
    cheese = locator.positions()[locator.names.index("cream_cheese_1")]
    # It lies on the floor: the middle is above it by half its height.
    assert 0.005 < cheese[2] < 0.03
    assert np.array_equal(scene.sim_state(), state)


def test_everything_can_be_moved(cheese_scene: Scene) -> None:
    scene = cheese_scene
    scene.reset(0)
    scene.settle(10)
    goal = plan_displacement(scene, 6.0, (0, 0))
    everything = plan_displacement(scene, 6.0, (0, 0), everything=True)
    assert set(goal) < set(everything)
    assert len(everything) >= 6
    assert plan_displacement(scene, 6.0, (0, 0), everything=True) == everything


def test_frames_have_other_scenes_and_hands_each_time(
    simulator: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames_module, "FRAMES_PER_FILE", 6)
    settings = FrameSettings("object", (1,), frames=6, init_states=(0,), size=32, render="fast")
    make = frames_module._FrameMaker(settings, tmp_path)
    make(FrameFile(1, 0))
    with h5py.File(FrameFile(1, 0).path(tmp_path)) as f:
        group = f["frames"]
        assert group["agentview_rgb"].shape == group["eye_in_hand_rgb"].shape == (6, 32, 32, 3)
        names = json.loads(group.attrs["names"])
        cheese = group["positions"][:, names.index("cream_cheese_1")]
        assert np.ptp(cheese[:, :2], axis=0).max() > 0.03
        assert np.ptp(group["gripper"][:], axis=0).max() > 0.03
        assert group["places"].shape == (6, 2, len(names), 3)
    # What is there stays; nothing is left to make.
    before = FrameFile(1, 0).path(tmp_path).stat().st_mtime_ns
    assert collect_frames(settings, tmp_path, progress=False) == [FrameFile(1, 0).path(tmp_path)]
    assert FrameFile(1, 0).path(tmp_path).stat().st_mtime_ns == before


def test_settings_that_cannot_be(simulator: None) -> None:
    with pytest.raises(ValueError, match="has tasks 0 to 9, got 10"):
        FrameSettings("object", (10,))
    with pytest.raises(ValueError, match="at least 1 frame of 16 pixels, got 0 of 128"):
        FrameSettings("object", (0,), frames=0)
