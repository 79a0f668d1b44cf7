"""What waits to leave for other mailboxes, and what has left and is not confirmed.

    post ─► waiting, by receiver and lane ─► sealed ─► in flight ─► confirmed
                        ▲                                 │
                        └── rejected: its mailbox is full ┴── the connection was lost

Rules:
    - Of one receiver everything leaves in the order of its numbers. So when a mailbox rejects something, nothing more leaves
      for it until all that is in flight has been answered; and what was rejected before something that was taken is lost, as
      its number has been passed. (Sessions and requests repeat what is lost.)
    - A full mailbox is tried again with one envelope at a time.
    - Control goes before bulk; receivers take turns.
    - What waits is bounded by receiver and lane; what is in flight, in all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from gcref.carriers.mail.post import BULK, CONTROL, FULL, NO_MAILBOX, Buffer, Returned
from gcref.carriers.mail.seal import Sealer

WAITING_MAX_BYTES: Final = 16 * 1024 * 1024
"""What may wait for one receiver on one lane. A single frame may be larger."""

WAITING_ALL_MAX_BYTES: Final = 160 * 1024 * 1024

WINDOW_BYTES: Final = 6 * 1024 * 1024
"""What may be on its way to the broker and not confirmed. Control waits behind it, for as long as it takes to send."""

WINDOW_MAILS: Final = 2048

FULL_RETRY_S: Final = 0.2
"""A full mailbox is tried again after this; doubles up to `FULL_RETRY_MAX_S`, seconds."""

FULL_RETRY_MAX_S: Final = 10.0


class Letter:
    """A frame that waits.

    Attributes:
        ends: when nobody wants it any more, monotonic seconds; None: never.
    """

    __slots__ = ("ends", "frame", "key", "lane", "size", "to")

    def __init__(
        self, to: bytes, key: bytes, lane: int, frame: Sequence[Buffer], size: int, ends: float | None
    ) -> None:
        self.to = to
        self.key = key
        self.lane = lane
        self.frame = frame
        self.size = size
        self.ends = ends


class Parcel:
    """An envelope that is in flight, or was.

    Attributes:
        number: counts up for each receiver.
        again: it has been sent before, on a connection that was lost.
    """

    __slots__ = ("again", "ends", "envelope", "number", "receiver")

    def __init__(self, receiver: Receiver, envelope: bytes, number: int, ends: float | None) -> None:
        self.receiver = receiver
        self.envelope = envelope
        self.number = number
        self.ends = ends
        self.again = False


class Receiver:
    """A party that we write to.

    Attributes:
        letters: what waits, by lane.
        sealed: what waits and is sealed already: it leaves first.
        flying: parcels in flight.
        rejected: parcels that were rejected while others are in flight.
        taken: the highest number that its mailbox took.
        full: it is full: one parcel at a time.
        retry_at: nothing leaves before, monotonic seconds.
        retry_s: how long to wait the next time.
    """

    __slots__ = (
        "flying",
        "full",
        "id",
        "letters",
        "number",
        "rejected",
        "retry_at",
        "retry_s",
        "sealed",
        "taken",
    )

    def __init__(self, id: bytes) -> None:
        self.id = id
        self.letters: tuple[deque[Letter], deque[Letter]] = (deque(), deque())
        self.sealed: deque[Parcel] = deque()
        self.number = 0
        self.flying = 0
        self.rejected: list[Parcel] = []
        self.taken = 0
        self.full = False
        self.retry_at = 0.0
        self.retry_s = FULL_RETRY_S


class MailOutbox:
    """What waits and what is in flight. `post` may be called by any thread; all else by the mailbox's.

    Args:
        sealer: seals what leaves.

    Attributes:
        returned: what came back, and why; to be taken by the mailbox.
        sent: frames that were posted and sealed.
        lost: envelopes that were given up because later ones had overtaken them, or that nobody wanted any more.
    """

    def __init__(self, sealer: Sealer) -> None:
        self.returned: list[Returned] = []
        self.sent = 0
        self.sent_bytes = 0
        self.lost = 0
        self._sealer = sealer
        self._lock = threading.Lock()
        self._posted: deque[Letter] = deque()
        self._waiting: dict[tuple[bytes, int], int] = {}
        self._waiting_all = 0
        self._receivers: dict[bytes, Receiver] = {}
        self._ready: deque[Receiver] = deque()
        self._flying: deque[tuple[int, Parcel]] = deque()
        self._flying_bytes = 0
        self._next_tag = 1

    @property
    def waiting_bytes(self) -> int:
        """What was posted and has not left."""
        return self._waiting_all

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not (self._posted or self._flying or self._waiting_all or any(r.sealed for r in self._ready))

    def post(self, to: bytes, key: bytes, lane: int, frame: Sequence[Buffer], keep_s: float | None) -> bool:
        """See `Mailbox.post`."""
        size = sum(map(len, frame))
        ends = None if keep_s is None else time.monotonic() + keep_s
        letter = Letter(to, key, lane, frame, size, ends)
        name = (to, lane)
        with self._lock:
            waiting = self._waiting.get(name, 0)
            if waiting and waiting + size > WAITING_MAX_BYTES:
                return False
            if self._waiting_all and self._waiting_all + size > WAITING_ALL_MAX_BYTES:
                return False
            self._waiting[name] = waiting + size
            self._waiting_all += size
            self._posted.append(letter)
        return True

    def next(self) -> tuple[int, Parcel] | None:
        """What to publish now, with the tag that the broker will confirm it by; None: nothing for now."""
        posted = self._posted
        while posted:
            letter = posted.popleft()
            receiver = self._receivers.get(letter.to)
            if receiver is None:
                receiver = self._receivers[letter.to] = Receiver(letter.to)
            if not (receiver.sealed or receiver.letters[0] or receiver.letters[1]):
                self._ready.append(receiver)
            receiver.letters[letter.lane].append(letter)
        if not self._ready or self._flying_bytes >= WINDOW_BYTES or len(self._flying) >= WINDOW_MAILS:
            return None
        parcel = self._choose()
        if parcel is None:
            return None
        tag = self._next_tag
        self._next_tag += 1
        parcel.receiver.flying += 1
        self._flying.append((tag, parcel))
        self._flying_bytes += len(parcel.envelope)
        return tag, parcel

    def _choose(self) -> Parcel | None:
        now = time.monotonic()
        for lane in (CONTROL, BULK):
            for _ in range(len(self._ready)):
                receiver = self._ready.popleft()
                parcel = self._take(receiver, lane, now)
                if receiver.sealed or receiver.letters[0] or receiver.letters[1]:
                    self._ready.append(receiver)
                if parcel is not None:
                    return parcel
        return None

    def _take(self, receiver: Receiver, lane: int, now: float) -> Parcel | None:
        if receiver.full and (receiver.flying or now < receiver.retry_at):
            return None
        while True:
            while receiver.sealed:
                parcel = receiver.sealed.popleft()
                if parcel.ends is None or now < parcel.ends:
                    return parcel
                self.lost += 1
            letters = receiver.letters[lane]
            if not letters:
                return None
            letter = letters.popleft()
            with self._lock:
                self._waiting_all -= letter.size
                left = self._waiting[letter.to, lane] - letter.size
                if left:
                    self._waiting[letter.to, lane] = left
                else:
                    del self._waiting[letter.to, lane]
            if letter.ends is not None and now >= letter.ends:
                self.lost += 1
                continue
            for envelope in self._seal(letter):
                receiver.number += 1
                receiver.sealed.append(Parcel(receiver, envelope, receiver.number, letter.ends))

    def _seal(self, letter: Letter) -> list[bytes]:
        try:
            envelopes = self._sealer.seal(letter.to, letter.key, letter.lane, letter.frame)
        except ValueError:
            self.lost += 1
            return []
        self.sent += 1
        self.sent_bytes += letter.size
        return envelopes

    # ------------------------------------------------------------------------------------- what the broker says

    def confirmed(self, tag: int, multiple: bool) -> None:
        """The broker has taken this, and everything before it if `multiple`."""
        for parcel in self._landed(tag, multiple):
            receiver = parcel.receiver
            receiver.flying -= 1
            receiver.taken = max(receiver.taken, parcel.number)
            if receiver.rejected:
                if not receiver.flying:
                    self._settle(receiver)
            elif receiver.full:
                receiver.full = False
                receiver.retry_s = FULL_RETRY_S

    def rejected(self, tag: int, multiple: bool, now: float) -> None:
        """The broker has not taken it: the mailbox is full."""
        for parcel in self._landed(tag, multiple):
            receiver = parcel.receiver
            receiver.flying -= 1
            receiver.rejected.append(parcel)
            if not receiver.full:
                receiver.full = True
                self.returned.append(Returned(receiver.id, FULL))
            if not receiver.flying:
                self._settle(receiver)

    def no_mailbox(self, to: bytes) -> None:
        """The broker knows no such mailbox."""
        told = Returned(to, NO_MAILBOX)
        if told not in self.returned:
            self.returned.append(told)

    def retry_in(self, now: float) -> float | None:
        """When a full mailbox is to be tried again, seconds from now; None: there is none."""
        times = [r.retry_at - now for r in self._ready if r.full and not r.flying]
        return max(0.0, min(times)) if times else None

    def disconnected(self) -> None:
        """The connection was lost: what was in flight waits again. Some of it may have arrived; that is noticed there."""
        flying, self._flying = self._flying, deque()
        self._flying_bytes = 0
        self._next_tag = 1
        for _, parcel in flying:
            receiver = parcel.receiver
            receiver.flying = 0
            receiver.rejected.append(parcel)
            parcel.again = True
        for receiver in {id(parcel.receiver): parcel.receiver for _, parcel in flying}.values():
            self._requeue(receiver)

    def _landed(self, tag: int, multiple: bool) -> list[Parcel]:
        flying = self._flying
        landed: list[Parcel] = []
        if multiple:
            while flying and (tag == 0 or flying[0][0] <= tag):
                landed.append(flying.popleft()[1])
        elif flying and flying[0][0] == tag:
            landed.append(flying.popleft()[1])
        else:
            for at, (number, parcel) in enumerate(flying):
                if number == tag:
                    landed.append(parcel)
                    del flying[at]
                    break
        for parcel in landed:
            self._flying_bytes -= len(parcel.envelope)
        return landed

    def _settle(self, receiver: Receiver) -> None:
        """All that was in flight for a full mailbox has been answered."""
        receiver.retry_at = time.monotonic() + receiver.retry_s
        receiver.retry_s = min(2 * receiver.retry_s, FULL_RETRY_MAX_S)
        self._requeue(receiver)

    def _requeue(self, receiver: Receiver) -> None:
        waiting = receiver.sealed or receiver.letters[0] or receiver.letters[1]
        kept = sorted((p for p in receiver.rejected if p.number > receiver.taken), key=lambda p: p.number)
        self.lost += len(receiver.rejected) - len(kept)
        receiver.rejected = []
        receiver.sealed.extendleft(reversed(kept))
        if kept and not waiting:
            self._ready.append(receiver)
