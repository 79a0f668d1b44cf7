"""The serving half of the bulk thread: answers FETCH with ranges, paths, or why not.

    FETCH ─► Server ─► Provider.read ─► CHUNK ─► socket          the buffer is kept until it has gone out (Outbox)
                │                            └─► mailbox          a copy leaves; with no room there, the question waits
                └──── waiting questions ◄─────────── no room ─┘

Rules:
    - Rights are those of the key of each question, looked up when it is handled, again if it had to wait.
    - What waits is the question, never the bytes: a hundred bytes each, bounded in number and age. Those who ask
      through mailboxes take turns, and each gets its answers in the order of its questions.
    - The object `ECHO_ID` is as many zero bytes as anybody with rights cares to ask for: it measures a link.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from gcref import ids
from gcref.brains.transfer_answers import checksum
from gcref.carriers.bulk.link import MAIL_KEEP_S, Link, Requester, write_header
from gcref.config import MAX_MESSAGE_BYTES
from gcref.errors import AuthError
from gcref.wire.messages import (
    CHUNK,
    ECHO_ID,
    ECHO_MAX_BYTES,
    ECHO_RANGE_MAX_BYTES,
    MAX_TEXT,
    MAY_NOT,
    MODE_BYTES,
    MODE_PATH,
    NO_SUCH_OBJECT,
    SOURCE_FAILED,
    WAY_CLOSED,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from gcref.carriers.bulk.outbox import Outbox
    from gcref.carriers.bulk.ports import Provider

log = logging.getLogger(__name__)

_COPY_BELOW_BYTES: Final = 64 * 1024
"""Smaller ranges are copied for the send: that costs less than a message of the garbage collector's thread."""

WAITING_MAX: Final = 4096
"""Questions that wait for room in the mailbox, in all. An asker has at most 64 under way; more are dropped, and asked
again when their time is up."""

_RETRY_S: Final = 0.005
_RETRY_MAX_S: Final = 0.5
"""How long after a refusal the mailbox is tried again: what waits there to leave holds a broker for longer than the
first; doubles while it takes nothing at all."""

_FAILED_MAX: Final = 4
"""So many askers in a row for whom there is no room mean that there is none at all."""

_ZEROS: Final = memoryview(bytes(ECHO_RANGE_MAX_BYTES))

Question = tuple[float, list[Any]]
"""Until when it is of use (monotonic seconds), and the fields of its FETCH."""


