"""Sealed mail: what a broker that nobody trusts carries. The only room that imports `nacl`.

    frame ── cut ──► part ─┐                              ┌─► envelope ── open ──► part ─┐
                    part ─┼─ seal ──► envelope ── broker ─┼─► envelope ── open ──► part ─┼─ join ──► frame
                    part ─┘                              └─► …

An envelope is a header in the clear and a NaCl box between the keys of the two parties:

    version 1 · flags 1 · sender 16 · receiver 16 · sender's public key 32 · stream 16 · number 8 · box

The box's nonce is a hash of the header, so whoever changes the header breaks the box: mail is bound to its sender, its
receiver, the sender's stream (16 random bytes for each process) and its number there. A receiver takes the numbers of a
stream in ascending order only, so that what is delivered twice counts once.

Rules:
    - Whatever the bytes are, opening ends in a frame or in a count; nothing is raised.
    - Numbers of one stream may have gaps (mail is lost when a broker dies), but not within one frame.
    - What is remembered is bounded. A stream that was forgotten, or a receiver that was started again, can be shown old mail
      anew: sessions and requests have numbers of their own for that.

Source: the NaCl manual, crypto_box; XSalsa20's 24 bytes of nonce are long enough to be a hash.
"""

from __future__ import annotations

import logging
import os
import struct
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple

from nacl import bindings
from nacl.exceptions import CryptoError
from zmq.utils import z85

from gcref.carriers.mail.post import BULK
from gcref.wire.codec import MAX_FRAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gcref.carriers.keys import KeyPair
    from gcref.carriers.mail.post import Buffer

log = logging.getLogger(__name__)

VERSION: Final = 1

HEADER_BYTES: Final = 90
OVERHEAD_BYTES: Final = HEADER_BYTES + bindings.crypto_secretbox_MACBYTES

ENVELOPE_MAX_BYTES: Final = 1024 * 1024
"""One message at the broker. What is larger travels in parts."""

PART_MAX_BYTES: Final = ENVELOPE_MAX_BYTES - OVERHEAD_BYTES

STREAMS_MAX: Final = 4096
"""Streams whose last number is remembered: one for each process that has written to us."""

KEYS_MAX: Final = 1024
"""Keys whose shared secret is kept; computing one again takes some 50 µs."""

FRAME_MAX_BYTES: Final = MAX_FRAME_BYTES + 64
"""What is put together again: a frame of the largest size, and what a carrier writes before it."""

PARTIAL_MAX_BYTES: Final = 2 * MAX_FRAME_BYTES
"""Frames of which the end has not come yet, all together."""

TOLD_MAX: Final = 1000
"""Senders whose bad mail was logged. Beyond that it is only counted."""

FAULTS: Final = ("foreign", "forged", "replayed", "garbage", "oversize", "broken")

_LANE: Final = 0x01
_MORE: Final = 0x80
_CONTINUED: Final = 0x40
"""Flags: more parts follow; this is not the first part."""

_HEADER: Final = struct.Struct(">BB16s16s32s16sQ")

# A box with a key that was computed before is a secret box; these two are the fastest way there without touching
# what belongs to PyNaCl alone. Both let go of the interpreter while they work.
_box: Final = bindings.crypto_secretbox
_open_box: Final = bindings.crypto_secretbox_open


class Opened(NamedTuple):
    """A frame, whole again.

    Attributes:
        sender: the party that says it sent it.
        key: the key, z85, that it was sealed with.
        lane: `CONTROL` or `BULK`.
        data: the frame.
    """

    sender: bytes
    key: bytes
    lane: int
    data: bytes


class _Keys:
    """Secrets shared with others, by their raw public keys."""

    def __init__(self, pair: KeyPair) -> None:
        self._secret: bytes = z85.decode(pair.secret)
        self._known: OrderedDict[bytes, tuple[bytes, bytes]] = OrderedDict()

    def shared(self, public: bytes) -> tuple[bytes, bytes]:
        """The shared secret, and the public key as z85.

        Raises:
            CryptoError: it is no public key.
        """
        found = self._known.get(public)
        if found is None:
            made = bindings.crypto_box_beforenm(public, self._secret)
            found = self._known[public] = (made, z85.encode(public))
            if len(self._known) > KEYS_MAX:
                self._known.popitem(last=False)
        return found


