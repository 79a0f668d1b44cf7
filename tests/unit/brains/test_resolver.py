"""The resolver: transcripts of single sites, and random graphs over joined sites against sequential evaluation."""

from __future__ import annotations

import random
import struct
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcref.brains import recovery
from gcref.brains import resolver_events as ev
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, DONE, READY, WAITING, Task, is_task
from gcref.errors import LostReason
from gcref.objects import failure as failures
from gcref.wire import messages as m
from tests.support.timing import cpu_seconds
from tests.unit.brains.sites import CLIENT, GROUP, OWNER, SECRET, USER, World, object_id, ref_to, split

HERE = b"H" * 16
THERE = b"T" * 16


def resolver() -> Resolver:
    return Resolver(HERE, unknown_object_s=600, lease_s=86400)


def submit(
    r: Resolver,
    *tasks: list[object],
    opts: dict[str, object] | None = None,
    who: ev.Who = USER,
    home: bytes = HERE,
) -> list[ev.Instruction]:
    told = r.handle(ev.Submitted(who, home, GROUP, SECRET, opts or {}, [], list(tasks), 1.0, 1000.0))
    r.validate()
    return told


def task(number: int, *deps: bytes) -> list[object]:
    return [object_id(number), -1, b"payload", b"".join(deps) or None, None, None]


def local(number: int) -> bytes:
    return ref_to(object_id(number), HERE)


def finish(
    r: Resolver, number: int, status: int = m.OK, value: object = b"v", refs: bytes | None = None
) -> list[ev.Instruction]:
    found = r.objects[object_id(number)]
    assert isinstance(found, Task)
    found.state = DISPATCHED
    told = r.handle(ev.Finished("w", [[1, found.id, found.attempt, status, value, 1.0, 0.5, refs, None]]))
    r.validate()
    return told


def runnable(told: list[ev.Instruction]) -> list[bytes]:
    return [t.id for i in told if isinstance(i, ev.Runnable) for t in i.tasks]


def items(told: list[ev.Instruction]) -> dict[bytes, list[object]]:
    return {item[0]: item for i in told if isinstance(i, ev.Notify | ev.NotifyLater) for item in i.items}


def test_a_task_without_arguments_runs_and_tells_its_submitter() -> None:
    r = resolver()
    assert runnable(submit(r, task(1))) == [object_id(1)]
    told = finish(r, 1)
    assert told == [
        ev.Notify(CLIENT, [[object_id(1), m.OK, b"v", 1, [1000.0, 1.0, 1.5, "w", 1, None, None, None]]])
    ]


def test_r1_a_task_waits_for_its_argument() -> None:
    r = resolver()
    assert runnable(submit(r, task(1), task(2, local(1)))) == [object_id(1)]
    assert runnable(finish(r, 1)) == [object_id(2)]


def test_an_argument_of_another_home_is_subscribed_to_once() -> None:
    r = resolver()
    ref = ref_to(object_id(9), THERE)
    told = submit(r, task(1, ref), task(2, ref))
    assert [i for i in told if isinstance(i, ev.Subscribe)] == [
        ev.Subscribe(THERE, [[object_id(9), ref[32:], None, False]])
    ]
    told = r.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, 1 << 20, 1, None]], "direct"))
    pulls = [i for i in told if isinstance(i, ev.Pull)]
    assert [(p.obj.id, p.source) for p in pulls] == [(object_id(9), THERE)]
    assert runnable(r.handle(ev.Pulled([(object_id(9), 1, {"direct": 1 << 20}, None)]))) == [
        object_id(1),
        object_id(2),
    ]
    finish(r, 1)
    assert any(isinstance(i, ev.Unsubscribe) for i in finish(r, 2)), "the last user lets the home know"
    told = r.handle(ev.Forgotten(THERE, [object_id(9)]))
    assert told == [ev.Free([object_id(9)])]


def test_only_its_home_speaks_for_an_object() -> None:
    r = resolver()
    submit(r, task(1, ref_to(object_id(9), THERE)))
    assert r.handle(ev.Outcomes(b"X" * 16, [[object_id(9), m.OK, b"forged", 1, None]], "direct")) == []
    assert r.handle(ev.Forgotten(b"X" * 16, [object_id(9)])) == []


def test_e3_a_dependent_names_every_failed_argument() -> None:
    r = resolver()
    submit(r, *[task(n) for n in range(5)], task(9, *[local(n) for n in range(5)]))
    finish(r, 0)
    finish(r, 1, m.FAILED, failures.make("raised", "one"))
    assert not items(finish(r, 2)).get(object_id(9)), "it waits for the other arguments"
    finish(r, 3, m.FAILED, failures.make("raised", "three"))
    failed = items(finish(r, 4))[object_id(9)]
    assert failed[1] == m.FAILED
    failure = failed[2]
    assert isinstance(failure, list)
    assert failure[0] == "DependencyError"
    assert failure[4][1] == "one", "the cause is the first root failure"


