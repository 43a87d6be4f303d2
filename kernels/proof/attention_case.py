"""One shape of an attention table, as a case to compile: for the model's facts and for the gate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from vat_fast.kernels.attention_model import AttentionTable, Problem
from vat_fast.kernels.proof.case import Case
from vat_fast.kernels.proof.cases import cross_attention, vision_attention

EXTRA = 1
"""Extra tokens of cross-attention: their keys come from a tensor of their own, which takes registers and memory."""


def attention_case(table: AttentionTable, problem: Problem, config: Mapping[str, int] | None = None) -> Case:
    """To be compiled, or run whole where there is a GPU; `config` None is what ships."""
    of: Any = vision_attention
    shape: tuple[int, ...] = (problem.batch, problem.keys, problem.heads, problem.head_dim)
    outputs: tuple[str, ...] = ("dqkv",) if table.backward else ("out", "lse")
    if table.op.startswith("cross"):
        of = cross_attention
        shape = (problem.batch, problem.queries, problem.keys, EXTRA, problem.heads, problem.head_dim)
        outputs = ("dq", "dkv", "dkv_extra") if table.backward else ("out", "lse")
    make = partial(of._backward_inputs if table.backward else of._forward_inputs, *shape)
    launch = of._launch_backward if table.backward else of._launch_forward
    return Case(
        op=table.op,
        name=f"head dim {problem.head_dim} B{problem.batch}",
        make=make,
        launch=launch if config is None else partial(launch, config=config),
        outputs=outputs,
        useful_flops=0,
        useful_bytes=0,
        mma=True,
        edge=make,
        reference=of._reference_backward if table.backward else of._reference_forward,
        narrow_amd=vision_attention.ROW_SCALARS,
    )
