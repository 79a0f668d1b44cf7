"""Plain values as msgpack, and the packets of a session. The only room that imports `msgpack`.

    message ── pack ──► body ─┐
    message ── pack ──► body ─┼─ pack_packet ──► frame ── carrier ──► frame ── unpack_packet ──► Packet(messages)
    message ── pack ──► body ─┘

Rules:
    - The first byte of a frame is the version; all that follows belongs to that version.
    - Sizes are bounded before anything is decoded. Extension types are refused, map keys are text or bytes.
    - A frame is written from bodies that are packed already: what a party must keep for a resend is packed once.
    - Whatever the bytes are, decoding ends in a value or in a `RemoteProtocolError`.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgpack import Packer, unpackb

from gcref.config import MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from gcref.errors import LocalProtocolError, RemoteProtocolError, VersionMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Kinds of packets.
DATA: Final = 0
HELLO: Final = 1
WELCOME: Final = 2
PING: Final = 3
PONG: Final = 4
BYE: Final = 5
PACKET_KINDS: Final = ("DATA", "HELLO", "WELCOME", "PING", "PONG", "BYE")

MAX_ITEMS: Final = 1 << 20
"""Elements of one array or map: far above the 10 000 arguments of a task, far below what would exhaust memory."""

MAX_FRAME_BYTES: Final = MAX_MESSAGE_BYTES + 4096
"""A frame: one message of the largest size, and room for the packet around it."""

HEADER_BYTES: Final = 44
"""What `pack_packet` writes before the first body."""

# Every number in its widest form, so that a header has one size and can be written again for the same bodies.
_U64: Final = 0xCF
_pack_header: Final = struct.Struct(">BBBBQBQBQBQBI").pack
_INT_MAX: Final = (1 << 64) - 1


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


# One packer for all threads: packing plain values runs no Python code, so nobody can come between.
_packer: Final = Packer(autoreset=True)
_unpack: Final = partial(
    unpackb, max_ext_len=0, ext_hook=_refuse_extension, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS
)


class Packet(NamedTuple):
    """One frame of a session, decoded.

    Attributes:
        kind: DATA, HELLO, WELCOME, PING, PONG or BYE.
        epoch: the sender's epoch: `messages[i]` is number `first_seq + i` of its stream in this epoch.
        first_seq: number of the first message; 0 in kinds other than DATA.
        ack_epoch: the receiver's epoch that `ack` speaks of; 0: nothing is acknowledged.
        ack: all numbers of the receiver's stream up to this one have been taken.
        messages: DATA: messages, not checked yet. Other kinds: what belongs to the kind.
    """

    kind: int
    epoch: int
    first_seq: int
    ack_epoch: int
    ack: int
    messages: list[Any]


def pack(value: object) -> bytes:
    """Write a plain value: None, bool, int, float, str, bytes-like, list or tuple, dict.

    Raises:
        LocalProtocolError: the value, or something in it, is not plain, or a number does not fit in 64 bits.
    """
    try:
        packed: bytes = _packer.pack(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"cannot be sent: {error}") from error
    return packed


def unpack(buffer: bytes | bytearray | memoryview, max_bytes: int = MAX_MESSAGE_BYTES) -> Any:
    """Read a plain value; arrays become lists.

    Args:
        buffer: exactly one value.
        max_bytes: the largest buffer that is looked at.

    Raises:
        RemoteProtocolError: it is too large, is no msgpack, holds extension types, or has bytes left over.
    """
    size = len(buffer)
    if size > max_bytes:
        raise RemoteProtocolError(f"a value of {size} bytes is over the limit of {max_bytes}")
    try:
        return _unpack(buffer)
    except Exception as error:
        # msgpack has a dozen ways to say no (ValueError, TypeError, its own, a unicode error, an overflow).
        raise RemoteProtocolError(f"not a valid value: {type(error).__name__}: {error}") from error


def pack_packet(
    kind: int, epoch: int, first_seq: int, ack_epoch: int, ack: int, bodies: Sequence[bytes]
) -> bytes:
    """Write a frame around messages that are packed already.

    Args:
        kind: one of the kinds of packets.
        epoch: the sender's epoch.
        first_seq: number of the first message.
        ack_epoch: the receiver's epoch that `ack` speaks of.
        ack: the last number taken.
        bodies: each from `pack`.
    """
    header = _header(kind, epoch, first_seq, ack_epoch, ack, len(bodies))
    if len(bodies) == 1:
        return header + bodies[0]
    return header + b"".join(bodies)


def _header(kind: int, epoch: int, first_seq: int, ack_epoch: int, ack: int, count: int) -> bytes:
    # 0x96: an array of six; 0xdd: an array whose length has four bytes.
    return _pack_header(
        PROTOCOL_VERSION, 0x96, kind, _U64, epoch, _U64, first_seq, _U64, ack_epoch, _U64, ack, 0xDD, count
    )


def renumber(frame: bytes, epoch: int, first_seq: int) -> bytes:
    """Write the header of a DATA frame again: its messages get other numbers, and it acknowledges nothing."""
    count = int.from_bytes(frame[HEADER_BYTES - 4 : HEADER_BYTES], "big")
    return _header(DATA, epoch, first_seq, 0, 0, count) + frame[HEADER_BYTES:]


def unpack_packet(frame: bytes | memoryview) -> Packet:
    """Read a frame.

    Raises:
        VersionMismatchError: its first byte is another version; `.local` and `.remote` name both.
        RemoteProtocolError: it is not a packet.
    """
    if not frame:
        raise RemoteProtocolError("an empty frame")
    if frame[0] != PROTOCOL_VERSION:
        raise mismatch(frame[0])
    fields = unpack(memoryview(frame)[1:], MAX_FRAME_BYTES)
    if type(fields) is not list or len(fields) < 6:
        raise RemoteProtocolError("a packet is an array of six")
    kind, epoch, first_seq, ack_epoch, ack, messages = fields if len(fields) == 6 else fields[:6]
    if not (
        type(kind) is int
        and 0 <= kind <= BYE
        and type(epoch) is int
        and epoch >= 0
        and type(first_seq) is int
        and 0 <= first_seq <= _INT_MAX - MAX_ITEMS
        and type(ack_epoch) is int
        and ack_epoch >= 0
        and type(ack) is int
        and ack >= 0
        and type(messages) is list
    ):
        raise RemoteProtocolError("a packet with a field of the wrong type")
    return Packet(kind, epoch, first_seq, ack_epoch, ack, messages)


def mismatch(remote: object) -> VersionMismatchError:
    """Make the error for a party that speaks another version of the protocol."""
    theirs = remote if isinstance(remote, int) else str(remote)
    return VersionMismatchError(
        f"this side speaks protocol version {PROTOCOL_VERSION}, the other side {theirs}; "
        "install the same version of gcref on both",
        local=PROTOCOL_VERSION,
        remote=theirs,
    )
