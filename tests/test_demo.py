"""The demo is a list of commands: each must be one that its program understands, on files that an earlier one makes."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vat_fast import cli
from vat_fast.config import VATConfig
from vat_fast.train.config import load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


def test_every_command_is_understood(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vat-fast` commands are parsed as the command line does it, up to where the work would start."""
    parsed = []
    monkeypatch.setattr(cli.argparse.ArgumentParser, "parse_args", _remember(parsed, cli.argparse.ArgumentParser))
    for step in demo.steps():
        program, *words = shlex.split(step.command)
        if program == "vat-fast":
            with pytest.raises(_ParsedError):
                cli.main(words)
    assert [args.command for args in parsed] == ["collect", *["eval"] * 4]
    assert {args.init_states for args in parsed[1:]} == {tuple(range(30, 50))}
    assert not set(parsed[0].init_states) & set(parsed[1].init_states), "evaluated where it was taught"


def test_training_starts_from_the_shipped_eyes_and_reads_what_was_collected(demo: ModuleType) -> None:
    config = load_config(ROOT / demo.CONFIG)
    assert (ROOT / str(config.model.vision) / "vision.safetensors").is_file()
    assert config.data.paths == [str(demo.OUT / "demonstrations")]
    assert config.output == str(demo.OUT / "training")
    model = VATConfig.from_preset(config.model.preset, **config.model.options)
    assert model.image_size == config.data.policy["simulated_size"]


def test_a_done_step_is_not_done_again_and_a_failed_one_says_so(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    step = demo.Step("something", f"{sys.executable} -c pass", done)
    demo.run(step)
    assert done.exists()
    demo.run(demo.Step("something", "false", done))
    assert "done before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="failed with status 1; the same command goes on"):
        demo.run(demo.Step("something else", "false", tmp_path / "never"))


class _ParsedError(Exception):
    """Stops a command after its arguments were understood."""


def _remember(parsed: list, parser: type) -> object:
    original = parser.parse_args

    def parse_args(self: object, *arguments: object) -> None:
        parsed.append(original(self, *arguments))
        raise _ParsedError

    return parse_args
