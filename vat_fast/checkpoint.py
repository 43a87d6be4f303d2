"""Our own checkpoint format: config.json and model.safetensors in a folder.

`policy.json` and `dataset_statistics.json` beside them make it a policy (`vat_fast.policy`), `unused.safetensors`
keeps what a released checkpoint holds beyond the model (`vat_fast.released`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vat_fast.config import VATConfig
from vat_fast.files import make_readable, write_text
from vat_fast.hub import local_folder
from vat_fast.model import VAT
from vat_fast.without_values import without_values

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
FORMAT = {"format": "pt", "vat_fast": "1"}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or of another model."""


def save_model(vat: VAT, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, each replaced atomically.

    The weights go first: where there is a config.json, the weights beside it are complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / MODEL_FILE, vat.state_dict(), FORMAT)
    write_text(folder / CONFIG_FILE, vat.config.to_json())


def load_model(name_or_folder: str | Path, dtype: torch.dtype | None = None) -> VAT:
    """The model in a folder or Hub repository, ours or one of the authors' released ones, in eval mode.

    Nothing is copied that the file's memory map already holds, unless `dtype` asks for another precision.

    Args:
        name_or_folder: folder or Hub id.
        dtype: precision of the weights; None as stored.

    Raises:
        FileNotFoundError: there is no such folder or repository.
        CheckpointError: files are missing, damaged or do not fit the configuration.
        ConfigError: config.json describes no possible model.
    """
    from vat_fast import released

    folder = local_folder(name_or_folder)
    if released.is_released(folder):
        return cast(released.load(folder).vat, dtype)
    for name in (CONFIG_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}: a checkpoint folder holds {CONFIG_FILE} and {MODEL_FILE}, or the authors' "
                "vision_backbone--<step>_checkpoint.pt and action_head--<step>_checkpoint.pt"
            )
    config = VATConfig.from_json_file(folder / CONFIG_FILE)
    return cast(build(config, load_tensors(folder / MODEL_FILE)[0], folder / MODEL_FILE), dtype)


def build(config: VATConfig, tensors: Mapping[str, Tensor], source: Path) -> VAT:
    """A VAT that takes over `tensors` as its parameters, without a second copy.

    Raises:
        CheckpointError: names or shapes are not the configuration's; `source` is named in the message.
    """
    with without_values():
        vat = VAT(config)
    check_layout({name: tuple(p.shape) for name, p in vat.state_dict().items()}, tensors, source)
    vat.load_state_dict(dict(tensors), strict=True, assign=True)
    # Assigned tensors carry no requires_grad; what trains is the configuration's to say.
    for p in vat.parameters():
        p.requires_grad_(True)
    vat.freeze_untrained()
    return vat.eval()


def check_layout(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise one CheckpointError unless `tensors` have exactly the expected names and shapes, as plain floats."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    for what, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(f"{source} {what} {len(names)} of {len(expected)} tensors: {listed}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{source}: {name} is {tuple(tensors[name].shape)}, expected {shape}")
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"{source}: {name} holds {tensors[name].dtype}, expected floating-point weights")


def cast(vat: VAT, dtype: torch.dtype | None) -> VAT:
    """The model in `dtype`, converted one tensor at a time; None leaves it alone."""
    return vat if dtype is None else vat.to(dtype)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, complete or not at all."""
    with replacing(path) as partial:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, metadata=dict(metadata))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what was written there takes the place of `path` in one step, or never."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        make_readable(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, as views of its memory map, and its metadata.

    Raises:
        CheckpointError: not a safetensors file, or a truncated one.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}); copy it again") from error
