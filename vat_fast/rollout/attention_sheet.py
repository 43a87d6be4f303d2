"""Camera images and where the policy attended in them, moments of one episode side by side, as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vat_fast.observation import ImageProcessing
from vat_fast.rollout.attention import Moment, heat_on_camera

_TILE, _GAP, _LABEL, _LINE = 160, 4, 110, 18
"""Pixels: side of an image, space between two, width of the row labels, height of a line of text."""

Rows = Sequence[tuple[str, Sequence[int]]]
"""Heat maps of each camera: a label, and the layers whose mean is shown."""


def heat_colours(heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Heat of any shape, 0 to 1 -> (..., 3) uint8: black, red, yellow, white."""
    channels = [np.interp(heat, (start, start + 1 / 3), (0, 255)) for start in (0, 1 / 3, 2 / 3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlay(image_HW3: NDArray[np.uint8], heat_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """An image, dimmed and grey, with heat (0 to 1) on it, (H, W, 3) uint8; it shows through where heat is highest."""
    grey = image_HW3.mean(-1, keepdims=True) * 0.6
    share = 0.7 * heat_HW[..., None]
    mixed = (1 - share) * grey + share * heat_colours(heat_HW)
    return np.asarray(mixed.round(), np.uint8)


def check_rows(rows: Rows, layers: int) -> None:
    """Raise one ValueError where `rows` name a layer that a model with so many action layers does not have."""
    for _, chosen in rows:
        for layer in chosen:
            if not 0 <= layer < layers:
                raise ValueError(f"the model has action layers 0 to {layers - 1}, got {layer}")


def attention_sheet(
    moments: Sequence[Moment], cameras: Sequence[str], rows: Rows, image: ImageProcessing, title: str
) -> NDArray[np.uint8]:
    """One column per moment; for each camera its image and a heat map per entry of `rows`, (H, W, 3) uint8.

    All heat maps of the sheet have one scale, from no attention to the most that any patch on it got. Under each heat
    map stands the share of the attention that this camera's patches have together.

    Args:
        moments: at least one.
        cameras: names, in the order of the model's views.
        rows: see `Rows`.
        image: the policy's image pipeline.
        title: lines above.

    Raises:
        ValueError: no moments or rows, or a layer that the model does not have.
    """
    if not moments or not rows:
        raise ValueError("a sheet needs at least one moment and one row of heat maps")
    check_rows(rows, len(moments[0].maps))
    # (rows, moments, V, G, G)
    maps = np.stack([[moment.maps[list(chosen)].mean(0) for moment in moments] for _, chosen in rows])
    most = float(maps.max())
    patches = moments[0].maps[0].size
    title += (
        f"\nheat: black none, white {100 * most:.2g} % of the attention on one patch, {most * patches:.1f} times even"
    )

    font = ImageFont.load_default(12)
    head = _LINE * (title.count("\n") + 2)
    per_camera = _TILE + _GAP + len(rows) * (_TILE + _LINE + _GAP)
    columns = _LABEL + len(moments) * (_TILE + _GAP)
    text = max(font.getlength(line) for line in title.split("\n"))
    sheet = Image.new("RGB", (max(columns, round(text) + 2 * _GAP), head + _GAP + len(cameras) * per_camera), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title.split("\n")):
        draw.text((_GAP, 2 + number * _LINE), line, "black", font)
    for column, moment in enumerate(moments):
        x = _LABEL + column * (_TILE + _GAP)
        draw.text((x, head - _LINE + 2), f"step {moment.step}", "black", font)
        for view, camera in enumerate(cameras):
            y = head + _GAP + view * per_camera
            shown = moment.images[view]
            sheet.paste(_upright(shown), (x, y))
            draw.text((_GAP, y), _wrapped(camera), "black", font)
            y += _TILE + _GAP
            for row, (label, _) in enumerate(rows):
                map_GG = maps[row, column, view]
                heat = heat_on_camera(map_GG / most if most else map_GG, shown.shape[0], shown.shape[1], image)
                sheet.paste(_upright(overlay(shown, heat)), (x, y))
                draw.text((_GAP, y), label, "black", font)
                draw.text((x, y + _TILE + 1), f"{100 * map_GG.sum():.0f} %", "black", font)
                y += _TILE + _LINE + _GAP
    return np.asarray(sheet)


def png(sheet_HW3: NDArray[np.uint8]) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(sheet_HW3).save(buffer, "PNG")
    return buffer.getvalue()


def _upright(image_HW3: NDArray[np.uint8]) -> Image.Image:
    # Frames come upside down from the simulator; flipped, not rotated, left is left.
    return Image.fromarray(np.ascontiguousarray(image_HW3[::-1])).resize((_TILE, _TILE), Image.Resampling.LANCZOS)


def _wrapped(camera: str) -> str:
    """A camera's name in lines that fit beside the images."""
    return camera.removesuffix("_image").replace("_eye_in_hand", "\neye in hand")
