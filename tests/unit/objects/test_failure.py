"""Failures: a task's exception comes back as itself with its remote traceback, and always as something."""

from __future__ import annotations

import asyncio
import concurrent.futures
import pdb
import pickle
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref import ids
from gcref.config import EXCEPTION_MAX_BYTES, EXCEPTION_TEXT_MAX
from gcref.errors import (
    DependencyError,
    EndpointLostError,
    GcrefError,
    LostReason,
    ObjectLostError,
    ProtocolError,
    RejectedError,
    SerializationError,
    StoreFullError,
    TaskError,
    WorkerLostError,
)
from gcref.objects import failure as failures
from gcref.objects.failure import Failure, RemoteTraceback
from gcref.wire import codec

TASK = ids.new_id()


def fail(raiser: Callable[[], object]) -> tuple[Failure, BaseException]:
    """Let a task raise, and give its failure, and what the client gets after the wire."""
    try:
        raiser()
    except BaseException as error:  # noqa: BLE001 - a worker takes all of them
        failure = failures.from_exception(error, task_id=TASK, endpoint="polaris")
    else:
        raise AssertionError("it was to raise")
    data = codec.pack(failure)
    assert len(data) < 4 * EXCEPTION_MAX_BYTES
    return failure, failures.to_exception(codec.unpack(data, 1 << 22))


def throw(error: BaseException) -> Callable[[], object]:
    def task() -> None:
        raise error

    return task


class NeedsTwoError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")
        self.first = first


