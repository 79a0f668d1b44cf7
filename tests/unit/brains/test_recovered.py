"""An agent's graph after its process died: transcripts, and worlds in which agents, workers and bytes are lost."""

from __future__ import annotations

import random
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcref.brains import resolver_events as ev
from gcref.brains.recovery import PINS_IDS_MAX
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, DONE, LOST, READY, WAITING, Task
from gcref.objects import failure as failures
from gcref.wire import messages as m
from tests.unit.brains.recovering import WORKER, LastingWorld, reloaded
from tests.unit.brains.sites import CLIENT, GROUP, SECRET, USER, object_id, ref_to

HERE = b"H" * 16
THERE = b"T" * 16
FN = b"f" * 16
PEER = ev.Who(b"z" * 16, "peer", b"q" * 40, "endpoint")
BIG = 1 << 20
Kind = TypeVar("Kind")


class Life:
    """A resolver with its journal: `again()` is the next process."""

    def __init__(self) -> None:
        self.journal: list[object] = []
        self.r = Resolver(HERE, unknown_object_s=600, lease_s=86400)

    def handle(self, event: object) -> list[ev.Instruction]:
        self.journal.append(event)
        told = self.r.handle(event)
        self.r.validate()
        return told

    def submit(
        self, *tasks: list[object], home: bytes = HERE, who: ev.Who = USER, **opts: object
    ) -> list[ev.Instruction]:
        return self.handle(ev.Submitted(who, home, GROUP, SECRET, opts, [FN], list(tasks), 1.0, 1000.0))

    def finish(
        self,
        number: int,
        status: int = m.OK,
        value: object = b"v",
        refs: bytes | None = None,
        attempt: int = 1,
    ) -> list[ev.Instruction]:
        self.task(number).state = DISPATCHED
        return self.handle(
            ev.Finished("w", [[1, object_id(number), attempt, status, value, 1.0, 0.5, refs, None]])
        )

    def task(self, number: int) -> Task:
        found = self.r.objects[object_id(number)]
        assert isinstance(found, Task)
        return found

    def again(
        self,
        running: dict[bytes, int] | None = None,
        stored: dict[bytes, tuple[int, int]] | None = None,
    ) -> list[ev.Instruction]:
        self.r = Resolver(HERE, unknown_object_s=600, lease_s=86400)
        for event in self.journal:
            self.r.replay(event)
            self.r.validate()
        told = self.r.handle(
            ev.Recovered(running or {}, self.r.wanted_bytes() if stored is None else stored, 2.0)
        )
        self.r.validate()
        return told


def task(number: int, *deps: bytes) -> list[object]:
    return [object_id(number), -1, b"payload", b"".join(deps) or None, None, None]


def local(number: int) -> bytes:
    return ref_to(object_id(number), HERE)


def far(number: int) -> bytes:
    return ref_to(object_id(number), THERE)


def runnable(told: list[ev.Instruction]) -> list[bytes]:
    return [t.id for i in told if isinstance(i, ev.Runnable) for t in i.tasks]


def items(told: list[ev.Instruction], party: bytes = CLIENT) -> dict[bytes, list[object]]:
    return {
        item[0]: item
        for i in told
        if isinstance(i, ev.Notify | ev.NotifyLater) and i.party == party
        for item in i.items
    }


def only(told: list[ev.Instruction], kind: type[Kind]) -> list[Kind]:
    return [i for i in told if isinstance(i, kind)]


# ------------------------------------------------------------------------------------------------------ recovery


def test_outcomes_are_told_again_and_what_is_ready_runs_in_its_order() -> None:
    life = Life()
    life.submit(task(1), task(2), task(3, local(1)), task(4, local(2)), task(5))
    life.finish(1, value=b"one")
    life.finish(5, m.FAILED, failures.make("raised", "five"))
    told = life.again()
    assert runnable(told) == [object_id(2), object_id(3)]
    assert items(told)[object_id(1)][2] == b"one"
    assert items(told)[object_id(5)][1] == m.FAILED
    assert object_id(4) not in items(told)
    assert runnable(life.finish(2)) == [object_id(4)]


