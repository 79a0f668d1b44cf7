"""What every carrier of control messages promises: one suite over the fakes, ipc, TCP with CURVE, and mail over RabbitMQ."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from gcref.brains.peers_events import LinkDown, LinkUp, PacketIn
from gcref.carriers import zeromq
from gcref.carriers.base import FdReady
from gcref.carriers.zeromq import ZeroMQCarrier
from gcref.errors import ConfigError
from gcref.wire.codec import MAX_FRAME_BYTES
from tests.contract.places import CLIENT, KINDS, MAIL_KINDS, OTHER, SERVER, TCP_KINDS, MailPlace, Place
from tests.support.proxy import Proxy
from tests.support.waiting import patience

# Mail has no connections, a mailbox takes mail for whoever is away, and a mailbox that comes up wakes a poll.
sockets = pytest.mark.parametrize("place", KINDS, indirect=True)
tcp_kinds = pytest.mark.parametrize("place", TCP_KINDS, indirect=True)
zeromq_kinds = pytest.mark.parametrize("place", ["zeromq-ipc", "zeromq-tcp"], indirect=True)
zeromq_tcp = pytest.mark.parametrize("place", ["zeromq-tcp"], indirect=True)
zeromq_ipc = pytest.mark.parametrize("place", ["zeromq-ipc"], indirect=True)


@pytest.fixture(params=(*KINDS, *MAIL_KINDS))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    found = Place(request.param, tmp_path)
    if request.param in MAIL_KINDS:
        rabbit = request.getfixturevalue("rabbit") if request.param == "mail-rabbitmq" else None
        found = MailPlace(request.param, tmp_path, rabbit)
    yield found
    found.close()


# ----------------------------------------------------------------------------------------------------- frames


def test_frames_go_there_and_back(place: Place) -> None:
    client, server, _ = place.linked()
    assert client.carrier.send(1, b"there")
    place.until(lambda: server.frames == [b"there"])
    (packet,) = server.of(PacketIn)
    assert packet.carrier == place.carrier_name
    assert packet.key == (CLIENT.public if place.tcp else None)
    assert packet.now <= time.monotonic()
    assert server.carrier.send(packet.link, b"back")
    place.until(lambda: client.frames == [b"back"])
    (answer,) = client.of(PacketIn)
    assert (answer.link, answer.key, answer.carrier) == (1, place.answer_key, place.carrier_name)


def test_frames_arrive_whole_and_in_order(place: Place) -> None:
    client, server, _ = place.linked()
    sizes = [0, 1, 100, 65_535, 65_536, 300_000, 3_000_000, 10]
    frames = [bytes([number % 251]) * sizes[number % len(sizes)] for number in range(80)]
    for frame in frames:
        place.until(lambda frame=frame: client.carrier.send(1, frame), "room to send")  # type: ignore[misc]
    place.until(lambda: len(server.frames) >= len(frames), "all frames", 30.0)
    assert server.frames == frames


def test_one_poll_is_bounded_and_the_rest_is_not_forgotten(place: Place) -> None:
    client, server, _ = place.linked()
    for number in range(3 * zeromq.DRAIN_PACKETS):
        client.carrier.send(1, b"%d" % number)
    place.until(lambda: len(server.frames) == 3 * zeromq.DRAIN_PACKETS)
    assert server.frames == [b"%d" % number for number in range(3 * zeromq.DRAIN_PACKETS)]


def test_each_dialler_is_a_link_of_its_own(place: Place) -> None:
    one, server, address = place.linked()
    other = place.party()
    other.carrier.dial(1, address, place.server_key)
    place.until(lambda: other.ups(1))
    one.carrier.send(1, b"one")
    other.carrier.send(1, b"other")
    place.until(lambda: len(server.frames) == 2)
    for packet in server.of(PacketIn):
        server.carrier.send(packet.link, b"to " + packet.frame)
    place.until(lambda: one.frames and other.frames)
    assert (one.frames, other.frames) == ([b"to one"], [b"to other"])


@zeromq_kinds
def test_a_send_that_fails_hides_nothing_that_has_arrived(place: Place) -> None:
    """It takes ZeroMQ's signal of the other party's frame, which must be found all the same, and without a further one."""
    gone, server, address = place.linked()
    other = place.party()
    other.carrier.dial(1, address, place.server_key)
    place.until(lambda: other.ups(1))
    for party, frame in ((gone, b"gone"), (other, b"other")):
        party.carrier.send(1, frame)
    place.until(lambda: len(server.frames) == 2)
    link = next(packet.link for packet in server.of(PacketIn) if packet.frame == b"gone")
    gone.carrier.close()
    place.parties.remove(gone)
    place.until(lambda: not server.carrier.send(link, b"nobody hears this"))
    assert isinstance(server.carrier, ZeroMQCarrier)
    (listener,) = server.carrier._listeners.values()
    for number in range(20):
        other.carrier.send(1, b"%d" % number)
        readable, _, _ = select.select([listener.fd], [], [], 5.0)
        assert readable, "the signal"
        assert not server.carrier.send(link, b"nobody hears this"), "which this swallows"
        frames: list[bytes] = []
        while not frames:
            events = server.carrier.poll(5.0)  # the first one has the end of the link that is gone
            assert events, "it sleeps, and the frame is there"
            frames = [event.frame for event in events if isinstance(event, PacketIn)]
        assert frames == [b"%d" % number]


@sockets
def test_several_links_of_one_carrier(place: Place) -> None:
    client, server, address = place.linked()
    client.carrier.dial(2, address, place.server_key)
    place.until(lambda: client.ups(2))
    client.carrier.send(1, b"1")
    client.carrier.send(2, b"2")
    place.until(lambda: len(server.frames) == 2)
    assert len({packet.link for packet in server.of(PacketIn)}) == 2


def test_a_party_can_listen_at_several_addresses_and_dial_too(place: Place, tmp_path: Path) -> None:
    server, address = place.server()
    second = "tcp://127.0.0.1:*" if place.tcp else f"ipc://{tmp_path}/second"
    again = server.carrier.listen(second)
    assert again != address
    client = place.party()
    client.carrier.dial(1, again, place.server_key)
    server.carrier.dial(1, address, place.server_key)  # itself: the carrier has no opinion
    place.until(lambda: client.ups(1))
    client.carrier.send(1, b"x")
    place.until(lambda: b"x" in server.frames)


# -------------------------------------------------------------------------------------------------- connections


@sockets
def test_dialled_before_anybody_listens(place: Place) -> None:
    probe, address = place.server()
    probe.carrier.close()
    place.parties.remove(probe)
    client = place.party()
    client.carrier.dial(1, address, place.server_key)
    place.until(lambda: client.downs(1) >= 1, "the news that nobody answers")
    assert not client.carrier.send(1, b"lost")
    server = place.party(SERVER, {CLIENT.public: "user"})
    server.carrier.listen(address)
    place.until(lambda: client.ups(1) == 1, "the link")
    assert client.carrier.send(1, b"found")
    place.until(lambda: server.frames == [b"found"])


@sockets
def test_a_lost_connection_is_told_and_made_again(place: Place) -> None:
    client, server, address = place.linked()
    client.carrier.send(1, b"first")
    place.until(lambda: server.frames)
    server.carrier.close()
    place.parties.remove(server)
    place.until(lambda: client.downs(1) >= 1)
    assert not client.carrier.send(1, b"lost")
    again = place.party(SERVER, {CLIENT.public: "user"})
    again.carrier.listen(address)
    place.until(lambda: client.ups(1) == 2)
    assert client.carrier.send(1, b"second")
    place.until(lambda: again.frames == [b"second"])


@sockets
def test_what_came_before_the_end_of_a_connection_is_not_lost(place: Place) -> None:
    client, server, _ = place.linked()
    client.carrier.send(1, b"hello")
    place.until(lambda: server.frames)
    link = server.of(PacketIn)[0].link
    for number in range(50):
        server.carrier.send(link, b"%d" % number)
    server.carrier.close()
    place.parties.remove(server)
    place.until(lambda: client.downs(1))
    assert client.frames == [b"%d" % number for number in range(50)]
    kinds = [type(event) for event in client.events if isinstance(event, (PacketIn, LinkDown))]
    assert kinds.index(LinkDown) == 50


@sockets
def test_hanging_up_lets_the_last_frames_go_and_is_silent_then(place: Place) -> None:
    client, server, _ = place.linked()
    client.carrier.send(1, b"hello")
    place.until(lambda: server.frames)
    link = server.of(PacketIn)[0].link
    client.carrier.send(1, b"good-bye")
    client.carrier.hangup(1)
    assert not client.carrier.send(1, b"too late")
    place.until(lambda: len(server.frames) == 2)
    assert server.frames[1] == b"good-bye"
    client.events.clear()
    server.events.clear()
    place.until(lambda: not server.carrier.send(link, b"anybody?"), "the end of the link")
    place.until(lambda: server.downs(link) >= 1)
    assert client.events == []
    client.carrier.hangup(1)
    client.carrier.hangup(77)
    server.carrier.hangup(link)


def test_dialled_again_under_a_new_number(place: Place) -> None:
    client, server, address = place.linked()
    client.carrier.hangup(1)
    client.carrier.dial(2, address, place.server_key)
    place.until(lambda: client.ups(2) == 1)
    client.carrier.send(2, b"x")
    place.until(lambda: server.frames == [b"x"])


def test_a_link_that_exists_is_left_alone(place: Place) -> None:
    client, server, address = place.linked()
    client.carrier.dial(1, address, place.server_key)
    client.carrier.send(1, b"x")
    place.until(lambda: server.frames == [b"x"])
    assert client.ups(1) == 1


def test_unknown_links_take_nothing(place: Place) -> None:
    client, server, _ = place.linked()
    assert not client.carrier.send(99, b"x")
    assert not server.carrier.send((4711, b"nobody"), b"x")
    assert not server.carrier.send(99, b"x")
    client.carrier.send(1, b"x")
    place.until(lambda: server.frames == [b"x"])


@pytest.mark.parametrize(
    "address", ["", "nonsense", "http://example.org", "tcp://", "tcp://nohost", "ipc://"]
)
def test_addresses_that_are_none_are_links_that_stay_down(place: Place, address: str) -> None:
    client, server, good = place.linked()
    client.carrier.dial(5, address, SERVER.public)
    place.until(lambda: client.downs(5) >= 1)
    client.carrier.send(1, b"x")
    place.until(lambda: server.frames == [b"x"])
    client.carrier.hangup(5)
    assert good


# ---------------------------------------------------------------------------------------------------- listening


@pytest.mark.parametrize("address", ["", "nonsense", "udp://127.0.0.1:1"])
def test_one_cannot_listen_at_what_is_no_address(place: Place, address: str) -> None:
    party = place.party(SERVER)
    with pytest.raises(ConfigError, match="begin it with ipc:// or tcp://"):
        party.carrier.listen(address)


@tcp_kinds
def test_a_taken_port_is_named_with_the_remedy(place: Place) -> None:
    _, address = place.server()
    port = address.rpartition(":")[2]
    with pytest.raises(ConfigError) as caught:
        place.party(SERVER).carrier.listen(address)
    assert f"port {port} is taken" in str(caught.value)
    assert caught.value.key == port
    assert "another port" in (caught.value.remedy or "")


@tcp_kinds
def test_no_tcp_without_keys(place: Place) -> None:
    with pytest.raises(ConfigError, match="key"):
        place.party(None).carrier.listen(place.any_address)
    _, address = place.server()
    for pair, server_key in ((CLIENT, None), (None, SERVER.public)):
        client = place.party(pair)
        client.carrier.dial(1, address, server_key)
        place.until(lambda client=client: client.downs(1))  # type: ignore[misc]
        assert not client.ups(1)


@zeromq_tcp
def test_an_address_of_another_machine_is_named(place: Place) -> None:
    with pytest.raises(ConfigError, match="not an address of this machine"):
        place.party(SERVER).carrier.listen("tcp://192.0.2.1:4711")


@zeromq_ipc
def test_a_path_that_is_too_long_is_named(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        place.party().carrier.listen(f"ipc://{tmp_path}/{'x' * 108}")
    with pytest.raises(ConfigError):
        place.party().carrier.listen(f"ipc://{tmp_path}/no/such/folder")


@zeromq_ipc
def test_a_socket_that_a_killed_process_left_is_no_obstacle(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    assert path.exists()
    client, server, _ = place.linked()
    client.carrier.send(1, b"x")
    place.until(lambda: server.frames == [b"x"])
    server.carrier.close()
    assert not path.exists()


# ----------------------------------------------------------------------------------------------------- the wait


@sockets
def test_poll_waits_as_long_as_it_is_told(place: Place) -> None:
    party = place.party()
    began = time.monotonic()
    assert party.carrier.poll(0) == []
    assert time.monotonic() - began < patience(1)
    began = time.monotonic()
    assert party.carrier.poll(0.05) == []
    assert time.monotonic() - began >= 0.049


def test_a_wake_ends_the_present_or_the_next_wait(place: Place) -> None:
    party = place.party()
    party.carrier.wake()
    party.carrier.wake()
    assert party.carrier.poll(None) == []
    waiting = threading.Event()

    def wake() -> None:
        waiting.wait()
        party.carrier.wake()

    thread = threading.Thread(target=wake)
    thread.start()
    waiting.set()
    assert party.carrier.poll(None) == []
    thread.join()


def test_no_wake_is_lost(place: Place) -> None:
    """Work is queued, then `wake`; whoever polls finds it: ten thousand times, from another thread."""
    party = place.party()
    queue: list[int] = []
    total = 2_000 if place.kind.startswith("memory") else 10_000

    def work() -> None:
        for number in range(total):
            queue.append(number)
            party.carrier.wake()

    thread = threading.Thread(target=work)
    thread.start()
    taken = 0
    while taken < total:
        party.carrier.poll(10.0)
        while queue:
            queue.pop(0)
            taken += 1
    thread.join()


def test_other_descriptors_are_waited_for_as_well(place: Place) -> None:
    party = place.party()
    read, write = os.pipe()
    one, other = socket.socketpair()
    try:
        fds: list[Any] = [read, one]
        assert party.carrier.poll(0, fds) == []
        os.write(write, b"x")
        assert party.carrier.poll(None, fds) == [FdReady(read)]
        assert party.carrier.poll(None, fds) == [FdReady(read)], "as long as it can be read"
        os.read(read, 1)
        other.send(b"x")
        assert party.carrier.poll(None, fds) == [FdReady(one)]
        assert party.carrier.poll(0, [read]) == [], "no longer asked for"
        assert party.carrier.poll(0, []) == []
        assert party.carrier.poll(None, [one]) == [FdReady(one)]
        other.close()
        assert party.carrier.poll(None, [one]) == [FdReady(one)]
        assert party.carrier.poll(0) == []
    finally:
        os.close(read)
        os.close(write)
        one.close()
        other.close()


@zeromq_kinds
def test_sockets_of_zeromq_are_watched_whoever_used_them_meanwhile(place: Place) -> None:
    """The agent's worker channel: it is sent on between polls, which may swallow the signal of a message."""
    party = place.party()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.bind("inproc://workers")
        dealer.routing_id = b"w1"
        dealer.connect("inproc://workers")
        for number in range(200):
            dealer.send(b"%d" % number)
            if number:
                router.send_multipart([b"w1", b"x"])
            assert party.carrier.poll(None, [router]) == [FdReady(router)]
            assert router.recv_multipart(zmq.NOBLOCK) == [b"w1", b"%d" % number]
        assert party.carrier.poll(0, [router]) == []
        party.carrier.poll(0)


