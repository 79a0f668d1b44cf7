"""Guests: parties that only ask how things are (`endpoint-worker status`, `gcref explain`, `gcref doctor`) and go.

Somebody may ask once a second, for days. Such a party pins nothing and waits for nothing, so nothing of it is kept: neither
in the journal nor, once its link is down, a session that waits a day for its return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from gcref.wire import messages as m

QUESTIONS: Final = frozenset((m.STATUS, m.EXPLAIN, m.TRY))


class Guests:
    """Knows which parties have only asked questions."""

    def __init__(self) -> None:
        self._guests: set[bytes] = set()
        self._others: set[bytes] = set()

    def only_asks(self, party: bytes, messages: Sequence[Sequence[Any]]) -> bool:
        """Whether a party, with these messages of it, has said nothing but questions so far."""
        if party in self._others:
            return False
        if all(message[0] in QUESTIONS for message in messages):
            self._guests.add(party)
            return True
        self._guests.discard(party)
        self._others.add(party)
        return False

    def is_gone(self, party: bytes) -> bool:
        """The party's link is down, or it is given up. True: it was a guest, and is to be forgotten."""
        if party in self._guests:
            self._guests.discard(party)
            return True
        return False

    def forget(self, party: bytes) -> None:
        """The party is given up."""
        self._others.discard(party)
        self._guests.discard(party)
