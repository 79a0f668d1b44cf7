"""Whether anybody speaks ZeroMQ's protocol at an address.

A party with another key than the one expected hangs up in the handshake; so does a tunnel or a balancer that takes
connections for a party that is away, and the two look alike to whoever dials. But only a party greets.

Source: RFC 37 (ZMTP 3.1): a greeting begins with the byte 0xff, and is sent before anything is read.
"""

from __future__ import annotations

import socket
from typing import Final

_GREETING: Final = b"\xff"


class Probe:
    """One connection that is being made, and never says anything.

    Args:
        address: `tcp://host:port`. A host with a name is not looked up, since that may take long: it is believed to speak.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        host = host.strip("[]")
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._is_name = False
        try:
            socket.inet_pton(self._socket.family, host)
        except OSError:
            self._is_name = True  # a socket that is not connected can be read at once
        else:
            self._socket.connect_ex((host, int(port)))

    def fileno(self) -> int:
        """To wait for: it can be read once there is an answer, or a failure."""
        return self._socket.fileno()

    def speaks(self) -> bool:
        """Whether somebody greets; once it can be read."""
        try:
            return self._is_name or self._socket.recv(1) == _GREETING
        except OSError:
            return False

    def close(self) -> None:
        """End it. Idempotent."""
        self._socket.close()
