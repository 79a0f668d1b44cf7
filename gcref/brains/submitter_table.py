"""What a client's brain knows of its tasks, of objects elsewhere, and of the endpoints that it speaks to.

There is one `Entry` for each object that futures here stand for, so it is slotted, and its rare facts are apart.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

# States of an entry.
UNSENT: Final = 0
SENT: Final = 1
RUNNING: Final = 2
ENDED: Final = 3

# What is known of a peer.
APART: Final = 0  # nobody tries to reach it
CONNECTING: Final = 1  # it has not been reached yet
UP: Final = 2
DOWN: Final = 3  # it was reached, and is out of reach now

# How a look at an endpoint's record and lock turns out.
SEEN_RUNNING: Final = "running"
SEEN_UNKNOWN: Final = "unknown"  # it lives on another machine
SEEN_STOPPED: Final = "stopped"  # it may be started again
SEEN_GONE: Final = "gone"  # it will not come back

NEVER: Final = float("inf")

LOOK_AFTER_S: Final = 0.25
"""The first look at an endpoint that is not reached; each next one waits twice as long, up to `LOOK_EVERY_S`."""

LOOK_EVERY_S: Final = 0.5
"""A look reads a small file, 0.1 ms; an endpoint that was started again is found as soon, wherever it listens now."""


class Lane:
    """What the tasks of one executor (or of one view of it) share.

    Attributes:
        home: the endpoint that its tasks are submitted to.
        group: the task group.
        secret: what read tokens of the group are made of, 32 bytes.
        opts: options of its tasks, as in SUBMIT.
        batch_size: most tasks in one SUBMIT.
        root: the lane that counts; its own, or that of the executor it is a view of.
        open: tasks of the root lane and its views that have not ended.
    """

    __slots__ = ("__weakref__", "batch_size", "group", "home", "open", "opts", "root", "secret")

    def __init__(
        self,
        home: bytes,
        group: bytes,
        secret: bytes,
        opts: dict[str, Any],
        batch_size: int,
        root: Lane | None = None,
    ) -> None:
        self.home = home
        self.group = group
        self.secret = secret
        self.opts = opts
        self.batch_size = batch_size
        self.root = self if root is None else root
        self.open = 0


class Stored:
    """A value that lies at its home until somebody reads it.

    Attributes:
        id: of the object that holds the bytes; for an alias, of what it stands for.
        home: the endpoint to fetch it from.
        size: bytes of the blob.
        attempt: which run made it.
        token: the read token, where one is needed.
        pull: the fetch under way, if any; the client's.
    """

    __slots__ = ("attempt", "home", "id", "pull", "size", "token")

    def __init__(self, id: bytes, home: bytes, size: int, attempt: int, token: bytes | None) -> None:
        self.id = id
        self.home = home
        self.size = size
        self.attempt = attempt
        self.token = token
        self.pull: Any = None


class Peer:
    """An endpoint that is spoken to.

    Attributes:
        id: its party id.
        state: APART, CONNECTING, UP or DOWN.
        since: when that began.
        open: entries that have not ended and depend on it.
        outbox: entries that were not sent yet; those that have ended meanwhile are passed over.
        functions: digests of the functions that it was sent.
        look_at: when to look whether it runs.
        look_in: how long to wait for the look after that, seconds.
        trouble: what was last heard of it while it was not up.
        failure: what it refused us with, or failed with last, until it is up again.
        refused_at: when it refused us last.
        give_up_at: when to fail with `failure`, unless it comes up before.
        fetches: values that are being fetched from it.
        full: it has much to take already, so tasks are held back.
        met: it was up before.
        obstacle: why it cannot be found; None: it was found.
    """

    __slots__ = (
        "failure", "fetches", "full", "functions", "give_up_at", "id", "look_at", "look_in", "met", "obstacle", "open",
        "outbox", "refused_at", "since", "state", "trouble",
    )  # fmt: skip

    def __init__(self, id: bytes) -> None:
        self.id = id
        self.state = APART
        self.since = 0.0
        self.open = 0
        self.outbox: deque[Entry] = deque()
        self.functions: set[bytes] = set()
        self.look_at = 0.0
        self.look_in = LOOK_AFTER_S
        self.trouble = ""
        self.failure: list[Any] | None = None
        self.refused_at = -NEVER
        self.give_up_at = NEVER
        self.fetches = 0
        self.full = False
        self.met = False
        self.obstacle: list[Any] | None = None


class Entry:
    """An object that futures here stand for.

    Attributes:
        id: 16 bytes.
        home: the endpoint that owns it.
        peer: who is asked about it.
        lane: the lane of its task while that has not ended; None for what was not submitted here.
        state: UNSENT, SENT, RUNNING or ENDED.
        pinned: its home was told that we want it.
        users: futures that stand for it, references in its value, and entries that are aliases of it.
        holder: the future that stands for it (a list, if there are several).
        fn: (digest, bytes) of its function, while it has not ended.
        spec: what was handed in, while it is unsent.
        args: what must be kept until it has ended.
        extra: rare facts, or None.
    """

    __slots__ = (
        "args",
        "extra",
        "fn",
        "holder",
        "home",
        "id",
        "lane",
        "peer",
        "pinned",
        "spec",
        "state",
        "users",
    )

    def __init__(self, id: bytes, home: bytes, peer: Peer, lane: Lane | None, holder: Any) -> None:
        self.id = id
        self.home = home
        self.peer = peer
        self.lane = lane
        self.holder = holder
        self.state = UNSENT
        self.pinned = False
        self.users = 1
        self.fn: tuple[bytes, bytes] | None = None
        self.spec: Any = None
        self.args: Any = None
        self.extra: Extra | None = None


class Extra:
    """Rare facts of an entry.

    Attributes:
        token: the read token of a reference.
        target: what the object stands for, if it is an alias.
        followers: aliases of it that end when it ends.
        record: of the run that made the alias.
        cancels: cancel requests that wait for this entry.
        revoked: it will not be sent (any more), and its home has not been told yet: cancelled, or given up.
    """

    __slots__ = ("cancels", "followers", "record", "revoked", "target", "token")

    def __init__(self, token: bytes | None = None) -> None:
        self.token = token
        self.target: Entry | None = None
        self.followers: dict[Entry, None] = {}
        self.record: list[Any] | None = None
        self.cancels: list[Any] = []
        self.revoked = False
