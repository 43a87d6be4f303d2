"""The kernels' shipped block sizes for a step of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vat_fast.frozen.costs import gemm_shape
from vat_fast.frozen.plan import Plan, Step

if TYPE_CHECKING:
    from vat_fast.kernels.gemm import LastRows

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EIGHT_BIT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def blocks(plan: Plan, step: Step, arch: int | str | None = None) -> dict[str, Any]:
    """BLOCK_M, BLOCK_N, SPLIT_K and the rest for a linear or patch embedding; arch None: of the current device."""
    from vat_fast.kernels.gemm import linear_config
    from vat_fast.kernels.low_precision import quant_linear_config
    from vat_fast.kernels.patch_embed import patch_embed_config

    M, N, K = gemm_shape(plan, step)
    dtype, eight_out = FLOATS[plan.dtype], "eight" in step.outputs
    if step.op == "patch_embed":
        # Prefix tokens are rows of the kernel too.
        rows = plan.shape(step.outputs["y"])
        return {"SPLIT_K": 1, **patch_embed_config(rows[0] * rows[1], N, dtype, arch)}
    if "quantised" in step.options:
        narrow, group = EIGHT_BIT[step.options["quantised"]], step.option("group", K)
        return quant_linear_config(M, N, K, narrow, group, arch, eight_out)
    return linear_config(M, step.option("last", (0, N))[1], K, dtype, arch, eight_out)


def last_rows(plan: Plan, step: Step) -> LastRows | None:
    """What the kernel is told of the step's option `last`; nothing in 8 bits, where all tokens get all columns."""
    from vat_fast.kernels.gemm import LastRows

    if "last" not in step.options or "quantised" in step.options:
        return None
    rows, column = step.options["last"]
    return LastRows(rows, plan.shape(step.outputs["y"])[1], column)
