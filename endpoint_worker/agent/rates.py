"""How fast counters grow: tasks and bytes a second, over the last ten seconds or so.

A sample of the counters is taken when the loop turns anyway, at most once a second; an idle agent takes none. Asked for
rates, it compares the counters of now with the youngest sample that is old enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

SAMPLE_S: Final = 1.0
WINDOW_S: Final = 10.0
"""The counters are compared with those of so many seconds ago, or longer if nothing happened since."""


class Rates:
    """Samples of counters.

    Args:
        read: gives the counters; they only grow.
        now: monotonic seconds.

    Attributes:
        due: when the next sample may be taken.
    """

    def __init__(self, read: Callable[[], Mapping[Any, int]], now: float) -> None:
        self._read = read
        self._samples: deque[tuple[float, Mapping[Any, int]]] = deque([(now, dict(read()))])
        self.due = now + SAMPLE_S

    def sample(self, now: float) -> None:
        """Take a sample; to be called before a turn counts anything, once it is due."""
        samples = self._samples
        samples.append((now, dict(self._read())))
        while len(samples) > 1 and samples[1][0] <= now - WINDOW_S:
            samples.popleft()
        self.due = now + SAMPLE_S

    def now(self, now: float) -> tuple[float, dict[Any, float]]:
        """Over how many seconds, and how much each counter grew a second."""
        then, before = next((s for s in reversed(self._samples) if s[0] <= now - WINDOW_S), self._samples[0])
        seconds = max(now - then, 1e-3)
        grown = {key: (count - before.get(key, 0)) / seconds for key, count in self._read().items()}
        return seconds, grown
