"""The submitter: readable transcripts, then any events in any order."""

from __future__ import annotations

import itertools
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gcref.brains import submitter_events as ev
from gcref.brains.submitter import NOT_RUNNING_S, Submitter
from gcref.brains.submitter_table import (
    LOOK_EVERY_S,
    SEEN_GONE,
    SEEN_RUNNING,
    SEEN_STOPPED,
    SEEN_UNKNOWN,
    Lane,
    Stored,
)
from gcref.objects import failure as failures
from gcref.wire import messages as m

POLARIS = b"polaris:::::::::"
MIDWAY = b"midway::::::::::"
AGENT = b"own agent:::::::"
FN = (b"digest of fn::::", b"code of fn")
OTHER_FN = (b"digest of other:", b"code of other")
TOKEN = b"token:::::::::::"


def id_of(number: int) -> bytes:
    return b"task" + number.to_bytes(12, "big")


def lane_at(home: bytes, batch_size: int = 128, **opts: Any) -> Lane:
    return Lane(home, b"group:::::::::::", bytes(32), opts, batch_size)


def task(
    lane: Lane, number: int, fn: Any = FN, kept: Any = None, deps: bytes | None = None, upload: Any = None
) -> Any:
    payload = b"arguments" if upload is None else None
    return (lane, id_of(number), fn, payload, deps, None, upload, kept, f"future {number}")


class Shell:
    """Feeds a submitter, checks it after each event, and keeps what it said."""

    def __init__(self, relay: bytes | None = None, **limits: float) -> None:
        self.brain = Submitter(relay, **limits)
        self.now = 100.0
        self.said: list[Any] = []

    def tell(self, event: Any) -> list[Any]:
        said = self.brain.handle(event)
        self.brain.validate()
        for instruction in said:
            if isinstance(instruction, ev.Send):
                m.check(instruction.message)
        self.said += said
        return said

    def up(self, *peers: bytes, fresh: bool = True) -> list[Any]:
        return [said for peer in peers for said in self.tell(ev.PeerUp(peer, fresh, self.now))]

    def submit(self, *tasks: Any) -> list[Any]:
        return self.tell(ev.Submitted(list(tasks), self.now))

    def outcome(self, peer: bytes, *items: Any) -> list[Any]:
        return self.tell(ev.Heard(peer, [[m.OUTCOME, [[*item, 1, None] for item in items]]], self.now))

    def tick(self, seconds: float) -> list[Any]:
        """Time passes, and every deadline in it is met."""
        until = self.now + seconds
        said: list[Any] = []
        while (at := self.brain.deadline) is not None and at <= until:
            self.now = max(self.now, at)
            said += self.tell(ev.Tick(self.now))
        self.now = until
        return said


def working(*numbers: int, **limits: float) -> tuple[Shell, Lane]:
    """Its endpoint is up and has been sent these tasks."""
    shell, lane = Shell(None, **limits), lane_at(POLARIS)
    shell.submit(*[task(lane, number) for number in numbers])
    shell.up(POLARIS)
    return shell, lane


def ends(said: list[Any]) -> list[tuple[Any, str, Any]]:
    """(holder, "ok" | kind of failure | "cancelled", what came)."""
    found = []
    for settle in said:
        if isinstance(settle, ev.Settle):
            for holder, state, failed, raw, _ in settle.ends:
                how = raw[0] if failed else "cancelled" if state == CANCELLED_AND_NOTIFIED else "ok"
                assert failed or state in (FINISHED, CANCELLED_AND_NOTIFIED)
                found.append((holder, how, raw))
    return found


def sent(said: list[Any], kind: int) -> list[Any]:
    return [i.message for i in said if isinstance(i, ev.Send) and i.message[0] == kind]


# ------------------------------------------------------------------------------------------------------ transcripts


def test_a_task_waits_for_its_endpoint_then_goes_with_its_function() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    assert shell.submit(task(lane, 1)) == [ev.Reach(POLARIS)]
    function, submit = shell.up(POLARIS)
    assert function == ev.Send(POLARIS, [m.FUNCTION, *FN])
    specs = [[id_of(1), 0, b"arguments", None, None, None]]
    assert submit == ev.Send(POLARIS, [m.SUBMIT, POLARIS, lane.group, lane.secret, {}, [FN[0]], specs])
    assert shell.outcome(POLARIS, (id_of(1), m.OK, b"blob")) == [
        ev.Settle([("future 1", FINISHED, False, b"blob", None)]),
        ev.Idle(lane),
    ]
    assert shell.tell(ev.Dropped([id_of(1)])) == [ev.Send(POLARIS, [m.UNSUBSCRIBE, id_of(1)])]
    assert shell.brain.entries == {}


def test_consecutive_tasks_of_a_lane_share_messages_up_to_the_batch_size() -> None:
    shell, lane, other = Shell(), lane_at(POLARIS, 2), lane_at(POLARIS, 2, retries=3)
    shell.submit(task(lane, 0))
    shell.up(POLARIS)
    said = shell.submit(*[task(lane, n) for n in (1, 2, 3)], task(other, 4), task(lane, 5, OTHER_FN))
    batches = [[(spec[0], spec[1]) for spec in message[6]] for message in sent(said, m.SUBMIT)]
    assert batches == [
        [(id_of(1), 0), (id_of(2), 0)],
        [(id_of(3), 0)],
        [(id_of(4), 0)],
        [(id_of(5), 0)],
    ]
    assert sent(said, m.FUNCTION) == [[m.FUNCTION, *OTHER_FN]]
    order = [i.message[0] for i in said if isinstance(i, ev.Send)]
    assert order == [m.SUBMIT, m.SUBMIT, m.SUBMIT, m.FUNCTION, m.SUBMIT]
    assert [message[4] for message in sent(said, m.SUBMIT)][2] == {"retries": 3}


