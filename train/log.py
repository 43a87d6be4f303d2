"""Where a run's numbers go: the console, log.jsonl, TensorBoard, Weights & Biases; and how fast the run is.

`log.jsonl` has one JSON object per line with `step`, `kind` ("train", "validation", ...), `time` (UTC) and figures. A
resumed run drops what a killed one wrote behind its checkpoint, so that every step stands there once.
"""

from __future__ import annotations

import datetime
import importlib
import json
import math
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from tqdm import tqdm

from vat_fast.config import ConfigError
from vat_fast.files import write_text
from vat_fast.kernels.static_model import DEVICES

LOG_FILE = "log.jsonl"
_WANDB_FILE = "wandb_run.txt"


class RunLog:
    """Everything a run reports, on its first rank; on the others every call does nothing.

        log = RunLog(folder, total=1000, start=0)
        log.advance(step)                         # every step: the progress bar
        log.write(step, "train", {"loss": 0.1})   # now and then
        log.close()

    On a terminal a bar shows rate and time left; elsewhere every record is one plain line that has them.

    Args:
        folder: of the run.
        total: optimiser steps of the run.
        start: steps done before, by the checkpoint that the run goes on from.
        is_main: False on all ranks but the first.
        tensorboard: also write event files into `folder/tensorboard`.
        wandb: also log to this Weights & Biases project; a resumed run continues its run there.
        config: what Weights & Biases shows as the run's configuration.

    Raises:
        ConfigError: TensorBoard or Weights & Biases is asked for and not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        total: int,
        start: int = 0,
        *,
        is_main: bool = True,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.total, self._start, self._is_main = total, start, is_main
        self._begin = time.perf_counter()
        self._writers: list[Callable[[int, dict[str, float]], None]] = []
        self._closers: list[Callable[[], Any]] = []
        self._bar: tqdm[Any] | None = None
        if not is_main:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        forget_after(path, start)
        if tensorboard:
            self._add_tensorboard(folder)
        if wandb is not None:
            self._add_wandb(folder, wandb, config)
        self._file = path.open("a", encoding="utf-8")
        self._closers.append(self._file.close)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
            self._closers.append(self._bar.close)

    def advance(self, step: int) -> None:
        """So many steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Record figures: numbers, lists of numbers or None, under their names.

        Lines go to the disk at once. A number that is not finite becomes a text in log.jsonl, which stays JSON.
        """
        if not self._is_main:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {"step": step, "kind": kind, "time": now, **values}
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        self._file.flush()
        scalars = {f"{kind}/{name}": value for name, value in _scalars(values)}
        for write in self._writers:
            write(step, scalars)
        self.say(f"{self._progress(step)} {kind}: {_line(values)}")

    def say(self, text: str) -> None:
        """One line for the reader of the console."""
        if not self._is_main:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Finish all files."""
        while self._closers:
            self._closers.pop()()

    def _progress(self, step: int) -> str:
        text = f"step {step}/{self.total}"
        if self._bar is not None or step <= self._start:
            return text
        seconds = time.perf_counter() - self._begin
        rate = (step - self._start) / seconds
        left = tqdm.format_interval((self.total - step) / rate)
        return f"{text} ({100 * step / self.total:.0f} %, {rate:.3g} steps/s, {left} left)"

    def _add_tensorboard(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard needs the package tensorboard, which is not installed: pip install tensorboard, or "
                "set log.tensorboard to false"
            ) from error
        # A restart hides what a killed run wrote behind its checkpoint.
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=self._start + 1 if self._start else None)

        def write(step: int, scalars: dict[str, float]) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        self._writers.append(write)
        self._closers.append(writer.close)

    def _add_wandb(self, folder: Path, project: str, config: Mapping[str, Any] | None) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                "log.wandb needs the package wandb, which is not installed: pip install wandb, or set log.wandb to null"
            ) from error
        known = folder / _WANDB_FILE
        if not known.exists():
            write_text(known, uuid.uuid4().hex + "\n")
        run_id = known.read_text(encoding="utf-8").strip()
        run = wandb.init(
            project=project, id=run_id, resume="allow", name=folder.name, dir=str(folder), config=dict(config or {})
        )
        self._writers.append(lambda step, scalars: run.log(scalars, step=step))
        self._closers.append(run.finish)


