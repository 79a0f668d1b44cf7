"""Errors (E1 … E5): what goes wrong in a task arrives as it was, with where and why, and hurts nobody else."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final

import psutil
import pytest

import gcref
from gcref import Client, ComputeFuture, Executor, LocalEndpoint
from tests.conftest import Sites, Work
from tests.support.endpoints import used_bytes, worker_pids
from tests.support.tasks import Gate, fail, hold, identity, inc, touch
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)

SOON_S = patience(5)
"""An error has no reason to take longer."""


@pytest.fixture(scope="module")
def cooley(two_sites: Sites) -> Iterator[LocalEndpoint]:
    """A third site."""
    with LocalEndpoint("cooley", workers=1) as found:
        yield found


def fail_after(gate: Gate, text: str) -> None:
    hold(gate)
    raise ValueError(text)


# ------------------------------------------------------------------------------------------------------------ E1


def inner_function_that_raises(x: int) -> float:
    try:
        return x / 0
    except ZeroDivisionError as error:
        raise ValueError("the text") from error


@pytest.mark.parametrize("site", ["a", "b"])
def test_e1_a_tasks_own_exception_with_traceback_and_note(work: Work, two_sites: Sites, site: str) -> None:
    executor: Executor = getattr(work, site)
    f = executor.submit(inner_function_that_raises, 1)
    with pytest.raises(ValueError, match="the text") as caught:
        f.result(WAIT_S)
    assert type(caught.value) is ValueError
    assert caught.value.args == ("the text",)
    assert f.exception() is caught.value, "the same one each time"
    told = "".join(traceback.format_exception(caught.value.__cause__))
    assert "inner_function_that_raises" in told
    assert "ZeroDivisionError" in told, "the remote traceback has what it was raised from"
    assert 'raise ValueError("the text") from error' in told
    (note,) = caught.value.__notes__
    assert f.task_id in note
    assert {"a": two_sites.polaris, "b": two_sites.midway}[site].name in note


# ------------------------------------------------------------------------------------------------------------ E2


def test_e2_a_chain_over_three_sites_whose_first_fails(
    work: Work, cooley: LocalEndpoint, gate: Gate, tmp_path: pathlib.Path
) -> None:
    ran = tmp_path / "ran"
    with Executor(cooley.endpoint_id, work.client) as c:
        first = work.a.submit(fail_after, gate, "the root")
        second = work.b.submit(touch, str(ran), first)
        third = c.submit(touch, str(ran), second)
        gate.open()
        with pytest.raises(ValueError, match="the root"):
            first.result(WAIT_S)
        for dependent, argument in ((second, first), (third, second)):
            error = dependent.exception(WAIT_S)
            assert isinstance(error, gcref.errors.DependencyError)
            assert error.task_ids == (argument.task_id,)
            assert type(error.__cause__) is ValueError
            assert str(error.__cause__) == "the root"
        late = work.a.submit(touch, str(ran), third).exception(WAIT_S)
        assert isinstance(late, gcref.errors.DependencyError)
        assert type(late.__cause__) is ValueError
    assert not ran.exists()


CHAIN_SCRIPT: Final = """
import sys
from gcref import Executor
from tests.integration.test_errors import fail_after
from tests.support.tasks import Gate, touch

names, group, gate, ran = sys.argv[1:4], *sys.argv[4:]
a, b, c = [Executor(name, task_group_id=group) for name in names]
first = a.submit(fail_after, Gate(gate), "the root")
second = b.submit(touch, ran, first)
third = c.submit(touch, ran, second)
while not first.running():
    pass
from endpoint_worker import status
from gcref.directory import records
while not all(status.ask(records.resolve(name))["tasks"]["submitted"] for name in names):
    pass