def test_functions_of_one_message_are_numbered() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(task(lane, 1), task(lane, 2, OTHER_FN), task(lane, 3), task(lane, 4, None))
    said = shell.up(POLARIS)
    (message,) = sent(said, m.SUBMIT)
    assert message[5] == [FN[0], OTHER_FN[0]]
    assert [spec[1] for spec in message[6]] == [0, 1, 0, -1]
    assert [i.message[0] for i in said] == [m.FUNCTION, m.FUNCTION, m.SUBMIT]


def test_a_message_is_closed_when_its_arguments_are_many_bytes() -> None:
    shell, lane = Shell(), lane_at(POLARIS, 10_000)
    heavy = b"x" * 100_000
    shell.submit(*[(lane, id_of(n), FN, heavy, None, None, None, None, n) for n in range(100)])
    messages = sent(shell.up(POLARIS), m.SUBMIT)
    assert sum(len(message[6]) for message in messages) == 100
    assert all(len(message[6]) < 50 for message in messages)


def test_a_function_is_sent_again_when_asked_for() -> None:
    shell, _ = working(1, 2)
    said = shell.tell(ev.Heard(POLARIS, [[m.NEED_FUNCTION, [FN[0], OTHER_FN[0]]]], shell.now))
    assert said == [ev.Send(POLARIS, [m.FUNCTION, *FN])]


def test_the_arguments_of_a_task_are_kept_until_it_ends() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    kept = ("an argument",)
    shell.submit(task(lane, 1, kept=kept))
    shell.up(POLARIS)
    shell.tell(ev.Dropped([id_of(1)]))
    entry = shell.brain.find(id_of(1))
    assert entry is not None
    assert entry.args is kept
    said = shell.outcome(POLARIS, (id_of(1), m.OK, b""))
    assert ends(said) == []
    assert sent(said, m.UNSUBSCRIBE) == [[m.UNSUBSCRIBE, id_of(1)]]
    assert ev.Idle(lane) in said


def test_statuses() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(*[task(lane, number) for number in range(6)])
    shell.up(POLARIS)
    failed = failures.make("TaskError", "no")
    said = shell.outcome(
        POLARIS,
        (id_of(0), m.PENDING, None),
        (id_of(1), m.STORED, 5_000_000),
        (id_of(2), m.FAILED, failed),
        (id_of(3), m.CANCELLED_STATUS, None),
        (id_of(4), m.LOST, ["released", "it was released"]),
        (id_of(5), m.OK, b"blob"),
        (id_of(5), m.OK, b"twice"),
        (id_of(9), m.OK, b"never asked for"),
    )
    found = ends(said)
    assert [(holder, how) for holder, how, _ in found] == [
        ("future 1", "ok"),
        ("future 2", "TaskError"),
        ("future 3", "cancelled"),
        ("future 4", "ObjectLostError"),
        ("future 5", "ok"),
    ]
    stored = found[0][2]
    assert isinstance(stored, Stored)
    assert (stored.id, stored.home, stored.size, stored.attempt) == (id_of(1), POLARIS, 5_000_000, 1)
    assert found[3][2][2]["reason"] == "released"
    assert found[4][2] == b"blob"
    assert lane.open == 1


def test_a_put_is_offered() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    shell.tell(ev.Offered([(lane, id_of(1), 4, b"blob", (), "small")], shell.now))
    shell.tell(ev.Offered([(lane, id_of(2), 10**9, None, ("upload",), "large")], shell.now))
    offers = sent(shell.up(POLARIS), m.OFFER)
    assert [message[4] for message in offers] == [[[id_of(1), 4, b"blob"]], [[id_of(2), 10**9, None]]]
    said = shell.outcome(POLARIS, (id_of(1), m.OK, b"blob"), (id_of(2), m.STORED, 10**9))
    assert [(holder, how) for holder, how, _ in ends(said)] == [("small", "ok"), ("large", "ok")]


def test_running() -> None:
    shell, _ = working(1)
    started = [m.STARTED, [[id_of(1), 1, 1.0], [id_of(7), 1, 1.0]]]
    assert shell.tell(ev.Heard(POLARIS, [started, started], shell.now)) == [ev.Running(["future 1"])]


# ----------------------------------------------------------------------------------------------------------- cancel


def test_an_unsent_task_is_cancelled_here() -> None:
    """C1."""
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(task(lane, 1), task(lane, 2))
    said = shell.tell(ev.CancelAsked("request", [id_of(1)], False, shell.now))
    assert ends(said) == [("future 1", "cancelled", None)]
    assert ev.Answer("request", [True]) in said
    (message,) = sent(shell.up(POLARIS), m.SUBMIT)
    assert [spec[0] for spec in message[6]] == [id_of(2)]


def test_the_home_hears_of_a_task_that_was_cancelled_before_it_was_sent() -> None:
    """C2: what waits for it there ends; once the future is gone nobody needs to hear."""
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(task(lane, 1), task(lane, 2))
    shell.tell(ev.CancelAsked("request", [id_of(1), id_of(2)], False, shell.now))
    shell.tell(ev.Dropped([id_of(2)]))
    assert shell.up(POLARIS) == [
        ev.Send(POLARIS, [m.SUBSCRIBE, POLARIS, [[id_of(1), None, None, False]]]),
        ev.Send(POLARIS, [m.CANCEL, id_of(1), False]),
    ]
    assert shell.outcome(POLARIS, (id_of(1), m.CANCELLED_STATUS, None)) == []
    assert shell.tell(ev.Dropped([id_of(1)])) == [ev.Send(POLARIS, [m.UNSUBSCRIBE, id_of(1)])]