class Sealer:
    """Seals what one process of a party sends. Belongs to one thread.

    Args:
        me: our id.
        pair: our owner key.
    """

    def __init__(self, me: bytes, pair: KeyPair) -> None:
        self._me = me
        self._public: bytes = z85.decode(pair.public)
        self._keys = _Keys(pair)
        self._raw: dict[bytes, bytes] = {}
        self._stream = os.urandom(16)
        self._numbers: dict[bytes, int] = {}

    def seal(self, to: bytes, key: bytes, lane: int, frame: Sequence[Buffer]) -> list[bytes]:
        """Seal a frame, in as many envelopes as it needs. They must leave in this order.

        Args:
            to: whose mailbox it is for.
            key: that party's owner key, z85.
            lane: `CONTROL` or `BULK`.
            frame: its parts.

        Raises:
            ValueError: the key is none.
        """
        try:
            raw = self._raw.get(key)
            if raw is None:
                raw = self._raw[key] = z85.decode(key)
            shared, _ = self._keys.shared(raw)
        except (CryptoError, KeyError, ValueError, struct.error, TypeError) as error:
            raise ValueError(f"{key!r} is no key") from error
        whole = frame[0] if len(frame) == 1 and type(frame[0]) is bytes else b"".join(frame)
        if len(whole) <= PART_MAX_BYTES:
            return [self._seal(to, shared, lane, whole)]
        cuts = range(0, len(whole), PART_MAX_BYTES)
        found: list[bytes] = []
        for at in cuts:
            flags = lane | (_CONTINUED if at else 0) | (0 if at == cuts[-1] else _MORE)
            found.append(self._seal(to, shared, flags, bytes(whole[at : at + PART_MAX_BYTES])))
        return found

    def _seal(self, to: bytes, shared: bytes, flags: int, part: bytes) -> bytes:
        number = self._numbers[to] = self._numbers.get(to, 0) + 1
        header = _HEADER.pack(VERSION, flags, self._me, to, self._public, self._stream, number)
        return header + _box(part, blake2b(header, digest_size=24).digest(), shared)


class _Stream:
    """What is known of one process that writes to us.

    Attributes:
        last: the number that was taken last.
        parts: of a frame whose end has not come.
        size: bytes of these.
    """

    __slots__ = ("last", "parts", "size")

    def __init__(self) -> None:
        self.last = 0
        self.parts: list[bytes] = []
        self.size = 0


class Opener:
    """Opens what comes for one party. Belongs to one thread.

    Args:
        me: our id.
        pair: our owner key.

    Attributes:
        counts: what was dropped, by fault: foreign (for somebody else), forged (the box does not open), replayed, garbage
            (no envelope), oversize, broken (a frame of which a part is missing).
    """

    def __init__(self, me: bytes, pair: KeyPair) -> None:
        self.counts: dict[str, int] = dict.fromkeys(FAULTS, 0)
        self._me = me
        self._keys = _Keys(pair)
        self._streams: OrderedDict[tuple[bytes, bytes, bytes], _Stream] = OrderedDict()
        self._partial = 0
        self._told: set[tuple[str, bytes]] = set()

    def open(self, envelope: bytes, *, again: bool = False) -> Opened | None:
        """Open an envelope.

        Args:
            envelope: what the broker gave us.
            again: the broker says that it may have given it to us before: then an old number is no fault.

        Returns:
            The frame that it completes; None: it was dropped, or more parts are to come.
        """
        size = len(envelope)
        if size < OVERHEAD_BYTES or envelope[0] != VERSION:
            return self._drop("garbage", b"")
        header = envelope[:HEADER_BYTES]
        _, flags, sender, receiver, public, stream_id, number = _HEADER.unpack(header)
        if size > ENVELOPE_MAX_BYTES:
            return self._drop("oversize", sender)
        if receiver != self._me:
            return self._drop("foreign", sender)
        try:
            shared, key = self._keys.shared(public)
            part = _open_box(envelope[HEADER_BYTES:], blake2b(header, digest_size=24).digest(), shared)
        except CryptoError:
            return self._drop("forged", sender)
        if flags & ~(_LANE | _MORE | _CONTINUED):
            return self._drop("garbage", sender)
        name = (sender, public, stream_id)
        stream = self._streams.get(name)
        if stream is None:
            stream = self._new_stream(name)
        else:
            self._streams.move_to_end(name)
        if number <= stream.last:
            return None if again else self._drop("replayed", sender)
        follows = number == stream.last + 1
        stream.last = number
        continues = bool(flags & _CONTINUED)
        if stream.parts and not (follows and continues):
            self._forget_parts(stream)
            self._drop("broken", sender)
        if continues and not stream.parts:
            return self._drop("broken", sender)
        if flags & _MORE or continues:
            whole = self._add_part(stream, part, flags, sender)
            if whole is None:
                return None
            part = whole
        return Opened(sender, key, flags & _LANE, part)

    def _new_stream(self, name: tuple[bytes, bytes, bytes]) -> _Stream:
        stream = self._streams[name] = _Stream()
        if len(self._streams) > STREAMS_MAX:
            _, oldest = self._streams.popitem(last=False)
            self._forget_parts(oldest)
        return stream

    def _add_part(self, stream: _Stream, part: bytes, flags: int, sender: bytes) -> bytes | None:
        stream.parts.append(part)
        stream.size += len(part)
        self._partial += len(part)
        if stream.size > FRAME_MAX_BYTES or self._partial > PARTIAL_MAX_BYTES:
            self._forget_parts(stream)
            self._drop("oversize", sender)
            return None
        if flags & _MORE:
            return None
        whole = b"".join(stream.parts)
        self._forget_parts(stream)
        return whole

    def _forget_parts(self, stream: _Stream) -> None:
        self._partial -= stream.size
        stream.parts = []
        stream.size = 0

    def _drop(self, fault: str, sender: bytes) -> Opened | None:
        self.counts[fault] += 1
        if (fault, sender) not in self._told and len(self._told) < TOLD_MAX:
            self._told.add((fault, sender))
            log.warning("mail dropped: fault=%s sender=%s", fault, sender.hex() or "unknown")
        return None


assert BULK == _LANE, "the lane is one bit of the flags"
