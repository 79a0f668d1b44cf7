"""Journalled frames, read again: what was delivered to a process that has ended."""

from __future__ import annotations

from typing import Any, NamedTuple

from gcref.errors import RemoteProtocolError
from gcref.wire.codec import unpack_packet
from gcref.wire.messages import check


class Replayed(NamedTuple):
    """What a journalled frame held.

    Attributes:
        epoch: of the sender's stream.
        last_seq: number of its last message.
        messages: as they were delivered.
    """

    epoch: int
    last_seq: int
    messages: list[Any]


def replay(raw_frame: bytes) -> Replayed:
    """Read a frame of `Deliver.raw_frame` again: the same messages, and what `Peers.restore` is to be told.

    Raises:
        RemoteProtocolError: it is no such frame.
    """
    packet = unpack_packet(raw_frame)
    last_seq = packet.first_seq + len(packet.messages) - 1
    return Replayed(packet.epoch, last_seq, only_good(packet.messages))


def only_good(messages: list[Any]) -> list[Any]:
    """Leave out what is no message: it harms only itself."""
    good = []
    for message in messages:
        try:
            check(message)
        except RemoteProtocolError:
            continue
        good.append(message)
    return good
