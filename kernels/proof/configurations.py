"""One case for every configuration that ships, of the GEMMs and of attention, so that the gate compiles them all.

The registered cases pick the configurations of the model's own shapes. The tables hold more: each distinct row is
compiled here at a shape that picks it, for its own target alone. fp32 rules are left out: they are for checking, and
`fp32_twins` compiles them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from vat_fast.kernels import configs, gemm, low_precision, tables
from vat_fast.kernels.attention_model import ATTENTION_TABLES
from vat_fast.kernels.proof.attention_case import attention_case
from vat_fast.kernels.proof.case import Case, Tensors, all_cases
from vat_fast.kernels.proof.cases import gemm as gemm_cases
from vat_fast.kernels.proof.cases import low_precision as low_precision_cases

OP = "configuration"
LARGEST_M = 8192
# Widths on either side of the tables' bounds: the model's width and its hidden size.
NARROW, WIDE = 1152, 4304


def _shape(conditions: Mapping[str, configs.Condition]) -> dict[str, int]:
    """The largest shape of interest within a rule's bounds."""

    def bound(name: str, largest: int, smaller: int) -> int:
        wanted = conditions.get(name, largest)
        limit = wanted[1] if isinstance(wanted, tuple) else int(wanted)
        return largest if limit >= largest else limit if name == "M" else smaller

    return {"M": bound("M", LARGEST_M, 0), "N": bound("N", WIDE, NARROW), "K": bound("K", WIDE, NARROW)}


def _rows(table: configs.ConfigTable, dtype: str) -> list[tuple[configs.Arch, dict[str, int]]]:
    """(target, shape) for each distinct configuration that a shape of interest picks."""
    found: list[tuple[configs.Arch, dict[str, int]]] = []
    for arch, rules in table.items():
        seen: list[Mapping[str, Any]] = []
        for conditions, _ in rules:
            if conditions.get("dtype", dtype) != dtype:
                continue
            shape = _shape(conditions)
            config = configs.pick(table, arch, dtype=dtype, **shape)
            if config not in seen:
                seen.append(config)
                found.append((arch, shape))
    return found


def _cases(
    kind: str,
    table: configs.ConfigTable,
    dtype: str,
    make: Callable[[int, int, int], Case],
    wide_k: int = WIDE,
) -> list[Case]:
    """wide_k: K of the cases that are WIDE in N, where the table bounds neither."""
    shapes = [
        (arch, shape | ({"K": min(shape["K"], wide_k)} if shape["N"] == WIDE else {}))
        for arch, shape in _rows(table, dtype)
    ]
    return [
        # Flops are counted at the registered cases; counting them for every row would take longer than compiling.
        replace(
            make(shape["M"], shape["N"], shape["K"]),
            op=OP,
            name=f"{kind} {arch} M{shape['M']} N{shape['N']} K{shape['K']}",
            archs=(arch,),
            useful_flops=0,
        )
        for arch, shape in shapes
    ]


def _linear(M: int, N: int, K: int) -> Case:
    parts = ("norm", "gelu") if N > K else ("residual", "scale")
    return gemm_cases._case("", M, N, K, *parts)


def _linear_8bit_copy(M: int, N: int, K: int) -> Case:
    return gemm_cases._case("", M, N, K, "residual", "scale", "eight")


def _int8(M: int, N: int, K: int) -> Case:
    return low_precision_cases._case("", M, N, K, torch.int8)


def _int8_to_int8(M: int, N: int, K: int) -> Case:
    group, kind = (64, "hidden") if N > NARROW else (128, "stream")
    return low_precision_cases._case("", M, N, K, torch.int8, group, kind)


def _attention_cases() -> list[Case]:
    """The shape that stands for each rule of the attention tables, for the targets that have the rule."""
    cases = []
    for name, table in ATTENTION_TABLES.items():
        rules = configs.attention_rules(getattr(tables, name), {})
        for arch in rules:
            seen = []
            for _, problem in table.problems():
                shape = {"bits": 16, "head_dim": problem.head_dim}
                config = configs.pick(rules, arch, programs=problem.programs, **shape)
                if (shape, config) not in seen:
                    seen.append((shape, config))
                    case = attention_case(table, problem)
                    cases.append(replace(case, op=OP, name=f"{name.lower()} {arch} {case.name}", archs=(arch,)))
    return cases


def configuration_cases() -> list[Case]:
    """Every shipped configuration of every target: GEMMs in bf16 and int8, alone and writing 8 bits, and attention."""
    return [
        *_attention_cases(),
        *_cases("bf16", gemm.CONFIGS, "bf16", _linear),
        *_cases("bf16+int8", gemm.GROUPED_CONFIGS, "bf16", _linear_8bit_copy),
        *_cases("int8", low_precision.CONFIGS, "int8", _int8),
        # The wide GEMM that writes 8 bits is fc1, which reads the model's width.
        *_cases("int8+int8", low_precision.GROUPED_CONFIGS, "int8", _int8_to_int8, wide_k=NARROW),
    ]


def _in_fp32(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    return lambda: {name: x.float() if x.dtype == torch.bfloat16 else x for name, x in make().items()}


def fp32_twins() -> list[Case]:
    """The first case of each bf16 op in fp32, on one target of each kind of tensor core: must compile and fit."""
    twins: dict[str, Case] = {}
    for case in all_cases():
        if case.op in ("low_precision", "layers", "gemm") or case.op in twins:
            continue
        twins[case.op] = replace(
            case,
            op=OP,
            name=f"fp32 {case.op}",
            make=_in_fp32(case.make),
            edge=_in_fp32(case.edge),
            archs=(80, 90),
            mma=False,
            useful_flops=0,
            for_checking=True,
        )
    return list(twins.values())


def gate_cases() -> list[Case]:
    """Everything that the gate compiles: registered cases, shipped configurations, fp32 twins."""
    return [*all_cases(), *configuration_cases(), *fp32_twins()]
