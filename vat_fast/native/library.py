"""The compiled operators in `source/`: built by the machine's C++ compiler at first use, kept, and loaded.

A build takes some seconds and is kept under `$XDG_CACHE_HOME/vat_fast` (by default `~/.cache/vat_fast`), named by the
source, the compiler and the processor's instructions. Nothing is linked but OpenMP, whose threads are PyTorch's own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401  (its OpenMP must be there before the library asks for one)

_SOURCE = Path(__file__).with_name("source")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")


class BuildError(RuntimeError):
    """There is no compiler, or it fails; one sentence says which."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library.

    Raises:
        BuildError: it cannot be built here.
    """
    try:
        library = ctypes.CDLL(str(path()))
    except OSError as error:
        raise BuildError(f"the compiled operators in {path()} cannot be loaded: {error}") from error
    return prepared(library)


@functools.cache
def path() -> Path:
    """The library's file, built where it is missing.

    Raises:
        BuildError: it cannot be built here.
    """
    return build(_compiler(), cache_folder())


def prepared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of results that are not int."""
    for name in ("vat_mlp_kept", "vat_packed_size"):
        getattr(library, name).restype = ctypes.c_long
    return library


@functools.cache
def why_not() -> str | None:
    """Why `load` fails here, or None; the first call builds."""
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """Where builds are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vat_fast"


def build(compiler: str, folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """The library's file in `folder`, compiled if it is not there.

    Args:
        compiler: of C++, a command.
        extra: more flags.

    Raises:
        BuildError: the compiler fails, or the folder cannot be written.
    """
    command = [compiler, *_FLAGS, *extra]
    target = folder / f"native-{_key(command)}.so"
    if target.exists():
        return target
    print("vat_fast: compiling operators for this processor, once", file=sys.stderr, flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            done = subprocess.run(
                [*command, *map(str, sorted(_SOURCE.glob("*.cpp"))), "-o", str(made)], capture_output=True, text=True
            )
            if done.returncode:
                complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
                raise BuildError(f"{compiler} cannot compile the operators for this processor: {complaint.strip()}")
            os.replace(made, target)  # ranks that build at the same time replace like by like
    except OSError as error:
        raise BuildError(f"the operators cannot be compiled into {folder}: {error}") from error
    return target


def _compiler() -> str:
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
    found = next((name for name in names if shutil.which(name)), None)
    if found is None or sys.platform != "linux":
        raise BuildError(f"no C++ compiler ({', '.join(names)}) on Linux was found")
    return found


def _key(command: list[str]) -> str:
    """Names a build: what is compiled, by what, for which processor."""
    parts = [*command, platform.machine(), processor()]
    parts.append(subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout)
    parts += [file.read_text() for file in sorted(_SOURCE.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def processor() -> str:
    """Model and instruction sets, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
