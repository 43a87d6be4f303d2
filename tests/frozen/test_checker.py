"""The checker finds every kind of fault, planted in plans that are right."""

from dataclasses import replace

import pytest

from benchmarks.variants import VARIANTS, small_config
from vat_fast.frozen.checker import check, faults
from vat_fast.frozen.engine import make_plan
from vat_fast.frozen.plan import Access, Plan
from vat_fast.frozen.streams import RING
from vat_fast.frozen.target import Target

TRITON = Target("triton", "bf16")


def plan(variant: str = "VAT", **changes: int) -> Plan:
    return make_plan(small_config("siglip2-so400m", variant).replace(**changes), 2, TRITON)


def changed(plan: Plan, name: str, **fields: object) -> Plan:
    steps = tuple(step.replace(**fields) if step.name == name else step for step in plan.steps)
    return plan.replace(steps=steps)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("executor", ["torch", "triton"])
def test_plans_are_clean(variant: str, executor: str) -> None:
    check(make_plan(small_config("dinov2-large", variant), 2, Target(executor, "bf16")))


def test_every_dropped_event_is_a_race() -> None:
    whole = plan(depth=9)
    waiting = [step for step in whole.steps if step.waits]
    assert {step.stream for step in waiting} == {"vision", "action"}
    for step in waiting:
        assert list(faults(changed(whole, step.name, waits=()))), f"{step.name} waited for nothing"


def test_a_read_before_its_write() -> None:
    whole = plan()
    steps = list(whole.steps)
    at = next(i for i, step in enumerate(steps) if step.op == "attention")
    steps[at - 1], steps[at] = steps[at], steps[at - 1]
    assert any("not certainly written before" in fault for fault in faults(whole.replace(steps=tuple(steps))))


def test_memory_taken_from_a_live_buffer() -> None:
    whole = plan()
    moved = {**whole.storage, "vision.1.attention": whole.storage["vision.0.project"]}
    found = list(faults(whole.replace(storage=moved)))
    assert any("still reads" in fault or "same memory" in fault for fault in found)


def test_every_possible_overlap_of_neighbours_is_seen() -> None:
    """Put each buffer where the buffer that its own writer reads lies: a step would overwrite its input."""
    whole = plan()
    for step in whole.steps:
        out = step.outputs["y"].buffer
        for access in step.inputs.values():
            if access.buffer in whole.storage and out in whole.storage:
                moved = {**whole.storage, out: whole.storage[access.buffer]}
                assert list(faults(whole.replace(storage=moved))), f"{step.name} may overwrite {access.buffer}"


def test_two_writers_without_order() -> None:
    whole = plan()
    step = next(step for step in whole.steps if step.name == "action.1.fc1")
    clash = changed(whole, step.name, outputs={"y": Access("vision.1.gelu", tokens=(0, 50))})
    assert any("both write" in fault for fault in faults(clash))


def test_an_event_from_the_future() -> None:
    whole = plan()
    first = whole.steps[0].name
    assert any("not among the steps before it" in f for f in faults(changed(whole, first, waits=("head.fc2",))))


def test_a_write_to_an_input() -> None:
    whole = plan()
    step = whole.steps[3]
    clash = changed(whole, step.name, outputs={"y": Access("pixels")})
    assert any("which is input" in fault for fault in faults(clash))


def test_a_repeated_name() -> None:
    whole = plan()
    assert any("repeat" in fault for fault in faults(whole.replace(steps=(*whole.steps, whole.steps[0]))))


def test_a_loop_must_not_lose_what_its_next_round_reads() -> None:
    whole = make_plan(small_config("siglip2-so400m", "diffusion"), 2, TRITON)
    kept = next(s for s in whole.loop if s.op == "cross_attention").inputs["kv"].buffer
    taken = whole.loop[-2].outputs["y"].buffer
    moved = {**whole.storage, taken: whole.storage[kept]}
    assert any("next round" in fault for fault in faults(whole.replace(storage=moved)))


def test_vision_gets_ahead_by_a_bounded_number_of_layers() -> None:
    small, large = plan(depth=9), plan(depth=17)
    kv = small.buffers["vision.1.project"].bytes
    assert large.memory - small.memory < kv
    live = [name for name in large.storage if name.endswith("project")]
    assert len({large.storage[name] for name in live}) <= RING + 2


def test_check_raises_with_every_fault() -> None:
    whole = plan()
    broken = replace(whole, steps=tuple(step.replace(waits=()) for step in whole.steps))
    with pytest.raises(ValueError, match=r"the plan has \d+ faults:"):
        check(broken)
