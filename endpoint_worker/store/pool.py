"""Segments in memory that nobody uses or sees: kept for a while, because their pages are there already."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

from endpoint_worker.store.model import Segment, step_at

# A pooled segment may be this many steps of capacity larger than asked, about a quarter: more would hide memory, less
# would miss near fits.
_FIT_STEPS: Final = 4
# What falls due within this time is trimmed together: one wake-up instead of many.
_TRIM_GRAIN_S: Final = 1.0


class Pool:
    """The pooled segments. Every operation costs O(1), amortized.

    Args:
        keep_s: how long an unused segment is kept, in seconds.

    Attributes:
        bytes: what they take together.
    """

    def __init__(self, keep_s: float) -> None:
        self.bytes = 0
        self._keep_s = keep_s
        self._segments: OrderedDict[int, Segment] = OrderedDict()  # oldest first
        self._fits: dict[int, deque[Segment]] = {}  # the same by capacity, oldest first

    def add(self, segment: Segment, now: float) -> None:
        """Keep a segment."""
        segment.pooled_at = now
        self._segments[segment.number] = segment
        self._fits.setdefault(segment.capacity, deque()).append(segment)
        self.bytes += segment.capacity

    def take(self, capacity: int) -> Segment | None:
        """Take out a segment of at least this capacity and not much more, if there is one."""
        step = step_at(capacity)
        for fit in range(capacity, capacity + (_FIT_STEPS + 1) * step, step):
            stack = self._fits.get(fit)
            if stack:
                return self._remove(stack, stack.pop())  # the one pooled last has the warmest pages
        return None

    def drop_oldest(self) -> Segment | None:
        """Take out the segment that has been here for longest, if there is one."""
        oldest = next(iter(self._segments.values()), None)
        if oldest is None:
            return None
        stack = self._fits[oldest.capacity]
        return self._remove(stack, stack.popleft())  # the oldest of all is the oldest of its capacity

    def due(self, now: float) -> list[Segment]:
        """Take out what has been here for too long, and what soon will have been."""
        found: list[Segment] = []
        deadline = self.deadline
        if deadline is None or deadline > now:
            return found
        until = now + min(_TRIM_GRAIN_S, self._keep_s / 4)
        while deadline is not None and deadline <= until:
            oldest = self.drop_oldest()
            if oldest is not None:
                found.append(oldest)
            deadline = self.deadline
        return found

    @property
    def deadline(self) -> float | None:
        """When `due` has something; None: never, as things are."""
        oldest = next(iter(self._segments.values()), None)
        return None if oldest is None else oldest.pooled_at + self._keep_s

    def validate(self) -> None:
        """Check that the accounts agree. For tests.

        Raises:
            AssertionError: they do not.
        """
        here = self._segments.values()
        assert self.bytes == sum(segment.capacity for segment in here)
        assert {s.number for stack in self._fits.values() for s in stack} == self._segments.keys()
        assert not [s for s in here if s.seen or s.exposed or s.disk or s.owner is not None]

    def _remove(self, stack: deque[Segment], segment: Segment) -> Segment:
        if not stack:
            del self._fits[segment.capacity]
        del self._segments[segment.number]
        self.bytes -= segment.capacity
        return segment