def test_a_sent_task_is_cancelled_by_its_endpoint() -> None:
    """C1."""
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(*[task(lane, number) for number in range(3)])
    shell.up(POLARIS)
    said = shell.tell(ev.CancelAsked("request", [id_of(0), id_of(1), id_of(0), id_of(2)], True, shell.now))
    assert said == [ev.Send(POLARIS, [m.CANCEL, id_of(0) + id_of(1) + id_of(2), True])]
    said = shell.tell(ev.Heard(POLARIS, [[m.CANCELLED, id_of(0), [True]]], shell.now))
    assert ends(said) == [("future 0", "cancelled", None)]
    said = shell.tell(ev.Heard(POLARIS, [[m.CANCELLED, id_of(1), [False]]], shell.now))
    assert said == []
    said = shell.outcome(POLARIS, (id_of(2), m.OK, b"too late"))
    assert ev.Answer("request", [True, False, True, False]) in said
    assert shell.outcome(POLARIS, (id_of(0), m.CANCELLED_STATUS, None)) == []


def test_a_silent_endpoint_costs_a_second_and_the_request_stands() -> None:
    """C3."""
    shell, _ = working(1)
    shell.tell(ev.CancelAsked("request", [id_of(1)], False, shell.now))
    assert shell.tick(0.99) == []
    assert shell.tick(0.02) == [ev.Answer("request", [False])]
    said = shell.outcome(POLARIS, (id_of(1), m.CANCELLED_STATUS, None))
    assert ends(said) == [("future 1", "cancelled", None)]


def test_a_task_that_was_reloaded_is_cancelled_by_its_endpoint() -> None:
    """C1."""
    shell, lane = Shell(), lane_at(POLARIS)
    shell.tell(ev.Opened([(id_of(1), POLARIS, None, lane, "reloaded")], shell.now))
    said = shell.tell(ev.CancelAsked("request", [id_of(1)], False, shell.now))
    assert said == [ev.Send(POLARIS, [m.CANCEL, id_of(1), False])]


def test_what_is_done_or_unknown_is_not_cancelled() -> None:
    shell, _ = working(1)
    shell.outcome(POLARIS, (id_of(1), m.OK, b""))
    said = shell.tell(ev.CancelAsked("request", [id_of(1), id_of(2)], False, shell.now))
    assert said == [ev.Answer("request", [False, False])]


# ------------------------------------------------------------------------------------------------------------ aliases


def test_an_alias_ends_with_what_it_stands_for() -> None:
    """R11."""
    shell, lane = working(1)
    said = shell.outcome(POLARIS, (id_of(1), m.ALIAS, id_of(2) + MIDWAY + TOKEN))
    assert said == [ev.Reach(MIDWAY)]
    said = shell.up(MIDWAY)
    assert said == [ev.Send(MIDWAY, [m.SUBSCRIBE, MIDWAY, [[id_of(2), TOKEN, None, False]]])]
    said = shell.outcome(MIDWAY, (id_of(2), m.STORED, 1_000_000))
    ((holder, how, stored),) = ends(said)
    assert (holder, how) == ("future 1", "ok")
    assert (stored.id, stored.home, stored.token) == (id_of(2), MIDWAY, TOKEN)
    assert ev.Idle(lane) in said
    said = shell.tell(ev.Dropped([id_of(1)]))
    assert sorted(i.peer for i in said) == sorted([POLARIS, MIDWAY])
    assert shell.brain.entries == {}


def test_a_chain_of_aliases_ends_at_once_without_recursion() -> None:
    """R8."""
    shell, lane, count = Shell(), lane_at(POLARIS), 3000
    shell.submit(*[task(lane, number) for number in range(count)])
    shell.brain.handle(ev.PeerUp(POLARIS, True, 0.0))
    items = [[id_of(n), m.ALIAS, id_of(n + 1) + POLARIS + TOKEN, 1, None] for n in range(count - 1)]
    shell.brain.handle(ev.Heard(POLARIS, [[m.OUTCOME, items]], 0.0))
    last = shell.brain.handle(
        ev.Heard(POLARIS, [[m.OUTCOME, [[id_of(count - 1), m.OK, b"end", 1, None]]]], 0.0)
    )
    assert [raw for _, _, raw in ends(last)] == [b"end"] * count
    shell.brain.handle(ev.Dropped([id_of(number) for number in range(count)]))
    assert shell.brain.entries == {}


def test_a_cycle_of_aliases_fails() -> None:
    """R11."""
    shell, _ = working(1, 2)
    shell.outcome(POLARIS, (id_of(1), m.ALIAS, id_of(2) + POLARIS + TOKEN))
    said = shell.outcome(POLARIS, (id_of(2), m.ALIAS, id_of(1) + POLARIS + TOKEN))
    assert sorted((holder, how) for holder, how, _ in ends(said)) == [
        ("future 1", "DeadlockError"),
        ("future 2", "DeadlockError"),
    ]


def test_an_alias_of_what_is_done_asks_for_it_again() -> None:
    shell, _ = working(1, 2)
    shell.outcome(POLARIS, (id_of(2), m.OK, b"two"))
    said = shell.outcome(POLARIS, (id_of(1), m.ALIAS, id_of(2) + POLARIS + TOKEN))
    assert sent(said, m.SUBSCRIBE) == [[m.SUBSCRIBE, POLARIS, [[id_of(2), None, None, False]]]]
    said = shell.outcome(POLARIS, (id_of(2), m.OK, b"two"))
    assert [(holder, raw) for holder, _, raw in ends(said)] == [("future 2", b"two"), ("future 1", b"two")]


# ------------------------------------------------------------------------------------------------------- references


