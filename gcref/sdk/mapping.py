"""How `Executor.map` cuts its calls into tasks, and hands out the results in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from gcref.sdk.future import ComputeFuture

T = TypeVar("T")


def chunked(fn: Callable[..., T]) -> Callable[[list[tuple[Any, ...]]], list[T]]:
    """A function for several calls of `fn`; it is pickled once, and needs nothing of ours where it runs."""

    def run_chunk(calls: list[tuple[Any, ...]]) -> list[T]:
        return [fn(*arguments) for arguments in calls]

    return run_chunk


def first(items: Iterator[T], count: int) -> Iterator[T]:
    """The next so many items."""
    for item in items:
        yield item
        count -= 1
        if count == 0:
            return


def results_of(futures: list[ComputeFuture[T]], end: float | None) -> Iterator[T]:
    """The results in order; what has not begun is cancelled when nobody wants them any more."""
    futures.reverse()

    def results() -> Iterator[T]:
        try:
            while futures:
                # No reference to a future or its value is kept while the consumer works.
                yield _result(futures.pop(), end)
        finally:
            if futures:
                left = [future._id for future in futures]
                try:
                    futures[0]._lane.client.cancel(left, False)
                except RuntimeError:
                    pass  # the client has ended

    return results()


def _result(future: ComputeFuture[T], end: float | None) -> T:
    try:
        try:
            return future.result(None if end is None else max(0.0, end - time.monotonic()))
        finally:
            if not future.done():
                future.cancel()
    finally:
        # Break the reference cycle with the exception.
        del future


def flat(chunks: Iterator[list[T]]) -> Iterator[T]:
    """The items of the chunks; each is let go of as it is handed out."""
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()
