"""The tree of errors: as drawn, and each one survives pickling with all that it carries."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import threading

import pytest

from gcref import errors
from gcref.errors import (
    DependencyError,
    GcrefError,
    LostReason,
    ObjectLostError,
    SerializationError,
    TaskError,
    WalltimeExceededError,
)

TREE = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, GcrefError)]

# A value for each declared field, by name; a new field needs one here.
VALUES: dict[str, object] = {
    "argument": "argument 2",
    "endpoint_id": "an id",
    "exit_code": 3,
    "file": "config.toml",
    "key": "token",
    "limit_bytes": 10,
    "local": 1,
    "module": "my_module",
    "needed_bytes": 11,
    "object_id": "another id",
    "reason": LostReason.CORRUPT,
    "remedy": "write it",
    "remote": 2,
    "signal": 9,
    "stderr": "last words",
    "task_id": "a task",
    "task_ids": ("a", "b"),
    "text": "no",
    "traceback": "Traceback",
    "type_name": "m.E",
    "walltime_s": 1.5,
}


def fields_of(cls: type[GcrefError]) -> dict[str, object]:
    names = {
        name for base in cls.__mro__ if issubclass(base, GcrefError) for name in inspect.get_annotations(base)
    }
    return {name: VALUES[name] for name in names - {"retryable"}}


class NeedsTwoError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize("cls", TREE)
def test_every_error_survives_pickling_with_fields_notes_and_cause(cls: type[GcrefError]) -> None:
    error = cls("what happened", **fields_of(cls))
    error.add_note("by the way")
    error.__cause__ = ValueError("the root")
    for back in (pickle.loads(pickle.dumps(error)), pickle.loads(pickle.dumps(error, 2)), copy.copy(error)):
        assert type(back) is cls
        assert str(back) == "what happened"
        assert {name: getattr(back, name) for name in fields_of(cls)} == fields_of(cls)
        assert back.__notes__ == ["by the way"]
        assert type(back.__cause__) is ValueError
        assert str(back.__cause__) == "the root"


@pytest.mark.parametrize("cls", TREE)
def test_every_error_has_defaults_for_its_fields(cls: type[GcrefError]) -> None:
    error = cls("what happened")
    for name in fields_of(cls):
        getattr(error, name)


def test_the_tree_is_the_one_in_the_docstring() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)(\w+Error)\b", line)
        if found:
            depth = len(found.group(1)) // 3
            path[depth:] = [found.group(2)]
            drawn[found.group(2)] = path[depth - 1] if depth else "Exception"
    assert drawn == {cls.__name__: cls.__mro__[1].__name__ for cls in TREE}


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(SerializationError, TypeError)
    assert issubclass(WalltimeExceededError, TimeoutError)


def test_what_may_be_tried_again_says_so() -> None:
    assert {cls.__name__ for cls in TREE if cls.retryable} == {
        "LostError",
        "WorkerLostError",
        "EndpointLostError",
        "ObjectLostError",
        "HubUnavailableError",
    }


def test_a_reason_may_be_given_as_text_but_must_be_one() -> None:
    assert ObjectLostError("gone", reason="released").reason is LostReason.RELEASED
    with pytest.raises(ValueError, match="no_such_reason"):
        ObjectLostError("gone", reason="no_such_reason")
    assert f"{LostReason.NEVER_SUBMITTED}" == "never_submitted"


def test_a_cause_that_cannot_be_pickled_leaves_its_text() -> None:
    error = DependencyError("an argument failed")
    error.__cause__ = RuntimeError("busy", threading.Lock())
    cause = pickle.loads(pickle.dumps(error)).__cause__
    assert isinstance(cause, TaskError)
    assert "RuntimeError" in str(cause)
    assert "busy" in cause.text


def test_a_cause_that_cannot_be_rebuilt_does_not_take_the_error_along() -> None:
    error = DependencyError("an argument failed", task_ids=("a",))
    error.__cause__ = NeedsTwoError("one", "two")
    back = pickle.loads(pickle.dumps(error))
    assert back.task_ids == ("a",)
    assert isinstance(back.__cause__, TaskError)


def test_causes_of_causes_survive() -> None:
    root, middle, error = ValueError("root"), GcrefError("middle"), GcrefError("top")
    error.__cause__, middle.__cause__ = middle, root
    back = pickle.loads(pickle.dumps(error))
    assert str(back.__cause__.__cause__) == "root"
