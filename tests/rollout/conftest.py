"""Real scenes for the tests that need them; skipped where the simulator is not installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vat_fast.rollout.install_check import SimulatorError, check_simulator
from vat_fast.rollout.render import RenderSettings
from vat_fast.rollout.scene import Scene


@pytest.fixture(scope="session")
def simulator() -> None:
    """Skips without LIBERO and its libraries."""
    try:
        check_simulator()
    except SimulatorError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cheese_scene(simulator: None) -> Iterator[Scene]:
    """libero_object: "pick up the cream cheese and place it in the basket", small images."""
    with Scene("object", 1, size=48, render=RenderSettings.named("fast")) as scene:
        yield scene
