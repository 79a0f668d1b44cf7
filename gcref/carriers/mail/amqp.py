"""The AMQP watcher: our mailbox at RabbitMQ, and the way to everybody else's. The only room that imports `pika`.

    post (any thread) ─► MailOutbox ─ wake ─► ┌───────────────────────┐ ── publish, confirmed ──► mailbox.<party>
                                              │ gcref-mail: Loop, pika│
    take (lane's thread) ◄── Inbox ◄── wake ─ └───────────────────────┘ ◄─ consume, acknowledged ─ mailbox.<ours>
    done (lane's thread) ──► acknowledgements ───────────────┘

    mailbox = AmqpMailbox(party, pair)
    mailbox.attach(CONTROL, carrier.wake)
    mailbox.use(access)          # what the hub handed out; again, when it hands out something else

Rules:
    - One thread owns the connection; it is started by the first `use`. It sleeps until the broker, a lane or a timer has
      something: timers are AMQP's heartbeats, a reconnect, a full mailbox, and one for acknowledgements after mail has come.
    - Sealing and opening happen on that thread. libsodium lets go of the interpreter meanwhile.
    - A message is persistent, mandatory, and confirmed by the broker. It is acknowledged when its lane has said `done`.
    - pika's exceptions and log lines stay here; what they mean is told as `MailDown`.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import pika
from pika import exceptions as refusals

from gcref.carriers.mail.connection import Connection
from gcref.carriers.mail.inbox import Inbox
from gcref.carriers.mail.loop import Loop, Timer
from gcref.carriers.mail.outbox import MailOutbox, Parcel
from gcref.carriers.mail.post import Buffer, MailboxAccess, MailDown, MailEvent, MailUp, queue_of
from gcref.carriers.mail.seal import Sealer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gcref.carriers.keys import KeyPair

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 10
"""AMQP's own sign of life: a broker that is silent for this and five seconds more is given up."""

CONNECT_S: Final = 10.0
"""How long one attempt to connect and log in may take, seconds."""

RETRY_S: Final = 0.2
"""A lost broker is tried again after about this; doubles up to `RETRY_MAX_S`, seconds."""

RETRY_MAX_S: Final = 10.0

REFUSED_RETRY_S: Final = 5.0
"""As `RETRY_S`, where the broker has refused user, password or mailbox; doubles up to `REFUSED_RETRY_MAX_S`."""

REFUSED_RETRY_MAX_S: Final = 60.0

PREFETCH: Final = 64
"""Mails that the broker hands out before the first is acknowledged: at most so many MiB are here and not dealt with."""

ACK_S: Final = 0.02
"""Acknowledgements wait for company for this long, seconds, or until there are `ACK_AT`."""

ACK_AT: Final = PREFETCH // 4

ACK_NOW_BYTES: Final = 64 * 1024
"""Larger mail is acknowledged as soon as it is done: the sender's confirmation, and so its window, waits for that."""

LINGER_S: Final = 0.3
"""How long `close` waits for what was posted just before, seconds."""

_GENERATION: Final = 1 << 48  # of connections; tags of one that is gone are not acknowledged on the next
_FAILED_RESOLVE: Final = "cannot be found or reached"


