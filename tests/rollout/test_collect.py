"""Collecting: files that the readers take, kills that cost nothing, processes that die."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from vat_fast.rollout.collect import CollectSettings, Job, _claim, _Collector, _TaskFolder, collect
from vat_fast.rollout.demonstration import demonstrate
from vat_fast.rollout.experts.disturb import Disturbance
from vat_fast.rollout.scene import SETTLING_STEPS, Scene
from vat_fast.rollout.workers import Done, GivenUp, WorkError, run_jobs
from vat_fast.train.data.libero_hdf5 import LiberoHDF5

OPTIONS = {"episodes": 2, "init_states": (4, 5), "size": 48, "render": "fast", "displace_cm": 3.0, "noise": 0.2}


class Toy:
    """Squares numbers, and dies, hangs or fails where it is told to, once or always."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, job: tuple[int, str]) -> int:
        number, fate = job
        mark = self._folder / f"{number}.tried"
        if fate.endswith("always") or not mark.exists():
            mark.touch()
            if fate.startswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if fate.startswith("hang"):
                time.sleep(60)
            if fate == "refuse":
                raise ValueError("no such number")
            if fate == "fail":
                raise RuntimeError("a bug")
        return number**2


def toy_jobs(folder: Path, fates: list[str]) -> list[Done | GivenUp]:
    jobs = list(enumerate(fates))
    return sorted(run_jobs(jobs, functools.partial(Toy, folder), processes=2, timeout=15))


def test_a_dead_or_hung_process_costs_one_try(tmp_path: Path) -> None:
    done = toy_jobs(tmp_path, ["", "die", "hang", "die always", "hang always"])
    assert done[:3] == [Done((0, ""), 0), Done((1, "die"), 1), Done((2, "hang"), 4)]
    assert done[3] == GivenUp((3, "die always"), "the process ended with status -9")
    assert done[4] == GivenUp((4, "hang always"), "no reply for 15 s")


def test_errors_of_jobs_are_raised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^no such number$"):
        toy_jobs(tmp_path, ["refuse"])
    with pytest.raises(WorkError, match="RuntimeError: a bug"):
        toy_jobs(tmp_path, ["fail", "fail"])
    with pytest.raises(ValueError, match="at least 1 process"):
        list(run_jobs([1], functools.partial(Toy, tmp_path), processes=0, timeout=1))