def test_a_task_that_an_adopted_worker_runs_is_not_run_again() -> None:
    life = Life()
    life.submit(task(1), task(2, local(1)))
    told = life.again(running={object_id(1): 7})
    assert runnable(told) == []
    assert life.task(1).state == DISPATCHED
    assert runnable(life.finish(1)) == [object_id(2)]


def test_a_result_counts_in_a_replay_though_nobody_dispatched_its_task_and_only_once() -> None:
    life = Life()
    life.submit(task(1), task(2, local(1)))
    row = [1, object_id(1), 1, m.OK, b"first", 1.0, 0.5, None, None]
    ahead = [2, object_id(2), 1, m.OK, b"sent ahead", 1.0, 0.5, None, None]
    life.journal += [ev.Finished("w", [row, ahead]), ev.Finished("w", [[*row[:4], b"again", *row[5:]]])]
    told = life.again()
    assert items(told)[object_id(1)][2] == b"first"
    assert items(told)[object_id(2)][2] == b"sent ahead"
    assert runnable(told) == []


def test_a_result_of_an_old_attempt_does_not_count_in_a_replay() -> None:
    life = Life()
    life.submit(task(1), retries=1)
    life.task(1).state = DISPATCHED
    life.r.handle(ev.Ended([life.task(1)], failures.make("WorkerLostError", "gone"), True))
    life.r.replay(ev.Finished("w", [[1, object_id(1), 1, m.OK, b"late", 1.0, 0.5, None, None]]))
    assert life.task(1).state == READY
    assert life.task(1).attempt == 2


def test_a_result_that_waits_for_a_confirmation_is_not_taken_twice_and_is_asked_for_again() -> None:
    life = Life()
    life.submit(task(1))
    life.finish(1, m.OK, b"holds a reference", far(9))
    life.journal.append(ev.Finished("w", [[1, object_id(1), 1, m.OK, b"other", 1.0, 0.5, None, None]]))
    told = life.again()
    assert only(told, ev.Subscribe) == [ev.Subscribe(THERE, [[object_id(9), far(9)[32:], None, True]])]
    assert not items(told)
    told = life.handle(ev.Outcomes(THERE, [[object_id(9), m.PENDING, None, 0, None]], "direct"))
    assert items(told)[object_id(1)][2] == b"holds a reference"


def test_every_home_hears_what_is_pinned_before_it_is_subscribed_to() -> None:
    life = Life()
    other = b"O" * 16
    life.submit(task(1, far(8), far(9)), task(2, ref_to(object_id(7), other)))
    life.handle(ev.Outcomes(other, [[object_id(7), m.OK, b"v", 1, None]], "direct"))
    life.finish(2)  # so nothing of that home is pinned any more, and it may not know
    told = life.again()
    assert [i for i in told if isinstance(i, ev.Pins | ev.Subscribe)] == [
        ev.Pins(other, [], False),
        ev.Pins(THERE, [object_id(8), object_id(9)], False),
        ev.Subscribe(
            THERE, [[object_id(8), far(8)[32:], None, False], [object_id(9), far(9)[32:], None, False]]
        ),
    ]


def test_many_pins_are_told_in_parts() -> None:
    life = Life()
    refs = b"".join(far(n) for n in range(PINS_IDS_MAX + 1))
    life.submit([object_id(99_999), -1, b"p", None, refs, None])
    told = only(life.again(), ev.Pins)
    assert [(len(i.ids), i.more) for i in told] == [(PINS_IDS_MAX, True), (1, False)]


def test_pulls_are_ordered_again() -> None:
    life = Life()
    life.submit(task(1, far(9)), [object_id(2), -1, None, None, None, [b"u" * 16, BIG]])
    life.handle(ev.Offered(USER, HERE, GROUP, SECRET, [[object_id(3), BIG, None]], 1.0))
    life.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, BIG, 1, None]], "direct"))
    pulls = {(i.obj.id, i.source) for i in only(life.again(), ev.Pull)}
    assert pulls == {(object_id(9), THERE), (b"u" * 16, CLIENT), (object_id(3), CLIENT)}
    told = life.handle(
        ev.Pulled([(object_id(9), 1, {"direct": BIG}, None), (b"u" * 16, 1, {"ipc": 0}, None)])
    )
    assert sorted(runnable(told)) == [object_id(1), object_id(2)]


