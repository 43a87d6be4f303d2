"""Freed memory that stays with the process, for trainings on CPUs."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's names for what `mallopt` sets (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 256 << 20


def keep_freed_memory() -> bool:
    """Let the allocator keep what training frees, and ask for huge pages; returns whether it does.

    A training step frees and allocates the same gigabytes again and again. By default glibc gives large blocks back to
    the system each time, and writing into the new ones faults page by page, which on virtual machines costs several
    times the writing itself. Process-wide; call it before anything large is allocated. Without glibc nothing happens.
    """
    # PyTorch reads this once, at its first large allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    values = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD))
    taken = [mallopt(name, value) == 1 for name, value in values]
    return all(taken)
