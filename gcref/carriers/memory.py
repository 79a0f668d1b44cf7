"""The fake carrier: links inside one process, with faults on demand.

    network = MemoryNetwork()
    agent = MemoryCarrier(network, agent_keys, {client_keys.public: "user"})
    agent.listen("tcp://a:1")
    client = MemoryCarrier(network, client_keys)
    client.dial(1, "tcp://a:1", agent_keys.public)
    network.cut("tcp://a:1"); network.heal("tcp://a:1")

It keeps the promises of `gcref.carriers.base.Carrier` (the same tests run over it) until it is told to break them.
Carriers of one network may live on different threads, each one on its own.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from gcref.brains.peers_events import Link, LinkDown, LinkUp, PacketIn, Refused
from gcref.carriers.base import CarrierEvent, FdReady
from gcref.carriers.keys import KeyPair
from gcref.errors import ConfigError
from gcref.wire.codec import MAX_FRAME_BYTES

FIRST_PORT: Final = 49152

Accepted: TypeAlias = tuple[str, int]
"""An accepted link: the address that was dialled, and a number."""


class _Connection:
    """One link between two carriers."""

    __slots__ = ("accepted", "address", "dialler", "link", "listener")

    def __init__(
        self, dialler: MemoryCarrier, link: int, listener: MemoryCarrier, address: str, number: int
    ) -> None:
        self.dialler = dialler
        self.link = link
        self.listener = listener
        self.address = address
        self.accepted: Accepted = (address, number)


class MemoryNetwork:
    """What connects memory carriers, and the faults that can befall it. All methods may be called by any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._listeners: dict[str, MemoryCarrier] = {}
        self._connections: list[_Connection] = []
        self._waiting: list[tuple[MemoryCarrier, int, str, bytes | None]] = []
        self._cut: set[str] = set()
        self._frozen: set[MemoryCarrier] = set()
        self._held: list[tuple[MemoryCarrier, CarrierEvent]] = []
        self._frozen_mail: list[tuple[MemoryCarrier, CarrierEvent]] = []
        self._numbers = 0
        self._drop = 0
        self._duplicate = 0
        self._delay = 0

    # ---------------------------------------------------------------------------------------------- faults

    def cut(self, address: str) -> None:
        """Break the connections to an address, and let nobody connect to it until `heal`."""
        with self._lock:
            self._cut.add(address)
            for connection in [each for each in self._connections if each.address == address]:
                self._break(connection, "the connection was lost")

    def heal(self, address: str) -> None:
        """End a `cut`: who was connected, or tried to, connects again."""
        with self._lock:
            self._cut.discard(address)
            self._try_waiting()

    def freeze(self, carrier: MemoryCarrier) -> None:
        """Stop a carrier as SIGSTOP would: nothing goes in or out, and nobody is told."""
        with self._lock:
            self._frozen.add(carrier)

    def thaw(self, carrier: MemoryCarrier) -> None:
        """End a `freeze`: what was sent meanwhile arrives."""
        with self._lock:
            self._frozen.discard(carrier)
            mail, self._frozen_mail = self._frozen_mail, []
            for to, event in mail:
                self._deliver(to, event)
            self._try_waiting()

    def drop(self, frames: int = 1) -> None:
        """Lose the next frames."""
        with self._lock:
            self._drop += frames

    def duplicate(self, frames: int = 1) -> None:
        """Deliver the next frames twice."""
        with self._lock:
            self._duplicate += frames

    def delay(self, frames: int = 1) -> None:
        """Hold the next frames back until `release`: later ones overtake them."""
        with self._lock:
            self._delay += frames

    def release(self) -> None:
        """Deliver what `delay` held back."""
        with self._lock:
            held, self._held = self._held, []
            for to, event in held:
                self._deliver(to, event)

    def crash(self, carrier: MemoryCarrier) -> None:
        """End a carrier as SIGKILL would: no good-bye, but the system closes its connections."""
        with self._lock:
            self._frozen.discard(carrier)
        carrier.close()

    # ------------------------------------------------------------------------------------- for carriers

    def _listen(self, carrier: MemoryCarrier, address: str) -> str:
        with self._lock:
            if address.endswith((":*", ":0")):
                self._numbers += 1
                address = f"{address.rpartition(':')[0]}:{FIRST_PORT + self._numbers}"
            if address in self._listeners:
                remedy = "choose another port, or * for any free one"
                port = address.rpartition(":")[2]
                raise ConfigError(
                    f"cannot listen at {address}: port {port} is taken; {remedy}", key=port, remedy=remedy
                )
            self._listeners[address] = carrier
            self._try_waiting()
            return address

    def _dial(self, carrier: MemoryCarrier, link: int, address: str, server_key: bytes | None) -> None:
        with self._lock:
            if self._find(carrier, link) or any(each[:2] == (carrier, link) for each in self._waiting):
                return
            self._waiting.append((carrier, link, address, server_key))
            self._try_waiting()
            if any(each[:2] == (carrier, link) for each in self._waiting):
                carrier._take(LinkDown(link, f"nobody answers at {address}", time.monotonic()))

    def _try_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            dialler, link, address, server_key = entry
            listener = self._listeners.get(address)
            if (
                listener is None
                or address in self._cut
                or listener in self._frozen
                or dialler in self._frozen
            ):
                self._waiting.append(entry)
            elif not address.startswith("tcp://") or self._shake_hands(
                dialler, listener, link, address, server_key
            ):
                self._numbers += 1
                self._connections.append(_Connection(dialler, link, listener, address, self._numbers))
                dialler._server_keys[link] = server_key
                dialler._take(LinkUp(link, time.monotonic()))

    def _shake_hands(
        self,
        dialler: MemoryCarrier,
        listener: MemoryCarrier,
        link: int,
        address: str,
        server_key: bytes | None,
    ) -> bool:
        now = time.monotonic()
        if listener.keys is None or listener.keys.public != server_key or dialler.keys is None:
            reason = f"{address} has another key than the one expected of it"
            dialler._take(Refused(link, now, reason))
            listener._take(Refused(None, now, f"somebody expects another key of {address}"))
            return False
        key = dialler.keys.public
        if listener.allowed.get(key) is None:
            dialler._take(Refused(link, now, f"{address} does not accept our key"))
            reason = f"the key {key.decode()} from memory is not in the list of allowed keys"
            listener._take(Refused(None, now, reason, key))
            return False
        return True

    def _send(self, carrier: MemoryCarrier, link: Link, frame: bytes) -> bool:
        with self._lock:
            connection = self._find(carrier, link)
            if connection is None:
                if type(link) is tuple:
                    carrier._take(LinkDown(link, "the connection is gone", time.monotonic()))
                return False
            if len(frame) > MAX_FRAME_BYTES:
                self._break(connection, "a frame was too large")
                return True
            self._pass_on(carrier, connection, link, frame)
            return True

    def _pass_on(self, carrier: MemoryCarrier, connection: _Connection, link: Link, frame: bytes) -> None:
        now = time.monotonic()
        name = "direct" if connection.address.startswith("tcp://") else "ipc"
        to = connection.dialler
        event = PacketIn(connection.link, frame, None, now, name)
        if link == connection.link:
            key = carrier.keys.public if name == "direct" and carrier.keys is not None else None
            to, event = connection.listener, PacketIn(connection.accepted, frame, key, now, name)
        if self._drop:
            self._drop -= 1
        elif self._delay:
            self._delay -= 1
            self._held.append((to, event))
        else:
            self._deliver(to, event)
            if self._duplicate:
                self._duplicate -= 1
                self._deliver(to, event)

    def _deliver(self, to: MemoryCarrier, event: CarrierEvent) -> None:
        if to in self._frozen:
            self._frozen_mail.append((to, event))
        elif not isinstance(event, PacketIn) or self._find(to, event.link) is not None:
            to._take(event)

    def _find(self, carrier: MemoryCarrier, link: Link) -> _Connection | None:
        for connection in self._connections:
            if (connection.dialler is carrier and connection.link == link) or (
                connection.listener is carrier and connection.accepted == link
            ):
                return connection
        return None

    def _break(self, connection: _Connection, reason: str) -> None:
        self._connections.remove(connection)
        dialler, link = connection.dialler, connection.link
        self._deliver(dialler, LinkDown(link, reason, time.monotonic()))
        self._waiting.append((dialler, link, connection.address, dialler._server_keys.get(link)))

    def _hang_up(self, carrier: MemoryCarrier, link: Link) -> None:
        with self._lock:
            self._waiting = [each for each in self._waiting if each[:2] != (carrier, link)]
            connection = self._find(carrier, link)
            if connection is not None and connection.dialler is carrier:
                self._connections.remove(connection)

    def _leave(self, carrier: MemoryCarrier) -> None:
        with self._lock:
            for address in [each for each, owner in self._listeners.items() if owner is carrier]:
                del self._listeners[address]
            self._waiting = [each for each in self._waiting if each[0] is not carrier]
            for connection in list(self._connections):
                if connection.dialler is carrier:
                    self._connections.remove(connection)
                elif connection.listener is carrier:
                    self._break(connection, "the connection was lost")
            self._try_waiting()


