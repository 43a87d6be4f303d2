"""Every registered case, at its ragged edges: clean accesses, and an error that eager low precision has too."""

import itertools

import pytest
import torch

from vat_fast.kernels.proof import flops
from vat_fast.kernels.proof.case import all_cases, random, shapes_only, unwritten
from vat_fast.kernels.proof.report import edge_errors

CASES = [case for case in all_cases() if 80 in case.archs]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_edge_blocks_touch_only_what_is_theirs(case, trace):
    tensors = case.edge()
    with trace({name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}, case.outputs) as report:
        case.launch(tensors)
    report.check()
    assert report.launches


@pytest.mark.parametrize("case", [case for case in CASES if case.reference], ids=lambda case: case.key)
def test_error_is_at_most_twice_eagers(case):
    errors = edge_errors(case)
    assert errors, f"{case.key}: the reference gives none of {case.outputs}"
    for name, (error, eager) in errors.items():
        assert error <= max(2 * eager, 1e-5), f"{name}: relative error {error:.2e}, eager has {eager:.2e}"


def test_cases_look_as_their_instruments_expect():
    assert len({case.key for case in CASES}) == len(CASES)
    for case in CASES:
        edge = case.edge()
        assert set(case.outputs) <= set(edge), case.key
        assert case.useful_bytes > 0, case.key
        assert not case.mma or case.useful_flops > 0, case.key


def test_shapes_only_allocates_without_values():
    assert torch.isnan(unwritten(3)).all()
    assert (random(4, 4) != 0).all()
    with shapes_only():
        assert unwritten(3).shape == (3,)
        assert random(2, 5, dtype=torch.int8).dtype == torch.int8
    assert torch.equal(random(4, seed=3), random(4, seed=3))


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match="no case is registered for op 'nothing'; registered ops: "):
        all_cases("nothing")


@pytest.mark.parametrize("grid", [(9, 16, 16), (1, 16, 16), (4, 3, 2), (500, 2, 1), (128, 1, 3)])
def test_programs_that_differ_are_all_counted(grid):
    """Key blocks and splits of K differ in their work, samples do not."""
    assert {program[:2] for program in flops.sampled(grid)} == set(itertools.product(range(grid[0]), range(grid[1])))
    assert len(flops.sampled(grid)) == grid[0] * grid[1]


def test_of_very_many_programs_a_sample_is_counted():
    programs = flops.sampled((5000, 1, 1))
    assert len(set(programs)) == len(programs) == flops.SAMPLE
    assert all(0 <= first < 5000 for first, *_ in programs)
