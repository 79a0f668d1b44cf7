"""Cancelling (C1 … C4): in each state, in a chain, at an endpoint that does not answer, and forked children."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from gcref import Client, ComputeFuture, Executor, LocalEndpoint
from gcref.errors import DependencyError
from tests.conftest import Sites
from tests.support.programs import output_of
from tests.support.tasks import Gate, hold, inc, touch
from tests.support.waiting import patience, wait_until

WAIT_S: Final = patience(30)

ANSWER_S: Final = 1.5
"""`cancel` answers within a second; the rest is for a busy machine."""


def fill(executor: Executor, gate: Gate) -> list[ComputeFuture[Any]]:
    """Keeps both workers of a site busy until the gate is open."""
    blockers = [executor.submit(hold, gate, n) for n in range(2)]
    wait_until(lambda: all(f.running() for f in blockers), what="both workers to be busy")
    return blockers


def hold_and_tell(gate: Gate, path: str) -> int:
    Path(path).write_text(str(os.getpid()))
    return int(hold(gate, 1))


def worker_of(path: Path) -> int:
    """The process that runs the task which writes its id there."""
    return int(wait_until(lambda: path.exists() and path.read_text(), what="the task to run"))


def is_cancelled(f: ComputeFuture[Any]) -> bool:
    """Whether the future is what a cancelled future of the stdlib is."""
    assert f.done()
    assert not f.running()
    for ask in (f.result, f.exception):
        with pytest.raises(CancelledError):
            ask(0)
    return f.cancelled() and f.cancel() and f.cancel(force=True)


# ------------------------------------------------------------------------------------------------------------- C1


@pytest.mark.parametrize("force", [False, True])
def test_c1_a_task_that_waits_for_its_arguments(
    polaris: Executor, midway: Executor, gate: Gate, tmp_path: Path, force: bool
) -> None:
    held = polaris.submit(hold, gate)
    here = polaris.submit(touch, str(tmp_path / "here"), held)
    there = midway.submit(touch, str(tmp_path / "there"), held)
    for f in (here, there):
        assert f.cancel(force) is True
        assert is_cancelled(f)
    assert not held.done(), "what it waited for goes on"
    gate.open()
    assert held.result(WAIT_S) == 1
    assert [executor.submit(inc, held).result(WAIT_S) for executor in (polaris, midway)] == [2, 2]
    assert sorted(os.listdir(tmp_path)) == ["gate"]


@pytest.mark.parametrize("force", [False, True])
def test_c1_a_task_that_is_queued_at_the_endpoint(
    polaris: Executor, gate: Gate, tmp_path: Path, force: bool
) -> None:
    blockers = fill(polaris, gate)
    queued = [polaris.submit(touch, str(tmp_path / str(n))) for n in range(10)]
    assert [f.cancel(force) for f in queued] == [True] * 10
    assert all(is_cancelled(f) for f in queued)
    assert not any(f.done() for f in blockers)
    gate.open()
    assert [f.result(WAIT_S) for f in blockers] == [0, 1], "no worker was killed"
    assert [polaris.submit(inc, n).result(WAIT_S) for n in range(10)] == list(range(1, 11))
    assert sorted(os.listdir(tmp_path)) == ["gate"]


def test_c1_a_task_that_a_worker_holds_ahead(polaris: Executor, gate: Gate, tmp_path: Path) -> None:
    """Short tasks are sent to workers before they can begin; what has not begun can be cancelled all the same."""
    warm = [polaris.submit(touch, str(tmp_path / "warm")) for _ in range(200)]
    assert not wait(warm, WAIT_S).not_done
    blockers = [polaris.submit(hold, gate, n) for n in range(2)]
    ahead = [polaris.submit(touch, str(tmp_path / str(n))) for n in range(50)]
    wait_until(lambda: all(f.running() for f in blockers), what="both workers to be busy")
    told = {f: f.cancel() for f in ahead}
    gate.open()
    for number, f in enumerate(ahead):
        if told[f]:
            assert is_cancelled(f)
        else:
            assert f.result(WAIT_S)
        assert (tmp_path / str(number)).exists() is not told[f], "either it runs or it is cancelled"
    assert sum(told.values()) >= 25, "two workers were busy with something else"


def test_c1_a_task_that_runs(polaris: Executor, gate: Gate, tmp_path: Path) -> None:
    f = polaris.submit(hold_and_tell, gate, str(tmp_path / "pid"))
    worker = worker_of(tmp_path / "pid")
    assert f.cancel() is False
    assert not f.cancelled()
    assert psutil.pid_exists(worker)
    gate.open()
    assert f.result(WAIT_S) == 1
    assert f.cancel() is False


def test_c1_force_kills_the_worker_of_a_task_that_runs(
    polaris: Executor, midway: Executor, gate: Gate, tmp_path: Path
) -> None:
    f = polaris.submit(hold_and_tell, gate, str(tmp_path / "pid"))
    dependent = midway.submit(inc, f)
    bystander = polaris.submit(hold, gate, "bystander")
    worker = worker_of(tmp_path / "pid")
    assert f.cancel(force=True) is True
    assert is_cancelled(f)
    assert not psutil.pid_exists(worker)
    with pytest.raises(DependencyError) as caught:
        dependent.result(WAIT_S)
    assert isinstance(caught.value.__cause__, CancelledError)
    assert not bystander.done()
    # Its place is taken by another worker, while the other task still runs.
    assert polaris.submit(inc, 1).result(WAIT_S) == 2
    gate.open()
    assert bystander.result(WAIT_S) == "bystander"


def test_c1_force_with_retries_does_not_run_it_again(two_sites: Sites, gate: Gate, tmp_path: Path) -> None:
    with Executor(two_sites.polaris.endpoint_id, retries=3) as executor:
        f = executor.submit(hold_and_tell, gate, str(tmp_path / "pid"))
        worker = worker_of(tmp_path / "pid")
        assert f.cancel(force=True) is True
        assert not psutil.pid_exists(worker)
        assert executor.submit(inc, 1).result(WAIT_S) == 2
    assert (tmp_path / "pid").read_text() == str(worker)


def test_c1_force_says_yes_only_when_the_process_is_dead(
    polaris: Executor, gate: Gate, tmp_path: Path
) -> None:
    f = polaris.submit(hold_and_tell, gate, str(tmp_path / "pid"))
    worker = worker_of(tmp_path / "pid")
    zygote = psutil.Process(worker).ppid()  # which does the killing
    os.kill(zygote, signal.SIGSTOP)
    try:
        assert f.cancel(force=True) is False, "it is not certain"
        assert not f.done()
    finally:
        os.kill(zygote, signal.SIGCONT)
    with pytest.raises(CancelledError):
        f.result(WAIT_S)
    assert not psutil.pid_exists(worker)


def test_c1_force_twice_is_once(polaris: Executor, gate: Gate, tmp_path: Path) -> None:
    f = polaris.submit(hold_and_tell, gate, str(tmp_path / "pid"))
    zygote = psutil.Process(worker_of(tmp_path / "pid")).ppid()
    os.kill(zygote, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert not any(pool.map(lambda force: f.cancel(force=force), [True, False, True, True]))
    finally:
        os.kill(zygote, signal.SIGCONT)
    wait([f], WAIT_S)
    assert is_cancelled(f)
    assert polaris.submit(inc, 1).result(WAIT_S) == 2


@pytest.mark.parametrize("force", [False, True])
def test_c1_a_task_that_is_done(polaris: Executor, force: bool) -> None:
    f = polaris.submit(inc, 1)
    assert f.result(WAIT_S) == 2
    assert f.cancel(force) is False
    assert not f.cancelled()
    assert f.result(0) == 2
    failed = polaris.submit(hold, "no gate")
    assert isinstance(failed.exception(WAIT_S), AttributeError)
    assert failed.cancel(force) is False


def test_c1_a_task_that_has_not_been_sent(home: Path, tmp_path: Path) -> None:
    """The endpoint is still starting: the client itself cancels."""
    with Executor(user_endpoint_config={"workers": 1}) as executor:
        f = executor.submit(touch, str(tmp_path / "ran"))
        dependent = executor.submit(inc, f)
        assert f.cancel() is True
        assert is_cancelled(f)
        assert isinstance(dependent.exception(WAIT_S), DependencyError)
        assert executor.submit(inc, 1).result(WAIT_S) == 2
    assert not (tmp_path / "ran").exists()


def test_c1_a_task_for_an_endpoint_that_is_not_reached_yet(home: Path, tmp_path: Path) -> None:
    """Its home is told later, so that what waits for it, also at another site, ends as for any cancelled task."""
    with LocalEndpoint("slow", workers=1) as slow, LocalEndpoint("quick", workers=1), Client() as client:
        a, b = Executor("slow", client), Executor("quick", client)
        os.kill(slow.pid, signal.SIGSTOP)
        try:
            f = a.submit(touch, str(tmp_path / "ran"))
            dependents = [b.submit(inc, f), a.submit(inc, f)]
            answer, took_s = timed(f.cancel)
            assert answer is True
            assert took_s < patience(ANSWER_S)
            dependents += [b.submit(inc, f), a.submit(inc, f)]
        finally:
            os.kill(slow.pid, signal.SIGCONT)
        for dependent in dependents:
            with pytest.raises(DependencyError) as caught:
                dependent.result(WAIT_S)
            assert isinstance(caught.value.__cause__, CancelledError)
        assert a.submit(inc, 1).result(WAIT_S) == 2
    assert not (tmp_path / "ran").exists()


def test_c1_whoever_waits_hears_of_it(polaris: Executor, gate: Gate) -> None:
    called: list[bool] = []
    f = polaris.submit(inc, polaris.submit(hold, gate))
    f.add_done_callback(lambda f: called.append(f.cancelled()))
    assert f.cancel()
    assert wait([f], WAIT_S).done == {f}
    wait_until(lambda: called == [True], what="the callback")
    assert "cancelled" in repr(f)
    assert "cancelled" in f.explain()


# ------------------------------------------------------------------------------------------------------------- C2


def test_c2_in_the_middle_of_a_chain(polaris: Executor, midway: Executor, gate: Gate, tmp_path: Path) -> None:
    """What is upstream completes; what is downstream, also at another site, ends in DependencyError."""
    first = polaris.submit(hold, gate, 1)
    second = midway.submit(inc, first)
    middle = polaris.submit(inc, second)
    after = midway.submit(inc, middle)
    last = polaris.submit(touch, str(tmp_path / "last"), [after, {"k": first}])
    assert middle.cancel() is True
    assert is_cancelled(middle)
    gate.open()
    assert (first.result(WAIT_S), second.result(WAIT_S)) == (1, 2)
    for f, blamed in ((after, middle), (last, after)):
        with pytest.raises(DependencyError) as caught:
            f.result(WAIT_S)
        assert caught.value.task_ids == (blamed.task_id,)
        assert isinstance(caught.value.__cause__, CancelledError)
        assert not f.cancelled()
    assert not (tmp_path / "last").exists()


def test_c2_a_cancelled_argument_fails_what_is_submitted_afterwards(
    polaris: Executor, midway: Executor, gate: Gate
) -> None:
    middle = polaris.submit(inc, polaris.submit(hold, gate))
    assert middle.cancel()
    for executor in (polaris, midway):
        with pytest.raises(DependencyError) as caught:
            executor.submit(inc, middle).result(WAIT_S)
        assert isinstance(caught.value.__cause__, CancelledError)


# ------------------------------------------------------------------------------------------------------------- C3


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    since = time.monotonic()
    answer = call()
    return answer, time.monotonic() - since


def test_c3_a_frozen_agent_and_the_request_stands(two_sites: Sites, gate: Gate, tmp_path: Path) -> None:
    with Executor(two_sites.polaris.endpoint_id) as executor:
        blockers = fill(executor, gate)
        queued = executor.submit(touch, str(tmp_path / "queued"))
        waiting = executor.submit(touch, str(tmp_path / "waiting"), blockers)
        wait_until(lambda: "queued" in queued.explain() or "ready" in queued.explain(), what=queued.explain)
        os.kill(two_sites.polaris.pid, signal.SIGSTOP)
        try:
            for f in (queued, waiting):
                answer, took_s = timed(f.cancel)
                assert answer is False
                assert took_s < patience(ANSWER_S)
                assert not f.done()
        finally:
            os.kill(two_sites.polaris.pid, signal.SIGCONT)
        for f in (queued, waiting):
            with pytest.raises(CancelledError):
                f.result(WAIT_S)
            assert is_cancelled(f)
        gate.open()
        assert [f.result(WAIT_S) for f in blockers] == [0, 1]
        assert executor.submit(inc, 1).result(WAIT_S) == 2
    assert sorted(os.listdir(tmp_path)) == ["gate"]


def test_c3_a_task_that_runs_at_a_frozen_agent(two_sites: Sites, gate: Gate, tmp_path: Path) -> None:
    """Its result counts: without force, what runs is not cancelled."""
    with Executor(two_sites.polaris.endpoint_id) as executor:
        f = executor.submit(hold_and_tell, gate, str(tmp_path / "pid"))
        worker_of(tmp_path / "pid")
        os.kill(two_sites.polaris.pid, signal.SIGSTOP)
        try:
            answer, took_s = timed(f.cancel)
        finally:
            os.kill(two_sites.polaris.pid, signal.SIGCONT)
        assert answer is False
        assert took_s < patience(ANSWER_S)
        gate.open()
        assert f.result(WAIT_S) == 1


def test_c3_an_agent_that_is_away(home: Path, gate: Gate) -> None:
    with LocalEndpoint("away", workers=1) as site, Executor(site.endpoint_id) as executor:
        f = executor.submit(hold, gate)
        wait_until(f.running, what="the task to run")
        os.kill(site.pid, signal.SIGKILL)
        answer, took_s = timed(f.cancel)
        assert answer is False
        assert took_s < patience(ANSWER_S)
        gate.open()
        executor.shutdown(wait=False)


# ------------------------------------------------------------------------------------------------------------- C4

_CHILD_OF_A_FORK: Final = """
import os, sys, time, warnings
import gcref
from tests.support.tasks import *

warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks
executor = gcref.Executor({endpoint})
done, pending = executor.submit(inc, 1), executor.submit(hold, Gate({gate!r}), 5)
assert done.result(30) == 2
large = executor.submit(blob_of, 3_000_000)
gcref_wait = lambda: large.exception(30)
gcref_wait()
parent = os.getpid()
child = os.fork()
if child == 0:
    tries = {{
        "submit": lambda: executor.submit(inc, 1),
        "with a future": lambda: executor.submit(inc, done),
        "map": lambda: list(executor.map(inc, [1])),
        "put": lambda: executor.put(1),
        "put large": lambda: executor.put(bytes(1_000_000)),
        "view": lambda: executor.options(retries=1).submit(inc, 1),
        "reload": executor.reload_tasks,
        "result": pending.result,
        "result in time": lambda: pending.result(20),
        "exception": pending.exception,
        "large result": large.result,
        "cancel": pending.cancel,
        "explain": pending.explain,
    }}
    since = time.monotonic()
    for name, attempt in tries.items():
        try:
            attempt()
        except RuntimeError as error:
            print(name, "refused" if "fork" in str(error) else error, flush=True)
        except BaseException as error:
            print(name, repr(error), flush=True)
        else:
            print(name, "went through", flush=True)
    print("known", done.result(0), done.done(), flush=True)
    print("soon", time.monotonic() - since < 5, flush=True)
    del executor, done, large, pending, tries
    {ending}
_, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status), flush=True)
open({gate!r}, "w").close()
assert pending.result(30) == 5
assert len(large.result(30)) == 3_000_000
assert executor.submit(inc, done).result(30) == 3
executor.shutdown()
print("parent", os.getpid() == parent, flush=True)
"""


@pytest.mark.parametrize("endpoint", ["named", "private"])
@pytest.mark.parametrize("ending", ["os._exit(0)", "sys.exit(0)"])
def test_c4_in_a_forked_child_every_use_is_an_error_and_the_parent_is_unharmed(
    two_sites: Sites, tmp_path: Path, endpoint: str, ending: str
) -> None:
    where = '"polaris"' if endpoint == "named" else 'user_endpoint_config={"workers": 2}'
    said = output_of(
        _CHILD_OF_A_FORK.format(endpoint=where, gate=str(tmp_path / "gate"), ending=ending), tmp_path
    )
    lines = dict(line.rsplit(" ", 1) for line in said.splitlines())
    assert lines.pop("known 2") == "True"
    assert lines.pop("soon") == "True"
    assert lines.pop("child") == "0"
    assert lines.pop("parent") == "True"
    assert lines.pop("result in time") == "refused"
    assert len(lines) == 12
    assert set(lines.values()) == {"refused"}, said


def test_c4_the_child_may_make_an_executor_of_its_own(two_sites: Sites, tmp_path: Path) -> None:
    said = output_of(
        """
        import os, sys, warnings
        import gcref
        from tests.support.tasks import *

        warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks
        executor = gcref.Executor("polaris")
        assert executor.submit(inc, 1).result(30) == 2
        child = os.fork()
        if child == 0:
            with gcref.Executor("polaris") as mine:
                print("child", mine.submit(inc, 2).result(30), flush=True)
            with gcref.Executor(user_endpoint_config={"workers": 1}) as private:
                print("private", private.submit(inc, 3).result(30), flush=True)
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        print("parent", executor.submit(inc, 4).result(30), status, flush=True)
        """,
        tmp_path,
    )
    assert said.splitlines() == ["child 3", "private 4", "parent 5 0"]
