"""The doorkeeper of CURVE sockets: lets in whoever has a key on the list, and nobody else.

    stranger ──CURVE handshake──► libzmq ──request──► Zap.answer ──► 200, User-Id = key   or   400

One `Zap` guards all CURVE servers of one `zmq.Context`, for the protocol (ZAP) has one address for each context. Any
thread that polls its `socket` may own it: the control carrier and the bulk thread have a context, and a `Zap`, each.

The key that passed is the `User-Id` of every frame of that connection. Rights are looked up by it frame by frame, in
the list of that moment, so that a key taken off the list has no rights any more on connections that are open.

Source: ZeroMQ RFC 27/ZAP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils import z85

if TYPE_CHECKING:
    from collections.abc import Mapping

_ADDRESS: Final = "inproc://zeromq.zap.01"
_KEY_BYTES: Final = 32


class Zap:
    """Answers the handshakes of one context.

    Make it before the first CURVE socket binds. It must be polled: handshakes wait for `answer`.

    Args:
        context: whose sockets it guards.
        allowed: role by owner key (z85). Assign another mapping to `allowed` at any time, from any thread.

    Attributes:
        socket: to be polled for input.
        allowed: the current list.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: Mapping[bytes, str]) -> None:
        self.allowed = allowed
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ADDRESS)

    def answer(self) -> list[bytes]:
        """Answer all handshakes that wait. Never blocks.

        Returns:
            The keys (z85) that were refused.
        """
        refused: list[bytes] = []
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return refused
            key = _key_of(frames)
            request = frames[1] if len(frames) > 1 else b""
            if key is not None and key in self.allowed:
                self.socket.send_multipart((b"1.0", request, b"200", b"OK", key, b""))
            else:
                refused.append(key or b"")
                self.socket.send_multipart(
                    (b"1.0", request, b"400", b"this key is not allowed here", b"", b"")
                )

    def close(self) -> None:
        """Stop guarding: handshakes fail from now on."""
        self.socket.close()


def _key_of(frames: list[bytes]) -> bytes | None:
    """The z85 key of a request: version, request, domain, address, identity, mechanism, key."""
    if len(frames) != 7 or frames[5] != b"CURVE" or len(frames[6]) != _KEY_BYTES:
        return None
    key: bytes = z85.encode(frames[6])
    return key