def test_a_late_result_of_an_old_attempt_is_discarded() -> None:
    r = resolver()
    submit(r, task(1), opts={"retries": 1})
    found = r.objects[object_id(1)]
    assert isinstance(found, Task)
    found.state = DISPATCHED
    lost = failures.make("WorkerLostError", "gone")
    assert runnable(r.handle(ev.Ended([found], lost, True))) == [object_id(1)]
    found.state = DISPATCHED
    stale = [1, found.id, 1, m.STORED, ["/old", 9], 1.0, 0.1, None, None]
    assert r.handle(ev.Finished("w", [stale])) == [ev.Discard(["/old"])]
    assert items(r.handle(ev.Ended([found], lost, True)))[found.id][1] == m.FAILED, "one retry, two attempts"


def test_a_repeated_submit_changes_nothing_and_tells_again() -> None:
    r = resolver()
    submit(r, task(1))
    assert submit(r, task(1)) == []
    finish(r, 1)
    assert items(submit(r, task(1)))[object_id(1)][2] == b"v"


def test_l6_subscriptions_before_the_submit_after_the_release_and_to_nothing() -> None:
    r = resolver()
    r.handle(ev.Subscribed(USER, HERE, [[object_id(1), None, None, False]], 1.0))
    submit(r, task(1))
    assert items(finish(r, 1))[object_id(1)][1] == m.OK
    r.handle(ev.Unsubscribed(USER, [object_id(1)]))
    assert object_id(1) not in r.objects
    told = r.handle(ev.Subscribed(USER, HERE, [[object_id(1), None, None, False]], 1.0))
    assert items(told)[object_id(1)][1:3] == [m.LOST, ["released", "the object was released"]]
    r.handle(ev.Subscribed(USER, HERE, [[object_id(2), None, None, False]], 1.0))
    assert r.deadline == pytest.approx(601.0)
    assert items(r.handle(ev.Tick(602.0)))[object_id(2)][2][0] == "never_submitted"  # type: ignore[index]


def test_a_stranger_may_not_read_without_the_token() -> None:
    r = resolver()
    stranger = ev.Who(b"z" * 16, "peer", b"q" * 40, "endpoint")
    r.handle(ev.Subscribed(stranger, HERE, [[object_id(1), b"x" * 16, None, False]], 1.0))
    submit(r, task(1))
    finish(r, 1)
    assert stranger.party not in r.objects[object_id(1)].pins
    told = r.handle(ev.Subscribed(stranger, HERE, [[object_id(1), None, None, False]], 1.0))
    assert items(told)[object_id(1)][2][0] == "AuthError"  # type: ignore[index]
    told = r.handle(ev.Subscribed(stranger, HERE, [[object_id(1), local(1)[32:], None, False]], 1.0))
    assert items(told)[object_id(1)][1] == m.OK
    thief = ev.Who(b"t" * 16, "user", b"t" * 40, "client")
    told = submit(r, task(2, local(1)[:32] + bytes(16)), who=thief)
    assert items(told)[object_id(2)][1] == m.FAILED, "another user's object is no argument without its token"


def test_an_alias_ends_as_its_target_and_a_cycle_fails() -> None:
    r = resolver()
    submit(r, task(1), task(2), task(3, local(1)))
    finish(r, 1, m.ALIAS, local(2))
    told = finish(r, 2, m.OK, b"two")
    assert items(told)[object_id(1)][2] == b"two"
    assert runnable(told) == [object_id(3)]
    submit(r, task(4), task(5))
    finish(r, 4, m.ALIAS, local(5))
    told = finish(r, 5, m.ALIAS, local(4))
    assert items(told)[object_id(4)][1] == m.FAILED
    assert items(told)[object_id(5)][2][0] == "DeadlockError"  # type: ignore[index]


