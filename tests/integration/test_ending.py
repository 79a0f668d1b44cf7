"""Ending (W6): `map`, `shutdown`, large values after the `with` block, and the end of the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

import psutil
import pytest

from gcref import Executor, LocalEndpoint
from gcref.errors import EndpointLostError
from tests.conftest import Sites
from tests.support.programs import command_of, environment
from tests.support.tasks import Gate, blob_of, fail, hold, inc, touch
from tests.support.waiting import patience, wait_until

WAIT_S: Final = patience(30)

EXIT_S: Final = 5.0
"""How long the end of an interpreter may be held up."""


def power(base: int, exponent: int) -> int:
    return int(base**exponent)


# ------------------------------------------------------------------------------------------------------------ map


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_w6_map_is_in_order_and_takes_several_iterables(polaris: Executor, chunksize: int) -> None:
    assert list(polaris.map(power, range(10), [2, 3] * 10, chunksize=chunksize)) == [
        n ** (2, 3)[n % 2] for n in range(10)
    ]
    assert list(polaris.map(power, [], [])) == []


def test_w6_map_takes_futures(polaris: Executor, midway: Executor) -> None:
    made = [polaris.submit(inc, n) for n in range(10)]
    assert list(midway.map(inc, made, chunksize=4)) == list(range(2, 12))


def test_w6_map_with_a_timeout(polaris: Executor, gate: Gate, tmp_path: Path) -> None:
    gates = [Gate.at(tmp_path, "open"), gate, gate, gate, gate]
    gates[0].open()
    results = polaris.map(hold, gates, range(5), timeout=1.0)
    assert next(results) == 0
    with pytest.raises(TimeoutError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_w6_map_with_an_error_in_the_middle(polaris: Executor, gate: Gate, tmp_path: Path) -> None:
    """What comes after the error is cancelled if it has not begun."""
    held = polaris.submit(hold, gate)
    paths = [str(tmp_path / str(n)) for n in range(5)]
    results = polaris.map(_touch_or_fail, paths, [False, True, False, False, False], [1, 1, held, held, held])
    assert next(results) == paths[0]
    with pytest.raises(ValueError, match="on purpose"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    gate.open()
    assert polaris.submit(inc, held).result(WAIT_S) == 2
    assert sorted(os.listdir(tmp_path)) == ["0", "gate"], "nobody wanted the rest any more"


def _touch_or_fail(path: str, is_bad: bool, _after: int) -> str:
    if is_bad:
        raise ValueError("on purpose")
    return touch(path)


def test_w6_map_with_a_bad_chunksize(polaris: Executor) -> None:
    with pytest.raises(ValueError, match="chunksize"):
        polaris.map(inc, [1], chunksize=0)


# ------------------------------------------------------------------------------------------------------- shutdown


def test_w6_shutdown_waits_for_what_was_submitted(two_sites: Sites, gate: Gate) -> None:
    executor = Executor(two_sites.polaris.endpoint_id)
    f = executor.submit(hold, gate, 3)
    executor.shutdown(wait=False)
    assert not f.done()
    gate.open()
    executor.shutdown()
    assert f.done()
    assert f.result(0) == 3
    executor.shutdown()


def test_w6_shutdown_that_cancels_what_has_not_begun(two_sites: Sites, gate: Gate, tmp_path: Path) -> None:
    executor = Executor(two_sites.polaris.endpoint_id)
    running = [executor.submit(hold, gate, n) for n in range(2)]
    wait_until(lambda: all(f.running() for f in running), what="both workers to be busy")
    queued = [executor.submit(touch, str(tmp_path / str(n))) for n in range(20)]
    waiting = [executor.submit(inc, f) for f in running]
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(f.cancelled() for f in queued + waiting)
    assert not any(f.done() for f in running)
    gate.open()
    assert [f.result(WAIT_S) for f in running] == [0, 1]
    with Executor(two_sites.polaris.endpoint_id) as other:
        assert other.submit(inc, 1).result(WAIT_S) == 2
    assert sorted(os.listdir(tmp_path)) == ["gate"]


def test_w6_submit_after_shutdown_is_a_runtime_error(two_sites: Sites) -> None:
    with Executor(two_sites.polaris.endpoint_id) as executor:
        view = executor.options(retries=1)
        name = executor.register_function(inc)
    for late in (executor, view):
        with pytest.raises(RuntimeError, match="after shutdown"):
            late.submit(inc, 1)
        with pytest.raises(RuntimeError, match="after shutdown"):
            late.map(inc, [1])
        with pytest.raises(RuntimeError, match="after shutdown"):
            late.put(1)
        with pytest.raises(RuntimeError, match="after shutdown"):
            late.submit_to_registered_function(name, (1,))


def test_w6_values_are_there_after_the_with_block_of_a_private_endpoint() -> None:
    with Executor(user_endpoint_config={"workers": 1}) as executor:
        small = executor.submit(inc, 1)
        large = executor.submit(blob_of, 30_000_000)
        chained = executor.submit(len, large)
        put = executor.put(bytes(2_000_000))
        failed = executor.submit(fail, "why")
    assert small.result(0) == 2
    assert len(large.result(0)) == 30_000_000
    assert chained.result(0) == 30_000_000
    assert put.result(0) == bytes(2_000_000)
    assert isinstance(failed.exception(0), ValueError)


def test_w6_large_values_are_there_after_the_with_block_of_a_named_endpoint(two_sites: Sites) -> None:
    with Executor(two_sites.polaris.endpoint_id) as executor:
        large = executor.submit(blob_of, 5_000_000)
    assert len(large.result(WAIT_S)) == 5_000_000


def test_w6_shutdown_of_a_private_endpoint_that_cancels(gate: Gate) -> None:
    executor = Executor(user_endpoint_config={"workers": 1})
    first = executor.submit(inc, 1)
    first.result(WAIT_S)
    running = executor.submit(hold, gate)
    wait_until(running.running, what="the task to run")
    queued = [executor.submit(inc, n) for n in range(10)]
    queued[-1].add_done_callback(lambda _: gate.open())
    executor.shutdown(cancel_futures=True)
    assert all(f.cancelled() for f in queued)
    assert running.result(0) == 1


# -------------------------------------------------------------------------------------------- end of the interpreter


class Said:
    """What a program printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str, took_s: float) -> None:
        self.code = code
        self.out = out
        self.err = err
        self.took_s = took_s
        """From when it said that its last line is done, to its end."""

    def __repr__(self) -> str:
        return f"exit code {self.code} after {self.took_s:.1f} s\n{self.out}\n{self.err}"


