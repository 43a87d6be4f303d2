"""Evaluation with toy scenes in real processes: the same episodes whatever runs beside them, dies or is killed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from tests.rollout.toys import NAMES, ToyScene, ToyScenes, Trouble, make_policy
from vat_fast.rollout.drivers import ScriptedPolicy
from vat_fast.rollout.evaluate import EvaluationError, EvaluationResult, evaluate
from vat_fast.rollout.plain import plain_episode
from vat_fast.rollout.records import EpisodeKey, digest
from vat_fast.rollout.settings import EvaluationSettings
from vat_fast.tasks import TaskError

SETTINGS = EvaluationSettings("toy", tasks=(0, 2), init_states=(0, 3, 4), max_steps=30)


def run(policy: Any = None, settings: EvaluationSettings = SETTINGS, **options: Any) -> EvaluationResult:
    policy = make_policy(NAMES) if policy is None else policy
    return evaluate(policy, settings, **{"names": NAMES, "scenes": ToyScenes(), "progress": False, **options})


def outcomes(result: EvaluationResult) -> list[tuple[Any, ...]]:
    return [(r.task, r.init_state, r.success, r.steps, r.actions_sha256) for r in result.records]


@pytest.fixture(scope="module")
def expected() -> list[tuple[Any, ...]]:
    """Of SETTINGS, by the plain loop."""
    policy, rows = make_policy(NAMES), []
    for key in SETTINGS.episodes:
        end = plain_episode(policy, ToyScenes()(key.task), NAMES[key.task], key, SETTINGS)
        rows.append((key.task, key.init_state, end.success, len(end.actions), digest(end.actions)))
    return rows


def test_the_plain_loop_has_different_episodes(expected: list[tuple[Any, ...]]) -> None:
    """Otherwise comparing with it would show little."""
    assert len({row[-1] for row in expected}) == len(expected)


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_change_nothing(processes: int, expected: list[tuple[Any, ...]]) -> None:
    assert outcomes(run(processes=processes)) == expected


@pytest.mark.parametrize(
    "options",
    [{"replan_every": 2}, {"temporal_ensembling": 0.1}, {"head": "diffusion", "diffusion_steps": 3}],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_execution_is_the_plain_loop(options: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, tasks=(1,), init_states=(5, 6), max_steps=11)
    policy, rows = make_policy(NAMES, **options), []
    for key in settings.episodes:
        end = plain_episode(policy, ToyScenes()(key.task), NAMES[key.task], key, settings)
        rows.append((key.task, key.init_state, end.success, len(end.actions), digest(end.actions)))
    assert outcomes(run(policy, settings)) == rows
    assert rows[0][-1] != rows[1][-1]


def test_a_scripted_policy_runs_in_the_simulator() -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=60)
    result = run(ScriptedPolicy("pusher", push), settings)
    assert all(record.success for record in result.records)
    assert {record.predict_ms == [] for record in result.records} == {True}
    with pytest.raises(EvaluationError, match="nobody knows how to push the green cube"):
        run(ScriptedPolicy("refuser", refuse), settings)


def push(scene: ToyScene, seed: int) -> Iterator[ArrayLike]:
    direction = np.sign(scene.position[0])
    while True:
        yield [direction * (1 + seed), 0, 0, 0, 0, 0, 1]


def refuse(scene: ToyScene, seed: int) -> Iterator[ArrayLike]:
    raise ValueError(f"nobody knows how to {NAMES[2]}")


def test_replanning_can_be_set_for_an_evaluation() -> None:
    settings = dataclasses.replace(SETTINGS, tasks=(1,), init_states=(5,), max_steps=11)
    own = run(make_policy(NAMES, replan_every=2), settings)
    given = run(make_policy(NAMES), dataclasses.replace(settings, replan_every=2))
    assert outcomes(own) == outcomes(given)
    assert len(given.records[0].predict_ms) == 6  # looks before steps 0, 2, 4, 6, 8, 10


def test_ensembling_can_be_set_for_an_evaluation() -> None:
    settings = dataclasses.replace(SETTINGS, tasks=(1,), init_states=(5,), max_steps=11)
    own = run(make_policy(NAMES, replan_every=2, temporal_ensembling=0.3), settings)
    plain = run(make_policy(NAMES, replan_every=2), settings)
    assert outcomes(own) != outcomes(plain)
    given = dataclasses.replace(settings, replan_every=2, temporal_ensembling=0.3)
    assert outcomes(run(make_policy(NAMES), given)) == outcomes(own)
    off = dataclasses.replace(settings, temporal_ensembling="none")
    assert outcomes(run(make_policy(NAMES, replan_every=2, temporal_ensembling=0.3), off)) == outcomes(plain)


def test_batched_predictions_agree_but_for_rounding(tmp_path: Path) -> None:
    alone = run(folder=tmp_path / "alone")
    together = run(settings=dataclasses.replace(SETTINGS, batched=True), processes=3, folder=tmp_path / "together")
    assert [r.steps for r in together.records] == [r.steps for r in alone.records]
    for key in SETTINGS.episodes:
        first, second = (np.load(tmp_path / name / "actions" / f"{key.name}.npy") for name in ("alone", "together"))
        np.testing.assert_allclose(first, second, atol=1e-3)


def test_records_tell_what_happened(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=10)
    result = run(settings=settings, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert sorted((line["task"], line["init_state"]) for line in lines) == sorted(settings.episodes)
    for record in result.records:
        assert record.task_name == NAMES[record.task]
        assert (record.suite, record.seed, record.attempts, record.steps) == ("toy", 7, 1, 10)
        # Chunks of 4: three looks in 10 steps, not one per step.
        assert len(record.predict_ms) == len(record.observe_ms) == 3
        assert digest(np.load(tmp_path / "actions" / f"{record.key.name}.npy")) == record.actions_sha256


@pytest.mark.parametrize("kind", ["kill", "hang", "raise"])
def test_a_lost_simulator_costs_one_retry(kind: str, tmp_path: Path, expected: list[tuple[Any, ...]]) -> None:
    trouble = Trouble(kind, task=0, init_state=3, marker=str(tmp_path / "struck"))
    result = run(scenes=ToyScenes(trouble), timeout=1.5, start_timeout=60)
    assert outcomes(result) == expected
    assert [r.key for r in result.records if r.attempts == 2] == [EpisodeKey(0, 3)]
    assert not result.unfinished


def test_an_episode_that_fails_twice_is_left_out_and_tried_by_a_rerun(
    tmp_path: Path, expected: list[tuple[Any, ...]]
) -> None:
    trouble = Trouble("kill", task=0, init_state=3, marker=str(tmp_path / "struck"), times=2)
    first = run(scenes=ToyScenes(trouble), folder=tmp_path / "out")
    assert list(first.unfinished) == [EpisodeKey(0, 3)]
    assert "-9" in first.unfinished[EpisodeKey(0, 3)]
    assert len(first.records) == 5
    second = run(folder=tmp_path / "out")
    assert second.resumed == 5
    assert outcomes(second) == expected


def test_simulators_that_only_die_end_the_evaluation(tmp_path: Path) -> None:
    trouble = Trouble("raise", task=0, init_state=None, marker=str(tmp_path / "struck"), times=99)
    settings = dataclasses.replace(SETTINGS, tasks=(0,), init_states=tuple(range(9)))
    with pytest.raises(EvaluationError, match=r"(?s)6 simulators in a row were lost.*the toy is broken"):
        run(settings=settings, scenes=ToyScenes(trouble), processes=1)


def test_without_a_finished_episode_there_is_no_rate(tmp_path: Path) -> None:
    trouble = Trouble("raise", task=0, init_state=3, marker=str(tmp_path / "struck"), times=2)
    result = run(settings=dataclasses.replace(SETTINGS, tasks=(0,), init_states=(3,)), scenes=ToyScenes(trouble))
    assert not result.records
    assert "the toy is broken" in result.unfinished[EpisodeKey(0, 3)]
    assert np.isnan(result.success_rate)


def test_a_simulator_killed_from_outside_costs_one_retry(expected: list[tuple[Any, ...]]) -> None:
    def kill_one() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.001)
        pid = multiprocessing.active_children()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    result = run()
    killer.join()
    assert outcomes(result) == expected
    assert sum(r.attempts == 2 for r in result.records) == 1


EVALUATION = """
from tests.rollout.test_evaluate import run
if __name__ == "__main__":
    run(folder={folder!r})
