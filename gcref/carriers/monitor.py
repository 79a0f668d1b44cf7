"""What ZeroMQ tells about the connections of one socket: made, lost, refused.

Source: the manual page zmq_socket_monitor.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import zmq

FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
"""All the ways in which a handshake fails."""

parse_event: Final = struct.Struct("=Hi").unpack
"""The first part of an event, as (event, value); the second part is the address."""


class Monitor:
    """The events of one socket: a PAIR that ZeroMQ writes to.

    Args:
        context: the socket's context.
        watched: the socket; watch it before it binds or connects.
        number: a number that no other monitor of this context has.
        events: which events are told, `zmq.EVENT_…` or-ed together.

    Attributes:
        fd: readable when there are events; edge-triggered, so `read` all.
    """

    __slots__ = ("_pair", "_watched", "fd")

    def __init__(self, context: Any, watched: Any, number: int, events: int) -> None:
        self._watched = watched
        address = f"inproc://gcref-monitor-{number}"
        watched.monitor(address, events)
        self._pair = context.socket(zmq.PAIR)
        self._pair.set(zmq.LINGER, 0)
        self._pair.connect(address)
        self.fd: int = self._pair.get(zmq.FD)
        # A pipe signals only to a reader that has found it empty once.
        self._pair.get(zmq.EVENTS)

    def read(self) -> list[tuple[int, int]]:
        """Give all events that are there, as (event, value)."""
        found: list[tuple[int, int]] = []
        receive = self._pair.recv
        try:
            while True:
                found.append(parse_event(receive(zmq.NOBLOCK)))
                receive(zmq.NOBLOCK)
        except zmq.ZMQError:
            return found

    def close(self) -> None:
        """Stop; before the watched socket closes. Idempotent as ZeroMQ's own close is."""
        # In this order: ZeroMQ writes to the pair with a call that waits, so it must stop before the pair closes.
        self._watched.monitor(None, 0)
        self._pair.close(0)
