"""The sockets of the bulk thread: who is connected, who they say they are, and whether they may say it.

    we dial:    DEALER ──CURVE──► their ROUTER      HELLO ──►   ◄── HELLO     then both may ask and answer
    they dial:  DEALER ──CURVE──► our ROUTER        ◄── HELLO   HELLO ──►     the same

A link is a connection whose HELLOs have been exchanged. It serves both directions whoever dialled it, so that an upload
can be fetched from a party that nobody can reach, and two sites need only one of them to be reachable.

Rules:
    - Over TCP the key in a HELLO is the key of the CURVE handshake, or the HELLO is dropped. Whom we dial must say that
      he is whom we wanted. Over ipc there is no proof beyond the folder, which only this user can enter.
    - Those whom nobody can dial are reached through mailboxes (`bulk.mail`): links like others, without a connection.
    - A dialled socket queues nothing while it is not connected (IMMEDIATE), and reconnects by itself.
    - A process that is stopped, or a network that swallows everything, says no good-bye: where nothing comes for
      `MISSED_HEARTBEATS` periods, not even the answer to a PING of ZeroMQ's own, the connection is ended. Its I/O
      threads do that, so a process that computes is not taken for a stopped one.
    - Ends of connections come from the sockets' monitors. ZeroMQ numbers what a ROUTER accepted by descriptor there,
      and descriptors are used again: so the monitor is always read to its end before a HELLO is taken.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import zmq

from gcref import ids
from gcref.brains.link import MISSED_HEARTBEATS
from gcref.carriers.bulk.link import (
    HEADER_MAX_BYTES,
    BulkIdentity,
    Down,
    Link,
    LinkEvent,
    Message,
    Requester,
    Socket,
    Unreached,
    Up,
    read_header,
    write_header,
)
from gcref.carriers.bulk.mail import CARRIER as BROKER
from gcref.carriers.bulk.mail import MailLinks
from gcref.carriers.monitor import parse_event
from gcref.carriers.zap import Zap
from gcref.config import HEARTBEAT_S, MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from gcref.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from gcref.wire.messages import BULK_HELLO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gcref.brains.peers_events import Candidate
    from gcref.carriers.mail.post import Mailbox


log = logging.getLogger(__name__)

HIGH_WATER: Final = 1024
"""Messages that wait in one link. They are references to mapped bytes, not copies. An asker's window is 64."""

REFUSED_RETRY_S: Final = 15.0
"""How long after a refused handshake the same address is tried again: keys are allowed by people."""

BROKEN_RETRY_S: Final = 0.5
"""How long after a handshake that was broken off the address is tried again; doubles, up to `REFUSED_RETRY_S` for an
address where we have never got in, else up to `BROKEN_RETRY_MAX_S`."""

BROKEN_RETRY_MAX_S: Final = 4.0

_RECONNECT_MS: Final = 50
_RECONNECT_MAX_MS: Final = 5000
_HANDSHAKE_MS: Final = 10_000
"""How long the other side may take to shake hands, milliseconds: a stopped process takes connections, and is silent."""

_DRAIN: Final = 32
_DRAIN_BYTES: Final = 4 * 1024 * 1024
"""What is taken from one socket before others, and commands, get their turn: messages, or bytes."""

_WATCHED: Final = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.DISCONNECTED
    | zmq.Event.CONNECT_RETRIED
)


class Listener(NamedTuple):
    """A ROUTER that waits for others, and those who came."""

    socket: Socket
    monitor: Socket
    carrier: str
    address: str
    links: dict[bytes, Link]
    by_descriptor: dict[int, Link]


