"""A picture sheet of videos: one row each, frames evenly spread from the first to the last.

python scripts/stills.py SHEET.png "moved, success=runs/demo/policy_moved/videos/task00_init030_success.mp4" ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION = 22
"""Height of a caption in pixels."""


def frames(video: Path, count: int) -> list[Image.Image]:
    """Some frames of a video."""
    with imageio.get_reader(video) as reader:
        every = [Image.fromarray(frame) for frame in reader]
    return [every[i] for i in np.linspace(0, len(every) - 1, count).round().astype(int)]


def sheet(rows: list[tuple[str, list[Image.Image]]], height: int) -> Image.Image:
    """Captions above rows of frames, all scaled to one height."""
    scaled = []
    for caption, row in rows:
        sizes = [(f.width * height // f.height, height) for f in row]
        scaled.append((caption, [f.resize(s, Image.Resampling.LANCZOS) for f, s in zip(row, sizes, strict=True)]))
    width = max(sum(f.width + 2 for f in row) for _, row in scaled)
    out = Image.new("RGB", (width, len(rows) * (CAPTION + height + 2)), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(size=15)
    for number, (caption, row) in enumerate(scaled):
        top = number * (CAPTION + height + 2)
        draw.text((2, top + 2), caption, fill="black", font=font)
        left = 0
        for f in row:
            out.paste(f, (left, top + CAPTION))
            left += f.width + 2
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("videos", nargs="+", metavar="CAPTION=VIDEO")
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--height", type=int, default=128, help="of a frame in pixels (default 128)")
    options = parser.parse_args()
    rows = []
    for entry in options.videos:
        caption, _, path = entry.rpartition("=")
        rows.append((caption or Path(path).stem, frames(Path(path), options.frames)))
    sheet(rows, options.height).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
