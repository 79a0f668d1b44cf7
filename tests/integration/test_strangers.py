"""F11: whatever arrives at an endpoint's ports, it is dropped, counted and logged, and the endpoint goes on serving."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Iterator
from typing import Final

import psutil
import pytest
import zmq

from endpoint_worker import status
from gcref import Executor, LocalEndpoint, config
from gcref.carriers import keys
from gcref.directory import records
from gcref.directory.records import EndpointRecord
from gcref.wire import codec
from tests.support.waiting import patience, wait_until

SEED: Final = 20_231
PATIENCE_S: Final = 20.0

ZMTP_NULL: Final = b"\xff" + b"\0" * 8 + b"\x7f" + b"\x03\x01" + b"NULL" + b"\0" * 16 + b"\0" + b"\0" * 31
"""The greeting of a ZeroMQ socket that does not encrypt."""


@pytest.fixture(scope="module")
def site(_nothing_left: None) -> Iterator[EndpointRecord]:
    with LocalEndpoint("site", workers=1, carriers=("direct",)):
        record = records.read("site")
        assert record is not None
        yield record


class Strangers:
    """ZeroMQ sockets that are not gcref's; all are closed at the end of the test."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def dial(
        self, address: str, pair: keys.KeyPair, server_key: str | bytes, *, watch: int = 0
    ) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """A socket that connects, and another one that tells of the events in `watch`."""
        found = self._context.socket(zmq.DEALER)
        found.curve_publickey, found.curve_secretkey = pair
        found.curve_serverkey = server_key if isinstance(server_key, bytes) else server_key.encode()
        monitor = found.get_monitor_socket(watch or zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._sockets += [found, monitor]
        found.connect(address)
        return found, monitor

    def close(self) -> None:
        for found in self._sockets:
            found.close(0)
        self._context.destroy(linger=0)


def event_of(monitor: zmq.Socket[bytes], timeout_s: float = 10) -> int:
    """The next event of a socket."""
    assert monitor.poll(int(1000 * patience(timeout_s))), "nothing happened"
    return int(struct.unpack("=hi", monitor.recv_multipart()[0])[0])


@pytest.fixture
def strangers() -> Iterator[Strangers]:
    found = Strangers()
    yield found
    found.close()


def tcp_of(addresses: tuple[str, ...]) -> str:
    return next(address for address in addresses if address.startswith("tcp://"))


def both(record: EndpointRecord) -> tuple[str, str]:
    return tcp_of(record.control), tcp_of(record.bulk)


def dial(address: str) -> socket.socket:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def users_key() -> keys.KeyPair:
    return keys.load_or_create(config.home() / "keys" / "user.key")


def serves(record: EndpointRecord) -> None:
    """A new client is served, and the agent is the process that it was."""
    with Executor(record.name) as executor:
        assert executor.submit(pow, 3, 4).result(timeout=patience(PATIENCE_S)) == 81
    now = records.read(record.name)
    assert now is not None
    assert now.pid == record.pid
    assert psutil.pid_exists(record.pid)


def test_f11_bytes_that_are_no_zeromq(site: EndpointRecord) -> None:
    chance = random.Random(SEED)
    greetings = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        ZMTP_NULL,
        ZMTP_NULL[:20],
        b"",
        *(chance.randbytes(chance.randrange(1, 5000)) for _ in range(20)),
    ]
    for address in both(site):
        for greeting in greetings:
            with dial(address) as link, contextlib.suppress(OSError):
                link.sendall(greeting)
                link.shutdown(socket.SHUT_WR)
    serves(site)


def test_f11_connections_that_say_nothing_do_not_pile_up(site: EndpointRecord) -> None:
    agent = psutil.Process(site.pid)
    before = agent.num_fds()
    links = [dial(address) for address in both(site) for _ in range(50)]
    try:
        serves(site)
    finally:
        for link in links:
            # Reset, as after the death of a machine.
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            link.close()
    wait_until(
        lambda: agent.num_fds() <= before + 5, what=lambda: f"{agent.num_fds()} files to become {before}"
    )


