"""What the gate compares on where nothing was recorded: pictures like a robot's, extremes among them, and outliers.

Large ViTs have a few channels that are a hundred times larger than the others (massive activations, Sun et al.,
arXiv 2402.17762). They are what 8 bits fail on, so a gate without them proves little.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vat_fast.config import VATConfig
from vat_fast.observation import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from vat_fast.model import VAT

_SAMPLES = Path(__file__).resolve().parents[1] / "samples"
CHANNELS = 3
"""Outlier channels of each layer."""


def realistic_samples(
    config: VATConfig,
    count: int,
    seed: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> list[dict[str, Tensor]]:
    """`count` samples of one, as `VAT` takes them: pixels (1, V, 3, S, S) float32, task_id (1,), proprio (1, P).

    Pixels are, in turn: two crops of the packaged LIBERO frames in other light, a picture of noise with the spectrum of
    natural images (1 / f), and a crop with one colour at its largest value and half of it black. Proprioception is in
    [-1, 1], every fourth at a limit.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"the number of samples must be at least 1, got {count}")
    g = torch.Generator().manual_seed(seed)
    frames = [_frame(name) for name in ("agentview.png", "wrist.png")]
    scale = torch.tensor(std)[:, None, None]
    samples = []
    for index in range(count):
        views = []
        for view in range(config.num_views):
            kind = index % 4
            image = _noise(config.image_size, g) if kind == 2 else _crop(frames[min(view, 1)], config.image_size, g)
            if kind == 3:
                image[int(torch.randint(3, (), generator=g))] = 1.0
                image[:, :, : config.image_size // 2] = 0.0
            views.append((image - torch.tensor(mean)[:, None, None]) / scale)
        sample = {"pixels": torch.stack(views)[None]}
        if config.task_conditioning != "none":
            sample["task_id"] = torch.randint(config.num_tasks, (1,), generator=g)
        if config.proprio_dim:
            state = 2 * torch.rand(1, config.proprio_dim, generator=g) - 1
            sample["proprio"] = state.sign() if index % 4 == 3 else state
        samples.append(sample)
    return samples


@torch.no_grad()
def plant_outliers(vat: VAT, factor: int = 64, seed: int = 0) -> None:
    """Make a few channels in front of every attention's projection `factor` times larger, and change no action.

    A value's weights times 2^k and the projection's column by 2^k cancel exactly in floating point. In place.

    Raises:
        ValueError: a factor that is no power of two above 1.
    """
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"the factor must be a power of two above 1, so that nothing is rounded, got {factor}")
    g = torch.Generator().manual_seed(seed)
    # Key-value and projection of each attention; a layer that owns none runs on the vision block's.
    pairs = [(block.qkv, block.proj) for block in vat.vision_blocks if hasattr(block, "proj")]
    pairs += [(block.key_value, block.proj) for block in vat.action_blocks if hasattr(block, "proj")]
    for values, proj in pairs:
        width = proj.weight.shape[1]
        chosen = torch.randperm(width, generator=g)[:CHANNELS]
        rows = chosen + values.weight.shape[0] - width  # values come last
        values.weight[rows] *= factor
        values.bias[rows] *= factor
        proj.weight[:, chosen] /= factor


@torch.no_grad()
def plant_massive_activations(vat: VAT, factor: float = 60.0) -> None:
    """Make a few channels of the residual stream, and of what its norms hand on, much larger. In place.

    This is another model: for random weights, which have no outliers of their own.
    """
    width = vat.config.width
    vat.pos_embed[..., [3 % width, 17 % width, 40 % width]] += factor
    for block in vat.vision_blocks:
        block.norm1.weight[[5 % width, 9 % width]] *= factor


def _frame(name: str) -> Tensor:
    """A packaged image, (3, H, W) in [0, 1]."""
    with Image.open(_SAMPLES / name) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def _crop(frame: Tensor, size: int, g: torch.Generator) -> Tensor:
    """Between a half and all of a frame's sides, perhaps mirrored, in other light, (3, size, size) in [0, 1]."""
    side = int(frame.shape[1] * (0.5 + 0.5 * float(torch.rand((), generator=g))))
    y, x = (int(torch.randint(whole - side + 1, (), generator=g)) for whole in frame.shape[1:])
    image = frame[:, y : y + side, x : x + side]
    if torch.rand((), generator=g) < 0.5:
        image = image.flip(2)
    image = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]
    contrast, brightness = 0.6 + 0.8 * torch.rand((), generator=g), 0.4 * torch.rand((), generator=g) - 0.2
    return (contrast * image + brightness).clamp(0, 1)


def _noise(size: int, g: torch.Generator) -> Tensor:
    """Noise whose amplitude falls with frequency as that of natural images does, (3, size, size) in [0, 1]."""
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
    spectrum = torch.fft.rfft2(torch.randn(3, size, size, generator=g)) / frequency.clamp(min=1 / size)
    spectrum[:, 0, 0] = 0
    image = torch.fft.irfft2(spectrum, s=(size, size))
    return (0.5 + 0.25 * image / image.std()).clamp(0, 1)
