"""A worker that dies after its task has returned a future: what it was about to submit is not waited for, at any site."""

from __future__ import annotations

from typing import Any

import pytest

from gcref.brains import resolver_events as ev
from gcref.brains.graph import ORPHAN_S
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED
from gcref.objects.ref import read_token
from gcref.wire import messages as m
from tests.unit.brains.recovering import reloaded

ME, THERE, CAROL, INSIDE = b"me" * 8, b"there..." * 2, b"carol..." * 2, b"inside.." * 2
OUTER, INNER, OTHER = b"o" * 16, b"i" * 16, b"x" * 16
SECRET = b"s" * 32
CLIENT = ev.Who(CAROL, "user", b"k" * 40, "client")
WORKER = ev.Who(INSIDE, "worker", b"k" * 40, "client")
AGENT = ev.Who(ME, "peer", b"q" * 40, "endpoint")
LONG_S = 600.0


def submitted(who: ev.Who, id: bytes, home: bytes = ME, now: float = 0.0) -> ev.Submitted:
    return ev.Submitted(
        who, home, b"g" * 16, SECRET, {}, [], [[id, -1, b"payload", None, None, None]], now, 0.0
    )


def resolver(me: bytes = ME) -> Resolver:
    return Resolver(me, unknown_object_s=LONG_S, lease_s=LONG_S)


def ref(id: bytes, home: bytes) -> bytes:
    return id + home + read_token(SECRET, id)


def finish(
    site: Resolver, id: bytes, worker: str, status: int, value: bytes, refs: bytes | None = None
) -> Any:
    site.objects[id].state = DISPATCHED
    return site.handle(ev.Finished(worker, [[1, id, 1, status, value, 0.0, 0.1, refs, None]]))


def returned_a_future(home: bytes = ME, *, inside: bool = False) -> Resolver:
    """The outer task has returned the future of the inner one, or a value with it inside, and has not submitted it."""
    site = resolver()
    site.handle(submitted(CLIENT, OUTER))
    if inside:
        finish(site, OUTER, "polaris/3", m.OK, b"a list with a future", ref(INNER, home))
    else:
        finish(site, OUTER, "polaris/3", m.ALIAS, ref(INNER, home))
    return site


def told(instructions: list[Any], party: bytes = CAROL) -> list[Any]:
    return [
        item
        for each in instructions
        if isinstance(each, ev.Notify) and each.party == party
        for item in each.items
    ]


def asked(instructions: list[Any]) -> list[Any]:
    return [item for each in instructions if isinstance(each, ev.Subscribe) for item in each.items]


def is_worker_lost(item: list[Any]) -> bool:
    return (
        item[1] == m.FAILED
        and item[2][0] == "WorkerLostError"
        and "before this one was submitted" in item[2][1]
    )


def test_the_future_ends_with_its_worker_and_not_in_ten_minutes() -> None:
    site = returned_a_future()
    site.handle(ev.PartyGone(INSIDE, 100.0, "polaris/3"))
    assert site.deadline == 100.0 + ORPHAN_S
    (item,) = told(site.handle(ev.Tick(100.0 + ORPHAN_S)))
    assert item[0] == OUTER
    assert is_worker_lost(item)


def test_a_future_inside_a_value_ends_too() -> None:
    site = returned_a_future(inside=True)
    site.handle(ev.Subscribed(CLIENT, ME, [[INNER, ref(INNER, ME)[32:], None, False]], 0.0))
    site.handle(ev.PartyGone(INSIDE, 0.0, "polaris/3"))
    (item,) = told(site.handle(ev.Tick(ORPHAN_S)))
    assert item[0] == INNER
    assert is_worker_lost(item)


def test_a_submit_that_was_on_its_way_still_counts() -> None:
    site = returned_a_future()
    site.handle(ev.PartyGone(INSIDE, 0.0, "polaris/3"))
    site.handle(submitted(WORKER, INNER))
    assert told(site.handle(ev.Tick(ORPHAN_S))) == []
    assert [OUTER, m.OK] in [item[:2] for item in told(finish(site, INNER, "polaris/4", m.OK, b"value"))]


