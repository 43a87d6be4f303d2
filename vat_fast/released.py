"""The authors' released checkpoints, in and out.

A released folder `<name>--<step>_ckpt` holds one torch file per part of the model and the dataset statistics. Its
tensors are named by the authors' code; `vat_fast.released_layout` translates. What a file holds
and no forward reads (the last block, final norms, attention pool, ...) is handed back as `unused`, so that `export`
gives the same files again, bit for bit.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vat_fast.checkpoint import CheckpointError, build, check_layout, replacing
from vat_fast.config import PRESETS, TaskConditioning, VATConfig
from vat_fast.model import VAT
from vat_fast.released_layout import layout, released_name
from vat_fast.without_values import without_values

ROLES = ("vision_backbone", "vit", "vat", "action_head", "proprio_projector", "noisy_action_projector")
"""What a file of a released folder is called before its step."""

_FILE = re.compile(rf"({'|'.join(ROLES)})--(\d+)_checkpoint\.pt")
_FOLDER = re.compile(r"(?:--|step)(\d+)_ckpt$")
# Wrappers of the authors' training put these before every key of a file.
_PREFIXES = ("module.featurizer.", "module.vit.", "module.", "featurizer.", "vit.")


@dataclass(frozen=True)
class FileLayout:
    """How one file was written: what stands before every key, and the keys' order."""

    prefix: str = ""
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Released:
    """A released checkpoint, taken apart.

    vat: the model, in eval mode.
    unused: tensors of the files that no forward reads, as `role/key`.
    files: how each file was written, by role.
    step: the training step in the files' names.
    """

    vat: VAT
    unused: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, FileLayout] = field(default_factory=dict)
    step: int = 0


def is_released(folder: str | Path) -> bool:
    """Whether a folder holds files named as the authors' are."""
    return any(_FILE.fullmatch(path.name) for path in Path(folder).glob("*_checkpoint.pt"))


def load(
    folder: str | Path,
    *,
    preset: str | None = None,
    num_heads: int | None = None,
    num_views: int = 2,
    task_conditioning: TaskConditioning | None = None,
    last_view_only: bool = False,
    stop_block: int | None = None,
) -> Released:
    """The model of a released folder. Every tensor of every file must be one the layout knows, and none may lack.

    What the files do not tell is taken from the preset whose sizes they have, or given here.

    Args:
        folder: local folder with `vision_backbone--<step>_checkpoint.pt` (or, for the last-layer baseline,
            `vit--` and `vat--`), `action_head--<step>_checkpoint.pt`, perhaps projectors.
        preset: backbone, where its sizes are no preset's.
        num_heads: attention heads, where there is no preset.
        num_views: camera views the policy was trained with.
        task_conditioning: how the task came in; None means FiLM where the file has FiLM weights, else additive.
        last_view_only: with shared weights, attend to the last view alone as the authors' code does.
        stop_block: index of the last block that runs; None means the file's depth - 2.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, damaged files, pickles that are not plain tensors.
        ConfigError: the sizes found describe no possible model.
    """
    folder = Path(folder)
    step, paths = _find_files(folder)
    tensors: dict[str, dict[str, Tensor]] = {}
    files: dict[str, FileLayout] = {}
    for role, path in paths.items():
        tensors[role], files[role] = _read(path)
    config = _infer_config(tensors, folder, preset, num_heads)
    changes: dict[str, Any] = {"num_views": num_views}
    if stop_block is not None:
        changes["num_layers"] = stop_block + 1
    if task_conditioning is not None:
        changes["task_conditioning"] = task_conditioning
    if last_view_only:
        changes["shared_keys"] = "last_view"
    config = config.replace(**changes)

    expected = layout(config, has_film=_has_film(tensors))
    if "proprio_projector" in tensors and not config.proprio_dim:
        # No token of this variant reads proprioception in the authors' code: the projector is there, unused.
        expected["proprio_projector"] = {k: tuple(t.shape) for k, t in tensors["proprio_projector"].items()}
    for role in expected:
        if role not in tensors:
            raise CheckpointError(f"{folder} has no {role}--{step}_checkpoint.pt")
    for role, path in paths.items():
        if role not in expected:
            raise CheckpointError(f"{path} does not belong to this model, whose files are {', '.join(expected)}")
        check_layout(expected[role], tensors[role], path)

    with without_values():
        names = {name: released_name(name, config) for name in VAT(config).state_dict()}
    used = {name: tensors[role].pop(key) for name, (role, key) in names.items()}
    unused = {f"{role}/{key}": t for role, rest in tensors.items() for key, t in rest.items()}
    return Released(build(config, used, folder), unused, files, step)


