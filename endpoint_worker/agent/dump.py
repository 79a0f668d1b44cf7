"""SIGUSR1: the stacks of all threads and the state of every brain, as JSON lines in the agent's log.

    kill -USR1 PID ──► handler, at once: stacks         also when the loop is stuck somewhere
                   └─► the loop's next turn: brains     their state is whole only between two events

For somebody who has to find out why an agent does not do what it should. Nothing waits for it: each part is bounded, and
written straight to the log's descriptor, whatever the level of the log is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final

from endpoint_worker.agent.logs import line
from gcref import ids

FRAMES_MAX: Final = 60
"""Of a stack: the innermost frames."""
LINE_MAX_BYTES: Final = 256 * 1024
SOURCE: Final = "gcref.dump"

Parts = Iterator[tuple[str, Callable[[], Any]]]


class Dump:
    """Writes dumps when it is told to.

    Args:
        endpoint: its name.
        wake: has the loop turn.
        fd: where to write.

    Attributes:
        wanted: the loop is to call `brains`.
    """

    def __init__(self, endpoint: str, wake: Callable[[], None], fd: int = 2) -> None:
        self._endpoint = endpoint
        self._wake = wake
        self._fd = fd
        self._asked_at = 0.0
        self.wanted = False

    def install(self) -> None:
        """Answer SIGUSR1 from now on; on the main thread."""
        signal.signal(signal.SIGUSR1, lambda _number, frame: self.stacks(frame))

    def stacks(self, interrupted: Any = None) -> None:
        """Write the stacks, and have the loop write the rest. May interrupt anything.

        Args:
            interrupted: the frame of this thread that counts; None: where it is.
        """
        self._asked_at = time.monotonic()
        here = threading.get_ident()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident == here and interrupted is not None:
                frame = interrupted
            frames = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)[
                :FRAMES_MAX
            ]
            told = [f"{one.filename}:{one.lineno} {one.name}" for one in frames]
            self._write(f"stack of thread {names.get(ident, ident)}, innermost first", stack=told)
        self.wanted = True
        self._wake()

    def brains(self, parts: Parts) -> None:
        """Write the state of every part; in the loop."""
        self.wanted = False
        self._write(f"the loop took {time.monotonic() - self._asked_at:.3f} s to come to this")
        for name, tell in parts:
            try:
                self._write(f"state of {name}", state=_plain(tell()))
            except Exception as error:  # noqa: BLE001 - what is broken is all the more of interest, and the rest too
                self._write(f"state of {name} cannot be told", error=f"{type(error).__name__}: {error}")

    def _write(self, text: str, **more: Any) -> None:
        told = line(self._endpoint, "info", SOURCE, text, **more).encode()
        if len(told) > LINE_MAX_BYTES:
            told = line(self._endpoint, "info", SOURCE, f"{text}: too long ({len(told)} bytes)").encode()
        try:
            os.write(self._fd, told + b"\n")
        except OSError:
            pass  # there is nowhere to complain


def _plain(value: Any) -> Any:
    """The value with ids as text, as JSON can carry it."""
    return json.loads(json.dumps(_keys(value), default=_text))


def _keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            _text(key) if isinstance(key, bytes) else str(key): _keys(inner) for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_keys(inner) for inner in value]
    return value


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return ids.text(value) if len(value) == 16 else value.hex()
    return str(value)