@pytest.mark.parametrize("home", [ME, THERE])
def test_the_death_of_another_worker_hurries_nothing(home: bytes) -> None:
    site = returned_a_future(home)
    assert asked(site.handle(ev.PartyGone(b"another." * 2, 0.0, "polaris/4"))) == []
    assert home == THERE or site.deadline == LONG_S


def test_only_the_worker_that_was_to_submit_it_counts_not_those_whose_results_follow_it() -> None:
    site = returned_a_future()
    site.handle(submitted(CLIENT, OTHER))
    finish(site, OTHER, "polaris/5", m.ALIAS, ref(OUTER, ME))
    site.handle(ev.PartyGone(b"another." * 2, 0.0, "polaris/5"))
    assert site.deadline == LONG_S


def test_orphans_end_in_their_order_and_before_what_may_still_come() -> None:
    site = returned_a_future()
    site.handle(ev.Subscribed(CLIENT, ME, [[OTHER, None, None, False]], 0.0))
    site.handle(submitted(CLIENT, b"p" * 16))
    finish(site, b"p" * 16, "polaris/7", m.ALIAS, ref(b"q" * 16, ME))
    site.handle(ev.PartyGone(INSIDE, 10.0, "polaris/3"))
    site.handle(ev.PartyGone(b"another." * 2, 10.5, "polaris/7"))
    assert [item[0] for item in told(site.handle(ev.Tick(10.0 + ORPHAN_S)))] == [OUTER]
    assert [item[0] for item in told(site.handle(ev.Tick(10.5 + ORPHAN_S)))] == [b"p" * 16]
    assert site.deadline == LONG_S


# ------------------------------------------------------------------------------------------- of another home


def test_the_home_of_the_inner_task_is_told_and_gives_it_up() -> None:
    site, home = returned_a_future(THERE), resolver(THERE)
    (first,) = asked(site.handle(ev.PartyGone(INSIDE, 100.0, "polaris/3")))
    assert first[0] == INNER
    assert first[4:] == [True]
    home.handle(ev.Subscribed(AGENT, THERE, [[INNER, ref(INNER, THERE)[32:], None, False]], 50.0))
    home.handle(ev.Subscribed(CLIENT, THERE, [[INNER, ref(INNER, THERE)[32:], None, False]], 60.0))
    home.handle(ev.Subscribed(AGENT, THERE, [first], 100.0))
    home.handle(ev.Subscribed(AGENT, THERE, [first], 100.9))  # said once more: that gives it no more time
    assert home.deadline == 100.0 + ORPHAN_S
    out = home.handle(ev.Tick(100.0 + ORPHAN_S))
    for party in (CAROL, ME):
        (item,) = told(out, party)
        assert is_worker_lost(item)
        assert site.handle(ev.Outcomes(THERE, [item], "direct")) is not None
    site.validate()


def test_a_home_that_has_the_task_goes_on_with_it() -> None:
    home = resolver(THERE)
    home.handle(submitted(AGENT, INNER, THERE))
    home.handle(ev.Subscribed(AGENT, THERE, [[INNER, ref(INNER, THERE)[32:], None, False, True]], 1.0))
    assert home.deadline is None
    assert [INNER, m.OK] in [item[:2] for item in told(finish(home, INNER, "midway/1", m.OK, b"v"), ME)]


def test_a_task_that_was_sent_on_is_not_an_orphan() -> None:
    site = returned_a_future(THERE)
    site.handle(submitted(WORKER, INNER, THERE))
    assert asked(site.handle(ev.PartyGone(INSIDE, 0.0, "polaris/3"))) == []


