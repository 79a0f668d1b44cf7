"""Holding tasks back for an endpoint that has much to take already, so that what waits here can be cancelled here.

    Send ──► sent ──► look: above the high mark ──► PeerFull(True)      below the low mark ──► PeerFull(False)

Everything here belongs to the I/O thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gcref.brains import submitter_events as ev

if TYPE_CHECKING:
    from gcref.brains.peers import Peers

HIGH_BYTES: Final = 32 * 1024 * 1024
"""Unacknowledged bytes above which a peer is sent no more tasks."""

LOW_BYTES: Final = 8 * 1024 * 1024


class Backlog:
    """Which endpoints have much to take.

    Args:
        tell: tells the client's brain.
    """

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self._tell = tell
        self._sent_to: set[bytes] = set()
        self._full: set[bytes] = set()

    @property
    def is_due(self) -> bool:
        """Whether `look` has something to look at."""
        return bool(self._sent_to or self._full)

    def sent(self, party: bytes) -> None:
        """Something was queued for that endpoint."""
        self._sent_to.add(party)

    def look(self, peers: Peers) -> bool:
        """Holds tasks back, or lets them go on, as the sessions stand; True: something is to be flushed now."""
        for party in self._sent_to:
            if party not in self._full and peers.backlog_bytes(party) > HIGH_BYTES:
                self._full.add(party)
                self._tell(ev.PeerFull(party, True))
        self._sent_to.clear()
        for party in [party for party in self._full if peers.backlog_bytes(party) < LOW_BYTES]:
            self._full.discard(party)
            self._tell(ev.PeerFull(party, False))
        return bool(self._sent_to)