def test_a_reference_is_subscribed_to_and_let_go() -> None:
    shell = Shell()
    shell.tell(ev.Opened([(id_of(1), POLARIS, TOKEN, None, "opened")], shell.now))
    said = shell.up(POLARIS)
    assert sent(said, m.SUBSCRIBE) == [[m.SUBSCRIBE, POLARIS, [[id_of(1), TOKEN, None, False]]]]
    said = shell.outcome(POLARIS, (id_of(1), m.STORED, 10))
    assert ends(said)[0][2].token == TOKEN
    assert sent(shell.tell(ev.Dropped([id_of(1)])), m.UNSUBSCRIBE) == [[m.UNSUBSCRIBE, id_of(1)]]


def test_a_reference_that_nobody_waits_for_any_more_is_let_go_before_its_end() -> None:
    shell = Shell()
    shell.tell(ev.Opened([(id_of(1), POLARIS, TOKEN, None, "opened")], shell.now))
    shell.up(POLARIS)
    assert sent(shell.tell(ev.Dropped([id_of(1)])), m.UNSUBSCRIBE) == [[m.UNSUBSCRIBE, id_of(1)]]
    assert shell.outcome(POLARIS, (id_of(1), m.OK, b"")) == []


def test_two_futures_for_one_object_are_one_subscription() -> None:
    shell, _ = working(1)
    assert shell.tell(ev.Opened([(id_of(1), POLARIS, TOKEN, None, "opened")], shell.now)) == []
    said = shell.outcome(POLARIS, (id_of(1), m.OK, b"1"))
    assert [(holder, raw) for holder, _, raw in ends(said)] == [("future 1", b"1"), ("opened", b"1")]
    assert shell.tell(ev.Dropped([id_of(1)])) == []
    assert len(sent(shell.tell(ev.Dropped([id_of(1)])), m.UNSUBSCRIBE)) == 1


def test_a_future_for_what_is_done_hears_it_again() -> None:
    shell, _ = working(1)
    shell.outcome(POLARIS, (id_of(1), m.OK, b"1"))
    said = shell.tell(ev.Opened([(id_of(1), POLARIS, TOKEN, None, "opened")], shell.now))
    assert len(sent(said, m.SUBSCRIBE)) == 1
    assert ("opened", "ok", b"1") in ends(shell.outcome(POLARIS, (id_of(1), m.OK, b"1")))


def test_what_holds_an_object_beside_its_futures_holds_it_when_they_are_gone() -> None:
    shell, _ = working(1)
    shell.outcome(POLARIS, (id_of(1), m.OK, b"1"))
    assert shell.tell(ev.Kept([id_of(1), id_of(7)])) == []
    assert shell.tell(ev.Dropped([id_of(1)])) == []
    assert sent(shell.tell(ev.Dropped([id_of(1)])), m.UNSUBSCRIBE) == [[m.UNSUBSCRIBE, id_of(1)]]
    assert shell.tell(ev.Dropped([id_of(7)])) == []


# -------------------------------------------------------------------------------------------- endpoints that are away


def test_an_endpoint_that_does_not_run_is_given_up_within_seconds() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(task(lane, 1))
    looks = 0
    start = shell.now
    said: list[Any] = []
    while not ends(said):
        said = shell.tick(0.1)
        for look in said:
            if isinstance(look, ev.Look):
                looks += 1
                said = said + shell.tell(
                    ev.PeerSeen(POLARIS, SEEN_STOPPED, "polaris is not running; start it", shell.now)
                )
    assert NOT_RUNNING_S <= shell.now - start < 3 * NOT_RUNNING_S
    assert 1 < looks < 10
    ((holder, how, raw),) = ends(said)
    assert (holder, how, raw[1]) == ("future 1", "EndpointLostError", "polaris is not running; start it")
    assert ev.Leave(POLARIS) in said
    assert shell.brain.deadline is None
    assert ev.Reach(POLARIS) in shell.submit(task(lane, 2))


def test_an_endpoint_that_is_gone_for_good_is_given_up_at_once() -> None:
    shell, _ = working(1)
    shell.tell(ev.PeerDown(POLARIS, "the connection was lost", shell.now))
    assert shell.tick(0.1) == [ev.Look(POLARIS)]
    assert (
        ends(shell.tell(ev.PeerSeen(POLARIS, SEEN_GONE, "it died", shell.now)))[0][1] == "EndpointLostError"
    )


def test_an_endpoint_that_was_there_may_come_back() -> None:
    """F9."""
    shell, _ = working(1, endpoint_lost_s=600.0)
    shell.tell(ev.PeerDown(POLARIS, "the connection was lost", shell.now))
    for _ in range(50):
        for said in shell.tick(10.0):
            assert isinstance(said, ev.Look)
            assert shell.tell(ev.PeerSeen(POLARIS, SEEN_STOPPED, "it is stopped", shell.now)) == []
    shell.up(POLARIS, fresh=False)
    assert ends(shell.outcome(POLARIS, (id_of(1), m.OK, b"still there")))[0][1] == "ok"


def test_an_endpoint_out_of_reach_for_too_long_is_lost() -> None:
    """F3."""
    shell, _ = working(1, endpoint_lost_s=600.0)
    shell.tell(ev.PeerDown(POLARIS, "no answer", shell.now))
    assert ends(shell.tick(599)) == []
    ((_, how, raw),) = ends(shell.tick(2))
    assert how == "EndpointLostError"
    assert "no answer" in raw[1]


def test_what_cannot_be_found_ends_in_the_reason_why() -> None:
    """F3: the hub that would know where it is does not answer."""
    shell, lane = Shell(endpoint_lost_s=600.0), lane_at(POLARIS)
    silent = failures.make("HubUnavailableError", "the hub does not answer")
    shell.submit(task(lane, 1))
    for _ in range(60):
        assert ends(shell.tick(9.9)) == []
        shell.tell(ev.PeerSeen(POLARIS, SEEN_UNKNOWN, silent[1], shell.now, silent))
    assert ends(shell.tick(9.9)) == [("future 1", "HubUnavailableError", silent)]


