"""A client for futures under test: it notes what it is asked, and ends futures when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED
from typing import Any

from gcref import ids
from gcref.brains.submitter_table import Stored
from gcref.objects import blob, failure, serialize
from gcref.sdk.callbacks import Caller
from gcref.sdk.future import ComputeFuture, mark_running, settle
from gcref.sdk.transfers import Pull

HOME = bytes(range(16))


class Home:
    """Stands for the I/O thread; `finish`, `fail` and `cancel_now` do what it does on an OUTCOME."""

    def __init__(self) -> None:
        self.client = self
        self.home = HOME
        self.secret = bytes(32)
        self.kept: list[bytes] = []
        self.dropped: list[bytes] = []
        self.held: dict[bytes, ComputeFuture[Any]] = {}
        self.pulls: list[Pull] = []
        self.cancel_answer = True
        self.problem: str | None = None
        self._caller = Caller()

    # ------------------------------------------------------------------------------- what futures ask of a client

    def check(self) -> None:
        if self.problem is not None:
            raise RuntimeError(self.problem)

    def keep(self, id: bytes) -> None:
        self.kept.append(id)

    def drop(self, id: bytes) -> None:
        self.dropped.append(id)

    def hold(self, future: ComputeFuture[Any]) -> None:
        self.held[future._id] = future

    def call_soon(self, fn: Callable[..., None], *args: Any) -> None:
        self._caller.call(fn, *args)

    def fetch(self, stored: Stored) -> Pull:
        if stored.pull is None or stored.pull.has_failed:
            stored.pull = Pull()
            self.pulls.append(stored.pull)
        found: Pull = stored.pull
        return found

    def cancel(self, ids: list[bytes], force: bool) -> list[bool]:
        return [self.cancel_answer or force] * len(ids)

    def explain(self, future: ComputeFuture[Any]) -> str:
        return f"explained {future.task_id}"

    # ----------------------------------------------------------------------------------------- what tests do

    def future(self) -> ComputeFuture[Any]:
        return ComputeFuture(self, ids.new_id())

    def finish(self, *futures: ComputeFuture[Any], value: Any = 42) -> None:
        data = blob.join(serialize.dumps(value))
        self._settle([(future, FINISHED, False, data, None) for future in futures])

    def store(self, future: ComputeFuture[Any], size: int = 1_000_000) -> Stored:
        stored = Stored(future._id, HOME, size, 1, None)
        self._settle([(future, FINISHED, False, stored, None)])
        return stored

    def fail(self, *futures: ComputeFuture[Any], error: BaseException | None = None) -> None:
        error = ValueError("no luck") if error is None else error
        for future in futures:
            failed = failure.from_exception(error, task_id=future._id, endpoint="polaris")
            self._settle([(future, FINISHED, True, failed, None)])

    def cancel_now(self, *futures: ComputeFuture[Any]) -> None:
        self._settle([(future, CANCELLED_AND_NOTIFIED, False, None, None) for future in futures])

    def run(self, *futures: ComputeFuture[Any]) -> None:
        mark_running(futures)

    def _settle(self, ends: list[Any]) -> None:
        settle(ends)
        for end in ends:
            self.held.pop(end[0]._id, None)

    def close(self) -> None:
        self._caller.close()


def bytes_of(value: Any) -> memoryview:
    return memoryview(blob.join(serialize.dumps(value)))
