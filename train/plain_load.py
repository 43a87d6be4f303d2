"""DeepSpeed's checkpoint files opened as data: nothing that stands in them can run.

They are pickles, which DeepSpeed opens without restriction. Within `data_only` PyTorch's restricted unpickler reads
them instead, which knows tensors, containers, numbers and three classes of DeepSpeed, and stops at anything else.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class UnsafeFileError(ValueError):
    """A file that holds more than data; nothing of it has run."""


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """Within it every `torch.load` of this process has `weights_only=True`, whatever its caller asks for.

    Raises:
        UnsafeFileError: a file loaded within it holds more than data.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_SWITCH)
    # PyTorch reads its switch at every load.
    os.environ[_SWITCH] = "1"
    try:
        with safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(f"a file holds more than data: {str(error).splitlines()[0]}") from error
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


def check_data_only(path: Path) -> None:
    """Read what a `.pt` file names, without opening it.

    Raises:
        UnsafeFileError: it names more than data.
    """
    with data_only():
        names = sorted(get_unsafe_globals_in_checkpoint(str(path)))
    if names:
        raise UnsafeFileError(f"{path.name} names {', '.join(names)}, which could run code")