# ------------------------------------------------------------------------------------------------------- keys


@tcp_kinds
def test_a_key_that_is_not_listed_is_refused_on_both_sides(place: Place) -> None:
    server, address = place.server({OTHER.public: "user"})
    client = place.party(CLIENT)
    client.carrier.dial(1, address, SERVER.public)
    place.until(lambda: client.refusals() and server.refusals(), "the refusal on both sides")
    assert client.refusals()[0].link == 1
    assert "does not accept our key" in client.refusals()[0].reason
    assert (server.refusals()[0].link, server.refusals()[0].key) == (None, CLIENT.public)
    assert CLIENT.public.decode() in server.refusals()[0].reason
    assert not client.carrier.send(1, b"x")
    assert not client.of(LinkUp)
    assert not server.frames


@tcp_kinds
def test_the_list_is_asked_in_each_handshake(place: Place) -> None:
    server, address = place.server({})
    client = place.party(CLIENT)
    client.carrier.dial(1, address, SERVER.public)
    place.until(client.refusals)
    client.carrier.hangup(1)
    server.carrier.set_allowed({CLIENT.public: "peer"})
    client.carrier.dial(2, address, SERVER.public)
    place.until(lambda: client.ups(2))
    server.carrier.set_allowed({})
    client.carrier.send(2, b"an open connection has the key that it came with")
    place.until(lambda: server.frames)
    assert server.of(PacketIn)[0].key == CLIENT.public