def export(
    vat: VAT,
    folder: str | Path,
    *,
    unused: Mapping[str, Tensor] | None = None,
    files: Mapping[str, FileLayout] | None = None,
    step: int = 0,
) -> list[Path]:
    """Write a model in the authors' layout; the paths written.

    With the `unused` and `files` that `load` gave, the files' tensors are the original ones, bit for bit. Without
    them, tensors that the authors' strict loading asks for and no forward reads are written as an untrained network
    has them: norms 1 and 0, everything else 0. The task table keeps this model's rows; the authors' code makes 30.

    Raises:
        ValueError: a configuration that the authors' code does not have.
    """
    config, folder = vat.config, Path(folder)
    check_exportable(config)
    unused, files = dict(unused or {}), dict(files or {})
    has_film = config.task_conditioning == "film" or config.action_stream != "shared"
    if unused:
        has_film = has_film or any("film_modulator" in name for name in unused)
    expected = layout(config, has_film=has_film)
    for name in unused:
        role, key = name.split("/", 1)
        expected.setdefault(role, {})
        expected[role].setdefault(key, tuple(unused[name].shape))
    dtype = next(vat.parameters()).dtype
    tensors = {role: {} for role in expected}  # type: dict[str, dict[str, Tensor]]
    for name, t in vat.state_dict().items():
        role, key = released_name(name, config)
        tensors[role][key] = t.detach()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for role, shapes in expected.items():
        info = files.get(role, FileLayout())
        content = {}
        for key in info.order or shapes:
            if key in tensors[role]:
                content[info.prefix + key] = tensors[role][key]
            elif f"{role}/{key}" in unused:
                content[info.prefix + key] = unused[f"{role}/{key}"]
            else:
                content[info.prefix + key] = _untrained(key, shapes[key], dtype)
        path = folder / f"{role}--{step}_checkpoint.pt"
        # Clones where a tensor is a view: torch.save would write the whole storage behind it.
        with replacing(path) as partial:
            torch.save({name: _compact(t) for name, t in content.items()}, partial)
        written.append(path)
    return written


def unused_metadata(released: Released) -> dict[str, str]:
    """What `unused.safetensors` has to say beside its tensors."""
    files = {role: {"prefix": info.prefix, "order": list(info.order)} for role, info in released.files.items()}
    return {"format": "pt", "step": str(released.step), "files": json.dumps(files)}


def from_unused_metadata(metadata: Mapping[str, str], source: Path) -> tuple[int, dict[str, FileLayout]]:
    """The step and file layouts that `unused_metadata` wrote.

    Raises:
        CheckpointError: another metadata.
    """
    try:
        files = json.loads(metadata["files"])
        layouts = {role: FileLayout(entry["prefix"], tuple(entry["order"])) for role, entry in files.items()}
        return int(metadata["step"]), layouts
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} does not say which released files its tensors are from ({error})") from error


# Reading.


def _find_files(folder: Path) -> tuple[int, dict[str, Path]]:
    """The step, and the file of each role at that step."""
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("*_checkpoint.pt")):
        if match := _FILE.fullmatch(path.name):
            found.setdefault(int(match[2]), {})[match[1]] = path
    if not found:
        raise CheckpointError(f"{folder} holds no released checkpoint: no vision_backbone--<step>_checkpoint.pt")
    steps = sorted(found)
    if len(steps) > 1:
        named = _FOLDER.search(folder.resolve().name)
        if named is None or int(named[1]) not in found:
            listed = ", ".join(map(str, steps))
            raise CheckpointError(f"{folder} holds several steps ({listed}); keep the files of one in a folder")
        steps = [int(named[1])]
    paths = found[steps[0]]
    return steps[0], {role: paths[role] for role in ROLES if role in paths}


def _read(path: Path) -> tuple[dict[str, Tensor], FileLayout]:
    """A file's tensors without their common prefix, memory-mapped where the file allows it."""
    zipped = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        starts_as_zip = file.read(2) == b"PK"
    if starts_as_zip and not zipped:
        raise CheckpointError(f"{path} is truncated; copy it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle that holds more than plain tensors; it was not opened, since that could run code"
        ) from error
    except Exception as error:  # damaged bytes make the reader fail in every way there is
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} is damaged or no torch file ({reason}); copy it again") from error
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors")
    prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in content)), "")
    tensors = {key[len(prefix) :]: t for key, t in content.items()}
    return tensors, FileLayout(prefix, tuple(tensors))


def _has_film(tensors: Mapping[str, Mapping[str, Tensor]]) -> bool:
    main = tensors.get("vision_backbone") or tensors.get("vat") or {}
    return any(".film_modulator." in key for key in main)


