"""A question that a user's thread asks the I/O thread."""

from __future__ import annotations

import threading
from typing import Any


class Request:
    """A question from a user's thread, and its answer."""

    __slots__ = ("_event", "answer", "facts")

    def __init__(self) -> None:
        self._event = threading.Event()
        self.answer: Any = None
        self.facts: dict[str, Any] = {}

    def set(self, answer: Any) -> None:
        """Answers it."""
        self.answer = answer
        self._event.set()

    def wait(self, timeout: float | None) -> Any:
        """The answer; None when there is none in time."""
        self._event.wait(timeout)
        return self.answer