def test_the_submit_that_comes_late_is_still_sent_on_in_time() -> None:
    site, home = returned_a_future(THERE), resolver(THERE)
    home.handle(ev.Subscribed(AGENT, THERE, asked(site.handle(ev.PartyGone(INSIDE, 0.0, "polaris/3"))), 0.0))
    (relay,) = [each for each in site.handle(submitted(WORKER, INNER, THERE)) if isinstance(each, ev.Relay)]
    assert relay.message[6] == submitted(WORKER, INNER, THERE).tasks
    home.handle(submitted(AGENT, INNER, THERE, 0.5))
    home.handle(ev.Tick(ORPHAN_S))
    assert [INNER, m.OK] in [item[:2] for item in told(finish(home, INNER, "midway/1", m.OK, b"v"), ME)]


def test_what_somebody_else_named_first_is_nobodys_promise() -> None:
    site = resolver()
    site.handle(
        ev.Submitted(
            CLIENT,
            ME,
            b"g" * 16,
            SECRET,
            {},
            [],
            [[OUTER, -1, b"p", None, ref(INNER, THERE), None]],
            0.0,
            0.0,
        )
    )
    finish(site, OUTER, "polaris/3", m.ALIAS, ref(INNER, THERE))  # it returns what it was given
    assert asked(site.handle(ev.PartyGone(INSIDE, 0.0, "polaris/3"))) == []


@pytest.mark.parametrize("home", [ME, THERE])
def test_an_agent_that_comes_back_waits_for_the_workers_that_live(home: bytes) -> None:
    site = reloaded(returned_a_future(home))
    out = site.handle(ev.Recovered({}, {}, ["polaris/3"], 5.0))
    assert [item[4:] for item in asked(out)] == [[]] * (home == THERE)
    assert home == THERE or site.deadline == LONG_S


@pytest.mark.parametrize("home", [ME, THERE])
@pytest.mark.parametrize("when", ["before the death", "after the death"])
def test_an_agent_that_comes_back_knows_its_orphans(home: bytes, when: str) -> None:
    site = returned_a_future(home)
    if when == "after the death":
        site.handle(ev.PartyGone(INSIDE, 5.0, "polaris/3"))
    site = reloaded(site)
    out = site.handle(ev.Recovered({}, {}, ["polaris/2"], 5.0))
    if home == THERE:
        assert [item[4:] for item in asked(out)] == [[True]]
    else:
        (item,) = told(site.handle(ev.Tick(5.0 + ORPHAN_S)))
        assert is_worker_lost(item)


@pytest.mark.parametrize("why", ["orphaned", "cancelled", "not in time"])
@pytest.mark.parametrize("what", ["task", "put"])
def test_who_submits_what_was_given_up_already_hears_of_that(why: str, what: str) -> None:
    home = resolver(THERE)
    token = ref(INNER, THERE)[32:]
    home.handle(ev.Subscribed(CLIENT, THERE, [[INNER, token, None, False, why == "orphaned"]], 0.0))
    if why == "cancelled":
        home.handle(ev.Cancelled([home.objects[INNER]]))  # type: ignore[list-item]
    else:
        home.handle(ev.Tick(LONG_S))
    status = {"orphaned": m.FAILED, "cancelled": m.CANCELLED_STATUS, "not in time": m.LOST}[why]
    if what == "task":
        out = home.handle(submitted(AGENT, INNER, THERE, LONG_S))
    else:
        out = home.handle(ev.Offered(AGENT, THERE, b"g" * 16, SECRET, [[INNER, 5, b"value"]], LONG_S))
    assert [item[:2] for item in told(out, ME)] == [[INNER, status]]
    assert not [each for each in out if isinstance(each, ev.Runnable | ev.Pull)]
    home.handle(ev.Unsubscribed(CLIENT, [INNER]))
    assert INNER in home.objects
    home.handle(ev.Unsubscribed(AGENT, [INNER]))
    assert home.objects == {}
    out = home.handle(submitted(AGENT, INNER, THERE, LONG_S))
    assert [item[:2] for item in told(out, ME)] == [[INNER, m.LOST]], "it stays given up"
    assert not [each for each in out if isinstance(each, ev.Runnable)]
