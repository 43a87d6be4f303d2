"""Block sizes by architecture and shape: how an op's table is written, and how a launcher reads it.

An op file owns a table ``CONFIGS`` of plain data, so that a retuner can print a new one to paste:

    CONFIGS = {
        90: [({"M": 64}, dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=4)),
             ({}, dict(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=3))],
        "default": [({}, dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3))],
    }

Keys are CUDA compute capabilities (80, 90, ...), AMD targets ("gfx942") and "default". The first rule whose
conditions all hold wins. A condition is a number (the value is at most this), a pair (low, high; both included) or
a string (equal). An empty condition always holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from triton import knobs
from triton.runtime import driver

Arch = int | str
Condition = int | tuple[int, int] | str
Rule = tuple[Mapping[str, Condition], Mapping[str, Any]]
ConfigTable = Mapping[Arch, Sequence[Rule]]

# Targets that borrow another target's table: same tensor-core generation and the nearest shared-memory size.
RELATED_ARCH: dict[Arch, Arch] = {
    86: 89,
    87: 80,
    103: 100,
    120: 89,
    121: 89,
    "gfx90a": "gfx942",
    "gfx950": "gfx942",
}

# Kernels use bf16 tensor-core instructions and cp.async, which begin with compute capability 8.0.
OLDEST_CUDA_ARCH = 80
INTERPRETER_ARCH = 80

_arch_override: ContextVar[Arch | None] = ContextVar("vat_fast_arch_override", default=None)


def current_arch() -> Arch:
    """The target that a launch made now would compile for.

    Returns a CUDA compute capability such as 90, or an AMD target such as "gfx942". Under ``TRITON_INTERPRET=1``
    no compiler is involved and the answer is ``INTERPRETER_ARCH``. ``override_arch`` comes before all of these.

    Raises:
        RuntimeError: no GPU driver is active, or the CUDA device is older than compute capability 8.0.
    """
    override = _arch_override.get()
    if override is not None:
        return override
    if knobs.runtime.interpret:
        return INTERPRETER_ARCH
    try:
        target = driver.active.get_current_target()
    except RuntimeError as error:
        raise RuntimeError(
            "Triton kernels need a CUDA or ROCm device and none is active; use CPU tensors with the torch ops, "
            "or set TRITON_INTERPRET=1 before importing triton to run the kernels on the CPU"
        ) from error
    if target.backend != "cuda":
        return str(target.arch).split(":")[0]
    arch = int(target.arch)
    if arch < OLDEST_CUDA_ARCH:
        raise RuntimeError(
            f"this device has compute capability {arch / 10:.1f}, the kernels need 8.0 or newer; use the torch ops"
        )
    return arch


@contextmanager
def override_arch(arch: Arch) -> Iterator[None]:
    """Make ``current_arch`` answer `arch`, so that tests can exercise another target's table."""
    token = _arch_override.set(arch)
    try:
        yield
    finally:
        _arch_override.reset(token)


def pick(table: ConfigTable, arch: Arch, **shape: int | str) -> dict[str, Any]:
    """The configuration that `table` gives for `shape` on `arch`.

    Rules are taken from `arch`, else from its related target, else from "default"; the first that matches wins.

    Args:
        table: see the module docstring.
        arch: as returned by ``current_arch``.
        **shape: the values that conditions are compared with, such as M=512, N=4304, dtype="bf16".

    Raises:
        ValueError: the table has no rules for `arch`, none matches, or a condition names a value not in `shape`.
    """
    for key in (arch, RELATED_ARCH.get(arch, arch), "default"):
        if key in table:
            rules = table[key]
            break
    else:
        raise ValueError(f"no configurations for {arch!r} and no 'default'; the table has {list(table)}; add one")
    for conditions, config in rules:
        if all(_holds(name, wanted, shape) for name, wanted in conditions.items()):
            return dict(config)
    raise ValueError(f"no rule for {arch!r} matches {shape}; end the list with an empty condition {{}}")


ROW_CONDITIONS = ("M", "N", "K")
ROW_FIELDS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "SPLIT_K", "num_warps", "num_stages")


def rules(rows: Sequence[tuple[int | None, ...]]) -> list[Rule]:
    """Rules from compact rows: bounds of M, N and K (None: any), then ``ROW_FIELDS``. See kernels/tables.py."""
    count = len(ROW_CONDITIONS)
    return [
        (
            {name: bound for name, bound in zip(ROW_CONDITIONS, row[:count], strict=True) if bound is not None},
            dict(zip(ROW_FIELDS, row[count:], strict=True)),
        )
        for row in rows
    ]


ATTENTION_FIELDS = ("BLOCK_M", "BLOCK_N", "SPLITS", "num_warps", "num_stages")


def attention_rules(
    table: Mapping[Arch, Sequence[tuple[int | None, ...]]], float32: Mapping[str, int]
) -> dict[Arch, list[Rule]]:
    """Rules of the attention kernels, by target, from compact rows for 16-bit types: bounds of the head dim and of the
    programs of 64 queries (None: any), then ``ATTENTION_FIELDS``. `float32` is the rule for anything wider."""
    found: dict[Arch, list[Rule]] = {}
    for arch, rows in table.items():
        found[arch] = []
        for row in rows:
            bounds = {"bits": 16, "head_dim": row[0], "programs": row[1]}
            conditions = {name: bound for name, bound in bounds.items() if bound is not None}
            found[arch].append((conditions, dict(zip(ATTENTION_FIELDS, row[2:], strict=True))))
        found[arch].append(({}, float32))
    return found


def _holds(name: str, wanted: Condition, shape: Mapping[str, int | str]) -> bool:
    if name not in shape:
        raise ValueError(f"a rule asks for {name!r}, the launcher gave {sorted(shape)}; pass {name}=... to pick")
    value = shape[name]
    if isinstance(wanted, str) or isinstance(value, str):
        return value == wanted
    low, high = wanted if isinstance(wanted, tuple) else (None, wanted)
    return (low is None or value >= low) and value <= high
