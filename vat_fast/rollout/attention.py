"""Where a policy looks: the attention of its action tokens over the cameras' patches, through one episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vat_fast.config import VATConfig
from vat_fast.model import VAT
from vat_fast.observation import ImageProcessing
from vat_fast.policy import Policy
from vat_fast.rollout.drivers import Driver
from vat_fast.rollout.episode import Episode, SceneLike
from vat_fast.rollout.messages import Finished
from vat_fast.rollout.records import EpisodeKey
from vat_fast.rollout.settings import EvaluationSettings


@dataclass(frozen=True)
class Moment:
    """A look of the policy.

    step: control steps before it.
    images: of the cameras, in the order of the model's views, (H, W, 3) uint8, as the policy got them.
    maps: (L, V, G, G), attention of each layer over each view's G x G patches, see `attention_maps`.
    """

    step: int
    images: tuple[NDArray[np.uint8], ...]
    maps: NDArray[np.float32]


def attention_maps(config: VATConfig, attention: Sequence[Tensor]) -> NDArray[np.float32]:
    """How much the action tokens attend to each patch, (L, V, G, G) float32: the mean over heads and action tokens.

    A layer's entries add up to 1 less what goes to extra tokens (proprioception, timestep) and to class and register
    tokens. A view that the model does not attend to (`shared_keys="last_view"`) is all zeros.

    Args:
        config: of the model.
        attention: of `VATDetails`, (1, H, T + E, keys) each.
    """
    grid = config.image_size // config.patch_size
    last_only = config.action_stream == "shared" and config.shared_keys == "last_view"
    views = 1 if last_only else config.num_views
    maps = np.zeros((len(attention), config.num_views, grid, grid), np.float32)
    for layer, weights in enumerate(attention):
        # Keys are the extra tokens, then the views, each its prefix tokens and then its patches.
        mean = weights[0, :, : config.num_action_tokens].float().mean((0, 1))
        patches = mean[-config.num_keys :].unflatten(0, (views, -1))[:, -config.num_patches :]
        maps[layer, -views:] = patches.unflatten(1, (grid, grid)).cpu().numpy()
    return maps


def heat_on_camera(map_GG: NDArray[np.float32], height: int, width: int, image: ImageProcessing) -> NDArray[np.float32]:
    """A map over patches as a map over the pixels of the camera image that they came from, (height, width) float32.

    Undoes the image pipeline's centre crop and rotation; pixels outside of the crop, which the policy does not see,
    are 0. Between patch centres it is interpolated.

    Args:
        map_GG: over the model's patches.
        height, width: of the camera image, in pixels.
        image: the policy's image pipeline.
    """
    side = 1.0 if image.crop_area is None else float(np.sqrt(image.crop_area))
    rows, columns = (max(1, round(side * length)) for length in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    heat = np.zeros((height, width), np.float32)
    seen = Image.fromarray(map_GG).resize((columns, rows), Image.Resampling.BILINEAR)
    heat[top : top + rows, left : left + columns] = np.asarray(seen)
    # Either rotation undoes itself.
    if image.rotation == "rotate_180":
        return heat[::-1, ::-1]
    return heat[::-1] if image.rotation == "flip_vertical" else heat


class WatchedVAT:
    """A VAT, as a policy calls it, that keeps the attention maps of its last forward.

    Args:
        vat: eager; a frozen one computes no maps.
    """

    def __init__(self, vat: VAT) -> None:
        self._vat = vat
        self.maps: NDArray[np.float32] | None = None
        """(L, V, G, G) of the last forward; None before the first."""

    @property
    def config(self) -> VATConfig:
        """The architecture."""
        return self._vat.config

    def __call__(self, pixels: Tensor, task_id: Tensor, proprio: Tensor | None = None, /, **options: Any) -> Tensor:
        """As `VAT`, for a batch of one."""
        details = self._vat.details(pixels, task_id, proprio, **options)
        self.maps = attention_maps(self.config, details.attention)
        return details.actions


def watch_episode(
    policy: Policy, scene: SceneLike, task: str, key: EpisodeKey, settings: EvaluationSettings
) -> tuple[list[Moment], Finished]:
    """Play an episode as an evaluation does and keep every look, with where the policy attended.

    Attention is computed in another way than without maps, so that actions differ from an evaluation's in their last
    bits.

    Args:
        policy: eager (`Policy.from_pretrained(..., frozen=False)`).
        scene: of the episode's task.
        task: its name, as the policy knows it.
        key, settings: which episode, and how.

    Raises:
        ValueError: a policy whose model has no maps.
        TaskError: a task that the policy does not know.
    """
    if not isinstance(policy.vat, VAT):
        raise ValueError(f"attention maps need an eager VAT, got {type(policy.vat).__name__}; load with frozen=False")
    policy.task_id(task)
    vat = WatchedVAT(policy.vat)
    watched = Policy(vat, policy.config, policy.statistics, device=policy.device, dtype=policy.dtype)
    episode = Episode(scene, key, settings)
    driver = Driver(watched, key, settings)
    moments: list[Moment] = []
    step = 0
    while not episode.over:
        observation = episode.look().observation
        chunk = watched.predict([observation], task, driver.generator)[0]
        assert vat.maps is not None
        images = tuple(np.array(observation[camera]) for camera in policy.config.cameras)
        moments.append(Moment(step, images, vat.maps))
        actions = driver.actions(chunk)
        episode.act(actions)
        step += len(actions)
    return moments, episode.result()


def spread(moments: Sequence[Moment], count: int) -> list[Moment]:
    """At most `count` of the moments, from the first to the last, evenly spread."""
    chosen = np.unique(np.linspace(0, len(moments) - 1, min(count, len(moments))).round().astype(int))
    return [moments[index] for index in chosen]