@tcp_kinds
def test_a_wrong_server_key_is_refused_on_both_sides(place: Place) -> None:
    server, address = place.server()
    client = place.party(CLIENT)
    client.carrier.dial(1, address, OTHER.public)
    place.until(lambda: client.refusals() and server.refusals(), "the refusal on both sides")
    assert "has another key than the one expected" in client.refusals()[0].reason
    assert server.refusals()[0].key is None
    assert not client.of(LinkUp)
    client.carrier.hangup(1)
    client.carrier.dial(2, address, SERVER.public)
    place.until(lambda: client.ups(2))


@pytest.mark.parametrize("place", ["zeromq-tcp"], indirect=True)
def test_a_tunnel_to_a_party_that_is_away_is_no_wrong_key(place: Place) -> None:
    """It takes connections and breaks them off, as somebody with another key would; but nobody greets."""
    server, address = place.server({CLIENT.public: "user"})
    with Proxy(address) as proxy:
        proxy.target = "tcp://127.0.0.1:9"
        client = place.party(CLIENT)
        client.carrier.dial(1, proxy.address, SERVER.public)
        place.until(lambda: any("nobody answers behind" in down.reason for down in client.of(LinkDown)))
        proxy.target = address
        place.until(lambda: client.ups(1))
        assert not client.refusals()
        client.carrier.send(1, b"x")
        place.until(lambda: server.frames == [b"x"])


