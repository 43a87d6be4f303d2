"""The process that simulates: it keeps the scene of one task and does what it is told over a pipe."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection

from numpy.typing import ArrayLike

from vat_fast.rollout.episode import Episode, SceneFactory, SceneLike, Script
from vat_fast.rollout.messages import Act, Begin, Failed, Finished, Look, Refused
from vat_fast.rollout.settings import EvaluationSettings


def simulate(
    connection: Connection, factory: SceneFactory, settings: EvaluationSettings, script: Script | None = None
) -> None:
    """Serve `Begin` and `Act` until the other end closes or sends None; the target of a simulator process."""
    # Ctrl-C goes to every process of the terminal; the evaluation ends its simulators itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = _Server(factory, settings, script)
    while True:
        try:
            command = connection.recv()
            if command is None:
                break
            connection.send(server.answer(command))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            break
    server.close()


class _Server:
    """Answers one command after the other; a scene stays for all episodes of its task."""

    def __init__(self, factory: SceneFactory, settings: EvaluationSettings, script: Script | None) -> None:
        self._factory, self._settings, self._script = factory, settings, script
        self._scene: SceneLike | None = None
        self._task: int | None = None
        self._episode: Episode | None = None

    def answer(self, command: Begin | Act) -> Look | Finished | Refused | Failed:
        """The reply; exceptions become one."""
        try:
            if isinstance(command, Begin):
                try:
                    scene = self._scene_of(command.key.task)
                    episode = Episode(scene, command.key, self._settings)
                    script = self._start_script(scene) if command.scripted else None
                except (ValueError, OSError, ImportError) as error:
                    return Refused(str(error))
                self._episode = episode
                if script is not None:
                    episode.act(script)
                    return episode.result()
                return episode.look()
            assert self._episode is not None
            self._episode.act(command.actions)
            return self._episode.result() if self._episode.over else self._episode.look()
        except Exception:
            return Failed(traceback.format_exc(limit=-3))

    def close(self) -> None:
        """Free the scene."""
        if self._scene is not None:
            self._scene.close()
            self._scene, self._task = None, None

    def _start_script(self, scene: SceneLike) -> Iterator[ArrayLike]:
        if self._script is None:
            raise ValueError("a scripted episode was asked for, but this simulator was started without a script")
        return self._script(scene, self._settings.seed)

    def _scene_of(self, task: int) -> SceneLike:
        if self._task != task:
            self.close()
            self._scene, self._task = self._factory(task), task
        assert self._scene is not None
        return self._scene
