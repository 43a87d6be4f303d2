"""The whole policy step on a GPU: the frozen plan in two streams and one graph, against the models a user could run.

Part of `python -m benchmarks.gpu`; alone: `python -m benchmarks.gpu --ops step`. The actions of each precision are
compared with the float32 reference on random images and weights before anything is timed.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu import STEP, Row, relative_error
from benchmarks.variants import randomise, small_config
from vat_fast import VAT, ReferenceVAT, VATConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_IN_8_BITS = 0.1
"""Relative error of actions in 8 bits that is still a result; random weights are harder than trained ones."""


def step_rows(device: str, dry_run: bool, samples: int, seed: int) -> Iterator[Row]:
    """One row per preset, batch size and precision; dry: a small model, checked and not timed."""
    presets = ["siglip2-so400m"] if dry_run else ["siglip2-so400m", "dinov2-large", "vit-small"]
    for preset in presets:
        config = small_config(preset, "VAT").replace(depth=3) if dry_run else VATConfig.from_preset(preset)
        for batch in (1,) if dry_run else (1, 4):
            yield from _rows(config, batch, device, dry_run, samples, seed)


def _rows(config: VATConfig, batch: int, device: str, dry_run: bool, samples: int, seed: int) -> Iterator[Row]:
    vat = VAT(config).eval()
    randomise(vat, seed)
    reference = ReferenceVAT(config).eval()
    reference.load_state_dict(vat.state_dict())
    vat, reference = vat.to(device), reference.to(device)
    size, V = config.image_size, config.num_views
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (batch, V, size, size, 3), dtype=torch.uint8, generator=g).to(device)
    task_id = torch.randint(config.num_tasks, (batch,), generator=g).to(device)
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    pixels = ((images / 255 - mean) / std).permute(0, 1, 4, 2, 3).contiguous()
    with torch.inference_mode():
        truth = reference(pixels, task_id)
        narrow = reference.to(torch.float16 if dry_run else torch.bfloat16)
        half = next(narrow.parameters()).dtype
        eager_error = relative_error(narrow(pixels.to(half), task_id), truth)
        for dtype in _precisions(device, dry_run):
            row = Row(STEP, f"{config.preset} B{batch} V{V} {dtype}", eager_error=eager_error)
            try:
                frozen = vat.freeze(
                    batch=batch, dtype=dtype, device=device, executor="triton", images="uint8", mean=MEAN, std=STD
                )
            except ValueError as error:  # fp8 on a card without it
                row.message = str(error)
                yield row
                continue
            row.error = relative_error(frozen(images, task_id), truth)
            row.passed = row.error <= (2 * eager_error if dtype in ("bf16", "fp16") else MOST_IN_8_BITS)
            row.message = (
                "" if row.passed else f"relative error {row.error:.1e}, eager half precision {eager_error:.1e}"
            )
            if row.passed and not dry_run:
                rivals: dict[str, Callable[[], object]] = {"vat_fast": _step(frozen, images, task_id)}
                if dtype == "bf16":
                    rivals |= _rivals(vat, narrow, pixels.to(half), task_id)
                _time(row, rivals, samples)
            yield row
            del frozen
            gc.collect()


def _precisions(device: str, dry_run: bool) -> list[str]:
    if dry_run:
        return ["fp16", "int8"]
    fp8 = torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)
    return ["bf16", "fp16", "int8", *(["fp8"] if fp8 else [])]


def _step(frozen: Callable[..., Tensor], images: Tensor, task_id: Tensor) -> Callable[[], object]:
    """From images on the device to actions on the device."""
    return lambda: frozen(images, task_id)


def _rivals(vat: VAT, narrow: ReferenceVAT, pixels: Tensor, task_id: Tensor) -> dict[str, Callable[[], object]]:
    """What a user would run otherwise, from normalised pixels on the device."""
    half = copy.deepcopy(vat).to(pixels.dtype)
    compiled = torch.compile(narrow, mode="max-autotune")
    return {
        "reference eager": lambda: narrow(pixels, task_id),
        "reference torch.compile": lambda: compiled(pixels, task_id),
        "VAT": lambda: half(pixels, task_id),
    }


def _time(row: Row, rivals: dict[str, Callable[[], object]], samples: int) -> None:
    from vat_fast.kernels import timing

    for name, call in rivals.items():
        try:
            row.timings.append(timing.time_calls(name, call, samples))
        except Exception as error:
            if name == "vat_fast":
                raise
            torch.cuda.synchronize()
            row.left_out[name] = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
