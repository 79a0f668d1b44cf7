"""A question that a user's thread asks the I/O thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Request:
    """A question from a user's thread, and its answer.

    Args:
        take: what to make of the answer, on the thread that gives it; None: leave it as it is.
    """

    __slots__ = ("_event", "_take", "answer", "facts")

    def __init__(self, take: Callable[[Any], Any] | None = None) -> None:
        self._event = threading.Event()
        self._take = take
        self.answer: Any = None
        self.facts: dict[str, Any] = {}

    def set(self, answer: Any) -> None:
        """Answers it."""
        try:
            self.answer = answer if self._take is None else self._take(answer)
        finally:
            self._event.set()

    def wait(self, timeout: float | None) -> Any:
        """The answer; None when there is none in time."""
        self._event.wait(timeout)
        return self.answer
