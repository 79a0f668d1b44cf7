"""The thread for the hub: every call of a process to it, one after the other, so that nothing else waits for the network.

    any thread ── submit(call, done) ──► queue ─► gcref-hub:  call(client)  ──►  done(answer or error)
                                                     ▲ not reachable: again, later ─┘

    hub = HubThread(lambda: HubClient(url, token))
    hub.submit(lambda client: client.find(id), found, retry_for_s=600)
    hub.every(lambda: period_s, lambda client: client.heartbeat(me), heard)
    hub.close(2.0, last=lambda client: client.withdraw(me, timeout_s=2.0))

Rules:
    - `done` is called on this thread, once for each `submit`, also when `close` comes first: whoever waits is told. It
      hands over and returns; what it raises is logged.
    - A hub that cannot be reached is asked again with back-off (the client has tried a few times by then). One call that
      gets through has all others tried at once.
    - Any other error is an answer like a value. That there is no token, or the address is none, is one as well.
    - The thread is started by the first call, and the client made there: `requests` is not loaded before it is needed.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from gcref.errors import GcrefError, HubError, HubUnavailableError

if TYPE_CHECKING:
    from gcref.directory.hub import HubClient

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S: Final = 0.5
"""How long a hub that was not reachable is left alone, seconds; doubles up to `MAX_PAUSE_S`."""

MAX_PAUSE_S: Final = 15.0
"""A hub that was restarted has all its endpoints back within that time, and hundreds of them are no burden while it is down."""


class _Job(NamedTuple):
    """A call that is to be made.

    Attributes:
        call, done: as in `submit`.
        until: no more trying after this, monotonic seconds.
        pause_s: how long to wait after the next failure.
        tried: it has failed before.
        period_s: of a call that is made for ever; None: it is made once.
    """

    call: Callable[[HubClient], Any]
    done: Callable[[Any], None]
    until: float
    pause_s: float = FIRST_PAUSE_S
    tried: bool = False
    period_s: Callable[[], float] | None = None


class HubThread:
    """Makes a process' calls to the hub. Any thread may call anything; only `close` waits.

    Args:
        connect: makes the client; called on this thread, until it has made one.
        name: of the thread.
    """

    def __init__(self, connect: Callable[[], HubClient], name: str = "gcref-hub") -> None:
        self._connect = connect
        self._client: HubClient | None = None
        self._changed = threading.Condition()
        self._order = itertools.count()
        self._jobs: list[tuple[float, int, _Job]] = []  # a heap: when it is due, order of coming
        self._last: Callable[[HubClient], Any] | None = None
        self._started = self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def submit(
        self,
        call: Callable[[HubClient], T],
        done: Callable[[T | GcrefError], None],
        *,
        retry_for_s: float = 0.0,
        after_s: float = 0.0,
    ) -> None:
        """Make a call, and tell what came of it.

        Args:
            call: is handed the client.
            done: is handed what `call` gave, or the error that it ended in.
            retry_for_s: how long to go on trying while the hub cannot be reached, seconds; `inf`: until `close`.
            after_s: not before so many seconds from now.
        """
        now = time.monotonic()
        self._put(now + after_s, _Job(call, done, now + after_s + retry_for_s))

    def every(
        self,
        period_s: Callable[[], float],
        call: Callable[[HubClient], T],
        done: Callable[[T | GcrefError], None],
    ) -> None:
        """Make a call again and again until `close`, the first time one period from now.

        Args:
            period_s: how long to wait after each time, seconds; asked anew. After a hub that could not be reached the wait
                is that of the back-off, if that is shorter.
            call: as in `submit`.
            done: is handed each answer, and each error.
        """
        self._put(time.monotonic() + period_s(), _Job(call, done, 0.0, period_s=period_s))

    def close(self, timeout_s: float, last: Callable[[HubClient], Any] | None = None) -> None:
        """End the thread. What waits is told that the hub is not asked any more. Can be called again.

        Args:
            timeout_s: how long to wait for that, seconds; a call that is under way is not interrupted.
            last: a last word to the hub, if it was ever spoken to; an error of it is logged.
        """
        with self._changed:
            if not self._closing:
                self._closing = True
                self._last = last
            self._changed.notify_all()
            started = self._started
        if started and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    # ------------------------------------------------------------------------------------------------ inside

    def _put(self, due: float, job: _Job) -> None:
        with self._changed:
            refused = self._closing
            if not refused:
                heapq.heappush(self._jobs, (due, next(self._order), job))
                if not self._started:
                    self._started = True
                    self._thread.start()
                self._changed.notify_all()
        if refused and job.period_s is None:
            self._tell(job, _closed())

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._make(job)
        for _, _, job in sorted(self._jobs, key=lambda entry: entry[:2]):
            if job.period_s is None:
                self._tell(job, _closed())
        self._jobs.clear()
        if self._client is not None:
            if self._last is not None:
                try:
                    self._last(self._client)
                except GcrefError as error:
                    log.info("the hub could not be told that we end: %s", error)
                except Exception:
                    log.exception("the hub could not be told that we end")
            self._client.close()

    def _next(self) -> _Job | None:
        """The call that is due, once there is one; None: it is over."""
        with self._changed:
            while not self._closing:
                wait_s = self._jobs[0][0] - time.monotonic() if self._jobs else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._jobs)[2]
                self._changed.wait(wait_s)
            return None

    def _make(self, job: _Job) -> None:
        answer: Any
        try:
            if self._client is None:
                self._client = self._connect()
            answer = job.call(self._client)
        except HubUnavailableError as error:
            pause_s = job.pause_s * random.uniform(0.5, 1.0)
            later = job._replace(pause_s=min(2 * job.pause_s, MAX_PAUSE_S), tried=True)
            if job.period_s is not None:
                self._put(time.monotonic() + min(pause_s, job.period_s()), later)
            elif time.monotonic() + pause_s <= job.until:
                self._put(time.monotonic() + pause_s, later)
                return
            answer = error
        except GcrefError as error:
            answer = error
            self._repeat(job)
        except Exception as error:  # whoever waits is to be told, and the others' calls go on
            log.exception("a call to the hub failed")
            answer = HubError(f"a call to the hub failed: {error!r}")
            self._repeat(job)
        else:
            self._hurry()
            self._repeat(job)
        self._tell(job, answer)

    def _repeat(self, job: _Job) -> None:
        if job.period_s is not None:
            self._put(time.monotonic() + job.period_s(), job._replace(pause_s=FIRST_PAUSE_S, tried=False))

    def _hurry(self) -> None:
        """The hub is there: whoever waits because it was not, need not wait any longer."""
        with self._changed:
            now = time.monotonic()
            self._jobs = [(min(due, now) if job.tried else due, at, job) for due, at, job in self._jobs]
            heapq.heapify(self._jobs)

    def _tell(self, job: _Job, answer: Any) -> None:
        try:
            job.done(answer)
        except Exception:
            log.exception("what the hub said could not be handed over")


def _closed() -> HubUnavailableError:
    return HubUnavailableError("the hub was not asked: this process is about to end")
