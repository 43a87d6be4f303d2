"""Demonstrations made for smoke runs: LIBERO's layout, and actions that the images and the task determine."""

from pathlib import Path

import numpy as np
import pytest

from vat_fast.config import ConfigError
from vat_fast.train.data.libero_hdf5 import LiberoHDF5
from vat_fast.train.data.pack import PackOptions, pack
from vat_fast.train.data.packed import PackedDataset
from vat_fast.train.synthetic import TASKS, SyntheticOptions, demonstration, write_demonstrations


def test_files_read_and_pack_like_libero(tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "demos", SyntheticOptions(demos=2, steps=12, image_size=32))
    source = LiberoHDF5(tmp_path / "demos")
    assert len(source) == 4
    assert list(source.cameras) == ["agentview_rgb", "eye_in_hand_rgb"]
    pack([tmp_path / "demos"], tmp_path / "packed", PackOptions(min_length=2), progress=False)
    data = PackedDataset(tmp_path / "packed")
    assert sorted(data.tasks) == sorted(TASKS)
    assert data.gripper == "libero"
    assert data.actions.shape[1] == 7
    assert data.state is not None
    assert data.state.shape[1] == 8


def test_observation_and_action_belong_together(tmp_path: Path) -> None:
    """The hand that a packed image shows moves as the action beside it says."""
    write_demonstrations(tmp_path / "demos", SyntheticOptions(demos=3, steps=10, image_size=96))
    pack([tmp_path / "demos"], tmp_path / "packed", PackOptions(min_length=2, no_ops="keep"), progress=False)
    data = PackedDataset(tmp_path / "packed")
    assert data.state is not None
    for episode in data.episodes:
        steps = range(episode.start, episode.start + episode.length)
        hands = np.array([_hand(data.image("agentview_rgb", step)) for step in steps])
        np.testing.assert_allclose(hands, np.asarray(data.state)[steps, :2], atol=0.02)
        moved = np.diff(hands, axis=0)
        np.testing.assert_allclose(moved, 0.03 * np.asarray(data.actions)[steps, :2][:-1], atol=0.02)


def _hand(image: np.ndarray) -> np.ndarray:
    """Where the yellow hand is, (x, y) in [0, 1]."""
    pixels = image.astype(int)
    ys, xs = np.nonzero((pixels[..., 0] > 180) & (pixels[..., 1] > 180) & (pixels[..., 2] < 160))
    return (np.array([xs.mean(), ys.mean()]) + 0.5) / len(image)


def test_the_task_decides() -> None:
    """The same scene, another task: another way to go."""
    red, blue = (demonstration(task, 4, 32, np.random.default_rng(5)) for task in (0, 1))
    np.testing.assert_array_equal(red[2]["main"][0], blue[2]["main"][0])
    assert np.abs(red[0][0] - blue[0][0]).max() > 0.1


def test_the_same_seed_gives_the_same_demonstrations(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_demonstrations(tmp_path / name, SyntheticOptions(demos=1, steps=4, image_size=16, seed=3))
    files = [LiberoHDF5(tmp_path / name).episodes() for name in ("a", "b")]
    for one, other in zip(*files, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="synthetic steps must be a whole number of at least 2, got 1"):
        SyntheticOptions(steps=1)
    with pytest.raises(ConfigError, match=r"synthetic demos must be a whole number of at least 1, got 2\.5"):
        SyntheticOptions(demos=2.5)  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        write_demonstrations(tmp_path / "there")