class Links:
    """All links of one party. One thread owns it.

    Args:
        me: who this side is.
        allowed: role by owner key (z85), of those who may come in over TCP.
        report: is told what happens, at once: messages are large, and the next one may use the memory of the last.
            It must not raise.
        heartbeat_s: silence after which a connection is asked for a sign of life, seconds.
        mailbox: our mailbox, for those who are reached through theirs.

    Attributes:
        mail: the links through mailboxes.
    """

    def __init__(
        self,
        me: BulkIdentity,
        allowed: Mapping[bytes, str],
        report: Callable[[LinkEvent], None],
        *,
        heartbeat_s: float = HEARTBEAT_S,
        mailbox: Mailbox | None = None,
    ) -> None:
        self._me = me
        self._heartbeat_ms = math.ceil(heartbeat_s * 1000)
        self._context: zmq.Context[Socket] = zmq.Context(io_threads=1)
        self._zap = Zap(self._context, allowed)
        self._poller = zmq.Poller()
        self._readers: dict[Any, Callable[[], None]] = {}
        self._report = report
        self.mail = MailLinks(me, mailbox, lambda: self._zap.allowed, self._number, report)
        self._listeners: list[Listener] = []
        self._dialled: dict[tuple[bytes, str], Link] = {}
        self._next_number = 0
        hello = [BULK_HELLO, PROTOCOL_VERSION, me.party, me.kind, me.keys.public]
        self._hello = write_header(hello)
        self._watch(self._zap.socket, self._read_zap)

    # ---------------------------------------------------------------------------------------------- the loop

    def watch_descriptor(self, descriptor: int, reader: Callable[[], None]) -> None:
        """Call `reader` from `poll` whenever this descriptor has input."""
        self._poller.register(descriptor, zmq.POLLIN)
        self._readers[descriptor] = reader

    def poll(self, timeout_s: float | None) -> None:
        """Wait for input, and report what has come: a bounded piece from each socket.

        Args:
            timeout_s: how long at most; None: until something comes.
        """
        patience_s = self._retry(time.monotonic())
        if timeout_s is not None:
            patience_s = min(patience_s, timeout_s)
        timeout_ms = None if patience_s == math.inf else math.ceil(max(0.0, patience_s) * 1000)
        for source, _ in self._poller.poll(timeout_ms):
            reader = self._readers.get(source)
            if reader is not None:  # else an earlier one has closed it
                try:
                    reader()
                except Exception:
                    log.exception("bulk: a socket could not be read")

    def close(self) -> None:
        """Close every socket. What has not been sent is dropped."""
        self._readers.clear()
        self._dialled.clear()
        self._listeners.clear()
        self._context.destroy(linger=0)

    def _retry(self, now: float) -> float:
        """Dial again who refused us a while ago. Returns how long it is, in seconds, until the next is due."""
        patience_s = self.mail.probe(now)
        for link in list(self._dialled.values()):
            if link.retry_at is not None:
                if link.retry_at <= now:
                    self._dial(link)
                else:
                    patience_s = min(patience_s, link.retry_at - now)
        return patience_s

    # ------------------------------------------------------------------------------------------ coming to be

    def listen(self, address: str) -> str:
        """Let others come in.

        Args:
            address: `tcp://interface:port` (`*` for any), or `ipc://path` in a folder that is closed to others.

        Returns:
            The address with its port.

        Raises:
            ConfigError: the address is taken, or not possible, or the folder is open to others.
        """
        carrier = _carrier_of(address)
        socket = self._make_socket(zmq.ROUTER)
        monitor = socket.get_monitor_socket(_WATCHED)
        try:
            socket.router_mandatory = True
            if carrier == "ipc":
                _check_folder(address)
            else:
                socket.curve_server = True
                socket.curve_secretkey = self._me.keys.secret
            socket.bind(address)
        except (zmq.ZMQError, ConfigError) as error:
            _close(socket, monitor)
            if isinstance(error, ConfigError):
                raise
            why = os.strerror(error.errno) if error.errno is not None else str(error)
            raise ConfigError(
                f"cannot listen for bulk at {address}: {why}; choose another address",
                key=address,
                remedy="choose another address, or stop what uses this one",
            ) from error
        bound = cast("bytes", socket.last_endpoint).decode()
        listener = Listener(socket, monitor, carrier, bound, {}, {})
        self._listeners.append(listener)
        self._watch(monitor, lambda: self._read_listener_monitor(listener))
        self._watch(socket, lambda: self._read_listener(listener))
        return listener.address

    def connect(
        self, party: bytes, address: str, server_key: bytes | None, carrier: str, role: str | None
    ) -> None:
        """Dial. An address that is dialled already is left alone, unless it was refused or its key is another now."""
        if carrier == BROKER:
            self.mail.connect(party, address, server_key, role)
            return
        if _carrier_of(address) != "ipc" and server_key is None:
            raise LocalProtocolError(f"{address} cannot be dialled without its key: TCP is always CURVE")
        old = self._dialled.get((party, address))
        if old is not None:
            if old.wanted_key == server_key and old.retry_at is None and old.socket is not None:
                return
            self._hang_up(old, "dialled anew")
        link = Link(self._number(), party, carrier, address, server_key)
        link.role = role
        self._dialled[party, address] = link
        self._dial(link)

    def reach(self, party: bytes, ways: Sequence[Candidate], role: str | None) -> None:
        """Dial a party at these addresses, and at no others any more."""
        valid = {address for _, address, _ in ways}
        for link in [link for link in self._dialled.values() if link.party == party]:
            if link.address not in valid:
                del self._dialled[party, link.address]
                self._hang_up(link, "its address is no longer valid")
        mailbox = next((address for carrier, address, _ in ways if carrier == BROKER), None)
        self.mail.forget(party, mailbox, "its address is no longer valid")
        for carrier, address, server_key in ways:
            self.connect(party, address, server_key, carrier, role)

    def disconnect(self, party: bytes, reason: str = "disconnected") -> None:
        """Forget a party: end what we dialled, and do not use what it dialled."""
        for link in [link for link in self._dialled.values() if link.party == party]:
            del self._dialled[link.party, link.address]
            self._hang_up(link, reason)
        for link in [link for listener in self._listeners for link in listener.links.values()]:
            if link.party == party:
                self._set_down(link, reason)
        self.mail.disconnect(party, reason)

    def set_allowed(self, allowed: Mapping[bytes, str]) -> None:
        """Replace the list. Links of those who are not on it any more go down."""
        self._zap.allowed = allowed
        self.mail.judge_guests()
        for listener in self._listeners:
            if listener.carrier != "ipc":
                for link in list(listener.links.values()):
                    if link.key not in allowed:
                        self._set_down(link, "its key is not allowed any more")

    def describe(self, party: bytes) -> list[dict[str, Any]]:
        """All ways to a party, and how they do. Any thread may call it."""
        links = list(self._dialled.values()) + self.mail.links()
        for listener in list(self._listeners):
            links += list(listener.links.values())
        return [link.describe() for link in links if link.party == party]

    def requester(self, link: Link) -> Requester | None:
        """Who is at the other end and what he may do at this moment; None: nothing."""
        if link.carrier == "ipc":
            role = link.role or "user"
        elif link.was_dialled:
            # We dialled, so the key is the one that we wanted.
            role = link.role or self._zap.allowed.get(link.key or b"", "peer")
        else:
            found = self._zap.allowed.get(link.key or b"")
            if found is None:
                return None
            role = found
        return Requester(link.party, link.kind, link.key, role, link.carrier)

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number

    def _make_socket(self, kind: int) -> Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = HIGH_WATER
        socket.maxmsgsize = MAX_MESSAGE_BYTES + HEADER_MAX_BYTES
        socket.tcp_keepalive = 1
        socket.tcp_keepalive_idle = 60
        socket.heartbeat_ivl = self._heartbeat_ms
        socket.heartbeat_timeout = (MISSED_HEARTBEATS - 1) * self._heartbeat_ms
        socket.handshake_ivl = max(_HANDSHAKE_MS, MISSED_HEARTBEATS * self._heartbeat_ms)
        return socket

    def _dial(self, link: Link) -> None:
        link.retry_at = None
        link.become("dialling", link.error)
        socket = self._make_socket(zmq.DEALER)
        socket.immediate = True
        socket.reconnect_ivl = _RECONNECT_MS
        socket.reconnect_ivl_max = _RECONNECT_MAX_MS
        if _carrier_of(link.address) != "ipc":
            socket.curve_serverkey = link.key
            socket.curve_publickey, socket.curve_secretkey = self._me.keys.public, self._me.keys.secret
        monitor = socket.get_monitor_socket(_WATCHED)
        link.socket, link.monitor = socket, monitor
        self._watch(monitor, lambda: self._read_dialled_monitor(link, monitor))
        self._watch(socket, lambda: self._read_dialled(link, socket))
        try:
            socket.connect(link.address)
        except zmq.ZMQError as error:
            self._close_socket(link)
            self._report(Unreached(link, f"cannot dial {link.address}: {error}", refused=False))
            link.become("failed", str(error))

    def _watch(self, socket: Socket, reader: Callable[[], None]) -> None:
        self._poller.register(socket, zmq.POLLIN)
        self._readers[socket] = reader

    def _close_socket(self, link: Link) -> None:
        socket, monitor = link.socket, link.monitor
        link.socket = link.monitor = None
        if socket is not None and monitor is not None:
            for one in (socket, monitor):
                self._poller.unregister(one)
                del self._readers[one]
            _close(socket, monitor)

    def _hang_up(self, link: Link, reason: str) -> None:
        self._close_socket(link)
        self._set_down(link, reason)

    def _set_down(self, link: Link, reason: str) -> None:
        link.become("down", reason)
        if link.is_up:
            link.is_up = False
            self._report(Down(link, reason))
            log.info(
                "bulk link down: %s %s %s (%s)", ids.text(link.party), link.carrier, link.address, reason
            )

    def _set_up(self, link: Link) -> None:
        link.is_up = link.was_up = True
        link.retry_s = 0.0
        link.become("up")
        self._report(Up(link))
        log.info("bulk link up: %s %s %s", ids.text(link.party), link.carrier, link.address)

    # ---------------------------------------------------------------------------------------------- monitors

    def _read_zap(self) -> None:
        for key in self._zap.answer():
            log.warning("bulk: a party with key %s was refused", key.decode("ascii", "replace"))

    def _read_dialled_monitor(self, link: Link, monitor: Socket) -> None:
        for event, value in _monitor_events(monitor):
            if link.monitor is not monitor:
                return
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                link.become("greeting")
                link.send(self._hello)
            elif event == zmq.Event.DISCONNECTED:
                self._set_down(link, "the connection broke")
                link.become("dialling", link.error)
            elif event == zmq.Event.CONNECT_RETRIED:
                if not link.error:
                    link.become("dialling", f"nobody answers at {link.address}")
                    self._report(Unreached(link, link.error, refused=False))
            else:
                self._refused(link, event == zmq.Event.HANDSHAKE_FAILED_AUTH, value)

    def _refused(self, link: Link, by_key: bool, value: int) -> None:
        # Closed, not left to reconnect: ZeroMQ would shake hands ten times a second, for ever.
        self._hang_up(link, "refused")
        patience_s = REFUSED_RETRY_S
        if by_key:
            reason = f"our key was refused at {link.address}"
        else:
            # Or somebody on the way takes connections for one who is away, and may be back soon.
            patience_s = min(
                max(2 * link.retry_s, BROKEN_RETRY_S), BROKEN_RETRY_MAX_S if link.was_up else patience_s
            )
            reason = (
                f"the handshake with {link.address} failed (code {value}): another key, or no gcref there"
            )
        link.become("refused", reason)
        link.retry_s = patience_s
        link.retry_at = time.monotonic() + patience_s
        self._report(Unreached(link, reason, refused=by_key or not link.was_up))
        log.warning("bulk: %s", reason)

    def _read_listener_monitor(self, listener: Listener) -> None:
        for event, value in _monitor_events(listener.monitor):
            if event == zmq.Event.DISCONNECTED:
                link = listener.by_descriptor.pop(value, None)
                if link is not None:
                    assert link.routing is not None
                    del listener.links[link.routing]
                    self._set_down(link, "the connection broke")

    # ---------------------------------------------------------------------------------------------- messages

    def _read_dialled(self, link: Link, socket: Socket) -> None:
        for frames in _drain(socket):
            fields = self._read_header(link.address, frames[0])
            if fields is None:
                continue
            if fields[0] == BULK_HELLO:
                self._take_hello_back(link, fields)
            elif link.is_up:
                self._report(Message(link, fields, _data_of(frames, 1)))
            if link.socket is not socket:
                return

    def _take_hello_back(self, link: Link, fields: list[Any]) -> None:
        _, protocol, party, kind, key = fields[:5]
        reason = None
        if protocol != PROTOCOL_VERSION:
            reason = f"{link.address} speaks protocol version {protocol}, this side {PROTOCOL_VERSION}"
        elif party != link.party:
            reason = f"at {link.address} is party {ids.text(party)}, not {ids.text(link.party)}"
        elif link.wanted_key is not None and key != link.wanted_key:
            reason = f"{link.address} names another key than it has proven"
        if reason is None:
            link.kind = kind
            link.key = key
            self._set_up(link)
            return
        self._hang_up(link, reason)
        link.become("refused", reason)
        link.retry_at = time.monotonic() + REFUSED_RETRY_S
        self._report(Unreached(link, reason, refused=True))
        log.warning("bulk: %s", reason)

    def _read_listener(self, listener: Listener) -> None:
        for frames in _drain(listener.socket):
            if len(frames) < 2:
                continue
            fields = self._read_header(listener.address, frames[1])
            if fields is None:
                continue
            if fields[0] == BULK_HELLO:
                self._take_hello(listener, frames, fields)
                continue
            link = listener.links.get(frames[0].bytes)
            # Else it has not said who it is; or it took the routing id of somebody who has just left.
            if link is not None and (listener.carrier == "ipc" or _proof(frames[1]) == link.key):
                self._report(Message(link, fields, _data_of(frames, 2)))

    def _take_hello(self, listener: Listener, frames: list[zmq.Frame], fields: list[Any]) -> None:
        routing, proof = frames[0].bytes, _proof(frames[1])
        _, protocol, party, kind, key = fields[:5]
        if listener.carrier != "ipc" and (proof is None or proof != key or proof not in self._zap.allowed):
            log.warning("bulk: a greeting at %s names another key than it has proven", listener.address)
            return
        self._read_listener_monitor(listener)
        link = listener.links.get(routing)
        if link is None or link.party != party:
            if link is not None:
                self._set_down(link, "it calls itself something else now")
            link = Link(self._number(), party, listener.carrier, listener.address, key)
            link.routing = routing
            link.socket = listener.socket
            listener.links[routing] = link
            descriptor = _descriptor(frames[1])
            if descriptor is not None:
                listener.by_descriptor[descriptor] = link
        link.kind = kind
        # Answered whatever the version, so that the other side learns ours.
        if link.send(self._hello) and protocol == PROTOCOL_VERSION:
            self._set_up(link)

    def _read_header(self, address: str, frame: zmq.Frame) -> list[Any] | None:
        try:
            return read_header(frame.buffer)
        except RemoteProtocolError as error:
            log.warning("bulk: dropped a message that came over %s: %s", address, error)
            return None


