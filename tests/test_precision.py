"""Whether a device multiplies bfloat16."""

from __future__ import annotations

import pytest
import torch

from vat_fast.precision import multiplies_bfloat16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False, "avx_ne_convert": True}, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True}, False),
    ],
)
def test_processors(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bfloat16("cpu") is expected


def test_graphics_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert multiplies_bfloat16(torch.device("cuda", 0)) is False


def test_this_processor_agrees_with_the_kernel_s_list() -> None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = {word for line in file if line.startswith("flags") for word in line.split()}
    except OSError:
        flags = set()
    if not flags:
        pytest.skip("no list of x86 features to compare with")
    assert multiplies_bfloat16("cpu") is bool(flags & {"avx512_bf16", "amx_bf16"})