def test_what_a_task_here_waits_for_is_brought_again() -> None:
    life = Life()
    life.handle(ev.Subscribed(WORKER, THERE, [[object_id(9), far(9)[32:], None, False]], 1.0))
    life.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, BIG, 1, None]], "direct"))
    assert [(i.obj.id, i.source) for i in only(life.again(), ev.Pull)] == [(object_id(9), THERE)]


def test_functions_are_asked_for_again() -> None:
    life = Life()
    life.submit([object_id(1), 0, b"p", None, None, None])
    told = life.again()
    assert told == [ev.NeedFunctions(CLIENT, [FN])]
    assert runnable(life.handle(ev.FunctionsKnown([FN]))) == [object_id(1)]


def test_what_was_relayed_is_relayed_again_until_its_home_has_answered() -> None:
    life = Life()
    blob = b"a small blob"
    life.submit(task(1), task(2), home=THERE, who=WORKER)
    life.submit([object_id(3), -1, None, None, None, [b"u" * 16, BIG]], home=THERE, who=WORKER)
    life.handle(ev.Offered(WORKER, THERE, GROUP, SECRET, [[object_id(4), len(blob), blob]], 1.0))
    life.handle(ev.Offered(WORKER, THERE, GROUP, SECRET, [[object_id(5), BIG, None]], 1.0))
    life.handle(ev.Outcomes(THERE, [[object_id(1), m.OK, b"v", 1, None]], "direct"))
    head = [m.SUBMIT, THERE, GROUP, SECRET, {}, [FN]]
    told = life.again()
    assert {i.obj.id for i in only(told, ev.Pull)} == {b"u" * 16, object_id(5)}
    assert only(told, ev.Relay) == [
        ev.Relay(THERE, [*head, [task(2)]]),
        ev.Relay(THERE, [m.OFFER, THERE, GROUP, SECRET, [[object_id(4), len(blob), blob]]]),
    ]
    assert items(told, WORKER.party)[object_id(1)][2] == b"v", "the task that waits for it hears it again"
    told = life.handle(ev.Pulled([(b"u" * 16, 1, {"ipc": 0}, None), (object_id(5), 1, {"ipc": 0}, None)]))
    assert len(only(told, ev.Relay)) == 2
    told = life.again()
    assert not only(told, ev.Pull)
    assert len(only(told, ev.Relay)) == 4
    told = life.again(stored={})
    assert {i.obj.id for i in only(told, ev.Pull)} == {b"u" * 16, object_id(5)}, "their bytes are gone"
    assert len(only(told, ev.Relay)) == 2


def test_a_relayed_task_whose_argument_blob_cannot_be_had_ends() -> None:
    life = Life()
    life.submit([object_id(3), -1, None, None, None, [b"u" * 16, BIG]], home=THERE, who=WORKER)
    told = life.handle(ev.PullFailed(b"u" * 16, failures.make("StoreFullError", "full")))
    assert items(told, WORKER.party)[object_id(3)][1] == m.FAILED


def test_bytes_that_the_store_has_not_after_a_death_are_made_again_or_lost() -> None:
    life = Life()
    life.submit(task(1), retries=1)
    life.submit(task(2), task(3, local(1)), task(4, local(2)))
    life.finish(1, m.STORED, ["/1", BIG])
    life.finish(2, m.STORED, ["/2", BIG])
    assert life.r.wanted_bytes() == {object_id(1): (1, BIG), object_id(2): (1, BIG)}
    told = life.again(stored={})
    assert runnable(told) == [object_id(1)]
    assert life.task(1).attempt == 2
    assert items(told)[object_id(2)][1:3] == [
        m.LOST,
        ["bytes_lost", "the bytes of the result are gone from its home's store"],
    ]
    assert items(told)[object_id(4)][2][0] == "DependencyError"  # type: ignore[index]
    assert object_id(1) not in items(told)
    told = life.finish(1, m.STORED, ["/1", BIG], attempt=2)
    assert runnable(told) == [object_id(3)]
    assert items(told)[object_id(1)][1:4] == [m.STORED, BIG, 2]


