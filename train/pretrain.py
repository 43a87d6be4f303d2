"""Teach a vision stream to find objects, before it learns to act.

    vat-fast frames --suite object --tasks 0-9 --frames 1000 --out frames/object
    python -m vat_fast.train.pretrain frames/object --options '{"image_size": 128}' --out runs/eyes

writes `runs/eyes/vision.safetensors` and `config.json`, which a training starts from with `model.vision: runs/eyes`;
`locator.safetensors`, which reads places off the tokens; `log.jsonl` and `pretraining.json`. The same command goes on
after a kill. One process, on a CPU or a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from vat_fast.checkpoint import CheckpointError
from vat_fast.config import VATConfig
from vat_fast.files import write_bytes, write_text
from vat_fast.model import VAT
from vat_fast.observation import IMAGENET_MEAN, IMAGENET_STD
from vat_fast.precision import multiplies_bfloat16
from vat_fast.rollout.conditions import conditions
from vat_fast.train.data.frames import Frames, read_frames
from vat_fast.train.locator import Labels, Locator, location_errors, locator_loss
from vat_fast.train.schedule import learning_rate
from vat_fast.vision_weights import load_vision, save_vision, vision_state

STATE_FILE = "state.pt"
SUMMARY_FILE = "pretraining.json"
_HOLD_OUT_EVERY = 12
_SAVE_EVERY_S = 120.0


@dataclass(frozen=True)
class PretrainSettings:
    """What is trained, and how.

    frames: files or folders that `read_frames` reads.
    preset, options: of the VAT whose vision stream it is.
    steps, batch, lr, weight_decay, ema, seed: of training, with warm-up and a cosine.
    brightness: images are made darker or brighter by up to this share.
    every: of demonstrations' frames, one in so many is used.
    compile: torch.compile the model.
    vision: folder of earlier eyes to start from; None: new weights.
    """

    frames: tuple[str, ...]
    preset: str = "vit-tiny"
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 5000
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    ema: float = 0.999
    brightness: float = 0.1
    every: int = 4
    compile: bool = False
    seed: int = 0
    vision: str | None = None


class _Eyes(nn.Module):
    """What is trained: the vision stream and the locator; its call is the loss."""

    def __init__(self, vat: VAT, locator: Locator) -> None:
        super().__init__()
        self.vat, self.locator = vat, locator

    def tokens(self, pixels: Tensor) -> Tensor:
        """Of the patches alone, (B, V, P, D)."""
        return self.vat.vision_tokens(pixels)[:, :, self.vat.config.num_prefix :]

    def forward(self, pixels: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor]:
        """(cross entropy of patches, L1 of positions)."""
        known = Labels(*labels)
        return locator_loss(self.locator(self.tokens(pixels), known), known)


def pretrain(settings: PretrainSettings, out: Path, *, progress: bool = True) -> dict[str, float]:
    """Train, going on where an earlier call with the same settings stopped; the held-out errors at the end.

    Raises:
        DataError: frames that cannot be read.
        ConfigError: impossible options.
        CheckpointError: the folder has a training with other settings.
    """
    _claim(out, settings)
    if (out / SUMMARY_FILE).exists():
        done: dict[str, float] = json.loads((out / SUMMARY_FILE).read_text(encoding="utf-8"))["errors"]
        return done
    train, held = read_frames(settings.frames, settings.every, progress).split(_HOLD_OUT_EVERY)
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = VATConfig.from_preset(settings.preset, num_views=train.images.shape[1], **settings.options)
    vat = VAT(config)
    if settings.vision:
        load_vision(vat, settings.vision)
    eyes = _Eyes(vat, Locator(config.width, len(train.kinds), config.num_views)).to(device)
    trained = {n: p for n, p in eyes.named_parameters() if n.startswith("locator.") or n[4:] in vision_state(eyes.vat)}
    matrices = [p for p in trained.values() if p.ndim >= 2]
    vectors = [p for p in trained.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)
    average = {name: p.detach().clone() for name, p in trained.items()}
    first = _resume(out, eyes, optimizer, average)
    forward = torch.compile(eyes) if settings.compile else eyes
    batches = _batches(train, settings, first)
    sums, since, saved = np.zeros(2), time.perf_counter(), time.perf_counter()
    for step in (bar := tqdm(range(first, settings.steps), initial=first, total=settings.steps, disable=not progress)):
        rate = learning_rate(step, settings.steps, settings.lr, 0.05, 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, labels = next(batches)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=multiplies_bfloat16(device)):
            where, how_far = forward(to_pixels(images.to(device)), *(part.to(device) for part in labels))
        (where + how_far).backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in trained.values()], 1 - decay)
        sums += [where.item(), how_far.item()]
        if (step + 1) % 100 == 0:
            entropy, far = sums / 100
            sums = np.zeros(2)
            rate_per_s = 100 * settings.batch / (time.perf_counter() - since)
            since = time.perf_counter()
            line = {"step": step + 1, "patches": entropy, "positions": far, "lr": rate, "frames_per_s": rate_per_s}
            if (step + 1) % 500 == 0:
                line |= held_out_errors(eyes, average, held, device)
            _log(out, line)
            bar.set_postfix(patches=f"{entropy:.3f}", positions=f"{far:.3f}")
        if time.perf_counter() - saved > _SAVE_EVERY_S:
            _save_state(out, step + 1, eyes, optimizer, average)
            saved = time.perf_counter()
    errors = held_out_errors(eyes, average, held, device)
    state = {name.removeprefix("vat."): value for name, value in average.items()}
    save_vision(eyes.vat, out, {**vision_state(eyes.vat), **state})
    locator = {name: value.contiguous() for name, value in state.items() if name.startswith("locator.")}
    write_bytes(out / "locator.safetensors", save(locator, {"kinds": json.dumps(train.kinds)}))
    summary = {"settings": asdict(settings), "frames": len(train), "held_out": len(held), "errors": errors}
    write_text(out / SUMMARY_FILE, json.dumps({**summary, "conditions": conditions()}, indent=2) + "\n")
    (out / STATE_FILE).unlink(missing_ok=True)
    return errors


def to_pixels(images_BVHWC: Tensor) -> Tensor:
    """uint8 images -> what the model reads, (B, V, 3, H, W)."""
    mean, std = (torch.tensor(c, device=images_BVHWC.device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return (images_BVHWC.movedim(-1, -3) / 255 - mean) / std


@torch.no_grad()
def held_out_errors(
    eyes: _Eyes, average: dict[str, Tensor], held: Frames, device: torch.device, most: int = 512
) -> dict[str, float]:
    """Median and 90th percentile of localisation errors per view, with the averaged weights."""
    if not len(held):
        return {}
    own = {name: p.detach().clone() for name, p in eyes.named_parameters() if name in average}
    eyes.load_state_dict(average, strict=False)
    found: dict[str, list[Tensor]] = {}
    chosen = np.linspace(0, len(held) - 1, min(most, len(held))).astype(np.int64)
    for block in np.array_split(chosen, max(1, len(chosen) // 32)):
        labels = Labels(*(part.to(device) for part in held.labels(block)))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=multiplies_bfloat16(device)):
            tokens = eyes.tokens(to_pixels(torch.from_numpy(held.images[block]).to(device)))
            for name, values in location_errors(eyes.locator, tokens, labels).items():
                found.setdefault(name, []).append(values.cpu())
    eyes.load_state_dict(own, strict=False)
    errors: dict[str, float] = {}
    for name, parts in found.items():
        for view, values in enumerate(torch.cat(parts).unbind(1)):
            seen = values[~values.isnan()]
            for share, label in ((0.5, "p50"), (0.9, "p90")):
                errors[f"{name}_view{view}_{label}"] = float(seen.quantile(share)) if len(seen) else math.nan
    return errors


def _batches(frames: Frames, settings: PretrainSettings, first: int) -> Iterator[tuple[Tensor, Labels]]:
    """Endless batches; batch i is decided by the seed and i."""
    per_epoch = len(frames) // settings.batch
    order, step = np.empty(0, np.int64), first
    while True:
        epoch, place = divmod(step, per_epoch)
        if not len(order) or place == 0:
            order = np.random.default_rng([settings.seed, epoch]).permutation(len(frames))
        chosen = order[place * settings.batch : (place + 1) * settings.batch]
        rng = np.random.default_rng([settings.seed, 1, step])
        images = torch.from_numpy(frames.images[chosen])
        if settings.brightness:
            scale = 1 + settings.brightness * torch.from_numpy(rng.uniform(-1, 1, (len(chosen), images.shape[1])))
            images = (images * scale.float()[..., None, None, None]).clamp_(0, 255).to(torch.uint8)
        yield images, frames.labels(chosen)
        step += 1


def _claim(out: Path, settings: PretrainSettings) -> None:
    note, text = out / "settings.json", json.dumps(asdict(settings), indent=2) + "\n"
    if note.exists() and note.read_text(encoding="utf-8") != text:
        raise CheckpointError(f"{out} has a training with other settings: take another folder, or remove {note}")
    write_text(note, text)


def _save_state(out: Path, step: int, eyes: nn.Module, optimizer: Any, average: dict[str, Tensor]) -> None:
    temporary = out / f".{STATE_FILE}"
    state = {"step": step, "model": eyes.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
    torch.save(state, temporary)
    temporary.replace(out / STATE_FILE)


def _resume(out: Path, eyes: nn.Module, optimizer: Any, average: dict[str, Tensor]) -> int:
    if not (out / STATE_FILE).exists():
        return 0
    state = torch.load(out / STATE_FILE, weights_only=True)
    eyes.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    return int(state["step"])


def _log(out: Path, line: dict[str, Any]) -> None:
    with (out / "log.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m vat_fast.train.pretrain", description=(__doc__ or "").splitlines()[0])
    p.add_argument("frames", nargs="+", help="files or folders of `vat-fast frames` or `vat-fast collect`")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--preset", default="vit-tiny")
    p.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="VATConfig fields, as JSON")
    defaults = PretrainSettings(())
    for name in ("steps", "batch", "lr", "weight_decay", "ema", "brightness", "every", "seed"):
        value = getattr(defaults, name)
        p.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--vision", metavar="FOLDER", help="earlier eyes to start from, such as checkpoints/eyes")
    options = vars(p.parse_args(arguments))
    out = options.pop("out")
    errors = pretrain(PretrainSettings(**{**options, "frames": tuple(options["frames"])}), out)
    print(json.dumps(errors, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
