"""The command line: what a newcomer types first, and what it says when something is wrong."""

from pathlib import Path

import pytest
import torch

from benchmarks.unit_statistics import unit_statistics
from benchmarks.variants import randomise
from vat_fast import VAT, VATConfig
from vat_fast.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small saved policy with LIBERO's task table."""
    from vat_fast.observation import ImageProcessing
    from vat_fast.policy import Policy, PolicyConfig

    vat = VAT(VATConfig.from_preset("vit-tiny", depth=3, image_size=64))
    randomise(vat, 0)
    config = PolicyConfig.released("libero_object", image=ImageProcessing(image_size=64), statistics_key=None)
    folder = tmp_path_factory.mktemp("policy")
    Policy(vat.eval(), config, unit_statistics(7)).save_pretrained(folder)
    return folder


def test_act_prints_the_policys_actions(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    status, out, _ = run(capsys, "act", checkpoint, "--task", "pick up the milk and place it in the basket")
    assert status == 0
    by_name = [line for line in out.splitlines() if line.startswith(("[", " ["))]
    assert len(by_name) == 8
    _, out, _ = run(capsys, "act", checkpoint, "--task", "7", "--steps", "1")
    assert [line for line in out.splitlines() if line.startswith(("[", " ["))] == by_name
    _, out, _ = run(capsys, "act", checkpoint, "--task", "0", "--steps", "1")
    assert [line for line in out.splitlines() if line.startswith(("[", " ["))] != by_name


def test_act_takes_image_files(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    from PIL import Image

    for name, colour in (("a.png", (250, 10, 10)), ("b.jpg", (10, 250, 10))):
        Image.new("RGB", (100, 37), colour).save(tmp_path / name)
    images = ("--image", tmp_path / "a.png", "--image", tmp_path / "b.jpg")
    status, out, _ = run(capsys, "act", checkpoint, "--task", "0", "--steps", "1", *images)
    assert status == 0
    assert "2 images (37x100, 37x100)" in out


def test_explain_counts_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "--preset", "siglip2-so400m", "--params")
    assert status == 0
    for figure in ("1,269.4", "412.4", "411.6", "430.2", "15.2"):
        assert figure in out
    status, out, _ = run(capsys, "explain", "--preset", "vit-tiny", "--views", "3")
    assert "3 views" in out


def test_doctor_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert f"torch {torch.__version__}" in out
    assert ("GPU 0" in out) == torch.cuda.is_available()


WRONG = [
    (("act", "{checkpoint}", "--task", "fly to the moon"), "fly to the moon"),
    (("act", "{checkpoint}", "--task", "12"), "12"),
    (("act", "{checkpoint}", "--task", "0", "--image", "x.png"), "the model has 2 views, got 1 --image"),
    (("act", "{checkpoint}", "--task", "0", "--image", "x.png", "--image", "x.png"), "no image file x.png"),
    (("act", "/nowhere/at/all", "--task", "0"), "/nowhere/at/all"),
    (("convert", "/nowhere/at/all", "nowhere-else"), "/nowhere/at/all"),
    (("explain", "--checkpoint", "/nowhere/at/all"), "/nowhere/at/all"),
    (("explain", "--views", "9"), "num_views must be 1 to 4"),
    (("explain", "--dtype", "int16"), "the triton executor has no int16"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a)[:40] for a, _ in WRONG])
def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, _, err = run(capsys, *(a.format(checkpoint=checkpoint) for a in arguments))
    assert status == 2
    assert message in err
    assert err.startswith("vat-fast ")
    assert err.count("\n") == 1
