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

_OVERSLEEP: Final = 0.15
"""A pause is this share of the time that was waited already: so much later than it came true an answer is seen."""


def patience(seconds: float) -> float:
    """A time limit of the tests, scaled to the machine."""
    return seconds * SCALE


def wait_until(
    condition: Callable[[], T], *, timeout_s: float = 10.0, what: str | Callable[[], str] = "the condition"
) -> T:
    """Ask until the answer is true; a test fails when that takes too long.

    Args:
        condition: asked again and again, at first every millisecond; one that takes long itself is asked less often.
        timeout_s: how long, in seconds of a machine of normal speed.
        what: what is waited for, or a function that describes why it has not come.

    Returns:
        The first true answer.

    Raises:
        AssertionError: the time is up.
    """
    began = asked = time.monotonic()
    while not (answer := condition()):
        now = time.monotonic()
        if now > began + patience(timeout_s):
            text = what if isinstance(what, str) else what()
            raise AssertionError(f"waited {patience(timeout_s):g} s in vain for {text}")
        pause_s = max(_FIRST_PAUSE_S, _OVERSLEEP * (now - began), now - asked)
        time.sleep(min(pause_s, _LAST_PAUSE_S))
        asked = time.monotonic()
    return answer
