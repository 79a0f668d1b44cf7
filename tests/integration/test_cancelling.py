"""Cancelling and forking (C1 … C4)."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from gcref import Executor, LocalEndpoint
from gcref.errors import DependencyError
from tests.conftest import Sites
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)


def after(gate: str, value: Any = "value") -> Any:
    while not os.path.exists(gate):
        time.sleep(0.002)
    return value


def note(folder: str, *_: Any) -> None:
    Path(folder, "ran").touch()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "gate"
    yield path
    path.touch()


def test_c1_waiting_for_arguments_queued_and_done(polaris: Executor, tmp_path: Path, gate: Path) -> None:
    held = [polaris.submit(after, str(gate)) for _ in range(2)]
    wait_until(lambda: all(future.running() for future in held), what="both workers to be busy")
    waiting = polaris.submit(note, str(tmp_path), held[0])
    queued = polaris.submit(note, str(tmp_path))
    for future in (waiting, queued):
        assert future.cancel()
        assert future.cancelled()
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result(0)
    gate.touch()
    assert concurrent.futures.wait(held, WAIT_S).not_done == set()
    assert not held[0].cancel()
    assert polaris.submit(pow, 2, 3).result(WAIT_S) == 8
    assert not (tmp_path / "ran").exists()


def test_c1_a_running_task_only_by_force(two_sites: Sites, gate: Path) -> None:
    with Executor("midway") as executor:
        future = executor.submit(after, str(gate))
        wait_until(future.running, what="it to run")
        assert not future.cancel()
        assert not future.cancelled()
        assert future.cancel(force=True)
        assert future.cancelled()
        assert executor.submit(pow, 2, 3).result(WAIT_S) == 8


def test_c2_in_the_middle_of_a_chain(polaris: Executor, gate: Path) -> None:
    first = polaris.submit(after, str(gate), 1)
    middle = polaris.submit(pow, first, 2)
    last = polaris.submit(pow, middle, 2)
    assert middle.cancel()
    with pytest.raises(DependencyError) as caught:
        last.result(WAIT_S)
    assert isinstance(caught.value.__cause__, CancelledError)
    assert caught.value.task_ids == (middle.task_id,)
    gate.touch()
    assert first.result(WAIT_S) == 1


def test_c3_a_frozen_agent_costs_a_second_and_the_request_stands(
    home: Path, tmp_path: Path, gate: Path
) -> None:
    with LocalEndpoint("frozen", workers=1) as endpoint, Executor("frozen") as executor:
        held = executor.submit(after, str(gate))
        wait_until(held.running, what="the worker to be busy")
        queued = executor.submit(note, str(tmp_path))
        wait_until(lambda: "0 messages" in queued.explain(), what="the task to arrive")
        os.kill(endpoint.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            assert not queued.cancel()
            assert time.monotonic() - start < patience(1.5)
        finally:
            os.kill(endpoint.pid, signal.SIGCONT)
        wait_until(queued.cancelled, what="the request to be heeded")
        gate.touch()
        assert held.result(WAIT_S) == "value"
        assert not (tmp_path / "ran").exists()


def test_many_are_cancelled_at_once(two_sites: Sites, gate: Path) -> None:
    executor = Executor("polaris")
    held = [executor.submit(after, str(gate)) for _ in range(2)]
    many = [executor.submit(pow, 2, 3) for _ in range(5000)]
    start = time.monotonic()
    executor.shutdown(wait=False, cancel_futures=True)
    assert time.monotonic() - start < patience(5)
    gate.touch()
    concurrent.futures.wait([*held, *many], WAIT_S)
    assert all(future.done() for future in many)


def test_c4_every_use_in_a_forked_child_raises_at_once(polaris: Executor, gate: Path) -> None:
    done, pending = polaris.submit(pow, 2, 3), polaris.submit(after, str(gate))
    assert done.result(WAIT_S) == 8
    uses: list[Callable[[], Any]] = [
        lambda: polaris.submit(pow, 2, 3),
        lambda: polaris.map(pow, [1], [2]),
        lambda: polaris.put(1),
        lambda: polaris.reload_tasks(),
        lambda: pending.result(),
        lambda: pending.cancel(),
        lambda: pending.add_done_callback(print),
        lambda: concurrent.futures.wait([pending], timeout=0.1) and pending.result(0),
    ]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            start = time.monotonic()
            raised = 0
            for use in uses:
                try:
                    use()
                except RuntimeError as error:
                    raised += "parent" in str(error)
            if raised == len(uses) and time.monotonic() - start < patience(1) and done.result() == 8:
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.touch()
    assert pending.result(WAIT_S) == "value"
    assert polaris.submit(pow, 2, 4).result(WAIT_S) == 16
