"""What the agent's brains tell people: EXPLAIN of the resolver, places of tasks and what workers do, in bounded size."""

from __future__ import annotations

from typing import Any

from gcref.brains import dispatch_events as dp
from gcref.brains import resolver_events as ev
from gcref.brains import resolver_facts as facts
from gcref.brains.dispatch import Dispatch
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, Extra, Task
from gcref.objects import failure as failures
from gcref.wire import codec
from gcref.wire import messages as m
from tests.unit.brains.dispatch_twin import make_task
from tests.unit.brains.sites import CLIENT, GROUP, SECRET, USER, object_id, ref_to

HERE = b"H" * 16
THERE = b"T" * 16
STRANGER = ev.Who(b"s" * 16, "user", b"another owner", "client")


def resolver() -> Resolver:
    return Resolver(HERE, unknown_object_s=600, lease_s=86400)


def submit(r: Resolver, *tasks: list[Any], fns: list[bytes] | None = None, **opts: Any) -> None:
    r.handle(ev.Submitted(USER, HERE, GROUP, SECRET, opts, fns or [], list(tasks), 1.0, 1000.0))


def task(number: int, *deps: bytes, fn: int = -1, args: list[Any] | None = None) -> list[Any]:
    return [object_id(number), fn, None if args else b"payload", b"".join(deps) or None, None, args]


def local(number: int) -> bytes:
    return ref_to(object_id(number), HERE)


def far(number: int) -> bytes:
    return ref_to(object_id(number), THERE)


def finish(r: Resolver, number: int, status: int, value: Any, refs: bytes | None = None) -> None:
    found = r.objects[object_id(number)]
    assert isinstance(found, Task)
    found.state = DISPATCHED
    r.handle(ev.Finished("here/1", [[1, found.id, found.attempt, status, value, 1.0, 0.5, refs, None]]))


def explain(r: Resolver, number: int, who: ev.Who = USER) -> dict[str, Any]:
    nodes = r.explain(object_id(number), who, 1.0)
    assert len(nodes) <= facts.NODES_MAX
    codec.pack(nodes[0].told)  # it is to cross the wire
    return nodes[0].told


def test_it_tells_what_a_task_waits_for_and_how_that_stands() -> None:
    r = resolver()
    submit(r, task(1), task(2, local(1)), task(3, local(2), far(9)), retries=2)
    told = explain(r, 3)
    assert (told["state"], told["missing"], told["attempt"], told["retries"]) == ("waiting", 2, 1, 2)
    mine, other = told["waits_for"]
    assert (mine["id"], mine["state"], mine["waits_for"][0]["state"]) == (object_id(2), "waiting", "ready")
    assert (other["home"], other["state"], other["at_home"]) == (THERE, "waiting", False)
    r.handle(ev.Outcomes(THERE, [[object_id(9), m.STORED, 1 << 20, 1, None]], "direct"))
    other = explain(r, 3)["waits_for"][1]
    assert (other["at_home"], other["pulling"], other["size"]) == (True, True, 1 << 20)


def test_it_tells_what_has_become_of_a_task() -> None:
    r = resolver()
    submit(r, task(1), task(2), task(3))
    finish(r, 1, m.OK, b"value")
    told = explain(r, 1)
    assert (told["state"], told["size"], told["record"][3]) == ("done", 5, "here/1")
    finish(r, 2, m.FAILED, ["raised", "ValueError: no such mesh", {}, None, None])
    assert explain(r, 2)["failure"] == "ValueError: no such mesh"
    r.handle(ev.Unsubscribed(USER, [object_id(1)]))
    assert explain(r, 1)["state"] == "released"
    assert explain(r, 77)["state"] == "unknown"
    finish(r, 3, m.ALIAS, far(8))
    assert explain(r, 3)["becomes"][0]["id"] == object_id(8)


def test_it_tells_what_has_to_come_before_a_task_can_start() -> None:
    r = resolver()
    digest = b"f" * 16
    submit(r, task(1, fn=0), fns=[digest])
    assert explain(r, 1)["function_missing"] is True
    r.handle(ev.FunctionsKnown([digest]))
    assert "function_missing" not in explain(r, 1)
    submit(r, task(2, args=[object_id(20), 4096]))
    assert explain(r, 2)["upload"] == {"id": object_id(20), "size": 4096}


def test_a_task_that_nobody_has_submitted_yet_is_expected() -> None:
    r = resolver()
    submit(r, task(1, local(5)))
    told = explain(r, 5)
    assert told["state"] == "expected"
    assert told["expires_s"] == 600
    assert explain(r, 1)["waits_for"][0]["state"] == "expected"


def test_a_result_that_waits_for_a_confirmation_says_so() -> None:
    r = resolver()
    submit(r, task(1))
    finish(r, 1, m.OK, b"with a reference inside", refs=far(9))
    assert explain(r, 1)["unconfirmed"] == 1


