"""The thread that runs the callbacks of a client's futures.

    I/O thread ── call(fn, …) ──► queue ──► the thread: one call after the other

Callbacks are the user's code: they may block, raise, submit, ask for large values. So they run neither on the I/O
thread, which everything waits for, nor beside each other. The thread starts with the first call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

log: Final = logging.getLogger("gcref.sdk")


class Caller:
    """Calls functions in the order in which they were handed in. Any thread may hand in."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def call(self, fn: Callable[..., None], *args: Any) -> None:
        """Has `fn(*args)` called soon."""
        self._queue.put((fn, args))
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="gcref-callbacks", daemon=True)
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            fn, args = item
            try:
                fn(*args)
            except BaseException:  # the thread must live on, whatever a callback raises
                log.exception("a callback failed")
            del item, fn, args  # while the thread waits it must keep nothing alive

    def close(self) -> None:
        """Ends the thread after what was handed in before. What is handed in later starts another one."""
        with self._starting:
            if self._thread is not None:
                self._thread = None
                self._queue.put(None)
