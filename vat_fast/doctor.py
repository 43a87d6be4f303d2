"""What this machine offers vat_fast: versions, devices, optional packages, and what each missing one would bring."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from vat_fast import __version__
from vat_fast.frozen.cpu import has_integers
from vat_fast.ops import choose
from vat_fast.precision import multiplies_bfloat16, saturates_int8
from vat_fast.rollout.install_check import simulator_report

_OPTIONAL = {
    "timm": ("pretrained vision backbones", "pip install 'vat_fast[timm]'"),
    "triton": ("fused GPU kernels", "comes with PyTorch's CUDA and ROCm builds on Linux"),
    "flash_attn": ("flash-attention on CUDA, used where it is faster", "pip install 'vat_fast[cuda]'"),
    "deepspeed": ("ZeRO training", "pip install 'vat_fast[train]'"),
    "peft": ("low-rank adapters in training", "pip install 'vat_fast[train]'"),
    "h5py": ("LIBERO HDF5 demonstrations", "pip install 'vat_fast[data]'"),
}
_DISTRIBUTION = {"flash_attn": "flash-attn"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(_DISTRIBUTION.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return None


def _bfloat16() -> str:
    if multiplies_bfloat16("cpu"):
        return "multiplies bfloat16"
    if has_integers():
        return "does not multiply bfloat16: policies frozen in int16, int8 and fp32 are faster here"
    if saturates_int8():
        return "multiplies neither bfloat16 nor 8-bit integers as such: fp32 is the fastest here"
    return "does not multiply bfloat16: fp32 and int8 are faster here"


def report() -> str:
    """The report as text, one fact a line."""
    lines = [
        f"vat_fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"CPU: {platform.machine()}, {torch.get_num_threads()} threads, best instructions "
        f"{torch.backends.cpu.get_cpu_capability()}, {_bfloat16()}",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            lines.append(f"GPU {index}: {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    else:
        lines.append("GPU: none that torch can use")
    choice = choose("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines.append(f"VAT's layers run on {choice.ops.name} operators: {choice.reason}")
    for package, (purpose, remedy) in _OPTIONAL.items():
        version = _version(package)
        lines.append(f"{package} {version}: {purpose}" if version else f"{package} missing: {purpose} ({remedy})")
    lines.append(simulator_report())
    return "\n".join(lines)
