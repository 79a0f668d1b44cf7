"""Who only asks, and is forgotten when it goes."""

from __future__ import annotations

from endpoint_worker.agent.guests import Guests
from gcref.wire import messages as m

ASK, SUBMIT = [m.STATUS, 1], [m.SUBMIT]


def test_who_only_asks_is_forgotten() -> None:
    guests = Guests()
    assert guests.only_asks(b"a", [ASK, [m.EXPLAIN, 1, b""]])
    assert guests.is_gone(b"a")
    assert not guests.is_gone(b"a")


def test_who_wants_anything_else_is_none() -> None:
    guests = Guests()
    assert guests.only_asks(b"a", [ASK])
    assert not guests.only_asks(b"a", [ASK, SUBMIT])
    assert not guests.only_asks(b"a", [ASK]), "once is for ever"
    assert not guests.is_gone(b"a")
    guests.forget(b"a")
    assert guests.only_asks(b"a", [ASK])


def test_a_party_that_is_not_known_is_none() -> None:
    assert not Guests().is_gone(b"a")