def test_copies_that_the_store_has_not_after_a_death_are_brought_again_when_somebody_needs_them() -> None:
    life = Life()
    life.submit(task(1, far(8), far(9)), task(2, far(7)))
    for n in (7, 8):
        life.handle(ev.Outcomes(THERE, [[object_id(n), m.STORED, BIG, 1, None]], "direct"))
        life.handle(ev.Pulled([(object_id(n), 1, {"direct": BIG}, None)]))
    life.finish(2)  # an idle copy of 7 stays
    told = life.again()
    assert only(told, ev.Idle) == [ev.Idle([object_id(7)])]
    assert not only(told, ev.Pull)
    told = life.again(stored={})
    assert [i.obj.id for i in only(told, ev.Pull)] == [object_id(8)]
    assert object_id(7) not in life.r.objects


def test_a_redirection_is_told_again() -> None:
    life = Life()
    life.submit(task(1), task(2, local(1)))
    life.finish(1, m.ALIAS, far(9))
    told = life.again()
    assert items(told)[object_id(1)][1:3] == [m.ALIAS, far(9)]
    life.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, BIG, 1, None]], "direct"))
    assert runnable(life.handle(ev.Pulled([(object_id(9), 1, {"direct": BIG}, None)]))) == [object_id(2)]


def test_what_nobody_submitted_is_waited_for_after_a_death_too() -> None:
    life = Life()
    life.handle(ev.Subscribed(PEER, HERE, [[object_id(1), local(1)[32:], None, False]], 1.0))
    life.again()
    assert life.r.deadline == pytest.approx(601.0)
    life.submit(task(1))
    assert items(life.finish(1), PEER.party)[object_id(1)][1] == m.OK


def test_a_put_that_was_asked_for_before_it_came_is_uploaded_again_and_never_run() -> None:
    life = Life()
    life.handle(ev.Subscribed(PEER, HERE, [[object_id(1), local(1)[32:], None, False]], 1.0))
    life.handle(ev.Offered(USER, HERE, GROUP, SECRET, [[object_id(1), BIG, None]], 1.0))
    told = life.again()
    assert runnable(told) == []
    assert [i.obj.id for i in only(told, ev.Pull)] == [object_id(1)]
    life.r = reloaded(life.r)
    told = life.handle(ev.Pulled([(object_id(1), 1, {"direct": BIG}, None)]))
    assert items(told, PEER.party)[object_id(1)][1] == m.STORED
    assert only(life.handle(ev.Attached(USER, GROUP)), ev.Tasks)[0].tasks == [], "it is no task"
    told = life.again(stored={})
    assert runnable(told) == []
    assert items(told)[object_id(1)][1] == m.LOST


# ----------------------------------------------------------------------------------------- the other side's death


def test_pins_that_a_restarted_endpoint_does_not_name_fall() -> None:
    life = Life()
    life.submit(*[task(n) for n in range(4)])
    for n in range(4):
        life.handle(ev.Subscribed(PEER, HERE, [[object_id(n), local(n)[32:], None, False]], 1.0))
        life.finish(n)
    life.handle(ev.Unsubscribed(USER, [object_id(n) for n in range(4)]))
    life.handle(ev.Reclaimed(PEER, [object_id(0)], True))
    assert len(life.r.objects) == 4, "it goes on"
    life.handle(ev.Reclaimed(PEER, [object_id(2), object_id(9)], False))
    assert sorted(life.r.objects) == [object_id(0), object_id(2)]
    life.handle(ev.Reclaimed(PEER, [object_id(0)], True))
    life.handle(ev.HomeRestarted(PEER.party))
    life.handle(ev.Reclaimed(PEER, [], False))
    assert not life.r.objects, "a list that broke off does not count"


