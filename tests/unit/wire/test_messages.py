"""The shapes of messages: what is right passes, and one wrong field is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref.errors import RemoteProtocolError
from gcref.wire import messages as m

ID, HOME, GROUP, DIGEST, TOKEN = b"i" * 16, b"h" * 16, b"g" * 16, b"d" * 16, b"t" * 16
REF, SECRET = b"r" * 48, b"s" * 32
FAILURE = [
    "raised",
    "no",
    {"traceback": "…"},
    b"pickle",
    ["WorkerLostError", "gone", {"signal": 9}, None, None],
]
RECORD = [1.0, 2.0, 3.0, "w1", 1, {"direct": 5}, "out", "err"]
TASK = [ID, 0, b"payload", None, None, None]

GOOD: dict[str, list[Any]] = {
    "submit": [m.SUBMIT, HOME, GROUP, SECRET, {"retries": 2, "walltime_s": 1.5, "resources": {}}, [DIGEST], [TASK]],
    "submit with everything": [
        m.SUBMIT, HOME, GROUP, SECRET, {}, [], [[ID, -1, None, REF * 2, REF, [ID, 1 << 40]], [ID, -1, b"", b"", None, None]],
    ],
    "function": [m.FUNCTION, DIGEST, b"code"],
    "need_function": [m.NEED_FUNCTION, [DIGEST]],
    "started": [m.STARTED, [[ID, 1, 1.5]]],
    "outcome": [
        m.OUTCOME,
        [
            [ID, m.OK, b"blob", 1, None],
            [ID, m.OK, b"blob", 1, [1.0, 2.0, 3.0, "w", 1, None, None, None]],
            [ID, m.STORED, 1 << 40, 1, RECORD],
            [ID, m.FAILED, FAILURE, 1, [None, None, None, None, 0, None, None, None]],
            [ID, m.CANCELLED_STATUS, None, 0, None],
            [ID, m.LOST, ["released", "it was released"], 0, None],
            [ID, m.ALIAS, REF, 1, None],
            [ID, m.PENDING, None, 0, None],
        ],
    ],
    "subscribe": [m.SUBSCRIBE, HOME, [[ID, TOKEN, 1, True], [ID, None, None, False]]],
    "unsubscribe": [m.UNSUBSCRIBE, ID * 3],
    "forget": [m.FORGET, b""],
    "cancel": [m.CANCEL, ID, True],
    "cancelled": [m.CANCELLED, ID * 2, [True, False]],
    "attach": [m.ATTACH, GROUP],
    "tasks": [m.TASKS, GROUP, SECRET, [[ID, 3], [ID, "done"]]],
    "offer": [m.OFFER, HOME, GROUP, SECRET, [[ID, 4, b"blob"], [ID, 1 << 40, None]]],
    "explain": [m.EXPLAIN, 1, ID],
    "explained": [m.EXPLAINED, 1, [{"state": "waiting"}]],
    "status": [m.STATUS, 1],
    "status_is": [m.STATUS_IS, 1, {}],
    "pins": [m.PINS, ID * 2, False],
    "try": [m.TRY, 1, ID, {"name": "midway"}],
    "try nobody": [m.TRY, 1, None, None],
    "tried": [m.TRIED, 1, {}],
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_right_messages_pass_with_new_fields_too(name: str) -> None:
    message = GOOD[name]
    assert m.check(message) == message[0]
    assert m.check([*message, "a field of the future"]) == message[0]


@pytest.mark.parametrize("name", GOOD)
def test_missing_fields_are_refused(name: str) -> None:
    message = GOOD[name]
    for length in range(len(message)):
        with pytest.raises(RemoteProtocolError):
            m.check(message[:length])


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("wrong", [object, lambda: 1.5j, lambda: [[]]])
def test_no_field_takes_anything(name: str, wrong: Any) -> None:
    for place in range(1, len(GOOD[name])):
        message = copy.deepcopy(GOOD[name])
        message[place] = wrong()
        with pytest.raises(RemoteProtocolError):
            m.check(message)


def replaced(name: str, *path: Any) -> list[Any]:
    """A good message with another value at a path of places, such as 6, 0, 1: id of the first task."""
    message = copy.deepcopy(GOOD[name])
    *places, last, value = path
    inner: Any = message
    for place in places:
        inner = inner[place]
    inner[last] = value
    return message


@pytest.mark.parametrize(
    "message",
    [
        replaced("submit", 1, b"short"),
        replaced("submit", 3, b"short"),
        replaced("submit", 4, {"retries": -1}),
        replaced("submit", 4, {"retries": True}),
        replaced("submit", 4, {"walltime_s": 0}),
        replaced("submit", 4, {"resources": []}),
        replaced("submit", 5, [b"short"]),
        replaced("submit", 6, 0, 0, b"short"),
        replaced("submit", 6, 0, 1, 1),  # there is one function only
        replaced("submit", 6, 0, 1, -2),
        replaced("submit", 6, 0, 1, False),
        replaced("submit", 6, 0, 2, None),  # neither payload nor args
        replaced("submit", 6, 0, 2, "text"),
        replaced("submit", 6, 0, 3, REF[:-1]),
        replaced("submit", 6, 0, 4, "refs"),
        replaced("submit", 6, 0, 5, [ID, 1]),  # both
        replaced("submit", 6, 0, "task"),
        replaced("submit", 6, 0, TASK[:5]),
        replaced("submit with everything", 6, 0, 5, [ID, -1]),
        replaced("submit with everything", 6, 0, 5, [ID]),
        replaced("need_function", 1, [b"short"]),
        replaced("started", 1, 0, 2, "now"),
        replaced("outcome", 1, 0, 1, 99),
        replaced("outcome", 1, 0, 1, False),
        replaced("outcome", 1, 0, 1, "ok"),
        replaced("outcome", 1, 0, 2, "text"),
        replaced("outcome", 1, 0, 3, -1),
        replaced("outcome", 1, 1, 4, []),
        replaced("outcome", 1, 1, 4, 0, "yesterday"),
        replaced("outcome", 1, 2, 2, -1),
        replaced("outcome", 1, 2, 4, 3, b"worker"),
        replaced("outcome", 1, 2, 4, 5, {"direct": "much"}),
        replaced("outcome", 1, 2, 4, 5, []),
        replaced("outcome", 1, 2, 4, 6, b"out"),
        replaced("outcome", 1, 2, 4, 7, "e" * (m.MAX_TEXT + 1)),
        replaced("outcome", 1, 3, 2, None),
        replaced("outcome", 1, 3, 2, 3, "pickle"),
        replaced("outcome", 1, 3, 2, 4, "cause"),
        replaced("outcome", 1, 5, 2, ["released"]),
        replaced("outcome", 1, 6, 2, REF[:-1]),
        replaced("subscribe", 2, 0, 1, b"short"),
        replaced("subscribe", 2, 0, 3, 1),
        replaced("unsubscribe", 1, ID[:-1]),
        replaced("cancel", 2, 1),
        replaced("pins", 1, ID[:-1]),
        replaced("pins", 2, 1),
        replaced("cancelled", 2, [True]),
        replaced("cancelled", 2, [True, 0]),
        replaced("tasks", 3, 0, 0, b""),
        replaced("offer", 4, 0, 1, 5),  # the blob has four bytes
        replaced("explained", 2, ["text"]),
        [],
        [0],
        [99],
        [m.STARTED, [{}]],
        [True, ID],
        ["SUBMIT"],
        [[]],
        "SUBMIT",
        None,
    ],
)
def test_one_wrong_field_is_enough(message: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        m.check(message)


def test_a_chain_of_causes_is_bounded_and_costs_no_recursion() -> None:
    failure: list[Any] | None = None
    for _ in range(5000):
        failure = ["raised", "no", {}, None, failure]
    with pytest.raises(RemoteProtocolError):
        m.check([m.OUTCOME, [[ID, m.FAILED, failure, 1, None]]])


def test_every_kind_has_a_name_and_a_check() -> None:
    kinds = set(m.NAMES)
    assert kinds == set(m._CHECKS)
    assert {message[0] for message in GOOD.values()} >= kinds - {m.FETCH, m.CHUNK, m.BULK_HELLO}
    assert len(set(m.NAMES.values())) == len(m.NAMES)


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=50) | st.text(max_size=5)
    | st.sampled_from([ID, REF, SECRET, TASK, FAILURE, RECORD, [ID, 0, b"", None, None, None]]),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=15,
)  # fmt: skip


@given(st.sampled_from(sorted(m.NAMES)), st.lists(ANYTHING, max_size=9))
def test_any_value_is_a_message_or_a_remote_protocol_error(kind: int, fields: list[Any]) -> None:
    try:
        m.check([kind, *fields])
    except RemoteProtocolError:
        pass


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_a_right_message_with_one_value_exchanged_never_does_more_than_be_refused(
    name: str, data: Any
) -> None:
    message = copy.deepcopy(GOOD[name])
    inner: Any = message
    while True:
        place = data.draw(st.integers(0, len(inner) - 1))
        if not (isinstance(inner[place], list) and inner[place] and data.draw(st.booleans())):
            break
        inner = inner[place]
    inner[place] = data.draw(ANYTHING)
    try:
        m.check(message)
    except RemoteProtocolError:
        pass
