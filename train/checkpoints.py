"""Checkpoints of a run: the files of all ranks, and a manifest without which they do not count.

checkpoints/step-00001000/
  manifest.json                    what there is, with lengths and SHA-256: the marker of a whole checkpoint
  run.json                         step and whatever else the run wants to know again
  rank-0.safetensors, ...          tensors of each rank (a moving average) and its random generators
  mp_rank_00_model_states.pt, ...  DeepSpeed's, which are pickles and opened as data alone (plain_load.py)

Everything is written into `step-00001000.partial`, read back, and renamed in one step.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from vat_fast.files import write_text
from vat_fast.train.plain_load import UnsafeFileError, check_data_only, data_only

MANIFEST, RUN = "manifest.json", "run.json"
_PARTIAL, _UNIVERSAL = ".partial", ".universal"
_TORCH_RANDOM, _DEVICE_RANDOM = "random/torch", "random/device"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read."""


class Checkpoints:
    """The checkpoints of one run. All methods but `newest` and `whole` are called on all ranks together.

    With several machines the folder must be one that all of them see.

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
            CheckpointError: on all ranks, where any could not write; older checkpoints stay, nothing partial does.
        """
        rank = engine.global_rank
        target = self.folder / f"step-{step:08d}"
        partial = target.with_name(target.name + _PARTIAL)
        try:
            with _together(f"step {step} could not be begun"):
                if rank == 0:
                    self._remove_leftovers()
                    partial.mkdir(parents=True)
            with _together(f"step {step} could not be written") as problems:
                with _collecting(engine, problems):
                    engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False)
                _save_rank(partial / rank_file(rank), tensors)
                if rank == 0:
                    write_text(partial / RUN, json.dumps({**state, "step": step}, indent=1))
            with _together(f"step {step} could not be read back"):
                sums = _check_share(partial, rank, engine.world_size)
            files = {name: entry for part in _gather(sums) for name, entry in part.items()}
            with _together(f"step {step} could not be finished"):
                if rank == 0:
                    manifest = {"step": step, **_layout(engine), "files": dict(sorted(files.items()))}
                    write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
                    _sync(partial / MANIFEST)
                    if target.exists():
                        shutil.rmtree(target)
                    partial.rename(target)
                    _sync(self.folder)
        except CheckpointError:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
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
        found = [path for path in self.folder.iterdir() if re.fullmatch(r"step-\d+", path.name) and _is_whole(path)]
        return sorted(found, key=_step_of)

    def load(self, engine: Any, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Put a checkpoint into a fresh engine, with every rank's random generators.

        At the same number of ranks and kind of sharding the run goes on bit for bit. ZeRO-1 and 2 may be exchanged,
        and with them the number of ranks may change, for which DeepSpeed's universal checkpoint is made.

        Returns:
            The run's state, and this rank's tensors; with another number of ranks those of all ranks.

        Raises:
            CheckpointError: not a whole checkpoint, a damaged one, or one that this engine cannot take.
        """
        path = Path(path)
        rank, world = engine.global_rank, engine.world_size
        manifest = read_manifest(path)
        _check_layout(path, manifest, _layout(engine))
        verify(path, manifest, rank, world)
        is_same = manifest["world_size"] == world
        try:
            with data_only():
                if is_same:
                    found, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
                else:
                    found = _load_universal(engine, path)
        except UnsafeFileError as error:
            raise CheckpointError(f"{path} was not loaded: {error}") from error
        if is_same:
            tensors = _load_rank(path / rank_file(rank), restore=True)
        else:
            tensors = {}
            for other in range(manifest["world_size"]):
                tensors.update(_load_rank(path / rank_file(other), restore=other == rank))
        if found is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {path}")
        if not is_same and rank >= manifest["world_size"]:
            torch.manual_seed(manifest["step"] * 65_537 + rank)
        return json.loads((path / RUN).read_text(encoding="utf-8")), tensors

    def _prune(self) -> None:
        for path in self.whole()[: -max(1, self.keep_last)]:
            if self.keep_every is None or _step_of(path) % self.keep_every:
                # A folder half removed has no manifest, and so is no checkpoint.
                (path / MANIFEST).unlink()
                shutil.rmtree(path, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """What killed runs left: partial folders, and checkpoints that were being pruned."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                ours = re.fullmatch(rf"step-\d+({re.escape(_PARTIAL)}|{re.escape(_UNIVERSAL)})?", path.name)
                # A kill just before the renaming leaves a partial folder with its manifest.
                if ours and (ours[1] or not _is_whole(path)):
                    shutil.rmtree(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself: step, ZeRO stage, ranks, dtype ("fp32" or "bf16") and files.

    Raises:
        CheckpointError: it is not whole.
    """
    if not _is_whole(path):
        raise CheckpointError(f"{path} is no whole checkpoint: it has no {MANIFEST} that fits its files")
    return _manifest(path)


def verify(path: Path, manifest: Mapping[str, Any], rank: int = 0, world_size: int = 1) -> None:
    """Compare a checkpoint's files with its manifest, each rank a share of them; call it on all ranks together.

    Raises:
        CheckpointError: a file is not what was written, or holds more than data.
    """
    with _together(f"{path} is damaged; remove it, and the one before it is used"):
        found = _check_share(path, rank, world_size)
        for name, entry in found.items():
            if name != MANIFEST and entry != manifest["files"].get(name):
                raise OSError(f"{name} is not what was written")
    with _together(f"{path} was not loaded"):
        for name in found:
            if name.endswith(".pt"):
                check_data_only(path / name)


def rank_file(rank: int) -> str:
    """The file of a rank's own tensors and random generators."""
    return f"rank-{rank}.safetensors"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that a rank gave `Checkpoints.save`, from its `rank_file`."""
    return _load_rank(path, restore=False)


def _manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _is_whole(path: Path) -> bool:
    """Whether there is a manifest and every file is as long as it says."""
    try:
        files = _manifest(path)["files"]
        return all((path / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _layout(engine: Any) -> dict[str, Any]:
    """What decides whether an engine can take a checkpoint as it is."""
    dtype = "bf16" if engine.bfloat16_enabled() else "fp32"
    return {"stage": engine.zero_optimization_stage(), "world_size": engine.world_size, "dtype": dtype}


def _check_layout(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise one CheckpointError for what this engine cannot take."""
    was, now = saved["stage"], own["stage"]
    if saved["dtype"] != own["dtype"]:
        raise CheckpointError(
            f"{path} has {saved['dtype']} parameters, this run {own['dtype']}: resume with the train.precision it had"
        )
    if was != now and {was, now} != {1, 2}:
        raise CheckpointError(
            f"{path} is of ZeRO stage {was}, this run of stage {now}: only 1 and 2 can be exchanged; resume with "
            f"zero.stage {was}, or start a new run from the exported weights"
        )
    if saved["world_size"] != own["world_size"] and was not in (1, 2):
        raise CheckpointError(
            f"{path} is of {saved['world_size']} ranks, this run has {own['world_size']}: their number can change with "
            f"ZeRO-1 and 2 only, this is stage {was}; resume with {saved['world_size']} ranks, or start a new run from "
            "the exported weights"
        )


def _load_universal(engine: Any, path: Path) -> Any:
    """Load through DeepSpeed's universal checkpoint, which rank 0 makes beside `path` for this one load."""
    universal = path.with_name(path.name + _UNIVERSAL)
    try:
        with _together(f"{path} could not be converted for another number of ranks"):
            if engine.global_rank == 0:
                shutil.rmtree(universal, ignore_errors=True)
                _convert(path, universal)
        # The setting belongs to the engine's configuration, where it would have to stand before the run knows that it
        # needs it; DeepSpeed reads it only while loading.
        engine._config.load_universal_checkpoint = True
        try:
            found, _ = engine.load_checkpoint(str(universal.parent), tag=universal.name)
        finally:
            engine._config.load_universal_checkpoint = False
        _gather(None)
        return found
    finally:
        if engine.global_rank == 0:
            shutil.rmtree(universal, ignore_errors=True)
            (path.parent / "latest_universal").unlink(missing_ok=True)


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    # It reports its progress in print and on a bar.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(
            argparse.Namespace(
                input_folder=str(source), output_folder=str(target), inject_missing_state=True, **options
            )
        )


@contextlib.contextmanager
def _collecting(engine: Any, problems: list[str]) -> Iterator[None]:
    """Note what this rank cannot write, instead of leaving the others waiting in DeepSpeed's barriers."""
    inner = engine.checkpoint_engine

    class Writer:
        """DeepSpeed's writer of files, but for its errors."""

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def save(self, state_dict: Any, path: str, *args: Any, **options: Any) -> None:
            try:
                inner.save(state_dict, path, *args, **options)
            except (OSError, RuntimeError) as error:
                problems.append(_sentence(error))

    engine.checkpoint_engine = Writer()
    # It would put a script beside the checkpoint that reads it without this package; `train.export` does that.
    engine._copy_recovery_script = lambda path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = inner
        del engine._copy_recovery_script


@contextlib.contextmanager
def _together(what: str) -> Iterator[list[str]]:
    """Do something on all ranks; where it fails on any, CheckpointError on all of them.

    Gives a list to which problems may be added that shall not end it at once.
    """
    problems: list[str] = []
    try:
        yield problems
    except (OSError, RuntimeError, ValueError, AssertionError, SafetensorError, zipfile.BadZipFile) as error:
        problems.append(_sentence(error))
    everyone = [f"rank {rank}: {text}" for rank, texts in enumerate(_gather(problems)) for text in texts]
    if everyone:
        raise CheckpointError(f"{what}: {'; '.join(everyone)}")


def _sentence(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().split("\n")[0]


def _gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _check_share(folder: Path, rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Length and SHA-256 of this rank's share of a folder's files, on the disk for good; archives must be whole.

    Raises:
        OSError: a file cannot be read, or is cut short.
    """
    found = {}
    for index, path in enumerate(sorted(folder.iterdir())):
        if index % world_size != rank:
            continue
        if path.suffix == ".pt" and not zipfile.is_zipfile(path):
            raise OSError(f"{path.name} is cut short")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        _sync(path)
        found[path.name] = {"size": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_rank(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """This rank's tensors and the states of its random generators."""
    content = {f"state/{name}": value.detach().cpu().contiguous() for name, value in tensors.items()}
    content[_TORCH_RANDOM] = torch.get_rng_state()
    if torch.cuda.is_available():
        content[_DEVICE_RANDOM] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state(legacy=True)
    metadata = {"python": json.dumps(random.getstate()), "numpy": json.dumps([kind, np.asarray(keys).tolist(), *rest])}
    save_file(content, path, metadata=metadata)


def _load_rank(path: Path, restore: bool) -> dict[str, Tensor]:
    """The tensors that `_save_rank` wrote; `restore` sets this process's random generators too."""
    with safe_open(path, framework="pt", device="cpu") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata()
    if restore:
        torch.set_rng_state(content[_TORCH_RANDOM])
        if _DEVICE_RANDOM in content and torch.cuda.is_available():
            torch.cuda.set_rng_state(content[_DEVICE_RANDOM])
        version, state, gauss = json.loads(metadata["python"])
        random.setstate((version, tuple(state), gauss))
        kind, keys, *rest = json.loads(metadata["numpy"])
        np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    return {name.removeprefix("state/"): value for name, value in content.items() if name.startswith("state/")}