def test_a_restarted_home_may_have_lost_its_forgets_and_its_confirmations() -> None:
    life = Life()
    life.submit(task(1, far(8)), task(2))
    life.handle(ev.Outcomes(THERE, [[object_id(8), m.STORED, BIG, 1, None]], "direct"))
    life.handle(ev.Pulled([(object_id(8), 1, {"direct": BIG}, None)]))
    life.finish(1)
    life.finish(2, m.OK, b"v", far(9))
    told = life.handle(ev.HomeRestarted(THERE))
    assert told == [ev.Subscribe(THERE, [[object_id(9), far(9)[32:], None, True]]), ev.Free([object_id(8)])]


# ------------------------------------------------------------------------------------------------- re-execution


def test_a_task_whose_bytes_are_lost_runs_again_once_and_all_hear_of_it() -> None:
    life = Life()
    life.submit(task(1))
    life.submit(task(2, local(1)), retries=1)
    life.finish(1)
    life.handle(ev.Subscribed(PEER, HERE, [[object_id(2), local(2)[32:], None, False]], 1.0))
    life.finish(2, m.STORED, ["/2", BIG])
    life.handle(ev.Unsubscribed(USER, [object_id(1)]))
    assert object_id(1) in life.r.objects, "it is kept for another attempt"
    told = life.handle(ev.BytesLost([(object_id(2), "corrupt")]))
    assert told == [ev.Runnable([life.task(2)]), ev.Free([object_id(2)])]
    assert life.handle(ev.BytesLost([(object_id(2), "corrupt")])) == [], "it is being made already"
    assert life.task(2).extra.tries == [  # type: ignore[union-attr]
        "attempt 1: ObjectLostError: the bytes of the result are gone from its home's store"
    ]
    told = life.finish(2, m.STORED, ["/2", BIG], attempt=2)
    assert items(told)[object_id(2)][1:4] == items(told, PEER.party)[object_id(2)][1:4] == [m.STORED, BIG, 2]
    assert object_id(1) not in life.r.objects, "there is no third attempt"
    told = life.handle(ev.BytesLost([(object_id(2), "corrupt")]))
    assert items(told)[object_id(2)][1] == m.LOST
    assert items(told)[object_id(2)][2][0] == "corrupt"  # type: ignore[index]
    assert life.r.counts == {**life.r.counts, "submitted": 2, "done": 1, "lost": 1}


def test_tasks_that_had_the_lost_bytes_wait_for_the_new_ones() -> None:
    life = Life()
    life.submit(task(1), retries=1)
    life.submit(task(2))
    life.finish(1, m.STORED, ["/1", BIG])
    told = life.submit(task(3, local(1)), task(4, local(1), local(2)), task(5, local(1)))
    assert runnable(told) == [object_id(3), object_id(5)]
    life.task(5).state = DISPATCHED
    told = life.handle(ev.BytesLost([(object_id(1), "bytes_lost")]))
    assert [i.tasks for i in only(told, ev.Withdraw)] == [[life.task(3)]]
    assert runnable(told) == [object_id(1)]
    assert runnable(life.finish(2)) == []
    life.finish(5)
    told = life.finish(1, m.STORED, ["/1", BIG], attempt=2)
    assert sorted(runnable(told)) == [object_id(3), object_id(4)]


def test_a_whole_chain_is_made_again_in_its_order() -> None:
    life = Life()
    n = 500
    life.submit(*[task(i, *([local(i - 1)] if i else [])) for i in range(n)], retries=1)
    for i in range(n):
        life.finish(i, m.STORED, [f"/{i}", BIG])
    told = life.handle(ev.BytesLost([(object_id(i), "bytes_lost") for i in range(n)]))
    for i in range(n):
        assert runnable(told) == [object_id(i)]
        told = life.finish(i, m.STORED, [f"/{i}", BIG], attempt=2)


