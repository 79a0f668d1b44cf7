"""The fake broker: mailboxes inside one process, with faults on demand.

    post = Post()
    ada, bob = MemoryMailbox(post, ada_id, ada_keys), MemoryMailbox(post, bob_id, bob_keys)
    ada.use(post.access(ada_id)); bob.use(post.access(bob_id))
    ada.post(bob_id, bob_keys.public, CONTROL, [b"hello"])
    post.stop(); post.start()

It keeps the promises of `gcref.carriers.mail.post.Mailbox` (the same tests run over it) until it is told to break them. Mail is
really sealed, so that it can be forged and replayed. Mailboxes of one post may live on different threads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from gcref.carriers.keys import KeyPair
from gcref.carriers.mail.inbox import Inbox
from gcref.carriers.mail.outbox import WAITING_MAX_BYTES
from gcref.carriers.mail.post import (
    FULL,
    NO_MAILBOX,
    Buffer,
    MailboxAccess,
    MailDown,
    MailEvent,
    MailUp,
    Returned,
    queue_of,
)
from gcref.carriers.mail.seal import Sealer

CAPTURED_MAX: Final = 100
"""Envelopes that a post remembers for those who want to replay them."""


class _Box:
    """One mailbox: what lies in it, and what was handed out and is not acknowledged."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[bytes, float | None, bool]] = deque()  # envelope, its end, delivered before
        self.handed: dict[int, bytes] = {}
        self.full = False
        self.next_tag = 0


class Post:
    """What connects memory mailboxes, and the faults that can befall it. All methods may be called by any thread.

    Attributes:
        captured: the last envelopes that passed, as (receiver, envelope): what a broker could keep and replay.
    """

    def __init__(self) -> None:
        self.captured: deque[tuple[bytes, bytes]] = deque(maxlen=CAPTURED_MAX)
        self._lock = threading.RLock()
        self._boxes: dict[bytes, _Box] = {}
        self._users: dict[bytes, MemoryMailbox] = {}
        self._open: dict[bytes, MemoryMailbox] = {}
        self._running = True
        self._paused = False
        self._held: list[tuple[bytes, bytes]] = []
        self._drop = 0
        self._duplicate = 0
        self._delay = 0

    def access(self, party: bytes) -> MailboxAccess:
        """Make a party's mailbox, if it has none: what the hub does."""
        with self._lock:
            self._boxes.setdefault(party, _Box())
            self._connect_all()
        return MailboxAccess(f"memory://{party.hex()}", queue_of(party))

    # ---------------------------------------------------------------------------------------------- faults

    def stop(self) -> None:
        """End the broker: everybody is disconnected. What lies in the mailboxes stays."""
        with self._lock:
            self._running = False
            for party in list(self._open):
                self._disconnect(party, "the broker has gone")

    def start(self) -> None:
        """End a `stop`."""
        with self._lock:
            self._running = True
            self._connect_all()

    def restart(self) -> None:
        """Disconnect everybody, and let them come again: unacknowledged mail is delivered again."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Let nothing pass, and tell nobody."""
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        """End a `pause`: what was sent meanwhile arrives."""
        with self._lock:
            self._paused = False
            for party in list(self._boxes):
                self._push(party)

    def drop(self, mails: int = 1) -> None:
        """Lose the next envelopes."""
        with self._lock:
            self._drop += mails

    def duplicate(self, mails: int = 1) -> None:
        """Deliver the next envelopes twice."""
        with self._lock:
            self._duplicate += mails

    def delay(self, mails: int = 1) -> None:
        """Hold the next envelopes back until `release`: later ones overtake them."""
        with self._lock:
            self._delay += mails

    def release(self) -> None:
        """Deliver what `delay` held back."""
        with self._lock:
            held, self._held = self._held, []
            for to, envelope in held:
                self._put(to, envelope, None)

    def forge(self, to: bytes, envelope: bytes) -> None:
        """Put any bytes into a mailbox, as every other user of the broker can."""
        with self._lock:
            self._put(to, envelope, None)

    def fill(self, party: bytes) -> None:
        """Let a mailbox be full: it takes nothing more."""
        with self._lock:
            self._boxes[party].full = True

    def drain(self, party: bytes) -> None:
        """End a `fill`: what waited for it goes in."""
        with self._lock:
            self._boxes[party].full = False
            for mailbox in list(self._open.values()):
                mailbox._send_waiting(party)

    def remove(self, party: bytes) -> None:
        """Delete a mailbox with all that lies in it."""
        with self._lock:
            self._boxes.pop(party, None)
            self._disconnect(party, "the mailbox is gone")

    def depth(self, party: bytes) -> int:
        """How much lies in a mailbox, what was handed out and not acknowledged included."""
        with self._lock:
            box = self._boxes.get(party)
            return 0 if box is None else len(box.waiting) + len(box.handed)

    # ------------------------------------------------------------------------------------- for mailboxes

    def _connect_all(self) -> None:
        for party, mailbox in list(self._users.items()):
            if self._running and party in self._boxes and party not in self._open:
                self._open[party] = mailbox
                mailbox._told(MailUp())
                mailbox._send_waiting(None)
                self._push(party)

    def _use(self, mailbox: MemoryMailbox, party: bytes) -> None:
        with self._lock:
            # The last one to come has the mailbox: the process before it is gone, or is as good as gone.
            before = self._users.get(party)
            if before is not None and before is not mailbox:
                self._disconnect(party, "another process uses the mailbox")
            self._users[party] = mailbox
            if not self._running:
                mailbox._told(MailDown("the broker has gone"))
            elif party not in self._boxes:
                mailbox._told(MailDown("the mailbox is gone"))
            self._connect_all()

    def _leave(self, mailbox: MemoryMailbox, party: bytes, reason: str) -> None:
        with self._lock:
            if self._users.get(party) is mailbox:
                self._disconnect(party, reason)
                del self._users[party]

    def _disconnect(self, party: bytes, reason: str) -> None:
        mailbox = self._open.pop(party, None)
        box = self._boxes.get(party)
        if box is not None:
            box.waiting.extendleft((each, None, True) for each in reversed(box.handed.values()))
            box.handed.clear()
        if mailbox is not None:
            mailbox._told(MailDown(reason))

    def _is_open(self, mailbox: MemoryMailbox, party: bytes) -> bool:
        return self._open.get(party) is mailbox

    def _send(self, to: bytes, envelopes: Sequence[bytes], keep_s: float | None) -> str | None:
        """Take mail; a reason if it goes back."""
        with self._lock:
            box = self._boxes.get(to)
            if box is None:
                return NO_MAILBOX
            if box.full:
                return FULL
            end = None if keep_s is None else time.monotonic() + keep_s
            for envelope in envelopes:
                self.captured.append((to, envelope))
                if self._drop:
                    self._drop -= 1
                elif self._delay:
                    self._delay -= 1
                    self._held.append((to, envelope))
                else:
                    self._put(to, envelope, end)
                    if self._duplicate:
                        self._duplicate -= 1
                        self._put(to, envelope, end)
            return None

    def _put(self, to: bytes, envelope: bytes, end: float | None) -> None:
        box = self._boxes.get(to)
        if box is not None:
            box.waiting.append((envelope, end, False))
            self._push(to)

    def _push(self, party: bytes) -> None:
        box, mailbox = self._boxes.get(party), self._open.get(party)
        if box is None or mailbox is None or self._paused:
            return
        while box.waiting:
            envelope, end, again = box.waiting.popleft()
            if end is not None and time.monotonic() > end:
                continue
            box.next_tag += 1
            box.handed[box.next_tag] = envelope
            mailbox._inbox.deliver(box.next_tag, envelope, again=again)
        mailbox._inbox.flush()

    def _settled(self, party: bytes, tags: Sequence[int]) -> None:
        with self._lock:
            box = self._boxes.get(party)
            if box is not None:
                for tag in tags:
                    box.handed.pop(tag, None)


