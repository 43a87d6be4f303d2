"""Python values as the library's C functions take them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vat_fast.native.library import load


class Count(int):
    """A C int; other whole numbers are longs."""


@dataclass(frozen=True)
class Integers:
    """A tensor of whole numbers, which the function takes as they are."""

    tensor: Tensor


def call(name: str, *arguments: Any) -> None:
    """Call a function; the number of threads goes last. Nothing is computed for tensors without storage.

    Args:
        name: of the function.
        arguments: tensors (None: a null pointer), numbers, lists of either, in the order of the C signature.
    """
    flat = [a for argument in arguments for a in (argument if isinstance(argument, list) else [argument])]
    if any(isinstance(a, FakeTensor) for a in flat):
        return
    getattr(load(), name)(*map(native, arguments), torch.get_num_threads())


def native(argument: Any) -> Any:
    """One argument as its C value; a tensor's memory must outlive the call.

    Raises:
        TypeError: a tensor of another dtype than float32, or elsewhere than on the CPU.
    """
    if argument is None:
        return None
    if isinstance(argument, Integers):
        return ctypes.c_void_p(argument.tensor.data_ptr())
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(_address(argument))
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, list):
        if isinstance(argument[0], int):
            return (ctypes.c_long * len(argument))(*argument)
        return (ctypes.c_void_p * len(argument))(*(None if a is None else _address(a) for a in argument))
    return ctypes.c_int(argument) if isinstance(argument, Count) else ctypes.c_long(argument)


def _address(tensor: Tensor) -> int:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise TypeError(f"the compiled operators take float32 on the CPU, got {tensor.dtype} on {tensor.device}")
    return tensor.data_ptr()
