"""Our own format: saving, loading without a second copy, and one clear error for everything that can be wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.variants import VARIANTS, randomise, small_config
from vat_fast import VAT, ConfigError
from vat_fast.checkpoint import CheckpointError


def saved(folder: Path, variant: str = "VAT") -> VAT:
    vat = VAT(small_config("dinov2-large", variant)).eval()
    randomise(vat, 0)
    vat.save_pretrained(folder)
    return vat


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(tmp_path: Path, variant: str) -> None:
    vat = saved(tmp_path, variant)
    again = VAT.from_pretrained(tmp_path)
    assert again.config == vat.config
    assert not again.training
    for (name, a), (_, b) in zip(vat.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad, name


def test_dtype(tmp_path: Path) -> None:
    vat = saved(tmp_path / "fp32")
    low = VAT.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    low.save_pretrained(tmp_path / "bf16")
    assert {p.dtype for p in VAT.from_pretrained(tmp_path / "bf16").parameters()} == {torch.bfloat16}
    assert torch.equal(low.pos_embed, vat.pos_embed.bfloat16())


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    """Weights are a private memory map: an optimiser may change them, and the file stays as it is."""
    saved(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    vat = VAT.from_pretrained(tmp_path).train()
    with torch.no_grad():
        for p in vat.parameters():
            p.add_(1.0)
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


MEASURE = """
import resource, sys, torch
from vat_fast import VAT
import vat_fast.checkpoint, vat_fast.released
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.zeros(1)
before = peak()
vat = VAT.from_pretrained(sys.argv[1])
total = sum(p.double().sum().item() for p in vat.parameters())   # touches every page
print(peak() - before)
"""


@pytest.mark.parametrize("layout", ["ours", "released"])
def test_loading_holds_the_weights_once(tmp_path: Path, layout: str) -> None:
    """Peak memory of loading and reading all weights is the file's size, not twice it."""
    from vat_fast import VATConfig
    from vat_fast.released import export

    vat = VAT(VATConfig.from_preset("siglip2-so400m", depth=4)).bfloat16()
    if layout == "ours":
        vat.save_pretrained(tmp_path)
    else:
        export(vat, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 200e6
    run = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    largest_parameter_in_fp64 = 4608 * 1152 * 8
    assert int(run.stdout) < 1.1 * size + 2 * largest_parameter_in_fp64 + 20e6


def test_writes_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vat = saved(tmp_path)
    import vat_fast.checkpoint as checkpoint

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, "VAT")
    monkeypatch.undo()
    again = VAT.from_pretrained(tmp_path)
    assert torch.equal(again.pos_embed, vat.pos_embed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def wrong(folder: Path | str) -> str:
    with pytest.raises((CheckpointError, ConfigError, FileNotFoundError)) as error:
        VAT.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_wrong_folders(tmp_path: Path) -> None:
    assert "nothing-here" in wrong(tmp_path / "nothing-here")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in wrong(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    assert "is a file" in wrong(tmp_path / "file")


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = wrong("someone/no-such-vat")
    assert "someone/no-such-vat" in message
    assert "offline" in message


def test_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vat = saved(tmp_path / "object" / "best")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path if name == "someone/vats" else tmp_path / "object" / "best")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("someone/vat-libero", "someone/vats/object/best"):
        assert torch.equal(VAT.from_pretrained(name).pos_embed, vat.pos_embed)
    assert asked == [("someone/vat-libero", ["*"]), ("someone/vats", ["object/best/*"])]
    assert "has no folder nothing" in wrong("someone/vats/nothing")


def test_wrong_files(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    tensors = {name: t.clone() for name, t in load_file(path).items()}  # the file under the map is about to change

    path.write_bytes(good[: len(good) // 2])
    assert "damaged or not a safetensors file" in wrong(tmp_path)
    path.write_bytes(b"garbage" * 100)
    assert "damaged or not a safetensors file" in wrong(tmp_path)
    save_file({name: t for name, t in tensors.items() if name != "pos_embed"}, path)
    assert "lacks 1 of" in wrong(tmp_path)
    save_file({**tensors, "more": torch.zeros(1), "and.more": torch.zeros(1)}, path)
    assert "has unexpected 2 of" in wrong(tmp_path)
    save_file({**tensors, "pos_embed": torch.zeros(1, 2, 3)}, path)
    assert "pos_embed is (1, 2, 3), expected (1, 16, 128)" in wrong(tmp_path)

    path.write_bytes(good)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_views"', '"n_views"'))
    assert "did you mean 'num_views'" in wrong(tmp_path)
    config.write_text(text[:50])
    assert "not JSON" in wrong(tmp_path)


def test_saved_weights_are_as_readable_as_other_files(tmp_path: Path) -> None:
    VAT(small_config("vit-tiny", next(iter(VARIANTS)))).save_pretrained(tmp_path)
    (tmp_path / "other").touch()
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes
