"""The embedded default: `Executor()` with an endpoint of its own, which needs nothing and leaves nothing."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

import gcref
from gcref import Client, Executor
from gcref.errors import ConfigError, EndpointLostError, NotFoundError
from tests.support.tasks import Gate, hold
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)
TWO_WORKERS = {"workers": 2}


def script(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of the user's, to its end."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, **environment},
        check=False,
    )


def large(size: int = 1_000_000) -> bytes:
    return b"x" * size


def nested(x: int) -> int:
    with Executor() as executor:
        return executor.submit(pow, x, 2).result(WAIT_S)


def test_it_works_without_anything() -> None:
    with Executor() as executor:
        future = executor.submit(pow, 2, 5)
        assert future.result(WAIT_S) == 32
        assert str(executor.endpoint_id) in executor.submit(nested, 3).ref().home
        assert executor.submit(nested, 3).result(WAIT_S) == 9
        with pytest.raises(ZeroDivisionError):
            executor.submit(divmod, 1, 0).result(WAIT_S)
    assert future.result() == 32
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(pow, 1, 1)


def test_live_values_come_here_before_it_ends() -> None:
    """W6: large `f.result()` after the `with` block."""
    with Executor(user_endpoint_config=TWO_WORKERS) as executor:
        kept = [executor.submit(large, 500_000 + number) for number in range(5)]
        executor.submit(large, 600_000)
    assert [len(future.result(0)) for future in kept] == [500_000 + number for number in range(5)]


def test_shutdown_without_waiting_finishes_the_tasks(gate: Gate) -> None:
    executor = Executor(user_endpoint_config=TWO_WORKERS)
    futures = [executor.submit(hold, gate, number) for number in range(4)]
    executor.shutdown(wait=False)
    gate.open()
    assert [future.result(WAIT_S) for future in futures] == [0, 1, 2, 3]


def test_a_callback_may_shut_its_executor_down() -> None:
    """W4."""
    executor = Executor(user_endpoint_config={"workers": 1})
    ended = threading.Event()

    def shut_down(_: Any) -> None:
        executor.shutdown()
        ended.set()

    executor.submit(pow, 2, 3).add_done_callback(shut_down)
    assert ended.wait(WAIT_S)


def test_an_executor_that_is_dropped_ends_its_endpoint() -> None:
    executor = Executor(user_endpoint_config=TWO_WORKERS)
    future = executor.submit(large)
    private = executor._core.private
    assert private is not None
    gone = weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None
    wait_until(private.ended.is_set, timeout_s=30, what="the agent to end")
    assert len(future.result(WAIT_S)) == 1_000_000


def test_the_death_of_its_agent_ends_every_wait() -> None:
    executor = Executor(user_endpoint_config={"workers": 1})
    assert executor.submit(pow, 2, 3).result(WAIT_S) == 8
    stored = executor.submit(large)
    wait_until(stored.done, what="the large value")
    running = executor.submit(time.sleep, 60)
    wait_until(running.running, what="the task to run")
    private = executor._core.private
    assert private is not None
    os.kill(private.process.pid, signal.SIGKILL)
    for future in (running, stored, executor.submit(pow, 1, 1)):
        start = time.monotonic()
        with pytest.raises(EndpointLostError, match="private endpoint"):
            future.result(WAIT_S)
        assert time.monotonic() - start < patience(5)
    executor.shutdown()


def test_it_is_configured_by_a_table(gate: Gate) -> None:
    with Executor(user_endpoint_config={"workers": 3}) as executor:
        held = [executor.submit(hold, gate) for _ in range(3)]
        wait_until(lambda: all(future.running() for future in held), what="three tasks to run at once")
        gate.open()


def test_a_configuration_that_cannot_be_is_a_config_error() -> None:
    with Executor(user_endpoint_config={"wrokers": 3}) as executor:
        future = executor.submit(pow, 1, 1)
        with pytest.raises(ConfigError, match="wrokers"):
            future.result(WAIT_S)
        with pytest.raises(ConfigError, match="wrokers"):
            executor.submit(pow, 1, 1).result(WAIT_S)


def test_two_executors_share_one_private_endpoint() -> None:
    with Client() as client, Executor(client=client, user_endpoint_config=TWO_WORKERS) as executor:
        other = Executor(executor.endpoint_id, client)
        assert other.submit(sum, [executor.submit(pow, 2, 3)], 1).result(WAIT_S) == 9
        other.shutdown()
        assert executor.submit(pow, 2, 3).result(WAIT_S) == 8


def test_views() -> None:
    with Executor(user_endpoint_config=TWO_WORKERS, label="mine") as executor:
        view = executor.options(retries=2, walltime_s=0.2)
        assert (view.endpoint_id, view.task_group_id, view.label) == (
            executor.endpoint_id,
            executor.task_group_id,
            "mine",
        )
        assert view.submit(pow, 2, 3).result(WAIT_S) == 8
        with pytest.raises(TimeoutError):
            view.submit(time.sleep, 60).result(WAIT_S)
        with pytest.raises(TypeError, match="options"):
            executor.options(walltme_s=1)
        executor.submit(time.sleep, 0.3).result(WAIT_S)


def test_registered_functions() -> None:
    with Executor(user_endpoint_config=TWO_WORKERS) as executor:
        name = executor.register_function(pow)
        assert executor.register_function(pow) == name
        assert executor.submit_to_registered_function(name, (2, 3)).result(WAIT_S) == 8
        assert executor.submit_to_registered_function(name, args=[2], kwargs={"exp": 4}).result(WAIT_S) == 16
        with pytest.raises(NotFoundError):
            executor.submit_to_registered_function("no such function")


def test_puts_and_large_functions_go_once() -> None:
    table = bytes(500_000)
    with Client() as client, Executor(client=client, user_endpoint_config=TWO_WORKERS) as executor:
        put = executor.put(table)
        assert [f.result(WAIT_S) for f in [executor.submit(len, put) for _ in range(10)]] == [500_000] * 10
        assert put.result(WAIT_S) == table
        small = executor.put({"a": 1})
        assert executor.submit(len, small).result(WAIT_S) == 1
        sent = client.payload_bytes()["out"]
        assert sent < 600_000
        futures = [executor.submit(lambda n: len(table) + n, n) for n in range(10)]
        assert [future.result(WAIT_S) for future in futures] == [500_000 + n for n in range(10)]
        many = [executor.submit(_use_table(table), n) for n in range(10)]
        assert [future.result(WAIT_S) for future in many] == [500_000 + n for n in range(10)]
        assert client.payload_bytes()["out"] - sent < 1_200_000


def _use_table(table: bytes) -> Any:
    def use(n: int) -> int:
        return len(table) + n

    return use


def test_a_put_that_contains_a_future_keeps_it() -> None:
    with Executor(user_endpoint_config=TWO_WORKERS) as executor:
        inner = executor.submit(large)
        outer = executor.put({"inner": inner})
        del inner
        wait_until(outer.done, what="the put")
        gc.collect()
        found: Any = outer.result(WAIT_S)["inner"]
        assert isinstance(found, gcref.ObjectRef)
        assert len(found.get(WAIT_S)) == 1_000_000
        assert found.size_bytes is not None
        assert found.done()


def test_explain_and_record(gate: Gate) -> None:
    with Executor(user_endpoint_config={"workers": 1}) as executor:
        running = executor.submit(hold, gate, 5)
        waiting = executor.submit(str, running)
        wait_until(running.running, what="the first task to run")
        assert waiting.task_id in waiting.explain()
        assert "ipc" in waiting.explain()
        assert "waiting" in waiting.explain()
        gate.open()
        assert waiting.result(WAIT_S) == "5"
        assert "done" in waiting.explain()
        record = waiting.record
        assert record is not None
        assert record.attempts == 1
        assert record.received_s is not None
        assert record.started_s is not None
        assert record.ended_s is not None
        assert record.received_s <= record.started_s <= record.ended_s <= time.time()


def test_the_interpreter_finishes_the_tasks_as_the_stdlib_does(tmp_path: Path) -> None:
    """W6: interpreter exit."""
    done = script(
        """
        import sys, time
        from gcref import Executor

        def work(folder, number):
            time.sleep(0.2)
            open(f"{folder}/{number}", "w").close()
            return number

        executor = Executor(user_endpoint_config={"workers": 2})
        for number in range(4):
            executor.submit(work, sys.argv[1], number).add_done_callback(lambda f: print("done", f.result()))
        print("main ends")
        """,
        str(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split("\n")) == ["", "done 0", "done 1", "done 2", "done 3", "main ends"]
    assert len(list(tmp_path.iterdir())) == 4


def test_an_exception_in_the_main_program_ends_it_too() -> None:
    done = script(
        """
        from gcref import Executor
        executor = Executor(user_endpoint_config={"workers": 1})
        assert executor.submit(pow, 2, 3).result() == 8
        raise ValueError("the user's own")
        """
    )
    assert done.returncode == 1
    assert "the user's own" in done.stderr


def test_functions_and_classes_of_the_main_module() -> None:
    done = script(
        """
        import dataclasses
        from gcref import Executor

        @dataclasses.dataclass
        class Point:
            x: int

        def move(point, by=1):
            return Point(point.x + by)

        with Executor(user_endpoint_config={"workers": 1}) as executor:
            print(executor.submit(move, executor.submit(move, Point(1))).result(), executor.submit(lambda: 7).result())
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Point(x=3) 7\n", "")


def test_a_child_of_the_users_keeps_nothing_alive(tmp_path: Path) -> None:
    """A forked child that lives on holds none of the pipes by which the agent notices our death."""
    done = script(
        """
        import os, sys, time
        from gcref import Executor

        executor = Executor(user_endpoint_config={"workers": 1})
        executor.submit(pow, 2, 3).result()
        child = os.fork()
        if child == 0:
            for stream in (0, 1, 2):
                os.close(stream)
            deadline = time.monotonic() + 60
            while not os.path.exists(sys.argv[1]) and time.monotonic() < deadline:
                time.sleep(0.01)
            os._exit(0)
        print(executor._core.private.process.pid, flush=True)
        os._exit(0)  # no time to say good-bye
        """,
        str(tmp_path / "gate"),
    )
    agent = int(done.stdout)
    try:
        wait_until(lambda: not os.path.exists(f"/proc/{agent}"), timeout_s=20, what="the agent to end")
    finally:
        (tmp_path / "gate").touch()


def test_many_threads_start_executors() -> None:
    results: list[int] = []

    def work(number: int) -> None:
        with Executor(user_endpoint_config={"workers": 1}) as executor:
            results.append(executor.submit(pow, number, 2).result(WAIT_S))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 4, 9]