# ------------------------------------------------------------------------------------------------- strangers


@zeromq_tcp
@pytest.mark.parametrize(
    "junk", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\xff" * 1000, os.urandom(5000)]
)
def test_garbage_on_the_port_harms_nobody(place: Place, junk: bytes) -> None:
    """F11."""
    client, server, address = place.linked()
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(junk)
        client.carrier.send(1, b"x")
        place.until(lambda: server.frames == [b"x"])
        place.poll()


@zeromq_kinds
def test_an_oversize_frame_costs_its_sender_the_connection(place: Place) -> None:
    """F11."""
    client, server, address = place.linked()
    other = place.party()
    other.carrier.dial(1, address, place.server_key)
    place.until(lambda: other.ups(1))
    client.carrier.send(1, bytes(MAX_FRAME_BYTES + 1))
    place.until(lambda: client.downs(1) >= 1, "the end of the connection", 30.0)
    other.carrier.send(1, b"x")
    place.until(lambda: server.frames == [b"x"])


@zeromq_kinds
def test_messages_of_several_parts_are_one_frame_that_is_no_packet(place: Place) -> None:
    """F11."""
    server, address = place.server()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        if place.tcp:
            dealer.curve_serverkey = SERVER.public
            dealer.curve_publickey, dealer.curve_secretkey = CLIENT
        dealer.connect(address)
        dealer.send_multipart([b"one", b"two", b"three"])
        dealer.send_multipart([b"", b""])
        dealer.send(b"whole")
        place.until(lambda: len(server.frames) == 3)
        assert server.frames == [b"", b"", b"whole"]
        link = server.of(PacketIn)[0].link
        server.carrier.send(link, b"answer")
        place.until(lambda: dealer.poll(10))
        assert dealer.recv() == b"answer"