# ------------------------------------------------------------------------------------------------------ helpers


def _carrier_of(address: str) -> str:
    return "ipc" if address.startswith("ipc://") else "direct"


def _check_folder(address: str) -> None:
    folder = os.path.dirname(address.removeprefix("ipc://"))
    try:
        found = os.lstat(folder)
        is_ours = found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o077 == 0
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {address}: {error}", key=address, remedy="make the folder first"
        ) from error
    if not is_ours:
        raise ConfigError(
            f"cannot listen at {address}: its folder is open to others; use one with mode 0700",
            key=address,
            remedy="use a folder with mode 0700",
        )


def _close(socket: Socket, monitor: Socket) -> None:
    socket.disable_monitor()
    monitor.close()
    socket.close()


def _drain(socket: Socket) -> Iterator[list[zmq.Frame]]:
    """The messages that wait, within bounds. Each is let go of before the next is taken."""
    taken = 0
    for _ in range(_DRAIN):
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        taken += len(frames[-1])
        yield frames
        del frames
        if taken >= _DRAIN_BYTES:
            return


def _data_of(frames: list[zmq.Frame], at: int) -> memoryview:
    return frames[at].buffer if len(frames) > at else memoryview(b"")


def _monitor_events(monitor: Socket) -> list[tuple[int, int]]:
    events: list[tuple[int, int]] = []
    try:
        while True:
            event = parse_event(monitor.recv(zmq.NOBLOCK))
            monitor.recv(zmq.NOBLOCK)  # the address
            if event[0] != zmq.EVENT_MONITOR_STOPPED:
                events.append(event)
    except zmq.Again:
        return events


def _proof(frame: zmq.Frame) -> bytes | None:
    """The key that the sender of a frame has proven, as the doorkeeper wrote it down; None: it has proven nothing."""
    try:
        key = frame.get("User-Id")
    except zmq.ZMQError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    return key.encode() if isinstance(key, str) else None


def _descriptor(frame: zmq.Frame) -> int | None:
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None  # then a broken link is noticed when something is sent over it
