"""Which devices multiply bfloat16 themselves, and which only emulate it."""

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