@zeromq_kinds
def test_a_routing_id_in_use_cannot_be_taken_over(place: Place) -> None:
    """F11."""
    client, server, address = place.linked()
    client.carrier.send(1, b"mine")
    place.until(lambda: server.frames)
    link = server.of(PacketIn)[0].link
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        try:
            dealer.routing_id = link[1]  # type: ignore[index]
        except zmq.ZMQError:
            return  # ZeroMQ itself refuses names that it gives out
        dealer.connect(address)
        dealer.send(b"stolen")
        server.carrier.send(link, b"yours")
        place.until(lambda: client.frames == [b"yours"])


# --------------------------------------------------------------------------------------------------- the end


def test_close_is_final_idempotent_and_leaves_nothing(place: Place) -> None:
    client, server, _ = place.linked()
    client.carrier.send(1, b"x")
    place.until(lambda: server.frames)
    before = len(os.listdir("/proc/self/fd"))
    for party in (client, server):
        party.carrier.close()
        party.carrier.close()
        party.carrier.wake()
    assert len(os.listdir("/proc/self/fd")) < before


def test_closing_lets_the_last_frames_go(place: Place) -> None:
    client, server, _ = place.linked()
    client.carrier.send(1, b"last words")
    client.carrier.close()
    place.parties.remove(client)
    place.until(lambda: server.frames == [b"last words"])


def test_an_idle_carrier_does_not_wake_up(place: Place) -> None:
    client, server, _ = place.linked()
    client.carrier.send(1, b"x")
    place.until(lambda: server.frames)
    place.until(lambda: not place.poll(), "silence")
    for party in (client, server):
        assert party.carrier.poll(0.3) == []
        began = time.process_time()
        assert party.carrier.poll(0.3) == []
        assert time.process_time() - began < 0.1


def test_a_carrier_can_be_made_after_a_fork() -> None:
    """Workers are forked: what the parent had is not used there, and a new one works."""
    code = (
        "import os\n"
        "from gcref.carriers.zeromq import ZeroMQCarrier\n"
        "ZeroMQCarrier().close()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    carrier = ZeroMQCarrier(); carrier.wake(); assert carrier.poll(None) == []; carrier.close()\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_fake_and_the_real_one_are_carriers() -> None:
    """Held by the type checker; here only that both say it."""
    from gcref.carriers.memory import MemoryCarrier

    assert "Carrier" in (ZeroMQCarrier.__doc__ or "")
    assert "Carrier" in (MemoryCarrier.__doc__ or "")
