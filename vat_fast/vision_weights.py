"""The vision stream's weights alone, to start a training from eyes that were trained before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vat_fast.checkpoint import CONFIG_FILE, FORMAT, CheckpointError, save_tensors
from vat_fast.config import VATConfig
from vat_fast.files import write_text
from vat_fast.hub import local_folder
from vat_fast.model import VAT

VISION_FILE = "vision.safetensors"
_PARTS = ("patch_embed", "pos_embed", "class_token", "register_tokens", "vision_blocks")
_SHAPE = ("image_size", "patch_size", "width", "num_heads", "mlp_hidden", "class_token", "num_registers", "vision_gelu")


def vision_state(vat: VAT) -> dict[str, Tensor]:
    """Name -> weight of everything in the vision stream."""
    return {name: value for name, value in vat.state_dict().items() if name.split(".")[0] in _PARTS}


def save_vision(vat: VAT, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write `vision.safetensors` and `config.json` into a folder, each replaced atomically.

    Args:
        state: weights instead of the model's own, such as a moving average.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = vision_state(vat) if state is None else {name: state[name] for name in vision_state(vat)}
    save_tensors(folder / VISION_FILE, weights, FORMAT)
    write_text(folder / CONFIG_FILE, vat.config.to_json())


def load_vision(vat: VAT, name_or_folder: str | Path) -> None:
    """Give a VAT's vision stream the weights that `save_vision` wrote.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: no vision stream in it, or one of another shape.
    """
    folder = local_folder(name_or_folder)
    if not (folder / VISION_FILE).is_file():
        raise CheckpointError(f"{folder} has no {VISION_FILE}: `vat_fast.train.pretrain` writes such folders")
    there = VATConfig.from_json_file(folder / CONFIG_FILE)
    for name in _SHAPE:
        if getattr(there, name) != getattr(vat.config, name):
            raise CheckpointError(
                f"{folder} has a vision stream with {name} {getattr(there, name)}, the model has "
                f"{getattr(vat.config, name)}: set model.options.{name} to the same"
            )
    weights, own = load_file(folder / VISION_FILE), vision_state(vat)
    missing = sorted(set(own) - set(weights))
    if missing:
        raise CheckpointError(
            f"{folder} has {there.vision_layers} vision layers, too few for a model with {vat.config.vision_layers}: "
            f"{missing[0]} is missing"
        )
    vat.load_state_dict({name: weights[name] for name in own}, strict=False)
