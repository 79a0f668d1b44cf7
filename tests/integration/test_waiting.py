"""Waiting (W1 … W5): results, the standard library's `wait` and `as_completed`, asyncio, callbacks, threads."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import itertools
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from gcref import Client, ComputeFuture, Executor, LocalEndpoint
from tests.conftest import Sites
from tests.support.tasks import Gate, blob_of, fail, hold, inc
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)


@contextmanager
def frozen(site: LocalEndpoint) -> Iterator[None]:
    """The agent stands still meanwhile."""
    os.kill(site.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(site.pid, signal.SIGCONT)


# ------------------------------------------------------------------------------------------------------------- W1


def test_w1_a_result_that_is_late_is_a_timeout_and_then_the_value(polaris: Executor, gate: Gate) -> None:
    f = polaris.submit(hold, gate, "late")
    for ask in (f.result, f.exception):
        for timeout in (0.1, 0, -1):
            with pytest.raises(TimeoutError):
                ask(timeout=timeout)
    with pytest.raises(cf.TimeoutError):
        f.result(0.01)
    assert not f.done()
    gate.open()
    assert f.result() == "late"
    assert f.result(timeout=0) == "late"
    assert f.exception(timeout=0) is None


def test_w1_the_timeout_covers_the_fetch_of_a_large_value_too(two_sites: Sites, far: tuple[str, ...]) -> None:
    """Done, but its endpoint does not answer: the value is late, not lost."""
    f: ComputeFuture[bytes]
    with Client(carriers=far) as client, Executor(two_sites.polaris.endpoint_id, client) as executor:
        f = executor.submit(blob_of, 5_000_000)
        wait_until(f.done, what="the task to end")
        with frozen(two_sites.polaris):
            with pytest.raises(TimeoutError):
                f.result(timeout=0.1)
            assert f.done()
            assert f.exception(timeout=0) is None, "this needs no bytes"
        assert len(f.result(WAIT_S)) == 5_000_000


# ------------------------------------------------------------------------------------------------------------- W2


def test_w2_wait_over_ours_and_a_thread_pools(polaris: Executor, midway: Executor, gate: Gate) -> None:
    with cf.ThreadPoolExecutor(1) as pool:
        slow: set[cf.Future[Any]] = {polaris.submit(hold, gate), pool.submit(hold, gate)}
        quick: set[cf.Future[Any]] = {midway.submit(inc, 1), pool.submit(inc, 1)}
        quick_ours = next(f for f in quick if isinstance(f, ComputeFuture))
        done, rest = cf.wait([quick_ours, *slow], WAIT_S, return_when=cf.FIRST_COMPLETED)
        assert (done, rest) == ({quick_ours}, slow)
        done, rest = cf.wait(slow, 0.05)
        assert (done, rest) == (set(), slow)
        failing = midway.submit(fail, "why")
        done, rest = cf.wait([failing, *slow], WAIT_S, return_when=cf.FIRST_EXCEPTION)
        assert (done, rest) == ({failing}, slow)
        gate.open()
        done, rest = cf.wait([*slow, *quick, failing], WAIT_S)
        assert (done, rest) == (slow | quick | {failing}, set())
        assert sorted(f.result() for f in slow | quick) == [1, 1, 2, 2]


def test_w2_as_completed_over_ours_and_a_thread_pools(
    polaris: Executor, midway: Executor, gate: Gate
) -> None:
    with cf.ThreadPoolExecutor(2) as pool:
        quick = [executor.submit(inc, i) for i in range(20) for executor in (polaris, midway, pool)]
        held = [polaris.submit(hold, gate, -1), pool.submit(hold, gate, -2)]
        cancelled = polaris.submit(inc, held[0])
        assert cancelled.cancel()
        assert {f.result() for f in cf.as_completed(quick, WAIT_S)} == set(range(1, 21))
        # The same future twice is given out once.
        walk = cf.as_completed([*quick, *held, cancelled, quick[0]], timeout=0.2)
        assert set(itertools.islice(walk, 61)) == {*quick, cancelled}
        with pytest.raises(TimeoutError):
            next(walk)
        gate.open()
        assert {f.result() for f in cf.as_completed(held, WAIT_S)} == {-1, -2}


def test_w2_several_threads_wait_for_the_same_futures(polaris: Executor, gate: Gate) -> None:
    futures = [polaris.submit(hold, gate, i) for i in range(20)]
    with cf.ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(cf.wait, futures, WAIT_S) for _ in range(2)]
        walks = [
            pool.submit(lambda: {f.result() for f in cf.as_completed(futures, WAIT_S)}) for _ in range(2)
        ]
        gate.open()
        assert all(wait.result().done == set(futures) for wait in waits)
        assert all(walk.result() == set(range(20)) for walk in walks)


# ------------------------------------------------------------------------------------------------------------- W3


@asynccontextmanager
async def beating() -> AsyncIterator[list[int]]:
    """Counts the turns of the event loop: it grows as long as nothing blocks the loop."""
    beats = [0]

    async def beat() -> None:
        while True:
            await asyncio.sleep(0.001)
            beats[0] += 1

    task = asyncio.create_task(beat())
    try:
        yield beats
    finally:
        task.cancel()


def test_w3_wrap_future_and_await(polaris: Executor) -> None:
    async def main() -> None:
        f = polaris.submit(inc, 1)
        assert await asyncio.wrap_future(f) == 2
        assert await f == 2
        assert await f == 2
        failing = polaris.submit(fail, "why")
        for _ in range(2):
            with pytest.raises(ValueError, match="why"):
                await failing
        with pytest.raises(ValueError, match="why"):
            await asyncio.wrap_future(failing)

    asyncio.run(main())


def test_w3_many_are_gathered(polaris: Executor, midway: Executor) -> None:
    async def value(f: ComputeFuture[int]) -> int:
        return await f

    async def main() -> list[int]:
        first = [polaris.submit(inc, i) for i in range(200)]
        second = [midway.submit(inc, f) for f in first]
        wrapped: list[int] = await asyncio.gather(*(asyncio.wrap_future(f) for f in second))
        assert await asyncio.gather(*(value(f) for f in second)) == wrapped
        return wrapped

    assert asyncio.run(main()) == [i + 2 for i in range(200)]


def test_w3_an_await_that_times_out_harms_nothing(polaris: Executor, gate: Gate) -> None:
    async def main() -> None:
        f = polaris.submit(hold, gate, 7)

        async def value() -> Any:
            return await f

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(value(), 0.05)
        assert not f.done(), "the task was not cancelled with the await"
        again = asyncio.create_task(value())
        await asyncio.sleep(0)
        again.cancel()
        with pytest.raises(asyncio.CancelledError):
            await again
        gate.open()
        assert await f == 7
        assert await value() == 7

    asyncio.run(main())


def test_w3_cancelling_a_wrapped_future_cancels_the_task(polaris: Executor, gate: Gate) -> None:
    async def main() -> None:
        waiting = polaris.submit(inc, polaris.submit(hold, gate))
        asyncio.wrap_future(waiting).cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert waiting.cancelled()

    asyncio.run(main())


@pytest.mark.parametrize("way", ["await", "wrap_future"])
def test_w3_a_large_value_never_blocks_the_loop(two_sites: Sites, far: tuple[str, ...], way: str) -> None:
    """The endpoint stands still while the value is asked for: only a loop that goes on can let it go on."""

    async def main(f: ComputeFuture[bytes]) -> int:
        async def value() -> bytes:
            return await (f if way == "await" else asyncio.wrap_future(f))

        async with beating() as beats:
            with frozen(two_sites.polaris):
                wanted = asyncio.create_task(value())
                while beats[0] < 50:
                    await asyncio.sleep(0.001)
                assert not wanted.done()
            got = await asyncio.wait_for(wanted, WAIT_S)
        return len(got)

    with Client(carriers=far) as client, Executor(two_sites.polaris.endpoint_id, client) as executor:
        f = executor.submit(blob_of, 20_000_000)
        wait_until(f.done, what="the task to end")
        assert asyncio.run(main(f)) == 20_000_000


# ------------------------------------------------------------------------------------------------------------- W4


class Calls:
    """What callbacks did, and how to wait for it."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def wait(self, count: int) -> list[Any]:
        wait_until(lambda: len(self.got) >= count, what=lambda: f"{count} calls, there are {self.got}")
        return self.got


