"""The story of a task: what EXPLAIN's answers look like to people."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref import ids
from gcref.sdk import story

POLARIS, MIDWAY = b"P" * 16, b"M" * 16
NAMES = {POLARIS: "endpoint 'polaris'", MIDWAY: "endpoint 'midway'"}


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def task(number: int, state: str, home: bytes = POLARIS, **more: Any) -> dict[str, Any]:
    return {"id": id_of(number), "home": home, "state": state, "task": True, "attempt": 1, **more}


def tell(root: dict[str, Any], *elsewhere: dict[str, Any]) -> str:
    lines = story.tell(root, {node["id"]: node for node in elsewhere}, lambda home: NAMES[home])
    return "\n".join(line.replace("00000000-0000-0000-0000-00000000000", "#") for line in lines)


def test_a_whole_story() -> None:
    mesh = task(
        2,
        "dispatched",
        function="mesh",
        worker="polaris/2",
        pid=4712,
        running_s=11.0,
        retries=3,
        attempt=2,
        age_s=60.0,
        tries=["attempt 1: WorkerLostError: the worker process was killed by SIGKILL"],
    )
    field = {
        "id": id_of(3), "home": MIDWAY, "state": "waiting", "at_home": True, "pulling": True, "size": 1 << 30,
        "pull": [1 << 28, 1 << 30, "direct"],
    }  # fmt: skip
    root = task(
        1,
        "waiting",
        function="simulate",
        missing=2,
        age_s=65.0,
        waits_for=[mesh, field],
        told_by=POLARIS,
        links={MIDWAY: {"up": True, "carrier": "direct", "since_s": 130.0, "rtt_s": 0.0003}},
    )
    assert tell(root) == (
        """\
