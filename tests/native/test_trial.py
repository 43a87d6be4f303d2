"""Which operators a CPU gets is measured once and then stays."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vat_fast.native import library, trial
from vat_fast.ops import NativeOps, TorchOps, choose

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A build's place without a trial."""
    monkeypatch.setattr(library, "path", lambda: tmp_path / "native-0.so")
    trial.speed.cache_clear()
    yield tmp_path
    trial.speed.cache_clear()


def test_the_first_answer_stays(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for measured in (1.5, 0.5):
        monkeypatch.setattr(trial, "_measure", lambda measured=measured: measured)
        assert trial.speed() == 1.5
        assert choose("auto", torch.device("cpu")).ops is NativeOps
        assert "1.50 times PyTorch's speed in a trial" in choose("auto", torch.device("cpu")).reason
        trial.speed.cache_clear()
    assert [path.name for path in elsewhere.iterdir()] == ["native-0.trial.json"]


def test_of_two_processes_the_first_one_decides(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_while_another_finishes() -> float:
        (elsewhere / "native-0.trial.json").write_text('{"speed": 2.0}')
        return 0.5

    monkeypatch.setattr(trial, "_measure", measure_while_another_finishes)
    assert trial.speed() == 2.0
    assert len(list(elsewhere.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "path", lambda: tmp_path / "missing" / "native-0.so")
    monkeypatch.setattr(trial, "_measure", lambda: 1.25)
    trial.speed.cache_clear()
    assert trial.speed() == 1.25
    trial.speed.cache_clear()


def test_slower_operators_are_not_taken(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_measure", lambda: 0.8)
    choice = choose("auto", torch.device("cpu"))
    assert choice.ops is TorchOps
    assert choice.reason == "the compiled operators have 0.80 times PyTorch's speed in a trial on this machine"
    assert choose("native", torch.device("cpu")).ops is NativeOps


def test_it_measures_whatever_mode_it_is_called_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_ROUNDS", 1)
    threads = torch.get_num_threads()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), FakeTensorMode():
        assert 0.01 < trial._measure() < 100
    assert torch.get_num_threads() == threads
