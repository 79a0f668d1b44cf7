"""What the submitter is told and what it answers: plain records that carry batches."""

from __future__ import annotations

from typing import Any, NamedTuple

from gcref.brains.submitter_table import Lane

# -------------------------------------------------------------------------------------------------------- events


class Submitted(NamedTuple):
    """Tasks: (lane, id, (digest, bytes) | None, payload | None, deps, passed, upload | None, kept, holder).

    `upload` has `.id` and `.size`: the blob of arguments that is too large for a message. `kept` is whatever must
    live until the task has ended.
    """

    items: list[
        tuple[
            Lane, bytes, tuple[bytes, bytes] | None, bytes | None, bytes | None, bytes | None, Any, Any, Any
        ]
    ]
    now: float


class Offered(NamedTuple):
    """Objects that the user puts at an endpoint: (lane, id, size, blob | None, kept, holder)."""

    items: list[tuple[Lane, bytes, int, bytes | None, Any, Any]]
    now: float


class Opened(NamedTuple):
    """Futures for objects that exist elsewhere: (id, home, token | None, lane | None, holder)."""

    items: list[tuple[bytes, bytes, bytes | None, Lane | None, Any]]
    now: float


class Kept(NamedTuple):
    """Something else than a future stands for each of these objects, too; its end is told by `Dropped`."""

    ids: list[bytes]


class Dropped(NamedTuple):
    """Futures of these ids are gone."""

    ids: list[bytes]


class CancelAsked(NamedTuple):
    """The user wants these tasks not to run. Answered by a list of bool."""

    request: Any
    ids: list[bytes]
    force: bool
    now: float


class ExplainAsked(NamedTuple):
    """The user wants to know about these. Answered by what the peer says, or None."""

    request: Any
    number: int
    ids: list[bytes]
    now: float


class AttachAsked(NamedTuple):
    """The user wants the tasks of a group. Answered by `[secret, items]` of TASKS, or by a `Failure`."""

    request: Any
    home: bytes
    group: bytes
    deadline: float
    now: float


class Leaving(NamedTuple):
    """The client ends, and was done with these homes in order: what is done there is let go of.

    Attributes:
        homes: ids of the endpoints.
        keep: ids of objects that are arguments of tasks that have not ended.
    """

    homes: frozenset[bytes]
    keep: frozenset[bytes]


class FetchBegan(NamedTuple):
    """A value is being fetched from the peer, which must be reached for that."""

    peer: bytes
    now: float


class FetchEnded(NamedTuple):
    """That fetch has ended."""

    peer: bytes


class Unsendable(NamedTuple):
    """The SUBMIT of these tasks could not be written: they fail so."""

    ids: list[bytes]
    failure: list[Any]


class PeerFull(NamedTuple):
    """The peer has much to take already: hold tasks back; or it has taken it."""

    peer: bytes
    full: bool


class Heard(NamedTuple):
    """Checked messages from a peer."""

    peer: bytes
    messages: list[Any]
    now: float


class PeerUp(NamedTuple):
    """A peer can be spoken to. `fresh`: by a process of it that is new to us; it knows what the one before had taken."""

    peer: bytes
    fresh: bool
    now: float


class PeerDown(NamedTuple):
    """No link to the peer is left; the session stays."""

    peer: bytes
    reason: str
    now: float


class PeerReset(NamedTuple):
    """The peer has lost what it was told: unfinished tasks there are lost.

    Attributes:
        peer: its id.
        kept: our messages that it had not taken, and will get now.
        now: seconds.
    """

    peer: bytes
    kept: list[Any]
    now: float


class PeerFailed(NamedTuple):
    """There is no use in waiting for the peer: what is open there fails so."""

    peer: bytes
    failure: list[Any]


class PeerRefused(NamedTuple):
    """One of the ways to the peer is closed to us; another one may be open."""

    peer: bytes
    failure: list[Any]
    now: float


class PeerSeen(NamedTuple):
    """What a look at a peer's record and lock found.

    Attributes:
        peer: the peer.
        seen: one of the SEEN constants.
        text: what is the matter, with the remedy.
        now: seconds.
        failure: what its tasks end with, should it never be met; None: that it was out of reach.
    """

    peer: bytes
    seen: str
    text: str
    now: float
    failure: list[Any] | None = None


class Tick(NamedTuple):
    """Time has passed."""

    now: float


Event = (
    Submitted | Offered | Opened | Kept | Dropped | CancelAsked | ExplainAsked | AttachAsked | Leaving
    | FetchBegan | FetchEnded | Unsendable | PeerFull
    | Heard | PeerUp | PeerDown | PeerReset | PeerFailed | PeerRefused | PeerSeen | Tick
)  # fmt: skip

# -------------------------------------------------------------------------------------------------- instructions


class Send(NamedTuple):
    """Say this to the peer."""

    peer: bytes
    message: list[Any]


class Settle(NamedTuple):
    """End these: (holder, state, failed, what came, record). The state is one of the stdlib's."""

    ends: list[tuple[Any, str, bool, Any, list[Any] | None]]


class Renewed(NamedTuple):
    """The bytes of these were made once more by a later attempt: (holder, OK or STORED, blob or size, attempt).

    Who has the value keeps it; who has not fetched it yet takes it from that attempt.
    """

    items: list[tuple[Any, int, Any, int]]


class Running(NamedTuple):
    """The tasks of these holders run."""

    holders: list[Any]


class Answer(NamedTuple):
    """Answer a request."""

    request: Any
    answer: Any


class Failure(NamedTuple):
    """The answer to a request that cannot be answered."""

    failure: list[Any]


class Reach(NamedTuple):
    """Find a way to this peer."""

    peer: bytes


class Leave(NamedTuple):
    """Stop trying to reach this peer: what was open there has failed."""

    peer: bytes


class Look(NamedTuple):
    """See whether this peer runs, and where; answer with `PeerSeen`."""

    peer: bytes


class Idle(NamedTuple):
    """All tasks of this lane have ended."""

    lane: Lane


class Uploaded(NamedTuple):
    """The peer has these uploads: they need not be kept."""

    ids: list[bytes]


Instruction = Send | Settle | Renewed | Running | Answer | Reach | Leave | Look | Idle | Uploaded
