"""Matrix products in integers or 8-bit floats."""

from __future__ import annotations

from vat_fast.frozen.plan import Plan, Step
from vat_fast.frozen.target import Target


def quantise(plan: Plan, target: Target) -> Plan:
    """Linears of both streams take quantised weights (a scale per output channel) and activations.

    Patch embedding, the head and projections of a few numbers stay: they cost nothing and carry the result.
    """
    change: dict[str, tuple[Step, ...]] = {}
    for step in plan.all_steps:
        if step.op == "linear" and not step.name.startswith("head.") and "projector" not in step.name:
            change[step.name] = (step.replace(options={**step.options, "quantised": target.dtype}),)
    return plan.rewritten(change)
