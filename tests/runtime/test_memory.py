"""What keeps the resident set flat."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runtime.memory import steady_heap

_COUNT = """
import ctypes
from runtime.memory import steady_heap
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
{first}
for _ in range(3):
    bytearray(1 << 20)
before = libc.mallinfo2().d
kept = bytearray(1 << 20)
print(libc.mallinfo2().d - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts blocks as glibc does")
def test_a_large_buffer_has_pages_of_its_own_also_after_others_were_freed() -> None:
    """Once one was freed they come from the heap; after `steady_heap` they do not."""
    if not steady_heap():
        pytest.skip("another C library")
    mapped = [
        subprocess.run(  # noqa: S603 - our own text
            [sys.executable, "-c", _COUNT.format(first=first)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for first in ("", "steady_heap()")
    ]
    assert mapped == ["0", "1"]