class AmqpMailbox:
    """A mailbox at RabbitMQ. What it promises is said in `gcref.carriers.mail.post.Mailbox`.

    Args:
        me: our id, 16 bytes.
        pair: our owner key.
    """

    def __init__(self, me: bytes, pair: KeyPair) -> None:
        self._inbox = Inbox(me, pair, self._settled)
        self._outbox = MailOutbox(Sealer(me, pair))
        self._done: deque[int] = deque()
        self._commands: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: Loop | None = None
        self._up = False
        self._closed = False
        self._since = time.time()
        self._connects = 0
        # What follows belongs to the mail thread.
        self._access: MailboxAccess | None = None
        self._connection: Connection | None = None
        self._channel: Any = None
        self._generation = 0
        self._unacknowledged: deque[int] = deque()
        self._settled_tags: set[int] = set()
        self._ack_timer: Timer | None = None
        self._ack_wanted = False
        self._reconnect: Timer | None = None
        self._full: Timer | None = None
        self._retry_s = RETRY_S
        self._broker_blocks = False
        self._ending: float | None = None

    # ------------------------------------------------------------------------------------- from other threads

    def use(self, access: MailboxAccess) -> None:
        """Take this mailbox from now on; with other access than before, connect anew. Any thread."""
        self._command(lambda: self._do_use(access))

    def unavailable(self, reason: str) -> None:
        """Nobody gives us a mailbox, for now: tell the lanes. Any thread."""
        self._command(lambda: self._do_unavailable(reason))

    def attach(self, lane: int, wake: Callable[[], None]) -> None:
        """See `Mailbox.attach`."""
        self._inbox.attach(lane, wake)

    def post(
        self, to: bytes, key: bytes, lane: int, frame: Sequence[Buffer], keep_s: float | None = None
    ) -> bool:
        """See `Mailbox.post`."""
        loop = self._loop
        if not self._up or loop is None or not self._outbox.post(to, key, lane, frame, keep_s):
            return False
        loop.wake()
        return True

    def take(self, lane: int) -> list[MailEvent]:
        """See `Mailbox.take`."""
        return self._inbox.take(lane)

    def done(self, lane: int) -> None:
        """See `Mailbox.done`."""
        self._inbox.done(lane)

    def describe(self) -> dict[str, object]:
        """See `Mailbox.describe`."""
        state = self._inbox.state
        return {
            "up": isinstance(state, MailUp),
            "since": self._since,
            "error": None if isinstance(state, MailUp) else state.reason,
            "connects": self._connects,
            "broker_blocks": self._broker_blocks,
            "sent": self._outbox.sent,
            "sent_bytes": self._outbox.sent_bytes,
            "lost": self._outbox.lost,
            "waiting_bytes": self._outbox.waiting_bytes,
            **self._inbox.describe(),
        }

    def close(self) -> None:
        """See `Mailbox.close`. Takes up to `LINGER_S` while mail is still leaving, and as long for the broker's answer."""
        with self._lock:
            thread = self._thread
            first = not self._closed
            self._closed = True
        if first:
            self._up = self._up and thread is not None
            if thread is not None:
                self._commands.append(self._do_close)
                assert self._loop is not None
                self._loop.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(4 * LINGER_S)

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                return
            self._commands.append(command)
            if self._thread is None:
                self._loop = Loop(self._turn)
                self._thread = threading.Thread(target=self._run, name="gcref-mail", daemon=True)
                self._thread.start()
            assert self._loop is not None
        self._loop.wake()

    def _settled(self, tags: Sequence[int]) -> None:
        self._done.extend(tags)
        loop = self._loop
        if loop is not None and (self._ack_wanted or len(self._done) >= ACK_AT):
            loop.wake()

    # ---------------------------------------------------------------------------------------- the mail thread

    def _run(self) -> None:
        assert self._loop is not None
        try:
            self._loop.start()
        except Exception:
            log.exception("mail: the thread has failed")
            self._told(MailDown("the mail thread has failed; the log tells why"))
        finally:
            self._up = False
            self._drop_connection()
            self._loop.run_callbacks()
            self._loop.close()

    def _turn(self) -> None:
        while self._commands:
            self._commands.popleft()()
        self._inbox.flush()
        if self._done and (self._ack_wanted or len(self._done) >= ACK_AT):
            self._acknowledge()
        self._publish()
        if self._ending is not None and (not self._up or self._outbox.is_idle):
            self._finish()

    def _do_use(self, access: MailboxAccess) -> None:
        if access == self._access and (self._connection is not None or self._reconnect is not None):
            return
        self._access = access
        self._retry_s = RETRY_S
        was_up = self._up
        self._drop_connection()
        if was_up:
            self._told(MailDown("we connect anew: our access to the mailbox has changed"))
        self._connect()

    def _do_unavailable(self, reason: str) -> None:
        self._access = None
        self._drop_connection()
        self._told(MailDown(reason))

    def _do_close(self) -> None:
        assert self._loop is not None
        self._ending = time.monotonic() + LINGER_S
        self._acknowledge()
        self._loop.call_later(LINGER_S, self._finish)

    def _finish(self) -> None:
        """Say good-bye, and end the loop when the broker has answered, or soon."""
        assert self._loop is not None
        self._ending = None
        self._up = False
        connection = self._connection
        if connection is not None and connection.is_open:
            self._loop.call_later(LINGER_S, self._loop.stop)
            try:
                connection.close()
                return
            except refusals.AMQPError:
                pass  # it has just been lost
        self._loop.stop()

    # -------------------------------------------------------------------------------------------- connections

    def _connect(self) -> None:
        assert self._loop is not None
        self._reconnect = None
        if self._access is None or self._closed:
            return
        try:
            parameters = pika.URLParameters(self._access.url)
            parameters.heartbeat = HEARTBEAT_S
            parameters.connection_attempts = 1
            parameters.socket_timeout = CONNECT_S
            parameters.stack_timeout = CONNECT_S
            self._connection = Connection(
                parameters,
                self._loop,
                self._on_open,
                self._on_open_failed,
                self._on_closed,
                self._on_deliver,
                self._on_confirm,
            )
        except Exception as error:  # noqa: BLE001 - whatever is wrong with an address that somebody gave us
            self._failed(f"the broker's address cannot be used: {type(error).__name__}", refused=True)

    def _on_open(self, connection: Connection) -> None:
        if connection is not self._connection:
            return
        connection.add_on_connection_blocked_callback(lambda *_: self._blocks(True))
        connection.add_on_connection_unblocked_callback(lambda *_: self._blocks(False))
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        if self._connection is None or channel.connection is not self._connection:
            return
        self._channel = channel
        self._generation += 1
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_cancel_callback(self._on_cancelled)
        channel.add_on_return_callback(self._on_returned)
        channel.confirm_delivery(self._connection.confirm, callback=lambda _: None)
        channel.basic_qos(prefetch_count=PREFETCH, callback=lambda _: self._consume(channel))

    def _consume(self, channel: Any) -> None:
        if channel is self._channel and self._access is not None and self._connection is not None:
            self._connection.consume(channel, self._access.queue, self._on_consuming)

    def _on_consuming(self, _: Any) -> None:
        self._retry_s = RETRY_S
        self._connects += 1
        self._up = True
        self._told(MailUp())

    def _on_open_failed(self, connection: Any, error: BaseException) -> None:
        if connection is self._connection:
            self._connection = None
            self._failed(*_reason(error))

    def _on_closed(self, connection: Any, error: BaseException) -> None:
        if self._closed and self._loop is not None:
            self._connection = None
            self._loop.stop()
        elif connection is self._connection:
            self._connection = None
            self._failed(*_reason(error))

    def _on_channel_closed(self, channel: Any, error: BaseException) -> None:
        if channel is self._channel and self._connection is not None and self._connection.is_open:
            self._failed(*_reason(error))

    def _on_cancelled(self, _: Any) -> None:
        self._failed("our mailbox at the broker was deleted", refused=True)

    def _failed(self, reason: str, refused: bool) -> None:
        """There is no mailbox for now: tell, and try again."""
        if self._closed or self._loop is None:
            return
        self._drop_connection()
        self._told(MailDown(reason))
        if refused:
            self._retry_s = max(self._retry_s, REFUSED_RETRY_S)
        wait_s = self._retry_s * random.uniform(0.8, 1.2)
        self._retry_s = min(2 * self._retry_s, REFUSED_RETRY_MAX_S if refused else RETRY_MAX_S)
        self._reconnect = self._loop.call_later(wait_s, self._connect)

    def _drop_connection(self) -> None:
        """Let go of the connection without a word to the lanes."""
        connection, self._connection = self._connection, None
        self._channel = None
        self._up = False
        self._broker_blocks = False
        for timer in (self._reconnect, self._full, self._ack_timer):
            if timer is not None:
                timer.callback = None
        self._reconnect = self._full = self._ack_timer = None
        self._outbox.disconnected()
        self._unacknowledged.clear()
        self._settled_tags.clear()
        if connection is not None:
            connection.abandon()

    def _blocks(self, blocks: bool) -> None:
        self._broker_blocks = blocks
        log.warning("mail: the broker %s", "takes nothing for now" if blocks else "takes mail again")

    def _told(self, event: MailUp | MailDown) -> None:
        if event != self._inbox.state:
            self._since = time.time()
            if isinstance(event, MailDown):
                log.warning("mail: down: %s", event.reason)
            else:
                log.info("mail: up")
        self._inbox.tell(event)

    # ----------------------------------------------------------------------------------------------- mail out

    def _publish(self) -> None:
        outbox = self._outbox
        if self._up and not self._broker_blocks and self._connection is not None:
            connection = self._connection
            found = outbox.next()
            while found is not None:
                connection.publish(*_publication(found[1]))
                found = outbox.next()
            connection.flush()
        if outbox.returned:
            returned, outbox.returned = outbox.returned, []
            for event in returned:
                self._inbox.tell(event)
        if self._full is None and self._up and self._loop is not None:
            wait_s = outbox.retry_in(time.monotonic())
            if wait_s is not None:
                self._full = self._loop.call_later(wait_s, self._on_full_retry)

    def _on_full_retry(self) -> None:
        self._full = None  # the turn that follows publishes

    def _on_confirm(self, tag: int, multiple: bool, taken: bool) -> None:
        if taken:
            self._outbox.confirmed(tag, multiple)
        else:
            self._outbox.rejected(tag, multiple, time.monotonic())

    def _on_returned(self, _: Any, method: Any, properties: Any, body: bytes) -> None:
        queue = str(method.routing_key)
        try:
            party = bytes.fromhex(queue.rpartition(".")[2])
        except ValueError:
            return
        self._outbox.no_mailbox(party)

    # ------------------------------------------------------------------------------------------------ mail in

    def _on_deliver(self, tag: int, redelivered: bool, kind: str | None, body: bytes) -> None:
        self._unacknowledged.append(tag)
        self._inbox.deliver(self._generation * _GENERATION + tag, body, again=redelivered or kind == _AGAIN)
        if len(body) >= ACK_NOW_BYTES:
            self._ack_wanted = True
        elif self._ack_timer is None and not self._ack_wanted and self._loop is not None:
            self._ack_timer = self._loop.call_later(ACK_S, self._on_ack_time)

    def _on_ack_time(self) -> None:
        self._ack_timer = None
        self._acknowledge()
        # What is not done by now is acknowledged when it is, at once.
        self._ack_wanted = bool(self._unacknowledged)

    def _acknowledge(self) -> None:
        done, settled = self._done, self._settled_tags
        while done:
            generation, tag = divmod(done.popleft(), _GENERATION)
            if generation == self._generation:
                settled.add(tag)
        waiting, channel = self._unacknowledged, self._channel
        if channel is None or not channel.is_open:
            return
        last = 0
        while waiting and waiting[0] in settled:
            last = waiting.popleft()
            settled.discard(last)
        if last:
            channel.basic_ack(last, multiple=True)
        if len(settled) >= ACK_AT:
            # One lane stands still: it must not take the whole prefetch from the other.
            self._unacknowledged = deque(tag for tag in waiting if tag not in settled)
            for tag in settled:
                channel.basic_ack(tag)
            settled.clear()
        if not self._unacknowledged:
            self._ack_wanted = False


