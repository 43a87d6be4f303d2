"""The trial that chooses a CPU's executor: real timings of a shortened model, kept for the next start."""

import json
from pathlib import Path

import pytest
import torch

from vat_fast import VAT, VATConfig
from vat_fast.frozen import executor_trial
from vat_fast.frozen.cpu import candidates, cpu_executor

CONFIG = VATConfig.from_preset("vit-tiny", num_views=1, image_size=64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for answers."""
    monkeypatch.setattr("vat_fast.native.library.cache_folder", lambda: tmp_path)
    return tmp_path


def test_all_executors_are_timed_once_and_the_answer_is_kept(cache: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    choice = cpu_executor("fp32", CONFIG)
    assert torch.equal(state, torch.get_rng_state()), "a trial must not move the caller's random numbers"
    assert "timing executors for this model on this processor, once" in capsys.readouterr().err
    (path,) = cache.glob("executors-*.json")
    kept = json.loads(path.read_text())
    assert list(kept["ms"]) == candidates("fp32")
    assert all(0 < ms < 1000 for ms in kept["ms"].values())
    assert kept["of"]["threads"] == torch.get_num_threads()
    assert choice.executor == executor_trial.choose(kept["ms"])
    assert choice.reason.startswith("2 layers took native ")

    kept["ms"] = {name: 5.0 + 5.0 * (name != "onednn") for name in kept["ms"]}
    path.write_text(json.dumps(kept))
    frozen = VAT(CONFIG).freeze()
    assert capsys.readouterr().err == ""
    assert frozen.target.executor == "onednn"
    assert frozen.explain().endswith("Run by onednn: 2 layers took native 10 ms, onednn 5 ms, openvino 10 ms.")
    assert VAT(CONFIG).freeze(executor="torch").explain().endswith("Run by torch: as asked.")


def test_the_answer_depends_on_the_model_the_precision_and_the_threads(cache: Path) -> None:
    keys = {
        json.dumps(executor_trial._conditions(config, dtype, ["onednn", "openvino"]), sort_keys=True)
        for config in (CONFIG, CONFIG.replace(num_views=2), CONFIG.replace(width=384, num_heads=6))
        for dtype in ("fp32", "bf16")
    }
    assert len(keys) == 6
    deeper = executor_trial._conditions(CONFIG.replace(depth=20, num_layers=19), "fp32", ["onednn"])
    assert deeper == executor_trial._conditions(CONFIG, "fp32", ["onednn"]), "depth changes nothing"


def test_less_memory_wins_within_the_noise() -> None:
    assert executor_trial.choose({"native": 10.4, "onednn": 12.0, "openvino": 10.0}) == "native"
    assert executor_trial.choose({"native": 10.6, "onednn": 12.0, "openvino": 10.0}) == "openvino"
    assert executor_trial.choose({"native": 20.0, "onednn": 10.0, "openvino": 9.9}) == "onednn"


@pytest.mark.skipif(len(candidates("int8")) < 2, reason="nothing to choose from here")
def test_integers_are_timed_with_samples_of_the_trials_own(cache: Path) -> None:
    choice = cpu_executor("int8", CONFIG)
    (path,) = cache.glob("executors-*.json")
    assert list(json.loads(path.read_text())["ms"]) == candidates("int8")
    assert choice.reason.startswith("2 layers took native ")


def test_without_a_folder_to_write_to_each_process_measures(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vat_fast.native.library.cache_folder", lambda: cache / "file" / "below")
    (cache / "file").write_text("in the way")
    assert cpu_executor("fp32", CONFIG).executor in candidates("fp32")


@pytest.mark.parametrize(
    "changes",
    [
        {"action_stream": "last_layer"},
        {"head": "diffusion", "proprio_dim": 8},
        {"task_conditioning": "none"},
        {"action_width_divisor": 2},
        {"depth": 2},
    ],
)
def test_every_kind_of_model_can_be_shortened(changes: dict) -> None:
    config = CONFIG.replace(**changes, num_layers=None)
    steps = executor_trial._steps(executor_trial.shortened(config), "fp32", ["torch"])
    actions = steps["torch"]()
    assert actions.shape == (1, config.chunk_size, config.action_dim)
    assert actions.isfinite().all()
    assert actions.std() > 0
