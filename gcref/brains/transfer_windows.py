"""How much may be on its way at once: to one source, to all of them, and what of it through mailboxes.

What is in flight bounds the memory of whoever asks, of whoever answers, and of the broker in between. A mailbox keeps
what nobody takes, and what has left for it cannot be called back: so there the windows are narrower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gcref.brains.transfer_state import BROKER

if TYPE_CHECKING:
    from gcref.brains.transfer_state import LinkState, Request, Source

RANGE_BYTES: Final = 1024 * 1024 - 16 * 1024
"""One range. Measured over loopback with CURVE: 1 MiB 0.65-0.72 GB/s, 4 MiB 0.45-0.55, 256 KiB 0.5, 64 KiB 0.35.
Above 1 MiB the allocator returns each message to the system and the pages are zeroed anew, below it the cost per
message shows. A little less than 1 MiB, so that a range, its header and its seal are one message of a mailbox."""

WINDOW_BYTES: Final = 16 * RANGE_BYTES
"""In flight from one source: covers a link of 1 GB/s with 16 ms of round trip, or 100 MB/s with 160 ms."""

TOTAL_WINDOW_BYTES: Final = 4 * WINDOW_BYTES
"""In flight from all sources: bounds the memory of what has arrived and is not written yet."""

MAIL_WINDOW_BYTES: Final = 8 * RANGE_BYTES
"""In flight from one source through its mailbox: covers 200 MB/s with 40 ms from the question to its answer."""

MAIL_TOTAL_BYTES: Final = 2 * MAIL_WINDOW_BYTES
"""In flight through mailboxes from all sources: bounds what lies in ours."""

WINDOW_RANGES: Final = 64
"""Ranges in flight from one source, which is what bounds a crowd of small objects."""

PAUSE_S: Final = 0.02
PAUSE_MAX_S: Final = 1.0
"""How long a link is left alone when a question did not fit into what waits to leave; doubles while it goes on."""


class Windows:
    """What is in flight, and whether there is room for more.

    Args:
        window_bytes: from one source.
        total_bytes: from all.
        mail_window_bytes: from one source through its mailbox.
        mail_total_bytes: from all through theirs.

    Attributes:
        in_flight: bytes, in all.
        mail_in_flight: bytes of it that come through mailboxes.
    """

    def __init__(
        self, window_bytes: int, total_bytes: int, mail_window_bytes: int, mail_total_bytes: int
    ) -> None:
        self.in_flight = 0
        self.mail_in_flight = 0
        self.window_bytes = window_bytes
        self.total_bytes = total_bytes
        self.mail_window_bytes = mail_window_bytes
        self.mail_total_bytes = mail_total_bytes
        self._crowded: dict[Source, None] = {}  # those that found the mail of others in their way

    def are_open(self) -> bool:
        """Whether anybody at all may be asked."""
        return self.in_flight < self.total_bytes

    def admit_source(self, source: Source, now: float) -> bool:
        """Whether this source may be asked, over one of its links at least."""
        if source.in_flight >= self.window_bytes or source.requests() >= WINDOW_RANGES:
            return False
        return any(self.admit(link, now) for link in source.links.values())

    def admit(self, link: LinkState, now: float) -> bool:
        """Whether one may ask over this link."""
        if now < link.paused_until:
            return False
        if link.rank != BROKER:
            return True
        source = link.source
        if source.mail_in_flight >= self.mail_window_bytes:
            return False
        if self.mail_in_flight >= self.mail_total_bytes:
            self._crowded[source] = None
            return False
        return True

    def add(self, request: Request) -> None:
        """A question is open."""
        self._count(request, request.weight)

    def remove(self, request: Request) -> list[Source]:
        """A question is closed. Returns the sources that had no room because of others, in turn."""
        self._count(request, -request.weight)
        if request.link.rank != BROKER or not self._crowded:
            return []
        found = list(self._crowded)
        self._crowded.clear()
        return found

    def _count(self, request: Request, weight: int) -> None:
        source = request.pull.source
        source.in_flight += weight
        self.in_flight += weight
        if request.link.rank == BROKER:
            source.mail_in_flight += weight
            self.mail_in_flight += weight


def pause(link: LinkState, now: float) -> float:
    """Leave a link alone for a while, longer each time until it is heard. Returns until when."""
    link.pause_s = min(2 * link.pause_s, PAUSE_MAX_S) if link.pause_s else PAUSE_S
    link.paused_until = now + link.pause_s
    return link.paused_until
