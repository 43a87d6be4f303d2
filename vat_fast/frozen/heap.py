"""What freezing leaves free goes back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return the heap's free pages where the allocator is glibc's.

    Weights that exist for a moment while a model is frozen leave holes that glibc would keep, 1.4 GB with so400m.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return
    trim(0)
