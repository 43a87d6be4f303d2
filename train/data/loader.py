"""Batches for training, made by worker processes and resumed bit for bit.

What a batch holds depends on the seed, the epoch and the position in it alone: each sample draws its augmentation
from a generator keyed by these three. So the number of workers, what they have prefetched, and the number of ranks
do not matter, and the whole state is an epoch and a position.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import BaseContext
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vat_fast.observation import ImageProcessing
from vat_fast.train.data.augment import Augmentation, Draw, augment, augment_batch, draws_to_tensor
from vat_fast.train.data.episode import DataError
from vat_fast.train.data.mixture import Mixture, merge_tasks
from vat_fast.train.data.targets import Samples

AugmentOn = Literal["cpu", "device"]
StartMethod = Literal["forkserver", "spawn"]
Batch = dict[str, Tensor]


class _Request(NamedTuple):
    """One batch of one rank, as the workers are told."""

    epoch: int
    positions: NDArray[np.int64]
    """Of the samples in the epoch."""
    samples: NDArray[np.int64]
    valid: NDArray[np.bool_]
    next_epoch: int
    next_position: int


class DemonstrationLoader:
    """Endless batches of demonstrations.

        loader = DemonstrationLoader([Samples(data, chunk=8)], batch_size=32, image_size=224, workers=4)
        for batch in loader:                       # until the end of the epoch
            loss = vat.loss(loader.prepare(batch, device))
        state = loader.state_dict()                # after the last batch that was handed out

    A batch has `pixels` (B, V, 3, S, S) uint8, `actions` (B, C, A) float32, `task_id` (B,) int64, `proprio` (B, P)
    float32 where the datasets have it, and `valid` (B,) bool. With `augment_on="device"`, `images`
    (B, V, H, W, 3) uint8 and `draws` (B, V, 7) stand in for `pixels`, and `prepare` augments. `prepare` normalises
    the pixels and gives the batch that `VAT.loss` takes.

    Args:
        samples: of one or more datasets; they must have the same views and numbers of dimensions, and task tables
            that agree.
        batch_size: samples per batch and rank.
        image_size: S.
        augmentation: None for the deterministic pipeline of evaluation: Lanczos3 resize and centre crop.
        weights: of the datasets in the mixture; None: every sample once per epoch.
        shuffle: False visits the samples in order (validation).
        drop_last: leave out the samples of an epoch that fill no batch on all ranks. False fills the last batch
            with samples from the front, marked False in `valid`, so that every rank has as many batches.
        seed: of order and augmentation.
        rank, world_size: this process takes its contiguous part of each global batch of world_size * batch_size.
        workers: processes; 0 makes batches in this one.
        prefetch: batches in flight per worker.
        augment_on: where the augmentation runs.
        mean, std: of the pixels, for `prepare`; None: ImageNet's, the released checkpoints'.
        crop_area: of the evaluation's centre crop, None for none.
        pin_memory: page-locked batches, for copies to a GPU that overlap with its work.
        start_method: of the workers: "forkserver", or "spawn" where there is none. They import this module and so
            start slowly, once per loader. "fork" is refused: workers forked from a process in which other
            libraries had run threads were seen to hang for ever.

    Raises:
        DataError: nothing to load, an impossible value, or datasets that do not fit together.
    """

    def __init__(
        self,
        samples: Sequence[Samples],
        batch_size: int,
        image_size: int,
        *,
        augmentation: Augmentation | None = None,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        augment_on: AugmentOn = "cpu",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_area: float | None = 0.9,
        pin_memory: bool = False,
        start_method: StartMethod = "forkserver",
    ) -> None:
        _check_samples(samples)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("image_size", image_size, 1),
            ("workers", workers, 0),
            ("prefetch", prefetch, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise DataError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be from 0 to {world_size - 1}, got {rank}")
        if augment_on not in ("cpu", "device"):
            raise DataError(f"augment_on must be cpu or device, got {augment_on!r}")
        if start_method not in ("forkserver", "spawn"):
            raise DataError(f"start_method must be forkserver or spawn, got {start_method!r}")
        if augment_on == "device" and augmentation is None:
            raise DataError("augment_on='device' needs an augmentation")
        self.samples = list(samples)
        self.batch_size, self.image_size = batch_size, image_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.tasks = merge_tasks([part.dataset.tasks for part in samples])
        self.wait_seconds = 0.0
        """Time that `next` has waited for batches, in all."""
        self._mixture = Mixture([len(part) for part in samples], weights, seed)
        if weights is not None and not shuffle:
            raise DataError("weights need shuffle=True")
        self._shuffle, self._drop_last = shuffle, drop_last
        if self.batches_per_epoch < 1:
            raise DataError(
                f"{len(self._mixture)} samples do not fill one batch of {world_size} ranks x {batch_size}; "
                "take smaller batches or drop_last=False"
            )
        defaults = ImageProcessing()
        processing = ImageProcessing(
            rotation="none",
            jpeg_quality=None,
            image_size=image_size,
            crop_area=crop_area,
            mean=tuple(mean or defaults.mean),  # type: ignore[arg-type]
            std=tuple(std or defaults.std),  # type: ignore[arg-type]
        )
        self.processing = processing
        self._maker = _BatchMaker(self.samples, self._mixture, augmentation, augment_on, processing, seed)
        self._worker_options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
        if workers:
            self._worker_options["prefetch_factor"] = prefetch
            self._worker_options["multiprocessing_context"] = _context(start_method)
            self._worker_options["worker_init_fn"] = _start_worker
        self._stream: Iterator[Any] | None = None
        self._epoch = self._position = 0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._epoch

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this rank in a whole epoch."""
        return self._batches_from(0)

    def __len__(self) -> int:
        """Batches of this rank that are left in the epoch."""
        return self._batches_from(self._position)

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left in the epoch. The next `iter` has the next epoch."""
        for _ in range(len(self)):
            yield next(self)

    def __next__(self) -> Batch:
        """The next batch; after the last of an epoch comes the first of the next.

        Raises:
            DataError: a broken image.
            RuntimeError: a worker died.
        """
        begin = time.perf_counter()
        if self._stream is None:
            loader: DataLoader[Any] = DataLoader(
                self._maker,
                batch_size=None,
                sampler=_Requests(self),
                collate_fn=_as_it_is,
                # Its own generator: otherwise starting to load would advance PyTorch's global one.
                generator=torch.Generator(),
                **self._worker_options,
            )
            self._stream = iter(loader)
        try:
            (epoch, position), batch = next(self._stream)
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(
                "a loader worker died with a batch in its hands; most often it was killed for memory: take fewer "
                "workers or a smaller prefetch"
            ) from error
        self._epoch, self._position = epoch, position
        if "pixels" in batch:
            # Workers write channels last, as OpenCV does; this is a view.
            batch["pixels"] = batch["pixels"].permute(0, 1, 4, 2, 3)
        self.wait_seconds += time.perf_counter() - begin
        return batch

    def close(self) -> None:
        """Stop the workers. The state stays; the next batch starts them again."""
        # DataLoader's iterator ends its workers when nobody holds it any more.
        self._stream = None

    def prepare(self, batch: Batch, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Batch:
        """Move a batch to the device, augment there if so set, and normalise the pixels: what `VAT.loss` takes.

        Returns:
            `pixels` (B, V, 3, S, S) and the rest as it was, without `valid`.
        """
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != "valid"}
        if "images" in moved:
            images, draws = moved.pop("images"), moved.pop("draws")
            views = images.shape[:2]
            pixels = augment_batch(images.flatten(0, 1), draws.flatten(0, 1), self.image_size).unflatten(0, views)
        else:
            # One copy changes type and layout, the rest is in place: a seventh of the time of one tensor per step.
            pixels = torch.empty(moved["pixels"].shape, device=moved["pixels"].device).copy_(moved["pixels"])
        mean = torch.tensor(self.processing.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.processing.std, device=pixels.device).view(3, 1, 1)
        moved["pixels"] = pixels.div_(255).sub_(mean).div_(std).to(dtype).contiguous()
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from, small and made of plain numbers and text.

        Batches that workers have made and nobody has taken do not count.
        """
        return {"epoch": self._epoch, "position": self._position, "seed": self.seed, "data": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch at which the state was taken. Batch size and ranks may differ from then.

        Raises:
            DataError: a state of other data, or with another seed.
        """
        try:
            epoch, position, seed, data = (state[name] for name in ("epoch", "position", "seed", "data"))
        except KeyError as error:
            raise DataError(f"the loader's state has no {error}; it has {', '.join(map(str, state))}") from error
        if seed != self.seed:
            raise DataError(f"the loader's state is of seed {seed}, this loader has seed {self.seed}")
        if data != self._fingerprint():
            raise DataError("the loader's state is of other data: other datasets, episodes, views, chunk or weights")
        self.close()
        self._epoch, self._position = self._settle(int(epoch), int(position))

    def requests(self) -> Iterator[_Request]:
        """The endless sequence of this rank's batches from the current state on."""
        epoch, position = self._epoch, self._position
        order = self._order(epoch)
        total = self.batch_size * self.world_size
        while True:
            first = position + self.rank * self.batch_size
            positions = np.arange(first, first + self.batch_size)
            next_epoch, next_position = self._settle(epoch, position + total)
            yield _Request(
                epoch=epoch,
                positions=positions,
                samples=order[positions % len(order)],
                valid=positions < len(order),
                next_epoch=next_epoch,
                next_position=next_position,
            )
            if next_epoch != epoch:
                order = self._order(next_epoch)
            epoch, position = next_epoch, next_position

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return self._mixture.order(epoch) if self._shuffle else np.arange(len(self._mixture))

    def _batches_from(self, position: int) -> int:
        total, left = self.batch_size * self.world_size, len(self._mixture) - position
        return left // total if self._drop_last else -(-left // total)

    def _settle(self, epoch: int, position: int) -> tuple[int, int]:
        """The same place, in the next epoch where this one has no batch left."""
        return (epoch, position) if self._batches_from(position) > 0 else (epoch + 1, 0)

    def _fingerprint(self) -> str:
        parts = [
            [part.dataset.fingerprint, part.chunk, part.cameras, [entry.name for entry in part.episodes]]
            for part in self.samples
        ]
        text = json.dumps([parts, self._mixture.counts.tolist(), self._shuffle])
        return hashlib.sha256(text.encode()).hexdigest()


class _Requests:
    """What DataLoader takes for a sampler: a new iterator each time, from the loader's state on."""

    def __init__(self, loader: DemonstrationLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[_Request]:
        return self._loader.requests()


class _BatchMaker(Dataset[Any]):
    """Makes one batch from a request; runs in the workers."""

    def __init__(
        self,
        samples: Sequence[Samples],
        mixture: Mixture,
        augmentation: Augmentation | None,
        augment_on: AugmentOn,
        processing: ImageProcessing,
        seed: int,
    ) -> None:
        self._samples = samples
        self._offsets = mixture.offsets
        self._augmentation = augmentation
        self._on_device = augment_on == "device"
        self._processing = processing
        self._seed = seed
        if self._on_device:
            sizes = {part.dataset.cameras[camera] for part in samples for camera in part.cameras}
            if len(sizes) > 1:
                raise DataError(f"augment_on='device' needs images of one size, these have {sorted(sizes)}")
            self._raw_size = sizes.pop()

    def __getitem__(self, request: _Request) -> tuple[tuple[int, int], Batch]:
        """(epoch and position after it, the batch)."""
        count, views, size = len(request.samples), len(self._samples[0].cameras), self._processing.image_size
        owner = np.searchsorted(self._offsets, request.samples, "right") - 1
        local = request.samples - self._offsets[owner]
        height, width = self._raw_size if self._on_device else (size, size)
        images = torch.empty((count, views, height, width, 3), dtype=torch.uint8)
        into = images.numpy()
        draws: list[Draw] = []
        for row in range(count):
            rng = sample_rng(self._seed, request.epoch, int(request.positions[row]))
            part = self._samples[owner[row]]
            step = int(part.steps[local[row]])
            for view, camera in enumerate(part.cameras):
                image = part.dataset.image(camera, step)
                if self._augmentation is None:
                    into[row, view] = self._processing.grey_levels(image).transpose(1, 2, 0)
                    continue
                draw = self._augmentation.draw(rng, *image.shape[:2])
                if self._on_device:
                    into[row, view] = image
                    draws.append(draw)
                else:
                    augment(image, draw, size, into[row, view])
        batch: Batch = {"images": images} if self._on_device else {"pixels": images}
        if self._on_device:
            batch["draws"] = draws_to_tensor(draws).view(count, views, 7)
        for name in ("actions", "task_id", "proprio"):
            if name == "proprio" and not self._samples[0].has_proprio:
                continue
            batch[name] = torch.from_numpy(self._gather(name, owner, local))
        batch["valid"] = torch.from_numpy(request.valid)
        return (request.next_epoch, request.next_position), batch

    def _gather(self, name: str, owner: NDArray[np.int64], local: NDArray[np.int64]) -> NDArray[Any]:
        """One entry of the samples, in the batch's order."""
        parts, places = [], []
        for index in np.unique(owner):
            rows = np.flatnonzero(owner == index)
            part = self._samples[index]
            values = part.task_id[local[rows]] if name == "task_id" else getattr(part, name)(local[rows])
            parts.append(values)
            places.append(rows)
        return np.ascontiguousarray(np.concatenate(parts)[np.argsort(np.concatenate(places))])


def sample_rng(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The generator of one sample: Philox, whose key is (seed, epoch and position)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, (epoch << 40) | position], np.uint64)))


