"""What is remembered of strangers, and of faults: so that each is told of once, answered seldom, and costs no memory."""

from __future__ import annotations

from typing import Final

from gcref.brains.peers_events import Link

MAX_STRANGERS: Final = 1024
"""Strangers whose faults are remembered, so that each is told of once."""

STRANGER_QUIET_S: Final = 1.0
"""A stranger is answered at most so often, seconds."""


class Strangers:
    """The memory of `Peers` for whoever is no party of it, and for what went wrong."""

    def __init__(self) -> None:
        self._told: set[tuple[object, str]] = set()
        self._answered_at: dict[Link, float] = {}

    def first_time(self, who: object, what: str) -> bool:
        """Whether this is the first fault of its kind of somebody; it is not from now on."""
        if (who, what) in self._told:
            return False
        if len(self._told) >= MAX_STRANGERS:
            self._told.clear()
        self._told.add((who, what))
        return True

    def is_to_be_answered(self, link: Link, now: float) -> bool:
        """Whether a stranger is answered this time; if so it is quiet for a while."""
        answered_at = self._answered_at.get(link)
        if answered_at is not None and now - answered_at < STRANGER_QUIET_S:
            return False
        if len(self._answered_at) >= MAX_STRANGERS:
            self._answered_at.clear()
        self._answered_at[link] = now
        return True

    def is_met(self, link: Link) -> None:
        """Note that it is no stranger any more."""
        self._answered_at.pop(link, None)
