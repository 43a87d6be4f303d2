"""What a plan is made for: an executor, a precision, and the form of the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Executor = Literal["torch", "native", "onednn", "openvino", "triton"]
Precision = Literal["fp32", "bf16", "fp16", "int16", "int8", "fp8"]
TAKES_SAMPLES = ("int16", "int8")
"""On CPUs, `calibration=` makes these better."""


@dataclass(frozen=True)
class Target:
    """executor: who runs the plan. dtype: integers and "fp8" quantise matrix products and keep the rest in `compute`.

    images: "float" is VAT's own signature, normalised (B, V, 3, H, W); "uint8" takes (B, V, H, W, 3) bytes and needs
    `mean` and `std` per channel. arch: compute capability or AMD target whose kernel configurations apply (Triton);
    None: of the device at hand.

    Raises:
        ValueError: "int16" by another executor than "native", which alone has it.
    """

    executor: Executor = "torch"
    dtype: Precision = "fp32"
    images: Literal["float", "uint8"] = "float"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    arch: int | str | None = 90

    def __post_init__(self) -> None:
        if self.dtype == "int16" and self.executor != "native":
            raise ValueError(
                f"the {self.executor} executor has no int16: it is for x86 processors, with the native executor; "
                'take "bf16" or "fp16" elsewhere'
            )

    @property
    def quantised(self) -> bool:
        """Whether matrix products run in integers or 8-bit floats."""
        return self.dtype in ("int16", "int8", "fp8")

    @property
    def compute(self) -> str:
        """The dtype of activations and of everything that is not quantised."""
        if not self.quantised:
            return self.dtype
        return "fp32" if self.executor == "native" else "bf16"
