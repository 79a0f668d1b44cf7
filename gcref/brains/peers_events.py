"""What `Peers` is told and what it answers.

A *link* is one way to one party: a number when `Peers` asked for it (`Dial`), any other hashable when a carrier
accepted it. Times are seconds of a monotonic clock, handed in.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, NamedTuple, TypeAlias

Link: TypeAlias = Hashable
Candidate: TypeAlias = tuple[str, str, bytes | None]
"""A way to try: carrier name, address, the server's public key (None where the socket needs none)."""

CLIENT: Final = "client"
ENDPOINT: Final = "endpoint"

USER: Final = "user"
PEER: Final = "peer"
Role: TypeAlias = str
"""What a party may do: `USER` submits and touches its own; `PEER` subscribes and fetches with read tokens."""


class Identity(NamedTuple):
    """Who this party is.

    Attributes:
        party: its id, 16 bytes.
        kind: `CLIENT` or `ENDPOINT`.
        owner_key: the public key of its owner, z85.
        epoch: a number above those of all earlier processes of this party: Unix microseconds at the start will do.
        control: the `tcp://` addresses where its control socket can be dialled; who is reached by mail alone learns
            them with the handshake.
        bulk: the same for its bulk socket.
    """

    party: bytes
    kind: str
    owner_key: bytes
    epoch: int
    control: tuple[str, ...] = ()
    bulk: tuple[str, ...] = ()


class Hello(NamedTuple):
    """What a party says of itself in HELLO and WELCOME.

    Attributes:
        protocol: its protocol version.
        python: its Python version, such as `3.11`.
        party: its id, 16 bytes.
        kind: `CLIENT` or `ENDPOINT`.
        owner_key: the public key of its owner, z85. Equal to the key of the connection wherever there is one.
        epoch: the epoch of its stream.
        taken_epoch: the epoch of *our* stream that it knows; 0: none.
        taken_seq: the last number that it has taken of that.
        nonce: ties a WELCOME to its HELLO.
        control: where its control socket can be dialled, `tcp://` addresses.
        bulk: the same for its bulk socket.
    """

    protocol: int
    python: str
    party: bytes
    kind: str
    owner_key: bytes
    epoch: int
    taken_epoch: int
    taken_seq: int
    nonce: int
    control: tuple[str, ...] = ()
    bulk: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------- events


class Know(NamedTuple):
    """These are the ways to a party: dial them all. Told again, it replaces the list; what is unchanged stays."""

    party: bytes
    candidates: list[Candidate]
    now: float


class Forget(NamedTuple):
    """Nothing more is to be said to this party, or heard from it: close its links, drop its session."""

    party: bytes


class PacketIn(NamedTuple):
    """A frame came in.

    Attributes:
        link: where from.
        frame: its bytes.
        key: the authenticated key of the connection, z85; None: a carrier without keys (ipc), or a dialled link.
        now: seconds.
        carrier: the carrier's name; what it says of a dialled link is ignored.
    """

    link: Link
    frame: bytes
    key: bytes | None
    now: float
    carrier: str = "direct"


class LinkUp(NamedTuple):
    """A dialled link has a connection; it may be its second or third."""

    link: Link
    now: float


class LinkDown(NamedTuple):
    """A link has no connection (any more). The carrier goes on trying, if it was dialled."""

    link: Link
    reason: str
    now: float


class Refused(NamedTuple):
    """The other side refused our key, its key is not the expected one, or (link None) we refused somebody's.

    Attributes:
        link: a dialled link, which is to be hung up (until then the carrier goes on trying); None: an incoming
            connection.
        now: seconds.
        reason: for people.
        key: the key that was refused here, z85, if it got so far.
        ours: our key or right is what was refused; else the other side is not who was expected.
    """

    link: Link | None
    now: float
    reason: str = ""
    key: bytes | None = None
    ours: bool = True


class Tick(NamedTuple):
    """Time has passed. `flush` looks at the clock too, so a loop that flushes needs no ticks."""

    now: float


class Revoke(NamedTuple):
    """These keys, z85, have no rights any more, on open links either."""

    keys: list[bytes]
    now: float = 0.0


Event = Know | Forget | PacketIn | LinkUp | LinkDown | Refused | Tick | Revoke


# ---------------------------------------------------------------------------------------------------- instructions


class Dial(NamedTuple):
    """Connect, go on trying until told to hang up, and tell about it by the number `link`."""

    party: bytes
    link: int
    carrier: str
    address: str
    server_key: bytes | None


class Hangup(NamedTuple):
    """Close a link. What was sent on it just before should still go out."""

    link: Link


class Transmit(NamedTuple):
    """Send a frame; never wait. What cannot be sent is dropped: it is sent again."""

    link: Link
    frame: bytes


class Deliver(NamedTuple):
    """Messages of a party, once and in order, each one checked by `gcref.wire.messages.check`.

    Attributes:
        party: the sender.
        role: what `authorize` said of the link that they came by.
        kind: `CLIENT` or `ENDPOINT`.
        owner_key: the sender's owner key, z85.
        messages: one packet's worth.
        raw_frame: the frame that holds them, for a journal; `peers.replay` reads it.
        carrier: how they came.
    """

    party: bytes
    role: Role
    kind: str
    owner_key: bytes
    messages: list[Any]
    raw_frame: bytes
    carrier: str


class PeerUp(NamedTuple):
    """A party can be talked to, or by another carrier than before.

    Attributes:
        party: which.
        carrier: the carrier in use.
        fresh: it is a process that we have not met: the first one, or it was restarted.
    """

    party: bytes
    carrier: str
    fresh: bool


class PeerDown(NamedTuple):
    """No link to a party is up. Its session stays, and what is sent waits: here, or in its mailbox."""

    party: bytes
    reason: str


class DialBack(NamedTuple):
    """A party that is reached by mail says where it listens: it may be dialled there. Told once for each new list.

    The addresses are a claim; who really answers there is proven by the key.

    Attributes:
        party: which.
        owner_key: the key that the other side must have, z85.
        control: `tcp://` addresses of its control socket: candidates beside those that are known.
        bulk: the same for its bulk socket.
    """

    party: bytes
    owner_key: bytes
    control: tuple[str, ...]
    bulk: tuple[str, ...]


class PeerReset(NamedTuple):
    """A party was restarted without what it had acknowledged: what is unfinished there is lost.

    Attributes:
        party: which.
        kept: our messages that it had not acknowledged; they will reach its new process.
    """

    party: bytes
    kept: list[Any]


class AuthRefused(NamedTuple):
    """A key or a right was refused; told once until it works.

    Attributes:
        party: the party dialled, or the one that was refused; None: a stranger.
        message: for people.
        ours: our key or right is what was refused; else the other side is not who was expected.
    """

    party: bytes | None
    message: str
    ours: bool = True


class Mismatch(NamedTuple):
    """A party speaks another version of the protocol; told once per link.

    Attributes:
        party: None: a stranger.
        message: names both versions.
    """

    party: bytes | None
    message: str


class Rejected(NamedTuple):
    """Something that is not of the protocol came and was dropped: to be logged.

    Told once per party and kind of fault; `Peers.counts` counts them all.
    """

    party: bytes | None
    link: Link
    reason: str


Instruction = (
    Dial
    | Hangup
    | Transmit
    | Deliver
    | PeerUp
    | PeerDown
    | DialBack
    | PeerReset
    | AuthRefused
    | Mismatch
    | Rejected
)
