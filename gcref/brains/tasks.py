"""What the agent's brains know of objects and tasks.

One `Obj` stands for one object known at an endpoint: made here, put here, or living at another home. A `Task` is the object
that its run will make, together with what is needed to run it. The resolver owns both; the dispatch brain reads the
graph through `waiters` and `deps` and keeps its own marks (`worker`, `seq`) on a task.

There is one of these for each task, so they are slotted and their rare fields start as shared constants.
"""

from __future__ import annotations

from typing import Any, Final, TypeGuard

# States of an object. A task goes WAITING → READY → DISPATCHED → one of the ended states; any other object waits, then ends.
WAITING: Final = 0
READY: Final = 1
DISPATCHED: Final = 2
DONE: Final = 3
FAILED: Final = 4
CANCELLED: Final = 5
LOST: Final = 6
STATE_NAMES: Final = ("waiting", "ready", "dispatched", "done", "failed", "cancelled", "lost")

NOBODY: Final[frozenset[bytes]] = frozenset()


class Group:
    """A task group as its home knows it: who submits, and the secret that its read tokens are made of."""

    __slots__ = ("__weakref__", "id", "only_submitter", "owner", "secret", "submitter")

    def __init__(self, id: bytes, secret: bytes, submitter: bytes, owner: bytes) -> None:
        self.id = id
        self.secret = secret
        self.submitter = submitter
        self.owner = owner
        self.only_submitter = frozenset((submitter,))


class Options:
    """How the tasks of one batch are to run; shared by them."""

    __slots__ = ("resources", "retries", "walltime_s")

    def __init__(
        self, retries: int = 0, walltime_s: float | None = None, resources: dict[str, Any] | None = None
    ) -> None:
        self.retries = retries
        self.walltime_s = walltime_s
        self.resources = resources


DEFAULT_OPTIONS: Final = Options()


class Extra:
    """The facts that only a few objects have: those of other homes, aliases, and results that contain references.

    Attributes:
        token: the read token for its home, when that is another endpoint.
        submitted: the SUBMIT or OFFER that makes it was relayed from here.
        subscribed: SUBSCRIBE was sent to its home (or SUBMIT, which subscribes).
        confirmed: its home has answered, so our pin is in force.
        at_home: it is done at its home; its bytes (`size`) are not here.
        pulling: its bytes are on their way.
        cachers: parties that keep a copy without a pin.
        target: the object that this one is an alias of.
        aliases: objects that are aliases of this one.
        put: it was put or uploaded, where somebody had asked for it before: it has the form of a task, and is none.
        awaited_by: objects whose outcome waits until our pin on this one is confirmed.
        unconfirmed: how many pins this object's own outcome waits for; `deferred` is that outcome.
        claims: (who, token) of those that subscribed before the object's SUBMIT came.
        relay: what to send to the home once the argument blob is here.
        unsaid: the SUBMIT (its shared head, the task) or OFFER that was relayed to the home, until it has answered.
        newer: the home's latest OUTCOME item, when it is of a later attempt than the bytes that are here.
        tries: why each failed attempt failed, one line each.
        moved: bytes by carrier of its way here, until a task's record has counted it.
    """

    __slots__ = (
        "aliases",
        "at_home",
        "awaited_by",
        "cachers",
        "claims",
        "confirmed",
        "deferred",
        "moved",
        "newer",
        "pulling",
        "put",
        "relay",
        "submitted",
        "subscribed",
        "target",
        "token",
        "tries",
        "unconfirmed",
        "unsaid",
    )

    def __init__(self, token: bytes = b"") -> None:
        self.token = token
        self.submitted = False
        self.subscribed = False
        self.confirmed = False
        self.at_home = False
        self.pulling = False
        self.cachers: set[bytes] | None = None
        self.target: Obj | None = None
        self.aliases: list[Obj] | None = None
        self.put = False
        self.awaited_by: list[Obj] | None = None
        self.unconfirmed = 0
        self.deferred: Any = None
        self.claims: list[tuple[Any, bytes]] | None = None
        self.relay: list[Any] | None = None
        self.moved: dict[str, int] | None = None
        self.unsaid: tuple[list[Any], list[Any]] | None = None
        self.newer: list[Any] | None = None
        self.tries: list[str] | None = None