def test_who_waits_here_for_another_homes_alias_is_sent_on_or_told() -> None:
    worker = ev.Who(b"w" * 16, "worker", OWNER, "client")
    far = [ref_to(object_id(n), THERE) for n in range(10)]
    for early in (True, False):
        r = resolver()
        wait = ev.Subscribed(worker, THERE, [[object_id(1), far[1][32:], None, False]], 1.0)
        alias = ev.Outcomes(THERE, [[object_id(1), m.ALIAS, far[2], 1, None]], "direct")
        told = (
            [*r.handle(wait), *r.handle(alias)]
            if early
            else [*r.handle(alias), *r.handle(wait), *r.handle(alias)]
        )
        assert items(told)[object_id(1)][1:3] == [m.ALIAS, far[2]], (
            "an alias of what lives elsewhere: it follows"
        )
        r.handle(ev.Subscribed(worker, THERE, [[object_id(2), far[2][32:], None, False]], 1.0))
        told = r.handle(ev.Outcomes(THERE, [[object_id(2), m.STORED, 1 << 20, 1, None]], "direct"))
        assert [i.obj.id for i in told if isinstance(i, ev.Pull)] == [object_id(2)]
        told = r.handle(ev.Pulled([(object_id(2), 1, {"direct": 1 << 20}, None)]))
        assert items(told)[object_id(2)][1] == m.STORED
        r.validate()
    r = resolver()
    submit(r, task(3))
    r.handle(ev.Subscribed(worker, THERE, [[object_id(1), far[1][32:], None, False]], 1.0))
    assert not r.handle(ev.Outcomes(THERE, [[object_id(1), m.ALIAS, local(3), 1, None]], "direct"))
    assert items(finish(r, 3))[object_id(1)][2] == b"v", "an alias of what is made here: it is told the value"


@pytest.mark.parametrize("status", [m.OK, m.STORED, m.FAILED])
@pytest.mark.parametrize("pending", [False, True])
def test_a_relayed_task_goes_on_when_nobody_waits_for_it_any_more(status: int, pending: bool) -> None:
    r = resolver()
    worker = ev.Who(b"w" * 16, "worker", OWNER, "client")
    large = [object_id(2), -1, None, None, None, [b"u" * 16, 1 << 20]]
    submit(r, task(1), large, who=worker, home=THERE)
    told = r.handle(ev.Pulled([(b"u" * 16, 1, {"ipc": 1 << 20}, None)]))
    assert [type(i) for i in told] == [ev.Relay]
    assert r.handle(ev.PartyGone(worker.party, 2.0)) == []
    if pending:
        items_ = [[object_id(n), m.PENDING, None, 0, None] for n in (1, 2)]
        (let_go,) = r.handle(ev.Outcomes(THERE, items_, "direct"))
        assert let_go == ev.Unsubscribe(THERE, [object_id(1)]), "the other one's arguments are here still"
    value: Any = {m.OK: b"v", m.STORED: 1 << 20, m.FAILED: failures.make("TaskError", "no")}[status]
    told = r.handle(ev.Outcomes(THERE, [[object_id(n), status, value, 1, None] for n in (1, 2)], "direct"))
    gone = [id for i in told if isinstance(i, ev.Unsubscribe) for id in i.ids]
    assert sorted(gone) == [object_id(n) for n in ((2,) if pending else (1, 2))]
    r.validate()
    assert b"u" * 16 in [id for i in told if isinstance(i, ev.Free) for id in i.ids]
    assert all(each.state >= DONE for each in r.objects.values()), (
        "only small values stay, until their home says FORGET"
    )


@pytest.mark.parametrize("home", [HERE, THERE])
def test_what_a_vanished_party_was_to_upload_is_waited_for_no_longer(home: bytes) -> None:
    r = resolver()
    worker = ev.Who(b"w" * 16, "worker", OWNER, "client")
    upload = b"u" * 16
    submit(r, [object_id(1), -1, None, None, None, [upload, 1 << 20]], task(2), who=worker, home=home)
    put = ev.Offered(worker, home, GROUP, SECRET, [[object_id(3), 1 << 20, None]], 1.0)
    assert [type(i) for i in r.handle(put)] == [ev.Pull]
    asker = [[object_id(number), None, None, False] for number in (1, 3)]
    r.handle(ev.Subscribed(USER, home, asker, 1.0))
    told = r.handle(ev.PartyGone(worker.party, 2.0))
    r.validate()
    assert [i.id for i in told if isinstance(i, ev.CancelPull)] == [upload, object_id(3)]
    heard = items(told)
    assert heard[object_id(3)][1:3] == [m.LOST, [LostReason.HOME_LOST.value, ANY]]
    assert heard[object_id(1)][1] == (m.FAILED if home == HERE else m.LOST)
    assert "ended before they were fetched" in str(heard[object_id(1)][2])
    told = r.handle(ev.Pulled([(upload, 1, {"ipc": 1 << 20}, None)]))
    assert told == [ev.Free([upload])], "it came too late"
    r.handle(ev.Unsubscribed(USER, [object_id(1), object_id(3)]))
    if home == HERE:
        finish(r, 2)
    else:
        r.handle(ev.HomeLost(THERE, failures.make("EndpointLostError", "gone")))
    assert not r.objects


