"""The seam of the carriers of control messages.

A carrier moves frames between this process and others and knows nothing of what they mean. One thread, the
control loop, owns it:

    events = carrier.poll(timeout_s, fds)
    for event in events:  FdReady → the owner of the descriptor;  every other one → Peers.handle, as it is
    ...
    Dial → carrier.dial    Transmit → carrier.send    Hangup → carrier.hangup
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from gcref.brains.peers_events import Link, LinkDown, LinkUp, PacketIn, Refused


class FdReady(NamedTuple):
    """One of the descriptors that `poll` was handed can be read.

    Attributes:
        fd: the very thing that was handed in.
    """

    fd: Any


CarrierEvent: TypeAlias = PacketIn | LinkUp | LinkDown | Refused | FdReady


class Carrier(Protocol):
    """Moves frames, keeps links, and waits for everything that the control loop waits for.

    Links that we dial are named by the caller, with a number that is never used again. Links that others dial
    are named by the carrier, and first seen in a `PacketIn`.

    Promises, each one a test in `tests/contract`:
        - The frames of one link arrive in the order sent, whole, or not at all; each at most once.
        - A dialled link that has a connection says `LinkUp`; that lost it, or failed to get one, `LinkDown`; then it
          goes on trying by itself. Between the two frames may be lost, never reordered.
        - An authenticated connection's `PacketIn.key` is the key of this very connection.
        - A stranger (garbage, oversize, wrong key) is disconnected or ignored: nothing is raised.

    Threads: all methods belong to one thread, except `wake` and `set_allowed`, which any thread may call.
    Errors: what the methods raise is said with them; no exception of an underlying library gets out.
    """

    def dial(self, link: int, address: str, server_key: bytes | None) -> None:
        """Begin to connect, and go on until `hangup`. Returns at once; a link that exists is left alone.

        Args:
            link: names the new link.
            address: `ipc://path` or `tcp://host:port`.
            server_key: the public key that the other side must have, z85; None only where sockets need no key.

        Raises:
            ConfigError: the address is none, or a TCP address comes without a key.
        """
        ...

    def listen(self, address: str) -> str:
        """Accept connections.

        Args:
            address: `ipc://path` (the folder exists and is ours), `tcp://host:port`, or `tcp://host:*` for any free
                port.

        Returns:
            The address with what was chosen filled in.

        Raises:
            ConfigError: it cannot be had; `.remedy` says what to do.
        """
        ...

    def send(self, link: Link, frame: bytes) -> bool:
        """Send without waiting; the frame must not be changed afterwards.

        Returns:
            False: it was dropped, because there is no such link, it has no connection, or it is full.
        """
        ...

    def hangup(self, link: Link) -> None:
        """Close a link; frames sent just before still go out, if that takes no time. Unknown links are fine."""
        ...

    def poll(self, timeout_s: float | None, fds: Sequence[Any] = ()) -> list[CarrierEvent]:
        """Wait until something happens, and take all that is ready, within a bound.

        Args:
            timeout_s: how long to wait at most; None: for ever; 0: not at all.
            fds: descriptors (or objects with `fileno`, or sockets of the carrier's own library) to wait for as well.
                Usually the same ones each time. Leave out what you are about to close: its number may come again.

        Returns:
            What happened. Empty after the timeout or a `wake`.
        """
        ...

    def wake(self) -> None:
        """Make the present or the next `poll` return soon. Cheap; from any thread."""
        ...

    def set_allowed(self, keys: Mapping[bytes, str]) -> None:
        """Replace the list of keys that may connect: z85 key → role. The mapping is asked anew for each handshake."""
        ...

    def close(self) -> None:
        """Hang up everything and let go of all sockets, files and descriptors. Idempotent."""
        ...
