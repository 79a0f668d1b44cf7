"""The loop of the mail thread: what pika runs on, without a timer that polls.

pika's own loop wakes every five seconds whether or not there is anything to do (`_PollerBase._MAX_POLL_TIMEOUT`). This one
sleeps until a descriptor is ready, somebody wakes it, or a timer that somebody has set is due.

    wake (any thread) ─► eventfd ─┐
    broker's socket ──────────────┼─► epoll ─► handlers ─► after each turn: `turn`
    call_later ─► heap ───────────┘

What is written is sent at the end of the turn without asking first whether the socket takes it; only if it does not, epoll is
asked.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

Handler = Callable[[int, int], None]


class Timer:
    """Something to be called later. `callback` is None once it was cancelled, or has been called."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback


class Loop:
    """What pika calls a selector I/O loop (`AbstractSelectorIOLoop`).

    One thread runs `start`; `add_callback` and `wake` may be called by any, all else by that one.

    Args:
        turn: called at the end of each turn, before it sleeps.
    """

    READ: Final = select.EPOLLIN
    WRITE: Final = select.EPOLLOUT
    ERROR: Final = select.EPOLLERR

    def __init__(self, turn: Callable[[], None]) -> None:
        self._turn = turn
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._wanted: dict[int, int] = {}
        self._watched: dict[int, int] = {}
        self._changed: set[int] = set()
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._callbacks: deque[Callable[[], None]] = deque()
        self._running = False
        self._awake = False
        self._lock = threading.Lock()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._epoll.register(self._bell, select.EPOLLIN)
        self.turns = 0

    # ----------------------------------------------------------------------------------------- from any thread

    def wake(self) -> None:
        """Let a turn happen soon. Cheap when one is coming anyway."""
        if self._awake:
            return
        with self._lock:  # against `close`: the number of a closed descriptor may be somebody else's by now
            if not self._closed:
                self._awake = True
                os.eventfd_write(self._bell, 1)

    def add_callback(self, callback: Callable[[], None]) -> None:
        """Have something called in the loop's thread."""
        self._callbacks.append(callback)
        self.wake()

    # ------------------------------------------------------------------------------------- in the loop's thread

    def add_handler(self, fd: int, handler: Handler, events: int) -> None:
        """Watch a descriptor."""
        self._handlers[fd] = handler
        self._wanted[fd] = self._watched[fd] = events
        self._epoll.register(fd, events)

    def update_handler(self, fd: int, events: int) -> None:
        """Watch it for other events. Whether it takes what is to be written is tried before it is watched for that."""
        self._wanted[fd] = events
        self._changed.add(fd)

    def remove_handler(self, fd: int) -> None:
        """Watch it no more."""
        self._changed.discard(fd)
        del self._handlers[fd], self._wanted[fd], self._watched[fd]
        try:
            self._epoll.unregister(fd)
        except OSError:
            pass  # it was closed, and is not watched any more

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Have something called after so many seconds."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + delay, next(self._numbers), timer))
        return timer

    def remove_timeout(self, timer: Timer) -> None:
        """Cancel a timer."""
        timer.callback = None

    def start(self) -> None:
        """Run until `stop`."""
        self._running = True
        while True:
            # First this: whoever queues something that this turn does not see any more rings the bell.
            self._awake = False
            self.run_callbacks()
            self._turn()
            self._write()
            if not self._running:
                return
            ready = self._epoll.poll(self._timeout())
            self.turns += 1
            for fd, events in ready:
                self._handle(fd, events)
            self._run_timers()

    def run_callbacks(self) -> None:
        """Call what `add_callback` was given."""
        while self._callbacks:
            self._callbacks.popleft()()

    def stop(self) -> None:
        """End `start` after this turn."""
        self._running = False

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._epoll.close()
            os.close(self._bell)
        self._timers.clear()
        self._handlers.clear()

    def _handle(self, fd: int, events: int) -> None:
        if fd == self._bell:
            try:
                os.eventfd_read(self._bell)
            except BlockingIOError:
                pass
            return
        handler = self._handlers.get(fd)
        if handler is not None:
            if events & (select.EPOLLHUP | select.EPOLLERR):
                events |= self._wanted[fd]
            handler(fd, events)

    def _write(self) -> None:
        while self._changed:
            fd = self._changed.pop()
            wanted = self._wanted[fd]
            if wanted & self.WRITE and not self._watched[fd] & self.WRITE:
                self._handlers[fd](fd, self.WRITE)
                if fd not in self._wanted:
                    continue  # it found its connection lost
                wanted = self._wanted[fd]
                self._changed.discard(fd)
            if wanted != self._watched[fd]:
                self._watched[fd] = wanted
                self._epoll.modify(fd, wanted)

    def _timeout(self) -> float | None:
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        return max(0.0, timers[0][0] - time.monotonic()) if timers else None

    def _run_timers(self) -> None:
        timers = self._timers
        if not timers:
            return
        now = time.monotonic()
        while timers and timers[0][0] <= now:
            _, _, timer = heapq.heappop(timers)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
