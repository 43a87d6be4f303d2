"""docs/kernels.md says what the baseline says, and its bounds are rooflines."""

import dataclasses

import pytest
import torch

from vat_fast.kernels.proof import aot, report
from vat_fast.kernels.proof.case import all_cases


def test_document_is_up_to_date():
    text = report.render(all_cases(), aot.load_baseline(), report.load_errors())
    assert report.DOCUMENT.read_text() == text, "run python -m vat_fast.kernels.proof.report and commit the result"


def test_errors_cover_every_case_and_keep_the_rule():
    errors = report.load_errors()
    assert set(errors) == {case.key for case in all_cases()}
    for case in all_cases():
        assert bool(errors[case.key]) == (case.reference is not None)
        for name, (error, eager) in errors[case.key].items():
            assert error <= max(2 * eager, 1e-5), f"{case.key} {name}"


def _entry(kind):
    return {"issued_flops": 0.0, "launches": [{"mma_kind": kind}]}


@pytest.mark.parametrize(
    ("flops", "moved", "kind", "expected", "limit"),
    [
        (989e6, 0, "HGMMA.64x64x16.F32.BF16", 1.0, "compute"),
        (989e6, 0, "QGMMA.64x64x32.F32.E4M3.E4M3", 0.5, "compute"),
        (0, 3.35e6, "", 1.0, "memory"),
    ],
)
def test_bound_is_the_larger_of_two_times(flops, moved, kind, expected, limit):
    case = dataclasses.replace(all_cases()[0], useful_flops=int(flops), useful_bytes=int(moved))
    time, what = report.bound_us(case, _entry(kind), "H100")
    assert time == pytest.approx(expected, rel=5e-3)
    assert what == limit


def test_edge_error_sees_a_wrong_kernel():
    def launch(tensors):
        tensors["out"].copy_(tensors["x"] * 1.1)

    case = dataclasses.replace(
        all_cases()[0],
        edge=lambda: {"x": torch.ones(8, dtype=torch.bfloat16), "out": torch.zeros(8, dtype=torch.bfloat16)},
        launch=launch,
        reference=lambda tensors: {"out": tensors["x"]},
        outputs=("out",),
    )
    error, eager = report.edge_errors(case)["out"]
    assert eager == 0
    assert error == pytest.approx(0.1, rel=0.05)
