"""A task that waits for other tasks lends its slot meanwhile.

Everything that waits for an unfinished future in a task's main thread does it inside `TaskContext.blocking()`: the
futures' own `result`, the stdlib's `wait` and `as_completed` (which wait for an event of theirs: `Waiters` puts one of
ours in its place), and `await`. Outside a task nothing here does anything.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

from gcref import task_context

_NOTHING: Final = contextlib.nullcontext()


def while_waiting(timeout: float | None) -> AbstractContextManager[None]:
    """What to surround a wait with. A wait of no time lends nothing."""
    context = task_context.current
    if context is None or (timeout is not None and timeout <= 0) or not _in_main_thread():
        return _NOTHING
    return context.blocking()


def has_running_loop() -> bool:
    """Whether this thread runs an event loop of asyncio."""
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class Waiters(list[Any]):
    """The waiters of a future inside a task: what waits for them lends the slot."""

    def append(self, waiter: Any) -> None:
        """Installs a waiter of the stdlib's; nobody waits for its event yet."""
        if not isinstance(waiter.event, _LendingEvent):
            waiter.event = _LendingEvent()
        super().append(waiter)


class _LendingEvent(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        if self.is_set():
            return True
        with while_waiting(timeout):
            return super().wait(timeout)


class _Awaits:
    """The `await`s under way in the task's event loop: together they lend the one slot once."""

    def __init__(self) -> None:
        self.count = 0
        self.loan: AbstractContextManager[None] = _NOTHING


_awaits = _Awaits()


@contextlib.contextmanager
def while_awaiting() -> Iterator[None]:
    """What to surround an `await` with. The slot is taken again when the last one ends."""
    if task_context.current is None or not _in_main_thread():
        yield
        return
    if _awaits.count == 0:
        loan = while_waiting(None)
        loan.__enter__()
        _awaits.loan = loan
    _awaits.count += 1
    try:
        yield
    finally:
        _awaits.count -= 1
        if _awaits.count == 0:
            _awaits.loan.__exit__(None, None, None)
