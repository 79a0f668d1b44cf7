"""What is known of one party: its session, its links, and which of them is in use. `Peers` decides with it; this is state."""

from __future__ import annotations

from typing import Any

from gcref.brains.link import SILENT, UP, LinkState
from gcref.brains.session import Session


class Peer:
    """What is known of one party.

    Attributes:
        asking: the next `flush` asks it what it has taken.
        party: its id.
        session: the streams.
        links: dialled and accepted ones.
        best: the link in use; None: it cannot be talked to. One that is not up is a mailbox whose party is away: what is
            sent waits there.
        kind: "client" or "endpoint"; "" until it was met.
        owner_key: as it showed it; None until it was met.
        python: its Python version.
        fresh: a new process of it was met, and `PeerUp` has not said so yet.
        announced: the carrier that `PeerUp` named last; None: it is down.
        addresses: those of its control and bulk sockets that `DialBack` named last.
        dirty: `flush` is to look at it.
        resend_to: the number up to which all that is unacknowledged is to be sent again; 0: nothing.
    """

    __slots__ = (
        "addresses", "announced", "asking", "best", "dirty", "fresh", "kind", "links", "owner_key", "party", "python",
        "resend_to", "session",
    )  # fmt: skip

    def __init__(self, party: bytes, epoch: int) -> None:
        self.party = party
        self.session = Session(epoch)
        self.links: list[LinkState] = []
        self.best: LinkState | None = None
        self.kind = ""
        self.owner_key: bytes | None = None
        self.python = ""
        self.fresh = True
        self.announced: str | None = None
        self.addresses: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self.dirty = False
        self.resend_to = 0
        self.asking = False

    @property
    def link_up(self) -> LinkState | None:
        """The link that it can be talked to by; None: there is none, or it is away and only its mailbox is there."""
        return self.best if self.best is not None and self.best.state == UP else None

    def best_link(self) -> LinkState | None:
        """The link to use: the best that is up, the newest of equals; else a mailbox in which mail waits for its party."""
        best: LinkState | None = None
        mailbox: LinkState | None = None
        for link in self.links:
            if link.state == UP:
                if best is None or (link.rank, -link.order) < (best.rank, -best.order):
                    best = link
            elif link.state == SILENT and link.by_mail and (mailbox is None or link.order > mailbox.order):
                mailbox = link
        return mailbox if best is None else best

    def describe(self) -> dict[str, Any]:
        """Give plain facts: what `Peers.describe` promises."""
        session, link = self.session, self.link_up
        return {
            "up": link is not None,
            "carrier": link.carrier if link is not None else None,
            "since": link.since if link is not None else None,
            "heard_at": link.heard_at if link is not None else None,
            "rtt_s": link.rtt_s if link is not None else None,
            "mailbox": self.best is not None and link is None,
            "kind": self.kind,
            "python": self.python,
            "pending": session.pending,
            "unacked_bytes": session.unacked_bytes,
            "queued_bytes": session.queued_bytes,
            "taken": session.taken,
            "duplicates": session.duplicates,
            "links": [each.describe() for each in self.links],
        }
