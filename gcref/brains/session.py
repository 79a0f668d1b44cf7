"""One session: the ordered, acknowledged exchange of messages with one other party, whatever carries it.

        append(body)                                        receive(packet)
             │                                                    │
          queue ── cut (credit) ──► unacked ══ frames ══► early ──┴──► in order, once
             ▲                        │  ▲                              │
             └── restart (renumber) ──┘  └──────── take_ack ◄═ ack ═════┘

Two independent streams, one in each direction. The numbers of a stream begin at 1 in each *epoch*; a party begins
a new epoch when it starts, and when its peer has lost what it had taken (`restart`).

Rules:
    - A message is packed once, on `append`; a packet is cut once, by `cut`, and its bytes are kept until they are
      acknowledged. A resend is the same bytes.
    - At most `CREDIT_BYTES` are unacknowledged; what is beyond waits without a number.
    - The receiver takes each number once and in order. What comes early is kept, within bounds, or dropped: it
      will be sent again.
    - An acknowledgement rides on the next packet; without one it is due after `ACK_DELAY_S` or `ACK_PACKETS`
      packets, and at once after a duplicate or a gap, which mean that the other side knows too little.
    - Nothing acknowledges by itself: the owner of the session (`Peers`) writes acknowledgements in its `flush`, after
      the shell has journalled what was delivered.

Links, handshakes and timers are `Peers`'s. A session is state and arithmetic only.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Final, NamedTuple

from gcref.wire.codec import (
    DATA,
    HEADER_BYTES,
    MAX_ITEMS,
    Packet,
    pack,
    pack_packet,
    renumber,
    unpack,
    unpack_packet,
)  # fmt: skip

CREDIT_BYTES: Final = 64 * 1024 * 1024
"""Bytes that may be under way to one peer, unacknowledged."""

PACKET_BYTES: Final = 1024 * 1024
"""A packet is closed before it grows beyond this (one larger message is a packet of its own), bytes."""

ACK_DELAY_S: Final = 0.02
"""How long an acknowledgement waits for a packet to ride on."""

ACK_PACKETS: Final = 64
"""After so many packets an acknowledgement waits no longer."""

RESEND_S: Final = 1.0
"""How long the oldest packet may be unacknowledged until the peer is asked; doubles up to `RESEND_MAX_S`."""

RESEND_MAX_S: Final = 30.0

EARLY_PACKETS: Final = 256
"""Packets that are kept while an earlier one is missing."""

NEVER: Final = math.inf


class Taken(NamedTuple):
    """What a packet gave: the messages that are new and in order, and the frame that holds exactly them."""

    messages: list[Any]
    frame: bytes


class Session:
    """The two streams between this party and one other.

    Attributes:
        epoch: the epoch of the stream to the peer.
        next_seq: the number that the next message will get.
        acked: the peer has taken all numbers up to this.
        appended: messages that were ever appended, in all epochs.
        unacked_bytes: bytes of the packets that are not acknowledged.
        queued_bytes: bytes of the messages that wait for credit or a link.
        peer_epoch: the epoch of the stream from the peer; 0: not met yet.
        taken: all numbers up to this have been handed on.
        ack_at: when an acknowledgement is due, seconds; `NEVER`: nothing to say; `-NEVER`: now.
        resend_at: when to ask the peer what it has, seconds; `NEVER`: all is acknowledged.
        duplicates: packets received that held nothing new.
    """

    __slots__ = (
        "_backoff_s",
        "_early",
        "_early_bytes",
        "_queue",
        "_unacked",
        "_unreported",
        "ack_at",
        "acked",
        "appended",
        "duplicates",
        "epoch",
        "next_seq",
        "peer_epoch",
        "queued_bytes",
        "resend_at",
        "taken",
        "unacked_bytes",
    )

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.next_seq = 1
        self.acked = 0
        self.appended = 0
        self.unacked_bytes = 0
        self.queued_bytes = 0
        self.peer_epoch = 0
        self.taken = 0
        self.ack_at = NEVER
        self.resend_at = NEVER
        self.duplicates = 0
        self._queue: deque[bytes] = deque()
        self._unacked: deque[tuple[int, bytes]] = deque()  # (last number, frame)
        self._backoff_s = RESEND_S
        self._unreported = 0
        self._early: dict[int, tuple[list[Any], bytes]] = {}  # first number → messages, frame
        self._early_bytes = 0

    # ------------------------------------------------------------------------------------------------ sending

    @property
    def pending(self) -> int:
        """Messages that the peer has not acknowledged, queued ones included."""
        return len(self._queue) + self.next_seq - 1 - self.acked

    def append(self, body: bytes) -> None:
        """Queue a packed message."""
        self._queue.append(body)
        self.appended += 1
        self.queued_bytes += len(body)

    def cut(self, now: float) -> list[bytes]:
        """Turn the queue into frames, as far as the credit goes. They carry the acknowledgement that is due."""
        queue = self._queue
        frames: list[bytes] = []
        while queue and self.unacked_bytes < CREDIT_BYTES:
            bodies: list[bytes] | deque[bytes]
            if self.queued_bytes <= PACKET_BYTES and len(queue) <= MAX_ITEMS:
                # The common case: all of it is one packet.
                bodies = queue
                self._queue = queue = deque()
            else:
                bodies = [queue.popleft()]
                size = len(bodies[0])
                while queue and size + len(queue[0]) <= PACKET_BYTES and len(bodies) < MAX_ITEMS:
                    size += len(queue[0])
                    bodies.append(queue.popleft())
            frame = pack_packet(DATA, self.epoch, self.next_seq, self.peer_epoch, self.taken, bodies)
            self.next_seq += len(bodies)
            self.queued_bytes -= len(frame) - HEADER_BYTES
            self.unacked_bytes += len(frame)
            self._unacked.append((self.next_seq - 1, frame))
            frames.append(frame)
        if frames:
            if self.resend_at == NEVER:
                self.resend_at = now + self._backoff_s
            self.ack_said()
        return frames

    def take_ack(self, epoch: int, ack: int, now: float) -> bool:
        """Let go of what the peer has taken.

        Args:
            epoch: the epoch of our stream that the acknowledgement speaks of; another one than ours is stale.
            ack: the last number taken.
            now: seconds.

        Returns:
            Whether it was news.
        """
        if epoch != self.epoch or ack <= self.acked or ack >= self.next_seq:
            return False
        self.acked = ack
        unacked = self._unacked
        while unacked and unacked[0][0] <= ack:
            self.unacked_bytes -= len(unacked.popleft()[1])
        self._backoff_s = RESEND_S
        self.resend_at = now + RESEND_S if unacked else NEVER
        return True

    def unacked_frames(self, last_seq: int) -> list[bytes]:
        """Give the frames that are unacknowledged, up to the one that ends with the number `last_seq`."""
        return [frame for last, frame in self._unacked if last <= last_seq]

    def back_off(self, now: float) -> None:
        """Note that the peer was asked (again) what it has: the next question waits twice as long."""
        self._backoff_s = min(self._backoff_s * 2, RESEND_MAX_S)
        self.resend_at = now + self._backoff_s if self._unacked else NEVER

    def resent(self, now: float) -> None:
        """Note that the unacknowledged frames went out (again)."""
        self._backoff_s = RESEND_S
        self.resend_at = now + RESEND_S if self._unacked else NEVER

    def restart(self, epoch: int) -> list[Any]:
        """Begin a new epoch, because the peer does not have the old one; what it had not acknowledged is kept.

        Returns:
            The messages that are kept: they are sent in the new epoch.
        """
        old, self._unacked = self._unacked, deque()
        self.epoch = epoch
        self.acked = 0
        self.next_seq = 1
        kept: list[Any] = []
        for _, frame in old:
            fresh = renumber(frame, epoch, self.next_seq)
            messages = unpack_packet(fresh).messages
            kept += messages
            self.next_seq += len(messages)
            self._unacked.append((self.next_seq - 1, fresh))
        kept += [unpack(body) for body in self._queue]
        return kept

    # ---------------------------------------------------------------------------------------------- receiving

    def adopt(self, peer_epoch: int) -> None:
        """Begin to take a new stream of the peer, from its first number on."""
        self.peer_epoch = peer_epoch
        self.taken = 0
        self.ack_at = NEVER
        self._unreported = 0
        self._early.clear()
        self._early_bytes = 0

    def receive(self, packet: Packet, frame: bytes, now: float) -> list[Taken]:
        """Take a DATA packet of the peer's present epoch.

        Returns:
            What has become deliverable, in order; one entry for each packet.
        """
        first, messages = packet[2], packet[5]
        if first == self.taken + 1 and messages and not self._early:
            # The common case: the next packet, and nobody waits for it.
            self.taken += len(messages)
            self._owe_ack(now)
            return [Taken(messages, frame)]
        if not messages:
            return []
        return self._receive_oddly(first, messages, frame, now)

    def _receive_oddly(self, first: int, messages: list[Any], frame: bytes, now: float) -> list[Taken]:
        if first > self.taken + 1:
            self._keep_early(first, messages, frame)
            self.ack_at = -NEVER
            return []
        found: list[Taken] = []
        self._take(first, messages, frame, found)
        while self._early:
            # Cuts may differ from those of the first sending, so an early packet may overlap what is taken.
            first = min(self._early)
            if first > self.taken + 1:
                break
            messages, frame = self._early.pop(first)
            self._early_bytes -= len(frame)
            self._take(first, messages, frame, found)
        if found:
            self._owe_ack(now)
        else:
            self.duplicates += 1
            self.ack_at = -NEVER
        return found

    def _take(self, first: int, messages: list[Any], frame: bytes, found: list[Taken]) -> None:
        known = self.taken + 1 - first
        if known >= len(messages):
            return
        if known:
            messages = messages[known:]
            frame = pack_packet(
                DATA, self.peer_epoch, self.taken + 1, 0, 0, [pack(each) for each in messages]
            )
        self.taken += len(messages)
        found.append(Taken(messages, frame))

    def _keep_early(self, first: int, messages: list[Any], frame: bytes) -> None:
        kept = self._early.get(first)
        if kept is not None:
            if len(kept[0]) >= len(messages):
                return
            self._early_bytes -= len(kept[1])
        elif len(self._early) >= EARLY_PACKETS or self._early_bytes + len(frame) > CREDIT_BYTES:
            return
        self._early[first] = (messages, frame)
        self._early_bytes += len(frame)

    def _owe_ack(self, now: float) -> None:
        self._unreported += 1
        if self._unreported >= ACK_PACKETS:
            self.ack_at = -NEVER
        elif self.ack_at == NEVER:
            self.ack_at = now + ACK_DELAY_S

    def ack_frame(self) -> bytes:
        """Write a packet that only acknowledges."""
        self.ack_said()
        return pack_packet(DATA, self.epoch, self.next_seq, self.peer_epoch, self.taken, ())

    def ack_said(self) -> None:
        """Note that a packet with the present acknowledgement goes out."""
        self.ack_at = NEVER
        self._unreported = 0