_AGAIN: Final = "again"


def _publication(parcel: Parcel) -> tuple[str, bytes, str | None, int | None]:
    """Queue, body, type and expiration in ms."""
    keep_ms = None
    if parcel.ends is not None:
        keep_ms = max(1, int((parcel.ends - time.monotonic()) * 1000))
    return queue_of(parcel.receiver.id), parcel.envelope, _AGAIN if parcel.again else None, keep_ms


def _reason(error: BaseException) -> tuple[str, bool]:
    """What is wrong, for people and without secrets; and whether the broker has refused us."""
    if isinstance(error, refusals.AMQPConnectionError):
        inner = _innermost(error)
    else:
        inner = error
    if isinstance(inner, (refusals.ProbableAuthenticationError, refusals.AuthenticationError)):
        return "the broker refuses our user or password", True
    if isinstance(inner, refusals.ProbableAccessDeniedError):
        return "the broker refuses us its virtual host", True
    if isinstance(inner, (refusals.ConnectionClosed, refusals.ChannelClosed)):
        code, text = inner.reply_code, inner.reply_text
        if code == 403:
            return f"the broker refuses us: {text}", True
        if code == 404:
            return "we have no mailbox at the broker (any more)", True
        return f"the broker has closed the connection: {code} {text}", False
    if isinstance(inner, refusals.AMQPHeartbeatTimeout):
        return "the broker gives no sign of life", False
    if isinstance(inner, OSError):
        return f"the broker cannot be reached: {inner.strerror or type(inner).__name__}", False
    return f"the connection with the broker was lost ({type(inner).__name__})", False


def _innermost(error: BaseException) -> BaseException:
    """The cause that pika wraps several times."""
    while True:
        inner = getattr(error, "exceptions", None) or getattr(error, "exception", None) or error.args[:1]
        if isinstance(inner, (list, tuple)):
            inner = inner[-1] if inner else None
        if not isinstance(inner, BaseException):
            return error
        error = inner


# pika reports each lost connection several times, with stacks, as errors. What there is to say is said above.
logging.getLogger("pika").setLevel(logging.CRITICAL)
