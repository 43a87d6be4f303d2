"""Small questions that several passes ask of a plan."""

from __future__ import annotations

from vat_fast.frozen.plan import Access, Plan, Step


def whole(plan: Plan, access: Access) -> bool:
    """Whether an access covers its buffer."""
    return plan.shape(access) == plan.buffers[access.buffer].shape


def only_reader(plan: Plan, readers: dict[str, list[Step]], buffer: str) -> Step | None:
    """The one step that reads `buffer`, reading all of it by one role; None if there is no such step.

    Outputs of the plan are read by the caller too.
    """
    found = readers.get(buffer, [])
    if len(found) != 1 or plan.buffers[buffer].role != "activation":
        return None
    accesses = [access for access in found[0].inputs.values() if access.buffer == buffer]
    return found[0] if len(accesses) == 1 and whole(plan, accesses[0]) else None


def only_writer(plan: Plan, writers: dict[str, list[Step]], access: Access) -> Step | None:
    """The one step that writes all of what is accessed and its whole buffer; None if there is no such step."""
    found = writers.get(access.buffer, [])
    if len(found) != 1 or not whole(plan, found[0].outputs["y"]):
        return None
    return found[0]
