"""F2, from the workers' side: in whatever a worker is when its agent is killed, it ends that once, or dies with it in time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from gcref import Executor
from gcref.errors import WalltimeExceededError, WorkerLostError
from tests.support.deaths import note, runs, wait_forever
from tests.support.endpoints import host_folder, worker_pids
from tests.support.named import NamedEndpoint, running
from tests.support.tasks import Gate, hold
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)
SETTINGS = {"workers": 1, "bind": "127.0.0.1", "heartbeat_s": 1.0, "endpoint_lost_s": 60.0}


@pytest.fixture
def polaris(home: Path) -> Iterator[NamedEndpoint]:
    """A running endpoint of its own, with one worker."""
    with running("polaris", **SETTINGS) as endpoint:
        yield endpoint


def inner(path: str, gate: Gate) -> int:
    note(path)
    return int(hold(gate, 41))


def ask_another(path: str, inner_path: str, gate: Gate) -> int:
    """A task that waits for another one at its own endpoint, and lends its slot meanwhile."""
    note(path)
    with Executor("polaris") as executor:
        return executor.submit(inner, inner_path, gate).result() + 1


def hand_over(path: str, gate: Gate, site: str) -> Any:
    """A tail call: the task's value is that of another one, at that site."""
    note(path)
    hold(gate)
    future = Executor(site).submit(abs, -42)
    note(path + "-submitted")
    return future


def leave_a_task_behind(path: str, gate: Gate, left: str) -> str:
    """It submits a task that nobody waits for, and whose first attempt may be in this very worker when that is killed."""
    note(path)
    hold(gate)
    Executor().options(retries=1).submit(note, left)
    note(path + "-submitted")
    return "left"


def make_large(path: str, gate: Gate) -> np.ndarray:
    note(path)
    hold(gate)
    return np.arange(1_000_000)


def note_and_wait_once(path: str) -> str:
    """Waits for ever in its first run."""
    if note(path) == 1:
        wait_forever(path + "-waits")
    return "alive"


def test_f2_a_task_that_has_lent_its_slot(polaris: NamedEndpoint, tmp_path: Path) -> None:
    gate = Gate.at(tmp_path)
    outer_runs, inner_runs = tmp_path / "outer", tmp_path / "inner"
    with Executor("polaris") as executor:
        f = executor.submit(ask_another, str(outer_runs), str(inner_runs), gate)
        wait_until(lambda: runs(inner_runs), what="the inner task to run in the lent slot", timeout_s=30)
        polaris.kill()
        polaris.start()
        gate.open()
        assert f.result(WAIT_S) == 42
    assert (len(runs(outer_runs)), len(runs(inner_runs))) == (1, 1)


@pytest.mark.parametrize("site", ["polaris", "midway"])
@pytest.mark.parametrize("retries", [0, 1])
def test_f2_a_tail_call_whose_worker_dies_before_an_agent_has_heard_of_it(
    polaris: NamedEndpoint, tmp_path: Path, site: str, retries: int
) -> None:
    """It has not ended, since nobody has what it submitted: it has lost an attempt like any other."""
    gate = Gate.at(tmp_path)
    path = tmp_path / "runs"
    other = running("midway", **SETTINGS) if site == "midway" else contextlib.nullcontext()
    with other, Executor("polaris") as executor:
        f = executor.options(retries=retries).submit(hand_over, str(path), gate, site)
        (pid,) = wait_until(lambda: runs(path), what="the task to run")
        polaris.kill()
        gate.open()
        wait_until(lambda: runs(f"{path}-submitted"), what="the task to submit another one")
        os.kill(pid, signal.SIGKILL)
        polaris.start()
        if retries:
            assert f.result(WAIT_S) == 42
        else:
            assert isinstance(f.exception(WAIT_S), WorkerLostError)
        assert executor.submit(max, 1, 2).result(WAIT_S) == 2
    assert len(runs(path)) == 1 + retries


def test_f2_a_task_that_returns_while_no_agent_is_there_ends_with_what_it_has_submitted(
    polaris: NamedEndpoint, tmp_path: Path
) -> None:
    """Once it has ended, its worker may be killed, and what it has left behind runs all the same."""
    gate = Gate.at(tmp_path)
    path, left = tmp_path / "runs", tmp_path / "left"
    with Executor("polaris") as executor:
        f = executor.submit(leave_a_task_behind, str(path), gate, str(left))
        (pid,) = wait_until(lambda: runs(path), what="the task to run")
        polaris.kill()
        gate.open()
        wait_until(lambda: runs(f"{path}-submitted"), what="the task to submit another one")
        polaris.start()
        assert f.result(WAIT_S) == "left"
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: runs(left), what="the other task to run")
    assert len(runs(path)) == 1


