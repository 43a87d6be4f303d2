"""What an evaluation leaves in its folder: the settings, one line per finished episode, and the actions.

    settings.json      what was evaluated; a rerun with others is refused
    episodes.jsonl     one `EpisodeRecord` a line, appended as episodes finish
    actions/NAME.npy   (steps, A) float32, the executed actions: enough to replay the episode

A line is written whole or not at all: one that a kill has cut off is dropped and its episode runs again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vat_fast.files import write_bytes, write_text

SETTINGS_FILE = "settings.json"
EPISODES_FILE = "episodes.jsonl"
ACTIONS_FOLDER = "actions"


class EpisodeKey(NamedTuple):
    """Which episode: the task's index in the suite, and the index of its official initial state."""

    task: int
    init_state: int

    @property
    def name(self) -> str:
        """For file names."""
        return f"task{self.task:02d}_init{self.init_state:03d}"


@dataclass(frozen=True)
class EpisodeRecord:
    """One finished episode.

    suite, task, task_name, init_state: which; `task` is the index in the suite.
    seed: the evaluation's.
    success: whether the simulator's own check was met within the step limit.
    steps: control steps of the policy; settling steps do not count.
    actions_sha256: of the executed actions' float32 bytes: equal where two episodes are equal bit for bit.
    predict_ms: of each prediction, raw observation to actions, without waiting for other episodes' predictions.
    observe_ms: of each look, rendering included.
    step_ms: mean of a control step, in milliseconds.
    attempts: 2 where the simulator process died or hung once.
    """

    suite: str
    task: int
    task_name: str
    init_state: int
    seed: int
    success: bool
    steps: int
    actions_sha256: str
    predict_ms: list[float] = field(default_factory=list)
    observe_ms: list[float] = field(default_factory=list)
    step_ms: float = 0.0
    attempts: int = 1

    @property
    def key(self) -> EpisodeKey:
        """Which episode."""
        return EpisodeKey(self.task, self.init_state)

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> EpisodeRecord:
        """The record that `to_line` gave.

        Raises:
            ValueError: not a record.
        """
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(f"not an episode's record: {error}") from error


def digest(actions: NDArray[np.float32]) -> str:
    """SHA-256 of the float32 bytes of actions (steps, A)."""
    return hashlib.sha256(np.ascontiguousarray(actions, dtype="<f4").tobytes()).hexdigest()


class RecordFolder:
    """The folder of one evaluation, new or to be continued.

    Args:
        folder: created if need be.
        settings: what decides the outcomes, as values JSON knows.

    Raises:
        ValueError: the folder holds an evaluation with other settings, or a line that is not a record.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._check_settings(json.loads(json.dumps(dict(settings))))
        self._drop_cut_off_line()
        self.records = {record.key: record for record in read_records(folder)}
        """Finished episodes, in the order in which they finished."""

    def append(self, record: EpisodeRecord, actions: NDArray[np.float32]) -> None:
        """Store a finished episode; it is on the disk when this returns."""
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(actions, dtype=np.float32), allow_pickle=False)
        # The actions first: where the line is, they are.
        write_bytes(actions_path(self.folder, record.key), buffer.getvalue())
        with open(self.folder / EPISODES_FILE, "a", encoding="utf-8") as file:
            file.write(record.to_line())
            file.flush()
            os.fsync(file.fileno())
        self.records[record.key] = record

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS_FILE
        if not path.is_file():
            write_text(path, json.dumps(settings, indent=2) + "\n")
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.folder} holds an evaluation with {name} = {before.get(name)!r}, this one has "
                f"{settings.get(name)!r}; take the same settings to continue it, or another folder"
            )

    def _drop_cut_off_line(self) -> None:
        path = self.folder / EPISODES_FILE
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text and not text.endswith("\n"):
            write_text(path, text[: text.rfind("\n") + 1])


def read_records(folder: str | Path) -> list[EpisodeRecord]:
    """The finished episodes in the folder of an evaluation, in the order in which they finished.

    Raises:
        ValueError: a line that is not a record.
    """
    path = Path(folder) / EPISODES_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    records = []
    # What follows the last line end is being written, or was cut off.
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            records.append(EpisodeRecord.from_line(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def load_actions(folder: str | Path, record: EpisodeRecord) -> NDArray[np.float32]:
    """The executed actions (steps, A) of a finished episode.

    Raises:
        ValueError: the file does not hold the actions that the record tells of.
        FileNotFoundError: there is no such file.
    """
    path = actions_path(folder, record.key)
    actions: NDArray[np.float32] = np.load(path, allow_pickle=False)
    if digest(actions) != record.actions_sha256:
        raise ValueError(f"{path} does not hold the actions of the episode in {EPISODES_FILE}; run it again")
    return actions


def actions_path(folder: str | Path, key: EpisodeKey) -> Path:
    """Where an evaluation's folder has the actions of an episode."""
    return Path(folder) / ACTIONS_FOLDER / f"{key.name}.npy"
