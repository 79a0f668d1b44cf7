"""A task that waits for a future lends its slot: what `task_context.current.blocking()` makes.

    SDK: result() of an unfinished future ── blocking() ──► lend: what is held goes back, BLOCKED, wait for SLOT
                  … the future is done …                 ──► resume: RESUME, wait for SLOT

Only the main thread of a task lends, and waits inside waits lend once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Lender:
    """The one slot of a worker.

    Args:
        is_running: whether a task runs in this process.
        lend: gives the slot away; may raise `DeadlockError`.
        resume: waits for a slot.
    """

    def __init__(
        self, is_running: Callable[[], bool], lend: Callable[[], None], resume: Callable[[], None]
    ) -> None:
        self._is_running = is_running
        self._lend = lend
        self._resume = resume
        self._depth = 0

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Surround a wait.

        Raises:
            DeadlockError: on entering: too many wait already.
        """
        if threading.current_thread() is not threading.main_thread() or not self._is_running():
            yield
            return
        if self._depth == 0:
            self._lend()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._resume()
