"""One link of the bulk thread: who is at its other end, how a message goes into it, what is heard of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import zmq

from gcref.config import PROTOCOL_VERSION
from gcref.errors import RemoteProtocolError
from gcref.wire import codec
from gcref.wire.messages import FETCH, check

if TYPE_CHECKING:
    from gcref.carriers.keys import KeyPair

Socket: TypeAlias = "zmq.Socket[bytes]"

MAIL_KEEP_S: Final = 60.0
"""How long mail of this lane is of use: whoever asked has asked again by then, or given up."""

HEADER_MAX_BYTES: Final = 256 * 1024
"""The first frame of a bulk message: a path of 64 Ki characters is the most that it holds."""


class BulkIdentity(NamedTuple):
    """Who this side is.

    Attributes:
        party: its id.
        kind: `client` or `endpoint`.
        keys: its owner's key pair.
    """

    party: bytes
    kind: str
    keys: KeyPair


class Requester(NamedTuple):
    """Who asks for bytes.

    Attributes:
        party: who it says it is.
        kind: `client` or `endpoint`.
        key: its owner key, z85: proven by CURVE over TCP, by its seal in a mailbox, only claimed over ipc (a process
            of the same user).
        role: `user` or `peer`. A peer has shown a read token, which the provider is to verify.
        carrier: `ipc`, `direct` or `broker`.
    """

    party: bytes
    kind: str
    key: bytes | None
    role: str
    carrier: str


class Up(NamedTuple):
    """HELLOs have been exchanged: the link may be used. One that was up before has been connected anew."""

    link: Link


class Down(NamedTuple):
    """The link is gone."""

    link: Link
    reason: str


class Unreached(NamedTuple):
    """A dialled address does not let us in, or is somebody else's."""

    link: Link
    reason: str
    refused: bool


class Message(NamedTuple):
    """FETCH or CHUNK, checked for its shape; `data` is empty when none came along."""

    link: Link
    fields: list[Any]
    data: memoryview


LinkEvent: TypeAlias = Up | Down | Unreached | Message


class Link:
    """One way to one party.

    Attributes:
        number: its number in the transfer brain.
        party: who is at the other end; for an accepted one as their HELLO says.
        kind: `client` or `endpoint`; empty until their HELLO.
        carrier: `ipc`, `direct` or `broker`.
        address: what we dialled, or where they came in.
        key: their owner key: proven over TCP and in mailboxes, claimed over ipc.
        wanted_key: the key that was given with `connect`.
        role: their role, when it was given with `connect`; None: the list decides.
        is_up: HELLOs have been exchanged.
        was_up: whoever is there has proven once that he is whom we want.
        retry_at: when it is dialled again after a handshake failed; None: no need to.
        retry_s: how long the last such wait was; 0: there was none since it was up.
        state: in a word, for people; `error` is the last trouble, `since` the unix time of the last change.
    """

    __slots__ = (
        "number", "party", "kind", "carrier", "address", "key", "wanted_key", "role", "is_up", "state", "error",
        "since", "socket", "monitor", "routing", "retry_at", "retry_s", "was_up",
    )  # fmt: skip

    def __init__(self, number: int, party: bytes, carrier: str, address: str, key: bytes | None) -> None:
        self.number = number
        self.party = party
        self.kind = ""
        self.carrier = carrier
        self.address = address
        self.key = key
        self.wanted_key = key
        self.role: str | None = None
        self.is_up = False
        self.state = "dialling"
        self.error = ""
        self.since = time.time()
        self.socket: Socket | None = None
        self.monitor: Socket | None = None
        self.routing: bytes | None = None
        self.retry_at: float | None = None
        self.retry_s = 0.0
        self.was_up = False

    @property
    def was_dialled(self) -> bool:
        """We wanted this link; else they came in, and the list of keys says what they may do."""
        return self.routing is None

    def send(self, header: bytes, data: Any = None, *, copy: bool = True) -> bool:
        """Send a message now, or not at all. Returns whether it went. Of an unconnected link nothing is queued.

        Args:
            header: the first frame.
            data: the second, if there is one.
            copy: False: ZeroMQ sends the bytes from where they are. The caller keeps them so while `data` lives.
        """
        socket = self.socket
        if socket is None:
            return False
        # Made first: a frame that cannot be made must not leave half a message behind.
        frame = None if data is None else _frame_of(data, copy)
        try:
            if self.routing is not None:
                socket.send(self.routing, zmq.NOBLOCK | zmq.SNDMORE)
            socket.send(header, zmq.NOBLOCK | (zmq.SNDMORE if frame is not None else 0))
            if frame is not None:
                socket.send(frame, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            # The first frame decides: once it is taken, the rest of the message is too.
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        return True

    def describe(self) -> dict[str, Any]:
        """For people: carrier, address, state, since when (unix seconds), last error."""
        facts = {"carrier": self.carrier, "address": self.address, "state": self.state, "since": self.since}
        return facts | ({"error": self.error} if self.error else {})

    def become(self, state: str, error: str = "") -> None:
        """Note a change, for `describe`."""
        self.state, self.error, self.since = state, error, time.time()


def _frame_of(data: Any, copy: bool) -> zmq.Frame:
    if not copy:
        try:
            return zmq.Frame(data, copy=False)
        except RuntimeError:
            pass  # the interpreter is ending, and with it what lets go of buffers later on
    return zmq.Frame(data, copy=True)


def write_header(fields: list[Any]) -> bytes:
    """The first frame of a bulk message."""
    return bytes((PROTOCOL_VERSION,)) + codec.pack(fields)


def read_header(header: memoryview) -> list[Any]:
    """The fields of a bulk message, checked for their shape.

    Raises:
        RemoteProtocolError: it is not one; `VersionMismatchError` if it is of another version.
    """
    if not header or len(header) > HEADER_MAX_BYTES:
        raise RemoteProtocolError(f"a header of {len(header)} bytes")
    if header[0] != PROTOCOL_VERSION:
        raise codec.mismatch(header[0])
    fields: list[Any] = codec.unpack(header[1:], HEADER_MAX_BYTES)
    if check(fields) < FETCH:
        raise RemoteProtocolError("a message that belongs into a session")
    return fields
