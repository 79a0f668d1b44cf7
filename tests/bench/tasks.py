"""The functions that every system's workers run.

They live in a module that workers import, so that no system has to ship code, and each is as small as its
purpose allows.
"""

from __future__ import annotations

import os
import time
from typing import Any

PAGE_BYTES = 4096


def same(value: Any) -> Any:
    """The no-op: a task whose cost is the system's alone."""
    return value


def increment(number: int) -> int:
    return number + 1


def add(left: int, right: int) -> int:
    return left + right


def second(_first: Any, value: Any) -> Any:
    """A no-op that has to wait for its first argument."""
    return value


def nap(seconds: float, value: Any) -> Any:
    time.sleep(seconds)
    return value


def wait_for_file(path: str) -> bool:
    """A gate: ends when somebody makes the file."""
    while not os.path.exists(path):
        time.sleep(0.02)
    return True


def make_array(size_bytes: int, seed: int) -> Any:
    """`seed, seed + 1, seed + 2 …` as 64-bit numbers."""
    import numpy

    return numpy.arange(seed, seed + size_bytes // 8, dtype=numpy.uint64)


def touch_array(array: Any) -> tuple[int, int, int]:
    """Touch every page. Returns size in bytes, process id, and the sum of each page's first byte."""
    import numpy

    first_bytes = array.view(numpy.uint8)[::PAGE_BYTES]
    return array.nbytes, os.getpid(), int(first_bytes.sum(dtype=numpy.uint64))


def touched(size_bytes: int, seed: int) -> int:
    """The sum that `touch_array` finds in an array of `make_array`.

    A page holds 512 numbers, so the lowest byte of the first number is the same on every page.
    """
    return -(-size_bytes // PAGE_BYTES) * (seed & 0xFF)


def is_intact(array: Any, seed: int) -> bool:
    """Compare every number with what `make_array` wrote, a block at a time."""
    import numpy

    block = 1 << 17
    for start in range(0, len(array), block):
        part = array[start : start + block]
        first = seed + start
        if not numpy.array_equal(part, numpy.arange(first, first + len(part), dtype=numpy.uint64)):
            return False
    return True