def test_killed_collection_goes_on(cheese_scene: Scene, tmp_path: Path) -> None:
    """Killed after the first of two episodes; the file is as if nothing had happened, and readers take it."""
    settings = CollectSettings("object", (1,), **OPTIONS)
    command = "from pathlib import Path; from vat_fast.rollout.collect import *; "
    command += f"collect(CollectSettings('object', (1,), **{OPTIONS!r}), Path({str(tmp_path)!r}), processes=1)"
    process = subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__': {command}"])
    first = _TaskFolder(settings, 1, tmp_path).part(0)
    deadline = time.monotonic() + 200
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert first.exists()
    inode = first.stat().st_ino

    # The rest in this process: what `collect` gives its workers, with a scene that stands already.
    collector = _Collector(settings, tmp_path)
    collector._scene = cheese_scene
    for episode in _TaskFolder(settings, 1, tmp_path).missing():
        assert collector(Job(1, episode))
    assert first.stat().st_ino == inode
    (report,) = collect(settings, tmp_path, processes=1, progress=False)
    assert (report.collected, report.failed, report.lost) == (2, (), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collection.json", report.file.name]

    # Episode 0 came from the killed process; here it is again.
    rng = np.random.default_rng([0, *_seed_of(settings), 1, 0, 0])
    rng.random()
    again = demonstrate(cheese_scene, 4, Disturbance(0.2), rng, displace_cm=3.0, displace_seed=0)
    with h5py.File(report.file) as f:
        data, demo = f["data"], f["data/demo_0"]
        assert np.array_equal(demo["actions"], again.actions)
        assert np.array_equal(demo["executed_actions"], again.executed)
        assert np.array_equal(demo["states"], again.states)
        assert np.array_equal(demo["obs/agentview_rgb"], again.images["agentview"])
        assert not np.array_equal(demo["executed_actions"], demo["actions"])
        assert demo.attrs["init_state_index"] == 4
        assert np.array_equal(demo.attrs["init_state"], demo["states"][0])
        assert data.attrs["num_demos"] == 2
        assert data.attrs["total"] == sum(len(data[name]["actions"]) for name in data)
        assert json.loads(data.attrs["env_args"])["env_kwargs"]["camera_heights"] == 48
        assert json.loads(data.attrs["collection"])["settings"]["noise"] == 0.2
        assert demo["dones"][-1] == 1
        assert demo["dones"][:].sum() == 1

    source = LiberoHDF5(report.file)
    episodes = list(source.episodes())
    assert len(source) == 2
    assert episodes[0].task == cheese_scene.task_name
    assert episodes[0].success
    assert np.array_equal(episodes[0].actions, again.actions.astype(np.float32))  # none is shifted or dropped
    images = list(episodes[0].images["agentview_rgb"]())
    assert np.array_equal(images[5], again.images["agentview"][5])
    cheese_scene.reset(4, 3.0, 0)
    cheese_scene.settle(SETTLING_STEPS)
    np.testing.assert_allclose(episodes[0].state[0], cheese_scene.proprio(), rtol=1e-6)

    # Again: nothing to do. With other settings: refused.
    stamp = report.file.stat().st_mtime_ns
    assert collect(settings, tmp_path, progress=False) == [report]
    assert report.file.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"other settings \(noise\); take another folder"):
        collect(CollectSettings("object", (1,), **{**OPTIONS, "noise": 0.1}), tmp_path)

    # More episodes: the file is taken apart, these are added. Fewer: refused.
    more = CollectSettings("object", (1,), **{**OPTIONS, "episodes": 3})
    _claim(tmp_path, more)
    _TaskFolder(more, 1, tmp_path).reopen()
    assert _TaskFolder(more, 1, tmp_path).missing() == [2]
    collector = _Collector(more, tmp_path)
    collector._scene = cheese_scene
    assert collector(Job(1, 2))
    (report,) = collect(more, tmp_path, processes=1, progress=False)
    assert (report.collected, report.failed, report.lost) == (3, (), {})
    with h5py.File(report.file) as f:
        assert sorted(f["data"]) == ["demo_0", "demo_1", "demo_2"]
        assert f["data"].attrs["num_demos"] == 3
        assert json.loads(f["data"].attrs["collection"])["settings"]["episodes"] == 3
        assert np.array_equal(f["data/demo_0/actions"], again.actions)
        assert [f[f"data/demo_{k}"].attrs["episode"] for k in range(3)] == [0, 1, 2]
    assert len(LiberoHDF5(report.file)) == 3
    with pytest.raises(ValueError, match=r"other settings \(episodes\)"):
        collect(settings, tmp_path)


def test_failures_are_kept_out_and_counted(
    cheese_scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vat_fast.rollout.demonstration.max_steps", lambda suite: 3)
    settings = CollectSettings("object", (1,), **{**OPTIONS, "episodes": 1})
    collector = _Collector(settings, tmp_path)
    collector._scene = cheese_scene
    assert not collector(Job(1, 0))
    (report,) = collect(settings, tmp_path, progress=False)
    assert (report.file, report.collected, report.failed) == (None, 0, (0,))
    assert json.loads((tmp_path / "collection.json").read_text())["tasks"][0]["failed_episodes"] == [0]


def test_settings_are_checked(simulator: None) -> None:
    for values, message in (
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"size": 4}, "size must be at least 16"),
        ({"tasks": (11,)}, "tasks 0 to 9, got 11"),
        ({"tasks": ()}, "at least one task"),
        ({"render": "nice"}, "official or fast"),
        ({"disturbed_share": 2.0}, "must be 0 to 1"),
        ({"suite": "objekt"}, "unknown suite"),
    ):
        with pytest.raises(ValueError, match=message):
            CollectSettings(**{"suite": "object", "tasks": (1,), **values})
    with pytest.raises(ValueError, match="init states 0 to 49, got 60"):
        collect(CollectSettings("object", (1,), init_states=(60,)), Path("never"), progress=False)


def _seed_of(settings: CollectSettings) -> list[int]:
    import zlib

    return [zlib.crc32(settings.suite.encode())]
