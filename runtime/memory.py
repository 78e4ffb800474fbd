"""Keeps the resident set of a long-lived process from creeping up while its objects do not grow.

Two habits make it creep. asyncio reads into buffers of 256 KiB and cuts each down to the few
hundred bytes that came: each needs a hole of 256 KiB in the heap, and what is left of it after the
cut soon is no such hole any more. And glibc, which gives large blocks pages of their own at first,
learns from their being freed to take them from the heap, where tables of a few megabytes leave
holes when they grow. With a thousand streams the heap doubled in ten minutes while what was used of
it stayed the same.
"""

from __future__ import annotations

import ctypes
from asyncio import selector_events

__all__ = ["READ_BYTES", "small_reads", "steady_heap"]

READ_BYTES = 32 * 1024
"""Read at a time: many times a piece of a stream, and a long answer in a few reads."""
_M_MMAP_THRESHOLD = -3
"""As in glibc's malloc.h."""
_THRESHOLD = 128 * 1024
"""glibc's own at the start of a process; setting it keeps it from moving."""


def small_reads() -> bool:
    """Make the sockets of this process read `READ_BYTES` at a time, those open already too.

    asyncio has no setting for it. Return whether it could be told; another event loop is left as
    it is.
    """
    transport = getattr(selector_events, "_SelectorTransport", None)
    if transport is None or not hasattr(transport, "max_size"):
        return False
    transport.max_size = READ_BYTES
    return True


def steady_heap() -> bool:
    """Make large blocks of this process have pages of their own for ever, which go back when freed.

    Costs two system calls a block, so read in smaller ones. Return whether the C library knows
    how; others are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
