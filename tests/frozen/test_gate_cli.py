"""`vat-fast gate`: on recorded observations and on made ones, what it accepts, refuses and cannot use."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.unit_statistics import unit_statistics
from benchmarks.variants import VARIANTS, random_batch, randomise, small_config
from tests.frozen.test_passes import arguments, models
from tests.train import makers
from vat_fast import VAT, VATConfig
from vat_fast.cli import main
from vat_fast.frozen.gate_inputs import plant_outliers, realistic_samples
from vat_fast.gate_cli import recorded_samples
from vat_fast.observation import ImageProcessing
from vat_fast.policy import Policy, PolicyConfig
from vat_fast.tasks import TaskTable

IMAGE = ImageProcessing(image_size=32)


@pytest.fixture(scope="module")
def policy() -> Policy:
    vat = VAT(VATConfig.from_preset("vit-tiny", width=64, num_heads=1, depth=3, image_size=32, num_tasks=2))
    randomise(vat, 0)
    tasks = TaskTable({task: index for index, task in enumerate(makers.TASKS)})
    return Policy(vat.eval(), PolicyConfig(image=IMAGE, tasks=tasks), unit_statistics(7))


@pytest.fixture(scope="module")
def folder(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved policy, LIBERO's HDF5 and the same packed."""
    folder = tmp_path_factory.mktemp("gate")
    policy.save_pretrained(folder / "policy")
    makers.write_libero(folder / "demos.hdf5", makers.make_demos(4))
    assert main(["data", "pack", str(folder / "demos.hdf5"), str(folder / "packed"), "--no-ops", "keep"]) == 0
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["gate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("source", ["demos.hdf5", "packed"])
def test_recorded_observations(capsys: pytest.CaptureFixture[str], folder: Path, source: str) -> None:
    pytest.importorskip("openvino")
    where = ("--observations", folder / source, "--samples", "3", "--calibration", "6")
    status, out, _ = run(capsys, folder / "policy", "--dtype", "int8", *where, "--json")
    found = json.loads(out)
    (report,) = found["reports"]
    assert status == (0 if found["accepted"] else 1)
    assert report["samples"] == 3
    assert report["dtype"] == "int8"
    assert len(report["cosines"]) == 2
    assert 0 < report["relative_error"] < 0.2
    # Robot units are the normalised ones here, so their mean over dimensions is the mean error.
    assert sum(report["robot_mean_error"]) / 7 == pytest.approx(report["mean_error"], rel=1e-3)


def test_a_packed_file_and_its_source_give_the_same_samples(policy: Policy, folder: Path) -> None:
    """Read twice, as rendered and as packed: one pipeline. JPEG came before or in it, by two encoders."""
    sets = [recorded_samples(folder / name, policy, (5, 3), seed=1) for name in ("demos.hdf5", "packed")]
    for raw, packed in zip(*sets, strict=True):
        assert len(raw) == len(packed)
        for one, other in zip(raw, packed, strict=True):
            assert torch.equal(one["task_id"], other["task_id"])
            assert float((one["pixels"] - other["pixels"]).abs().mean()) < 0.05
    # Other steps, or another way up, would be as far apart as any two pictures.
    assert float((sets[0][0][0]["pixels"] - sets[0][0][1]["pixels"]).abs().mean()) > 0.3


def test_the_sets_share_no_observation(policy: Policy, folder: Path) -> None:
    first, second = recorded_samples(folder / "packed", policy, (15, 15))
    seen = {sample["pixels"].numpy().tobytes() for sample in first}
    assert len(seen) == 15
    assert not seen & {sample["pixels"].numpy().tobytes() for sample in second}


def test_made_observations_and_refusal(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    status, out, _ = run(capsys, folder / "policy", "--dtype", "fp32", "--samples", "4")
    assert status == 0
    assert "made pictures: fp32" in out
    assert "made pictures, outlier channels planted: fp32" in out
    assert out.count("accepted") == 2
    # Attention to huge scores jumps from key to key: no lossy precision can follow.
    vat = VAT.from_pretrained(folder / "policy")
    with torch.no_grad():
        for block in vat.action_blocks:
            block.query.weight *= 300
    Policy(vat, PolicyConfig.load(folder / "policy" / "policy.json"), unit_statistics(7)).save_pretrained(tmp_path)
    # In int8, which every processor rounds to; bfloat16 is float32 on some.
    status, out, _ = run(capsys, tmp_path, "--dtype", "int8", "--samples", "4")
    assert status == 1
    assert "REFUSED" in out
    assert ", the limit is " in out


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "diffusion" not in name])
@torch.inference_mode()
def test_planted_outliers_change_no_action(variant: str) -> None:
    config = small_config("dinov2-large" if "D/2" in variant else "siglip2-so400m", variant)
    vat, _ = models(config)
    args = arguments(config, 2)
    before = vat(*args)
    projections = [block.proj for block in (*vat.vision_blocks, *vat.action_blocks) if hasattr(block, "proj")]
    columns = [proj.weight.norm(dim=0) for proj in projections]
    plant_outliers(vat)
    assert torch.equal(vat(*args), before)
    for proj, before_D in zip(projections, columns, strict=True):
        # So what they multiply has become as much larger.
        assert int(proj.weight.norm(dim=0).isclose(before_D / 64).sum()) == 3


def test_made_pictures_are_varied_and_repeatable() -> None:
    config = small_config("siglip2-so400m", "proprio")
    first, again, others = (realistic_samples(config, 8, seed) for seed in (0, 0, 1))
    for one, same, other in zip(first, again, others, strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["pixels"], other["pixels"])
        assert one["pixels"].shape == random_batch(config, 1, 0)["pixels"].shape
        assert one["pixels"].abs().max() < 3
    assert first[3]["proprio"].abs().eq(1).all()


def test_what_cannot_be_used_is_one_line(
    capsys: pytest.CaptureFixture[str], policy: Policy, folder: Path, tmp_path: Path
) -> None:
    saved, packed = folder / "policy", folder / "packed"
    for arguments_, message in (
        ((saved, "--observations", tmp_path / "none"), "none does not exist"),
        ((saved, "--observations", tmp_path), "is neither a packed dataset nor LIBERO's HDF5"),
        (
            (saved, "--dtype", "bf16", "--observations", packed, "--samples", "1000"),
            "1000 observations are asked for, but there are",
        ),
        ((saved, "--samples", "0"), "--samples and --calibration must be at least 1, got 0 and 32"),
    ):
        status, _, err = run(capsys, *arguments_)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    other = Policy(policy.vat, PolicyConfig(image=IMAGE, tasks=TaskTable({"dance": 0})), policy.statistics)
    with pytest.raises(ValueError, match="unknown task"):
        recorded_samples(packed, other, (2,))
    blind = PolicyConfig(image=IMAGE)
    with pytest.raises(ValueError, match="no task table"):
        recorded_samples(folder / "demos.hdf5", Policy(policy.vat, blind, policy.statistics), (2,))
    with pytest.raises(ValueError, match="power of two"):
        plant_outliers(VAT(small_config("vit-tiny", "VAT")), 60)