"""


def test_a_killed_evaluation_is_continued_without_repeats(tmp_path: Path, expected: list[tuple[Any, ...]]) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(EVALUATION.format(folder=str(out)))
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)})
    episodes = out / "episodes.jsonl"
    end = time.monotonic() + 120
    while not (episodes.is_file() and episodes.read_text().count("\n")) and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = episodes.read_text()
    count = before.count("\n")
    assert count
    episodes.write_text(before + '{"suite": "toy", "ta')  # a line that the kill has cut off
    result = run(folder=out)
    assert result.resumed == count
    assert outcomes(result) == expected
    assert episodes.read_text().startswith(before)
    assert episodes.read_text().count("\n") == len(expected)


def test_another_evaluation_is_not_continued(tmp_path: Path) -> None:
    small = dataclasses.replace(SETTINGS, tasks=(0,), init_states=(0,), max_steps=3)
    run(settings=small, folder=tmp_path)
    with pytest.raises(ValueError, match=r"seed = 7, this one has 8.*another folder"):
        run(settings=dataclasses.replace(small, seed=8), folder=tmp_path)
    with pytest.raises(ValueError, match="policy = None, this one has 'other'"):
        run(settings=small, folder=tmp_path, description={"policy": "other"})
    more = run(settings=dataclasses.replace(small, init_states=(0, 1)), folder=tmp_path)
    assert (more.resumed, len(more.records)) == (1, 2)


def test_what_cannot_be_is_said_before_or_at_once() -> None:
    with pytest.raises(ValueError, match="tasks 0 to 2, got 7"):
        run(settings=dataclasses.replace(SETTINGS, tasks=(7,)))
    with pytest.raises(TaskError, match="unknown task 'push the green cube'"):
        run(make_policy(NAMES[:2]))
    with pytest.raises(ValueError, match="more than the policy's chunk of 4"):
        run(settings=dataclasses.replace(SETTINGS, replan_every=5))
    with pytest.raises(ValueError, match="cannot be batched"):
        run(make_policy(NAMES, head="diffusion"), dataclasses.replace(SETTINGS, batched=True))
    with pytest.raises(ValueError, match="at least 1 process, got 0"):
        run(processes=0)
    with pytest.raises(EvaluationError, match="the toy simulator is not installed"):
        run(scenes=ToyScenes(missing=True))
    with pytest.raises(EvaluationError, match="50 initial states, got 60"):
        run(settings=dataclasses.replace(SETTINGS, init_states=(60,)))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tasks", (), "at least one index"),
        ("init_states", (1, 1), "no index twice"),
        ("init_states", (-1,), "from 0 on"),
        ("max_steps", 0, "at least 1, got 0"),
        ("seed", -1, "at least 0, got -1"),
        ("replan_every", 0, "at least 1, or None"),
        ("temporal_ensembling", -0.5, "at least 0, 'none', or None"),
        ("temporal_ensembling", "some", "at least 0, 'none', or None"),
        ("render", "nice", "official or fast, got 'nice'"),
        ("displace_cm", -1.0, "centimetres"),
    ],
)
def test_impossible_settings(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SETTINGS, **{field: value})