def test_an_argument_that_is_found_gone_when_its_task_is_sent_is_made_again() -> None:
    life = Life()
    life.submit(task(1), retries=1)
    life.submit(task(2), task(3, local(1)), task(4, local(2)))
    life.finish(1, m.STORED, ["/1", BIG])
    life.finish(2, m.STORED, ["/2", BIG])
    told = life.handle(ev.ArgumentGone(life.task(3), life.task(1)))
    assert runnable(told) == [object_id(1)]
    assert runnable(life.finish(1, m.STORED, ["/1", BIG], attempt=2)) == [object_id(3)]
    told = life.handle(ev.ArgumentGone(life.task(4), life.task(2)))
    failure = items(told)[object_id(4)][2]
    assert (failure[0], failure[4][0]) == ("DependencyError", "ObjectLostError")  # type: ignore[index]
    assert items(told)[object_id(2)][1] == m.LOST


def test_an_argument_blob_of_an_unfinished_task_is_brought_again() -> None:
    life = Life()
    life.submit([object_id(2), -1, None, None, None, [b"u" * 16, BIG]])
    life.handle(ev.Pulled([(b"u" * 16, 1, {"ipc": 0}, None)]))
    told = life.handle(ev.BytesLost([(b"u" * 16, "bytes_lost")]))
    assert [(i.obj.id, i.source) for i in only(told, ev.Pull)] == [(b"u" * 16, CLIENT)]
    assert only(told, ev.Withdraw)
    assert runnable(life.handle(ev.Pulled([(b"u" * 16, 1, {"ipc": 0}, None)]))) == [object_id(2)]


def test_a_subscriber_takes_a_later_attempt_when_it_has_not_the_bytes() -> None:
    life = Life()
    life.submit(task(1, far(9)))
    life.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, BIG, 1, None]], "direct"))
    told = life.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, BIG + 1, 2, None]], "direct"))
    assert told == [ev.CancelPull(object_id(9)), ev.Pull(life.r.objects[object_id(9)], THERE)]
    assert life.handle(ev.Pulled([(object_id(9), 1, {"direct": BIG}, None)])) == [], (
        "bytes of two attempts never mix"
    )
    assert runnable(life.handle(ev.Pulled([(object_id(9), 2, {"direct": BIG + 1}, None)]))) == [object_id(1)]


def test_a_subscriber_waits_when_the_home_has_not_the_bytes_and_keeps_a_copy_that_it_has() -> None:
    life = Life()
    life.submit(task(1, far(9)))
    life.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, BIG, 1, None]], "direct"))
    assert life.handle(ev.PullWaits(object_id(9), 1)) == []
    told = life.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, BIG, 2, None]], "direct"))
    assert len(only(told, ev.Pull)) == 1
    late = failures.make("ObjectLostError", "silent", reason="timeout")
    assert life.handle(ev.PullFailed(object_id(9), late, 1)) == [], "the home has spoken since"
    life.handle(ev.Pulled([(object_id(9), 2, {"direct": BIG}, None)]))
    assert life.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, BIG, 3, None]], "direct")) == []
    assert life.r.objects[object_id(9)].attempt == 2, "its bytes are here"
    life.handle(ev.Evicted([object_id(9)]))
    assert life.r.objects[object_id(9)].attempt == 3
    assert life.r.objects[object_id(9)].state == WAITING


def test_a_home_that_stays_silent_ends_the_wait() -> None:
    life = Life()
    life.submit(task(1, far(9)))
    life.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, BIG, 1, None]], "direct"))
    life.handle(ev.PullWaits(object_id(9), 1))
    late = failures.make("ObjectLostError", "silent", reason="timeout")
    told = life.handle(ev.PullFailed(object_id(9), late, 1))
    assert items(told)[object_id(1)][2][0] == "DependencyError"  # type: ignore[index]


# ------------------------------------------------------------------------------------------------------- worlds


def check(world: LastingWorld) -> None:
    """Every future has ended as sequential evaluation says."""
    for id in world.fate:
        assert id in world.outcome, (
            id,
            {s: site.resolver.objects.get(id) for s, site in world.sites.items()},
        )
        status, value = world.outcome[id]
        wanted, wanted_value = world.expected(id)
        assert (status in (m.OK, m.STORED)) == (wanted == m.OK), (id, status, value)
        assert wanted != m.OK or value == wanted_value


