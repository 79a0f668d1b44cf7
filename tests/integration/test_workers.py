"""F1: a worker that dies takes one attempt of one task with it, and says how; a new worker takes its place."""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import psutil
import pytest

import gcref
from gcref import Executor, LocalEndpoint
from gcref.errors import WalltimeExceededError, WorkerLostError
from tests.support.deaths import (
    DeadlyArgument,
    EndlessArgument,
    NotedDeath,
    crash,
    die_noted,
    fail_noted,
    give_and_die,
    give_deadly,
    give_endless,
    give_noted_death,
    inc,
    leave,
    runs,
    shoot_oneself,
    size_of,
    speak_and_die,
    take_memory,
    take_memory_and_abort,
    wait_forever,
)
from tests.support.endpoints import used_bytes, worker_pids
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)

NOTICED_S: Final = patience(2)
"""Within this time the death of a worker is an error of its future."""

WORKERS: Final = 2


@pytest.fixture(scope="module")
def site(_nothing_left: None) -> Iterator[LocalEndpoint]:
    with LocalEndpoint("site", workers=WORKERS) as found:
        yield found


@pytest.fixture
def executor(site: LocalEndpoint) -> Iterator[Executor]:
    with Executor(site.endpoint_id) as found:
        yield found


def is_whole(executor: Executor) -> bool:
    """Whether all workers are there again and take tasks."""
    return executor.submit(inc, 1).result(WAIT_S) == 2 and len(worker_pids("site")) == WORKERS


@pytest.mark.parametrize(
    ("death", "exit_code", "number"),
    [(leave, 7, None), (shoot_oneself, None, signal.SIGKILL), (crash, None, signal.SIGSEGV)],
)
def test_f1_a_death_in_the_middle_of_a_task_is_a_typed_error_soon(
    executor: Executor,
    site: LocalEndpoint,
    death: Callable[[], None],
    exit_code: int | None,
    number: int | None,
) -> None:
    error = executor.submit(death).exception(NOTICED_S)
    assert isinstance(error, WorkerLostError)
    assert (error.exit_code, error.signal) == (exit_code, number)
    assert (f"code {exit_code}" if number is None else signal.Signals(number).name) in str(error)
    wait_until(lambda: is_whole(executor), what="a new worker")
    assert psutil.pid_exists(site.pid)


