"""Camera images of a simulated scene, rendered when they are asked for."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

RenderStyle = Literal["official", "fast"]


@dataclass(frozen=True)
class RenderSettings:
    """How images are made. A policy should be evaluated with the settings that it was trained with.

    Args:
        multisampling: samples per pixel; the official images have 4.
        reflections: whether the floor and tables mirror what stands on them.

    Raises:
        ValueError: a negative number of samples.
    """

    multisampling: int = 4
    reflections: bool = True

    def __post_init__(self) -> None:
        if self.multisampling < 0:
            raise ValueError(f"multisampling must be at least 0, got {self.multisampling}")

    @classmethod
    def named(cls, style: str) -> RenderSettings:
        """ "official", or "fast": no multisampling and no reflections, a third of the time where a CPU renders.

        Raises:
            ValueError: another name.
        """
        if style == "official":
            return cls()
        if style == "fast":
            return cls(multisampling=0, reflections=False)
        raise ValueError(f"render settings are official or fast, got {style!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as values JSON knows."""
        return dataclasses.asdict(self)


class Renderer:
    """Renders the cameras of a simulation.

    Make it when the simulation is reset: making it lets MuJoCo compute forward once, which changes later steps in
    their last bits. Rendering itself changes nothing.

    OpenGL draws, and frees by number, in whatever context is current. A renderer's context is current only while it
    works, so nobody else, robosuite's own environments included, can free what belongs to it.

    Args:
        sim: robosuite's MjSim.
        size: of the square images, in pixels.
        settings: see `RenderSettings`.
    """

    def __init__(self, sim: Any, size: int, settings: RenderSettings) -> None:
        import mujoco

        # The framebuffer is made when the context is, so this comes first.
        sim.model._model.vis.quality.offsamples = settings.multisampling
        self._context = _context_class()(sim, device_id=-1, max_width=size, max_height=size)
        self._context.vopt.geomgroup[0] = 0  # collision shapes
        self._context.vopt.geomgroup[1] = 1  # what is seen
        self._context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = settings.reflections
        self._sim, self._size = sim, size
        _make_none_current()

    def image(self, camera: str) -> NDArray[np.uint8]:
        """The view of a camera (S, S, 3) uint8 as OpenGL renders it: upside down, the convention of LIBERO's data."""
        camera_id = self._sim.model.camera_name2id(camera)
        self._context.gl_ctx.make_current()
        try:
            self._context.render(width=self._size, height=self._size, camera_id=camera_id)
            image: NDArray[np.uint8] = self._context.read_pixels(self._size, self._size)
        finally:
            _make_none_current()
        return image

    def close(self) -> None:
        """Free the context."""
        self._sim._render_context_offscreen = None
        del self._context


@cache
def _context_class() -> Any:
    """robosuite's offscreen context, freed in itself whoever frees it and whenever."""
    from robosuite.utils.binding_utils import MjRenderContextOffscreen

    class OwnContext(MjRenderContextOffscreen):
        def __del__(self) -> None:
            # Without "con" its making failed; and at the interpreter's end the process frees everything.
            if hasattr(self, "con") and not sys.is_finalizing():
                self.gl_ctx.make_current()
                super().__del__()
                _make_none_current()

    return OwnContext


@cache
def _empty_context() -> Any:
    from robosuite.utils.binding_utils import GLContext

    return GLContext(max_width=16, max_height=16, device_id=-1)


def _make_none_current() -> None:
    """Leave a context current that holds nothing: robosuite's contexts can be made current, but not released."""
    _empty_context().make_current()