def test_the_attempts_that_failed_are_told() -> None:
    r = resolver()
    submit(r, task(1), retries=3)
    found = r.objects[object_id(1)]
    assert isinstance(found, Task)
    found.state = DISPATCHED
    lost = failures.make("WorkerLostError", "the worker process was killed by SIGKILL")
    r.handle(ev.Ended([found], lost, True))
    told = explain(r, 1)
    assert told["attempt"] == 2
    assert len(told["tries"]) == 1
    assert "SIGKILL" in told["tries"][0]


def test_strangers_learn_nothing() -> None:
    r = resolver()
    submit(r, task(1), task(2, local(1), far(9)))
    assert explain(r, 2, STRANGER) == {"id": object_id(2), "state": "unknown"}
    assert explain(r, 9, STRANGER) == {"id": object_id(9), "state": "unknown"}
    # Who may read a task learns of an argument that is somebody else's only whether it is there.
    other = ev.Who(b"o" * 16, "user", b"another owner", "client")
    token = local(1)[32:]
    r.handle(
        ev.Submitted(
            other, HERE, b"g" * 16, b"s" * 32, {}, [], [task(3, object_id(1) + HERE + token)], 1.0, 1.0
        )
    )
    (argument,) = explain(r, 3, other)["waits_for"]
    assert argument == {"id": object_id(1), "home": HERE, "state": "ready"}


def test_it_stays_small_however_large_the_graph_is() -> None:
    r = resolver()
    chain = [task(number, local(number - 1)) for number in range(1, 5000)]
    submit(r, *chain)
    told = explain(r, 4999)
    depth = 0
    while told.get("waits_for"):
        (told,) = told["waits_for"]
        depth += 1
    assert depth == facts.DEPTH_MAX
    submit(r, task(10_000, *[local(number) for number in range(4000)]))
    told = explain(r, 10_000)
    assert len(told["waits_for"]) == facts.ARGUMENTS_MAX
    assert told["missing"] == 4000
    diamonds = [
        task(20_000 + n, *[local(20_000 + n - 1 - k) for k in range(4) if n > k]) for n in range(1, 60)
    ]
    submit(r, *diamonds)
    explain(r, 20_059)


def test_the_overview_is_bounded() -> None:
    r = resolver()
    submit(r, *[task(number) for number in range(facts.SCAN_MAX + 10)])
    told = r.describe()
    assert told["objects"] == facts.SCAN_MAX + 10
    assert told["looked_at"] == sum(told["states"].values()) == facts.SCAN_MAX
    assert len(told["oldest_unfinished"]) == facts.SAMPLE_MAX
    assert told["counts"]["submitted"] == facts.SCAN_MAX + 10


def test_the_overview_tells_who_keeps_what() -> None:
    r = resolver()
    submit(r, task(1))
    finish(r, 1, m.OK, b"v")
    (kept,) = r.describe()["oldest_kept"]
    assert (kept["id"], kept["state"], kept["pins"], kept["holds"]) == (object_id(1), "done", [CLIENT], 0)


def place(dispatch: Dispatch, task: Task, progress: dict[int, int], now: float) -> dict[str, Any]:
    return dispatch.places_of([task], progress, now)[task]


def test_where_tasks_are_and_what_workers_do() -> None:
    dispatch = Dispatch(1, max_extra=0, now=0.0)
    first, second, third = make_task(), make_task(), make_task()
    dispatch.handle(dp.Ready([first, second, third], 0.0))
    assert place(dispatch, third, {}, 1.0) == {"ahead": 2}
    assert dispatch.head(2) == [first, second]
    dispatch.handle(dp.WorkerUp(1, 1.0))
    assert place(dispatch, first, {1: 0}, 1.5) == {"worker": 1, "sent_s": 0.5, "ahead": 0}
    found = place(dispatch, first, {1: first.seq}, 3.0)
    assert (found["running_s"], found["blocked"]) == (2.0, False)
    assert place(dispatch, second, {1: first.seq}, 3.0) == {"ahead": 0}
    (worker,) = dispatch.describe({1: first.seq}, 3.0)["workers"]
    assert (worker["state"], worker["running"], worker["for_s"], worker["held"]) == ("busy", first.id, 2.0, 1)
    dispatch.handle(dp.Blocked(1, first, 4.0))
    found = place(dispatch, first, {1: first.seq}, 5.0)
    assert found["running_s"] == 4.0


def test_explaining_changes_nothing() -> None:
    r = resolver()
    submit(r, task(1), task(2, local(1), far(9)))
    found = r.objects[object_id(9)]
    assert isinstance(found.extra, Extra)
    explain(r, 2)
    explain(r, 9, STRANGER)
    r.describe()
    r.validate()
    assert CLIENT in r.objects[object_id(1)].pins
    assert r.handle(ev.Tick(1.0)) == []
