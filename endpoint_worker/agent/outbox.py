"""What goes out to other parties, and what may wait a little for company.

A packet costs both sides a wake-up, about as much as a task. Letting go of an object, and telling the submitter of a
result that others are using already, can wait some milliseconds: they leave with the next message to that party, or by
their time.
"""

from __future__ import annotations

from typing import Any, Final

from gcref.brains.peers import Peers
from gcref.wire import messages as m

_JOINED: Final = (m.UNSUBSCRIBE, m.FORGET)  # [kind, ids]: two of them are one with both ids


class Outbox:
    """Messages for other parties, in order for each party.

    Args:
        peers: the sessions.

    Attributes:
        deadline: when `flush` is due, monotonic seconds; None: nothing waits.
    """

    def __init__(self, peers: Peers) -> None:
        self.deadline: float | None = None
        self._peers = peers
        self._waiting: dict[bytes, list[list[Any]]] = {}

    def say(self, party: bytes, message: list[Any]) -> None:
        """Send with the next flush of the sessions, after what waits for that party."""
        if self._waiting:
            for earlier in self._waiting.pop(party, ()):
                self._peers.send(party, earlier)
        self._peers.send(party, message)

    def say_by(self, party: bytes, message: list[Any], by: float) -> None:
        """Send with the next message to that party, or at `by` (monotonic seconds)."""
        waiting = self._waiting.setdefault(party, [])
        if waiting and waiting[-1][0] == message[0] and message[0] in _JOINED:
            waiting[-1][1] += message[1]
        else:
            waiting.append(message)
        if self.deadline is None or by < self.deadline:
            self.deadline = by

    def flush(self) -> None:
        """Send all that waits."""
        waiting, self._waiting, self.deadline = self._waiting, {}, None
        for party, messages in waiting.items():
            for message in messages:
                self._peers.send(party, message)
