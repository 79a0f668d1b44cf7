"""Objects that somebody asked for and nobody has submitted: they come late, or are given up once and for all."""

from __future__ import annotations

from typing import Any

import pytest

from gcref.brains import resolver_events as ev
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED
from gcref.objects.ref import read_token
from gcref.wire import messages as m

HOME, CAROL, OTHER = b"home" * 4, b"carol..." * 2, b"other..." * 2
OUTER, INNER = b"o" * 16, b"i" * 16
SECRET = b"s" * 32
TOKEN = read_token(SECRET, INNER)
CLIENT = ev.Who(CAROL, "user", b"k" * 40, "client")
AGENT = ev.Who(OTHER, "peer", b"q" * 40, "endpoint")
LONG_S = 600.0


def submitted(who: ev.Who, id: bytes, now: float = 0.0) -> ev.Submitted:
    return ev.Submitted(
        who, HOME, b"g" * 16, SECRET, {}, [], [[id, -1, b"payload", None, None, None]], now, 0.0
    )


def resolver() -> Resolver:
    return Resolver(HOME, unknown_object_s=LONG_S, lease_s=LONG_S)


def finish(home: Resolver, id: bytes, status: int, value: bytes) -> list[Any]:
    home.objects[id].state = DISPATCHED
    return home.handle(ev.Finished("polaris/3", [[1, id, 1, status, value, 0.0, 0.1, None, None]]))


def told(instructions: list[Any], party: bytes = CAROL) -> list[Any]:
    return [
        item
        for each in instructions
        if isinstance(each, ev.Notify) and each.party == party
        for item in each.items
    ]


def test_a_result_may_name_what_is_submitted_later() -> None:
    home = resolver()
    home.handle(submitted(CLIENT, OUTER))
    assert told(finish(home, OUTER, m.ALIAS, INNER + HOME + TOKEN)) == []
    home.handle(submitted(CLIENT, INNER, LONG_S - 1))
    assert told(home.handle(ev.Tick(LONG_S))) == []
    assert [OUTER, m.OK] in [item[:2] for item in told(finish(home, INNER, m.OK, b"value"))]


@pytest.mark.parametrize("why", ["cancelled", "not in time"])
@pytest.mark.parametrize("what", ["task", "put"])
def test_who_submits_what_was_given_up_already_hears_of_that(why: str, what: str) -> None:
    home = resolver()
    home.handle(ev.Subscribed(CLIENT, HOME, [[INNER, TOKEN, None, False]], 0.0))
    if why == "cancelled":
        home.handle(ev.Cancelled([home.objects[INNER]]))  # type: ignore[list-item]
    else:
        home.handle(ev.Tick(LONG_S))
    status = {"cancelled": m.CANCELLED_STATUS, "not in time": m.LOST}[why]
    if what == "task":
        out = home.handle(submitted(AGENT, INNER, LONG_S))
    else:
        out = home.handle(ev.Offered(AGENT, HOME, b"g" * 16, SECRET, [[INNER, 5, b"value"]], LONG_S))
    assert [item[:2] for item in told(out, OTHER)] == [[INNER, status]]
    assert not [each for each in out if isinstance(each, ev.Runnable | ev.Pull)]
    home.handle(ev.Unsubscribed(CLIENT, [INNER]))
    assert INNER in home.objects
    home.handle(ev.Unsubscribed(AGENT, [INNER]))
    assert home.objects == {}
    out = home.handle(submitted(AGENT, INNER, LONG_S))
    assert [item[:2] for item in told(out, OTHER)] == [[INNER, m.LOST]], "it stays given up"
    assert not [each for each in out if isinstance(each, ev.Runnable)]
