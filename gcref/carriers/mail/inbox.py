"""What has come for us and waits to be taken, by lane; and what may be acknowledged.

mail thread: deliver ─► Opener ─► lane ─► take ─► done ─► settled ─► acknowledged by the mail thread
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from gcref.carriers.mail.post import BULK, CONTROL, Mail, MailDown, MailEvent, MailUp
from gcref.carriers.mail.seal import Opener

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gcref.carriers.keys import KeyPair


class _Lane:
    """One lane.

    Attributes:
        waiting: what has come, each with its tag. No event: it is there already, and came again. No tag: it is no mail.
        taken: tags of what was taken and is not done.
    """

    __slots__ = ("taken", "unfinished", "waiting", "wake")

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.waiting: deque[tuple[MailEvent | None, int | None]] = deque()
        self.taken: list[int] = []


class Inbox:
    """The lanes of a mailbox.

    `deliver`, `tell` belong to the mailbox's thread (or its lock); `take` and `done` to the lane's thread; `attach` to any.

    Args:
        me: our id.
        pair: our owner key.
        settle: told which tags are done, on a lane's thread or on the mailbox's.

    Attributes:
        counts: what was dropped (see `Opener.counts`); unwanted: on a lane that nobody serves.
    """

    def __init__(self, me: bytes, pair: KeyPair, settle: Callable[[Sequence[int]], None]) -> None:
        self._opener = Opener(me, pair)
        self.counts = self._opener.counts
        self.counts["unwanted"] = 0
        self.received = 0
        self.received_bytes = 0
        self._settle = settle
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}
        self._state: MailUp | MailDown = MailDown("we have no mailbox yet")
        self._due: list[_Lane] = []

    @property
    def state(self) -> MailUp | MailDown:
        """What was told last."""
        return self._state

    def attach(self, lane: int, wake: Callable[[], None]) -> None:
        """See `Mailbox.attach`."""
        assert lane in (CONTROL, BULK), lane
        new = _Lane(wake)
        with self._lock:
            new.waiting.append((self._state, None))
            self._lanes[lane] = new
        wake()

    def tell(self, event: MailEvent) -> None:
        """Something that all lanes are to know."""
        with self._lock:
            if isinstance(event, (MailUp, MailDown)):
                if event == self._state:
                    return
                self._state = event
            lanes = list(self._lanes.values())
            for lane in lanes:
                lane.waiting.append((event, None))
        for lane in lanes:
            lane.wake()

    def deliver(self, tag: int, envelope: bytes, *, again: bool = False) -> None:
        """Open what the broker gave us; `flush` then wakes the lanes.

        Args:
            tag: what it is acknowledged by.
            envelope: its bytes.
            again: the broker says that it may have been delivered before.
        """
        opened = self._opener.open(envelope, again=again)
        if opened is None:
            self._settle_dropped(tag, envelope, again)
            return
        lane = self._lanes.get(opened.lane)
        if lane is None:
            self.counts["unwanted"] += 1
            self._settle((tag,))
            return
        self.received += 1
        self.received_bytes += len(opened.data)
        # Looked at after adding: whoever takes meanwhile either finds it, or leaves it as the first, which wakes.
        lane.waiting.append((Mail(opened.sender, opened.key, opened.data), tag))
        if len(lane.waiting) == 1:
            self._due.append(lane)

    def _settle_dropped(self, tag: int, envelope: bytes, again: bool) -> None:
        # A part alone need not be kept: with its process the frame is lost, and is sent again whole. But what came
        # before may still wait here to be dealt with: until then the broker must keep it.
        lane = self._lanes.get(envelope[1] & 1) if again and len(envelope) > 1 else None
        if lane is None or not (lane.waiting or lane.taken):
            self._settle((tag,))
            return
        lane.waiting.append((None, tag))
        self._due.append(lane)

    def flush(self) -> None:
        """Wake the lanes that have got something."""
        if self._due:
            for lane in self._due:
                lane.wake()
            self._due.clear()

    def take(self, lane: int) -> list[MailEvent]:
        """See `Mailbox.take`."""
        found = self._lanes.get(lane)
        if found is None or not found.waiting:
            return []
        events: list[MailEvent] = []
        waiting, taken = found.waiting, found.taken
        while waiting:
            event, tag = waiting.popleft()
            if tag is not None:
                taken.append(tag)
            if event is not None:
                events.append(event)
        return events

    def done(self, lane: int) -> None:
        """See `Mailbox.done`."""
        found = self._lanes.get(lane)
        if found is not None and found.taken:
            taken, found.taken = found.taken, []
            self._settle(taken)

    def describe(self) -> dict[str, object]:
        """Counts, for status."""
        return {
            "received": self.received,
            "received_bytes": self.received_bytes,
            "dropped": dict(self.counts),
        }
