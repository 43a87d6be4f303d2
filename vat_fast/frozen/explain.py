"""A plan in words and numbers: what runs, what it costs, what each pass saved, and what bounds it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vat_fast.config import VATConfig
from vat_fast.frozen.build import base_plan
from vat_fast.frozen.costs import step_cost
from vat_fast.frozen.engine import make_plan
from vat_fast.frozen.passes import PASSES, SCHEDULING, run_passes
from vat_fast.frozen.plan import Plan
from vat_fast.frozen.target import Target
from vat_fast.precision import multiplies_bfloat16

PURPOSE = {
    "split_streams": "vision and action steps in two streams, ordered by events",
    "reuse_buffers": "activations share memory where the order of the steps allows it",
}


@dataclass(frozen=True)
class Explanation:
    """`steps`, `passes`, `totals` and, for known devices, `bounds`, as plain data."""

    title: str
    steps: list[dict[str, Any]]
    passes: list[dict[str, Any]]
    totals: dict[str, Any]
    bounds: list[dict[str, Any]]
    notes: list[str]

    def json(self) -> str:
        """Everything as a JSON object."""
        return json.dumps(vars(self), indent=1) + "\n"

    def text(self, every_step: bool = True) -> str:
        """Tables for a terminal, each in at most 120 columns or so."""
        lines = [self.title, ""]
        if every_step:
            head = f"{'step':26}{'op':16}{'stream':8}{'reads':>22} {'writes':>15}{'MFLOP':>9}{'KB':>9}"
            lines.append(f"{head}{'launches':>9}  waits for")
            for s in self.steps:
                lines.append(
                    f"{s['name']:26}{s['op']:16}{s['stream']:8}"
                    f"{_shape(s['reads']):>22} {_shape(s['writes']):>15}"
                    f"{s['flops'] / 1e6:9,.0f}{s['bytes'] / 1e3:9,.0f}"
                    f"{s['launches']:9}  {', '.join(s['waits'])}"
                )
            lines.append("")
        head = f"{'pass':24}{'steps':>7}{'launches':>10}{'GFLOP':>9}{'MB moved':>10}"
        lines.append(f"{head}{'M params':>10}{'MB memory':>11}  what it does")
        for p in self.passes:
            lines.append(
                f"{p['name']:24}{p['steps']:7}{p['launches']:10}{p['flops'] / 1e9:9.1f}{p['bytes'] / 1e6:10,.0f}"
                f"{p['parameters'] / 1e6:10,.1f}{p['memory'] / 1e6:11,.0f}  {p['purpose']}"
            )
        t = self.totals
        lines += [
            "",
            f"total: {t['launches']} launches, {t['flops'] / 1e9:,.1f} GFLOP, {t['bytes'] / 1e6:,.0f} MB moved if "
            f"nothing is cached, {t['parameters'] / 1e6:,.1f} M parameters, {t['memory'] / 1e6:,.1f} MB of activations",
        ]
        if self.bounds:
            lines += ["", "Bounds, not measurements: no implementation of this plan can be faster on the device."]
            head = f"{'device':10}{'floor us':>10}{'plan us':>10}{'plan/floor':>12}{'DRAM/floor':>12}"
            lines.append(f"{head}{'path us':>10}{'work us':>10}")
            for b in self.bounds:
                lines.append(
                    f"{b['device']:10}{b['floor_us']:10,.0f}{b['plan_us']:10,.0f}{b['share']:12.2f}{b['traffic']:12.2f}"
                    f"{b['path_us']:10,.0f}{b['work_us']:10,.0f}"
                )
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes])


def explain(
    config: VATConfig, target: Target, batch: int = 1, device: str | None = None, without: Collection[str] = ()
) -> Explanation:
    """The explanation of the plan for `target`; bounds for one known device, or for all.

    Raises:
        ValueError: unknown device, or a pass to leave out that does not exist.
    """
    plan = make_plan(config, batch, target, without)
    executor = target.executor
    steps = []
    for step in plan.all_steps:
        cost = step_cost(plan, step, executor)
        steps.append(
            {
                "name": step.name,
                "op": step.op,
                "backend": backend(step.op, executor, step.options),
                "stream": step.stream,
                "reads": {role: list(plan.shape(a)) for role, a in step.inputs.items()},
                "writes": {role: list(plan.shape(a)) for role, a in step.outputs.items()},
                "options": {k: v for k, v in step.options.items() if not isinstance(v, tuple)},
                "flops": cost.flops,
                "bytes": cost.bytes,
                "weight_bytes": cost.weight_bytes,
                "launches": cost.launches,
                "waits": list(step.waits),
            }
        )
    names = ", ".join(f"{d}" for d in [config.preset, f"{config.num_views} views", f"batch {batch}", target.dtype])
    return Explanation(
        title=f"{names}, {executor} executor: {len(plan.all_steps)} steps",
        steps=steps,
        passes=_passes(config, target, batch, plan, without),
        totals=_summary(plan, executor),
        bounds=_bounds(plan, device) if executor == "triton" else [],
        notes=_notes(plan, target, config),
    )


def backend(op: str, executor: str, options: Any) -> str:
    """Who computes a step."""
    if executor != "triton":
        return executor
    from vat_fast.frozen.costs import in_triton

    return "triton" if in_triton(op, options) else "torch"


def _summary(plan: Plan, executor: str) -> dict[str, Any]:
    rounds = {step.name: plan.repeats for step in plan.loop}
    totals = {"launches": 0, "flops": 0, "bytes": 0}
    for step in plan.all_steps:
        cost, times = step_cost(plan, step, executor), rounds.get(step.name, 1)
        for key in totals:
            totals[key] += getattr(cost, key) * times
    return {**totals, "parameters": plan.parameters, "memory": plan.memory, "steps": len(plan.all_steps)}


def _passes(
    config: VATConfig, target: Target, batch: int, final: Plan, without: Collection[str]
) -> list[dict[str, Any]]:
    base = base_plan(config, batch, target.compute)
    rows = [{"name": "(none)", "purpose": "one operation a step, as eager PyTorch", **_summary(base, target.executor)}]
    plan = base
    for done, plan in run_passes(base, target, without):
        rows.append({"name": done.name, "purpose": done.purpose, **_summary(plan, target.executor)})
    rows += [
        {"name": name, "purpose": PURPOSE[name], **_summary(final, target.executor)}
        for name in SCHEDULING
        if name in final.applied
    ]
    return rows


def _bounds(plan: Plan, device: str | None) -> list[dict[str, Any]]:
    from vat_fast.frozen.bounds import bounds
    from vat_fast.kernels.static_model import DEVICES

    names = list(DEVICES) if device is None else [device]
    found = [bounds(plan, name) for name in names]
    return [
        {
            "device": b.device,
            "floor_us": b.floor_us,
            "plan_us": b.plan_us,
            "path_us": b.path_us,
            "work_us": b.work_us,
            "share": b.share,
            "traffic": b.traffic,
            "floor_bytes": b.floor_bytes,
            "dram_bytes": b.dram_bytes,
            "steps_us": b.steps_us,
        }
        for b in found
    ]


def _notes(plan: Plan, target: Target, config: VATConfig) -> list[str]:
    """What runs slower than it could, and why."""
    notes = []
    left = [p.name for p in PASSES if p.when(target) and p.name not in plan.applied]
    if left:
        notes.append(f"Passes switched off: {', '.join(left)}.")
    if config.num_extra_tokens:
        notes.append(
            "The first action layer is computed at every step: proprioception or the diffusion timestep changes it."
        )
    if target.executor in ("openvino", "onednn") and target.compute == "bf16" and not multiplies_bfloat16("cpu"):
        how = "computed in float32" if target.executor == "openvino" else "emulated, slower than fp32"
        notes.append(f"This processor does not multiply bfloat16 itself: what is bf16 here is {how}.")
    if target.executor == "triton":
        slow = sorted({s.op for s in plan.all_steps if backend(s.op, "triton", s.options) == "torch"})
        if slow:
            notes.append(f"Run as PyTorch operators, several launches each: {', '.join(slow)}.")
        if target.images == "float":
            notes.append('Patch embedding from float pixels runs in PyTorch; images="uint8" makes it one launch.')
    return notes


def _shape(accesses: dict[str, list[int]]) -> str:
    first = next(iter(accesses.values()), [])
    return "x".join(map(str, first)) + (f" +{len(accesses) - 1}" if len(accesses) > 1 else "")