class MemoryMailbox:
    """A mailbox of a `Post`. What it promises is said in `gcref.carriers.mail.post.Mailbox`.

    Args:
        post: what connects it with others.
        me: our id.
        pair: our owner key.
    """

    def __init__(self, post: Post, me: bytes, pair: KeyPair) -> None:
        self._post = post
        self._me = me
        self._inbox = Inbox(me, pair, self._settled)
        self._sealer = Sealer(me, pair)
        self._waiting: dict[bytes, deque[tuple[list[bytes], int, float | None]]] = {}
        self._since = time.time()
        self._sent = self._sent_bytes = 0
        self._closed = False

    def use(self, access: MailboxAccess) -> None:
        """See `AmqpMailbox.use`."""
        self._post._use(self, bytes.fromhex(access.url.removeprefix("memory://")))

    def unavailable(self, reason: str) -> None:
        """See `AmqpMailbox.unavailable`."""
        self._post._leave(self, self._me, reason)
        self._told(MailDown(reason))

    def attach(self, lane: int, wake: Callable[[], None]) -> None:
        """See `Mailbox.attach`."""
        with self._post._lock:
            self._inbox.attach(lane, wake)

    def post(
        self, to: bytes, key: bytes, lane: int, frame: Sequence[Buffer], keep_s: float | None = None
    ) -> bool:
        """See `Mailbox.post`."""
        with self._post._lock:
            if self._closed or not self._post._is_open(self, self._me):
                return False
            waiting = self._waiting.get(to)
            if waiting and sum(size for _, size, _ in waiting) >= WAITING_MAX_BYTES:
                return False
            try:
                envelopes = self._sealer.seal(to, key, lane, frame)
            except ValueError:
                return False
            size = sum(map(len, envelopes))
            self._sent += 1
            self._sent_bytes += size
            if waiting:
                waiting.append((envelopes, size, keep_s))
                return True
            reason = self._post._send(to, envelopes, keep_s)
            if reason is not None:
                if reason == FULL:
                    self._waiting[to] = deque([(envelopes, size, keep_s)])
                self._inbox.tell(Returned(to, reason))
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
        waiting = sum(size for each in list(self._waiting.values()) for _, size, _ in list(each))
        return {
            "up": isinstance(state, MailUp),
            "since": self._since,
            "error": None if isinstance(state, MailUp) else state.reason,
            "sent": self._sent,
            "sent_bytes": self._sent_bytes,
            "waiting_bytes": waiting,
            **self._inbox.describe(),
        }

    def close(self) -> None:
        """See `Mailbox.close`."""
        if not self._closed:
            self._closed = True
            self._post._leave(self, self._me, "it is closed")

    def _told(self, event: MailEvent) -> None:
        self._since = time.time()
        self._inbox.tell(event)

    def _settled(self, tags: Sequence[int]) -> None:
        self._post._settled(self._me, tags)

    def _send_waiting(self, to: bytes | None) -> None:
        """Try again what waited for a full mailbox; None: for all of them."""
        for party in [to] if to is not None else list(self._waiting):
            waiting = self._waiting.get(party)
            while waiting:
                envelopes, _, keep_s = waiting[0]
                if self._post._send(party, envelopes, keep_s) is not None:
                    break
                waiting.popleft()
            if not waiting:
                self._waiting.pop(party, None)
