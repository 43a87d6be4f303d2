"""A whole run in this process, one rank: logs, checkpoints, exact resume, the exported policy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vat_fast import VAT
from vat_fast.config import ConfigError
from vat_fast.policy import Policy
from vat_fast.train import launch
from vat_fast.train.adapters import LoRAOptions
from vat_fast.train.config import Config, config_from_dict, load_config
from vat_fast.train.datasets import prepare_paths
from vat_fast.train.estimate import training_flops
from vat_fast.train.launch import Place
from vat_fast.train.log import read_log
from vat_fast.train.main import main, parse_arguments
from vat_fast.train.run import Run

SIZE = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "num_heads": 3, "mlp_hidden": 96, "num_tasks": 2}


def make_config(folder: Path, name: str, **train: Any) -> Config:
    return config_from_dict(
        {
            "output": str(folder / name),
            "model": {"preset": "vit-tiny", "weights": "random", "options": SIZE},
            "data": {
                "paths": [str(folder / "demos")],
                "packed": str(folder / "packed"),
                "synthetic": {"demos": 4, "steps": 16, "image_size": 32},
                "workers": 0,
                "holdout": 0.25,
            },
            "train": {"steps": 6, "global_batch": 8, "lr": 1e-3, "precision": "fp32", **train},
            "validate": {"every": 3},
            "checkpoint": {"every": 2, "keep_last": 2},
            "log": {"every": 1, "tensorboard": False},
        }
    )


@pytest.fixture
def place(one_rank: torch.device) -> Place:
    return Place(0, 0, 1, one_rank)


def test_a_run_leaves_a_policy_that_acts(
    tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vat_fast.train.run.peak_flops", lambda device, dtype: 1e9)
    config = make_config(tmp_path, "run", ema=0.9, lora={"rank": 2})
    run = Run(config, place)
    vat = run.trainer.vat
    trained = sum(p.numel() for p in vat.parameters() if p.requires_grad)
    assert f" {trained / 1e6:.3f} M parameters in " in capsys.readouterr().err
    assert run.train() == 0
    folder = tmp_path / "run"
    assert load_config(folder / "config.yaml") == config.resolve(1)
    steps = read_log(folder / "log.jsonl", "train")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "l1_per_dimension", "l1_per_step", "lr", "grad_norm", "samples_per_second", "data_share"):
        assert name in steps[0]
    assert {"data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "mfu"} <= set(steps[0])
    flops = training_flops(vat.config, LoRAOptions(rank=2))
    assert steps[0]["mfu"] == pytest.approx(flops * steps[0]["samples_per_second"] / 1e9)
    assert [record["step"] for record in read_log(folder / "log.jsonl", "validation")] == [3, 6]
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000006"]
    policy = Policy.from_pretrained(folder / "policy")
    image = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    actions = policy.act(dict.fromkeys(policy.config.cameras, image), "touch the red disc")
    assert actions.shape == (8, 7)
    assert set(np.unique(actions[:, -1])) <= {-1.0, 1.0}


def test_two_rounds_share_statistics_through_a_whole_run(tmp_path: Path, place: Place) -> None:
    first, second = make_config(tmp_path, "one").to_dict(), make_config(tmp_path, "two").to_dict()
    second["data"] |= {"paths": [str(tmp_path / "more")], "synthetic": {**second["data"]["synthetic"], "seed": 5}}
    paths = [str(prepare_paths(config_from_dict(values), is_first=True)[0]) for values in (first, second)]
    first["data"] |= {"paths": paths, "synthetic": None, "statistics": "first"}
    assert Run(config_from_dict(first), place).train() == 0
    for name in ("demos", "more"):
        assert [r["step"] for r in read_log(tmp_path / "one" / "log.jsonl", f"validation {name}")] == [3, 6]
    policy = Policy.from_pretrained(tmp_path / "one" / "policy")
    assert policy.config.statistics_key == "demos"


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_config(tmp_path, "whole", ema=0.9)
    assert Run(whole, place).train() == 0
    parted = make_config(tmp_path, "parted", ema=0.9)
    answers = iter([False, False, True])  # after the third step, for which no checkpoint is due
    monkeypatch.setattr(launch, "stop_requested", lambda: next(answers))
    assert Run(parted, place).train() == launch.STOPPED
    monkeypatch.setattr(launch, "stop_requested", lambda: False)
    torch.manual_seed(99)  # nothing may depend on it
    assert Run(parted, place).train() == 0

    def losses(name: str, kind: str) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in read_log(tmp_path / name / "log.jsonl", kind)]

    assert losses("parted", "train") == losses("whole", "train")
    assert losses("parted", "validation") == losses("whole", "validation")
    ours, theirs = (VAT.from_pretrained(tmp_path / name / "policy").state_dict() for name in ("parted", "whole"))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_fresh_start_overwrites_nothing(tmp_path: Path, place: Place) -> None:
    config = make_config(tmp_path, "run", steps=2)
    assert Run(config, place, "never").train() == 0
    with pytest.raises(ConfigError, match="is there already: a fresh start would overwrite that run"):
        Run(config, place, "never")


def test_data_that_do_not_fit_the_model_are_named(tmp_path: Path, place: Place) -> None:
    for options, message in (
        ({"num_views": 3}, "the model sees 3 views, .* gives 2"),
        ({"action_dim": 14}, "has actions of 7 numbers, the model 14: set model.options.action_dim"),
        ({"proprio_dim": 9}, "the model reads 9 numbers of proprioception, .* has 8"),
        ({"num_tasks": 1}, "has a task with id 1, the model knows 1 tasks"),
    ):
        values = make_config(tmp_path, "run").to_dict()
        values["model"]["options"] = {**SIZE, **options}
        with pytest.raises(ConfigError, match=message):
            Run(config_from_dict(values), place)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "a.yaml", "--set", "train.lr=1", "seed=2", "--set", "a.b=3", "--local_rank=1"]
    args = parse_arguments(arguments)
    assert (args.config, args.set, args.resume) == (Path("a.yaml"), ["train.lr=1", "seed=2", "a.b=3"], "auto")
    path = tmp_path / "c.yaml"
    path.write_text("output: runs/x\ntrain: {stepps: 3}\n")
    assert main(["--config", str(path)]) == 2
    assert "unknown key train.stepps (did you mean train.steps?)" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