def _infer_config(
    tensors: Mapping[str, Mapping[str, Tensor]], folder: Path, preset: str | None, num_heads: int | None
) -> VATConfig:
    """The configuration that the tensors' names and shapes tell."""
    baseline = "vat" in tensors or "vit" in tensors
    vision_role, action_role = ("vit", "vat") if baseline else ("vision_backbone", "vision_backbone")
    vision, action, head = tensors.get(vision_role, {}), tensors.get(action_role, {}), tensors.get("action_head", {})

    def shape(file: Mapping[str, Tensor], key: str, role: str) -> tuple[int, ...]:
        if key not in file:
            raise CheckpointError(f"{folder} has no tensor {key} in its {role} file; is this a VAT checkpoint?")
        return tuple(file[key].shape)

    D, _, patch, _ = shape(vision, "patch_embed.proj.weight", vision_role)
    patches = shape(vision, "pos_embed", vision_role)[1]
    side = isqrt(patches)
    if side * side != patches:
        raise CheckpointError(f"{folder}: pos_embed has {patches} positions, which is no square grid of patches")
    C, Da = shape(action, "action_pos_embed_generator.action_embed", action_role)
    K = shape(action, "action_pos_embed_generator.dim_embed", action_role)[0]
    diffusion = any(key.startswith("noise_predictor.") for key in head)
    fc2 = "noise_predictor.mlp_resnet.fc2.weight" if diffusion else "model.fc2.weight"
    mlp = "blocks.0.mlp.fc1.weight" if baseline else "blocks.0.mlp_non_act.fc1.weight"
    shared = not baseline and not any(".attn.q_act." in key for key in action)
    values: dict[str, Any] = {
        "image_size": side * patch,
        "patch_size": patch,
        "width": D,
        "depth": 1 + max(int(m[1]) for key in vision if (m := re.match(r"blocks\.(\d+)\.", key))),
        "mlp_hidden": shape(vision, mlp, vision_role)[0],
        "class_token": "cls_token" in vision,
        "num_registers": vision["reg_token"].shape[1] if "reg_token" in vision else 0,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in vision else None,
        "action_stream": "last_layer" if baseline else "shared" if shared else "separate",
        "action_width_divisor": D // Da,
        "task_conditioning": "film" if _has_film(tensors) else "additive",
        "num_tasks": shape(action, "task_embedding.weight", action_role)[0],
        "chunk_size": C,
        "tokens_per_step": K,
        "action_dim": shape(head, fc2, "action_head")[0],
        "head": "diffusion" if diffusion else "l1",
    }
    reads_extra_tokens = values["action_stream"] == "separate" and Da == D
    if diffusion and not reads_extra_tokens:
        raise CheckpointError(
            f"{folder} combines a diffusion head with the {values['action_stream']} action stream at width {Da}, where "
            "the authors' code reads no timestep; only VAT itself is supported with diffusion"
        )
    if reads_extra_tokens and "proprio_projector" in tensors:
        values["proprio_dim"] = shape(tensors["proprio_projector"], "fc1.weight", "proprio_projector")[1]

    sizes = ("patch_size", "width", "mlp_hidden", "class_token", "num_registers")
    defaults = VATConfig()
    if preset is not None and preset not in PRESETS:
        raise CheckpointError(f"unknown preset {preset!r}; presets are {', '.join(PRESETS)}")
    for name, fields in PRESETS.items():
        if all(fields.get(size, getattr(defaults, size)) == values[size] for size in sizes):
            if preset not in (None, name):
                # Its number of attention heads would fit the weights' shapes and compute something else.
                raise CheckpointError(f"{folder} has the backbone of {name}, not of {preset}; leave the preset out")
            preset = name
            values["preset"], values["timm_name"] = name, fields["timm_name"]
    if num_heads is None:
        if preset is None:
            raise CheckpointError(
                f"{folder} has a backbone of width {D}, MLP {values['mlp_hidden']} and patch {patch}, which is no "
                "preset's, and files do not tell the number of attention heads: give num_heads "
                "(vat-fast convert --num-heads)"
            )
        num_heads = PRESETS[preset].get("num_heads", defaults.num_heads)
    return VATConfig(**values, num_heads=num_heads)


# Writing.


def check_exportable(config: VATConfig) -> None:
    """Raise one ValueError for what the authors' code does not have."""
    c = config
    reads_extra_tokens = c.action_stream == "separate" and c.action_width_divisor == 1
    problems = {
        c.num_extra_tokens > 0 and not reads_extra_tokens: "their action stream of this variant has no extra tokens",
        c.action_scale != "vision_head_dim" and c.action_width_divisor != 1: "they scale by the vision head width",
        c.layer_scale is not None and c.action_width_divisor != 1: "their narrow action stream runs without LayerScale",
    }
    for is_wrong, why in problems.items():
        if is_wrong:
            raise ValueError(
                f"this model cannot be written for the authors' code, which would compute otherwise: {why}"
            )


def _untrained(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    is_norm = re.search(r"(^|\.)norm[^.]*\.weight$", key) is not None
    return torch.ones(shape, dtype=dtype) if is_norm else torch.zeros(shape, dtype=dtype)


def _compact(t: Tensor) -> Tensor:
    return t if t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes else t.clone()
