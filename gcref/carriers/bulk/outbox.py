"""What the bulk thread has handed to ZeroMQ and must keep until it has gone out; and what wakes that thread."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from gcref.carriers.bulk.ports import Reading

log = logging.getLogger(__name__)

_LAST_RELEASE_S: Final = 2.0


class Outbox:
    """Readings whose bytes ZeroMQ still holds.

    pyzmq drops its reference to a buffer, on a thread of its own, when libzmq has let go of the message. The buffer
    handed to it is a view made for that one send, so the death of the view is the end of the send. A weak reference
    notices that; a MessageTracker would have to be asked again and again.

    Args:
        wake: brings the owning thread to call `release`. Called on any thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._kept: dict[int, tuple[weakref.ref[memoryview], Reading]] = {}
        self._gone: deque[int] = deque()
        self._wake = wake
        self._next = 0

    def keep(self, view: memoryview, reading: Reading) -> None:
        """Release the reading when the view is gone. The caller drops the view after the send."""
        number = self._next = self._next + 1
        gone, wake = self._gone, self._wake

        def note(_: weakref.ref[memoryview]) -> None:
            gone.append(number)
            wake()

        self._kept[number] = (weakref.ref(view, note), reading)

    def release(self) -> None:
        """Release what has been sent."""
        while self._gone:
            _, reading = self._kept.pop(self._gone.popleft())
            try:
                reading.release()
            except Exception:
                log.exception("bulk: releasing a buffer failed")

    def close(self, waker: Waker) -> None:
        """Release everything: the sockets are closed, so that the last views go within milliseconds."""
        until = time.monotonic() + _LAST_RELEASE_S
        self.release()
        while self._kept and time.monotonic() < until:
            waker.wait(until - time.monotonic())
            self.release()
        self._gone.extend(self._kept)
        self.release()


class Waker:
    """A descriptor that wakes the thread that polls it. `wake` is cheap when a wake-up is under way already."""

    def __init__(self) -> None:
        self._pending = False
        self._closed = False
        self._lock = threading.Lock()
        if hasattr(os, "eventfd"):
            self.descriptor = self._write_end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self.descriptor, self._write_end = os.pipe()
            os.set_blocking(self.descriptor, False)

    def wake(self) -> None:
        """Any thread may call it, also after `close`."""
        if self._pending:
            return
        with self._lock:  # against `close`: the number of a closed descriptor may be somebody else's by now
            if not self._closed:
                self._pending = True
                os.write(self._write_end, b"\1\0\0\0\0\0\0\0")

    def clear(self) -> None:
        """Take the wake-up. To be called before looking at what it is about."""
        try:
            os.read(self.descriptor, 8)
        except BlockingIOError:
            pass
        self._pending = False

    def wait(self, timeout_s: float) -> None:
        """Wait for a wake-up and take it."""
        if select.select((self.descriptor,), (), (), max(0.0, timeout_s))[0]:
            self.clear()

    def close(self) -> None:
        """Let go of the descriptors."""
        with self._lock:
            self._closed = True
            os.close(self.descriptor)
            if self._write_end != self.descriptor:
                os.close(self._write_end)
