"""Repeats recorded calls with another build of the operators; needs nothing but Python.

python replay.py LIBRARY RECORD

Floats that a call writes are compared with those recorded. Whole numbers are room to work in, and not compared.
"""

import array
import ctypes
import math
import pickle
import sys


class Memory:
    """A copy of one recorded storage, aligned as the original was."""

    def __init__(self, content: bytes) -> None:
        self._room = ctypes.create_string_buffer(len(content) + 64)
        self.start = (ctypes.addressof(self._room) + 63) // 64 * 64
        ctypes.memmove(self.start, content, len(content))

    def floats(self, size: int) -> array.array:
        """What is in it now."""
        return floats(ctypes.string_at(self.start, size))


def floats(content: bytes) -> array.array:
    """Bytes as float32."""
    numbers = array.array("f")
    numbers.frombytes(content[: len(content) // 4 * 4])
    return numbers


def difference(found: array.array, expected: array.array) -> float:
    """The largest, relative to the largest number; infinite where one of two is no finite number."""
    largest = max((abs(e) for e in expected if math.isfinite(e)), default=0.0) or 1.0
    worst = 0.0
    for f, e in zip(found, expected):  # noqa: B905 (old Pythons may run this)
        if f == e or (f != f and e != e):
            continue
        if not (math.isfinite(f) and math.isfinite(e)):
            return math.inf
        worst = max(worst, abs(f - e) / largest)
    return worst


def replayed(library: ctypes.CDLL, record: tuple) -> float:
    """One call's difference."""
    name, arguments, before, after = record
    memory = {address: Memory(content) for address, content in before.items()}
    uncompared = set()

    def pointer(kind: str, address: int = 0, offset: int = 0, compared: bool = True) -> "int | None":
        if kind == "null":
            return None
        if not compared:
            uncompared.add(address)
        return memory[address].start + offset

    def value(argument: tuple) -> object:
        kind = argument[0]
        if kind in ("null", "pointer"):
            return ctypes.c_void_p(pointer(*argument))
        if kind == "pointers":
            return (ctypes.c_void_p * len(argument[1]))(*(pointer(*one) for one in argument[1]))
        if kind == "longs":
            return (ctypes.c_long * len(argument[1]))(*argument[1])
        return {"float": ctypes.c_float, "int": ctypes.c_int, "long": ctypes.c_long}[kind](argument[1])

    getattr(library, name)(*map(value, arguments), 1)
    compared = ((address, content) for address, content in after.items() if address not in uncompared)
    return max((difference(memory[a].floats(len(c)), floats(c)) for a, c in compared), default=0.0)


def main() -> None:
    library, worst = ctypes.CDLL(sys.argv[1]), {}
    print(f"vectors of {library.vat_lanes()} floats, integers in {library.vat_integers()} bits", flush=True)
    with open(sys.argv[2], "rb") as file:
        while True:
            try:
                record = pickle.load(file)
            except EOFError:
                break
            worst.setdefault(record[0], []).append(replayed(library, record))
    for name, found in worst.items():
        print(f"{name}: {len(found)} calls, largest difference {max(found):.1e}")
    print("all calls repeated", flush=True)


if __name__ == "__main__":
    main()