def test_w4_callbacks_before_and_after_the_end(polaris: Executor, gate: Gate) -> None:
    calls = Calls()

    def note(number: int) -> Callable[[cf.Future[Any]], None]:
        return lambda f: calls.got.append((number, f.result(), threading.current_thread().name))

    f = polaris.submit(hold, gate, 5)
    for number in range(3):
        f.add_done_callback(note(number))
    gate.open()
    assert [call[:2] for call in calls.wait(3)] == [(0, 5), (1, 5), (2, 5)]
    assert {call[2] for call in calls.got}.isdisjoint({"gcref-io", "MainThread"})
    f.add_done_callback(note(3))
    assert calls.got[3] == (3, 5, "MainThread"), "at once, here"


def test_w4_a_callback_that_raises_harms_only_itself(
    polaris: Executor, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls()

    def bad(error: BaseException) -> Callable[[cf.Future[Any]], None]:
        def callback(f: cf.Future[Any]) -> None:
            raise error

        return callback

    f = polaris.submit(hold, gate, 5)
    with caplog.at_level(logging.ERROR):
        f.add_done_callback(bad(ValueError("oops")))
        f.add_done_callback(bad(SystemExit(3)))
        f.add_done_callback(lambda f: calls.got.append(f.result()))
        gate.open()
        assert calls.wait(1) == [5]
        f.add_done_callback(bad(ValueError("after the end")))
    assert "oops" in caplog.text
    assert "after the end" in caplog.text
    later = polaris.submit(inc, 1)
    later.add_done_callback(lambda f: calls.got.append(f.result()))
    assert calls.wait(2) == [5, 2]


def test_w4_callbacks_submit_wait_and_ask_for_large_values(polaris: Executor, midway: Executor) -> None:
    calls = Calls()

    def use(f: cf.Future[bytes]) -> None:
        length = midway.submit(len, f)
        other = polaris.submit(blob_of, 3_000_000)
        other.add_done_callback(lambda o: calls.got.append(len(o.result())))
        calls.got.append((len(f.result()), length.result(WAIT_S), len(other.result(WAIT_S))))

    polaris.submit(blob_of, 2_000_000).add_done_callback(use)
    # In no certain order: the one that waits holds up no other.
    assert set(calls.wait(2)) == {(2_000_000, 2_000_000, 3_000_000), 3_000_000}


def test_w4_a_callback_of_a_future_that_nobody_keeps_is_called(polaris: Executor, gate: Gate) -> None:
    calls = Calls()
    polaris.submit(hold, gate, 9).add_done_callback(lambda f: calls.got.append(f.result()))
    waiting = polaris.submit(inc, polaris.submit(hold, gate))
    waiting.add_done_callback(lambda f: calls.got.append("cancelled" if f.cancelled() else "?"))
    assert waiting.cancel()
    assert calls.wait(1) == ["cancelled"]
    gate.open()
    assert calls.wait(2) == ["cancelled", 9]


# ------------------------------------------------------------------------------------------------------------- W5


def test_w5_ten_threads_of_a_thousand_submits_each(polaris: Executor, midway: Executor) -> None:
    found: list[list[int]] = [[] for _ in range(10)]
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            executor = (polaris, midway)[k % 2]
            futures = [executor.submit(inc, 1000 * k + i) for i in range(1000)]
            found[k] = [f.result(WAIT_S) for f in futures]
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == [[1000 * k + i + 1 for i in range(1000)] for k in range(10)]
