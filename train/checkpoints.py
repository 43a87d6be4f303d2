"""Checkpoints of a run: the files of all ranks, and a manifest without which they do not count.

checkpoints/step-00001000/
  manifest.json                    what there is, written last: the marker of a whole checkpoint
  run.json                         step and whatever else the run wants to know again
  rank-0.safetensors, ...          tensors of each rank (a moving average)
  mp_rank_00_model_states.pt, ...  DeepSpeed's
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from vat_fast.files import write_text

MANIFEST, RUN = "manifest.json", "run.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read."""


class Checkpoints:
    """The checkpoints of one run. All methods but `newest` are called on all ranks together.

    Args:
        folder: that holds them.
        keep_last: newest ones kept.
        keep_every: steps whose multiples are kept for good; None: no others.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every

    def save(self, engine: Any, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint; it appears whole, or not at all, and then older ones are pruned.

        Args:
            engine: of DeepSpeed.
            step: optimiser steps done.
            state: what JSON can hold, the same on every rank.
            tensors: this rank's.

        Raises:
            CheckpointError: on all ranks, where any could not write; older checkpoints stay.
        """
        rank, world = engine.global_rank, engine.world_size
        target = self.folder / f"step-{step:08d}"
        partial = self.folder / f"{target.name}.partial"
        problem = ""
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _barrier()
        try:
            engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False)
            save_file(
                {name: value.contiguous() for name, value in tensors.items()}, partial / f"rank-{rank}.safetensors"
            )
        except (OSError, RuntimeError) as error:
            problem = f"rank {rank} could not write step {step}: {error}"
        problems = [text for text in _gather(problem) if text]
        if not problems and rank == 0:
            try:
                write_text(partial / RUN, json.dumps({**state, "step": step}, indent=1))
                files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
                zero = {"stage": engine.zero_optimization_stage(), "world_size": world}
                write_text(partial / MANIFEST, json.dumps({"step": step, **zero, "files": files}, indent=1))
                if target.exists():
                    shutil.rmtree(target)
                partial.rename(target)
            except OSError as error:
                problem = f"step {step} could not be finished: {error}"
        problems += [text for text in _gather(problem) if text and text not in problems]
        if problems:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError("; ".join(problems))
        if rank == 0:
            self._prune()
        return target

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        whole = self.whole()
        return whole[-1] if whole else None

    def whole(self) -> list[Path]:
        """All whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        names = sorted(path for path in self.folder.iterdir() if re.fullmatch(r"step-\d+", path.name))
        return [path for path in names if _is_whole(path)]

    def load(self, engine: Any, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Put a checkpoint into the engine; returns the run's state and this rank's tensors.

        Raises:
            CheckpointError: not a whole checkpoint, or of another number of ranks.
        """
        path = Path(path)
        if not _is_whole(path):
            raise CheckpointError(f"{path} is no whole checkpoint: it has no {MANIFEST} that fits its files")
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["world_size"] != engine.world_size:
            raise CheckpointError(
                f"{path} is of {manifest['world_size']} ranks, this run has {engine.world_size}: resume with as many"
            )
        found, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
        if found is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {path}")
        state = json.loads((path / RUN).read_text(encoding="utf-8"))
        return state, load_file(path / f"rank-{engine.global_rank}.safetensors")

    def _prune(self) -> None:
        for path in self.whole()[: -self.keep_last]:
            if self.keep_every is None or int(path.name[5:]) % self.keep_every:
                shutil.rmtree(path)


def _is_whole(path: Path) -> bool:
    """Whether there is a manifest and every file is as long as it says."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _gather(text: str) -> list[str]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts
