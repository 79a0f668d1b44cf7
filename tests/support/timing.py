"""Measuring how costs grow, in a process that has much else in its memory."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def cpu_seconds() -> Iterator[Callable[[], float]]:
    """The processor time of this process since the block began, without collections of whatever else lives here."""
    gc.collect()
    gc.disable()
    began = time.process_time()
    try:
        yield lambda: time.process_time() - began
    finally:
        gc.enable()