task #1 (simulate) at endpoint 'polaris': waiting for 2 arguments
│ submitted 1 min 5 s ago
├─ task #2 (mesh) at endpoint 'polaris': running on worker polaris/2 (process 4712) for 11 s
│    submitted 1 min ago, attempt 2 of 4
│    attempt 1 failed: WorkerLostError: the worker process was killed by SIGKILL
└─ object #3 at endpoint 'midway': done there; its bytes are on their way: 256.0 MiB of 1.0 GiB (25 %) by direct
     endpoint 'midway' is reached by direct since 2 min 10 s, round trip 0.3 ms"""
    )


def test_why_a_better_way_was_not_taken() -> None:
    direct = {"carrier": "direct", "address": "tcp://10.0.0.7:4000", "dialled": True, "error": "no answer"}
    broker = {"carrier": "broker", "address": "mailbox://4d", "dialled": True, "error": "it was down once"}
    theirs = {"carrier": "direct", "address": None, "dialled": False, "error": "the connection was lost"}
    told = {"up": True, "carrier": "broker", "links": [direct, broker, theirs]}
    assert story.link(told, "midway") == (
        "midway is reached by broker; tried direct tcp://10.0.0.7:4000: no answer"
    )
    assert story.link({**told, "carrier": "direct"}, "midway") == "midway is reached by direct"
    assert story.link({**told, "up": False, "carrier": None}, "midway") == (
        "midway is out of reach; tried direct tcp://10.0.0.7:4000: no answer; "
        "tried broker mailbox://4d: it was down once"
    )


def test_what_is_elsewhere_is_told_by_its_home() -> None:
    far = {"id": id_of(2), "home": MIDWAY, "state": "waiting", "at_home": False}
    root = task(1, "waiting", missing=1, waits_for=[far], told_by=POLARIS)
    assert story.open_elsewhere(root) == {MIDWAY: [id_of(2)]}
    assert "object #2 at endpoint 'midway': not done there yet" in tell(root)
    told = task(2, "ready", MIDWAY, ahead=3, function="mesh", told_by=MIDWAY)
    assert "└─ task #2 (mesh) at endpoint 'midway': queued, behind 3 other tasks" in tell(root, told)


def test_many_arguments_and_shared_ones() -> None:
    shared = {"id": id_of(9), "home": POLARIS, "state": "waiting", "again": True}
    root = task(1, "waiting", missing=4000, waits_for=[task(9, "ready", ahead=0), shared])
    text = tell(root)
    assert "queued, next in line" in text
    assert "#9 at endpoint 'polaris': see above" in text
    assert text.splitlines()[-1].endswith("… and 3,998 more")


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"state": "unknown"}, "not yours to see"),
        ({"state": "released"}, "released"),
        ({"state": "expected", "expires_s": 30.0}, "nobody has submitted it yet; given up in 30 s"),
        (task(1, "waiting", becomes=[task(2, "ready", ahead=1)]), "returned another task's future"),
        (task(1, "waiting", missing=1, unconfirmed=1), "1 reference inside its result"),
        (task(1, "waiting", missing=1, function_missing=True), "waiting for the code of its function"),
        (task(1, "waiting", missing=1, upload={"id": id_of(7), "size": 2048}), "of its arguments from its submitter: 2.0"),
        (task(1, "ready"), "queued, far behind"),
        (task(1, "dispatched", worker="p/1", ahead=2), "sent to worker p/1, behind 2 other tasks"),
        (task(1, "dispatched", worker="p/1", missing=1), "sent ahead to worker p/1, which makes its arguments"),
        (task(1, "dispatched", worker="p/1", running_s=3.0, blocked=True), "for 3.0 s, waiting inside for another task"),
        (task(1, "dispatched", worker="p/1", running_s=3.0, walltime_s=60.0), "for 3.0 s of at most 1 min"),
        (task(1, "done", size=2048, record=[1.0, 2.0, 3.5, "p/1", 1, None]), "2.0 KiB; it ran 1.5 s on worker p/1"),
        (task(1, "failed", failure="ValueError: no"), "failed: ValueError: no"),
        (task(1, "cancelled"), "cancelled"),
        (task(1, "waiting", home=MIDWAY, links={MIDWAY: {"up": False, "given_up_in_s": 90.0, "links": []}}),
         "endpoint 'midway' is out of reach, and given up in 1 min 30 s"),
    ],
)  # fmt: skip
def test_every_state_has_its_words(node: dict[str, Any], words: str) -> None:
    assert words in tell(node)


def test_attempts_that_failed() -> None:
    told = task(
        1, "ready", ahead=0, attempt=3, tries=["attempt 1: E: first", "attempt 2: E: second\nits last words"]
    )
    assert list(story.tries(told)) == [
        "attempt 1 failed: E: first",
        "attempt 2 failed: E: second",
        "  its last words",
    ]


nodes = st.recursive(
    st.fixed_dictionaries(
        {"id": st.integers(0, 9).map(id_of), "home": st.sampled_from([POLARIS, MIDWAY])},
        optional={
            "state": st.sampled_from(
                ["waiting", "ready", "dispatched", "done", "failed", "lost", "expected", "new"]
            ),
            "task": st.booleans(),
            "missing": st.integers(0, 20),
            "attempt": st.integers(0, 5),
            "at_home": st.booleans(),
            "pulling": st.booleans(),
            "running_s": st.floats(0, 1e6),
            "tries": st.lists(st.text(max_size=5), max_size=3),
            "again": st.booleans(),
        },
    ),
    lambda inner: st.builds(
        lambda node, children: {**node, "waits_for": children},
        st.fixed_dictionaries(
            {"id": st.just(id_of(1)), "home": st.just(POLARIS), "state": st.just("waiting")}
        ),
        st.lists(inner, max_size=3),
    ),
    max_leaves=8,
)


@given(nodes, st.lists(nodes, max_size=3))
def test_whatever_endpoints_say_there_is_a_story(root: dict[str, Any], others: list[dict[str, Any]]) -> None:
    text = tell(root, *others)
    assert ids.text(root["id"])[-1] in text
    story.open_elsewhere(root)
