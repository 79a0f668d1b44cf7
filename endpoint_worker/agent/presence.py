"""Who is away: when they are given up, and when those who may have moved are looked for again.

A party that has a session and no link is away. A client is given up when its lease is over, another endpoint after
`endpoint_lost_s`. An endpoint that was started again may listen elsewhere, which its record tells; so as long as it is
away, its record is read again now and then.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

SEEK_S: Final = 2.0
"""How often the record of an endpoint that is away is read again, seconds."""

CLIENT: Final = "client"
ENDPOINT: Final = "endpoint"


class Due(NamedTuple):
    """What the time has brought.

    Attributes:
        given_up: (party, `CLIENT` or `ENDPOINT`): too long away.
        sought: endpoints to be looked for.
    """

    given_up: list[tuple[bytes, str]]
    sought: list[bytes]


class Presence:
    """The parties that are away.

    Args:
        lease_s: how long a client may be, seconds.
        endpoint_lost_s: how long an endpoint may be, seconds.

    Attributes:
        deadline: when `due` has something to say, monotonic seconds; None: nobody is away.
    """

    def __init__(self, *, lease_s: float, endpoint_lost_s: float) -> None:
        self.deadline: float | None = None
        self._patience_s = {CLIENT: lease_s, ENDPOINT: endpoint_lost_s}
        self._away: dict[bytes, tuple[float, str]] = {}  # party: when it is given up, its kind
        self._seek_at = math.inf

    def is_away(self, party: bytes, kind: str, now: float) -> None:
        """The party cannot be talked to, from now on or still."""
        self._away.setdefault(party, (now + self._patience_s[kind], kind))
        if kind == ENDPOINT and self._seek_at == math.inf:
            self._seek_at = now + SEEK_S
        self._arm()

    def is_back(self, party: bytes) -> None:
        """The party can be talked to, or is nobody's concern any more."""
        if self._away.pop(party, None) is not None:
            self._arm()

    def until(self, party: bytes) -> float | None:
        """When a party that is away will be given up, monotonic seconds; None: it is not away."""
        found = self._away.get(party)
        return None if found is None else found[0]

    def due(self, now: float) -> Due:
        """What is to be done by now; those who are given up are not away any more."""
        given_up = [(party, kind) for party, (until, kind) in self._away.items() if until <= now]
        for party, _ in given_up:
            del self._away[party]
        sought: list[bytes] = []
        if self._seek_at <= now:
            sought = [party for party, (_, kind) in self._away.items() if kind == ENDPOINT]
            self._seek_at = now + SEEK_S if sought else math.inf
        self._arm()
        return Due(given_up, sought)

    def _arm(self) -> None:
        first = min((until for until, _ in self._away.values()), default=None)
        self.deadline = None if first is None else min(first, self._seek_at)