def test_a_reference_inside_a_result_is_pinned_before_it_is_told() -> None:
    r = resolver()
    submit(r, task(1))
    inner = ref_to(object_id(9), THERE)
    told = finish(r, 1, m.OK, b"holds a reference", inner)
    assert told == [ev.Subscribe(THERE, [[object_id(9), inner[32:], None, True]])]
    told = r.handle(ev.Outcomes(THERE, [[object_id(9), m.PENDING, None, 0, None]], "direct"))
    assert items(told)[object_id(1)][1] == m.OK
    told = r.handle(ev.Unsubscribed(USER, [object_id(1)]))
    assert ev.Unsubscribe(THERE, [object_id(9)]) in told, "the pin goes with the result that held it"


def test_a_reference_inside_a_put_is_pinned_before_it_is_told() -> None:
    r = resolver()
    inner = ref_to(object_id(9), THERE)
    head = struct.pack("<3sBB3xII", b"GCB", 1, 0, 1, 0)
    small = head + inner + b"stream"
    told = r.handle(ev.Offered(USER, HERE, GROUP, SECRET, [[object_id(1), len(small), small]], 1.0))
    assert told == [ev.Subscribe(THERE, [[object_id(9), inner[32:], None, True]])]
    told = r.handle(ev.Outcomes(THERE, [[object_id(9), m.PENDING, None, 0, None]], "direct"))
    assert items(told)[object_id(1)][1:3] == [m.OK, small]
    r.handle(ev.Offered(USER, HERE, GROUP, SECRET, [[object_id(2), 1 << 20, None]], 1.0))
    told = r.handle(ev.Pulled([(object_id(2), 1, {"ipc": 1 << 20}, inner)]))
    assert items(told)[object_id(2)][1:3] == [m.STORED, 1 << 20], "it is pinned already"
    r.handle(ev.Unsubscribed(USER, [object_id(1)]))
    r.validate()
    told = r.handle(ev.Unsubscribed(USER, [object_id(2)]))
    assert ev.Unsubscribe(THERE, [object_id(9)]) in told


def test_a_lost_home_ends_what_waited_for_it() -> None:
    r = resolver()
    submit(r, task(1, ref_to(object_id(9), THERE)))
    told = r.handle(ev.HomeLost(THERE, failures.make("EndpointLostError", "gone")))
    assert items(told)[object_id(1)][2][0] == "DependencyError"  # type: ignore[index]


def test_a_vanished_party_holds_nothing() -> None:
    r = resolver()
    submit(r, task(1))
    finish(r, 1)
    r.handle(ev.PartyGone(CLIENT, 2.0))
    assert not r.objects


def test_a_later_process_of_the_owner_takes_up_a_group() -> None:
    r = resolver()
    submit(r, task(1), task(2))
    finish(r, 1)
    later = ev.Who(b"d" * 16, "user", OWNER, "client")
    told = r.handle(ev.Attached(later, GROUP))
    assert told == [ev.Tasks(later.party, GROUP, SECRET, [[object_id(1), "done"], [object_id(2), "ready"]])]
    r.handle(ev.PartyGone(CLIENT, 2.0))
    wanted = [[object_id(number), None, None, False] for number in (1, 2)]
    told = r.handle(ev.Subscribed(later, HERE, wanted, 2.0))
    assert items(told)[object_id(1)][2] == b"v"
    told = finish(r, 2)
    assert items(told)[object_id(2)][2] == b"v"
    stranger = ev.Who(b"e" * 16, "user", b"z" * 40, "client")
    assert r.handle(ev.Attached(stranger, GROUP)) == [ev.Tasks(stranger.party, GROUP, b"", [])]


def test_a_group_is_there_as_long_as_one_of_its_tasks() -> None:
    """Also when its latest submitter has let go of its own."""
    r = resolver()
    submit(r, task(1))
    finish(r, 1)
    other = ev.Who(b"d" * 16, "user", OWNER, "client")
    submit(r, task(2), who=other)
    finish(r, 2)
    r.handle(ev.Unsubscribed(other, [object_id(2)]))
    later = ev.Who(b"e" * 16, "user", OWNER, "client")
    told = r.handle(ev.Attached(later, GROUP))
    assert told == [ev.Tasks(later.party, GROUP, SECRET, [[object_id(1), "done"]])]


