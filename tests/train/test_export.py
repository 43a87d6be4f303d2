"""A run's checkpoints as policies, in both layouts, without the run's data (bit for bit: test_resume.py)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vat_fast import VAT, released
from vat_fast.config import ConfigError
from vat_fast.policy import Policy
from vat_fast.train.config import Config, config_from_dict
from vat_fast.train.export import export, main, released_folder
from vat_fast.train.launch import Place
from vat_fast.train.run import Run

OPTIONS = {"image_size": 32, "depth": 3, "num_tasks": 2}


def make_config(folder: Path, **options: object) -> Config:
    return config_from_dict(
        {
            "output": str(folder / "run"),
            "model": {"preset": "vit-tiny", "weights": "random", "options": {**OPTIONS, **options}},
            "data": {
                "paths": [str(folder / "demos")],
                "synthetic": {"demos": 2, "steps": 12, "image_size": 32},
                "workers": 0,
                "holdout": 0.0,
            },
            "train": {"steps": 4, "global_batch": 4, "lr": 1e-3, "precision": "fp32"},
            "validate": {"every": None},
            "checkpoint": {"every": 2, "released": True},
            "log": {"tensorboard": False},
        }
    )


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, one_rank: torch.device) -> Path:
    """The folder of a run that is done, a copy of one made once; its data are gone."""
    made = tmp_path_factory.getbasetemp() / "export"
    if not made.exists():
        assert Run(make_config(made), Place(0, 0, 1, one_rank)).train() == 0
    shutil.copytree(made / "run", tmp_path / "run", ignore=shutil.ignore_patterns("data"))
    return tmp_path / "run"


def act(folder: Path) -> np.ndarray:
    policy = Policy.from_pretrained(folder, frozen=False)
    image = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    return policy.act(dict.fromkeys(policy.config.cameras, image), "touch the blue disc")


def test_both_layouts_act_alike(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), str(tmp_path / "ours"), "--step", "2"]) == 0
    assert main([str(run), str(tmp_path / "theirs--2_ckpt"), "--step", "2", "--released"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"the policy of {run}/checkpoints/step-00000002 is in {tmp_path}/ours",
        f"the policy of {run}/checkpoints/step-00000002 is in {tmp_path}/theirs--2_ckpt",
    ]
    files = sorted(path.name for path in (tmp_path / "theirs--2_ckpt").glob("*.pt"))
    assert files == ["action_head--2_checkpoint.pt", "vision_backbone--2_checkpoint.pt"]
    ours = act(tmp_path / "ours")
    np.testing.assert_array_equal(act(tmp_path / "theirs--2_ckpt"), ours)
    # At its end the run wrote both itself, since checkpoint.released is set.
    last = act(run / "policy")
    np.testing.assert_array_equal(act(released_folder(run, 4)), last)
    assert not np.array_equal(ours, last)


def test_what_the_authors_files_do_not_tell_is_said(run: Path, tmp_path: Path) -> None:
    config = run / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "vision_gelu": "tanh"}))
    *_, note = export(run, tmp_path / "out", as_released=True)
    assert note == ("the authors' files do not tell vision_gelu: it is 'tanh' here and would be taken for 'erf'")


def test_mistakes_are_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        text = capsys.readouterr().err
        assert text.startswith("export: ")
        assert text.count("\n") == 1
        return text

    out = tmp_path / "out"
    assert "is no run's folder: it has no config.yaml, config.json, " in said(tmp_path, out)
    assert "is no run's folder" in said(tmp_path / "nothing", out)
    assert "has no whole checkpoint of step 3; it has 2, 4" in said(run, out, "--step", 3)
    assert "is there already and not an empty folder" in said(run, run)
    newest = run / "checkpoints" / "step-00000004"
    weights = newest / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert f"{newest} is damaged" in said(run, out)
    assert main([str(run), str(tmp_path / "older"), "--step", "2"]) == 0
    model = VAT.from_pretrained(tmp_path / "older").config
    narrow = dataclasses.replace(model, action_width_divisor=2, action_scale="action_head_dim")
    (run / "config.json").write_text(narrow.to_json())
    assert "they scale by the vision head width" in said(run, out, "--step", 2, "--released")
    assert "action_tokens is (1, 56, 192), expected (1, 56, 96)" in said(run, out, "--step", 2)
    shutil.rmtree(run / "checkpoints")
    assert "has no whole checkpoint" in said(run, out)
    assert not out.exists()


def test_a_layout_that_cannot_be_written_stops_the_run_before_it_begins(tmp_path: Path, one_rank: torch.device) -> None:
    config = make_config(tmp_path, action_width_divisor=2, action_scale="action_head_dim")
    with pytest.raises(ConfigError, match=r"checkpoint\.released: this model cannot be written .* set it to false"):
        Run(config, Place(0, 0, 1, one_rank))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_authors_layout_is_read_as_what_was_trained(run: Path) -> None:
    loaded = released.load(released_folder(run, 4))
    assert loaded.step == 4
    state = VAT.from_pretrained(run / "policy").state_dict()
    for name, value in loaded.vat.state_dict().items():
        assert torch.equal(value, state[name]), name
