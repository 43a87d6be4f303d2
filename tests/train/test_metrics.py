"""Errors per dimension and step, against NumPy."""

import numpy as np
import pytest
import torch

from vat_fast.actions import compute_statistics
from vat_fast.train.metrics import ActionErrors, robot_units


def test_tables_over_batches_with_padding() -> None:
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(50, 3))
    statistics = compute_statistics("d", [actions], mask=[True, True, False])
    errors = ActionErrors()
    differences = []
    for size in (4, 7):
        prediction, target = (torch.from_numpy(rng.normal(size=(size, 5, 3))).float() for _ in range(2))
        valid = torch.ones(size, dtype=torch.bool)
        valid[-1] = False
        prediction[-1] = float("nan")
        errors.add(prediction, target, valid)
        differences.append(np.abs(prediction.double().numpy() - target.double().numpy())[:-1])
    table = errors.result(statistics)
    expected = np.concatenate(differences).mean(0)
    assert table.samples == 9
    np.testing.assert_allclose(table.l1_table, expected, rtol=1e-12)
    scale = (statistics.action.q99 - statistics.action.q01) / 2
    scale[2] = 1
    np.testing.assert_allclose(robot_units(statistics), scale, rtol=1e-5)
    np.testing.assert_allclose(table.robot_l1_table, expected * scale, rtol=1e-5)
    figures = table.to_dict()
    np.testing.assert_allclose(figures["l1_per_dimension"], expected.mean(0))
    np.testing.assert_allclose(figures["l1_per_step"], expected.mean(1))
    assert figures["l1"] == pytest.approx(expected.mean())
    errors.reset()
    with pytest.raises(ValueError, match="add a batch"):
        errors.result()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ActionErrors().add(torch.zeros(2, 5, 3), torch.zeros(2, 5, 1))
