"""What DeepSpeed wraps: a VAT whose call is its training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vat_fast.model import VAT


class Outcome(NamedTuple):
    """One forward of the training model; everything in float32."""

    loss: Tensor
    """Scalar, with its graph."""
    prediction: Tensor
    """(B, C, A), detached: normalised actions, or noise with the diffusion head."""
    target: Tensor
    """(B, C, A), what the prediction is compared with."""


class TrainingModel(nn.Module):
    """A VAT as DeepSpeed trains it; `engine.module.vat` is the VAT, whose parameter names the checkpoints keep.

    Args:
        vat: the model.
        autocast: dtype in which products run while the parameters stay float32; None for the parameters' own dtype.
        proprio_dropout: share of the samples whose proprioception training hides, as zeros.
        proprio_noise: standard deviation of the noise that training adds to it.
    """

    def __init__(
        self,
        vat: VAT,
        autocast: torch.dtype | None = None,
        proprio_dropout: float = 0.0,
        proprio_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.vat = vat
        self.autocast = autocast
        self.proprio_dropout, self.proprio_noise = proprio_dropout, proprio_noise

    def forward(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None, act: bool = False
    ) -> Outcome:
        """Loss, prediction and target of one batch.

        Args:
            batch: what `VAT.loss` takes; floats are cast to the parameters' dtype here. Proprioception that the
                model does not read may be there.
            generator: of noise and timesteps (diffusion head), and of what is done to proprioception.
            act: predict actions as a policy does, for which a diffusion head denoises; the loss is then their L1.
        """
        vat, dtype = self.vat, self.vat.pos_embed.dtype
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        if not vat.config.proprio_dim:
            inputs.pop("proprio", None)
        elif self.training:
            inputs["proprio"] = self._disturbed(inputs["proprio"], generator)
        device = inputs["pixels"].device.type
        with torch.autocast(device, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            if act:
                prediction = vat(inputs["pixels"], inputs.get("task_id"), inputs.get("proprio"), generator)
            else:
                prediction, target = vat.predict(inputs, generator)
        # The loss is float32's, against actions as they were before any cast; noise is drawn in the parameters' dtype.
        is_action = act or vat.config.head == "l1"
        prediction, target = prediction.float(), (batch["actions"] if is_action else target).float()
        loss = F.l1_loss(prediction, target) if is_action else F.mse_loss(prediction, target)
        return Outcome(loss, prediction.detach(), target)

    def _disturbed(self, proprio_BE: Tensor, generator: torch.Generator | None) -> Tensor:
        """Proprioception with noise, and hidden for some samples."""
        device = proprio_BE.device
        if self.proprio_noise:
            noise = torch.randn(proprio_BE.shape, device=device, generator=generator)
            proprio_BE = proprio_BE + self.proprio_noise * noise.to(proprio_BE.dtype)
        if self.proprio_dropout:
            kept = torch.rand((len(proprio_BE), 1), device=device, generator=generator) >= self.proprio_dropout
            proprio_BE = proprio_BE * kept
        return proprio_BE
