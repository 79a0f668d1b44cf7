"""Who else there is, and whose keys may come in: files and hub together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

import pytest

from endpoint_worker.agent.neighbours import KeyRing, Neighbours
from endpoint_worker.agent.published import Published
from gcref.carriers import keys
from gcref.carriers.mail.post import address_of
from gcref.directory import pins, records
from gcref.directory.records import EndpointRecord

ADA, BOB, EVE = (keys.generate().public for _ in range(3))
MIDWAY: Final = b"m" * 16
EVERY: Final = frozenset(("ipc", "direct", "broker"))


def midway(**more: object) -> EndpointRecord:
    record = EndpointRecord(
        id=MIDWAY, name="midway", public_key=BOB.decode(), control=("tcp://m:1",), bulk=("tcp://m:2",), running=True
    )  # fmt: skip
    return dataclasses.replace(record, **more)  # type: ignore[arg-type]


@pytest.fixture
def listed(home: Path) -> Path:
    """The list of allowed keys."""
    home.mkdir()
    return home / "authorized_keys"


class Clock:
    now = 0.0

    def later(self) -> float:
        self.now += 2.0
        return self.now


def test_the_hub_adds_keys_and_takes_them_away_again(listed: Path, home: Path) -> None:
    ring, clock = KeyRing(listed, home), Clock()
    ring.set_from_hub({ADA: "user", BOB: "peer"})
    assert dict(ring) == {ADA: "user", BOB: "peer"}
    assert ring.revoked(clock.later()) == []
    ring.set_from_hub({BOB: "peer"})
    assert ring.revoked(clock.now) == [ADA], "at once, not with the next look at the files"
    assert ADA not in ring


def test_a_role_that_the_hub_changes_counts_as_revoked(listed: Path, home: Path) -> None:
    ring, clock = KeyRing(listed, home), Clock()
    ring.set_from_hub({ADA: "user"})
    ring.revoked(clock.later())
    ring.set_from_hub({ADA: "peer"})
    assert ring.revoked(clock.now) == [ADA]
    assert ring[ADA] == "peer"


def test_what_the_files_say_goes_before_what_the_hub_says(listed: Path, home: Path) -> None:
    listed.write_text(f"{ADA.decode()} peer\n")
    ring, clock = KeyRing(listed, home), Clock()
    ring.set_from_hub({ADA: "user"})
    assert ring[ADA] == "peer"
    ring.set_from_hub({})
    assert ring[ADA] == "peer"
    assert ring.revoked(clock.later()) == []


def test_a_list_that_is_being_edited_keeps_nobody_whom_the_hub_put_out(listed: Path, home: Path) -> None:
    listed.write_text(f"{BOB.decode()} user\n")
    ring, clock = KeyRing(listed, home), Clock()
    ring.set_from_hub({ADA: "user"})
    ring.revoked(clock.later())
    listed.write_text("half a li")
    ring.set_from_hub({})
    assert dict(ring) == {BOB: "user"}
    assert ring.revoked(clock.now) == [ADA]


def test_somebody_unknown_is_told_of(listed: Path, home: Path) -> None:
    listed.write_text(f"{BOB.decode()} user\n")
    ring = KeyRing(listed, home)
    asked: list[bool] = []
    ring.when_unknown = lambda: asked.append(True)
    assert ring.get(BOB) == "user"
    assert not asked
    assert ring.get(EVE) is None
    assert asked == [True]


def test_a_record_of_the_hub_is_as_good_as_one_here_and_its_owner_is_not(home: Path) -> None:
    others = Neighbours(home, EVERY)
    assert not others.find(MIDWAY)
    assert others.use(midway(mailbox=True)), "it is new"
    assert others.known(MIDWAY)
    assert not others.is_here(MIDWAY)
    assert others.ways(MIDWAY) == (
        [("direct", "tcp://m:1", BOB), ("broker", address_of(MIDWAY), BOB)],
        [("direct", "tcp://m:2", BOB), ("broker", address_of(MIDWAY), BOB)],
    )
    assert not others.use(midway(mailbox=True, pid=7)), "the same ways"
    assert others.use(midway())
    records.write(midway(), home)
    assert others.find(MIDWAY)
    assert others.is_here(MIDWAY)


def test_another_key_is_somebody_else(home: Path) -> None:
    others = Neighbours(home, EVERY)
    assert not others.is_somebody_else(MIDWAY, EVE), "nobody has met it yet"
    others.use(midway())
    assert others.is_somebody_else(MIDWAY, EVE)
    assert not others.is_somebody_else(MIDWAY, BOB)


@pytest.mark.parametrize("source", ["its record", "the first contact"])
def test_another_key_is_somebody_else_also_before_anything_was_to_be_said_to_it(
    home: Path, source: str
) -> None:
    others = Neighbours(home, EVERY)
    assert not others.is_proven(MIDWAY)
    if source == "its record":
        records.write(midway(), home)
    else:
        pins.check(MIDWAY, BOB, "midway", home)
    assert others.is_proven(MIDWAY)
    assert others.is_somebody_else(MIDWAY, EVE)
    assert not others.is_somebody_else(MIDWAY, BOB)
    assert not others.known(MIDWAY)


def test_a_trusted_new_key_counts_from_then_on(home: Path) -> None:
    others = Neighbours(home, EVERY)
    pins.check(MIDWAY, BOB, "midway", home)
    assert others.is_somebody_else(MIDWAY, EVE)
    pins.replace(MIDWAY, EVE, "midway", home)
    assert not others.is_somebody_else(MIDWAY, EVE)


def test_a_damaged_list_of_pins_locks_nobody_out(home: Path) -> None:
    others = Neighbours(home, EVERY)
    pins.check(MIDWAY, BOB, "midway", home)
    pins.path_of(home).write_text("what is this")
    assert not others.is_proven(MIDWAY)
    assert not others.is_somebody_else(MIDWAY, EVE)


def test_addresses_that_a_party_names_stand_beside_those_of_its_record(home: Path) -> None:
    others = Neighbours(home, EVERY)
    assert others.has_told(MIDWAY, BOB, ("tcp://m:1", "tcp://inside:1"), ("tcp://m:2",))
    assert not others.known(MIDWAY), "its record has not been looked for"
    others.use(midway(mailbox=True))
    assert others.ways(MIDWAY).control == [
        ("direct", "tcp://m:1", BOB), ("broker", address_of(MIDWAY), BOB), ("direct", "tcp://inside:1", BOB),
    ]  # fmt: skip
    assert not others.has_told(MIDWAY, BOB, ("tcp://m:1", "tcp://inside:1"), ("tcp://m:2",)), "no news"
    assert others.forget(MIDWAY)
    assert others.ways(MIDWAY) == ([], [])
    assert not others.forget(MIDWAY)


def test_who_may_not_dial_directly_does_not_dial_back(home: Path) -> None:
    others = Neighbours(home, frozenset(("broker",)))
    assert not others.has_told(MIDWAY, BOB, ("tcp://m:1",), ())
    assert others.ways(MIDWAY) == ([], [])


@pytest.mark.parametrize("ephemeral", [False, True])
def test_a_record_changes_while_its_endpoint_runs_and_not_after(home: Path, ephemeral: bool) -> None:
    published = Published(midway(ephemeral=ephemeral), home)
    published.change(mailbox=True)
    assert records.read("midway", home) == midway(ephemeral=ephemeral, mailbox=True) == published.record
    published.withdraw()
    published.change(mailbox=False)  # the hub's thread may be late
    found = records.read("midway", home)
    assert found == (None if ephemeral else midway(mailbox=True, running=False))
