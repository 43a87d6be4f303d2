"""What devices do with narrow numbers: bfloat16 itself or emulated, sums of 8-bit products exact or saturating."""

from __future__ import annotations

import torch


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether the device has instructions for products of bfloat16.

    Without them (x86 before AVX512-BF16 and AMX: most desktop and many server processors) PyTorch converts each
    number first: correct, and several times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if hasattr(torch.cpu, "get_capabilities"):
        return any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # PyTorch before 2.10


def computes_bfloat16_in_onednn() -> bool:
    """Whether oneDNN has products of bfloat16 on this CPU at all, emulated or not (x86: AVX-512 or AVX-NE-CONVERT)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def saturates_int8() -> bool:
    """Whether this CPU adds pairs of 8-bit products in 16 bits, which full-range numbers overflow.

    x86 without VNNI and AMX: 255 * 127 * 2 is beyond 32767. Weights of at most 63 (7 bits) stay below it.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        there = torch.cpu.get_capabilities()
        if there.get("architecture") != "x86_64":
            return False
        return not any(there.get(name) for name in ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"))
    return not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())  # PyTorch before 2.10
