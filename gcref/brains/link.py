"""One link to a party: its handshake and its signs of life. `Peers` decides with it; this is state.

    dialled:   CONNECTING ── LinkUp ──► GREETING ── WELCOME ──► UP
                   ▲  ▲                    │                    │
                   │  └────── LinkDown ────┴────────────────────┤
               new dial ◄── WAITING ◄── refused, other version ─┤
                   ▲                                            │
                   └── SPARE ◄────── another one is enough ─────┘

    accepted:  HELLO ──► UP ── nothing heard ──► SILENT ── anything heard ──► UP
       by mail:  HELLO ──► GREETING ── WELCOME ──► UP

A dialled link that freezes is dialled anew, under a new number. An accepted one cannot be: it waits to be heard
again, or for its party to dial once more. Mail can be sent to an accepted link also while it is silent: it waits in its
party's mailbox.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from gcref.brains.peers_events import CLIENT, ENDPOINT, Hello, Identity, Link
from gcref.brains.session import NEVER, Session
from gcref.config import PROTOCOL_VERSION
from gcref.errors import RemoteProtocolError
from gcref.wire.codec import BYE, PING, pack, pack_packet

if TYPE_CHECKING:
    from gcref.brains.peer import Peer

# States.
CONNECTING: Final = 0
GREETING: Final = 1
UP: Final = 2
WAITING: Final = 3
SPARE: Final = 4
SILENT: Final = 5
STATE_NAMES: Final = ("connecting", "greeting", "up", "waiting", "spare", "silent")

RANKS: Final = {"ipc": 0, "direct": 1, "broker": 2}
"""Carriers, best first."""

# Why a party says BYE.
CLOSING: Final = 0
SAY_HELLO: Final = 1
REFUSED: Final = 2
VERSION: Final = 3

GREET_S: Final = 1.0
"""How long a HELLO may be unanswered until it is said again; doubles, seconds."""

GREET_MAX_S: Final = 5.0
"""How long it waits at most until it is said again, seconds."""

RETRY_S: Final = 1.0
"""How long to wait until a party that refused us is dialled again; doubles up to `RETRY_MAX_S`, seconds."""

RETRY_MAX_S: Final = 60.0

MISSED_HEARTBEATS: Final = 3
"""A link on which nothing was heard for so many periods is taken for dead."""

ACCEPTED_PATIENCE: Final = 1.2
"""The accepting side asks this much later, so that on an idle link only the dialling side asks; then it asks faster,
so that both sides find out after `MISSED_HEARTBEATS` periods."""

PYTHON: Final = f"{sys.version_info[0]}.{sys.version_info[1]}"

MAX_ADDRESSES: Final = 32
"""Addresses of one socket that a party may name in its HELLO."""

MAX_ADDRESS_CHARS: Final = 300
"""A name of a host has at most 253 characters."""

_HELLO_FIELDS: Final = len(Hello._fields) - len(Hello._field_defaults)
_MAX_TEXT: Final = 1000


class LinkState:
    """What is known of one link.

    Attributes:
        id: its name towards the carrier; a dialled link gets a new one with each `Dial`.
        peer: whose link it is.
        carrier: name of the carrier.
        by_mail: it goes through mailboxes at the broker: what is sent waits there, and may be delivered again years later.
        rank: of that carrier, 0 is best.
        address: what was dialled; "" for an accepted link.
        server_key: the key that the dialled side must have, z85, or None.
        dialled: we dialled it.
        key: the authenticated key of the other side, z85, or None.
        role: what `authorize` said of it.
        state: one of the states above.
        since: when it came into its state, seconds.
        order: counts up with each link that comes up: the newest of two equals is used.
        heard_at: when anything was last heard on it, seconds.
        beats: heartbeats asked for since then; the last one at `beat_at`.
        ping_n: number of the last PING; `ping_at` is when, `ping_seq` the last number that was sent before it.
        nonce: of the last HELLO that was not answered yet; -1: there is none.
        epoch: the epoch of our stream when it was written.
        acked: what the peer had acknowledged then.
        due_at: when something is to be done in this state (other than heartbeats), seconds.
        wait_s: how long the present HELLO may be unanswered, seconds.
        retry_s: how long the last wait before a new dial was; 0: there was none since it was up.
        greeting_since: when the handshake began, seconds.
        attempts: connections tried in vain since it was last up.
        error: why it is not up; None: nothing went wrong yet.
        refused: its refusal has been told.
        rtt_s: the last round trip measured.
    """

    __slots__ = (
        "acked", "address", "attempts", "beat_at", "beats", "by_mail", "carrier", "dialled", "due_at", "epoch", "error",
        "greeting_since", "heard_at", "id", "key", "nonce", "order", "peer", "ping_at", "ping_n",
        "ping_seq", "rank", "refused", "retry_s", "role", "rtt_s", "server_key", "since", "state", "wait_s",
    )  # fmt: skip

    def __init__(
        self,
        id: Link,
        peer: Peer,
        carrier: str,
        now: float,
        *,
        address: str = "",
        server_key: bytes | None = None,
        key: bytes | None = None,
        dialled: bool,
    ) -> None:
        self.id = id
        self.peer = peer
        self.carrier = carrier
        self.by_mail = carrier == "broker"
        self.rank = RANKS.get(carrier, RANKS["direct"])
        self.address = address
        self.server_key = server_key
        self.dialled = dialled
        self.key = server_key if dialled else key
        self.role = ""
        self.state = CONNECTING
        self.since = now
        self.order = 0
        self.heard_at = now
        self.beats = 0
        self.beat_at = now
        self.ping_n = 0
        self.ping_at = now
        self.ping_seq = 0
        self.nonce = -1
        self.epoch = 0
        self.acked = 0
        self.due_at = NEVER
        self.wait_s = GREET_S
        self.retry_s = 0.0
        self.greeting_since = now
        self.attempts = 0
        self.error: str | None = None
        self.refused = False
        self.rtt_s: float | None = None

    def become(self, state: int, now: float, error: str | None = None) -> None:
        """Change the state; an error stays known until the link is up."""
        if state != self.state:
            self.state = state
            self.since = now
        self.due_at = NEVER
        if error is not None:
            self.error = error

    def heartbeat_at(self, heartbeat_s: float) -> float:
        """When the next sign of life is to be asked for (or missed for good)."""
        if self.state != UP:
            return NEVER
        first = 1.0 if self.dialled else ACCEPTED_PATIENCE
        if not self.beats:
            return self.heard_at + heartbeat_s * first
        return self.beat_at + heartbeat_s * (MISSED_HEARTBEATS - first) / (MISSED_HEARTBEATS - 1)

    def ping_frame(self, session: Session, now: float) -> bytes:
        """Write a PING, and remember what was sent before it."""
        self.ping_n += 1
        self.ping_at = now
        self.ping_seq = session.next_seq - 1
        return control_frame(PING, session, [pack(self.ping_n)])

    def describe(self) -> dict[str, Any]:
        """Give plain facts for people."""
        return {
            "carrier": self.carrier,
            "address": self.address,
            "dialled": self.dialled,
            "state": STATE_NAMES[self.state],
            "since": self.since,
            "attempts": self.attempts,
            "error": self.error,
            "rtt_s": self.rtt_s,
        }


# ------------------------------------------------------------------------------------------------------ packets


def control_frame(kind: int, session: Session, bodies: list[bytes]) -> bytes:
    """Write a packet without a number in the stream; it acknowledges what was taken."""
    return pack_packet(kind, session.epoch, 0, session.peer_epoch, session.taken, bodies)


def hello_frame(kind: int, me: Identity, session: Session, nonce: int) -> bytes:
    """Write a HELLO or a WELCOME."""
    body = [
        PROTOCOL_VERSION, PYTHON, me.party, me.kind, me.owner_key, session.epoch, session.peer_epoch, session.taken,
        nonce, me.control, me.bulk,
    ]  # fmt: skip
    return pack_packet(kind, session.epoch, 0, 0, 0, [pack(body)])


def bye_frame(code: int, text: str, epoch: int = 0) -> bytes:
    """Write a BYE. It is said to strangers too, so it speaks of no stream of ours.

    Args:
        code: why.
        text: for people.
        epoch: of the stream of the one that it is said to, as far as it is known: its next process is not meant.
    """
    return pack_packet(BYE, 0, 0, epoch, 0, [pack(code), pack(text)])


def read_hello(messages: list[Any]) -> Hello:
    """Read what a HELLO or a WELCOME carries.

    Raises:
        RemoteProtocolError: it is none.
    """
    body = messages[0] if messages else None
    if type(body) is not list or len(body) < _HELLO_FIELDS:
        raise RemoteProtocolError("a HELLO without its fields")
    control, bulk = [_addresses(field) for field in (*body[_HELLO_FIELDS:], (), ())[:2]]
    hello = Hello(*body[:_HELLO_FIELDS])._replace(control=control, bulk=bulk)
    numbers = (hello.protocol, hello.epoch, hello.taken_epoch, hello.taken_seq, hello.nonce)
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
        raise RemoteProtocolError("a HELLO with a number that is none")
    if (
        type(hello.party) is not bytes
        or len(hello.party) != 16
        or hello.kind not in (CLIENT, ENDPOINT)
        or type(hello.owner_key) is not bytes
        or len(hello.owner_key) > 64
        or type(hello.python) is not str
        or len(hello.python) > 32
        or not hello.epoch
    ):
        raise RemoteProtocolError("a HELLO with a field of the wrong type")
    return hello


def _addresses(field: Any) -> tuple[str, ...]:
    """The addresses in a field of a HELLO that can be dialled. Of other kinds there may be some day; they are left out."""
    if type(field) not in (list, tuple) or len(field) > MAX_ADDRESSES:
        raise RemoteProtocolError("a HELLO whose addresses are no list, or too many")
    return tuple(
        dict.fromkeys(
            each
            for each in field
            if type(each) is str and each.startswith("tcp://") and len(each) <= MAX_ADDRESS_CHARS
        )
    )


def read_bye(messages: list[Any]) -> tuple[int, str]:
    """Read a BYE; whatever is wrong with it, it means that the other side goes."""
    code = messages[0] if messages and type(messages[0]) is int else CLOSING
    text = messages[1] if len(messages) > 1 and type(messages[1]) is str else ""
    return code, text[:_MAX_TEXT]
