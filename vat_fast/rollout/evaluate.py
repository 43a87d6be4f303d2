"""Rollouts of one policy in many simulator processes, and their success rates.

The policy stays in this process; each simulator sends what its robot sees and gets the actions until the next look.
Every prediction is made for one observation alone unless `EvaluationSettings.batched` is set: a matrix product's last
bits depend on how many rows it has, so a batch would make an episode depend on those that run beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vat_fast.rollout.drivers import ChunkPolicy, Driver, ScriptedPolicy
from vat_fast.rollout.episode import SceneFactory
from vat_fast.rollout.messages import Act, Begin, Finished, Look
from vat_fast.rollout.pool import SimulatorPool
from vat_fast.rollout.records import EpisodeKey, EpisodeRecord, RecordFolder, digest
from vat_fast.rollout.schedule import Schedule
from vat_fast.rollout.settings import EvaluationSettings
from vat_fast.rollout.workers import Failed, Lost, Refused

MAX_ATTEMPTS = 2
_GIVE_UP_AFTER = 6  # losses in a row, without one finished episode, say that something is wrong with the machine


class EvaluationError(RuntimeError):
    """Scenes that cannot be made, or simulators that do nothing but die."""


@dataclass(frozen=True)
class EvaluationResult:
    """Every finished episode of an evaluation, in the order of the settings.

    settings: what was evaluated.
    records: episodes that finished, now or in the run that this one continued.
    unfinished: episode -> why; a rerun tries them again.
    resumed: episodes that had finished before.
    seconds: wall time of this run.
    start_seconds: of these, until the first simulator had its scene.
    """

    settings: EvaluationSettings
    records: tuple[EpisodeRecord, ...]
    unfinished: dict[EpisodeKey, str] = field(default_factory=dict)
    resumed: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0

    @property
    def successes(self) -> int:
        """Successful episodes."""
        return sum(record.success for record in self.records)

    @property
    def success_rate(self) -> float:
        """Of the finished episodes; not a number where there are none."""
        return self.successes / len(self.records) if self.records else float("nan")

    @property
    def episodes_per_hour(self) -> float:
        """Of this run: what had finished before does not count."""
        return 3600 * (len(self.records) - self.resumed) / self.seconds if self.seconds else float("nan")

    def of_task(self, task: int) -> list[EpisodeRecord]:
        """The records of one task."""
        return [record for record in self.records if record.task == task]


def evaluate(
    policy: ChunkPolicy | ScriptedPolicy,
    settings: EvaluationSettings,
    *,
    names: Sequence[str],
    scenes: SceneFactory,
    folder: str | Path | None = None,
    description: dict[str, Any] | None = None,
    processes: int = 2,
    timeout: float = 120.0,
    start_timeout: float = 300.0,
    progress: bool = True,
) -> EvaluationResult:
    """Run every episode of `settings` that has not finished yet. `evaluate_libero` names tasks and scenes itself.

    Args:
        policy: predicts here, or is scripted and runs in the simulators.
        settings: which episodes, and how.
        names: of the suite's tasks; the policy is asked by name.
        scenes: makes the scene of a task, in the simulator process.
        folder: where each episode's record and actions are stored as it finishes; an evaluation found there is
            continued. None stores nothing.
        description: of the policy, stored with the settings: a rerun with another one is refused.
        processes: simulators side by side.
        timeout, start_timeout: seconds without a reply after which a simulator counts as hung, the second where it
            has to make a scene first. A dead or hung simulator costs one retry of its episode.
        progress: show a bar.

    Raises:
        EvaluationError: a scene cannot be made, or simulators die without one episode finishing.
        TaskError: the policy does not know a task.
        ValueError: settings that do not fit the policy or the suite, or a folder with another evaluation.
    """
    _check(policy, settings, names)
    store = None if folder is None else RecordFolder(folder, {**(description or {}), **settings.to_dict()})
    run = _Run(policy, settings, names, store)
    resumed = len(run.done)
    script = policy.script if isinstance(policy, ScriptedPolicy) else None
    slots = processes if processes < 1 else max(1, min(processes, len(run.schedule)))
    start = time.perf_counter()
    with (
        SimulatorPool(slots, scenes, settings, script, timeout=timeout, start_timeout=start_timeout) as pool,
        tqdm(total=len(settings.episodes), initial=resumed, unit="episode", disable=not progress) as bar,
    ):
        run.play(pool, bar)
    records = [run.done[key] for key in settings.episodes if key in run.done]
    end = time.perf_counter()
    start_seconds = (run.first_reply or end) - start
    return EvaluationResult(settings, tuple(records), run.unfinished, resumed, end - start, start_seconds)


def _check(policy: ChunkPolicy | ScriptedPolicy, settings: EvaluationSettings, names: Sequence[str]) -> None:
    """Raise one clear error before any simulator starts."""
    beyond = [task for task in settings.tasks if task >= len(names)]
    if beyond:
        raise ValueError(f"{settings.suite} has tasks 0 to {len(names) - 1}, got {beyond[0]}")
    if isinstance(policy, ScriptedPolicy):
        return
    for task in settings.tasks:
        policy.task_id(names[task])
    every = settings.replan_every
    if every is not None and every > policy.chunk_size:
        raise ValueError(f"replan_every {every} is more than the policy's chunk of {policy.chunk_size} actions")
    head = getattr(getattr(getattr(policy, "vat", None), "config", None), "head", "l1")
    if settings.batched and head == "diffusion":
        raise ValueError(
            "a diffusion policy draws each episode's noise alone and cannot be batched; leave out --batched"
        )


@dataclass
class _Playing:
    """An episode under way in a slot."""

    key: EpisodeKey
    driver: Driver | None
    predict_ms: list[float] = field(default_factory=list)
    observe_ms: list[float] = field(default_factory=list)


class _Run:
    """What an evaluation knows while it runs."""

    def __init__(
        self,
        policy: ChunkPolicy | ScriptedPolicy,
        settings: EvaluationSettings,
        names: Sequence[str],
        store: RecordFolder | None,
    ) -> None:
        self.policy, self.settings, self.names, self.store = policy, settings, names, store
        wanted = set(settings.episodes)
        before = {} if store is None else store.records
        self.done = {key: record for key, record in before.items() if key in wanted}
        self.schedule = Schedule(key for key in settings.episodes if key not in self.done)
        self.unfinished: dict[EpisodeKey, str] = {}
        self.first_reply: float | None = None
        """When the first simulator had its scene, by `time.perf_counter`."""
        self._losses: dict[EpisodeKey, int] = {}
        self._losses_in_a_row = 0
        self._playing: dict[int, _Playing] = {}

    def play(self, pool: SimulatorPool, bar: tqdm) -> None:
        """Until every episode is done or given up."""
        for slot in range(len(pool)):
            self._next(pool, slot)
        while self._playing:
            looks: list[tuple[int, Look]] = []
            replies = pool.receive()
            self.first_reply = self.first_reply or time.perf_counter()
            for slot, reply in replies:
                if isinstance(reply, Look):
                    looks.append((slot, reply))
                    continue
                if isinstance(reply, Refused):
                    raise EvaluationError(reply.message)
                if isinstance(reply, Finished):
                    self._finish(slot, reply, bar)
                else:
                    self._lose(pool, slot, reply)
                self._next(pool, slot)
            # One at a time, each simulator goes on as soon as its own actions are there.
            for group in [looks] if self.settings.batched and looks else [[look] for look in looks]:
                self._act(pool, group)

    def _next(self, pool: SimulatorPool, slot: int) -> None:
        key = self.schedule.take(pool.task(slot), [playing.key.task for playing in self._playing.values()])
        if key is None:
            pool.stop(slot)  # its memory may be wanted by the others
            return
        scripted = isinstance(self.policy, ScriptedPolicy)
        driver = None
        if not isinstance(self.policy, ScriptedPolicy):
            driver = Driver(self.policy, key, self.settings)
        self._playing[slot] = _Playing(key, driver)
        pool.send(slot, Begin(key, scripted))

    def _act(self, pool: SimulatorPool, looks: Sequence[tuple[int, Look]]) -> None:
        """Predict for these slots in one forward pass and send them their actions."""
        assert not isinstance(self.policy, ScriptedPolicy)
        episodes = [self._playing[slot] for slot, _ in looks]
        start = time.perf_counter()
        chunks = self.policy.predict(
            [look.observation for _, look in looks],
            [self.names[episode.key.task] for episode in episodes],
            episodes[0].driver.generator if episodes[0].driver else None,
        )
        for (slot, look), episode, chunk in zip(looks, episodes, chunks, strict=True):
            assert episode.driver is not None
            actions = episode.driver.actions(chunk)
            episode.predict_ms.append(_milliseconds(time.perf_counter() - start))
            episode.observe_ms.append(round(look.observe_ms, 2))
            pool.send(slot, Act(actions))

    def _finish(self, slot: int, reply: Finished, bar: tqdm) -> None:
        episode = self._playing.pop(slot)
        self._losses_in_a_row = 0
        record = EpisodeRecord(
            suite=self.settings.suite,
            task=episode.key.task,
            task_name=self.names[episode.key.task],
            init_state=episode.key.init_state,
            seed=self.settings.seed,
            success=reply.success,
            steps=len(reply.actions),
            actions_sha256=digest(reply.actions),
            predict_ms=episode.predict_ms,
            observe_ms=episode.observe_ms,
            step_ms=round(reply.step_ms, 2),
            attempts=1 + self._losses.get(episode.key, 0),
        )
        if self.store is not None:
            self.store.append(record, reply.actions)
        self.done[episode.key] = record
        bar.set_postfix_str(f"{sum(r.success for r in self.done.values())}/{len(self.done)} succeeded", refresh=False)
        bar.update()

    def _lose(self, pool: SimulatorPool, slot: int, reply: Lost | Failed) -> None:
        """Count a lost attempt; the episode gets one more."""
        pool.stop(slot)  # after an exception nobody knows what state the scene is in
        episode = self._playing.pop(slot)
        reason = reply.reason if isinstance(reply, Lost) else reply.message
        self._losses[episode.key] = self._losses.get(episode.key, 0) + 1
        self._losses_in_a_row += 1
        if self._losses_in_a_row >= _GIVE_UP_AFTER:
            raise EvaluationError(
                f"{self._losses_in_a_row} simulators in a row were lost without one finished episode, the last with: "
                f"{reason}"
            )
        if self._losses[episode.key] < MAX_ATTEMPTS:
            tqdm.write(f"{episode.key.name}: {reason}; once more")
            self.schedule.put_back(episode.key)
        else:
            tqdm.write(f"{episode.key.name}: {reason}; given up")
            self.unfinished[episode.key] = reason


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 2)
