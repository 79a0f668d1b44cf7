"""The graph written down and read back: equal, and equal from there on."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcref.brains import resolver_events as ev
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, READY, Task
from gcref.objects import failure as failures
from gcref.wire import messages as m
from tests.support.timing import cpu_seconds
from tests.unit.brains.recovering import LastingWorld, canonical, reloaded, through_msgpack
from tests.unit.brains.sites import CLIENT, GROUP, SECRET, USER, object_id, ref_to

HERE = b"H" * 16
THERE = b"T" * 16
FN = b"f" * 16


def resolver() -> Resolver:
    return Resolver(HERE, unknown_object_s=600, lease_s=86400)


def filled() -> Resolver:
    """A resolver with one of everything that is rare."""
    r = resolver()
    worker = ev.Who(b"w" * 16, "worker", b"k" * 40, "client")
    peer = ev.Who(b"z" * 16, "peer", b"q" * 40, "endpoint")

    def submit(*tasks: list[object], home: bytes = HERE, who: ev.Who = USER, **opts: object) -> None:
        r.handle(ev.Submitted(who, home, GROUP, SECRET, opts, [FN], list(tasks), 5.0, 1000.0))

    def finish(number: int, status: int, value: object, refs: bytes | None = None) -> None:
        r.replay(ev.Finished("w", [[1, object_id(number), 1, status, value, 1.0, 0.5, refs, None]]))

    here = [ref_to(object_id(n), HERE) for n in range(100)]
    there = [ref_to(object_id(n), THERE) for n in range(100)]
    submit([object_id(0), 0, b"waits for its function", None, None, None], retries=2, walltime_s=1.5)
    submit([object_id(1), -1, b"p", here[0] + there[50], there[51], None])
    submit([object_id(2), -1, None, None, None, [b"u" * 16, 1 << 20]])
    submit([object_id(3), -1, b"p", None, None, None], retries=1)
    submit([object_id(4), -1, b"p", here[3], here[60], None], retries=1)
    finish(3, m.STORED, ["/p", 1 << 20])
    finish(4, m.STORED, ["/q", 1 << 20])  # keeps its argument
    submit([object_id(5), -1, b"p", None, None, None])
    finish(5, m.OK, b"holds a reference", there[52])  # until its pin is confirmed
    submit([object_id(6), -1, b"p", None, None, None], [object_id(7), -1, b"p", None, None, None])
    finish(6, m.ALIAS, there[53])
    finish(7, m.ALIAS, here[1])
    submit(
        [object_id(20), -1, b"p", None, None, None],
        [object_id(21), 0, b"p", None, None, None],
        home=THERE,
        who=worker,
    )
    submit([object_id(22), -1, None, None, None, [b"U" * 16, 1 << 20]], home=THERE, who=worker)
    r.handle(ev.Offered(worker, THERE, GROUP, SECRET, [[object_id(23), 1 << 20, None]], 5.0))
    r.handle(ev.Outcomes(THERE, [[object_id(50), m.STORED, 1 << 20, 1, None]], "direct"))
    r.handle(ev.Outcomes(THERE, [[object_id(51), m.OK, b"small", 1, None]], "direct"))
    r.handle(ev.Subscribed(peer, HERE, [[object_id(70), b"x" * 16, None, True]], 6.0))
    r.handle(ev.Subscribed(peer, HERE, [[object_id(3), here[3][32:], None, True]], 6.0))
    r.handle(ev.Unsubscribed(peer, [object_id(3)]))  # it keeps a copy
    r.handle(ev.Reclaimed(peer, [object_id(3)], True))
    submit([object_id(8), -1, b"p", None, None, None])
    finish(8, m.OK, b"v")
    r.handle(ev.Unsubscribed(USER, [object_id(8)]))  # a tombstone
    submit([object_id(9), -1, b"p", here[8], None, None])  # fails by it, and holds what is in no table
    submit([object_id(10), -1, b"p", here[8] + here[0], None, None])
    submit([object_id(11), -1, b"p", None, None, None], retries=3)
    task = r.objects[object_id(11)]
    assert isinstance(task, Task)
    r.handle(ev.Ended([task], failures.make("WorkerLostError", "killed"), True))
    submit([object_id(12), -1, b"p", None, None, None])
    r.replay(ev.Finished("gone", [[1, object_id(12), 1, m.ALIAS, there[54], 1.0, 0.5, None, None]]))
    r.handle(ev.PartyGone(b"v" * 16, 6.0))
    r.handle(ev.Subscribed(peer, HERE, [[object_id(72), here[72][32:], None, False]], 6.0))
    r.handle(ev.Offered(USER, HERE, GROUP, SECRET, [[object_id(72), 1 << 20, None]], 6.0))
    r.handle(ev.Subscribed(peer, HERE, [[object_id(71), b"x" * 16, None, False]], 6.0))
    r.validate()
    return r


def test_one_of_everything_is_the_same_after_a_dump() -> None:
    old = filled()
    new = reloaded(old)
    assert canonical(new) == canonical(old)
    assert [through_msgpack(row) for row in reloaded(new).dump()] == [
        through_msgpack(row) for row in new.dump()
    ]
    assert new.wanted_bytes() == old.wanted_bytes()
    assert new.parties() == old.parties() == {CLIENT, b"w" * 16, b"z" * 16}


@pytest.mark.parametrize("seed", range(20))
def test_the_same_events_give_the_same_instructions_after_a_dump(seed: int) -> None:
    old = filled()
    new = reloaded(old)
    peer = ev.Who(b"z" * 16, "peer", b"q" * 40, "endpoint")
    events = [
        ev.FunctionsKnown([FN]),
        ev.Outcomes(THERE, [[object_id(52), m.PENDING, None, 0, None]], "direct"),
        ev.Outcomes(THERE, [[object_id(53), m.STORED, 7, 1, None]], "direct"),
        ev.Outcomes(THERE, [[object_id(20), m.OK, b"v", 1, None]], "direct"),
        ev.Pulled([(object_id(50), 1, {"direct": 1 << 20}, None), (b"u" * 16, 1, {"ipc": 0}, None)]),
        ev.Pulled([(b"U" * 16, 1, {"ipc": 0}, None), (object_id(23), 1, {"ipc": 0}, None)]),
        ev.Reclaimed(peer, [object_id(70)], False),
        ev.Finished("w", [[1, object_id(0), 1, m.OK, b"v", 1.0, 0.5, None, None]]),
        ev.Finished(
            "w", [[1, object_id(11), 2, m.FAILED, failures.make("raised", "x"), 1.0, 0.5, None, None]]
        ),
        ev.BytesLost([(object_id(3), "corrupt"), (object_id(4), "bytes_lost")]),
        ev.HomeRestarted(THERE),
        ev.Submitted(
            USER, HERE, GROUP, SECRET, {}, [], [[object_id(70), -1, b"p", None, None, None]], 9.0, 9.0
        ),
        ev.Unsubscribed(USER, [object_id(n) for n in range(12)]),
        ev.PartyGone(b"w" * 16, 9.0),
        ev.Tick(10_000.0),
    ]
    random.Random(seed).shuffle(events)
    for event in events:
        for r in (old, new):
            if isinstance(event, ev.Finished):
                sent = r.objects.get(event.results[0][1])
                if isinstance(sent, Task) and sent.state == READY:
                    sent.state = DISPATCHED
        told = [_told(r.handle(event)) for r in (old, new)]
        assert told[0] == told[1], event
        old.validate()
        new.validate()
        assert canonical(old) == canonical(new), event


def _told(instructions: list[ev.Instruction]) -> list[object]:
    """Instructions with ids in the place of objects; the order of parties in a set does not count."""
    told: list[object] = []
    for each in instructions:
        if isinstance(each, ev.Runnable | ev.Withdraw):
            told.append((type(each).__name__, [task.id for task in each.tasks]))
        elif isinstance(each, ev.Pull):
            told.append(("Pull", each.obj.id, each.source))
        else:
            told.append(each)
    return sorted(told, key=repr)


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=True), st.integers(1, 3))
def test_a_world_does_not_notice_that_its_graphs_are_reloaded(dice: random.Random, sites: int) -> None:
    world = LastingWorld(dice, sites, retries=dice.choice((0, 2)))
    ids = []
    for _ in range(dice.randint(1, 20)):
        ids.append(world.submit())
        for _ in range(dice.randint(0, 6)):
            world.step()
            if dice.random() < 0.2:
                dice.choice(list(world.sites.values())).reload()
    while world.step():
        if dice.random() < 0.1:
            dice.choice(list(world.sites.values())).reload()
    for id in world.fate:
        status, value = world.outcome[id]
        wanted, wanted_value = world.expected(id)
        assert (status in (m.OK, m.STORED)) == (wanted == m.OK), (id, status, value)
        assert wanted != m.OK or value == wanted_value
    assert all(runs == 1 for site in world.sites.values() for runs in site.runs.values())


def test_rows_of_another_endpoint_or_version_are_refused() -> None:
    rows = [through_msgpack(row) for row in filled().dump()]
    other = Resolver(THERE, unknown_object_s=600, lease_s=86400)
    with pytest.raises(ValueError, match="this endpoint"):
        other.load(rows, 1.0)
    rows[0][1] = 99
    with pytest.raises(ValueError, match="version"):
        resolver().load(rows, 1.0)
    with pytest.raises(ValueError, match="version"):
        resolver().load([], 1.0)


def test_r8_a_large_graph_is_dumped_and_loaded_in_linear_time() -> None:
    def cost(n: int) -> float:
        r = resolver()
        chain = [
            [object_id(i), -1, b"p", ref_to(object_id(i - 1), HERE) if i else None, None, None]
            for i in range(n)
        ]
        fan = [[object_id(n + i), -1, b"p", ref_to(object_id(0), HERE), None, None] for i in range(n)]
        r.handle(ev.Submitted(USER, HERE, GROUP, SECRET, {}, [], [*chain, *fan], 1.0, 1.0))
        with cpu_seconds() as elapsed:
            twin = resolver()
            twin.load(r.dump(), 1.0)
            took = elapsed()
        assert len(twin.objects) == 2 * n
        return took

    small = min(cost(1000) for _ in range(3))
    assert min(cost(10_000) for _ in range(2)) < 30 * small, (
        "ten times the tasks, far from a hundred times the time"
    )