def test_the_hub_is_no_excuse_for_an_endpoint_that_was_met() -> None:
    shell, lane = Shell(endpoint_lost_s=600.0), lane_at(POLARIS)
    silent = failures.make("HubUnavailableError", "the hub does not answer")
    shell.submit(task(lane, 1))
    shell.up(POLARIS)
    shell.tell(ev.PeerDown(POLARIS, "no answer", shell.now))
    shell.tell(ev.PeerSeen(POLARIS, SEEN_UNKNOWN, silent[1], shell.now, silent))
    ((_, how, raw),) = ends(shell.tick(601))
    assert how == "EndpointLostError"
    assert "the hub does not answer" in raw[1]


def test_waiting_costs_nothing_while_nobody_waits() -> None:
    shell, lane = working(1)
    shell.outcome(POLARIS, (id_of(1), m.OK, b""))
    shell.tell(ev.PeerDown(POLARIS, "", shell.now))
    assert shell.brain.deadline is None
    shell.now += 10_000
    shell.submit(task(lane, 2))
    assert ends(shell.tick(1)) == []


def test_a_refused_key_fails_what_is_open_and_soon_what_comes_later() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(task(lane, 1))
    refused = failures.make("AuthError", "your key was refused")
    assert shell.tell(ev.PeerRefused(POLARIS, refused, shell.now)) == []
    assert ends(shell.tick(1)) == [("future 1", "AuthError", refused)]
    shell.submit(task(lane, 2))
    for _ in range(10):
        for look in shell.tick(0.5):
            if isinstance(look, ev.Look):
                shell.tell(ev.PeerSeen(POLARIS, SEEN_RUNNING, "", shell.now))
    assert ("future 2", "AuthError", refused) in ends(shell.said)


def test_an_endpoint_that_refuses_us_by_one_way_may_let_us_in_by_another() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(task(lane, 1))
    shell.tell(ev.PeerRefused(POLARIS, failures.make("AuthError", "no"), shell.now))
    shell.up(POLARIS)
    assert ends(shell.tick(10)) == []
    shell.now += 100
    shell.tell(ev.PeerDown(POLARIS, "", shell.now))
    assert ends(shell.tick(10)) == []


def test_a_key_that_is_revoked_fails_what_is_open() -> None:
    shell, _ = working(1)
    shell.tell(ev.PeerRefused(POLARIS, failures.make("AuthError", "no more"), shell.now))
    shell.tell(ev.PeerDown(POLARIS, "", shell.now))
    ((_, how, _),) = ends(shell.tick(1))
    assert how == "AuthError"


def test_who_let_us_in_after_a_refusal_and_breaks_off_at_once_is_waited_for_without_hurry() -> None:
    """The hub told it of our key a moment too late; nothing of that refusal is left, and no deadline lies in the past."""
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(task(lane, 1))
    shell.tell(ev.PeerRefused(POLARIS, failures.make("AuthError", "no"), shell.now))
    shell.up(POLARIS)
    shell.tell(ev.PeerDown(POLARIS, "", shell.now))
    for _ in range(20):
        at = shell.brain.deadline
        assert at is not None
        shell.now = max(shell.now, at)
        assert ends(shell.tell(ev.Tick(shell.now))) == []
        assert shell.brain.deadline is not None
        assert shell.brain.deadline > shell.now, "it was met"


def test_an_old_refusal_by_a_way_that_was_not_needed_is_not_held_against_it() -> None:
    shell, _ = working(1)
    shell.tell(ev.PeerRefused(POLARIS, failures.make("AuthError", "no"), shell.now))
    shell.now += 100
    shell.tell(ev.PeerDown(POLARIS, "", shell.now))
    assert ends(shell.tick(10)) == []


def test_an_endpoint_that_forgot_loses_what_it_had_taken() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(task(lane, 1))
    said = shell.up(POLARIS)
    shell.submit(task(lane, 2))
    kept = sent(shell.said, m.SUBMIT)[-1:]
    assert said
    said = shell.tell(ev.PeerReset(POLARIS, kept, shell.now))
    ((holder, how, raw),) = ends(said)
    assert (holder, how) == ("future 1", "EndpointLostError")
    assert "submit it again" in raw[1]
    assert ends(shell.outcome(POLARIS, (id_of(2), m.OK, b"2"))) == [("future 2", "ok", b"2")]
    assert sent(shell.submit(task(lane, 3)), m.FUNCTION) == [[m.FUNCTION, *FN]]


def test_a_fetch_makes_the_endpoint_needed() -> None:
    shell = Shell()
    assert shell.tell(ev.FetchBegan(POLARIS, shell.now)) == [ev.Reach(POLARIS)]
    assert shell.brain.deadline is not None
    shell.tell(ev.FetchEnded(POLARIS))
    assert shell.brain.deadline is None


def test_a_full_peer_is_sent_no_tasks_until_it_has_room() -> None:
    shell, lane = working(1)
    shell.tell(ev.PeerFull(POLARIS, True))
    assert shell.submit(task(lane, 2), task(lane, 3)) == []
    assert ends(shell.tell(ev.CancelAsked("request", [id_of(2)], False, shell.now)))[0][1] == "cancelled"
    (message,) = sent(shell.tell(ev.PeerFull(POLARIS, False)), m.SUBMIT)
    assert [spec[0] for spec in message[6]] == [id_of(3)]


# ---------------------------------------------------------------------------------------------------- questions, ends