print("submitted", flush=True)
sys.stdin.read()
"""


def test_e2_also_while_the_client_is_dead(
    two_sites: Sites, cooley: LocalEndpoint, gate: Gate, tmp_path: pathlib.Path
) -> None:
    ran, group = tmp_path / "ran", str(uuid.uuid4())
    names = [two_sites.polaris.name, two_sites.midway.name, cooley.name]
    with subprocess.Popen(
        [sys.executable, "-c", CHAIN_SCRIPT, *names, group, gate.path, str(ran)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"submitted\n"
        process.send_signal(signal.SIGKILL)
    gate.open()
    with Client() as client:
        executors = [Executor(name, client, task_group_id=group) for name in names]
        found = [executor.reload_tasks() for executor in executors]
        assert [len(futures) for futures in found] == [1, 1, 1]
        errors = [futures[0].exception(WAIT_S) for futures in found]
        assert type(errors[0]) is ValueError
        for error in errors[1:]:
            assert isinstance(error, gcref.errors.DependencyError)
            assert type(error.__cause__) is ValueError
            assert str(error.__cause__) == "the root"
        del found
        for executor in executors:
            executor.shutdown()
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------------------ E3


@pytest.mark.parametrize("where", ["a", "b"])
def test_e3_two_of_five_arguments_fail(work: Work, where: str) -> None:
    executor: Executor = getattr(work, where)
    wait_until(lambda: not used_bytes("polaris", "midway"), what="the stores to be empty")
    good = [work.a.submit(bytes, 200_000) for _ in range(3)]
    bad = [work.a.submit(fail, f"number {i}") for i in range(2)]
    use = executor.submit(identity, [good[0], bad[0], good[1], bad[1], good[2]])
    error = use.exception(WAIT_S)
    assert isinstance(error, gcref.errors.DependencyError)
    assert set(error.task_ids) == {f.task_id for f in bad}
    assert all(f.task_id in str(error) for f in bad)
    assert type(error.__cause__) is ValueError
    assert used_bytes("polaris") >= 600_000
    del good
    wait_until(lambda: not used_bytes("polaris", "midway"), what="the good arguments to be released")


# ------------------------------------------------------------------------------------------------------------ E4


class Picky(Exception):  # noqa: N818
    """Its arguments are not those that `Exception` would rebuild it from."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"original text {code} {reason}")
        self.code = code
        self.reason = reason


class LockedError(RuntimeError):
    """It holds what cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Hostile(Exception):  # noqa: N818
    """Whatever is asked of it, it raises; and it ends whoever pickles it, given the chance."""

    def __str__(self) -> str:
        raise SystemExit("str")

    def __reduce__(self) -> Any:
        raise KeyboardInterrupt

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("getattribute")


class Twisted(Exception):  # noqa: N818
    """Pickles well; rebuilding it would end the process."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def raise_picky() -> None:
    raise Picky(7, reason="why")


def raise_locked() -> None:
    raise LockedError("original text")


def raise_lock_in_args() -> None:
    raise RuntimeError("original text", threading.Lock())


def raise_huge() -> None:
    raise ValueError("original text" + "x" * 20_000_000)


def raise_group() -> None:
    raise ExceptionGroup(
        "original text", [ValueError(1), LockedError("inside"), ExceptionGroup("deep", [KeyError("k")])]
    )


def raise_base_group() -> None:
    raise BaseExceptionGroup("original text", [KeyboardInterrupt(), ValueError(1)])


def raise_exit() -> None:
    sys.exit("original text")


def raise_interrupt() -> None:
    raise KeyboardInterrupt("original text")


def raise_generator_exit() -> None:
    raise GeneratorExit("original text")


def raise_surrogate() -> None:
    raise ValueError("original text \ud800")


def raise_local() -> None:
    class LocalError(Exception):
        pass

    raise LocalError("original text")


def raise_deep(depth: int = 0) -> None:
    try:
        raise ValueError(f"original text {depth}")
    except ValueError as error:
        if depth < 50:
            raise_deep(depth + 1)
        raise RuntimeError("original text") from error


def recurse() -> None:
    recurse()


def raise_own_cause() -> None:
    error = ValueError("original text")
    error.__cause__ = error
    raise error


