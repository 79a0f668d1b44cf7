"""What the resolver is told and what it answers: plain records that carry batches."""

from __future__ import annotations

from typing import Any, NamedTuple

from gcref.brains.tasks import Obj, Task


class Who(NamedTuple):
    """The party that a message came from, as its session proved it.

    Attributes:
        party: its id.
        role: "user", "peer", or "worker" (the SDK inside a task of this endpoint).
        owner: its owner key, z85.
        kind: "client" or "endpoint".
    """

    party: bytes
    role: str
    owner: bytes
    kind: str


# ---------------------------------------------------------------------------------------------------------- events


class Submitted(NamedTuple):
    """A SUBMIT; `tasks` as in the message."""

    who: Who
    home: bytes
    group: bytes
    secret: bytes
    opts: dict[str, Any]
    fns: list[bytes]
    tasks: list[Any]
    now: float
    unix: float


class FunctionsKnown(NamedTuple):
    """The bytes of these functions are here now."""

    digests: list[bytes]


class Offered(NamedTuple):
    """An OFFER: objects that the party puts here."""

    who: Who
    home: bytes
    group: bytes
    secret: bytes
    items: list[Any]
    now: float


class Subscribed(NamedTuple):
    """A SUBSCRIBE."""

    who: Who
    home: bytes
    items: list[Any]
    now: float


class Unsubscribed(NamedTuple):
    """An UNSUBSCRIBE."""

    who: Who
    ids: list[bytes]


class Forgotten(NamedTuple):
    """A FORGET from the home of our copies."""

    home: bytes
    ids: list[bytes]


class Outcomes(NamedTuple):
    """OUTCOME items from another home."""

    home: bytes
    items: list[Any]
    carrier: str


class Finished(NamedTuple):
    """Results of a worker, as in the worker channel's DONE."""

    worker: str
    results: list[Any]


class Ended(NamedTuple):
    """These tasks end here with this failure (worker lost, walltime, deadlock, …)."""

    tasks: list[Task]
    failure: list[Any]
    retry: bool


class Pulled(NamedTuple):
    """The bytes of these objects are in the store: (id, attempt, bytes by carrier, references inside or None).

    References are told of what was uploaded here; those of another home's object are that home's to pin.
    """

    items: list[tuple[bytes, int, dict[str, int], bytes | None]]


class PullFailed(NamedTuple):
    """The bytes of this object could not be had; `attempt` is the one that was asked for (None: the one that is known)."""

    id: bytes
    failure: list[Any]
    attempt: int | None = None


class PullWaits(NamedTuple):
    """The home does not have the bytes of this attempt any more: what it says next of the object is awaited.

    When it stays silent for too long, a `PullFailed` with the same attempt ends the wait.
    """

    id: bytes
    attempt: int


class Cancelled(NamedTuple):
    """These tasks will not run (asked by a user and certain)."""

    tasks: list[Task]


class ArgumentGone(NamedTuple):
    """The bytes of `obj`, an argument of this task that dispatch was about to send, are not here after all."""

    task: Task
    obj: Obj


class Evicted(NamedTuple):
    """The store dropped these copies of other homes' objects."""

    ids: list[bytes]


class PartyGone(NamedTuple):
    """A party is gone for good: its pins fall."""

    party: bytes
    now: float


class HomeLost(NamedTuple):
    """An endpoint is lost or has lost its memory: what was unfinished there is lost."""

    home: bytes
    failure: list[Any]


class Attached(NamedTuple):
    """ATTACH: a later process of the owner takes up a task group."""

    who: Who
    group: bytes


class Reclaimed(NamedTuple):
    """PINS: a restarted endpoint pins exactly these objects of this home; with `more`, the list goes on in the next one."""

    who: Who
    ids: list[bytes]
    more: bool


class HomeRestarted(NamedTuple):
    """An endpoint has a new process that knows what the old one knew; what the old one was still to say may be lost."""

    home: bytes


class BytesLost(NamedTuple):
    """The store does not have these bytes any more: (id, reason), a value of `LostReason` (bytes_lost, corrupt)."""

    items: list[tuple[bytes, str]]


class Recovered(NamedTuple):
    """This process has taken up what the one before it knew (`load`, `replay`); now it looks at what is left in the world.

    Attributes:
        running: task id → number of the adopted worker that is running its present attempt.
        stored: object id → (attempt, size in bytes) of what the store really has.
        now: monotonic seconds of this process.
    """

    running: dict[bytes, int]
    stored: dict[bytes, tuple[int, int]]
    now: float


class Tick(NamedTuple):
    """Time has passed."""

    now: float


# ---------------------------------------------------------------------------------------------------- instructions


class Runnable(NamedTuple):
    """Hand these tasks to dispatch; their arguments are here."""

    tasks: list[Task]


class Withdraw(NamedTuple):
    """Take these tasks back from dispatch; they have ended."""

    tasks: list[Task]


class Notify(NamedTuple):
    """Send these OUTCOME items to the party."""

    party: bytes
    items: list[Any]


class NotifyLater(NamedTuple):
    """As `Notify`, for outcomes that others are using already: the party that submitted the tasks need not hear at once."""

    party: bytes
    items: list[Any]


class Subscribe(NamedTuple):
    """Send SUBSCRIBE items to the home."""

    home: bytes
    items: list[Any]


class Unsubscribe(NamedTuple):
    """Send UNSUBSCRIBE to the home."""

    home: bytes
    ids: list[bytes]


class Pins(NamedTuple):
    """Send PINS to the home, before any SUBSCRIBE of the same event; with `more`, the list goes on in the next one."""

    home: bytes
    ids: list[bytes]
    more: bool


class Forget(NamedTuple):
    """Tell the party to drop its copies."""

    party: bytes
    ids: list[bytes]


class Relay(NamedTuple):
    """Send this message to the home on behalf of a task of ours."""

    home: bytes
    message: list[Any]


class NeedFunctions(NamedTuple):
    """Ask the submitter for functions that are not here."""

    party: bytes
    digests: list[bytes]


class Tasks(NamedTuple):
    """Send TASKS: the group's secret, and (id, state name) of each task."""

    party: bytes
    group: bytes
    secret: bytes
    tasks: list[list[Any]]


class Pull(NamedTuple):
    """Fetch the bytes of `obj` from `source` into the store."""

    obj: Obj
    source: bytes


class Idle(NamedTuple):
    """These stored copies of other homes' objects are not needed now: the store may drop them."""

    ids: list[bytes]


class Needed(NamedTuple):
    """These stored copies are needed again."""

    ids: list[bytes]


class CancelPull(NamedTuple):
    """Nobody wants these bytes any more."""

    id: bytes


class Free(NamedTuple):
    """Free the stored bytes of these ids."""

    ids: list[bytes]


class Discard(NamedTuple):
    """A result came that nobody may see (an old attempt, a cancelled task): free its segments."""

    paths: list[str]


class Stored(NamedTuple):
    """A worker wrote these: (id, attempt, path, size). They are the store's from now on."""

    items: list[tuple[bytes, int, str, int]]


Instruction = (
    Runnable
    | Withdraw
    | Notify
    | NotifyLater
    | Subscribe
    | Unsubscribe
    | Pins
    | Forget
    | Relay
    | NeedFunctions
    | Tasks
    | Pull
    | CancelPull
    | Idle
    | Needed
    | Free
    | Discard
    | Stored
)