class Server:
    """Answers the questions of others. Lives on the bulk thread.

    Args:
        provider: has the bytes.
        requester: says who is at the other end of a link, and what he may do at this moment; None: nothing.
        outbox: keeps what a socket has not sent yet.

    Attributes:
        sent: bytes of objects, by (party, carrier).
        retry_at: when questions that wait are to be tried again, monotonic seconds; None: nothing waits.
    """

    def __init__(
        self, provider: Provider, requester: Callable[[Link], Requester | None], outbox: Outbox
    ) -> None:
        self.sent: dict[tuple[bytes, str], int] = {}
        self.retry_at: float | None = None
        self._provider = provider
        self._requester = requester
        self._outbox = outbox
        self._waiting: dict[Link, deque[Question]] = {}
        self._count = 0
        self._pause_s = _RETRY_S

    def serve(self, link: Link, fields: list[Any]) -> None:
        """Answer a FETCH, now or when there is room."""
        if link.carrier != "broker":
            self._answer(link, fields)
        elif link in self._waiting or not self._answer(link, fields):
            self._wait(link, fields)

    def serve_waiting(self) -> None:
        """Answer what had to wait, one of each asker in turn, as far as there is room now."""
        now, moved, failed, asking = time.monotonic(), False, 0, deque(self._waiting)
        while asking and failed < _FAILED_MAX:
            link = asking.popleft()
            questions = self._waiting.pop(link)
            until, fields = questions[0]
            if now < until and not self._answer(link, fields):
                self._waiting[link] = questions
                failed += 1
                continue
            moved = True
            failed = 0
            questions.popleft()
            self._count -= 1
            if questions:
                self._waiting[link] = questions  # behind the others, also for the next time
                asking.append(link)
        self._pause_s = _RETRY_S if moved else min(2 * self._pause_s, _RETRY_MAX_S)
        self.retry_at = now + self._pause_s if self._waiting else None

    def _wait(self, link: Link, fields: list[Any]) -> None:
        if self._count >= WAITING_MAX:
            log.info("bulk: too many questions wait for room in the mailbox; one was dropped")
            return
        self._count += 1
        now = time.monotonic()
        self._waiting.setdefault(link, deque()).append((now + MAIL_KEEP_S, fields))
        if self.retry_at is None:
            self._pause_s = _RETRY_S
            self.retry_at = now + self._pause_s

    def _answer(self, link: Link, fields: list[Any]) -> bool:
        """Send a range, a path, or why not. Returns whether it went."""
        _, request, id, attempt, offset, length, mode, token = fields[:8]
        try:
            requester = self._requester(link)
            if requester is None or (requester.role == "peer" and token is None and id != ECHO_ID):
                raise AuthError(
                    "this key may not read here" if requester is None else "a read token is missing"
                )
            if mode == MODE_BYTES:
                return self._send_range(link, request, requester, id, attempt, offset, length, token)
            if link.carrier != "ipc" or id == ECHO_ID:
                raise NotImplementedError("files are shared within a machine only")
            if mode == MODE_PATH:
                path, size = self._provider.expose(id, attempt, requester, token)
            else:
                path, size = "", self._provider.fill(id, attempt, fields[8], requester, token)
            if size != length:
                raise LookupError(f"object {ids.text(id)} has {size} bytes here, not {length}")
        except Exception as error:
            code = _code_of(error, mode)
            if code == SOURCE_FAILED:
                log.exception("bulk: reading %s for %s failed", ids.text(id), ids.text(link.party))
            answer = [code, f"{type(error).__name__}: {error}"[: MAX_TEXT // 8]]
            return link.send(write_header([CHUNK, request, id, attempt, offset, length, 0, None, answer]))
        self._count_sent(link, length)
        return link.send(write_header([CHUNK, request, id, attempt, offset, length, 0, path or None, None]))

    def _send_range(
        self,
        link: Link,
        request: int,
        requester: Requester,
        id: bytes,
        attempt: int,
        offset: int,
        length: int,
        token: bytes | None,
    ) -> bool:
        if length > MAX_MESSAGE_BYTES:
            raise LookupError(f"a range of {length} bytes is over the limit of {MAX_MESSAGE_BYTES}")
        if id == ECHO_ID:
            reading: Any = _echo(attempt, offset, length)
        else:
            reading = self._provider.read(id, attempt, offset, length, requester, token)
        kept = False
        try:
            view = memoryview(reading.buffer)
            if view.nbytes != length:
                raise LookupError(f"object {ids.text(id)} has no range {offset}+{length}")
            # Within a machine the kernel carries it from memory to memory; beyond, many things lie in between.
            digest = 0 if link.carrier == "ipc" else checksum(view)
            header = write_header([CHUNK, request, id, attempt, offset, length, digest, None, None])
            if length < _COPY_BELOW_BYTES or link.carrier == "broker":
                sent = link.send(header, view)
            else:
                self._outbox.keep(view, reading)
                kept = True
                sent = link.send(header, view, copy=False)
        finally:
            if not kept:
                view = memoryview(b"")  # the view goes before what it is a view of
                reading.release()
        if sent:
            self._count_sent(link, length)
        return sent

    def _count_sent(self, link: Link, length: int) -> None:
        count = (link.party, link.carrier)
        self.sent[count] = self.sent.get(count, 0) + length


class _Echo:
    """A range of zero bytes."""

    def __init__(self, length: int) -> None:
        self.buffer = _ZEROS[:length]

    def release(self) -> None:
        """There is nothing to let go of."""


def _echo(attempt: int, offset: int, length: int) -> _Echo:
    if attempt != 0 or length > ECHO_RANGE_MAX_BYTES or offset + length > ECHO_MAX_BYTES:
        raise LookupError(f"the echo has no range {offset}+{length} of attempt {attempt}")
    return _Echo(length)


def _code_of(error: Exception, mode: int) -> int:
    if isinstance(error, LookupError):
        return NO_SUCH_OBJECT
    if isinstance(error, AuthError):
        return MAY_NOT
    if mode != MODE_BYTES and isinstance(error, OSError | NotImplementedError):
        return WAY_CLOSED
    return SOURCE_FAILED