@pytest.mark.parametrize(
    ("function", "kind", "text"),
    [
        (raise_picky, Picky, "original text 7 why"),
        (raise_locked, LockedError, "original text"),
        (raise_lock_in_args, gcref.errors.TaskError, "original text"),
        (raise_huge, ValueError, "original text"),
        (raise_group, ExceptionGroup, "original text"),
        (raise_base_group, gcref.errors.TaskError, "original text"),
        (raise_exit, gcref.errors.TaskError, "original text"),
        (raise_interrupt, gcref.errors.TaskError, "original text"),
        (raise_generator_exit, gcref.errors.TaskError, "original text"),
        (raise_surrogate, ValueError, "original text"),
        (raise_local, Exception, "original text"),
        (raise_deep, RuntimeError, "original text"),
        (recurse, RecursionError, "recursion"),
        (raise_own_cause, ValueError, "original text"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_e4_odd_exceptions_arrive_with_their_text(
    work: Work, two_sites: Sites, function: Callable[[], None], kind: type[BaseException], text: str
) -> None:
    pids = worker_pids("polaris")
    f = work.a.submit(function)
    error = f.exception(SOON_S)
    assert isinstance(error, kind)
    assert text in str(error)
    assert "".join(traceback.format_exception(error)), "it can be shown"
    assert any(f.task_id in note for note in error.__notes__)
    dependent = work.b.submit(identity, f).exception(SOON_S)
    assert isinstance(dependent, gcref.errors.DependencyError)
    assert isinstance(dependent.__cause__, kind)
    assert work.a.submit(inc, 1).result(WAIT_S) == 2
    assert worker_pids("polaris") == pids
    assert psutil.pid_exists(two_sites.polaris.pid)


def test_e4_what_exceptions_carry_is_kept_where_it_can_be(work: Work) -> None:
    picky = work.a.submit(raise_picky).exception(SOON_S)
    assert isinstance(picky, Picky)
    assert (picky.code, picky.reason) == (7, "why")
    group = work.a.submit(raise_group).exception(SOON_S)
    assert isinstance(group, ExceptionGroup)
    first, second, third = group.exceptions
    assert (type(first), first.args) == (ValueError, (1,))
    assert "inside" in str(second), "what cannot travel is there as text"
    assert isinstance(third, ExceptionGroup)
    assert isinstance(third.exceptions[0], KeyError)


def raise_it(cls: type[Exception]) -> None:
    raise cls("original text")


@pytest.mark.parametrize("cls", [Hostile, Twisted])
def test_e4_an_exception_that_fights_back(work: Work, two_sites: Sites, cls: type[Exception]) -> None:
    """The worker that such an exception ends may be another one afterwards; an error comes, and the agent goes on."""
    error = work.a.submit(raise_it, cls).exception(SOON_S)
    assert error is not None
    assert work.a.submit(inc, 1).result(WAIT_S) == 2
    assert psutil.pid_exists(two_sites.polaris.pid)


# ------------------------------------------------------------------------------------------------------------ E5


def definition(client: int, version: int) -> Callable[[int], tuple[int, int, int]]:
    """A function `work` of module `__main__`; every client has its own."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(f"def work(x):\n    return ({client}, {version}, x)", namespace)
    found: Callable[[int], tuple[int, int, int]] = namespace["work"]
    return found


def test_e5_two_clients_with_functions_of_one_name(two_sites: Sites) -> None:
    with Client() as one, Client() as two:
        futures: dict[tuple[int, int, int], ComputeFuture[tuple[int, int, int]]] = {}
        executors = [
            (number, site, Executor(endpoint.endpoint_id, client))
            for number, client in enumerate((one, two))
            for site, endpoint in enumerate(two_sites)
        ]
        functions = [[definition(number, version) for version in range(3)] for number in range(2)]
        for x in range(20):
            for number, site, executor in executors:
                for version in range(3):
                    futures[number, version, 2 * x + site] = executor.submit(
                        functions[number][version], 2 * x + site
                    )
        assert {key: future.result(WAIT_S) for key, future in futures.items()} == {
            key: key for key in futures
        }
        assert len({future.task_id for future in futures.values()}) == len(futures)
        for _, _, executor in executors:
            executor.shutdown()


def test_e5_a_clients_group_holds_its_own_tasks_only(two_sites: Sites) -> None:
    with Client() as one, Client() as two:
        here, there = (Executor(two_sites.polaris.endpoint_id, client) for client in (one, two))
        mine = [here.submit(inc, x) for x in range(5)]
        other = [there.submit(inc, x) for x in range(7)]
        assert [f.result(WAIT_S) for f in mine + other] == [*range(1, 6), *range(1, 8)]
        assert {f.task_id for f in here.reload_tasks()} == {f.task_id for f in mine}
        assert {f.task_id for f in there.reload_tasks()} == {f.task_id for f in other}
        here.shutdown()
        there.shutdown()
