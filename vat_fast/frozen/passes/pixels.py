"""Raw camera bytes as the plan's input."""

from __future__ import annotations

from dataclasses import replace

from vat_fast.frozen import recipes
from vat_fast.frozen.plan import Access, Plan
from vat_fast.frozen.target import Target


def uint8_input(plan: Plan, target: Target) -> Plan:
    """Images come as (B, V, H, W, 3) bytes; W (p / 255 - mean) / std = (W / (255 std)) p + shift is exact.

    Images larger than the model's are cropped at the centre.
    """
    pixels = plan.buffers["pixels"]
    B, V, _, H, W = pixels.shape
    buffers = {**plan.buffers, "pixels": replace(pixels, shape=(B, V, H, W, 3), dtype="uint8")}
    weights, change = dict(plan.weights), {}
    for step in plan.all_steps:
        if step.op != "patch_embed":
            continue
        matrix, bias = (plan.weights[step.weights[role]] for role in ("weight", "bias"))
        folded = {
            "weight": replace(
                matrix, name=f"{matrix.name}'", recipe=recipes.pixels_into_weight(matrix.recipe, target.std)
            ),
            "bias": replace(
                bias,
                name=f"{bias.name}'",
                recipe=recipes.pixels_into_bias(matrix.recipe, bias.recipe, target.mean, target.std),
            ),
        }
        weights.update({weight.name: weight for weight in folded.values()})
        names = {role: weight.name for role, weight in folded.items()}
        options = {**step.options, "mean": target.mean, "std": target.std}
        inputs = {"pixels": Access("pixels", step.inputs["pixels"].tokens)}
        change[step.name] = (step.replace(inputs=inputs, weights={**step.weights, **names}, options=options),)
    return plan.replace(buffers=buffers, weights=weights).rewritten(change)
