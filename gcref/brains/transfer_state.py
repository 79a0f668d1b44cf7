"""What the transfer brain remembers: pulls, their open questions, the links to ask over, the parties behind them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from gcref.wire.messages import MODE_BYTES, MODE_PATH

if TYPE_CHECKING:
    from gcref.brains.transfer_events import LinkUp, Pull

RANKS: Final = {"ipc": 0, "direct": 1, "broker": 2}
"""Carriers, the best first."""

BROKER: Final = RANKS["broker"]


class PullState:
    """One object on its way. `way` is None until the first range is asked, `stranded_at` until no link will do."""

    __slots__ = (
        "id", "attempt", "size", "source", "token", "mode", "key", "way", "again", "frontier", "asked", "missing",
        "strikes", "carriers", "ended", "listed", "sealing", "stranded_at", "way_closed",
    )  # fmt: skip

    def __init__(self, event: Pull, source: Source) -> None:
        self.id = event.id
        self.attempt = event.attempt
        self.size = event.size
        self.source = source
        self.token = event.token
        self.mode = event.mode
        self.key = event.key
        self.ended = False
        self.listed = False
        self.way_closed = event.mode == MODE_BYTES
        self.stranded_at: float | None = None
        self.asked: dict[int, Request] = {}
        self.restart()

    def restart(self) -> None:
        """Forget all progress. The open questions have been forgotten before."""
        self.way: int | None = None
        self.sealing = False
        self.again: deque[int] = deque((0,))
        self.frontier = self.size
        self.missing = 1
        self.strikes: dict[int, int] = {}
        self.carriers: dict[str, int] = {}

    def start(self, way: int, range_bytes: int) -> None:
        """Cut the object into ranges: one, unless it comes as bytes."""
        self.way = way
        if way == MODE_BYTES:
            self.frontier = min(range_bytes, self.size)
            self.missing = max(1, -(-self.size // range_bytes))

    def length(self, offset: int, range_bytes: int) -> int:
        """Bytes of the range at this offset."""
        return min(range_bytes, self.size - offset) if self.way == MODE_BYTES else self.size

    def wants(self) -> bool:
        """Whether there is a range to ask."""
        return bool(self.again) or self.frontier < self.size

    def begun(self) -> bool:
        """Whether there is something to abort."""
        return self.way is not None and self.way != MODE_PATH

    def choose(self) -> LinkState | None:
        """The link to ask: one that has not disappointed, the best carrier, the first that came up."""
        best = None
        best_rank: tuple[int, int, int] | None = None
        for link in tuple(self.source.links.values()):  # a copy: `progress` looks from another thread
            if self.key is not None and link.key != self.key:
                continue
            rank = (link.strikes, link.rank, link.order)
            if best_rank is None or rank < best_rank:
                best, best_rank = link, rank
        return best


class LinkState:
    """A way to a source. `order` tells which came up first.

    `requests` are the open questions, the oldest first; `owed` counts those that were closed without an answer.
    Until `paused_until` nothing is asked over it; `pause_s` is how long the last such pause was.
    """

    __slots__ = (
        "carrier", "heard_at", "key", "number", "order", "owed", "pause_s", "paused_until", "rank", "requests",
        "source", "strikes",
    )  # fmt: skip

    def __init__(self, event: LinkUp, source: Source, order: int) -> None:
        self.number = event.link
        self.carrier = event.carrier
        self.key = event.key
        self.rank = RANKS[event.carrier]
        self.order = order
        self.source = source
        self.heard_at = event.now
        self.strikes = 0
        self.owed = 0
        self.pause_s = 0.0
        self.paused_until = 0.0
        self.requests: dict[int, Request] = {}


class Request:
    """An open question."""

    __slots__ = (
        "asked_at", "length", "link", "number", "offset", "overtaken", "patience_s", "pull", "weight",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        pull: PullState,
        offset: int,
        length: int,
        link: LinkState,
        now: float,
        patience_s: float,
    ) -> None:
        self.number = number
        self.pull = pull
        self.offset = offset
        self.length = length
        self.link = link
        self.asked_at = now
        self.patience_s = patience_s
        self.overtaken = False
        # What it takes of the windows: nothing moves for PATH and INTO.
        self.weight = length if pull.way == MODE_BYTES else 0

    def due(self) -> float:
        """When patience ends, as things stand."""
        since = self.asked_at if self.overtaken else max(self.asked_at, self.link.heard_at)
        return since + self.patience_s


class Source:
    """A party that we pull from."""

    __slots__ = ("in_flight", "links", "listed", "mail_in_flight", "party", "pulls", "wanting")

    def __init__(self, party: bytes) -> None:
        self.party = party
        self.links: dict[int, LinkState] = {}
        self.pulls: dict[bytes, PullState] = {}
        self.wanting: deque[PullState] = deque()  # pulls with ranges to ask, in turn
        self.in_flight = 0
        self.mail_in_flight = 0
        self.listed = False

    def requests(self) -> int:
        """How many questions are open."""
        return sum(len(link.requests) for link in self.links.values())
