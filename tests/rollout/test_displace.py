"""Displaced scenes: the same for everybody, clear of neighbours, with stacks kept together."""

from __future__ import annotations

import numpy as np
import pytest

from vat_fast.rollout.displace import CLEARANCE
from vat_fast.rollout.geometry import Bounds, SceneGeometry
from vat_fast.rollout.scene import Scene


def test_same_scene_for_everybody(cheese_scene: Scene) -> None:
    cheese_scene.reset(2, displace_cm=6, displace_seed=1)
    state, moved = cheese_scene.sim_state(), cheese_scene.displacement
    cheese_scene.reset(3)
    cheese_scene.settle(3)
    cheese_scene.reset(2, displace_cm=6, displace_seed=1)
    assert np.array_equal(cheese_scene.sim_state(), state)
    assert cheese_scene.displacement == moved
    assert set(moved) == {"cream_cheese_1", "basket_1"}
    assert all(0 < abs(value) <= 0.06 for shift in moved.values() for value in shift)
    cheese_scene.reset(2, displace_cm=6, displace_seed=2)
    assert cheese_scene.displacement != moved


def test_moves_what_it_says_and_nothing_else(cheese_scene: Scene) -> None:
    geometry = SceneGeometry(cheese_scene.env)
    cheese_scene.reset(2)
    before = {name: geometry.position(name) for name in geometry.movable}
    cheese_scene.reset(2, displace_cm=6, displace_seed=1)
    for name, place in before.items():
        shift = (*cheese_scene.displacement.get(name, (0, 0)), 0)
        np.testing.assert_allclose(geometry.position(name) - place, shift, atol=1e-12)


def test_keeps_clear_of_neighbours(cheese_scene: Scene) -> None:
    geometry = SceneGeometry(cheese_scene.env)
    for seed in range(4):
        cheese_scene.reset(0, displace_cm=15, displace_seed=seed)
        cheese_scene.settle(10)
        bounds = {name: geometry.bounds(name) for name in geometry.movable}
        for moved in cheese_scene.displacement:
            for other in set(bounds) - {moved}:
                assert bounds[moved].gap(bounds[other]) > CLEARANCE - 0.005, (moved, other)


def test_stacks_move_together_and_fixtures_stay(simulator: None) -> None:
    with Scene("spatial", 3, cameras=()) as scene:  # the bowl on the cookie box
        geometry = SceneGeometry(scene.env)
        scene.reset(0)
        cabinet = geometry.position("wooden_cabinet_1")
        scene.reset(0, displace_cm=6)
        moved = scene.displacement
        assert moved["akita_black_bowl_1"] == moved["cookies_1"] != moved["plate_1"]
        assert np.array_equal(geometry.position("wooden_cabinet_1"), cabinet)
        scene.settle(20)
        assert frozenset({"akita_black_bowl_1", "cookies_1"}) in geometry.touching()


def test_distance_is_checked(cheese_scene: Scene) -> None:
    with pytest.raises(ValueError, match="displaced by 0 to 15 cm, got 40"):
        cheese_scene.reset(0, displace_cm=40)


def test_gap_between_boxes() -> None:
    box = Bounds(np.array([0.0, 0, 0]), np.array([1.0, 1, 1]))
    assert box.gap(box.moved(np.array([4.0, 5.0]))) == pytest.approx(5.0)
    assert box.gap(box.moved(np.array([1.5, 0.2]))) == pytest.approx(0.5)
    assert box.gap(box.moved(np.array([0.5, 0.2]))) == pytest.approx(-0.5)