def play(
    world: LastingWorld, dice: random.Random, *, deaths: float, workers: float = 0.0, losses: float = 0.0
) -> list[bytes]:
    """A client submits and the world goes on, while things die."""
    ids = []

    def accident() -> None:
        site = dice.choice(list(world.sites.values()))
        throw = dice.random()
        if throw < deaths:
            site.die(workers, losses)
        elif throw < deaths + workers and site.running:
            site.lose_worker(dice.choice(list(site.running)))
        elif throw < deaths + workers + losses:
            mine = [
                id
                for id in site.store
                if world.home.get(id) == site.id
                and site.resolver.objects[id].state == DONE
                and world.can_be_lost(id)
            ]
            if mine:
                site.lose_bytes(dice.choice(mine))
        elif throw > 0.95:
            site.compact()
        elif throw > 0.9 and len(world.sites) > 1:
            home = dice.choice([home for home in world.sites if home != site.id])
            site.spawn(home, large=dice.random() < 0.5)

    for _ in range(dice.randint(1, 20)):
        ids.append(world.submit())
        for _ in range(dice.randint(0, 6)):
            world.step()
            accident()
    for _ in range(60):
        world.step()
        accident()
    world.drain()
    assert world.heard == set(world.spawned), "what tasks submitted elsewhere has run, and they know"
    return ids


def release(world: LastingWorld, dice: random.Random, ids: list[bytes], *, deaths: float) -> None:
    """The client drops all futures, while things die; nothing may be left anywhere."""
    for id in dice.sample(ids, k=len(ids)):
        world.release([id])
        for _ in range(dice.randint(0, 3)):
            world.step()
            if dice.random() < deaths:
                dice.choice(list(world.sites.values())).die()
    for site in world.sites.values():
        world.post(CLIENT, site.id, [m.UNSUBSCRIBE, b"".join(ids)])  # what aliases were followed to
        site.handle(ev.PartyGone(WORKER.party, world.now))
    for _ in range(20):
        world.step()
        if dice.random() < deaths:
            dice.choice(list(world.sites.values())).die()
    world.drain()
    for site in world.sites.values():
        assert not site.resolver.objects, {k.decode(): str(v) for k, v in site.resolver.objects.items()}
        assert not site.store


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=True), st.integers(1, 3))
def test_a1_agents_die_and_no_future_and_no_run_is_lost_or_doubled(dice: random.Random, sites: int) -> None:
    world = LastingWorld(dice, sites, retries=dice.choice((0, 1)))
    ids = play(world, dice, deaths=0.1)
    check(world)
    for site in world.sites.values():
        assert all(runs == 1 for runs in site.runs.values()), "each task ran once"
        assert all(site.runs[id] == 1 for id, home in world.spawned.items() if home == site.id)
    release(world, dice, ids, deaths=0.1)


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=True), st.integers(1, 3))
def test_agents_workers_and_bytes_are_lost_and_every_future_ends_with_its_value(
    dice: random.Random, sites: int
) -> None:
    world = LastingWorld(dice, sites, retries=1000, big=0.6)
    ids = play(world, dice, deaths=0.05, workers=0.2, losses=0.2)
    check(world)
    for site in world.sites.values():
        for id, runs in site.runs.items():
            assert runs <= site.resolver.objects[id].attempt, "no run without an attempt"
    release(world, dice, ids, deaths=0.1)


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=True), st.integers(1, 3))
def test_without_retries_every_future_ends_all_the_same(dice: random.Random, sites: int) -> None:
    world = LastingWorld(dice, sites, big=0.6)
    play(world, dice, deaths=0.05, workers=0.2, losses=0.2)
    for id in world.fate:
        found = world.sites[world.home[id]].resolver.objects[id]
        assert found.state >= DONE, id
        assert id in world.outcome or found.state in (DONE, LOST)
    for site in world.sites.values():
        assert all(runs == 1 for runs in site.runs.values())
