"""The ahead-of-time gate: the checked-in baseline is current and keeps every promise; planted faults are caught.

Compiling everything takes minutes: `python -m vat_fast.kernels.proof.aot --all`. Here each launch is specialised for
each target and its digest compared with the baseline's, and a sample is compiled again.
"""

import pytest

from vat_fast.kernels import configs, gemm, low_precision
from vat_fast.kernels.proof import aot, configurations, planted, worker
from vat_fast.kernels.proof.case import all_cases
from vat_fast.kernels.proof.configurations import gate_cases

UPDATE = "run python -m vat_fast.kernels.proof.aot --update and look at the difference"


@pytest.fixture(scope="module")
def baseline():
    return aot.load_baseline()


def _row(**changes):
    loop = {"instructions": 100, "mma": 8, "load_bytes": {"16": 64}, "bulk": 0, "narrow_share": 0.0}
    row = {
        "kernel": "_kernel", "programs": 8, "digest": "0", "warps": 4, "registers": 64, "stack": 0, "local": 0,
        "shared": 4096, "tensor_memory": 0, "blocks": 4, "limit": "warps", "instructions": 400, "mma": 8,
        "mma_kind": "HMMA", "narrow_share": 0.0, "loop": loop,
    }  # fmt: skip
    return {"planted/sound": {"sm_80": {"launches": [row | changes], "issued_flops": 0.0}}}


def test_baseline_describes_the_kernels_of_this_tree(baseline):
    current = aot.digests(gate_cases())
    stored = {
        (key, target): [row["digest"] for row in entry["launches"]]
        for key, targets in baseline.items()
        for target, entry in targets.items()
    }
    stale = sorted({key for key in current if current[key] != stored.get(key)})
    assert not stale, f"{len(stale)} rows of the baseline are stale, {stale[0]} first: {UPDATE}"
    gone = sorted(set(stored) - set(current))
    assert not gone, f"the baseline has rows of cases that are no more, {gone[0]} first: {UPDATE}"


def test_baseline_keeps_every_promise(baseline):
    assert aot.broken_promises(baseline, gate_cases()) == []


def test_a_sample_compiles_to_what_the_baseline_says(baseline):
    cases = all_cases()
    sample = [(cases[0].key, 80), (cases[len(cases) // 2].key, 90), (cases[-1].key, 100)]
    compiled = worker.run("compile", sample)
    for key, arch in sample:
        assert compiled[key, arch] == baseline[key][aot.target_name(arch)]["launches"]


PLANTED = {
    "sound": None,
    "spill": "spills",
    "narrow": "narrow accesses",
    "no tensor core": "no tensor-core instruction",
    "padding": "issues 2.00 times the useful flops",
    "crash": "the process died",
    "after the crash": None,
}


def test_planted_faults_are_caught_and_sound_kernels_pass():
    table, compiled = aot.measure(planted.CASES, workers=1, module=planted.__name__)
    assert len(compiled) == len(planted.CASES) == len(PLANTED)
    for case in planted.CASES:
        broken = aot.broken_promises(table, [case])
        message = PLANTED[case.name]
        if message is None:
            assert broken == []
        else:
            assert broken
            assert all(message in line for line in broken), broken


@pytest.mark.parametrize(
    ("table", "dtype"),
    [
        (gemm.CONFIGS, "bf16"),
        (gemm.GROUPED_CONFIGS, "bf16"),
        (low_precision.CONFIGS, "int8"),
        (low_precision.GROUPED_CONFIGS, "int8"),
    ],
    ids=["bf16", "bf16 + 8 bits", "int8", "int8 + 8 bits"],
)
def test_every_shipped_configuration_has_a_case(table, dtype):
    for arch, rules in table.items():
        shapes = [shape for where, shape in configurations._rows(table, dtype) if where == arch]
        compiled = [configs.pick(table, arch, dtype=dtype, **shape) for shape in shapes]
        for conditions, config in rules:
            if conditions.get("dtype", dtype) == dtype:
                assert config in compiled, f"{arch}: {conditions}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": 200 * 1024}, "more than a block may"),
        ({"blocks": 1}, "1 block"),
        ({"stack": 8}, "spills"),
        ({"mma": 0}, None),
    ],
)
def test_broken_promise_is_named(changes, message):
    broken = aot.broken_promises(_row(**changes), planted.CASES[:1])
    assert len(broken) == (message is not None)
    assert all(message in line for line in broken)


def test_missing_row_is_caught():
    assert "no row" in aot.broken_promises({}, planted.CASES[:1])[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": 69}, "registers 64 -> 69"),
        ({"shared": 4097}, "shared memory"),
        ({"blocks": 3}, "blocks per multiprocessor 4 -> 3"),
        ({"loop": _row()["planted/sound"]["sm_80"]["launches"][0]["loop"] | {"instructions": 104}}, "hot loop"),
    ],
)
def test_growth_is_caught(changes, message):
    assert aot.growth(_row(), _row(registers=68)) == []
    (line,) = aot.growth(_row(), _row(**changes))
    assert message in line


def test_baseline_survives_writing(tmp_path):
    aot.save_baseline(_row(), tmp_path / "baseline.json")
    assert aot.load_baseline(tmp_path / "baseline.json") == _row()


def test_baseline_of_another_triton_is_refused(tmp_path):
    path = tmp_path / "baseline.json"
    path.write_text('{"triton": "2.0.0", "cases": {}}')
    with pytest.raises(RuntimeError, match=r"made with Triton 2\.0\.0"):
        aot.load_baseline(path)
