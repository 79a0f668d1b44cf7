"""`ComputeFuture` in asyncio: awaited, wrapped, timed out; values come without holding up the loop (W3)."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from gcref.errors import LostError, ObjectLostError
from gcref.sdk.future import ComputeFuture
from tests.support.waiting import wait_until
from tests.unit.sdk.home import Home, bytes_of

SOON = 10.0


async def value_of(future: ComputeFuture[Any]) -> Any:
    return await future


def later(fn: Any, *args: Any, delay: float = 0.02) -> None:
    threading.Timer(delay, fn, args).start()


def test_await_twice(home: Home) -> None:
    """W3."""
    future = home.future()

    async def main() -> list[Any]:
        later(home.finish, future)
        return [await future, await future]

    assert asyncio.run(main()) == [42, 42]


def test_await_a_failure_and_a_cancelled_one(home: Home) -> None:
    bad, gone = home.future(), home.future()

    async def main() -> None:
        later(home.fail, bad)
        with pytest.raises(ValueError, match="no luck"):
            await bad
        later(home.cancel_now, gone)
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(main())


def test_a_cancelled_await_does_not_cancel_the_task(home: Home) -> None:
    """W3."""
    future = home.future()

    async def main() -> Any:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(value_of(future), 0.02)
        assert not future.done()
        later(home.finish, future)
        return await asyncio.wait_for(value_of(future), SOON)

    assert asyncio.run(main()) == 42


def test_gather(home: Home) -> None:
    futures = [home.future() for _ in range(10)]

    async def main() -> list[Any]:
        later(home.finish, *futures)
        return await asyncio.gather(*(value_of(future) for future in futures))

    assert asyncio.run(main()) == [42] * 10


def test_the_loop_goes_on_while_a_large_value_comes(home: Home) -> None:
    """W3."""
    future = home.future()
    home.store(future)

    async def main() -> Any:
        task = asyncio.create_task(value_of(future))
        while not home.pulls:
            await asyncio.sleep(0.001)
        assert not task.done()
        home.pulls[0].finish(bytes_of("large"))
        return await task

    assert asyncio.run(main()) == "large"


def test_a_fetch_that_fails_is_awaited_again(home: Home) -> None:
    future = home.future()
    home.store(future)

    def answer(number: int, buffer: Any, error: Any) -> None:
        wait_until(lambda: len(home.pulls) > number, what="the fetch")
        home.pulls[number].finish(buffer, error)

    async def main() -> Any:
        threading.Thread(target=answer, args=(0, None, lambda: ObjectLostError("gone"))).start()
        with pytest.raises(LostError, match="gone"):
            await future
        threading.Thread(target=answer, args=(1, bytes_of(1), None)).start()
        return await future

    assert asyncio.run(main()) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_wrap_future(home: Home, when: str) -> None:
    """W3."""
    future = home.future()

    async def main() -> Any:
        if when == "before":
            home.finish(future)
        else:
            later(home.finish, future)
        return await asyncio.wait_for(asyncio.wrap_future(future), SOON)

    assert asyncio.run(main()) == 42


@pytest.mark.parametrize("when", ["before", "after"])
def test_wrap_future_waits_for_a_large_value(home: Home, when: str) -> None:
    """W3."""
    future = home.future()

    async def main() -> Any:
        if when == "before":
            home.store(future)
        wrapped = asyncio.wrap_future(future)
        if when == "after":
            home.store(future)
        while not home.pulls:
            await asyncio.sleep(0.001)
        assert not wrapped.done()
        home.pulls[0].finish(bytes_of("large"))
        return await asyncio.wait_for(wrapped, SOON)

    assert asyncio.run(main()) == "large"


def test_wrap_future_hears_of_a_fetch_that_fails(home: Home) -> None:
    future = home.future()
    home.store(future)

    async def main() -> None:
        wrapped = asyncio.wrap_future(future)
        while not home.pulls:
            await asyncio.sleep(0.001)
        home.pulls[0].finish(None, lambda: ObjectLostError("gone"))
        with pytest.raises(LostError, match="gone"):
            await asyncio.wait_for(wrapped, SOON)

    asyncio.run(main())


def test_wrap_future_of_a_failure_and_of_a_cancelled_one(home: Home) -> None:
    bad, gone = home.future(), home.future()

    async def main() -> None:
        wrapped = asyncio.wrap_future(bad)
        later(home.fail, bad)
        with pytest.raises(ValueError, match="no luck"):
            await asyncio.wait_for(wrapped, SOON)
        wrapped = asyncio.wrap_future(gone)
        later(home.cancel_now, gone)
        with pytest.raises(asyncio.CancelledError):
            await wrapped

    asyncio.run(main())


def test_a_value_that_cannot_be_read_is_an_error_for_whoever_awaits(home: Home) -> None:
    future, wrapped = home.future(), home.future()
    for each in (future, wrapped):
        home._settle([(each, "FINISHED", False, b"no blob at all", None)])

    async def main() -> None:
        with pytest.raises(Exception, match="blob"):
            await future
        with pytest.raises(Exception, match="blob"):
            await asyncio.wait_for(asyncio.wrap_future(wrapped), SOON)

    asyncio.run(main())


def test_a_closed_loop_is_nobody(home: Home) -> None:
    future = home.future()

    async def main() -> None:
        task = asyncio.create_task(value_of(future))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(main())
    home.finish(future)
    assert future.result() == 42
