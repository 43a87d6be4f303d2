"""Image resampling with TensorFlow's definitions, without TensorFlow.

The released checkpoints were trained on images that TensorFlow resized. Its two resamplers differ from PIL's and
torchvision's, so both are written out here from their documentation:

- `tf.image.resize(method=..., antialias=True)`, op ScaleAndTranslate: half-pixel centres, the kernel widened by
  the scale when shrinking, windows cut at the image border, weights normalised to sum to one.
- `tf.image.crop_and_resize(method="bilinear")`: a corner-aligned grid, whose first and last samples lie on the
  corners of the crop box.

Both are separable, so a resize is two banded matrices. They are multiplied block by block: each block of output
pixels reads a short run of input pixels, and the rest of the matrix, all zeros, is never touched. PyTorch multiplies
them in one thread: they are small, and other threads would have to be waited for, tens of milliseconds where a
simulator or the model keeps the cores busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Filter = Literal["lanczos3", "bilinear"]
Floats = NDArray[np.float32]

# Output pixels per block: large enough that BLAS calls are few, small enough that blocks stay nearly dense.
_BLOCK = 32


def _lanczos3(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(x) <= 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1 - np.abs(x), 0.0)


_KERNELS: dict[str, tuple[float, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "lanczos3": (3.0, _lanczos3),
    "bilinear": (1.0, _triangle),
}


def resize_matrix(in_size: int, out_size: int, resize_filter: Filter) -> NDArray[np.float64]:
    """Weights (out_size, in_size) of `tf.image.resize(..., antialias=True)` along one axis.

    Output pixel i samples the input at (i + 1/2) * in/out; input pixel j has its centre at j + 1/2. Weights are
    kernel((centre - sample) / max(in/out, 1)), zero outside the kernel's radius, and each row sums to one.

    Raises:
        ValueError: a size below 1 or an unknown filter.
    """
    if in_size < 1 or out_size < 1:
        raise ValueError(f"sizes must be at least 1 pixel, got {in_size} -> {out_size}")
    if resize_filter not in _KERNELS:
        raise ValueError(f"resize filter must be one of {', '.join(get_args(Filter))}, got {resize_filter!r}")
    radius, kernel = _KERNELS[resize_filter]
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    sample = (np.arange(out_size) + 0.5) * scale
    offset = np.arange(in_size) + 0.5 - sample[:, None]
    weights = np.where(np.abs(offset) <= radius * stretch, kernel(offset / stretch), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def crop_matrix(in_size: int, out_size: int, low: float, high: float) -> NDArray[np.float64]:
    """Weights (out_size, in_size) of bilinear `tf.image.crop_and_resize` along one axis.

    Output pixel i samples the input at low * (in - 1) + i * (high - low) * (in - 1) / (out - 1), in pixel indices;
    a single output pixel samples the middle of the box.

    Args:
        low, high: ends of the box, as fractions of the axis; 0 <= low <= high <= 1.

    Raises:
        ValueError: a size below 1, or a box outside the image.
    """
    if in_size < 1 or out_size < 1:
        raise ValueError(f"sizes must be at least 1 pixel, got {in_size} -> {out_size}")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"crop box must satisfy 0 <= low <= high <= 1, got {low} to {high}")
    middle = np.array([(low + high) / 2])
    sample = (np.linspace(low, high, out_size) if out_size > 1 else middle) * (in_size - 1)
    left = np.minimum(np.floor(sample).astype(int), in_size - 1)
    right = np.minimum(left + 1, in_size - 1)
    weights = np.zeros((out_size, in_size))
    rows = np.arange(out_size)
    np.add.at(weights, (rows, left), 1 - (sample - left))
    np.add.at(weights, (rows, right), sample - left)
    return weights


@dataclass(frozen=True)
class _Block:
    """Output pixels [start, stop) as a dense product over input pixels [first, last)."""

    start: int
    stop: int
    first: int
    last: int
    weights: Tensor
    """float32 (stop - start, last - first)."""
    weights_t: Tensor
    """The transpose, contiguous."""


def _blocks(matrix: NDArray[np.float64]) -> tuple[_Block, ...]:
    blocks = []
    for start in range(0, len(matrix), _BLOCK):
        rows = matrix[start : start + _BLOCK]
        used = np.flatnonzero(rows.any(axis=0))
        first, last = int(used[0]), int(used[-1]) + 1
        weights = torch.from_numpy(rows[:, first:last].astype(np.float32))
        blocks.append(_Block(start, start + len(rows), first, last, weights, weights.T.contiguous()))
    return tuple(blocks)


class Resampler:
    """A separable linear map of images, (..., H, W) -> (..., h, w), as two banded products in float32.

    Args:
        rows: (h, H) weights of the vertical axis, or None to leave it alone.
        columns: (w, W) weights of the horizontal axis, or None to leave it alone.
    """

    def __init__(self, rows: NDArray[np.float64] | None, columns: NDArray[np.float64] | None) -> None:
        self._rows = None if rows is None else _blocks(rows)
        self._columns = None if columns is None else _blocks(columns)

    def __call__(self, image: Floats) -> Floats:
        """(..., H, W) float32 -> (..., h, w) float32."""
        x = torch.from_numpy(np.ascontiguousarray(image))
        with torch.inference_mode(), _one_thread():
            if self._rows is not None:
                out = x.new_empty(*x.shape[:-2], self._rows[-1].stop, x.shape[-1])
                for b in self._rows:
                    out[..., b.start : b.stop, :] = b.weights @ x[..., b.first : b.last, :]
                x = out
            if self._columns is not None:
                flat = x.reshape(-1, x.shape[-1])
                out = x.new_empty(len(flat), self._columns[-1].stop)
                for b in self._columns:
                    torch.mm(flat[:, b.first : b.last], b.weights_t, out=out[:, b.start : b.stop])
                x = out.view(*x.shape[:-1], -1)
        return x.numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch's operators called inside run in the calling thread alone; the switch costs a microsecond."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=32)
def resizer(height: int, width: int, size: int, resize_filter: Filter) -> Resampler:
    """`tf.image.resize` of (height, width) images to (size, size), antialiased; cached per input size.

    Raises:
        ValueError: a size below 1 or an unknown filter.
    """
    rows = resize_matrix(height, size, resize_filter)
    columns = resize_matrix(width, size, resize_filter)
    return Resampler(rows if height != size else None, columns if width != size else None)


@lru_cache(maxsize=32)
def central_cropper(size: int, area: float) -> Resampler:
    """The central box of `area` of a (size, size) image, resized back to (size, size) by `tf.image.crop_and_resize`.

    The box's side is sqrt(area) of the image's.

    Raises:
        ValueError: a size below 1 or an area outside (0, 1].
    """
    if not 0 < area <= 1:
        raise ValueError(f"crop area must be above 0 and at most 1, got {area}")
    side = float(np.sqrt(area))
    matrix = crop_matrix(size, size, (1 - side) / 2, (1 + side) / 2)
    return Resampler(matrix, matrix)