class Obj:
    """An object known here.

    Attributes:
        id: 16 bytes.
        home: the endpoint that owns it (16 bytes); this endpoint's id when it is ours.
        state: one of the states above.
        value: the blob, when it is small; `None` when it lies in the store or is not here.
        size: bytes of the blob, 0 while unknown.
        failure: the failure of a FAILED, CANCELLED or LOST object.
        attempt: the attempt that made the value.
        record: the record for its outcome, or None.
        refs: 48-byte references that the blob contains, concatenated.
        pins: the parties that subscribe to it.
        extra: what only a few objects have.
        holds: pins from inside this endpoint (arguments of unfinished tasks, blobs that contain it, aliases).
        waiters: tasks here whose argument it is and that have not started; None is none.
    """

    __slots__ = (
        "attempt",
        "failure",
        "group",
        "holds",
        "home",
        "id",
        "pins",
        "record",
        "refs",
        "size",
        "state",
        "value",
        "waiters",
        "extra",
    )

    def __init__(self, id: bytes, home: bytes, group: Group | None, pins: frozenset[bytes]) -> None:
        self.id = id
        self.home = home
        self.group = group
        self.pins = pins
        self.state = WAITING
        self.value: bytes | None = None
        self.size = 0
        self.failure: list[Any] | None = None
        self.attempt = 0
        self.record: list[Any] | None = None
        self.refs = b""
        self.holds = 0
        self.waiters: list[Task] | None = None
        self.extra: Extra | None = None


class Task(Obj):
    """An object that a run of a function here will make.

    Attributes:
        fn: digest of the function, or None when it travels inside the payload.
        payload: the argument blob, when small; else None. What is needed to run it (payload, args, deps) goes when it ends,
            except where the bytes of its result could be lost and there are retries left.
        args: the object that holds the argument blob, when it is large.
        deps: the objects whose values are arguments, in the order of their indices.
        missing: how many of `deps`, `args` and the function are not here yet.
        broken: one of `deps` ended without a value.
        worker: the worker that holds it, while DISPATCHED; else None.
        seq: its number in that worker's queue.
        sent_at: monotonic seconds of its dispatch.
    """

    __slots__ = (
        "args",
        "broken",
        "deps",
        "fn",
        "missing",
        "options",
        "passed",
        "payload",
        "received_at",
        "sent_at",
        "seq",
        "worker",
    )

    def __init__(
        self,
        id: bytes,
        home: bytes,
        group: Group,
        fn: bytes | None,
        payload: bytes | None,
        options: Options,
        received_at: float,
    ) -> None:
        # Obj.__init__ written out: a call more per task shows in the throughput.
        self.id = id
        self.home = home
        self.group = group
        self.pins = group.only_submitter
        self.state = WAITING
        self.value = None
        self.size = 0
        self.failure = None
        self.attempt = 1
        self.record = None
        self.refs = b""
        self.holds = 0
        self.waiters = None
        self.extra = None
        self.fn = fn
        self.payload = payload
        self.args: Obj | None = None
        self.deps: tuple[Obj, ...] = ()
        self.passed: tuple[Obj, ...] = ()
        self.missing = 0
        self.broken = False
        self.options = options
        self.received_at = received_at
        self.sent_at = 0.0
        self.worker: int | None = None
        self.seq = 0


def is_task(obj: Obj | None) -> TypeGuard[Task]:
    """Whether a run here makes this object. What somebody asked for before it came has the form of a task, whatever it is."""
    return isinstance(obj, Task) and (obj.extra is None or not obj.extra.put)
