"""What the C library's allocator does with freed memory. Where it is not glibc's, nothing happens."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# glibc's names for what `mallopt` sets (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_TOP_PAD = 256 << 20
_NEVER = 2**31 - 1
_DEFAULT_MMAP_MAX = 65536
_LARGEST_THRESHOLD = 32 << 20
"""Where glibc's own threshold for blocks of their own ends up once a block this large was freed."""

_kept_for_good = False


def keep_freed_memory() -> bool:
    """Let the allocator keep what training frees, and ask for huge pages; returns whether it does.

    A training step frees and allocates the same gigabytes again and again. By default glibc gives large blocks back to
    the system each time, and writing into the new ones faults page by page, which on virtual machines costs several
    times the writing itself. Process-wide; call it before anything large is allocated.
    """
    global _kept_for_good
    # PyTorch reads this once, at its first large allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _kept_for_good = _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: _TOP_PAD})
    return _kept_for_good


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """The same for a while, then all of it is given back, the holes between blocks that live on too.

    Folding a model's weights allocates and frees some of its size again and again. Afterwards glibc's thresholds are
    those that it moves to by itself with blocks this large.
    """
    if _kept_for_good or not _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER}):
        yield
        return
    try:
        yield
    finally:
        _set(
            {
                _M_MMAP_MAX: _DEFAULT_MMAP_MAX,
                _M_MMAP_THRESHOLD: _LARGEST_THRESHOLD,
                _M_TRIM_THRESHOLD: 2 * _LARGEST_THRESHOLD,
            }
        )
        _glibc().malloc_trim(0)


def _set(values: Mapping[int, int]) -> bool:
    """Whether all of glibc's settings were taken."""
    library = _glibc()
    return library is not None and all(library.mallopt(name, value) == 1 for name, value in values.items())


def _glibc() -> Any:
    """The C library, or None where it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
