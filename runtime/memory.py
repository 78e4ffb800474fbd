"""Keeps the resident set of a long-lived process from creeping up while its objects do not grow.

asyncio reads into buffers of 256 KiB and cuts each down to the few hundred bytes that came. glibc
takes such buffers from pages of their own at first, but learns from their being freed that it had
better take them from the heap. There each needs a hole of 256 KiB, and what is left of it after
the cut soon is no such hole any more: with a thousand streams the heap doubles in ten minutes while
what is used of it stays the same.
"""

from __future__ import annotations

import ctypes

__all__ = ["steady_heap"]

_M_MMAP_THRESHOLD = -3
"""As in glibc's malloc.h."""
_THRESHOLD = 128 * 1024
"""glibc's own at the start of a process; setting it keeps it from moving."""


def steady_heap() -> bool:
    """Make large buffers of this process have pages of their own, which go back when freed.

    Costs two system calls a buffer. Return whether the C library knows how; others are left as
    they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
