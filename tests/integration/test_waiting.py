"""Waiting and ending (W1 … W6): timeouts, the stdlib's tools, asyncio, callbacks, threads, `map`, shutdown."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gcref import ComputeFuture, Executor
from tests.conftest import Sites
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)


def square(x: int) -> int:
    return x * x


def after(gate: str, value: Any = "value") -> Any:
    """The value, once the file is there."""
    while not os.path.exists(gate):
        time.sleep(0.002)
    return value


def large(size: int = 1_000_000) -> bytes:
    return b"x" * size


def fail_at(bad: int, x: int) -> int:
    if x == bad:
        raise ValueError(f"bad {x}")
    return x


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "gate"
    yield path
    path.touch()


def test_w1_a_timeout_and_later_the_value(polaris: Executor, gate: Path) -> None:
    future = polaris.submit(after, str(gate))
    for call in (future.result, future.exception):
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            call(timeout=0.1)
        assert time.monotonic() - start < patience(2)
    gate.touch()
    assert future.result(WAIT_S) == "value"


def test_w2_the_stdlibs_tools_over_a_mixture(polaris: Executor, gate: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        ours = [polaris.submit(square, 3), polaris.submit(after, str(gate))]
        theirs = [pool.submit(square, 4), pool.submit(after, str(gate))]
        mixed: list[concurrent.futures.Future[Any]] = [*ours, *theirs]
        done, not_done = concurrent.futures.wait(mixed, WAIT_S, concurrent.futures.FIRST_COMPLETED)
        assert done
        assert {ours[1], theirs[1]} <= not_done
        found = concurrent.futures.as_completed(mixed, WAIT_S)
        assert {next(found), next(found)} == {ours[0], theirs[0]}
        gate.touch()
        assert set(found) == {ours[1], theirs[1]}
        assert concurrent.futures.wait(mixed, WAIT_S).not_done == set()


def test_w3_asyncio(polaris: Executor, gate: Path) -> None:
    async def value_of(future: ComputeFuture[Any]) -> Any:
        return await future

    async def main() -> None:
        future = polaris.submit(after, str(gate))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(value_of(future), 0.05)
        assert not future.done()
        gate.touch()
        assert [await future, await future] == ["value"] * 2
        assert await asyncio.wrap_future(polaris.submit(square, 5)) == 25
        assert len(await polaris.submit(large)) == 1_000_000
        assert len(await asyncio.wrap_future(polaris.submit(large))) == 1_000_000
        with pytest.raises(ValueError, match="bad 1"):
            await polaris.submit(fail_at, 1, 1)
        assert await asyncio.gather(*[value_of(polaris.submit(square, n)) for n in range(20)]) == [
            n * n for n in range(20)
        ]

    asyncio.run(asyncio.wait_for(main(), WAIT_S))


def test_w3_a_large_value_never_holds_up_the_loop(polaris: Executor) -> None:
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.005)

    async def main() -> None:
        ticking = asyncio.create_task(tick())
        assert len(await polaris.submit(large, 100_000_000)) == 100_000_000
        ticking.cancel()

    asyncio.run(asyncio.wait_for(main(), WAIT_S))
    assert max(b - a for a, b in itertools.pairwise(ticks)) < patience(1)


def test_w4_callbacks(polaris: Executor, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []
    future = polaris.submit(square, 3)
    future.result(WAIT_S)
    future.add_done_callback(lambda f: seen.append(f.result()))
    assert seen == [9]

    first = polaris.submit(square, 4)
    first.add_done_callback(lambda f: 1 / 0)
    first.add_done_callback(lambda f: seen.append(polaris.submit(square, f.result()).result(WAIT_S)))
    big = polaris.submit(large)
    big.add_done_callback(lambda f: seen.append(len(f.result(WAIT_S))))
    wait_until(lambda: len(seen) == 3, timeout_s=30, what="the callbacks")
    assert sorted(seen) == [9, 256, 1_000_000]
    assert "exception calling callback" in caplog.text


def test_w5_many_threads(polaris: Executor) -> None:
    """W5: 10 threads × 1000 submits."""
    sums: list[int] = []

    def work(number: int) -> None:
        futures = [polaris.submit(square, number * 1000 + index) for index in range(1000)]
        sums.append(sum(future.result(WAIT_S) for future in futures))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sums) == sum(n * n for n in range(10_000))


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_w6_map(polaris: Executor, chunksize: int) -> None:
    assert list(polaris.map(square, range(10), chunksize=chunksize)) == [n * n for n in range(10)]
    assert list(polaris.map(pow, [2, 3], [3, 2, 9], chunksize=chunksize)) == [8, 9]
    assert list(polaris.map(square, [], chunksize=chunksize)) == []
    with pytest.raises(ValueError, match="chunksize"):
        polaris.map(square, [1], chunksize=0)


def test_w6_map_with_an_error_in_the_middle_cancels_the_rest(polaris: Executor, tmp_path: Path) -> None:
    def work(x: int) -> int:
        if x == 2:
            raise ValueError("bad 2")
        if x > 2:
            time.sleep(0.05)
        (tmp_path / str(x)).touch()
        return x

    results = polaris.map(work, range(200))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="bad 2"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    assert polaris.submit(square, 1).result(WAIT_S) == 1
    assert len(list(tmp_path.iterdir())) < 100


def test_w6_map_with_a_timeout(polaris: Executor, gate: Path) -> None:
    results = polaris.map(after, [str(gate)], timeout=0.1)
    with pytest.raises(TimeoutError):
        next(results)


def test_w6_shutdown_without_waiting_cancels_what_has_not_begun(two_sites: Sites, gate: Path) -> None:
    executor = Executor(two_sites.polaris.endpoint_id)
    running = [executor.submit(after, str(gate)) for _ in range(2)]
    wait_until(lambda: all(future.running() for future in running), what="two tasks to run")
    waiting = [executor.submit(square, number) for number in range(20)]
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in waiting)
    for use in (
        lambda: executor.submit(square, 1),
        lambda: executor.put(1),
        lambda: executor.options(retries=1).submit(square, 1),
    ):
        with pytest.raises(RuntimeError, match="after shutdown"):
            use()
    gate.touch()
    assert [future.result(WAIT_S) for future in running] == ["value"] * 2


def test_w6_shutdown_waits(two_sites: Sites, gate: Path) -> None:
    executor = Executor("polaris")
    future = executor.submit(after, str(gate))
    threading.Timer(0.1, gate.touch).start()
    executor.shutdown()
    assert future.done()
    executor.shutdown()


def test_w6_a_large_value_after_the_with_block(two_sites: Sites) -> None:
    with Executor("polaris") as executor:
        future = executor.submit(large)
    assert len(future.result(WAIT_S)) == 1_000_000


def test_w6_the_interpreter_exits_and_named_endpoints_go_on(two_sites: Sites, tmp_path: Path) -> None:
    """W6: exits within 5 s, and the tasks go on."""
    script = """
        import sys, time
        from gcref import Executor

        def work(folder, number):
            time.sleep(0.5)
            open(f"{folder}/{number}", "w").close()

        executor = Executor("midway")
        futures = [executor.submit(work, sys.argv[1], number) for number in range(8)]
    """
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True, timeout=WAIT_S)
    assert time.monotonic() - start < patience(5)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 8, timeout_s=30, what="the tasks to go on")