class KeywordOnlyError(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__()
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


class HoldsLockError(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()
        self.kept = [1, 2]


class NeedsLockError(HoldsLockError):
    def __str__(self) -> str:
        return f"{self.args[0]} {self.lock.locked()}"


class NoTextError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class HostileError(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        raise SystemExit("not like this")


class UntouchableError(Exception):
    """Whatever is asked of it, it raises what would end a process."""

    def __getattribute__(self, name: str) -> Any:
        raise KeyboardInterrupt

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        raise KeyboardInterrupt


class BecomesNumberError(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("7",)


def test_e1_a_value_error_is_a_value_error_with_remote_traceback_and_note() -> None:
    _, error = fail(throw(ValueError("boom", 7)))
    assert type(error) is ValueError
    assert error.args == ("boom", 7)
    cause = error.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert "in task" in str(cause)
    assert "raise error" in str(cause)
    assert str(cause).rstrip('"').rstrip().endswith("ValueError: ('boom', 7)")
    assert error.__notes__ == [f"raised by task {ids.text(TASK)} at endpoint polaris"]
    printed = "".join(traceback.format_exception(error))
    assert "RemoteTraceback" in printed
    assert "direct cause" in printed


def test_an_endpoint_may_be_given_by_its_id() -> None:
    endpoint = ids.new_id()
    failure = failures.from_exception(ValueError("x"), task_id=TASK, endpoint=endpoint)
    assert ids.text(endpoint) in failures.to_exception(failure).__notes__[0]


@pytest.mark.parametrize(
    "error",
    [
        KeyError("k"),
        OSError(2, "No such file", "/a"),
        FileNotFoundError(2, "No such file", "/a"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        StopIteration(3),
        SyntaxError("bad", ("f", 1, 2, "text")),
        ZeroDivisionError(),
        NeedsTwoError("one", "two"),
        KeywordOnlyError(code=7),
        HoldsLockError("text"),
        ValueError(np.arange(3)),
        ValueError("\udcff"),
        subprocess.CalledProcessError(3, ["a", "b"], b"out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_e4_exceptions_come_back_as_themselves(error: Exception) -> None:
    _, back = fail(throw(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    for name, value in vars(error).items():
        if name != "lock":
            assert getattr(back, name) == value


def test_attributes_and_notes_of_an_exception_come_back() -> None:
    error = NeedsTwoError("one", "two")
    error.add_note("my own note")
    _, back = fail(throw(error))
    assert isinstance(back, NeedsTwoError)
    assert back.first == "one"
    assert back.__notes__[0] == "my own note"


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt("stop"), GeneratorExit("x"), asyncio.CancelledError()]
)
def test_e4_what_would_end_the_client_is_a_task_error(error: BaseException) -> None:
    failure, back = fail(throw(error))
    assert failure[3] is None
    assert type(back) is TaskError
    assert back.text == str(error)
    assert back.type_name.endswith(type(error).__name__)
    assert str(error) in str(back)
    assert "raise error" in back.traceback
    assert back.task_id == ids.text(TASK)
    assert isinstance(back.__cause__, RemoteTraceback)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NeedsLockError("my text"), "my text False"),
        (HostileError("my text"), "my text"),
        (BecomesNumberError("my text"), "my text"),
        (ValueError("my text", threading.Lock()), "my text"),
        (NoTextError("hidden"), "RuntimeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_e4_exceptions_that_cannot_be_rebuilt_keep_their_text(error: Exception, text: str) -> None:
    _, back = fail(throw(error))
    if not isinstance(error, (NoTextError, HostileError, BecomesNumberError)):
        assert type(back) is TaskError
        assert back.type_name.endswith(type(error).__name__)
    if not isinstance(error, NoTextError):
        assert text in str(back)


def test_e4_an_exception_that_cannot_even_be_looked_at_is_a_task_error() -> None:
    failure = failures.from_exception(UntouchableError("hidden"), task_id=TASK, endpoint="polaris")
    back = failures.to_exception(codec.unpack(codec.pack(failure)))
    assert type(back) is TaskError
    assert back.type_name.endswith("UntouchableError")
    assert "KeyboardInterrupt" in str(back)


def test_e4_a_huge_exception_is_cut_and_keeps_its_type() -> None:
    failure, back = fail(throw(ValueError("begin" + "x" * 10**7 + "end")))
    assert type(back) is ValueError
    assert str(back).startswith("begin")
    assert str(back).endswith("end")
    assert len(str(back)) < 10_000
    assert sum(len(value) for value in failure[2].values() if isinstance(value, str)) < 4 * EXCEPTION_TEXT_MAX


def test_e4_a_huge_exception_that_cannot_be_cut_is_a_task_error() -> None:
    failure, back = fail(throw(ValueError("text", bytes(10**7))))
    assert failure[3] is None
    assert type(back) is TaskError
    assert back.type_name == "ValueError"
    assert back.text.startswith("('text', b'")


def test_e4_groups_come_back_with_their_members() -> None:
    group = ExceptionGroup("several", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])])
    _, back = fail(throw(group))
    assert isinstance(back, ExceptionGroup)
    with pytest.raises(ExceptionGroup) as caught:
        raise back
    assert caught.group_contains(KeyError)
    assert str(back) == str(group)


def test_e4_a_group_with_a_lock_inside_keeps_what_it_can() -> None:
    odd = RuntimeError("odd", threading.Lock())
    _, back = fail(
        throw(ExceptionGroup("several", [ValueError("a"), ExceptionGroup("inner", [odd, KeyError("b")])]))
    )
    assert isinstance(back, ExceptionGroup)
    first, inner = back.exceptions
    assert type(first) is ValueError
    assert [type(member) for member in inner.exceptions] == [TaskError, KeyError]
    assert "odd" in str(inner.exceptions[0])


def test_e4_a_group_of_what_would_end_the_client_is_a_task_error() -> None:
    _, back = fail(throw(BaseExceptionGroup("several", [KeyboardInterrupt()])))
    assert type(back) is TaskError


def test_e4_the_text_of_chained_exceptions_is_in_the_remote_traceback() -> None:
    def task() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    _, back = fail(task)
    assert type(back) is ValueError
    assert "KeyError: 'first'" in str(back.__cause__)
    assert "direct cause" in str(back.__cause__)


def test_e4_an_exception_that_is_its_own_cause_comes_back() -> None:
    error, other = ValueError("a"), ValueError("b")
    error.__cause__, other.__cause__ = other, error
    _, back = fail(throw(error))
    assert type(back) is ValueError


def test_e4_an_endless_recursion_comes_back_soon() -> None:
    def task() -> None:
        task()

    failure, back = fail(task)
    assert type(back) is RecursionError
    assert len(failure[2]["frames"]) <= 64
    assert len(failure[2]["traceback"]) <= EXCEPTION_TEXT_MAX + 100


def test_an_exception_of_main_comes_back_as_itself() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("class OwnError(Exception):\n    pass\ndef task(): raise OwnError('text')", names)
    _, back = fail(names["task"])
    assert type(back) is names["OwnError"]
    assert str(back) == "text"


def test_v6_an_exception_whose_module_is_missing_here_is_a_task_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("only_at_the_worker")
    exec("class OwnError(Exception):\n    pass", module.__dict__)
    with monkeypatch.context() as worker:
        worker.setitem(sys.modules, module.__name__, module)
        failure = failures.from_exception(module.OwnError("text"), task_id=TASK, endpoint="polaris")
    back = failures.to_exception(failure)
    assert type(back) is TaskError
    assert (back.type_name, back.text) == ("only_at_the_worker.OwnError", "text")
    assert any("only_at_the_worker" in note for note in back.__notes__[1:])


def test_an_error_of_gcref_that_a_task_raises_keeps_fields_and_cause() -> None:
    error = DependencyError("an argument failed", task_ids=("a",))
    error.__cause__ = KeyError("root")
    _, back = fail(throw(error))
    assert isinstance(back, DependencyError)
    assert back.task_ids == ("a",)
    assert type(back.__cause__) is KeyError
    assert isinstance(back.__cause__.__cause__, RemoteTraceback)


def test_frames_of_gcref_around_the_task_are_not_shown() -> None:
    runtime: dict[str, Any] = {"__name__": "endpoint_worker.worker.runtime"}
    exec("def run(task): return task()", runtime)
    failure, _ = fail(lambda: runtime["run"](throw(ValueError("x"))))
    # The helper of this test is the outermost frame, and it is not gcref's.
    assert [frame[1] for frame in failure[2]["frames"]] == ["fail", "<lambda>", "run", "task"]
    with pytest.raises(ValueError, match="x") as caught:
        runtime["run"](throw(ValueError("x")))
    assert caught.value.__traceback__ is not None
    error = caught.value.with_traceback(caught.value.__traceback__.tb_next)
    cut = failures.from_exception(error, task_id=TASK, endpoint="polaris")
    assert [frame[1] for frame in cut[2]["frames"]] == ["task"]
    assert "in run" not in cut[2]["traceback"]


def test_with_tblib_a_debugger_can_walk_the_remote_frames() -> None:
    _, back = fail(throw(ValueError("x")))
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(back.__traceback__)]
    assert frames[-2:] == ["fail", "task"]
    stack, _ = pdb.Pdb().get_stack(None, back.__traceback__)
    assert stack[-1][0].f_code.co_filename == __file__


def test_a_rebuilt_traceback_keeps_nothing_of_whoever_looks_at_it() -> None:
    """Real frames name their caller: without an end to that, a failed future would hold the user's own variables."""
    _, back = fail(throw(ValueError("x")))
    callers: set[str] = set()
    for frame, _ in traceback.walk_tb(back.__traceback__):
        outer = frame.f_back
        while outer is not None:
            callers.add(outer.f_code.co_name)
            outer = outer.f_back
    assert "test_a_rebuilt_traceback_keeps_nothing_of_whoever_looks_at_it" not in callers


def test_without_tblib_there_is_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tblib", None)
    _, back = fail(throw(ValueError("x")))
    assert back.__traceback__ is None
    assert "in task" in str(back.__cause__)


# gcref's own failures


@pytest.mark.parametrize(
    ("failure", "cls", "fields"),
    [
        (failures.make("WorkerLostError", "died", signal=9, stderr="bye"), WorkerLostError, {"signal": 9, "stderr": "bye"}),
        (failures.make("ObjectLostError", "x", reason=LostReason.CORRUPT), ObjectLostError, {"reason": "corrupt"}),
        (failures.make("ObjectLostError", "x", reason="corrupt"), ObjectLostError, {"reason": LostReason.CORRUPT}),
        (failures.make("EndpointLostError", "gone", endpoint_id="e", reason="r"), EndpointLostError, {"endpoint_id": "e"}),
        (failures.make("StoreFullError", "full", needed_bytes=3), StoreFullError, {"needed_bytes": 3}),
        (failures.make("RejectedError", "no"), RejectedError, {}),
        (failures.make("DependencyError", "no", task_ids=("a", "b")), DependencyError, {"task_ids": ("a", "b")}),
    ],
)  # fmt: skip
def test_errors_of_gcref_come_back_with_their_fields(
    failure: Failure, cls: type[GcrefError], fields: dict[str, Any]
) -> None:
    back = failures.to_exception(codec.unpack(codec.pack(failure), 1 << 20))
    assert type(back) is cls
    assert str(back) == failure[1]
    assert {name: getattr(back, name) for name in fields} == fields


def test_an_error_object_becomes_a_failure_that_says_the_same() -> None:
    error = ObjectLostError("gone", reason=LostReason.TIMEOUT, object_id="an id")
    error.__cause__ = ValueError("stays behind")
    failure = failures.from_error(error)
    assert failure == ["ObjectLostError", "gone", {"reason": "timeout", "object_id": "an id"}, None, None]

    class OwnError(SerializationError):
        pass

    assert failures.from_error(OwnError("no", argument="argument 1"))[0] == "SerializationError"


def test_a_cancelled_task_is_a_cancelled_error() -> None:
    back = failures.to_exception(codec.unpack(codec.pack(failures.cancelled()), 1 << 20))
    assert type(back) is concurrent.futures.CancelledError


def test_e2_a_dependent_names_its_argument_and_its_cause_is_the_root() -> None:
    root, _ = fail(throw(ValueError("boom")))
    first, second = ids.new_id(), ids.new_id()
    chained = failures.dependency([second], failures.dependency([first], root))
    back = failures.to_exception(codec.unpack(codec.pack(chained), 1 << 20))
    assert isinstance(back, DependencyError)
    assert back.task_ids == (ids.text(second),)
    assert ids.text(second) in str(back)
    assert "boom" in str(back)
    assert type(back.__cause__) is ValueError
    assert isinstance(back.__cause__.__cause__, RemoteTraceback)
    assert chained[4] is root


def test_e3_a_dependent_of_two_failures_names_both() -> None:
    several = [ids.new_id(), ids.new_id()]
    back = failures.to_exception(failures.dependency(several, failures.cancelled()))
    assert isinstance(back, DependencyError)
    assert back.task_ids == tuple(map(ids.text, several))
    assert all(ids.text(id) in str(back) for id in several)
    assert isinstance(back.__cause__, concurrent.futures.CancelledError)


def test_a_chain_of_ten_thousand_dependents_stays_small() -> None:
    failure, _ = fail(throw(ValueError("boom")))
    size = len(codec.pack(failure))
    for _ in range(10_000):
        failure = failures.dependency([ids.new_id()], failure)
    assert len(codec.pack(failure)) < size + 2000
    assert len(codec.pack(failures.dependency([TASK] * 10_000, failure))) < size + 50_000


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        [],
        "raised",
        ["raised"],
        ["raised", "m", {}, "not bytes", None],
        ["raised", 1, {}, None, None],
        ["raised", "m", [], None, None],
        ["raised", "m", {}, None, 7],
        {"kind": "raised"},
    ],
)
def test_a_failure_that_nobody_can_read_is_a_protocol_error(garbage: Any) -> None:
    assert isinstance(failures.to_exception(garbage), ProtocolError)


@pytest.mark.parametrize(
    "odd",
    [
        ["raised", "m", {}, None, None],
        ["raised", "m", {}, b"no blob", None],
        ["raised", "m", {"traceback": 7, "frames": [[1, 2]], "task_id": []}, None, None],
        ["raised", "m", {"frames": [["f", "g", -1], ["f", "g", "x"]]}, None, None],
        ["raised", "m", {"frames": [[None]] * 10_000}, None, None],
        ["NoSuchKind", "m", {}, None, None],
        ["LostReason", "m", {}, None, None],
        ["__name__", "m", {}, None, None],
        ["ObjectLostError", "m", {"reason": "no such reason"}, None, None],
        ["TaskError", "m", {"args": 1, "__class__": 2, 3: 4, "with_traceback": 5, "self": 6, "message": 7}, None, None],
        ["DependencyError", "m", {}, None, ["garbage"]],
    ],
)  # fmt: skip
def test_an_odd_failure_is_still_an_error_with_its_message(odd: Any) -> None:
    back = failures.to_exception(odd)
    assert isinstance(back, GcrefError)
    assert str(back).endswith("m")
    back.with_traceback(None)


def test_causes_that_nest_for_ever_are_cut() -> None:
    failure: Failure = failures.make("GcrefError", "m")
    for _ in range(5000):
        failure = failures.make("GcrefError", "m", failure)
    assert isinstance(failures.to_exception(failure), GcrefError)


@given(st.text(), st.text())
def test_any_text_crosses_the_wire(message: str, field: str) -> None:
    surrogate = "\ud800" + message
    for failure in (
        failures.make("WorkerLostError", surrogate, stderr=field + "\udfff"),
        failures.from_exception(ValueError(surrogate), task_id=TASK, endpoint="a\ud800"),
    ):
        assert codec.unpack(codec.pack(failure), 1 << 20) == failure


def test_a_remote_traceback_survives_pickling() -> None:
    back = pickle.loads(pickle.dumps(RemoteTraceback("the text")))
    assert "the text" in str(back)