def test_attach() -> None:
    """F8."""
    shell = Shell()
    group = b"group:::::::::::"
    said = shell.tell(ev.AttachAsked("request", POLARIS, group, shell.now + 60, shell.now))
    assert said == [ev.Reach(POLARIS), ev.Send(POLARIS, [m.ATTACH, group])]
    shell.up(POLARIS)
    tasks = [[id_of(1), 3]]
    said = shell.tell(ev.Heard(POLARIS, [[m.TASKS, group, bytes(32), tasks]], shell.now))
    assert said == [ev.Answer("request", [bytes(32), tasks])]
    shell.tell(ev.AttachAsked("late", POLARIS, group, shell.now + 60, shell.now))
    (answer,) = shell.tick(61)
    assert answer.answer.failure[0] == "EndpointLostError"
    shell.tell(ev.AttachAsked("failed", POLARIS, group, shell.now + 60, shell.now))
    said = shell.tell(ev.PeerFailed(POLARIS, failures.make("AuthError", "no")))
    assert ev.Answer("failed", ev.Failure(failures.make("AuthError", "no"))) in said


def test_what_was_asked_is_asked_again_of_a_new_process() -> None:
    """Its answer may have died with the old one; what it had taken, it knows."""
    shell, lane, group = Shell(), lane_at(POLARIS), b"group:::::::::::"
    shell.submit(*[task(lane, number) for number in range(5)])
    shell.up(POLARIS)
    shell.tell(ev.CancelAsked("soft", [id_of(0), id_of(1)], False, shell.now))
    shell.tell(ev.CancelAsked("hard", [id_of(1), id_of(2)], True, shell.now))
    shell.tell(ev.CancelAsked("answered", [id_of(3)], False, shell.now))
    shell.tell(ev.Heard(POLARIS, [[m.CANCELLED, id_of(3), [False]]], shell.now))
    shell.tick(2)  # the user has been answered; the requests stand
    shell.tell(ev.AttachAsked("attach", POLARIS, group, shell.now + 60, shell.now))
    shell.tell(ev.ExplainAsked("explain", 7, [id_of(4)], shell.now))
    shell.tell(ev.PeerDown(POLARIS, "killed", shell.now))
    assert shell.up(POLARIS, fresh=False) == [], "the network alone was away"
    shell.tell(ev.PeerDown(POLARIS, "killed", shell.now))
    assert shell.up(POLARIS) == [
        ev.Send(POLARIS, [m.EXPLAIN, 7, id_of(4)]),
        ev.Send(POLARIS, [m.ATTACH, group]),
        ev.Send(POLARIS, [m.CANCEL, id_of(0), False]),
        ev.Send(POLARIS, [m.CANCEL, id_of(1) + id_of(2), True]),
    ]
    assert sent(shell.submit(task(lane, 9)), m.FUNCTION) == [], "it knows the function"


def test_the_first_meeting_repeats_nothing() -> None:
    shell, group = Shell(), b"group:::::::::::"
    shell.tell(ev.AttachAsked("attach", POLARIS, group, shell.now + 60, shell.now))
    assert shell.up(POLARIS) == []


def test_what_an_attach_has_pinned_is_let_go_of() -> None:
    """By its futures; and when TASKS comes twice or too late, for what has none."""
    shell, lane, group = Shell(), lane_at(POLARIS), b"group:::::::::::"
    shell.tell(ev.AttachAsked("attach", POLARIS, group, shell.now + 60, shell.now))
    shell.up(POLARIS)
    tasks = [m.TASKS, group, bytes(32), [[id_of(1), "done"], [id_of(2), "done"]]]
    assert shell.tell(ev.Heard(POLARIS, [tasks, tasks], shell.now)) == [
        ev.Answer("attach", [bytes(32), tasks[3]])
    ]
    shell.tell(ev.PeerFull(POLARIS, True))
    shell.tell(ev.Opened([(id_of(n), POLARIS, None, lane, f"future {n}") for n in (1, 2)], shell.now))
    assert lane.open == 2
    shell.tell(ev.Dropped([id_of(1)]))
    shell.tell(ev.Heard(POLARIS, [[m.OUTCOME, [[id_of(1), m.OK, b"", 1, None]]]], shell.now))
    assert sent(shell.said, m.UNSUBSCRIBE) == [[m.UNSUBSCRIBE, id_of(1)]], "also before it was subscribed to"
    said = shell.tell(ev.Heard(POLARIS, [tasks], shell.now))
    assert said == [ev.Send(POLARIS, [m.UNSUBSCRIBE, id_of(1)])]


def test_bytes_that_were_made_again_are_taken_from_the_later_attempt() -> None:
    shell, _ = working(1, 2)
    shell.outcome(POLARIS, (id_of(1), m.ALIAS, id_of(3) + POLARIS + TOKEN))
    shell.outcome(POLARIS, (id_of(2), m.STORED, 500_000), (id_of(3), m.STORED, 600_000))

    def hear(number: int, status: int, value: Any, attempt: int) -> list[Any]:
        item = [id_of(number), status, value, attempt, None]
        return shell.tell(ev.Heard(POLARIS, [[m.OUTCOME, [item]]], shell.now))

    assert hear(2, m.STORED, 500_000, 1) == [], "said again"
    assert hear(2, m.STORED, 500_001, 2) == [ev.Renewed([("future 2", m.STORED, 500_001, 2)])]
    assert hear(3, m.OK, b"small", 2) == [ev.Renewed([("future 1", m.OK, b"small", 2)])]
    assert hear(2, m.LOST, ["bytes_lost", ""], 3) == [], "who fetches it hears so"


