"""What tasks leave behind when they end: tasks that nobody waits for, futures in their results."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcref import Client, Executor
from tests.support.deaths import runs
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(user_endpoint_config={"workers": 2}) as made:
        yield made


def tail_call(x: int) -> Any:
    return Executor().submit(abs, -x)


def future_inside(x: int) -> Any:
    return [Executor().submit(abs, -x)]


def fibonacci(n: int) -> Any:
    if n < 2:
        return n
    executor = Executor()
    return executor.submit(int.__add__, executor.submit(fibonacci, n - 1), executor.submit(fibonacci, n - 2))


def write_sum(path: str, array: Any) -> None:
    with open(path, "a", encoding="ascii") as file:
        file.write(f"{int(array.sum())}\n")


def leave_a_large_argument(path: str, count: int) -> int:
    """What it leaves behind has a retry, because it may have begun in this very worker when that is killed."""
    Executor().options(retries=1).submit(write_sum, path, np.ones(count, np.uint8))
    return os.getpid()


def put_and_leave(path: str, count: int) -> int:
    executor = Executor().options(retries=1)
    executor.submit(write_sum, path, executor.put(np.ones(count, np.uint8)))
    return os.getpid()


def close_the_client(path: str) -> str:
    with Client() as client:
        Executor(client=client).submit(write_sum, path, np.ones(3, np.uint8))
    return "closed"


def use_two_clients(count: int) -> tuple[int, int, int, str]:
    executor = Executor()
    first = [executor.submit(abs, -x) for x in range(count)]
    with Client() as client:
        other = Executor(client=client)
        second = [other.submit(abs, -x) for x in range(count)]
    third = [executor.submit(abs, -x) for x in range(count)]
    refused = ""
    try:
        other.submit(abs, -1)
    except RuntimeError as error:
        refused = str(error)
    return (
        sum(f.result() for f in first),
        sum(f.result() for f in second),
        sum(f.result() for f in third),
        refused,
    )


@pytest.mark.parametrize("fn", [tail_call, future_inside])
def test_what_a_result_names_is_there_when_the_result_is_seen(executor: Executor, fn: Any) -> None:
    """The task inside ends in the other worker, as a rule before the agent has heard that a result names it."""
    for x in range(200):
        future = executor.submit(fn, x)
        value = future.result(WAIT_S)
        assert (value if fn is tail_call else value[0].get(WAIT_S)) == x


def test_a_recursion_of_tail_calls(executor: Executor) -> None:
    assert executor.submit(fibonacci, 10).result(WAIT_S) == 55


@pytest.mark.parametrize("fn", [leave_a_large_argument, put_and_leave])
def test_a_large_argument_is_not_lost_with_the_worker_once_the_task_has_ended(
    executor: Executor, tmp_path: Path, fn: Any
) -> None:
    path, count = tmp_path / "sum", 64 * 1024 * 1024
    pid = executor.submit(fn, str(path), count).result(WAIT_S)
    os.kill(pid, signal.SIGKILL)
    sums = wait_until(lambda: runs(path), what="the task that was left behind", timeout_s=30)
    assert set(sums) == {count}


def test_a_task_that_closes_its_client_ends(executor: Executor, tmp_path: Path) -> None:
    path = tmp_path / "sum"
    assert executor.submit(close_the_client, str(path)).result(WAIT_S) == "closed"
    assert wait_until(lambda: runs(path), what="the task that was left behind", timeout_s=30) == [3]
    assert executor.submit(abs, -1).result(WAIT_S) == 1


def test_the_clients_of_a_task_do_not_disturb_each_other(executor: Executor) -> None:
    """Nor does the one that is closed: what it has submitted goes on."""
    for _ in range(10):
        total = sum(range(50))
        *sums, refused = executor.submit(use_two_clients, 50).result(WAIT_S)
        assert sums == [total] * 3
        assert "shutdown" in refused
