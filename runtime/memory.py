"""Keeps the resident set of a long-lived process from creeping up while its objects do not grow.

asyncio reads into buffers of 256 KiB and cuts each down to the few hundred bytes that came. Each
needs a hole of 256 KiB in the heap, and what is left of it after the cut soon is no such hole any
more: with a thousand streams the heap doubled in ten minutes while what was used of it stayed the
same. asyncio has no setting for it.
"""

from __future__ import annotations

from asyncio import selector_events

__all__ = ["READ_BYTES", "small_reads"]

READ_BYTES = 32 * 1024
"""Read at a time: many times a piece of a stream, and a long answer in a few reads."""


def small_reads() -> bool:
    """Make the sockets of this process read `READ_BYTES` at a time, those open already too.

    Return whether its asyncio could be told; another event loop is left as it is.
    """
    transport = getattr(selector_events, "_SelectorTransport", None)
    if transport is None or not hasattr(transport, "max_size"):
        return False
    transport.max_size = READ_BYTES
    return True