def program(text: str, folder: Path) -> Said:
    """Runs a program with the arguments of a user; it prints "end" when its last line is done."""
    child = subprocess.Popen(
        command_of(text, folder),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stderr is not None
        out, since = "", time.monotonic()
        for line in child.stdout:
            out += line
            since = time.monotonic()
        try:
            code = child.wait(patience(20))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGABRT)
            raise
        took_s = time.monotonic() - since
        err = child.stderr.read()
    return Said(code, out, err, took_s)


def test_w6_the_interpreter_ends_and_the_tasks_at_named_endpoints_go_on(
    two_sites: Sites, tmp_path: Path
) -> None:
    """Running, queued and waiting ones, over two sites; nothing was asked for, nothing was shut down."""
    gate = Gate.at(tmp_path)
    said = program(
        f"""
        gate = Gate({gate.path!r})
        a, b = gcref.Executor("polaris"), gcref.Executor("midway")
        running = [a.submit(hold, gate, n) for n in range(4)]
        chained = [b.submit(hold, gate, f) for f in running]
        last = [a.submit(touch, {str(tmp_path)!r} + f"/last{{n}}", f) for n, f in enumerate(chained)]
        del running, chained
        print("end", flush=True)
        """,
        tmp_path,
    )
    assert (said.code, said.out, said.err) == (0, "end\n", ""), said
    assert said.took_s < patience(EXIT_S), said
    assert not list(tmp_path.glob("last*"))
    gate.open()
    wait_until(
        lambda: len(list(tmp_path.glob("last*"))) == 4,
        timeout_s=30,
        what=lambda: f"the graph to go on without its client: {os.listdir(tmp_path)}",
    )