def test_f1_somebody_kills_the_worker(executor: Executor, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "runs"
    f = executor.submit(wait_forever, str(path))
    other = executor.submit(inc, 1)
    (pid,) = wait_until(lambda: runs(path), what="the task to run")
    os.kill(pid, signal.SIGKILL)
    error = f.exception(NOTICED_S)
    assert isinstance(error, WorkerLostError)
    assert error.signal == signal.SIGKILL
    assert other.result(WAIT_S) == 2
    with pytest.raises(gcref.errors.DependencyError) as caught:
        executor.submit(inc, f).result(NOTICED_S)
    assert isinstance(caught.value.__cause__, WorkerLostError)
    assert runs(path) == [pid]


@pytest.mark.parametrize("death", [leave, shoot_oneself])
@pytest.mark.parametrize("retries", [0, 1, 3])
def test_f1_retries_are_that_many_runs_and_one_more(
    executor: Executor, tmp_path: pathlib.Path, death: Callable[[], None], retries: int
) -> None:
    path = tmp_path / "always"
    patient = executor.options(retries=retries)
    hopeless = patient.submit(die_noted, str(path), death, 1000)
    assert isinstance(hopeless.exception(WAIT_S), WorkerLostError)
    assert len(runs(path)) == retries + 1
    assert len(set(runs(path))) == retries + 1, "each in another process"
    path = tmp_path / "at first"
    saved = patient.submit(die_noted, str(path), death, retries)
    assert saved.result(WAIT_S) == "alive"
    assert len(runs(path)) == retries + 1
    assert saved.record is not None
    assert saved.record.attempts == retries + 1


def test_f1_what_raises_is_not_run_again(executor: Executor, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "runs"
    assert isinstance(executor.options(retries=3).submit(fail_noted, str(path)).exception(WAIT_S), ValueError)
    assert len(runs(path)) == 1


@pytest.mark.parametrize("retries", [0, 2])
def test_f1_a_walltime_ends_a_task_and_its_process(
    executor: Executor, tmp_path: pathlib.Path, retries: int
) -> None:
    path = tmp_path / "runs"
    f = executor.options(walltime_s=0.3, retries=retries).submit(wait_forever, str(path))
    (pid,) = wait_until(lambda: runs(path), what="the task to run")
    error = f.exception(0.3 + NOTICED_S)
    assert isinstance(error, WalltimeExceededError)
    assert isinstance(error, TimeoutError)
    assert error.walltime_s == 0.3
    wait_until(lambda: not psutil.pid_exists(pid), what="its process to end")
    wait_until(lambda: is_whole(executor), what="a new worker")
    assert len(runs(path)) == 1, "a task that is too slow is too slow the next time"
    assert executor.options(walltime_s=20).submit(inc, 1).result(WAIT_S) == 2


@pytest.mark.parametrize("padding", [0, 200_000], ids=["inline", "stored"])
def test_f1_death_while_arguments_are_unpickled(executor: Executor, padding: int) -> None:
    error = executor.submit(inc, [DeadlyArgument(), b"x" * padding]).exception(NOTICED_S)
    assert isinstance(error, WorkerLostError)
    assert error.exit_code == 5
    wait_until(lambda: is_whole(executor), what="a new worker")


@pytest.mark.parametrize("padding", [0, 200_000], ids=["inline", "stored"])
def test_f1_death_while_the_result_is_pickled(executor: Executor, padding: int) -> None:
    error = executor.submit(give_deadly, padding).exception(NOTICED_S)
    assert isinstance(error, WorkerLostError)
    assert error.exit_code == 6
    wait_until(lambda: is_whole(executor), what="a new worker")


@pytest.mark.parametrize("where", ["unpickling", "pickling"])
def test_f1_a_walltime_holds_also_before_and_after_the_function(executor: Executor, where: str) -> None:
    limited = executor.options(walltime_s=0.3)
    f: gcref.ComputeFuture[Any]
    if where == "unpickling":
        f = limited.submit(inc, EndlessArgument())
    else:
        f = limited.submit(give_endless)
    assert isinstance(f.exception(0.3 + NOTICED_S), WalltimeExceededError)
    wait_until(lambda: is_whole(executor), what="a new worker")


def test_f1_a_walltime_ends_a_worker_that_is_stopped(executor: Executor, tmp_path: pathlib.Path) -> None:
    """Not even its threads run: only its process can be ended."""
    path = tmp_path / "runs"
    f = executor.options(walltime_s=1.0).submit(wait_forever, str(path))
    (pid,) = wait_until(lambda: runs(path), what="the task to run")
    os.kill(pid, signal.SIGSTOP)
    assert isinstance(f.exception(1.0 + NOTICED_S), WalltimeExceededError)
    wait_until(lambda: not psutil.pid_exists(pid), what="its process to end")


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("where", ["unpickling", "pickling"])
def test_f1_an_attempt_is_one_wherever_it_ends(
    executor: Executor, tmp_path: pathlib.Path, where: str, retries: int
) -> None:
    path = tmp_path / "deaths"
    patient = executor.options(retries=retries)
    f: gcref.ComputeFuture[Any]
    if where == "unpickling":
        f = patient.submit(inc, NotedDeath(str(path), argument=True))
    else:
        f = patient.submit(give_noted_death, str(path))
    assert isinstance(f.exception(WAIT_S), WorkerLostError)
    assert len(runs(path)) == retries + 1


# ------------------------------------------------------------------------------------------------- the memory limit

LIMIT_BYTES: Final = 256 << 20


@pytest.fixture(scope="module")
def small(_nothing_left: None) -> Iterator[LocalEndpoint]:
    config = {"worker_memory_bytes": "256 MiB"}
    with LocalEndpoint("small", workers=1, config=config) as found:
        yield found


def test_f1_a_task_over_the_memory_limit_gets_a_memory_error(small: LocalEndpoint) -> None:
    """And its worker takes the next one."""
    with Executor(small.endpoint_id) as executor:
        (pid,) = worker_pids("small")
        assert isinstance(executor.submit(take_memory, 2 * LIMIT_BYTES).exception(WAIT_S), MemoryError)
        assert executor.submit(take_memory, LIMIT_BYTES // 2).result(WAIT_S) == LIMIT_BYTES // 2
        assert worker_pids("small") == {pid}
        big = executor.put(np.ones(2 * LIMIT_BYTES, np.uint8))
        assert executor.submit(size_of, big).result(WAIT_S) == 2 * LIMIT_BYTES, "it is in the store"


def test_f1_a_death_of_want_of_memory_is_typed(small: LocalEndpoint) -> None:
    with Executor(small.endpoint_id) as executor:
        error = executor.submit(take_memory_and_abort, 2 * LIMIT_BYTES).exception(NOTICED_S)
        assert isinstance(error, WorkerLostError)
        assert error.signal == signal.SIGABRT
        assert "bad_alloc" in error.stderr
        assert executor.submit(inc, 1).result(WAIT_S) == 2


def test_f1_death_in_the_middle_of_a_large_result_leaves_no_bytes(
    executor: Executor, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "runs"
    f = executor.submit(give_and_die, str(path))
    error = f.exception(WAIT_S)
    assert error is None or isinstance(error, WorkerLostError)
    if error is None:
        assert len(f.result(WAIT_S)) == 50_000_000
    del f
    wait_until(lambda: is_whole(executor), what="a new worker")
    wait_until(lambda: used_bytes("site") == 0, what="the bytes to go")


@pytest.mark.parametrize("lines", [0, 3, 5000])
def test_f1_the_error_tells_the_last_lines_of_stderr(executor: Executor, lines: int) -> None:
    error = executor.submit(speak_and_die, lines).exception(NOTICED_S)
    assert isinstance(error, WorkerLostError)
    assert error.stderr.endswith("last words without a newline")
    assert "last words without a newline" in str(error)
    if lines:
        assert f"line {lines - 1}" in error.stderr
    assert len(error.stderr) < 10_000


def test_f1_many_deaths_among_many_tasks_harm_only_themselves(executor: Executor) -> None:
    good = [executor.submit(inc, x) for x in range(100)]
    bad = [executor.submit(leave) for _ in range(5)]
    more = [executor.submit(inc, x) for x in range(100)]
    assert [f.result(WAIT_S) for f in good + more] == [*range(1, 101), *range(1, 101)]
    assert all(isinstance(f.exception(WAIT_S), WorkerLostError) for f in bad)
