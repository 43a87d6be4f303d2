"""Learning to see: which patch shows which object, and where it is, read off the vision stream's tokens.

Action tokens find their object by attention over these tokens. The simulator knows where everything is, so that the
vision stream can learn it from single images, before and beside learning to act.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

METRES = 0.1
"""Unit of the positions that are learnt."""


class Labels(NamedTuple):
    """Where objects are in a batch of images. Objects that a scene does not have are NaN.

    places: (B, V, O, 2), column and row in each view, as fractions of the side; outside 0 to 1 where out of view.
    offsets: (B, O, 3), from the point between the finger pads to the object, metres.
    positions: (B, O, 3) in the world, metres.
    kinds: (O,), which kind each of the O objects is; several may be of one kind.
    """

    places: Tensor
    offsets: Tensor
    positions: Tensor
    kinds: Tensor


class Found(NamedTuple):
    """What the locator says of each object and view.

    scores: (B, V, P + 1, K), logits over patches and, last, "out of view", for each kind.
    targets: (B, V, P, O), share of each object in each patch: bilinear between the four nearest patch centres; 0 where
        out of view.
    located: (B, V, O, 6), offset from the hand and position in units of `METRES`, read at the object's patches.
    """

    scores: Tensor
    targets: Tensor
    located: Tensor


class Locator(nn.Module):
    """Reads kinds and places of objects from vision tokens (B, V, P, D).

    Args:
        width: D.
        kinds: K, kinds of objects there are.
        views: V.
    """

    def __init__(self, width: int, kinds: int, views: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(kinds, width) * width**-0.5)
        self.absent = nn.Parameter(torch.zeros(views, kinds))
        self.kind = nn.Embedding(kinds, width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, 6 * views)
        self.views = views

    def scores(self, tokens_BVPD: Tensor) -> tuple[Tensor, Tensor]:
        """The normed tokens, and logits (B, V, P + 1, K) over patches and "out of view" for each kind."""
        tokens = self.norm(tokens_BVPD)
        found = tokens @ self.query.T
        absent = self.absent[None, :, None].expand(len(found), -1, -1, -1)
        return tokens, torch.cat([found, absent.to(found.dtype)], dim=2)

    def read(self, tokens_BVPD: Tensor, weights_BVPO: Tensor, kinds_O: Tensor) -> Tensor:
        """Offsets and positions (B, V, O, 6) from normed tokens, averaged with weights over the patches."""
        pooled = weights_BVPO.transpose(-1, -2) @ tokens_BVPD + self.kind(kinds_O)
        each = self.fc2(F.gelu(self.fc1(pooled))).unflatten(-1, (self.views, 6))
        return torch.stack([each[:, view, :, view] for view in range(self.views)], dim=1)

    def forward(self, tokens_BVPD: Tensor, labels: Labels) -> Found:
        """Scores, and positions read where the objects truly are."""
        tokens, scores = self.scores(tokens_BVPD)
        targets = patch_shares(labels.places, round(tokens.shape[2] ** 0.5)).to(tokens.dtype)
        return Found(scores, targets, self.read(tokens, targets, labels.kinds))


def locator_loss(found: Found, labels: Labels) -> tuple[Tensor, Tensor]:
    """(cross entropy of the patches, mean L1 of offsets and positions in units of `METRES`).

    Kinds in the scene count as much as all those that are not.
    """
    targets = found.targets.float()
    kinds = found.scores.shape[-1]
    share = torch.zeros(*targets.shape[:3], kinds, device=targets.device).index_add_(3, labels.kinds, targets)
    total = share.sum(2, keepdim=True)
    share = torch.cat([share / total.clamp(min=1e-6) * (total > 0), (total == 0).float()], dim=2)
    entropy = -(share * found.scores.float().log_softmax(2)).sum(2)
    present_BO = ~labels.positions.isnan().any(-1)
    here_BK = torch.zeros(len(targets), kinds, device=targets.device).index_add_(1, labels.kinds, present_BO.float())
    here = (here_BK > 0)[:, None].expand_as(entropy)
    where = entropy[here].mean() + 0.25 * entropy[~here].mean().nan_to_num()
    truth = torch.cat([labels.offsets, labels.positions], dim=-1)[:, None].expand_as(found.located)
    seen = targets.sum(2) > 0
    error = (found.located.float() - truth / METRES).abs().mean(-1)
    return where, error[seen].mean()


def patch_shares(places_BVO2: Tensor, side: int) -> Tensor:
    """How an object's place is divided between the patches around it, (B, V, P, O): bilinear weights, or 0 if unseen.

    Args:
        places_BVO2: columns and rows as fractions of the image's side.
        side: patches per row and column.
    """
    seen = ((places_BVO2 >= 0) & (places_BVO2 < 1)).all(-1)
    cells = torch.arange(side, device=places_BVO2.device)
    centre = (places_BVO2.nan_to_num() * side - 0.5).clamp(0, side - 1)
    near = (1 - (centre[..., None] - cells).abs()).clamp(min=0)  # (B, V, O, 2, side)
    shares = near[..., 1, :, None] * near[..., 0, None, :]
    return (shares * seen[..., None, None]).flatten(-2).transpose(-1, -2)


@torch.no_grad()
def location_errors(locator: Locator, tokens_BVPD: Tensor, labels: Labels) -> dict[str, Tensor]:
    """How far off the locator is when it has to find the objects itself, each (B, V, O), NaN where out of view.

    Returns:
        offset_cm: horizontal error of the offset from the hand; position_cm: of the position in the world; patches:
        distance in the image between the most likely patch and the true place, in patches.
    """
    tokens, scores = locator.scores(tokens_BVPD)
    of_object = scores[:, :, :-1].index_select(3, labels.kinds).float()
    side = round(tokens.shape[2] ** 0.5)
    best = of_object.argmax(2)
    # The mean over the best patch and those around it, as an attention head would take it.
    rows, columns = torch.arange(side * side) // side, torch.arange(side * side) % side
    near = (rows[:, None] - rows).abs().maximum((columns[:, None] - columns).abs()) <= 1
    nearby = near.to(scores.device)[best].transpose(-1, -2)
    weights = of_object.masked_fill(~nearby, -torch.inf).softmax(2).to(tokens.dtype)
    located = locator.read(tokens, weights, labels.kinds).float() * METRES
    seen = ((labels.places >= 0) & (labels.places < 1)).all(-1)

    def horizontal(part: Tensor, truth: Tensor) -> Tensor:
        error = 100 * (part - truth[:, None])[..., :2].norm(dim=-1)
        return error.masked_fill(~seen, torch.nan)

    places = torch.stack([best % side, best // side], -1) + 0.5
    patches = (places - labels.places * side).norm(dim=-1).masked_fill(~seen, torch.nan)
    return {
        "offset_cm": horizontal(located[..., :3], labels.offsets),
        "position_cm": horizontal(located[..., 3:], labels.positions),
        "patches": patches,
    }