class MemoryCarrier:
    """A carrier of a `MemoryNetwork`. What it promises is said in `gcref.carriers.base.Carrier`.

    Args:
        network: what connects it with others.
        keys: our owner key; needed for tcp:// addresses, as in life.
        allowed: keys that may connect to tcp:// addresses.
    """

    def __init__(
        self, network: MemoryNetwork, keys: KeyPair | None = None, allowed: Mapping[bytes, str] | None = None
    ) -> None:
        self.keys = keys
        self.allowed: Mapping[bytes, str] = {} if allowed is None else allowed
        self._network = network
        self._server_keys: dict[int, bytes | None] = {}
        self._lock = threading.Lock()
        self._inbox: list[CarrierEvent] = []
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False

    def dial(self, link: int, address: str, server_key: bytes | None) -> None:
        """See `Carrier.dial`."""
        if address.startswith("tcp://") and (server_key is None or self.keys is None):
            self._take(LinkDown(link, f"{address} needs keys on both sides", time.monotonic()))
        elif not address.startswith(("tcp://", "ipc://")):
            self._take(LinkDown(link, f"{address} is no address", time.monotonic()))
        else:
            self._network._dial(self, link, address, server_key)

    def listen(self, address: str) -> str:
        """See `Carrier.listen`."""
        if not address.startswith(("tcp://", "ipc://")):
            remedy = "begin it with ipc:// or tcp://"
            raise ConfigError(
                f"cannot listen at {address}: it is no address; {remedy}", key=address, remedy=remedy
            )
        if address.startswith("tcp://") and self.keys is None:
            remedy = "give it a key"
            raise ConfigError(
                f"cannot listen at {address}: it needs an owner key; {remedy}", key=address, remedy=remedy
            )
        return self._network._listen(self, address)

    def send(self, link: Link, frame: bytes) -> bool:
        """See `Carrier.send`."""
        return self._network._send(self, link, bytes(frame))

    def hangup(self, link: Link) -> None:
        """See `Carrier.hangup`."""
        self._network._hang_up(self, link)

    def poll(self, timeout_s: float | None, fds: Sequence[Any] = ()) -> list[CarrierEvent]:
        """See `Carrier.poll`."""
        with self._lock:
            waits = not self._inbox
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        by_number = {item if isinstance(item, int) else item.fileno(): item for item in fds}
        for number in by_number:
            poller.register(number, select.POLLIN)
        timeout_ms = None if timeout_s is None else -(-timeout_s * 1000 // 1)
        ready = [number for number, _ in poller.poll(timeout_ms if waits else 0)]
        with self._lock:
            events, self._inbox = self._inbox, []
            if self._bell in ready:
                os.eventfd_read(self._bell)
        events += [FdReady(by_number[number]) for number in ready if number in by_number]
        return events

    def wake(self) -> None:
        """See `Carrier.wake`."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._bell, 1)

    def set_allowed(self, keys: Mapping[bytes, str]) -> None:
        """See `Carrier.set_allowed`."""
        self.allowed = keys

    def close(self) -> None:
        """See `Carrier.close`."""
        with self._lock:
            if self._closed:
                return
        self._network._leave(self)
        with self._lock:
            self._closed = True
            os.close(self._bell)

    def _take(self, event: CarrierEvent) -> None:
        with self._lock:
            if not self._closed:
                self._inbox.append(event)
                os.eventfd_write(self._bell, 1)
