"""Fetches of large values: joined while they are under way, tried again after a failure, and turned to a later attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gcref.brains.submitter_table import Stored
from gcref.errors import EndpointLostError
from gcref.sdk.large_values import LargeValues

HOME = bytes(range(16))
OBJECT = b"an object of it."


class Loop:
    """Keeps what the I/O thread is to do."""

    def __init__(self) -> None:
        self.wishes: list[Callable[[], None]] = []
        self.told: list[Any] = []
        self.reaching = self
        self.hub = None

    def post(self, wish: Callable[[], None]) -> None:
        self.wishes.append(wish)

    def tell(self, event: Any) -> None:
        self.told.append(event)

    def ways_to(self, party: bytes) -> None:
        """Nobody has reached it yet."""
        return


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def values(loop: Loop) -> LargeValues:
    return LargeValues(loop, None, None, 60.0)  # type: ignore[arg-type]


def test_a_fetch_is_joined_and_after_a_failure_made_again(values: LargeValues, loop: Loop) -> None:
    stored = Stored(OBJECT, HOME, 1000, 1, None)
    pull = values.fetch(stored)
    assert values.fetch(stored) is pull
    assert len(loop.wishes) == 1
    loop.wishes.pop()()
    values.leave(HOME, lambda: EndpointLostError("it is gone"))
    with pytest.raises(EndpointLostError):
        pull.wait(0)
    assert not values.is_busy()
    assert values.fetch(stored) is not pull


def test_a_later_attempt_takes_the_place_of_one_that_was_not_fetched(values: LargeValues, loop: Loop) -> None:
    """Whoever waits for the old bytes hears how that ends; the next fetch is for the new ones."""
    stored = Stored(OBJECT, HOME, 1000, 1, None)
    old = values.fetch(stored)
    values.renew(stored, 2, 2000, None)
    values.renew(stored, 1, 1000, None)
    assert (stored.attempt, stored.size) == (2, 2000)
    new = values.fetch(stored)
    assert new is not old
    for wish in loop.wishes:
        wish()
    values.end_all(lambda: EndpointLostError("the end"))
    for pull in (old, new):
        with pytest.raises(EndpointLostError):
            pull.wait(0)
    assert not values.is_busy()


def test_a_later_attempt_may_be_small(values: LargeValues) -> None:
    stored = Stored(OBJECT, HOME, 1000, 1, None)
    values.renew(stored, 2, 5, b"small")
    assert bytes(values.fetch(stored).wait(0)) == b"small"
    assert not values.is_busy()
