"""What a simulator process does: it keeps the scene of one task and plays episodes in it as it is told."""

from __future__ import annotations

import traceback
from collections.abc import Iterable

from numpy.typing import ArrayLike

from vat_fast.rollout.episode import Episode, SceneFactory, SceneLike, Script
from vat_fast.rollout.messages import Act, Begin, Finished, Look
from vat_fast.rollout.settings import EvaluationSettings
from vat_fast.rollout.workers import Failed


class Simulator:
    """Answers one command after the other; a scene stays for all episodes of its task.

    Args:
        factory: makes the scene of a task.
        settings: of the evaluation.
        script: of scripted episodes, where there are any.
    """

    def __init__(self, factory: SceneFactory, settings: EvaluationSettings, script: Script | None = None) -> None:
        self._factory, self._settings, self._script = factory, settings, script
        self._scene: SceneLike | None = None
        self._task: int | None = None
        self._episode: Episode | None = None

    def __call__(self, command: Begin | Act) -> Look | Finished | Failed:
        """The reply. An exception in the middle of an episode becomes one, too: then another try may help.

        Raises:
            ValueError, OSError, ImportError: the episode cannot begin.
        """
        actions: Iterable[ArrayLike] = self._begin(command) if isinstance(command, Begin) else command.actions
        episode = self._episode
        assert episode is not None
        ends = isinstance(command, Begin) and command.scripted
        try:
            episode.act(actions)
            return episode.result() if ends or episode.over else episode.look()
        except Exception:
            return Failed(traceback.format_exc(limit=-3))

    def _begin(self, command: Begin) -> Iterable[ArrayLike]:
        """Start an episode; what is executed before its first reply: nothing, or all that the script says."""
        scene = self._scene_of(command.key.task)
        self._episode = Episode(scene, command.key, self._settings)
        if not command.scripted:
            return ()
        if self._script is None:
            raise ValueError("a scripted episode was asked for, but this simulator was started without a script")
        return self._script(scene, self._settings.seed)

    def _scene_of(self, task: int) -> SceneLike:
        if self._task != task:
            if self._scene is not None:
                self._scene.close()
                self._scene, self._task = None, None
            self._scene, self._task = self._factory(task), task
        assert self._scene is not None
        return self._scene
