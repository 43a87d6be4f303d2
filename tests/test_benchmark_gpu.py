"""The GPU benchmark's logic, as far as a machine without a GPU can show it; and the retuner's."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_one_sentence_and_status_2():
    done = run("benchmarks.gpu")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "needs a CUDA or ROCm device" in line
    assert not done.stdout


def test_dry_run_checks_and_writes_no_speeds(tmp_path):
    out = tmp_path / "result.json"
    done = run(
        "benchmarks.gpu", "--device", "cpu", "--dry-run", "--ops", "patch_embed", "layers", "step", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["conditions"]["dry_run"]
    for key in ("commit", "date", "seed", "versions", "device"):
        assert key in result["conditions"]
    assert {row["op"] for row in result["rows"]} == {"patch_embed", "layers", "step"}
    for row in result["rows"]:
        assert row["passed"]
        assert 0 < row["error"] <= (0.1 if row["case"].endswith("int8") else 2 * row["eager_error"])
        assert row["timings"] == []
    assert " us" not in done.stdout
    assert "| patch_embed/so400m B1 V2 | passed |" in done.stdout


LOGIC = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import contextlib, dataclasses, io, torch
from vat_fast.kernels import configs, gemm, retune, static_model, tables, timing
from vat_fast.kernels.proof import interpreter
from vat_fast.kernels.proof.case import all_cases
from benchmarks import gpu
interpreter.install()

# Nothing to run on: one sentence, status 2.
for main, arguments, message in (
    (gpu.main, ["--device", "cpu"], "add --dry-run"),
    (retune.main, [], "needs a CUDA or ROCm device"),
):
    errors, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        assert main(arguments) == 2
    assert message in errors.getvalue() and errors.getvalue().count("\\n") == 1 and not printed.getvalue()

# A kernel that computes something else is caught, not timed, and fails the run.
sound = all_cases("patch_embed")[0]
def broken(t):
    sound.launch(t)
    t["out"][0, 0] += 1
row = gpu.check(dataclasses.replace(sound, launch=broken), sound.edge())
assert not row.passed and "more than twice eager's" in row.message, row
def unwritten(t): pass
row = gpu.check(dataclasses.replace(sound, launch=unwritten), sound.edge())
assert not row.passed and "not finite" in row.message, row
try:
    gpu.measure(sound, row, {}, 10)
except ValueError as error:
    assert "it is not timed" in str(error)
else:
    raise AssertionError("a failed row was timed")

# Other providers compute the same thing, and a packed layout keeps its gaps on the device.
compared = 0
for op in ("vision_attention", "cross_attention"):
    for case in all_cases(op):
        tensors = gpu.on_device(case.edge(), "cpu")
        assert all(value.stride() == tensors[name].stride() for name, value in case.edge().items())
        for name, call in gpu.attention_providers(case, tensors).items():
            truth = case.reference(gpu.widened(tensors))["out"]
            assert gpu.relative_error(call(), truth) < 1e-2, (case.key, name)
            compared += 1
assert compared >= 4

# The table to paste, from rows as a GPU would give them.
ours, eager = timing.summarise("vat_fast", [10.0, 12.0, 11.0, 30.0]), timing.summarise("eager", [20.0, 22.0])
assert ours.median_us == 11.5 and ours.p20_us < ours.median_us < ours.p80_us and ours.samples == 4
row = gpu.Row("gemm", "x", 1e-3, 2e-3, True, "", 23 * 10**6, 46 * 10**3, [ours, eager])
bare = gpu.Row("gemm", "y", None, None, False, "broke")
text = gpu.markdown({"rows": [dataclasses.asdict(row), dataclasses.asdict(bare)]})
assert "| gemm/x | 1.0e-03 / 2.0e-03 | 11.5 | 21.0 |" in text and "| 2.0 | 4 |" in text, text
assert "| gemm/y | broke | - | - | - | - | - |" in text, text

# The retuner: the fastest that runs wins, a table is written that the launcher reads, and its origin is noted.
device = static_model.DEVICES["H100"]
def time(name, M, N, K, blocks):
    if blocks.BLOCK_M > 64:
        raise RuntimeError("does not compile")
    return abs(blocks.BLOCK_N - 64) + blocks.SPLIT_K
rows = dict(retune.retuned(device, time, ["LINEAR"]))
assert all(row[4] == 64 and row[7] == 1 for row in rows["LINEAR"]), rows
source = retune.source(rows, 90, "a card, a day")
scope = {}
exec(source, scope)
assert scope["MEASURED"] == {90: "a card, a day"} and scope["LINEAR"][90] == rows["LINEAR"]
assert scope["LINEAR"][80] == tables.LINEAR[80] and scope["QUANT_LINEAR"] == tables.QUANT_LINEAR
assert configs.pick({90: configs.rules(scope["LINEAR"][90])}, 90, M=56, N=1152, K=1152)["BLOCK_N"] == 64
def refuse(blocks):
    raise RuntimeError("does not compile")
try:
    retune.fastest([static_model.choose(64, 64, 64, 2, device)], refuse)
except RuntimeError as error:
    assert "no configuration ran" in str(error)
else:
    raise AssertionError("nothing ran and something won")

# What it times is checked first: both calls run, and a wrong result is refused.
blocks = static_model.Blocks(32, 32, 32, 8, 2, 4, 2)
assert retune.linear_call(33, 40, 96, blocks, "cpu")().shape == (33, 40)
assert retune.quant_linear_call(33, 40, 96, blocks, "cpu")().shape == (33, 40)
try:
    retune._check(torch.ones(2, 2), torch.full((2, 2), 1.1, dtype=torch.float64), blocks)
except RuntimeError as error:
    assert "wrong result" in str(error)
else:
    raise AssertionError("a wrong result was accepted")
print("all held")
"""


def test_logic_of_the_benchmark_and_the_retuner():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOGIC], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "all held", done.stderr
