"""One thread for what takes long: copying objects to disk, unlinking large files.

It starts when there is something to do for the first time, and waits without waking.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Background:
    """Does one thing after another. Any thread may submit.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Do this after what was submitted before. It must not raise."""
        self._queue.put(work)
        if self._thread is None:
            with self._starting:
                self._start()

    def close(self) -> None:
        """Do what is left, then end."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
