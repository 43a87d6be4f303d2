"""The folder of an evaluation: what is written, what a rerun reads, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vat_fast.rollout.records import (
    EpisodeKey,
    EpisodeRecord,
    RecordFolder,
    actions_path,
    digest,
    load_actions,
    read_records,
)

SETTINGS = {"suite": "toy", "seed": 7}


def make(init_state: int, success: bool = True) -> tuple[EpisodeRecord, np.ndarray]:
    actions = np.random.default_rng(init_state).normal(size=(5, 7)).astype(np.float32)
    record = EpisodeRecord("toy", 1, "push", init_state, 7, success, 5, digest(actions), [1.5, 2.0], [3.0])
    return record, actions


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path, SETTINGS)
    for state in (3, 0):
        folder.append(*make(state, success=state == 0))
    again = RecordFolder(tmp_path, SETTINGS)
    assert list(again.records.values()) == [make(3, False)[0], make(0)[0]] == read_records(tmp_path)
    for record in again.records.values():
        np.testing.assert_array_equal(load_actions(tmp_path, record), make(record.init_state)[1])
    line = json.loads((tmp_path / "episodes.jsonl").read_text().splitlines()[0])
    assert (line["task"], line["init_state"], line["success"], line["steps"]) == (1, 3, False, 5)
    assert line["predict_ms"] == [1.5, 2.0]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    RecordFolder(tmp_path, SETTINGS).append(*make(0))
    path = tmp_path / "episodes.jsonl"
    whole = path.read_text()
    path.write_text(whole + make(1)[0].to_line()[:-9])
    assert list(read_records(tmp_path)) == [make(0)[0]]
    folder = RecordFolder(tmp_path, SETTINGS)
    assert path.read_text() == whole
    folder.append(*make(1))
    assert list(RecordFolder(tmp_path, SETTINGS).records) == [EpisodeKey(1, 0), EpisodeKey(1, 1)]


def test_lines_that_are_no_records_are_named(tmp_path: Path) -> None:
    RecordFolder(tmp_path, SETTINGS).append(*make(0))
    with open(tmp_path / "episodes.jsonl", "a") as file:
        file.write('{"task": 1, "colour": "red"}\n')
    with pytest.raises(ValueError, match=r"episodes.jsonl, line 2: not an episode's record"):
        RecordFolder(tmp_path, SETTINGS)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    RecordFolder(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="with seed = 7, this one has 8; take the same settings"):
        RecordFolder(tmp_path, {**SETTINGS, "seed": 8})


def test_actions_of_another_episode_are_refused(tmp_path: Path) -> None:
    record, actions = make(0)
    RecordFolder(tmp_path, SETTINGS).append(record, actions)
    np.save(actions_path(tmp_path, record.key), actions + 1e-7)
    with pytest.raises(ValueError, match="does not hold the actions of the episode"):
        load_actions(tmp_path, record)