def _check_samples(samples: Sequence[Samples]) -> None:
    """Raise one DataError where the parts of a mixture cannot stand in one batch."""
    if not samples:
        raise DataError("there is nothing to load: give at least one dataset")
    first = samples[0]
    for part in samples[1:]:
        for what, mine, theirs in (
            ("views", len(part.cameras), len(first.cameras)),
            ("actions per chunk", part.chunk, first.chunk),
            ("action dimensions", part.dataset.actions.shape[1], first.dataset.actions.shape[1]),
            ("dimensions of proprioception", _state_dim(part), _state_dim(first)),
        ):
            if mine != theirs:
                raise DataError(f"{part.dataset.path} has {mine} {what}, {first.dataset.path} has {theirs}")


def _state_dim(part: Samples) -> int:
    return 0 if part.dataset.state is None else part.dataset.state.shape[1]


def _context(start_method: StartMethod) -> BaseContext:
    if start_method not in multiprocessing.get_all_start_methods():
        start_method = "spawn"
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        # The server imports PyTorch and this module once; every worker is forked from it, ready.
        context.set_forkserver_preload([__name__])
    return context


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    # One process per core: OpenCV's own threads would only get in the way.
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the process that loads is gone, however it went.

    PyTorch's workers watch their parent's id, but here that is the fork server, which in turn lives as long as its
    children do.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