def forget_after(path: Path, step: int) -> None:
    """Drop the records of later steps, and half a line at the end, from a log.jsonl; no file is fine."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = "".join(line for line in text.splitlines(keepends=True) if line.endswith("\n") and _step(line) <= step)
    if kept != text:
        write_text(path, kept)


def read_log(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a log.jsonl, those of one kind where it is named; half a line at the end is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if (record := _parse(line)) is not None]
    return [record for record in records if kind is None or record["kind"] == kind]


class Speedometer:
    """How fast the steps since the last `read` were, over all ranks.

    Args:
        flops_per_sample: floating-point operations of training on one sample (`estimate.training_flops`).
        peak_flops: of this rank's device, per second (`peak_flops`), or None where it is not known.
        world_size: ranks.
        device: of this rank.
    """

    def __init__(
        self, flops_per_sample: float, peak_flops: float | None, world_size: int, device: torch.device
    ) -> None:
        self._flops, self._peak, self._world, self._device = flops_per_sample, peak_flops, world_size, device
        self._reset()

    def add(self, seconds: Mapping[str, float], samples: int) -> None:
        """One step: time spent in each part of it on this rank, and this rank's samples."""
        self._steps += 1
        self._samples += samples
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value

    def read(self) -> dict[str, float | None]:
        """Figures per step since the last call; call it on every rank, after at least one `add`.

        Returns:
            `samples_per_second` of all ranks; `step_seconds` and `<part>_seconds` per step, of the slowest rank;
            `data_share`, the part `data` of the whole; `mfu`, model operations per second over the devices' peak, or
            None; `memory_gib`, the peak on the fullest rank: of the accelerator, or the process's resident memory.
        """
        if not self._steps:
            raise ValueError("there was no step since the last reading")
        total = sum(self._seconds.values())
        own = {**self._seconds, "step total": total, "memory": memory_bytes(self._device)}
        worst = max_over_ranks(own, self._device)
        slowest = worst.pop("step total")
        memory = worst.pop("memory")
        rate = self._world * self._samples / slowest
        figures: dict[str, float | None] = {"samples_per_second": rate, "step_seconds": slowest / self._steps}
        figures.update({f"{name}_seconds": value / self._steps for name, value in worst.items()})
        figures["data_share"] = worst.get("data", 0.0) / slowest
        figures["mfu"] = None if self._peak is None else self._flops * rate / (self._peak * self._world)
        figures["memory_gib"] = memory / 2**30
        self._reset()
        return figures

    def _reset(self) -> None:
        self._steps = self._samples = 0
        self._seconds: dict[str, float] = {}


def max_over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Each value's maximum over all ranks; every rank must give the same names."""
    numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return dict(zip(values, numbers.tolist(), strict=True))


def memory_bytes(device: torch.device) -> float:
    """Peak memory so far: of an accelerator what PyTorch allocated there, on a CPU what this process had resident."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that the device could do at best in matrix products, or None where that is not known.

    Of an accelerator the vendor's figure for dense bf16, by its name. Of a CPU, what a large product by PyTorch reaches
    here with the threads that are set: the best of several, half a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).replace("H200", "H100")
        known = [part for key, part in DEVICES.items() if key in name]
        return known[0].tflops * 1e12 if known and dtype != torch.float32 else None
    if device.type != "cpu":
        return None
    size, best = 1024, math.inf
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number, those of lists as name/0, name/1, ..."""
    for name, value in values.items():
        if isinstance(value, list | tuple):
            yield from _scalars({f"{name}/{index}": inner for index, inner in enumerate(value)})
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def _line(values: Mapping[str, Any]) -> str:
    """The single numbers of a record, for the console."""
    parts = []
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
        elif isinstance(value, str):
            parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)


def _step(line: str) -> float:
    record = _parse(line)
    return math.inf if record is None else record["step"]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "step" in record and "kind" in record else None