@pytest.mark.parametrize("shape", ["arguments", "dependents", "chain"])
def test_r8_ten_thousand_edges_in_linear_time(shape: str) -> None:
    def cost(n: int) -> float:
        r = resolver()
        if shape == "arguments":
            tasks = [*[task(i) for i in range(n)], task(n, *[local(i) for i in range(n)])]
        elif shape == "dependents":
            tasks = [task(0), *[task(i, local(0)) for i in range(1, n)]]
        else:
            tasks = [task(0), *[task(i, local(i - 1)) for i in range(1, n)]]
        with cpu_seconds() as elapsed:
            told = r.handle(ev.Submitted(USER, HERE, GROUP, SECRET, {}, [], tasks, 1.0, 1.0))
            ran = 0
            while ready := [i for i in told if isinstance(i, ev.Runnable)]:
                told = []
                for made in ready:
                    for t in made.tasks:
                        t.state = DISPATCHED
                        ran += 1
                        told += r.handle(ev.Finished("w", [[1, t.id, 1, m.OK, b"v", 1.0, 0.1, None, None]]))
            assert ran == len(tasks)
            return elapsed()

    small = min(cost(1000) for _ in range(3))
    assert min(cost(10_000) for _ in range(2)) < 30 * small, (
        "ten times the edges, far from a hundred times the time"
    )


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=True), st.integers(1, 3))
def test_random_graphs_end_as_sequential_evaluation_says(dice: random.Random, sites: int) -> None:
    world = World(dice, sites)
    for _ in range(dice.randint(1, 25)):
        world.submit()
        for _ in range(dice.randint(0, 6)):
            world.step()
    world.drain()
    for id in world.fate:
        status, value = world.outcome[id]
        wanted, wanted_value = world.expected(id)
        assert (status in (m.OK, m.STORED)) == (wanted == m.OK), (id, status, value)
        if wanted == m.OK:
            assert value == wanted_value
    for site in world.sites.values():
        assert all(runs == 1 for runs in site.runs.values()), "each task ran once"
        assert all(count == 1 for count in site.pulled.values()), "each value travelled here once"


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=True), st.integers(1, 3))
def test_l1_everything_is_released_when_the_futures_are(dice: random.Random, sites: int) -> None:
    world = World(dice, sites)
    ids = []
    for _ in range(dice.randint(1, 20)):
        ids.append(world.submit())
        for _ in range(dice.randint(0, 4)):
            world.step()
    world.drain()
    # A redirected future holds its target too.
    for id in dice.sample(ids, k=len(ids)):
        world.release([id])
        for _ in range(dice.randint(0, 3)):
            world.step()
    for site in world.sites.values():
        world.post(CLIENT, site.id, [m.UNSUBSCRIBE, b"".join(ids)])  # what aliases were followed to
    world.drain()
    for site in world.sites.values():
        assert not site.resolver.objects, list(site.resolver.objects)
        assert not site.store


def may_be_cancelled(found: Task) -> bool:
    """Whether it was submitted, and has not begun."""
    return found.group is not None and found.state in (WAITING, READY) and not recovery.has_result(found)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=True), st.integers(1, 3))
def test_l1_nothing_is_left_of_what_was_cancelled_in_the_middle(dice: random.Random, sites: int) -> None:
    """Also where its arguments were asked for before they were submitted."""
    world = World(dice, sites)
    ids = []
    for _ in range(dice.randint(1, 20)):
        ids.append(world.submit())
        for _ in range(dice.randint(0, 4)):
            world.step()
        site = world.sites[world.home[(id := dice.choice(ids))]]
        found = site.resolver.objects.get(id)
        if dice.random() < 0.5 and is_task(found) and may_be_cancelled(found):
            site.cancel(found)
    world.drain()
    assert set(world.outcome) == set(ids)
    world.release(ids)
    for site in world.sites.values():
        world.post(CLIENT, site.id, [m.UNSUBSCRIBE, b"".join(ids)])  # what aliases were followed to
    world.drain()
    for site in world.sites.values():
        assert not site.resolver.objects, list(site.resolver.objects)


def test_who_has_gone_again_before_the_submit_came_is_no_subscriber() -> None:
    r = resolver()
    gone, stays = (ev.Who(bytes([n]) * 16, "peer", b"p" * 40, "endpoint") for n in (1, 2))
    for who in (gone, stays):
        r.handle(ev.Subscribed(who, HERE, [[object_id(1), local(1)[32:], None, False]], 1.0))
    r.handle(ev.Unsubscribed(gone, [object_id(1)]))
    submit(r, task(1))
    assert r.objects[object_id(1)].pins == {CLIENT, stays.party}


def test_ids_are_split() -> None:
    assert split(object_id(1) + object_id(2)) == [object_id(1), object_id(2)]
