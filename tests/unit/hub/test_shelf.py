from __future__ import annotations

from hashlib import blake2b

import pytest
import sqlalchemy as sa

from gcref import ids
from gcref.errors import NotFoundError, RejectedError
from gcref.hub import sharing, shelf
from gcref.hub.database import Database, TaskEvent
from gcref.hub.who import Who
from gcref.objects.functions import FunctionCache
from tests.unit.hub.people import party


def digest_of(code: bytes) -> bytes:
    return blake2b(code, digest_size=16).digest()


def test_a_function_is_kept_under_the_digest_that_executors_give_it(database: Database, alice: Who) -> None:
    found = FunctionCache().get(digest_of)
    assert found is not None
    shelf.put_function(database, alice, *found)
    shelf.put_function(database, alice, *found)
    assert shelf.get_function(database, alice, found[0]) == found[1]


def test_a_function_of_somebody_else_is_not_found(database: Database, alice: Who, bob: Who) -> None:
    shelf.put_function(database, alice, digest_of(b"code"), b"code")
    with pytest.raises(NotFoundError):
        shelf.get_function(database, bob, digest_of(b"code"))
    shelf.put_function(database, bob, digest_of(b"code"), b"code")
    assert shelf.get_function(database, bob, digest_of(b"code")) == b"code"


def test_functions_are_checked_and_bounded(
    database: Database, alice: Who, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RejectedError, match="not those of"):
        shelf.put_function(database, alice, digest_of(b"other"), b"code")
    large = b"x" * (shelf.MAX_FUNCTION_BYTES + 1)
    with pytest.raises(RejectedError, match="at most"):
        shelf.put_function(database, alice, digest_of(large), large)
    monkeypatch.setattr(shelf, "FUNCTIONS_BYTES_PER_USER", 7)
    shelf.put_function(database, alice, digest_of(b"1234"), b"1234")
    with pytest.raises(RejectedError, match="would take more"):
        shelf.put_function(database, alice, digest_of(b"5678"), b"5678")


def test_events_of_a_task_are_seen_by_who_may_use_the_endpoint(
    database: Database, alice: Who, bob: Who
) -> None:
    site, task = party(database, alice, "endpoint", "site", 1), ids.new_id()
    shelf.note_events(
        database, alice, site, [(task, "done", 20.0), (task, "waiting", 10.0), (ids.new_id(), "done", 5.0)]
    )
    told = [
        {"endpoint": ids.text(site), "name": "alice/site", "state": "waiting", "at": 10.0},
        {"endpoint": ids.text(site), "name": "alice/site", "state": "done", "at": 20.0},
    ]
    assert shelf.events_of(database, alice, task) == told
    assert shelf.events_of(database, bob, task) == []
    sharing.share(database, alice, "site", "bob")
    assert shelf.events_of(database, bob, task) == told


def test_nobody_tells_of_tasks_in_the_name_of_anothers_endpoint(
    database: Database, alice: Who, bob: Who
) -> None:
    site = party(database, alice, "endpoint", "site", 1)
    laptop = party(database, bob, "client", "laptop", 2)
    for id in (site, laptop, ids.new_id()):
        with pytest.raises(NotFoundError):
            shelf.note_events(database, bob, id, [(ids.new_id(), "done", 1.0)])


def test_events_are_pruned_by_age_and_by_count(database: Database, alice: Who) -> None:
    one, two = (party(database, alice, "endpoint", name, seed) for seed, name in enumerate(("one", "two")))
    tasks = [ids.new_id() for _ in range(6)]
    shelf.note_events(database, alice, one, [(task, "done", 1.0) for task in tasks[:5]])
    shelf.note_events(database, alice, two, [(tasks[5], "done", 1.0)])
    assert shelf.prune(database) == 0
    assert shelf.prune(database, per_endpoint=3) == 2
    # The oldest went, and of the crowded endpoint only.
    assert [bool(shelf.events_of(database, alice, task)) for task in tasks] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    database.write(
        lambda session: session.execute(
            sa.update(TaskEvent)
            .where(TaskEvent.task == tasks[2])
            .values(noted=TaskEvent.noted - shelf.EVENTS_KEPT_S - 1)
        )
    )
    assert shelf.prune(database) == 1
    assert shelf.events_of(database, alice, tasks[2]) == []