def test_an_endpoint_that_is_away_is_looked_for_only_while_it_is_needed() -> None:
    """Rule 10; and soon: it may be back, at another address."""
    shell, lane = working(1)
    shell.outcome(POLARIS, (id_of(1), m.OK, b""))
    shell.tell(ev.PeerDown(POLARIS, "killed", shell.now))
    assert shell.brain.deadline is None
    assert shell.tick(1000) == []
    shell.submit(task(lane, 2))
    looks = [said for said in shell.tick(10) if isinstance(said, ev.Look)]
    assert 10 / LOOK_EVERY_S <= len(looks) <= 10 / LOOK_EVERY_S + 3
    assert LOOK_EVERY_S < 1


def test_explain() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(task(lane, 1))
    assert shell.tell(ev.ExplainAsked("early", 1, [id_of(1)], shell.now)) == [ev.Answer("early", None)]
    shell.up(POLARIS)
    said = shell.tell(ev.ExplainAsked("asked", 2, [id_of(1)], shell.now))
    assert said == [ev.Send(POLARIS, [m.EXPLAIN, 2, id_of(1)])]
    said = shell.tell(ev.Heard(POLARIS, [[m.EXPLAINED, 2, [{"state": "waiting"}]]], shell.now))
    assert said == [ev.Answer("asked", [{"state": "waiting"}])]
    shell.tell(ev.ExplainAsked("silent", 3, [id_of(1)], shell.now))
    assert shell.tick(2) == [ev.Answer("silent", None)]


def test_inside_a_task_one_agent_is_spoken_to() -> None:
    shell, lane = Shell(AGENT), lane_at(POLARIS)
    assert shell.submit(task(lane, 1)) == [ev.Reach(AGENT)]
    shell.tell(ev.Opened([(id_of(2), MIDWAY, TOKEN, None, "opened")], shell.now))
    said = shell.up(AGENT)
    assert {i.peer for i in said} == {AGENT}
    assert sent(said, m.SUBMIT)[0][1] == POLARIS
    assert sent(said, m.SUBSCRIBE)[0][1] == MIDWAY
    assert ends(shell.outcome(AGENT, (id_of(1), m.STORED, 9)))[0][2].home == POLARIS


def test_leaving_lets_go_of_what_is_done_but_not_of_arguments() -> None:
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(*[task(lane, number) for number in range(4)])
    shell.up(POLARIS)
    shell.outcome(POLARIS, *[(id_of(number), m.OK, b"") for number in range(3)])
    said = shell.tell(ev.Leaving(frozenset((POLARIS,)), frozenset((id_of(1),))))
    assert sent(said, m.UNSUBSCRIBE) == [[m.UNSUBSCRIBE, id_of(0) + id_of(2)]]
    assert shell.tell(ev.Leaving(frozenset((MIDWAY,)), frozenset())) == []


def test_tasks_that_cannot_be_written_fail() -> None:
    shell, _ = working(1)
    failure = failures.make("LocalProtocolError", "too large")
    assert ends(shell.tell(ev.Unsendable([id_of(1), id_of(8)], failure))) == [
        ("future 1", "LocalProtocolError", failure)
    ]


@pytest.mark.parametrize("kind", [m.SUBMIT, m.CANCEL, m.OFFER, 99])
def test_what_only_clients_say_is_not_heard(kind: int) -> None:
    shell = Shell()
    shell.tell(ev.FetchBegan(POLARIS, shell.now))
    assert shell.tell(ev.Heard(POLARIS, [[kind]], shell.now)) == []
    assert shell.tell(ev.Heard(MIDWAY, [[m.OUTCOME, []]], shell.now)) == []


# ------------------------------------------------------------------------------------------------- in any order at all

PEERS = (POLARIS, MIDWAY)
STATUSES = (m.OK, m.STORED, m.FAILED, m.CANCELLED_STATUS, m.LOST, m.ALIAS, m.PENDING)
numbers = st.integers(0, 9)
elsewhere = st.integers(0, 9) | st.integers(1000, 1003)
peers = st.sampled_from(PEERS)


