"""Waiting for a condition, the one place in the tests that sleeps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

SCALE: Final = float(os.environ.get("GCREF_TEST_SCALE", "1"))
"""All patience is multiplied by this: set `GCREF_TEST_SCALE=5` on a slow machine."""

_FIRST_PAUSE_S: Final = 0.001
_LAST_PAUSE_S: Final = 0.05


def patience(seconds: float) -> float:
    """A time limit of the tests, scaled to the machine."""
    return seconds * SCALE


def wait_until(
    condition: Callable[[], T], *, timeout_s: float = 10.0, what: str | Callable[[], str] = "the condition"
) -> T:
    """Ask until the answer is true; a test fails when that takes too long.

    Args:
        condition: asked again and again, at first every millisecond.
        timeout_s: how long, in seconds of a machine of normal speed.
        what: what is waited for, or a function that describes why it has not come.

    Returns:
        The first true answer.

    Raises:
        AssertionError: the time is up.
    """
    deadline = time.monotonic() + patience(timeout_s)
    pause_s = _FIRST_PAUSE_S
    while not (answer := condition()):
        if time.monotonic() > deadline:
            text = what if isinstance(what, str) else what()
            raise AssertionError(f"waited {patience(timeout_s):g} s in vain for {text}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LAST_PAUSE_S)
    return answer
