"""A worker that dies right after a tail call: what it was about to submit is not waited for."""

from __future__ import annotations

from typing import Any

from gcref.brains import resolver_events as ev
from gcref.brains.graph import ORPHAN_S
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED
from gcref.wire import messages as m

ME, CAROL, INSIDE = b"me" * 8, b"carol..." * 2, b"inside.." * 2
OUTER, INNER = b"o" * 16, b"i" * 16
CLIENT = ev.Who(CAROL, "user", b"k" * 40, "client")
WORKER = ev.Who(INSIDE, "worker", b"k" * 40, "client")


def submitted(who: ev.Who, id: bytes, group: bytes) -> ev.Submitted:
    return ev.Submitted(who, ME, group, bytes(32), {}, [], [[id, -1, b"payload", None, None, None]], 0.0, 0.0)


def returned_a_future() -> Resolver:
    """The outer task has returned the future of the inner one, which has not been submitted."""
    resolver = Resolver(ME, unknown_object_s=600.0, lease_s=600.0)
    resolver.handle(submitted(CLIENT, OUTER, b"g" * 16))
    resolver.objects[OUTER].state = DISPATCHED
    row: list[Any] = [1, OUTER, 1, m.ALIAS, INNER + ME + bytes(16), 0.0, 0.1, None, None]
    resolver.handle(ev.Finished("polaris/3", [row]))
    return resolver


def told(instructions: list[Any]) -> list[Any]:
    return [item for each in instructions if isinstance(each, ev.Notify) for item in each.items]


def test_the_future_ends_with_its_worker_and_not_in_ten_minutes() -> None:
    resolver = returned_a_future()
    resolver.handle(ev.PartyGone(INSIDE, "polaris/3"))
    assert resolver.deadline == ORPHAN_S
    (item,) = told(resolver.handle(ev.Tick(ORPHAN_S)))
    assert item[0] == OUTER
    assert item[1] in (m.FAILED, m.LOST)
    assert "before it was submitted" in str(item[2])


def test_a_submit_that_was_on_its_way_still_counts() -> None:
    resolver = returned_a_future()
    resolver.handle(ev.PartyGone(INSIDE, "polaris/3"))
    resolver.handle(submitted(WORKER, INNER, b"h" * 16))
    assert told(resolver.handle(ev.Tick(ORPHAN_S))) == []
    resolver.objects[INNER].state = DISPATCHED
    row = [1, INNER, 1, m.OK, b"value", 0.0, 0.1, None, None]
    assert [OUTER, m.OK] in [item[:2] for item in told(resolver.handle(ev.Finished("polaris/4", [row])))]


def test_the_death_of_another_worker_hurries_nothing() -> None:
    resolver = returned_a_future()
    resolver.handle(ev.PartyGone(b"another." * 2, "polaris/4"))
    assert resolver.deadline == 600.0
