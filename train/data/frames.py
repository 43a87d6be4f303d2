"""Images with the places of objects, from files of frames and from collected demonstrations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from vat_fast.rollout.locate import kind_of
from vat_fast.train.data.episode import DataError
from vat_fast.train.data.libero_hdf5 import find_files
from vat_fast.train.locator import Labels


@dataclass
class Frames:
    """N images of V views with their labels; upright and mirrored, as policies see LIBERO's images.

    Args:
        images: (N, V, S, S, 3) uint8.
        places: (N, V, O, 2) float32, fractions of the side.
        offsets: (N, O, 3) float32, metres from the hand.
        positions: (N, O, 3) float32, metres.
        group: (N,), which scene or episode each frame is from; frames of one are alike.
        kinds: names of the kinds of objects.
        kind_of_object: (O,), index into `kinds`.
    """

    images: NDArray[np.uint8]
    places: NDArray[np.float32]
    offsets: NDArray[np.float32]
    positions: NDArray[np.float32]
    group: NDArray[np.int64]
    kinds: tuple[str, ...]
    kind_of_object: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def split(self, every: int) -> tuple[Frames, Frames]:
        """Training and held-out frames: every so many groups are held out."""
        out = self.group % every == every - 1
        return self.take(np.flatnonzero(~out)), self.take(np.flatnonzero(out))

    def take(self, chosen: NDArray[np.int64]) -> Frames:
        """Some of the frames."""
        return Frames(
            self.images[chosen],
            self.places[chosen],
            self.offsets[chosen],
            self.positions[chosen],
            self.group[chosen],
            self.kinds,
            self.kind_of_object,
        )

    def labels(self, chosen: NDArray[np.int64]) -> Labels:
        """Of some frames, as tensors."""
        return Labels(
            torch.from_numpy(self.places[chosen]),
            torch.from_numpy(self.offsets[chosen]),
            torch.from_numpy(self.positions[chosen]),
            torch.from_numpy(self.kind_of_object),
        )


def read_frames(paths: Sequence[str | Path], every: int = 1, progress: bool = True) -> Frames:
    """Frames of files and folders, in memory: 150 KB each at 160 pixels and two views.

    Args:
        paths: HDF5 files of `vat-fast frames` or `vat-fast collect`, or folders of them.
        every: of demonstrations, whose neighbouring frames are alike, only every so many.

    Raises:
        DataError: a file without images or without the places of objects.
    """
    files = [file for path in map(Path, paths) for file in find_files(path)]
    if not files:
        raise DataError(f"{', '.join(map(str, paths))}: there are no .hdf5 files")
    parts: list[tuple[list[str], dict[str, NDArray[Any]]]] = []
    for file in tqdm(files, unit="file", disable=not progress):
        with h5py.File(file, "r") as f:
            parts += list(_groups(f, file, every))
    names = sorted({name for found, _ in parts for name in found})
    kinds = sorted({kind_of(name) for name in names})
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("images", "places", "offsets", "positions")}
    for found, part in parts:
        where = [names.index(name) for name in found]
        for name, values in part.items():
            if name != "images":
                whole = np.full((*values.shape[:-2], len(names), values.shape[-1]), np.nan, np.float32)
                whole[..., where, :] = values
                values = whole
            columns[name].append(values)
    group = np.repeat(np.arange(len(parts)), [len(part["images"]) for _, part in parts])
    joined = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
    return Frames(
        **joined, group=group, kinds=tuple(kinds), kind_of_object=np.array([kinds.index(kind_of(n)) for n in names])
    )


def _groups(f: Any, file: Path, every: int) -> Iterator[tuple[list[str], dict[str, NDArray[Any]]]]:
    """Names of objects and arrays of each group of frames in a file."""
    if "frames" in f:
        group = f["frames"]
        names, cameras = json.loads(group.attrs["names"]), json.loads(group.attrs["cameras"])
        yield names, _arrays(group, group, cameras, slice(None))
        return
    demos = f.get("data", {})
    for demo in sorted(demos, key=lambda name: int(name[5:])):
        if "objects" not in demos[demo]:
            raise DataError(f"{file}: {demo} does not say where objects are; collect it again with `vat-fast collect`")
        known = demos[demo]["objects"]
        names, cameras = json.loads(known.attrs["names"]), json.loads(known.attrs["cameras"])
        yield names, _arrays(demos[demo]["obs"], known, cameras, slice(None, None, every))
    if not demos:
        raise DataError(f"{file} has neither frames nor demonstrations")


def _arrays(images: Any, known: Any, cameras: Sequence[str], rows: slice) -> dict[str, NDArray[Any]]:
    positions = known["positions"][rows]
    places = known["places"][rows]
    behind = places[..., 2:] <= 0
    return {
        # As `rotate_180` of packing and of LIBERO policies.
        "images": np.stack([images[camera][rows][:, ::-1, ::-1] for camera in cameras], axis=1),
        "places": np.where(behind, np.nan, 1 - places[..., :2]).astype(np.float32),
        "offsets": positions - known["gripper"][rows][:, None],
        "positions": positions,
    }