def test_w6_it_ends_with_many_submits_that_nobody_has_acknowledged_yet(
    two_sites: Sites, tmp_path: Path
) -> None:
    said = program(
        f"""
        a = gcref.Executor("polaris")
        for n in range(3000):
            a.submit(inc, n)
        a.submit(touch, {str(tmp_path / "last")!r})
        print("end", flush=True)
        """,
        tmp_path,
    )
    assert (said.code, said.err) == (0, ""), said
    assert said.took_s < patience(EXIT_S), said
    wait_until((tmp_path / "last").exists, timeout_s=30, what="the last task to run")


def test_w6_it_ends_within_five_seconds_when_the_endpoint_does_not_answer(home: Path, tmp_path: Path) -> None:
    """It says how many tasks may not have arrived."""
    with LocalEndpoint("frozen", workers=1) as site:
        os.kill(site.pid, signal.SIGSTOP)
        try:
            said = program(
                """
                a = gcref.Executor("frozen")
                futures = [a.submit(inc, n) for n in range(7)]
                print("end", flush=True)
                """,
                tmp_path,
            )
        finally:
            os.kill(site.pid, signal.SIGCONT)
    assert said.code == 0, said
    assert said.took_s < patience(EXIT_S + 2), said
    assert "7 tasks may not have reached" in said.err, said


def test_w6_it_ends_while_a_thread_waits_for_a_result(two_sites: Sites, tmp_path: Path) -> None:
    """A thread that waits for a task at a named endpoint hears that the client has ended."""
    gate = Gate.at(tmp_path)
    said = program(
        f"""
        import threading
        a = gcref.Executor("polaris")
        f = a.submit(hold, Gate({gate.path!r}))

        def wait():
            try:
                f.result()
            except gcref.errors.GcrefError as error:
                print(type(error).__name__, flush=True)

        threading.Thread(target=wait).start()
        print("end", flush=True)
        """,
        tmp_path,
    )
    gate.open()
    assert said.code == 0, said
    assert said.out.split() == ["end", EndpointLostError.__name__], said
    assert said.took_s < patience(EXIT_S), said


def test_w6_it_ends_by_an_exception_and_by_sys_exit(two_sites: Sites, tmp_path: Path) -> None:
    gate = Gate.at(tmp_path)
    for number, ending in enumerate(("raise ValueError('mine')", "sys.exit(3)")):
        said = program(
            f"""
            import sys
            a = gcref.Executor("polaris")
            f = a.submit(hold, Gate({gate.path!r}))
            g = a.submit(touch, {str(tmp_path / str(number))!r}, f)
            print("end", flush=True)
            {ending}
            """,
            tmp_path,
        )
        assert said.code == (1, 3)[number], said
        assert ("ValueError: mine" in said.err) is (number == 0), said
        assert said.took_s < patience(EXIT_S), said
    gate.open()
    for number in range(2):
        wait_until((tmp_path / str(number)).exists, timeout_s=30, what="the task to run")


def test_w6_the_with_block_waits_and_an_exception_inside_it_too(two_sites: Sites, tmp_path: Path) -> None:
    said = program(
        f"""
        with gcref.Executor("polaris") as a:
            a.submit(touch, {str(tmp_path / "ran")!r})
        import os
        print(os.path.exists({str(tmp_path / "ran")!r}), "end", flush=True)
        """,
        tmp_path,
    )
    assert (said.code, said.out, said.err) == (0, "True end\n", ""), said


def test_w6_a_private_endpoint_finishes_its_tasks_first(home: Path, tmp_path: Path) -> None:
    """As the stdlib's executors do; also callbacks run, and nothing of the endpoint is left."""
    said = program(
        f"""
        import os, time
        a = gcref.Executor(user_endpoint_config={{"workers": 1}})
        f = a.submit(time.sleep, 0.5)
        g = a.submit(touch, {str(tmp_path / "ran")!r}, f)
        g.add_done_callback(lambda g: print("called", g.result() == {str(tmp_path / "ran")!r}, flush=True))
        print("end", a._core.private.process.pid, flush=True)
        """,
        tmp_path,
    )
    assert said.code == 0, said
    assert said.err == "", said
    assert "called True" in said.out, said
    assert (tmp_path / "ran").exists()
    assert not psutil.pid_exists(int(said.out.split()[1]))
