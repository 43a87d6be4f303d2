"""From a robot's raw observation to the model's input: camera images to pixels, robot state to proprioception.

The image pipeline is the one the released checkpoints were trained and evaluated with, which ran in TensorFlow:
rotate, JPEG round trip, resize with antialias, round; crop the centre, resize back bilinearly, round; normalise.
Here it needs no TensorFlow. Against TensorFlow 2.21 the JPEG round trip is equal bit for bit, and a resize or
crop differs by one grey level at fewer than 1 in 1000 pixels (`tests/test_observation.py`).
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import simplejpeg  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from vat_fast.actions import FieldStatistics
from vat_fast.config import ConfigError
from vat_fast.resize import Filter, central_cropper, resizer

Rotation = Literal["none", "rotate_180", "flip_vertical"]
JpegIdct = Literal["fast", "accurate"]
CropRounding = Literal["tensorflow", "nearest"]

LIBERO_CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ROBOSUITE_STATE = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


class ObservationError(ValueError):
    """An observation that a policy cannot read."""


@dataclass(frozen=True)
class ImageProcessing:
    """How one camera image becomes pixels. The defaults are the released checkpoints' pipeline.

    The steps run in this order, each rounding to whole grey levels where the original stores uint8:

    rotation: "rotate_180" (LIBERO renders upside down), "flip_vertical" or "none".
    jpeg_quality: quality of a JPEG round trip with 4:2:0 chroma, TensorFlow's default 95; None for no round trip.
    jpeg_idct: how the JPEG is decoded. "fast" is TensorFlow's default, the fast integer transform, which comes out
        0.8 grey levels darker on average; "accurate" is its `INTEGER_ACCURATE`, and Pillow's and most libraries'
        only one. Both equal TensorFlow's bit for bit.
    image_size: side of the square result; the image is stretched to it, whatever its shape.
    resize_filter: "lanczos3" or "bilinear", both antialiased: `tf.image.resize(..., antialias=True)`.
    crop_area: the central box of this area is resized back to image_size (training used a random crop of it);
        None for no crop.
    crop_rounding: how the crop becomes uint8. "tensorflow" is `tf.image.convert_image_dtype`: floor(255.5 * x) for
        x in [0, 1], a little below the nearest level, as in OpenVLA-OFT's evaluation, whose checkpoint layout and
        image steps the released folders share. "nearest" rounds.
    mean, std: per channel, of values in [0, 1]. The authors use ImageNet's for every backbone.

    Raises:
        ConfigError: an impossible value.
    """

    rotation: Rotation = "rotate_180"
    jpeg_quality: int | None = 95
    jpeg_idct: JpegIdct = "fast"
    image_size: int = 224
    resize_filter: Filter = "lanczos3"
    crop_area: float | None = 0.9
    crop_rounding: CropRounding = "tensorflow"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        choices = {
            "rotation": Rotation,
            "jpeg_idct": JpegIdct,
            "resize_filter": Filter,
            "crop_rounding": CropRounding,
        }
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                known = ", ".join(get_args(literal))
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        quality, size, area = self.jpeg_quality, self.image_size, self.crop_area
        if quality is not None and (not _is_int(quality) or not 1 <= quality <= 100):
            raise ConfigError(f"jpeg_quality must be an integer from 1 to 100, or None, got {quality!r}")
        if not _is_int(size) or size < 1:
            raise ConfigError(f"image_size must be an integer of at least 1, got {size!r}")
        if area is not None and (not _is_number(area) or not 0 < area <= 1):
            raise ConfigError(f"crop_area must be a number above 0 and at most 1, or None, got {area!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(map(_is_number, value)):
                raise ConfigError(f"{name} must be three numbers, one per channel, got {value!r}")
            if name == "std" and min(value) <= 0:
                raise ConfigError(f"std must be above 0, got {value!r}")
            object.__setattr__(self, name, tuple(float(v) for v in value))

    def to_dict(self) -> dict[str, Any]:
        """The fields as values JSON knows."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageProcessing:
        """The pipeline that `to_dict` gave; missing fields take their default.

        Raises:
            ConfigError: unknown field or impossible value.
        """
        check_fields(cls, values)
        return cls(**values)

    def grey_levels(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The processed image before normalisation: (H, W, 3) uint8 -> (3, S, S) float32 holding 0 .. 255.

        Raises:
            ObservationError: not an (H, W, 3) uint8 image.
        """
        _check_image("image", image_HW3)
        image = _rotate(image_HW3, self.rotation)
        if self.jpeg_quality is not None:
            image = jpeg_round_trip(image, self.jpeg_quality, self.jpeg_idct)
        levels = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
        height, width = levels.shape[1:]
        if (height, width) != (self.image_size, self.image_size):
            levels = resizer(height, width, self.image_size, self.resize_filter)(levels)
            _round_to_uint8(levels)
        if self.crop_area is not None:
            levels = central_cropper(self.image_size, self.crop_area)(levels)
            if self.crop_rounding == "tensorflow":
                levels *= np.float32(255.5 / 255)
                np.floor(levels, out=levels)
            else:
                _round_to_uint8(levels)
        return levels

    def pixels(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The model's input for one view: (H, W, 3) uint8 -> (3, S, S) float32, (levels / 255 - mean) / std.

        Raises:
            ObservationError: as `grey_levels`.
        """
        levels = self.grey_levels(image_HW3)
        mean, std = np.array(self.mean), np.array(self.std)
        levels *= (1 / (255 * std)).astype(np.float32)[:, None, None]
        levels -= (mean / std).astype(np.float32)[:, None, None]
        return levels


def jpeg_round_trip(image_HW3: NDArray[np.uint8], quality: int = 95, idct: JpegIdct = "fast") -> NDArray[np.uint8]:
    """Encode as JPEG and decode again: `tf.io.decode_image(tf.io.encode_jpeg(image))`, (H, W, 3) uint8 both ways.

    4:2:0 chroma, accurate forward transform and smooth chroma upsampling, as libjpeg-turbo has them by default
    in TensorFlow and in Pillow. TensorFlow decodes with libjpeg's fast inverse transform unless told otherwise.

    Args:
        quality: 1 to 100.
        idct: "fast" (decoded by simplejpeg) or "accurate" (decoded by Pillow); see `ImageProcessing`.
    """
    buffer = io.BytesIO()
    # subsampling=2 is Pillow's number for 4:2:0.
    Image.fromarray(np.ascontiguousarray(image_HW3)).save(buffer, "JPEG", quality=quality, subsampling=2)
    if idct == "accurate":
        return np.asarray(Image.open(buffer))
    decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(buffer.getbuffer(), fastdct=True, fastupsample=False)
    return decoded


def axis_angle(quaternion_xyzw: ArrayLike) -> NDArray[np.float64]:
    """Unit quaternions (..., 4), scalar last -> rotation axis times angle in radians (..., 3).

    As robosuite has it: the angle is 2 * acos(w), in [0, 2 pi], and no rotation is the zero vector. q and -q are
    one rotation but give different vectors; the sign that the simulator gave is kept, as in the training data.

    Raises:
        ObservationError: not four numbers, or not a unit quaternion.
    """
    q = np.asarray(quaternion_xyzw, dtype=np.float64)
    if q.ndim == 0 or q.shape[-1] != 4:
        raise ObservationError(f"a quaternion has 4 entries (x, y, z, w), got shape {q.shape}")
    norm = np.linalg.norm(q, axis=-1)
    if not np.all(np.abs(norm - 1) < 1e-2):
        raise ObservationError(f"a rotation is a unit quaternion (x, y, z, w), got {q.tolist()}")
    w = np.clip(q[..., 3:], -1.0, 1.0)
    sine = np.sqrt(1 - w * w)
    rotates = sine > 0
    return np.where(rotates, q[..., :3] * 2 * np.arccos(w) / np.where(rotates, sine, 1.0), 0.0)


def read_proprio(observation: Mapping[str, Any], dim: int) -> NDArray[np.float32]:
    """The proprioception vector (dim,) of a raw observation, in robot units.

    A ready vector under `state` where there is one; else end-effector position (3), axis-angle of its quaternion
    `robot0_eef_quat` (x, y, z, w) (3) and gripper joint positions (2), LIBERO's 8 numbers.

    Raises:
        ObservationError: neither is there, the length is not `dim`, or a value is not finite.
    """
    if "state" in observation:
        source, state = "state", np.asarray(observation["state"], dtype=np.float64)
    else:
        missing = [name for name in _ROBOSUITE_STATE if name not in observation]
        if missing:
            raise ObservationError(
                f"the model reads proprioception, but the observation has neither 'state' nor {', '.join(missing)}; "
                f"it has {', '.join(map(str, observation)) or 'nothing'}"
            )
        source = ", ".join(_ROBOSUITE_STATE)
        position, quaternion, gripper = (np.asarray(observation[name], np.float64) for name in _ROBOSUITE_STATE)
        state = np.concatenate([position.ravel(), axis_angle(quaternion).ravel(), gripper.ravel()])
    if state.shape != (dim,):
        raise ObservationError(f"{source} must give {dim} numbers of proprioception, got shape {state.shape}")
    if not np.isfinite(state).all():
        raise ObservationError(f"{source} has a value that is not finite: {state.tolist()}")
    return state.astype(np.float32)


class ProcessedObservation(NamedTuple):
    """One observation as the model takes it."""

    pixels: NDArray[Any]
    """(V, 3, S, S) float32, normalised; or (V, S, S, 3) uint8 from a processor for raw bytes."""
    proprio: NDArray[np.float32] | None
    """(proprio_dim,) in [-1, 1], or None where the model has no proprioception."""


class ObservationProcessor:
    """Raw observation dictionaries to model input.

    Args:
        processing: the image pipeline.
        cameras: keys of the camera images in the order of the model's views (LIBERO: primary, then wrist).
        proprio: statistics that normalise the proprioception vector; None for a model without.
        raw: leave the normalisation to the model and give it bytes, (V, S, S, 3).

    Raises:
        ConfigError: no cameras, or one twice.
    """

    def __init__(
        self,
        processing: ImageProcessing,
        cameras: Sequence[str] = LIBERO_CAMERAS,
        proprio: FieldStatistics | None = None,
        raw: bool = False,
    ) -> None:
        self.raw = raw
        self.processing = processing
        self.cameras = check_cameras(cameras)
        self.proprio = proprio

    def __call__(self, observation: Mapping[str, Any]) -> ProcessedObservation:
        """Pixels (V, 3, S, S) and proprioception of one observation.

        Args:
            observation: camera name -> (H, W, 3) uint8 image of any size; robot state as `read_proprio` says.
                Other entries are ignored.

        Raises:
            ObservationError: a missing camera, an image of wrong type or shape, or state that does not fit.
        """
        if not isinstance(observation, Mapping):
            raise ObservationError(f"an observation is a dictionary of arrays, got {type(observation).__name__}")
        size = self.processing.image_size
        shape = (size, size, 3) if self.raw else (3, size, size)
        pixels = np.empty((len(self.cameras), *shape), np.uint8 if self.raw else np.float32)
        for view, name in enumerate(self.cameras):
            if name not in observation:
                close = get_close_matches(name, [str(key) for key in observation], n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                existing = ", ".join(map(str, observation)) or "nothing"
                raise ObservationError(f"camera {name!r} is not in the observation{hint}; it has {existing}")
            image = np.asarray(observation[name])
            _check_image(f"camera {name!r}", image)
            if self.raw:
                pixels[view] = self.processing.grey_levels(image).transpose(1, 2, 0)
            else:
                pixels[view] = self.processing.pixels(image)
        if self.proprio is None:
            return ProcessedObservation(pixels, None)
        return ProcessedObservation(pixels, self.proprio.normalize(read_proprio(observation, self.proprio.dim)))


def check_cameras(cameras: Sequence[str]) -> tuple[str, ...]:
    """The camera names as a tuple.

    Raises:
        ConfigError: not a sequence of names, none, or one twice.
    """
    if isinstance(cameras, str) or not all(isinstance(name, str) for name in cameras):
        raise ConfigError(f"cameras must be a list of names, got {cameras!r}")
    if not cameras or len(set(cameras)) != len(cameras):
        raise ConfigError(f"cameras must be at least one name and no name twice, got {list(cameras)!r}")
    return tuple(cameras)


def check_fields(cls: type, values: Any) -> None:
    """Raise one ConfigError where `values` is not a mapping of fields of the dataclass `cls`."""
    known = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{cls.__name__} is stored as a JSON object, got {type(values).__name__}")
    for name in values:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"unknown field {name!r}{hint}; {cls.__name__} has {', '.join(known)}")


def _check_image(what: str, image: Any) -> None:
    image = np.asarray(image)
    if image.dtype != np.uint8:
        hint = "; scale floats to 0 .. 255 and cast" if image.dtype.kind == "f" else ""
        raise ObservationError(f"{what} must be a uint8 image (0 to 255), got {image.dtype}{hint}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        hint = "; put the channels last" if image.ndim == 3 and image.shape[0] == 3 else ""
        raise ObservationError(f"{what} must have shape (H, W, 3), got {image.shape}{hint}")


def _rotate(image_HW3: NDArray[np.uint8], rotation: Rotation) -> NDArray[np.uint8]:
    if rotation == "rotate_180":
        return image_HW3[::-1, ::-1]
    return image_HW3[::-1] if rotation == "flip_vertical" else image_HW3


def _round_to_uint8(levels: NDArray[np.float32]) -> None:
    """In place: the nearest whole grey level, halves to even as in tf.round."""
    np.rint(levels, out=levels)
    np.clip(levels, 0, 255, out=levels)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))
