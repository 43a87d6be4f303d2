"""A pytest plugin that writes down calls of the compiled operators: all their memory, before and after.

RECORD names the file; FLAGS are the compiler's for the operators that are called, which bring the layout and the
instructions, written out, of another processor.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vat_fast.frozen import native_executor
from vat_fast.native import calls, functions, library
from vat_fast.native.calls import Count, Integers

MOST_BYTES = 250_000
"""Of a call: an emulated processor takes its time."""
MOST_CALLS = 14
"""Of one function with the same switches, spread over those that there are."""
EVERY = 2

_file = open(os.environ["RECORD"], "wb")  # noqa: SIM115 (closed with the process)
_seen = Counter[tuple[object, ...]]()
library._FLAGS = (*library._FLAGS, "-O1", *os.environ["FLAGS"].split())


def _described(arguments: tuple[Any, ...]) -> tuple[dict[int, torch.UntypedStorage], list[tuple[Any, ...]]]:
    """The storages behind the arguments by address, and each argument as `replay` reads it."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pointer(tensor: Tensor | None, compared: bool = True) -> tuple[Any, ...]:
        if tensor is None:
            return ("null",)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return ("pointer", storage.data_ptr(), tensor.data_ptr() - storage.data_ptr(), compared)

    described: list[tuple[Any, ...]] = []
    for a in arguments:
        if isinstance(a, Integers):
            described.append(pointer(a.tensor, compared=False))
        elif a is None or isinstance(a, Tensor):
            described.append(pointer(a))
        elif isinstance(a, list):
            described.append(("longs", a) if isinstance(a[0], int) else ("pointers", [pointer(b) for b in a]))
        else:
            kind = "float" if isinstance(a, float) else "int" if isinstance(a, Count) else "long"
            described.append((kind, float(a) if kind == "float" else int(a)))
    return storages, described


def _content(storage: torch.UntypedStorage) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()  # type: ignore[call-overload]


def _recorded(name: str, arguments: tuple[Any, ...], run: Callable[[], None]) -> None:
    storages, described = _described(arguments)
    kind = (name, *(int(a) for a in arguments if isinstance(a, Count)))
    if sum(storage.nbytes() for storage in storages.values()) > MOST_BYTES:
        return run()
    _seen[kind] += 1
    if _seen[kind] % EVERY != 1 or _seen[kind] > EVERY * MOST_CALLS:
        return run()
    before = {address: _content(storage) for address, storage in storages.items()}
    run()
    after = {address: content for address, s in storages.items() if (content := _content(s)) != before[address]}
    pickle.dump((name, described, before, after), _file)
    _file.flush()
    return None


_call = calls.call


def _recording_call(name: str, *arguments: Any) -> None:
    flat = [a for argument in arguments for a in (argument if isinstance(argument, list) else [argument])]
    if not any(isinstance(a, FakeTensor) for a in flat):
        _recorded(name, arguments, lambda: _call(name, *arguments))


class _RecordingCall(native_executor._Call):
    def __init__(self, name: str, *arguments: Any) -> None:
        super().__init__(name, *arguments)
        self._name = name

    def __call__(self) -> None:
        _recorded(self._name, self._alive, super().__call__)


for _module in (calls, functions, native_executor):
    _module.call = _recording_call  # type: ignore[attr-defined]
native_executor._Call = _RecordingCall  # type: ignore[misc]
