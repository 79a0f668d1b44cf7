"""Stopping a process, to look at what it is doing while it does nothing."""

from __future__ import annotations

import os
import signal
import time
from typing import Final

_STOPS_WITHIN_S: Final = 0.02
"""A running thread stops at its next interrupt. What takes longer hangs in the kernel, where it does nothing either."""

_LOOK_AGAIN_S: Final = 0.0001


def stop(pid: int, parent: int) -> bool:
    """Stop a process of ours, and wait until it stands still.

    Args:
        pid: the process.
        parent: what its parent has to be: a pid alone may be somebody else's by now.

    Returns:
        Whether it was stopped by this: `SIGCONT` lets it go on. False: it is gone, or it was stopped already.
    """
    if _state_of(pid, parent) in ("", "T", "t", "Z"):
        return False
    try:
        os.kill(pid, signal.SIGSTOP)
    except OSError:
        return False
    until = time.monotonic() + _STOPS_WITHIN_S
    while _state_of(pid, parent) not in ("", "T", "t") and time.monotonic() < until:
        time.sleep(_LOOK_AGAIN_S)
    return True


def _state_of(pid: int, parent: int) -> str:
    """The state of a child of that parent, as in `/proc/PID/stat`; empty: there is none with this pid."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state, ppid = file.read().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return ""
    return state if ppid == str(parent) else ""
