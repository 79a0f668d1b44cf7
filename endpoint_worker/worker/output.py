"""Standard output and error of a worker: written to its log, and the last part kept for the running task's record.

    print ──► TextIOWrapper ──► Tail ──► file descriptor ──► the worker's log
                                  └────► the last bytes, taken by the runtime after the task

This is done inside Python: what a C library writes goes to the log alone. A task that prints nothing costs nothing; a
task that prints is charged with its lines. What a thread prints that a task left behind goes to whichever task runs.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, Final, cast

# What is kept for the record of a task, per stream. It travels inside an outcome.
TAIL_BYTES: Final = 8 * 1024
# A log above this is cut down, when its worker is idle, to its last part.
LOG_MAX_BYTES: Final = 8 * 1024 * 1024
_LOG_KEEP_BYTES: Final = 64 * 1024


class Tail(io.RawIOBase):
    """A stream to a file descriptor that remembers what went through it last."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self.kept = b""

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """The descriptor of the log."""
        return self._fd

    def write(self, data: Any) -> int:
        """Write to the log, and remember."""
        text = bytes(data)
        self.kept = (self.kept + text)[-TAIL_BYTES:] if len(text) < TAIL_BYTES else text[-TAIL_BYTES:]
        done = 0
        try:
            while done < len(text):
                done += os.write(self._fd, text[done:])
        except OSError:
            pass  # a full disk must not fail whoever prints
        return len(text)

    def take(self) -> str | None:
        """What was kept, as text; None: nothing. Forgets it."""
        kept, self.kept = self.kept, b""
        return kept.decode(errors="replace") if kept else None


class Output:
    """Both streams of this process, in the place of `sys.stdout` and `sys.stderr`."""

    def __init__(self) -> None:
        self.out = Tail(1)
        self.err = Tail(2)

    def install(self) -> None:
        """Become `sys.stdout` and `sys.stderr`, also for those who ask for the original ones."""
        sys.stdout = sys.__stdout__ = _text(self.out)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = _text(self.err)  # type: ignore[misc]

    def take(self) -> list[str | None]:
        """What the task printed: `[stdout, stderr]`. Forgets it."""
        return [self.out.take(), self.err.take()]

    def trim(self) -> None:
        """Cut down logs that have grown too long. Cheap when they have not."""
        for fd in (1, 2):
            try:
                size = os.fstat(fd).st_size
                if size > LOG_MAX_BYTES:
                    _cut(fd, size)
            except OSError:
                pass  # a task has closed or replaced it: its business


def _text(raw: Tail) -> io.TextIOWrapper:
    # No buffer between: whatever is printed is in the log, and in the record, when the task ends.
    buffer = cast("io.BufferedWriter", raw)
    return io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", write_through=True)


def _cut(fd: int, size: int) -> None:
    with open(f"/proc/self/fd/{fd}", "rb") as log:
        last = os.pread(log.fileno(), _LOG_KEEP_BYTES, size - _LOG_KEEP_BYTES)
    os.ftruncate(fd, 0)
    os.write(fd, last)  # the descriptor appends