class AnyOrder(RuleBasedStateMachine):
    """Beside it an obvious twin: each future ends once, each pin that was sent is let go of at most once."""

    @initialize(relayed=st.booleans())
    def begin(self, relayed: bool) -> None:
        self.shell = Shell(AGENT if relayed else None, endpoint_lost_s=50.0)
        self.lanes = {home: lane_at(home, 3) for home in PEERS}
        self.made = 0
        self.serial = itertools.count()
        self.live: dict[str, bytes] = {}  # futures that the user holds
        self.kept: list[bytes] = []  # by references in values
        self.ids: dict[str, bytes] = {}
        self.asked_again: set[bytes] = set()
        self.ended: dict[str, str] = {}
        self.pinned: set[bytes] = set()

    def tell(self, event: Any) -> None:
        for said in self.shell.tell(event):
            match said:
                case ev.Settle(items):
                    for holder, state, _, _, _ in items:
                        # What somebody asked for again is told again to all that stand for it, and changes nothing.
                        assert holder not in self.ended or self.ids[holder] in self.asked_again
                        self.ended[holder] = state
                case ev.Send(_, [m.SUBMIT, _, _, _, _, _, specs]):
                    self.pinned.update(spec[0] for spec in specs)
                case ev.Send(_, [m.OFFER, _, _, _, items]) | ev.Send(_, [m.SUBSCRIBE, _, items]):
                    self.pinned.update(item[0] for item in items)
                case ev.Send(_, [m.UNSUBSCRIBE, joined]):
                    gone = [joined[at : at + 16] for at in range(0, len(joined), 16)]
                    assert len(set(gone)) == len(gone)
                    for id in gone:
                        assert id in self.pinned, "unsubscribed once, and only what was pinned"
                        self.pinned.discard(id)

    def hold(self, holder: str, number: int) -> None:
        self.live[holder] = self.ids[holder] = id_of(number)

    @property
    def away(self) -> list[bytes]:
        return [peer.id for peer in self.shell.brain.peers.values()]

    @rule(home=peers, count=st.integers(1, 5), other=st.booleans())
    def submit(self, home: bytes, count: int, other: bool) -> None:
        tasks = []
        for number in range(self.made, self.made + count):
            tasks.append(task(self.lanes[home], number, OTHER_FN if other else FN))
            self.hold(f"future {number}", number)
        self.made += count
        self.tell(ev.Submitted(tasks, self.shell.now))

    @rule(home=peers)
    def put(self, home: bytes) -> None:
        number, self.made = self.made, self.made + 1
        self.hold(f"future {number}", number)
        spec = (self.lanes[home], id_of(number), 4, b"blob", (), f"future {number}")
        self.tell(ev.Offered([spec], self.shell.now))

    @rule(number=elsewhere, home=peers)
    def open_reference(self, number: int, home: bytes) -> None:
        # Ids are never used again: what was not made here will not be.
        number = number if number >= 1000 else number % self.made if self.made else 1000
        holder = f"again {next(self.serial)}"
        self.hold(holder, number)
        self.asked_again.add(id_of(number))
        self.tell(ev.Opened([(id_of(number), home, TOKEN, None, holder)], self.shell.now))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.live)))
        self.tell(ev.Dropped([self.live.pop(holder)]))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        self.kept.append(self.live[data.draw(st.sampled_from(sorted(self.live)))])
        self.tell(ev.Kept([self.kept[-1]]))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop_kept(self, data: st.DataObject) -> None:
        self.tell(ev.Dropped([self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))]))

    @precondition(lambda self: self.away)
    @rule(data=st.data(), number=elsewhere, status=st.sampled_from(STATUSES), other=elsewhere, home=peers)
    def outcome(self, data: st.DataObject, number: int, status: int, other: int, home: bytes) -> None:
        value: Any = {
            m.OK: b"blob",
            m.STORED: 5,
            m.FAILED: failures.make("TaskError", "no"),
            m.LOST: ["released", "gone"],
            m.ALIAS: id_of(other if other < self.made or other >= 1000 else 1000) + home + TOKEN,
        }.get(status)
        if status == m.ALIAS:
            self.asked_again.add(value[:16])
        peer = data.draw(st.sampled_from(self.away))
        message = [m.OUTCOME, [[id_of(number), status, value, 1, None]]]
        self.tell(ev.Heard(peer, [message], self.shell.now))

    @precondition(lambda self: self.away)
    @rule(data=st.data(), what=st.integers(0, 7), number=numbers, flag=st.booleans())
    def happens(self, data: st.DataObject, what: int, number: int, flag: bool) -> None:
        now = self.shell.now
        peer = data.draw(st.sampled_from(self.away))
        events: list[Any] = [
            ev.PeerUp(peer, flag, now),
            ev.PeerDown(peer, "down", now),
            ev.PeerReset(peer, [], now),
            ev.PeerFailed(peer, failures.make("AuthError", "no")),
            ev.PeerRefused(peer, failures.make("AuthError", "no"), now),
            ev.PeerFull(peer, flag),
            ev.Heard(peer, [[m.CANCELLED, id_of(number), [flag]]], now),
            ev.PeerSeen(peer, SEEN_STOPPED if flag else SEEN_GONE, "stopped", now),
        ]
        self.tell(events[what])

    @rule(wanted=st.lists(numbers, max_size=4), force=st.booleans())
    def cancel(self, wanted: list[int], force: bool) -> None:
        self.tell(ev.CancelAsked("request", [id_of(number) for number in wanted], force, self.shell.now))

    @rule(seconds=st.sampled_from((0.1, 1.5, 60.0)))
    def time_passes(self, seconds: float) -> None:
        until = self.shell.now + seconds
        for _ in range(1000):
            at = self.shell.brain.deadline
            if at is None or at > until:
                break
            self.shell.now = max(self.shell.now, at)
            self.tell(ev.Tick(self.shell.now))
        else:
            raise AssertionError("a deadline is met by its tick")
        self.shell.now = until

    @invariant()
    def every_wait_has_an_end(self) -> None:
        for holder, id in getattr(self, "live", {}).items():
            if holder not in self.ended:
                entry = self.shell.brain.find(id)
                assert entry is not None, "a future that has not ended is known"

    def teardown(self) -> None:
        """However it went: when every endpoint fails, every future has ended; when all are dropped, nothing is left."""
        for peer in getattr(self, "away", []) if hasattr(self, "shell") else []:
            self.tell(ev.PeerFailed(peer, failures.make("AuthError", "the end")))
        if hasattr(self, "shell"):
            assert set(self.live) <= set(self.ended)
            for id in [*self.live.values(), *self.kept]:
                self.tell(ev.Dropped([id]))
            assert self.shell.brain.entries == {}
            assert all(lane.open == 0 for lane in self.lanes.values())


TestAnyOrder = AnyOrder.TestCase


@given(st.lists(st.tuples(numbers, st.sampled_from(STATUSES)), max_size=30))
def test_an_outcome_counts_once(items: list[tuple[int, int]]) -> None:
    """F10."""
    shell, lane = Shell(), lane_at(POLARIS)
    shell.submit(*[task(lane, number) for number in range(5)])
    shell.up(POLARIS)
    for number, status in items:
        if status == m.ALIAS:
            continue
        value: Any = {
            m.OK: b"",
            m.STORED: 5,
            m.FAILED: failures.make("TaskError", ""),
            m.LOST: ["released", ""],
        }.get(status)
        shell.outcome(POLARIS, (id_of(number), status, value))
    holders = [holder for holder, _, _ in ends(shell.said)]
    assert len(holders) == len(set(holders))
