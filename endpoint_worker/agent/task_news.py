"""Which tasks the hub is told of: those that take long enough for somebody to ask where they are.

    SUBMIT ─► noted ── after TELL_AFTER_S ─► ended: nobody is told │ else: told, and looked at now and then until it has ended

So a flood of short tasks costs the hub nothing, and us a look at each. What is told is for people (`gcref explain TASK` finds
the endpoint by it); nothing rests on it, and what the hub does not hear is not said again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DONE, STATE_NAMES, is_task

TELL_AFTER_S: Final = 2.0
"""Tasks that have ended by then are not worth telling, seconds."""

LOOK_S: Final = 5.0
"""How often those that were told are looked at, seconds."""

WATCHED_MAX: Final = 10_000
"""Tasks that are looked at: a millisecond or two each time. Others are not told of."""

GONE: Final = "gone"
"""The state of a task that has ended, and that nobody holds any more."""

Event = tuple[bytes, str, float]
"""Task id, state, Unix seconds: as `HubClient.report` takes it."""


class TaskNews:
    """Notices what is to be told of tasks.

    Args:
        resolver: knows the tasks.
        tell: takes what is to be told.

    Attributes:
        deadline: when `tick` is due, monotonic seconds; None: nothing is looked at.
    """

    def __init__(self, resolver: Resolver, tell: Callable[[list[Event]], None]) -> None:
        self.deadline: float | None = None
        self._resolver = resolver
        self._tell = tell
        self._fresh: deque[tuple[float, list[bytes]]] = deque()
        self._fresh_count = 0
        self._watched: dict[bytes, str] = {}
        self._look_at = 0.0

    def submitted(self, tasks: list[bytes], now: float) -> None:
        """These tasks have come, monotonic seconds."""
        if self._fresh_count + len(self._watched) < WATCHED_MAX:
            self._fresh.append((now + TELL_AFTER_S, tasks))
            self._fresh_count += len(tasks)
            self._arm()

    def tick(self, now: float, unix: float) -> None:
        """Look at what is due, and tell what has changed.

        Args:
            now: monotonic seconds.
            unix: the same moment, Unix seconds.
        """
        news: list[Event] = []
        if self._watched and self._look_at <= now:
            self._look_at = now + LOOK_S
            for id, before in list(self._watched.items()):
                state = self._state_of(id)
                if state != before:
                    news.append((id, state, unix))
                    self._watch(id, state)
        while self._fresh and self._fresh[0][0] <= now:
            _, tasks = self._fresh.popleft()
            self._fresh_count -= len(tasks)
            for id in tasks:
                state = self._state_of(id)
                if state in _OPEN:
                    news.append((id, state, unix))
                    self._look_at = self._look_at if self._watched else now + LOOK_S
                    self._watch(id, state)
        self._arm()
        if news:
            self._tell(news)

    def _watch(self, id: bytes, state: str) -> None:
        if state in _OPEN:
            self._watched[id] = state
        else:
            self._watched.pop(id, None)

    def _state_of(self, id: bytes) -> str:
        task = self._resolver.objects.get(id)
        return STATE_NAMES[task.state] if is_task(task) else GONE

    def _arm(self) -> None:
        due = [self._fresh[0][0]] if self._fresh else []
        if self._watched:
            due.append(self._look_at)
        self.deadline = min(due, default=None)


_OPEN: Final = frozenset(STATE_NAMES[:DONE])