def test_f11_a_key_that_nobody_allowed(site: EndpointRecord, strangers: Strangers) -> None:
    watch = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED
    for address in both(site):
        _socket, monitor = strangers.dial(address, keys.generate(), site.public_key, watch=watch)
        assert event_of(monitor) == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    serves(site)


def test_f11_a_server_key_that_is_not_the_endpoints(site: EndpointRecord, strangers: Strangers) -> None:
    watch = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
    for address in both(site):
        _socket, monitor = strangers.dial(address, users_key(), keys.generate().public, watch=watch)
        assert event_of(monitor) == zmq.EVENT_DISCONNECTED
    serves(site)


def garbage() -> list[list[bytes]]:
    """What somebody with a good key might send: each a message of one frame or more."""
    chance = random.Random(SEED)
    party, other = chance.randbytes(16), chance.randbytes(16)
    version = bytes((config.PROTOCOL_VERSION,))
    nested: object = 0
    for _ in range(100):
        nested = [nested]
    shapes: list[object] = [
        None, 0, "text", {}, [], [1], [1, 2, 3, 4, 5], [0, 1, 1, 0, [[99]]], [0, 1, 1, 0, 7], [0, -1, -1, -1, []],
        [0, 2**63, 2**63, 2**63, [[1]]], nested, [0, 1, 1, 0, [[1, party, other, b"", {}, [], []]]],
        [[0], 1, 1, 0, []], [255, 1, 1, 0, []],
        # HELLO: of another protocol; without its parts; as somebody else; with an epoch from the far future.
        [1, 1, 1, 0, [[9, "3.11", party, "client", b"k" * 40, 1, 0, 0, 5]]], [1, 1, 1, 0, [[1]]],
        [1, 1, 1, 0, [[1, "3.11", party, "endpoint", b"k" * 40, 2**62, 0, 0, 5]]],
        [32, 1, party, 1, -5, 10**12, 0, None], [33, 1, party, 1, 0, 10, 0, None, None], [34, 1, party, "client", b""],
    ]  # fmt: skip
    frames = [version + codec.pack(shape) for shape in shapes]
    frames += [bytes((9,)) + codec.pack([0, 1, 1, 0, []]), version, b"", version + b"\xdd\xff\xff\xff\xff"]
    frames += [version + b"\x91" * 5000, version + b"\xc6\xff\xff\xff\xff", os.urandom(100_000)]
    frames += [chance.randbytes(chance.randrange(1, 300)) for _ in range(100)]
    return [[frame] for frame in frames] + [[frame, frame] for frame in frames] + [[b"x"] * 50]


def test_f11_garbage_from_somebody_with_a_good_key(site: EndpointRecord, strangers: Strangers) -> None:
    for address in both(site):
        socket, _monitor = strangers.dial(address, users_key(), site.public_key)
        for parts in garbage():
            # Waits while the connection is made; a connection that was ended for it is made again.
            assert socket.poll(int(1000 * patience(10)), zmq.POLLOUT)
            socket.send_multipart(parts)
    serves(site)
    dropped = status.ask(site)["dropped_packets"]
    assert dropped["garbage"] > 0, dropped
    assert dropped["version"] > 0, dropped


def test_f11_a_message_above_every_limit(site: EndpointRecord, strangers: Strangers) -> None:
    before = psutil.Process(site.pid).memory_info().rss
    for address in both(site):
        socket, monitor = strangers.dial(address, users_key(), site.public_key, watch=zmq.EVENT_DISCONNECTED)
        socket.send(bytes(config.MAX_MESSAGE_BYTES + 1024 * 1024))
        assert event_of(monitor, 20) == zmq.EVENT_DISCONNECTED, "a message above the limit was taken"
    assert psutil.Process(site.pid).memory_info().rss < before + 4 * config.MAX_MESSAGE_BYTES
    serves(site)
