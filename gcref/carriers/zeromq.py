"""Control messages over ZeroMQ: `ipc` on one machine, `direct` (TCP with CURVE) between machines.

    listen ─► ROUTER (one for each address)          dial ─► DEALER + monitor (one for each link)
              link = (listener, routing id)                  link = the number from `Dial`
                        └────────────── one epoll over all descriptors ──────────────┘
                                        + eventfd (wake) + ZAP + the caller's descriptors

Rules:
    - CURVE on every TCP socket; ipc sockets lie in folders that only our user can enter. The key of an incoming
      connection is the ZAP User-Id of each single message, so that no reuse of a routing id can borrow a key.
    - Sends never wait. There is no high-water mark: sessions have a byte credit. ROUTER_MANDATORY tells when a peer
      is gone; ROUTER_HANDOVER stays off, so nobody takes over another's routing id.
    - Nothing is given to a DEALER while it has no connection. What it had not sent when it lost one goes out on the
      next, before the HELLO: the other side drops it. (IMMEDIATE would drop it here, but with it what has arrived and
      is not read yet: the last words of a party that ends.)
    - Monitors are for dialled links (connected, lost, refused) and for handshakes that fail at a listener.

ZeroMQ's descriptors are edge-triggered: any call on a socket may swallow the signal of a message that has arrived.
So each socket that was used since it was last found empty is asked (`EVENTS`) before the loop sleeps. A receive that
finds nothing costs an exception (6 µs), `EVENTS` 2 µs: hence the order of calls in `_drain`.

Source: the manual pages zmq_getsockopt (ZMQ_FD), zmq_setsockopt, zmq_socket_monitor; RFC 27 (ZAP).
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import zmq

from gcref.brains.peers_events import Link, LinkDown, LinkUp, PacketIn, Refused
from gcref.carriers.base import CarrierEvent, FdReady
from gcref.carriers.keys import KeyPair
from gcref.carriers.listening import bind_failed, cannot_listen
from gcref.carriers.monitor import FAILED, Monitor
from gcref.carriers.probe import Probe
from gcref.carriers.zap import Zap
from gcref.config import SOCKET_PATH_MAX_BYTES
from gcref.wire.codec import MAX_FRAME_BYTES

RECONNECT_MS: Final = 100
"""A lost connection is tried again after this; doubles up to `RECONNECT_MAX_MS`, milliseconds."""

RECONNECT_MAX_MS: Final = 5000

CONNECT_MS: Final = 5000
"""How long one attempt to connect may take (an address that swallows packets), milliseconds."""

HANDSHAKE_MS: Final = 10_000
"""How long the other side may take to shake hands, milliseconds."""

LINGER_MS: Final = 200
"""How long a closed socket goes on sending what it was given, milliseconds."""

DRAIN_PACKETS: Final = 256
"""Packets that one `poll` takes from one socket, so that no peer keeps the loop from the others."""

DRAIN_BYTES: Final = 16 * 1024 * 1024

ZERO_COPY_BYTES: Final = 64 * 1024
"""Above it, sharing a frame with ZeroMQ costs less than copying it."""

CURVE_FAILURES: Final = 3
"""Handshakes that the other side broke off, until it is taken for the wrong one. One may be a process that ended."""

_NOBLOCK: Final = zmq.NOBLOCK
_NOBLOCK_MORE: Final = zmq.NOBLOCK | zmq.SNDMORE
_EVENTS: Final = zmq.EVENTS
_POLLIN: Final = int(zmq.POLLIN)

_DIALLED_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | FAILED
)
# Auth failures at a listener are told by the ZAP handler, which knows the key; here is what never gets so far.
_LISTENER_EVENTS: Final = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL

# A zmq.Socket; its own types would need a cast at each `get`, on the hottest path of all.
Socket: TypeAlias = Any
Handler: TypeAlias = Callable[[list[CarrierEvent], float], None]


class _Listener:
    """A ROUTER that accepts links."""

    __slots__ = ("address", "carrier", "curve", "fd", "monitor", "number", "socket", "touched")

    def __init__(self, number: int, socket: Socket, carrier: str) -> None:
        self.number = number
        self.socket = socket
        self.fd: int = socket.get(zmq.FD)
        self.carrier = carrier
        self.curve = carrier == "direct"
        self.monitor: Monitor | None = None
        self.address = ""
        self.touched = False


class _Dialled:
    """A DEALER of one dialled link.

    Attributes:
        up: the handshake is done.
        failures: handshakes in a row that the other side broke off.
        probe: finds out whether somebody with another key is there, or nobody; None: there is no doubt.
        told: the present failure has been told already.
    """

    __slots__ = (
        "address",
        "carrier",
        "failures",
        "fd",
        "link",
        "monitor",
        "probe",
        "socket",
        "told",
        "touched",
        "up",
    )

    def __init__(self, link: int, socket: Socket, address: str, carrier: str) -> None:
        self.link = link
        self.socket = socket
        self.fd: int = socket.get(zmq.FD)
        self.address = address
        self.carrier = carrier
        self.monitor: Monitor | None = None
        self.up = False
        self.failures = 0
        self.probe: Probe | None = None
        self.told = False
        self.touched = False


class ZeroMQCarrier:
    """The carriers `ipc` and `direct`. What it promises is said in `gcref.carriers.base.Carrier`.

    Args:
        keys: our owner key; None: only ipc can be used.
        allowed: keys that may connect over TCP: z85 key → role. Asked anew for each handshake.
    """

    def __init__(self, keys: KeyPair | None = None, allowed: Mapping[bytes, str] | None = None) -> None:
        self._keys = keys
        self._allowed: Mapping[bytes, str] = {} if allowed is None else allowed
        self._context: zmq.Context[Socket] = zmq.Context()
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._listeners: dict[int, _Listener] = {}
        self._dialled: dict[int, _Dialled] = {}
        self._zap: Zap | None = None
        self._touched: list[_Listener | _Dialled] = []
        self._queued: list[CarrierEvent] = []  # noticed outside `poll`
        self._numbers = 0
        self._fds: list[Any] = []
        self._sockets: list[tuple[Socket, int]] = []  # those of `_fds` that are ZeroMQ's
        self._woken = False
        self._sleeping = False
        self._closed = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._register(self._wake_fd, self._on_wake)

    # ----------------------------------------------------------------------------------------------- links

    def dial(self, link: int, address: str, server_key: bytes | None) -> None:
        """See `Carrier.dial`. An address that cannot be dialled is a `LinkDown`."""
        if link in self._dialled:
            return
        scheme = address.partition("://")[0]
        problem = self._why_not(scheme, address, server_key)
        if problem is not None:
            self._queued.append(LinkDown(link, problem, time.monotonic()))
            return
        carrier = "ipc" if scheme == "ipc" else "direct"
        socket = self._new_socket(zmq.DEALER)
        socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.set(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        if "[" in address:
            socket.set(zmq.IPV6, 1)
        if server_key is not None and carrier == "direct" and self._keys is not None:
            socket.set(zmq.CURVE_SERVERKEY, server_key)
            socket.set(zmq.CURVE_PUBLICKEY, self._keys.public)
            socket.set(zmq.CURVE_SECRETKEY, self._keys.secret)
        dialled = _Dialled(link, socket, address, carrier)
        monitor = dialled.monitor = self._monitor(socket, _DIALLED_EVENTS)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            monitor.close()
            socket.close(0)
            self._queued.append(LinkDown(link, f"{address} cannot be dialled: {error}", time.monotonic()))
            return
        socket.get(_EVENTS)  # a pipe signals only to a reader that has found it empty once
        self._dialled[link] = dialled
        self._register(dialled.fd, lambda events, now: self._drain_dealer(dialled, events, now))
        self._register(monitor.fd, lambda events, now: self._on_dialled_monitor(dialled, events, now))

    def _why_not(self, scheme: str, address: str, server_key: bytes | None) -> str | None:
        if scheme == "ipc":
            return None
        if scheme != "tcp":
            return f"{address} is no address: it begins with ipc:// or tcp://"
        if server_key is None:
            return f"{address} comes without the key of its endpoint; TCP is never used without"
        if self._keys is None:
            return f"{address} needs an owner key, and this party has none"
        return None

    def listen(self, address: str) -> str:
        """See `Carrier.listen`."""
        scheme, _, place = address.partition("://")
        if scheme not in ("ipc", "tcp"):
            raise cannot_listen(address, "is no address", "begin it with ipc:// or tcp://")
        if scheme == "ipc" and len(os.fsencode(place)) > SOCKET_PATH_MAX_BYTES:
            remedy = f"choose a path of at most {SOCKET_PATH_MAX_BYTES} bytes"
            raise cannot_listen(address, "is too long for a socket", remedy)
        if scheme == "tcp" and self._keys is None:
            raise cannot_listen(address, "needs an owner key, and this party has none", "give it a key")
        self._numbers += 1
        socket = self._new_socket(zmq.ROUTER)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        if "[" in place:
            socket.set(zmq.IPV6, 1)
        listener = _Listener(self._numbers, socket, "ipc" if scheme == "ipc" else "direct")
        if scheme == "tcp" and self._keys is not None:
            self._start_zap()
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.CURVE_PUBLICKEY, self._keys.public)
            socket.set(zmq.CURVE_SECRETKEY, self._keys.secret)
            socket.set(zmq.ZAP_DOMAIN, b"gcref")
        monitor = listener.monitor = self._monitor(socket, _LISTENER_EVENTS)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            monitor.close()
            socket.close(0)
            raise bind_failed(scheme, place, address, error) from error
        listener.address = socket.get(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
        self._listeners[listener.number] = listener
        self._register(listener.fd, lambda events, now: self._drain_router(listener, events, now))
        self._register(monitor.fd, lambda events, now: self._on_listener_monitor(listener, events, now))
        return listener.address

    def send(self, link: Link, frame: bytes) -> bool:
        """See `Carrier.send`."""
        copy = len(frame) < ZERO_COPY_BYTES
        source: _Listener | _Dialled
        try:
            if type(link) is tuple:
                listener = self._listeners.get(link[0])
                if listener is None:
                    return False
                source = listener
                source.socket.send(link[1], _NOBLOCK_MORE)
                source.socket.send(frame, _NOBLOCK, copy=copy)
            else:
                dialled = self._dialled.get(link)  # type: ignore[call-overload]
                if dialled is None or not dialled.up:
                    return False
                source = dialled
                source.socket.send(frame, _NOBLOCK, copy=copy)
        except zmq.ZMQError as error:
            self._touch(source)  # also a call that fails may have swallowed the signal of what has arrived
            if error.errno == errno.EHOSTUNREACH:
                self._queued.append(LinkDown(link, "the connection is gone", time.monotonic()))
            return False
        if not source.touched:
            source.touched = True
            self._touched.append(source)
        return True

    def hangup(self, link: Link) -> None:
        """See `Carrier.hangup`. An accepted link has nothing to close: its packets are simply a stranger's again."""
        dialled = self._dialled.pop(link, None) if type(link) is int else None
        if dialled is not None:
            self._end_probe(dialled)
            self._close(dialled)

    def set_allowed(self, keys: Mapping[bytes, str]) -> None:
        """See `Carrier.set_allowed`."""
        self._allowed = keys
        if self._zap is not None:
            self._zap.allowed = keys

    # ------------------------------------------------------------------------------------------------ the wait

    def poll(self, timeout_s: float | None, fds: Sequence[Any] = ()) -> list[CarrierEvent]:
        """See `Carrier.poll`. Sockets of ZeroMQ in `fds` are watched level-triggered."""
        if (fds or self._fds) and list(fds) != self._fds:
            self._watch(list(fds))
        events, self._queued = self._queued, []
        if self._touched:
            self._look_at_touched(events)
        for socket, _ in self._sockets:
            if socket.get(_EVENTS) & _POLLIN:
                events.append(FdReady(socket))
        # The order matters: `wake` writes to the descriptor only if it sees us asleep, and we sleep only if we
        # do not see that it was called.
        self._sleeping = True
        if events or self._woken:
            timeout_s = 0
        ready = self._epoll.poll(timeout_s)
        self._sleeping = False
        self._woken = False
        if ready:
            now = time.monotonic()
            handlers = self._handlers
            for fd, _ in ready:
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events, now)
        return events

    def wake(self) -> None:
        """See `Carrier.wake`."""
        if self._woken:
            return
        self._woken = True
        if self._sleeping and not self._closed:
            os.eventfd_write(self._wake_fd, 1)

    def _on_wake(self, events: list[CarrierEvent], now: float) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass

    def _look_at_touched(self, events: list[CarrierEvent]) -> None:
        touched, self._touched = self._touched, []
        now = time.monotonic()
        for source in touched:
            source.touched = False
            if source.socket.closed:
                continue  # hung up since
            if source.socket.get(_EVENTS) & _POLLIN:
                self._drain(source, events, now)

    def _touch(self, source: _Listener | _Dialled) -> None:
        if not source.touched:
            source.touched = True
            self._touched.append(source)

    def _watch(self, fds: list[Any]) -> None:
        for item in self._fds:
            self._unregister(_descriptor(item))
        self._fds = fds
        self._sockets = [(item, _descriptor(item)) for item in fds if isinstance(item, zmq.Socket)]
        for item in fds:
            if isinstance(item, zmq.Socket):
                self._register(_descriptor(item), _socket_handler(item))
            else:
                self._register(_descriptor(item), _descriptor_handler(item))

    def _register(self, fd: int, handler: Handler) -> None:
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = handler

    def _unregister(self, fd: int) -> None:
        self._handlers.pop(fd, None)
        try:
            self._epoll.unregister(fd)
        except (OSError, ValueError):
            pass  # its owner has closed it already

    # ------------------------------------------------------------------------------------------------ frames in

    def _drain(self, source: _Listener | _Dialled, events: list[CarrierEvent], now: float) -> None:
        if type(source) is _Listener:
            self._drain_router(source, events, now)
        elif type(source) is _Dialled:
            self._drain_dealer(source, events, now)

    def _drain_router(self, listener: _Listener, events: list[CarrierEvent], now: float) -> None:
        socket, number, carrier, curve = listener.socket, listener.number, listener.carrier, listener.curve
        receive = socket.recv
        taken = size = 0
        try:
            while True:
                routing_id = receive(_NOBLOCK)
                part = receive(_NOBLOCK, copy=False)
                key = None
                if curve:
                    key = part.get("User-Id").encode()
                frame = part.bytes
                if part.more:
                    frame = _skip_rest(socket)
                events.append(PacketIn((number, routing_id), frame, key, now, carrier))
                taken += 1
                size += len(frame)
                if taken == 1:
                    if not socket.get(_EVENTS) & _POLLIN:
                        return
                elif taken >= DRAIN_PACKETS or size >= DRAIN_BYTES:
                    self._touch(listener)
                    return
        except zmq.ZMQError as error:
            self._drained(listener, error)

    def _drain_dealer(self, dialled: _Dialled, events: list[CarrierEvent], now: float) -> None:
        socket, link, carrier = dialled.socket, dialled.link, dialled.carrier
        receive = socket.recv
        taken = size = 0
        try:
            while True:
                # A message of several parts would be several frames: harmless, as the other side chose all of them.
                frame = receive(_NOBLOCK)
                events.append(PacketIn(link, frame, None, now, carrier))
                taken += 1
                size += len(frame)
                if taken == 1:
                    if not socket.get(_EVENTS) & _POLLIN:
                        return
                elif taken >= DRAIN_PACKETS or size >= DRAIN_BYTES:
                    self._touch(dialled)
                    return
        except zmq.ZMQError as error:
            self._drained(dialled, error)

    def _drained(self, source: _Listener | _Dialled, error: zmq.ZMQError) -> None:
        if error.errno != errno.EAGAIN:
            self._touch(
                source
            )  # a message that could not be read (it came without its key); there may be more

    # -------------------------------------------------------------------------------------------- connections

    def _on_dialled_monitor(self, dialled: _Dialled, events: list[CarrierEvent], now: float) -> None:
        if dialled.monitor is None:
            return
        for event, value in dialled.monitor.read():
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                dialled.up = True
                dialled.told = False
                dialled.failures = 0
                events.append(LinkUp(dialled.link, now))
            elif event == zmq.EVENT_DISCONNECTED:
                if dialled.up:
                    # What came before the end still counts.
                    self._drain_dealer(dialled, events, now)
                    self._goes_down(dialled, "the connection was lost", events, now)
            elif event == zmq.EVENT_CONNECT_RETRIED:
                if not dialled.told:
                    self._goes_down(dialled, f"nobody answers at {dialled.address}", events, now)
                dialled.told = False
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                events.append(Refused(dialled.link, now, f"{dialled.address} does not accept our key"))
                dialled.told = True
            else:
                self._handshake_failed(dialled, value, events, now)

    def _goes_down(self, dialled: _Dialled, reason: str, events: list[CarrierEvent], now: float) -> None:
        dialled.up = False
        dialled.told = True
        events.append(LinkDown(dialled.link, reason, now))

    def _handshake_failed(
        self, dialled: _Dialled, value: int, events: list[CarrierEvent], now: float
    ) -> None:
        timed_out = value in (errno.ETIMEDOUT, errno.EAGAIN)
        if not timed_out:
            dialled.failures += 1
        if dialled.failures < CURVE_FAILURES or dialled.carrier == "ipc":
            how = "took too long" if timed_out else "was broken off"
            self._goes_down(dialled, f"the handshake with {dialled.address} {how}", events, now)
        elif dialled.probe is None:
            dialled.probe = Probe(dialled.address)
            fd = dialled.probe.fileno()
            self._register(fd, lambda events, now: self._on_probe(dialled, events, now))

    def _on_probe(self, dialled: _Dialled, events: list[CarrierEvent], now: float) -> None:
        """It has shown who takes our connections there and breaks them off."""
        if dialled.probe is None:
            return
        speaks = dialled.probe.speaks()
        self._end_probe(dialled)
        if dialled.up:
            return
        if not speaks:
            dialled.failures = 0
            self._goes_down(dialled, f"nobody answers behind {dialled.address}", events, now)
            return
        reason = (
            f"{dialled.address} has another key than the one expected of it, or is no endpoint of gcref; if it was made "
            "anew, get its new record"
        )
        events.append(Refused(dialled.link, now, reason, ours=False))
        dialled.told = True

    def _end_probe(self, dialled: _Dialled) -> None:
        if dialled.probe is not None:
            self._unregister(dialled.probe.fileno())
            dialled.probe.close()
            dialled.probe = None

    def _on_listener_monitor(self, listener: _Listener, events: list[CarrierEvent], now: float) -> None:
        if listener.monitor is not None and listener.monitor.read():
            reason = f"somebody at {listener.address} speaks another protocol, or expects another key of us"
            events.append(Refused(None, now, reason))

    def _start_zap(self) -> None:
        if self._zap is None:
            self._zap = Zap(self._context, self._allowed)
            self._register(int(self._zap.socket.get(zmq.FD)), self._on_zap)

    def _on_zap(self, events: list[CarrierEvent], now: float) -> None:
        if self._zap is None:
            return
        for key in self._zap.answer():
            reason = f"the key {key.decode()} is not in the list of allowed keys"
            events.append(Refused(None, now, reason, key))

    # ------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """See `Carrier.close`. Takes up to `LINGER_MS` while frames are still leaving."""
        if self._closed:
            return
        self._closed = True
        for dialled in self._dialled.values():
            self._end_probe(dialled)
            self._close(dialled)
        self._dialled.clear()
        for listener in self._listeners.values():
            self._close(listener)
            if listener.carrier == "ipc":
                _unlink(listener.address.removeprefix("ipc://"))
        self._listeners.clear()
        if self._zap is not None:
            self._zap.close()
        self._context.term()
        self._epoll.close()
        os.close(self._wake_fd)
        self._handlers.clear()

    def _close(self, source: _Listener | _Dialled) -> None:
        self._unregister(source.fd)
        if source.monitor is not None:
            self._unregister(source.monitor.fd)
            source.monitor.close()
            source.monitor = None
        source.socket.close()

    def _new_socket(self, kind: int) -> Socket:
        socket = self._context.socket(kind)
        socket.set(zmq.LINGER, LINGER_MS)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        return socket

    def _monitor(self, socket: Socket, events: int) -> Monitor:
        self._numbers += 1
        return Monitor(self._context, socket, self._numbers, events)


def _descriptor(item: Any) -> int:
    if isinstance(item, zmq.Socket):
        return int(item.get(zmq.FD))
    return item if isinstance(item, int) else item.fileno()


def _socket_handler(socket: Socket) -> Handler:
    def handler(events: list[CarrierEvent], now: float) -> None:
        if socket.get(_EVENTS) & _POLLIN:
            events.append(FdReady(socket))

    return handler


def _descriptor_handler(item: Any) -> Handler:
    ready = FdReady(item)
    return lambda events, now: events.append(ready)


def _skip_rest(socket: Socket) -> bytes:
    """Take the rest of a message that has more parts than ours ever have; what is left is no packet."""
    while socket.get(zmq.RCVMORE):
        socket.recv(_NOBLOCK)
    return b""


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # somebody was faster, or has removed the whole folder
