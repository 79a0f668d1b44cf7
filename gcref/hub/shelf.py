"""What the hub keeps for look-up: functions by digest, and what endpoints have told of tasks.

A function belongs to the user who put it there; nobody else sees it. An event is seen by whoever may use its endpoint and
knows the task's id. Both are bounded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gcref import ids
from gcref.errors import NotFoundError, RejectedError
from gcref.hub import sharing
from gcref.hub.database import Database, Function, Party, TaskEvent, User
from gcref.hub.who import Who
from gcref.objects.functions import DIGEST_BYTES

# Ten times what rides inside a message: whoever registers a function may have a large one.
MAX_FUNCTION_BYTES: Final = 1024 * 1024
FUNCTIONS_BYTES_PER_USER: Final = 256 * 1024 * 1024
EVENTS_KEPT_S: Final = 7 * 86_400.0
EVENTS_PER_ENDPOINT: Final = 200_000
# More than anybody reads; a task has a handful.
EVENTS_SHOWN: Final = 1_000


def put_function(database: Database, who: Who, digest: bytes, code: bytes) -> None:
    """Keep a function's bytes. Idempotent.

    Raises:
        RejectedError: it is too large, is not what the digest says, or the user has no room left.
    """
    if len(code) > MAX_FUNCTION_BYTES:
        raise RejectedError(
            f"a function has at most {MAX_FUNCTION_BYTES} bytes, not {len(code)}: put data into arguments"
        )
    if blake2b(code, digest_size=DIGEST_BYTES).digest() != digest:
        raise RejectedError(f"the bytes are not those of function {digest.hex()}")

    def work(session: Session) -> None:
        if session.scalar(_mine(who, digest, Function.size_bytes)) is not None:
            return
        query = sa.select(sa.func.sum(Function.size_bytes)).where(Function.user_id == who.user_id)
        if (session.scalar(query) or 0) + len(code) > FUNCTIONS_BYTES_PER_USER:
            raise RejectedError(
                f"the functions of user {who.name} would take more than {FUNCTIONS_BYTES_PER_USER} bytes"
            )
        session.add(
            Function(user_id=who.user_id, digest=digest, code=code, size_bytes=len(code), created=time.time())
        )

    database.write(work)


def get_function(database: Database, who: Who, digest: bytes) -> bytes:
    """A function's bytes.

    Raises:
        NotFoundError: this user has put none of that digest here.
    """
    code = database.read(lambda session: session.scalar(_mine(who, digest, Function.code)))
    if code is None:
        raise NotFoundError(f"you have no function {digest.hex()} here: register it first")
    return bytes(code)


def note_events(database: Database, who: Who, id: bytes, events: Sequence[tuple[bytes, str, float]]) -> None:
    """Write down what an endpoint tells of tasks: (task id, state, Unix seconds) each.

    Raises:
        NotFoundError: this user has no such endpoint here.
    """
    now = time.time()

    def work(session: Session) -> None:
        party = session.get(Party, id)
        if party is None or party.user_id != who.user_id or party.kind != "endpoint" or party.expired:
            raise NotFoundError(f"no endpoint {ids.text(id)} of yours is registered: register it (again)")
        rows = [
            {"task": task, "party_id": id, "state": state, "at": at, "noted": now}
            for task, state, at in events
        ]
        if rows:
            session.execute(sa.insert(TaskEvent), rows)

    database.write(work)


def events_of(database: Database, who: Who, task: bytes) -> list[dict[str, Any]]:
    """What has been told of a task by endpoints that this user may use, oldest first."""
    query = (
        sa.select(TaskEvent.party_id, User.name, Party.name, TaskEvent.state, TaskEvent.at)
        .join(Party, Party.id == TaskEvent.party_id)
        .join(User, User.id == Party.user_id)
        .where(TaskEvent.task == task, sharing.may_use(who))
        .order_by(TaskEvent.at, TaskEvent.id)
        .limit(EVENTS_SHOWN)
    )
    return database.read(
        lambda session: [
            {"endpoint": ids.text(party), "name": f"{owner}/{name}", "state": state, "at": at}
            for party, owner, name, state, at in session.execute(query)
        ]
    )


def prune(database: Database, kept_s: float = EVENTS_KEPT_S, per_endpoint: int = EVENTS_PER_ENDPOINT) -> int:
    """Drop events that are too old, and each endpoint's oldest where it has too many.

    Returns:
        How many went.
    """
    too_old = TaskEvent.noted < time.time() - kept_s

    def look(session: Session) -> tuple[bool, list[bytes]]:
        crowded = (
            sa.select(TaskEvent.party_id).group_by(TaskEvent.party_id).having(sa.func.count() > per_endpoint)
        )
        return session.scalar(sa.select(TaskEvent.id).where(too_old).limit(1)) is not None, list(
            session.scalars(crowded)
        )

    old, crowded = database.read(look)

    def work(session: Session) -> int:
        gone = len(session.execute(sa.delete(TaskEvent).where(too_old).returning(TaskEvent.id)).all())
        for party in crowded:
            theirs = TaskEvent.party_id == party
            last = session.scalar(
                sa.select(TaskEvent.id)
                .where(theirs)
                .order_by(TaskEvent.id.desc())
                .offset(per_endpoint)
                .limit(1)
            )
            if last is not None:
                doomed = sa.delete(TaskEvent).where(theirs, TaskEvent.id <= last).returning(TaskEvent.id)
                gone += len(session.execute(doomed).all())
        return gone

    return database.write(work) if old or crowded else 0


def _mine(who: Who, digest: bytes, column: Any) -> sa.Select[Any]:
    return sa.select(column).where(Function.user_id == who.user_id, Function.digest == digest)