def test_f2_a_task_whose_worker_was_being_killed_for_a_cancel(polaris: NamedEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    with Executor("polaris") as executor:
        f = executor.options(retries=1).submit(wait_forever, str(path))
        (pid,) = wait_until(lambda: runs(path), what="the task to run")
        zygote = psutil.Process(pid).ppid()  # which does the killing
        os.kill(zygote, signal.SIGSTOP)
        try:
            assert f.cancel(force=True) is False, "it is not certain yet"
            polaris.kill()
        finally:
            os.kill(zygote, signal.SIGCONT)
        wait_until(lambda: not is_alive(pid), what="the worker to be killed")
        polaris.start()
        with pytest.raises(CancelledError):
            f.result(WAIT_S)
        assert executor.submit(max, 1, 2).result(WAIT_S) == 2
    assert len(runs(path)) == 1


def test_f2_a_large_result_made_while_nobody_listens(polaris: NamedEndpoint, tmp_path: Path) -> None:
    """Its worker asks for room, and asks the next agent again."""
    gate = Gate.at(tmp_path)
    path = tmp_path / "runs"
    with Executor("polaris") as executor:
        f = executor.submit(make_large, str(path), gate)
        wait_until(lambda: runs(path), what="the task to run")
        polaris.kill()
        gate.open()
        polaris.start()
        assert np.array_equal(f.result(WAIT_S), np.arange(1_000_000))
    assert len(runs(path)) == 1


def test_f2_a_walltime_is_kept_by_the_next_agent(polaris: NamedEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    with Executor("polaris") as executor:
        f = executor.options(walltime_s=1.0).submit(wait_forever, str(path))
        (pid,) = wait_until(lambda: runs(path), what="the task to run")
        polaris.kill()
        polaris.start()
        assert isinstance(f.exception(WAIT_S), WalltimeExceededError)
        wait_until(lambda: not psutil.pid_exists(pid), what="its process to end")
        assert executor.submit(max, 1, 2).result(WAIT_S) == 2


def test_f2_the_process_that_makes_the_workers_is_killed_too(polaris: NamedEndpoint, tmp_path: Path) -> None:
    """Then the workers are dead, and their tasks have used an attempt."""
    path = tmp_path / "runs"
    with Executor("polaris") as executor:
        f = executor.options(retries=1).submit(note_and_wait_once, str(path))
        hopeless = executor.submit(note_and_wait_once, str(tmp_path / "hopeless"))
        (pid,) = wait_until(lambda: runs(path), what="the task to run")
        zygote = psutil.Process(pid).parent()
        assert zygote is not None
        polaris.kill()
        zygote.kill()
        polaris.start()
        assert f.result(WAIT_S) == "alive"
        assert len(runs(path)) == 2
        (pid,) = wait_until(lambda: runs(tmp_path / "hopeless"), what="the other task to run")
        polaris.kill()
        os.kill(pid, signal.SIGKILL)
        polaris.start()
        error = hopeless.exception(WAIT_S)
        assert isinstance(error, WorkerLostError)
        assert error.signal == signal.SIGKILL


def test_l4_workers_that_nobody_adopts_end_in_time(home: Path, tmp_path: Path) -> None:
    """L4: after `adopt_s` no process is left; a start after that takes up what they had written down."""
    endpoint = NamedEndpoint("polaris", **SETTINGS, adopt_s=1.0)
    endpoint.start()
    path = tmp_path / "runs"
    try:
        with Executor("polaris") as executor:
            f = executor.options(retries=1).submit(note_and_wait_once, str(path))
            (pid,) = wait_until(lambda: runs(path), what="the task to run")
            zygote = psutil.Process(pid).ppid()
            endpoint.kill()
            killed = time.monotonic()
            wait_until(lambda: not psutil.pid_exists(pid), what="the worker to end")
            wait_until(lambda: not is_alive(zygote), what="its zygote to end")
            assert 0.9 < time.monotonic() - killed < patience(5)
            endpoint.start()
            assert f.result(WAIT_S) == "alive"
            assert len(runs(path)) == 2
            folder = host_folder("polaris") / "workers"
            assert len(worker_pids("polaris")) == 1
            wait_until(lambda: len(list(folder.glob("*.page"))) == 1, what="the dead's page to go")
    finally:
        endpoint.remove()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
