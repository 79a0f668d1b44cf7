"""The bulk thread over real sockets: what provider, sink and control may rely on, over ipc and over TCP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from gcref.brains.transfer_events import PullReason
from gcref.brains.transfer_windows import RANGE_BYTES
from gcref.carriers import keys
from gcref.carriers.bulk import links as bulk_links
from gcref.carriers.bulk import serving as bulk_serving
from gcref.carriers.bulk.link import BulkIdentity, Requester, write_header
from gcref.carriers.bulk.ports import Pulled
from gcref.carriers.bulk.thread import BulkThread
from gcref.carriers.mail.memory import Post
from gcref.errors import AuthError, ConfigError
from gcref.wire.messages import BULK_HELLO, CHUNK, ECHO_ID, FETCH, MODE_BYTES, MODE_INTO, MODE_PATH, SUBMIT
from tests.contract.bulk_parties import MB, TOKEN, Party, Place, X, Y, blob, some_parties
from tests.support.proxy import Proxy
from tests.support.waiting import patience, wait_until


@pytest.fixture
def post() -> Post:
    """The broker, in memory."""
    return Post()


@pytest.fixture
def parties(tmp_path: Path, post: Post) -> Iterator[Callable[..., Party]]:
    """Makes parties; they end with the test."""
    with some_parties(tmp_path, post) as make:
        yield make


@pytest.fixture(params=["ipc", "direct", "broker"])
def carrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(parties: Callable[..., Party], carrier: str) -> tuple[Party, Party]:
    """(site, asker): the asker has dialled the site, which knows its key."""
    asker = parties(b"a")
    site = parties(b"s", {asker.keys.public: "user"})
    asker.connect(site, site.listen(carrier), carrier, "user")
    return site, asker


# --------------------------------------------------------------------------------------------------- bytes move


@pytest.mark.parametrize("size", [0, 1, 100_000, RANGE_BYTES, 20 * MB + 13])
def test_bytes_arrive_exactly(pair: tuple[Party, Party], carrier: str, size: int) -> None:
    site, asker = pair
    site.place.objects[X, 3] = data = blob(size)
    asker.bulk.pull(X, 3, size, site.id)
    assert asker.pulled() == Pulled(X, 3, site.id, size, {carrier: size})
    assert asker.place.received == {X: data}
    assert asker.bulk.counters() == {(site.id, carrier, "in"): size}
    wait_until(lambda: site.bulk.counters() == {(asker.id, carrier, "out"): size})
    assert asker.bulk.progress(X) is None


def test_a_listener_pulls_over_the_link_that_the_other_side_dialled(
    pair: tuple[Party, Party], carrier: str
) -> None:
    """An upload: the client dials, and the site fetches."""
    site, client = pair
    client.place.objects[X, 1] = data = blob(5 * MB)
    site.bulk.pull(X, 1, 5 * MB, client.id)
    assert site.pulled() == Pulled(X, 1, client.id, 5 * MB, {carrier: 5 * MB})
    assert site.place.received == {X: data}
    (requester, *_) = client.place.requesters
    assert (requester.party, requester.role, requester.carrier) == (site.id, "user", carrier)
    assert requester.key == site.keys.public


def test_both_ways_at_once_over_one_link(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    site.place.objects[X, 1] = blob(12 * MB, 3)
    asker.place.objects[Y, 1] = blob(12 * MB, 5)
    asker.bulk.pull(X, 1, 12 * MB, site.id)
    site.bulk.pull(Y, 1, 12 * MB, asker.id)
    assert (asker.pulled().id, site.pulled().id) == (X, Y)
    assert asker.place.received[X] == blob(12 * MB, 3)
    assert site.place.received[Y] == blob(12 * MB, 5)


def test_many_pulls_share_the_link(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    wanted = {bytes([number + 1]) * 16: blob(1 + 30_011 * number, number + 1) for number in range(60)}
    wanted[X] = blob(40 * MB)
    site.place.objects.update({(id, 1): data for id, data in wanted.items()})
    asker.bulk.pull(X, 1, 40 * MB, site.id)
    for id, data in wanted.items():
        asker.bulk.pull(id, 1, len(data), site.id)
    order = [asker.pulled().id for _ in wanted]
    assert asker.place.received == wanted
    assert order.index(X) > 30, "small ones do not wait behind the large one"


def test_a_pull_may_be_asked_before_anybody_is_reached(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a")
    site.place.objects[X, 1] = blob(MB)
    asker.bulk.pull(X, 1, MB, site.id)
    assert asker.bulk.take() == []
    asker.connect(site, site.listen("ipc"), "ipc")
    assert asker.pulled().size == MB


def test_a_site_that_comes_up_later_is_reached(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a")
    asker.connect(site, f"ipc://{site.folder}/bulk", "ipc")
    wait_until(
        lambda: any("nobody answers" in link.get("error", "") for link in asker.bulk.describe(site.id))
    )
    site.listen("ipc")
    site.place.objects[X, 1] = blob(MB)
    asker.bulk.pull(X, 1, MB, site.id)
    assert asker.pulled().size == MB


def test_a_range_is_sent_from_where_it_lies_and_released_once(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    site.place.objects[X, 1] = blob(9 * RANGE_BYTES + 5)
    asker.bulk.pull(X, 1, 9 * RANGE_BYTES + 5, site.id)
    asker.pulled()
    assert len(site.place.readings) == 10
    wait_until(lambda: all(reading.released for reading in site.place.readings))
    assert {reading.released for reading in site.place.readings} == {1}
    assert {reading.thread for reading in site.place.readings} == {"gcref-bulk"}


@pytest.mark.parametrize("carrier", ["ipc", "direct"])
def test_a_buffer_is_not_released_while_the_network_holds_it(pair: tuple[Party, Party], carrier: str) -> None:
    """A party that asks and does not listen: what it asked for waits here, and stays as it is."""
    site, asker = pair
    site.place.objects[X, 1] = blob(MB)
    with raw_party(site, asker, carrier) as (sulker, hello):
        sulker.send(write_header(hello))
        for number in range(100):
            sulker.send(write_header([FETCH, number, X, 1, 0, MB, 0, None]))
        wait_until(lambda: len(site.place.readings) == 100)
        # Somebody else's question, answered: the site has been through its rounds since, and released what it may.
        asker.bulk.pull(ECHO_ID, 0, 10, site.id)
        asker.pulled()
        assert sum(not reading.released for reading in site.place.readings) > 50
        for _ in range(101):
            assert sulker.poll(int(patience(5000)))
            sulker.recv_multipart()
        wait_until(lambda: all(reading.released == 1 for reading in site.place.readings))


# --------------------------------------------------------------------------------------------- no bytes move


def test_a_file_is_adopted_within_a_machine(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a")
    asker.connect(site, site.listen("ipc"), "ipc")
    site.place.objects[X, 1] = blob(3 * MB)
    asker.bulk.pull(X, 1, 3 * MB, site.id, mode=MODE_PATH)
    assert asker.pulled() == Pulled(X, 1, site.id, 3 * MB, {"ipc": 3 * MB})
    assert asker.place.received == {X: blob(3 * MB)}
    assert (site.place.reads, list(asker.folder.glob("*.linked"))) == (
        0,
        [asker.folder / f"{X.hex()}.linked"],
    )


def test_an_upload_is_written_in_place_within_a_machine(parties: Callable[..., Party]) -> None:
    site, client = parties(b"s"), parties(b"c")
    client.connect(site, site.listen("ipc"), "ipc")
    client.place.objects[X, 1] = blob(3 * MB)
    site.bulk.pull(X, 1, 3 * MB, client.id, mode=MODE_INTO)
    assert site.pulled() == Pulled(X, 1, client.id, 3 * MB, {"ipc": 3 * MB})
    assert site.place.received == {X: blob(3 * MB)}
    assert client.place.reads == 0


@pytest.mark.parametrize("mode", [MODE_PATH, MODE_INTO])
def test_what_cannot_be_shared_comes_as_bytes(parties: Callable[..., Party], mode: int) -> None:
    """Two containers may share a socket and no file system."""
    site, asker = parties(b"s"), parties(b"a")
    asker.connect(site, site.listen("ipc"), "ipc")
    site.place.is_far = asker.place.is_far = True
    site.place.objects[X, 1] = blob(3 * MB)
    asker.bulk.pull(X, 1, 3 * MB, site.id, mode=mode)
    asker.pulled()
    assert asker.place.received == {X: blob(3 * MB)}
    assert asker.place.aborted == asker.place.shared, "a file that was handed out is given up"


def test_an_upload_of_another_size_is_no_object(parties: Callable[..., Party]) -> None:
    site, client = parties(b"s"), parties(b"c")
    client.connect(site, site.listen("ipc"), "ipc")
    client.place.objects[X, 1] = blob(MB + 1)
    site.bulk.pull(X, 1, MB, client.id, mode=MODE_INTO)
    assert site.failed().reason is PullReason.NOT_FOUND
    assert site.place.received == {}
    assert site.place.aborted == site.place.shared


def test_over_tcp_files_are_not_shared(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a")
    site.bulk.set_allowed({asker.keys.public: "user"})
    asker.connect(site, site.listen("direct"))
    site.place.objects[X, 1] = blob(MB)
    asker.bulk.pull(X, 1, MB, site.id, mode=MODE_PATH)
    assert asker.pulled().carriers == {"direct": MB}


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("raises", "reason"),
    [
        (KeyError("gone"), PullReason.NOT_FOUND),
        (AuthError("not yours"), PullReason.REFUSED),
        (OSError("the disk is broken"), PullReason.SOURCE),
        (ZeroDivisionError("a defect"), PullReason.SOURCE),
    ],
)
@pytest.mark.parametrize("mode", [MODE_BYTES, MODE_PATH])
def test_what_the_provider_raises_is_the_reason(
    pair: tuple[Party, Party], raises: BaseException, reason: PullReason, mode: int
) -> None:
    site, asker = pair
    site.place.raises = raises
    asker.bulk.pull(X, 1, MB, site.id, mode=mode)
    failed = asker.failed()
    assert failed.reason is reason
    assert str(raises) in failed.message
    site.place.raises = None
    site.place.objects[X, 1] = blob(MB)
    asker.bulk.pull(X, 1, MB, site.id)
    asker.pulled()


def test_another_attempt_is_refused(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    site.place.objects[X, 2] = blob(MB)
    asker.bulk.pull(X, 1, MB, site.id)
    assert asker.failed().reason is PullReason.NOT_FOUND


def test_another_size_is_refused(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    site.place.objects[X, 1] = blob(MB)
    asker.bulk.pull(X, 1, MB + 1, site.id)
    assert asker.failed().reason is PullReason.NOT_FOUND
    assert asker.place.received == {}
    wait_until(lambda: all(reading.released == 1 for reading in site.place.readings))


@pytest.mark.parametrize("way", ["direct", "broker"])
def test_a_peer_needs_a_token(parties: Callable[..., Party], way: str) -> None:
    asker = parties(b"a")
    site = parties(b"s", {asker.keys.public: "peer"})
    asker.connect(site, site.listen(way), way)
    site.place.token = TOKEN
    site.place.objects[X, 1] = blob(MB)
    asker.bulk.pull(X, 1, MB, site.id)
    assert asker.failed().reason is PullReason.REFUSED
    assert site.place.requesters == [], "without a token nobody is even asked"
    asker.bulk.pull(X, 1, MB, site.id, b"w" * 16)
    assert asker.failed().reason is PullReason.REFUSED
    asker.bulk.pull(X, 1, MB, site.id, TOKEN)
    asker.pulled()
    assert site.place.requesters[-1] == Requester(asker.id, "endpoint", asker.keys.public, "peer", way)


@pytest.mark.parametrize("way", ["direct", "broker"])
def test_who_is_dialled_is_a_peer_unless_said_otherwise(parties: Callable[..., Party], way: str) -> None:
    asker = parties(b"a")
    site = parties(b"s", {asker.keys.public: "user"})
    asker.connect(site, site.listen(way), way)
    asker.place.objects[X, 1] = blob(MB)
    site.bulk.pull(X, 1, MB, asker.id)
    assert site.failed().reason is PullReason.REFUSED
    site.bulk.pull(X, 1, MB, asker.id, TOKEN)
    site.pulled()
    assert asker.place.requesters[-1].role == "peer"


def test_a_stranger_does_not_get_past_the_handshake(
    parties: Callable[..., Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_links, "REFUSED_RETRY_S", 0.3)
    site, stranger = parties(b"s"), parties(b"a", no_link_s=0.2)
    site.place.objects[X, 1] = blob(MB)
    stranger.connect(site, site.listen("direct"))
    stranger.wait_link(site, "refused")
    stranger.bulk.pull(X, 1, MB, site.id)
    assert stranger.failed().reason in (PullReason.REFUSED, PullReason.UNREACHABLE)
    assert site.bulk.describe(stranger.id) == []
    site.bulk.set_allowed({stranger.keys.public: "user"})
    stranger.wait_link(site)
    stranger.bulk.pull(X, 1, MB, site.id)
    stranger.pulled()


@pytest.mark.parametrize("way", ["direct", "broker"])
def test_a_key_that_is_taken_off_the_list_has_no_rights_on_open_links(
    parties: Callable[..., Party], way: str
) -> None:
    asker = parties(b"a")
    site = parties(b"s", {asker.keys.public: "user"})
    asker.connect(site, site.listen(way), way)
    site.place.objects[X, 1] = blob(40 * MB)
    asker.place.on_write = lambda: site.bulk.set_allowed({})
    asker.bulk.pull(X, 1, 40 * MB, site.id)
    assert asker.failed().reason is PullReason.REFUSED
    assert [link["state"] for link in site.bulk.describe(asker.id)] == ["down"]


def test_a_wrong_server_key_is_not_talked_to(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a")
    site.bulk.set_allowed({asker.keys.public: "user"})
    asker.bulk.connect(site.id, site.listen("direct"), keys.generate().public, "direct")
    asker.wait_link(site, "refused")


@pytest.mark.parametrize("carrier", ["ipc", "direct"])
def test_another_party_at_the_address_is_not_used(parties: Callable[..., Party], carrier: str) -> None:
    site, other, asker = parties(b"s"), parties(b"o"), parties(b"a")
    other.bulk.set_allowed({asker.keys.public: "user"})
    address = other.listen(carrier)
    asker.bulk.connect(site.id, address, other.keys.public if carrier == "direct" else None, carrier)
    asker.wait_link(site, "refused")
    (facts,) = asker.bulk.describe(site.id)
    assert "is party" in facts["error"]


def test_tcp_without_a_key_is_not_dialled(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a")
    asker.bulk.connect(site.id, site.listen("direct"), None, "direct")
    asker.connect(site, site.listen("ipc"), "ipc")
    asker.wait_link(site)
    assert [link["carrier"] for link in asker.bulk.describe(site.id)] == ["ipc"]


def test_only_a_source_with_the_right_key_is_asked(parties: Callable[..., Party]) -> None:
    """A party that may come in, and says that it is another one, does not get to feed us its bytes."""
    liar, real, asker = parties(b"s"), parties(b"s"), parties(b"a")
    asker.bulk.set_allowed({liar.keys.public: "user", real.keys.public: "user"})
    address = asker.listen("direct")
    liar.place.objects[X, 1], real.place.objects[X, 1] = blob(MB, 3), blob(MB)
    liar.connect(asker, address, role="user")
    asker.wait_link(liar)
    asker.bulk.pull(X, 1, MB, real.id, key=real.keys.public)
    real.connect(asker, address, role="user")
    asker.pulled()
    assert asker.place.received == {X: blob(MB)}
    assert liar.place.reads == 0


def test_a_sink_that_fails_costs_one_pull_and_says_why(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    site.place.objects[X, 1] = site.place.objects[Y, 1] = blob(2 * MB)

    def fail() -> None:
        raise OSError("no space left")

    asker.place.on_write = fail
    asker.bulk.pull(X, 1, 2 * MB, site.id)
    failed = asker.failed()
    assert failed.reason is PullReason.STORE
    assert isinstance(failed.cause, OSError)
    assert len(asker.place.aborted) == 1
    asker.place.on_write = lambda: None
    asker.bulk.pull(Y, 1, 2 * MB, site.id)
    assert asker.pulled().id == Y


# ------------------------------------------------------------------------------------------------ broken links


def test_a_cut_link_is_resumed_where_it_broke(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a")
    site.bulk.set_allowed({asker.keys.public: "user"})
    size = 48 * RANGE_BYTES
    site.place.objects[X, 1] = blob(size)
    with Proxy(site.listen("direct")) as proxy:
        asker.connect(site, proxy.address)
        asker.bulk.pull(X, 1, size, site.id)
        wait_until(lambda: (asker.bulk.progress(X) or (0,))[0] >= 16 * MB)
        proxy.cut()
        wait_until(lambda: asker.bulk.describe(site.id)[0]["state"] == "dialling")
        wait_until(lambda: all(link["state"] != "up" for link in site.bulk.describe(asker.id)))
        before = asker.bulk.progress(X)
        assert before is not None
        assert before[0] < size
        proxy.restore()
        asker.pulled()
    assert asker.place.received[X] == blob(size)
    assert site.place.reads <= 48 + 16 + 1, "only what was in flight is asked again"
    assert asker.place.aborted == []
    wait_until(lambda: all(reading.released == 1 for reading in site.place.readings))


def test_a_broken_carrier_is_replaced_by_another(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a")
    site.bulk.set_allowed({asker.keys.public: "user"})
    size = 48 * RANGE_BYTES
    site.place.objects[X, 1] = blob(size)
    with Proxy(site.listen("direct")) as proxy:
        asker.connect(site, proxy.address)
        asker.bulk.pull(X, 1, size, site.id)
        wait_until(lambda: (asker.bulk.progress(X) or (0,))[0] >= 8 * MB)
        proxy.freeze()
        asker.connect(site, site.listen("ipc"), "ipc")
        asker.wait_link(site)
        proxy.cut()
        pulled = asker.pulled()
    assert asker.place.received[X] == blob(size)
    assert set(pulled.carriers) == {"direct", "ipc"}
    assert sum(pulled.carriers.values()) == size


def test_a_frozen_link_ends_in_a_timeout(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a", range_timeout_s=0.1)
    site.bulk.set_allowed({asker.keys.public: "user"})
    site.place.objects[X, 1] = blob(MB)
    with Proxy(site.listen("direct")) as proxy:
        asker.connect(site, proxy.address)
        asker.wait_link(site)
        proxy.freeze()
        asker.bulk.pull(X, 1, MB, site.id)
        assert asker.failed().reason is PullReason.TIMEOUT
        assert len(asker.place.aborted) == 1
        proxy.thaw()


def test_a_frozen_link_is_noticed_by_both_sides_and_the_pull_goes_on_after_it(
    parties: Callable[..., Party],
) -> None:
    """F4: no FIN, and nothing comes: both hang up after three heartbeats. No range has used up its patience by then."""
    site, asker = parties(b"s", heartbeat_s=0.1), parties(b"a", heartbeat_s=0.1)
    site.bulk.set_allowed({asker.keys.public: "user"})
    size = 48 * RANGE_BYTES
    site.place.objects[X, 1] = blob(size)
    with Proxy(site.listen("direct")) as proxy:
        asker.connect(site, proxy.address)
        asker.bulk.pull(X, 1, size, site.id)
        wait_until(lambda: (asker.bulk.progress(X) or (0,))[0] >= 8 * MB)
        proxy.freeze()
        wait_until(lambda: asker.bulk.describe(site.id)[0]["state"] != "up")
        wait_until(lambda: all(link["state"] != "up" for link in site.bulk.describe(asker.id)))
        proxy.cut()
        proxy.thaw()
        proxy.restore()
        asker.pulled()
    assert asker.place.received[X] == blob(size)
    assert site.place.reads <= 48 + 16 + 1, "only what was in flight is asked again"
    assert asker.place.aborted == []


def test_a_party_that_computes_is_not_taken_for_a_frozen_one(parties: Callable[..., Party]) -> None:
    """Signs of life come from threads that need no interpreter."""
    heartbeat_s = patience(0.1)  # three of them are more than a busy machine has threads wait
    site, asker = parties(b"s", heartbeat_s=heartbeat_s), parties(b"a", heartbeat_s=heartbeat_s)
    site.bulk.set_allowed({asker.keys.public: "user"})
    site.place.objects[X, 1] = blob(MB)
    with Proxy(site.listen("direct")) as proxy:

        def compute() -> None:
            for _ in range(8):  # signs of life that pass, for several times as long as they may be missing
                before = proxy.bytes_down
                wait_until(lambda before=before: proxy.bytes_down > before)  # type: ignore[misc]

        site.place.on_read = compute
        asker.connect(site, proxy.address)
        asker.wait_link(site)
        (link,) = asker.bulk.describe(site.id)
        asker.bulk.pull(X, 1, MB, site.id)
        asker.pulled()
        assert asker.bulk.describe(site.id) == [link]


def _wait_for(moment: threading.Event) -> None:
    assert moment.wait(patience(20))


def test_a_source_that_is_started_again_elsewhere_goes_on_where_it_was(
    parties: Callable[..., Party], tmp_path: Path
) -> None:
    """F3: its next process has the same key and maybe another port; only what was in flight is asked again."""
    site, asker = parties(b"s"), parties(b"a")
    size = 96 * RANGE_BYTES
    site.bulk.set_allowed({asker.keys.public: "user"})
    site.place.objects[X, 1] = blob(size)
    dying = threading.Event()
    site.place.on_read = lambda: None if site.place.reads < 24 else _wait_for(dying)
    asker.connect(site, site.listen("direct"))
    asker.bulk.pull(X, 1, size, site.id)
    wait_until(lambda: (asker.bulk.progress(X) or (0,))[0] >= 16 * MB)
    closing = threading.Thread(target=site.bulk.close)
    closing.start()
    wait_until(lambda: site.bulk._closing)
    dying.set()
    closing.join()
    wait_until(lambda: asker.bulk.describe(site.id)[0]["state"] == "dialling")
    before = asker.bulk.progress(X)
    assert before is not None
    assert 16 * MB <= before[0] < size
    assert asker.bulk.take() == []
    me = BulkIdentity(site.id, "endpoint", site.keys)
    site.bulk = BulkThread(
        me, site.place, site.place, wake=site.woken.set, allowed={asker.keys.public: "user"}
    )
    site.bulk.start()
    site.place.reads = 0
    asker.bulk.reach(site.id, [("direct", site.listen("direct"), site.keys.public)])
    asker.pulled()
    assert asker.place.received[X] == blob(size)
    assert site.place.reads <= 96 - before[0] // RANGE_BYTES, "what was here is not asked again"
    assert len(asker.bulk.describe(site.id)) == 1, "nobody dials the old address any more"


@pytest.mark.parametrize("carrier", ["ipc", "direct"])
def test_a_listener_notices_the_end_of_a_party_that_came_in(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    asker.wait_link(site)
    wait_until(lambda: site.bulk.describe(asker.id))
    asker.bulk.close()
    wait_until(lambda: all(link["state"] != "up" for link in site.bulk.describe(asker.id)))


def test_nobody_there_ends_in_unreachable(parties: Callable[..., Party]) -> None:
    site, asker = parties(b"s"), parties(b"a", no_link_s=0.3)
    asker.connect(site, f"ipc://{site.folder}/nobody", "ipc")
    asker.bulk.pull(X, 1, MB, site.id)
    failed = asker.failed()
    assert failed.reason is PullReason.UNREACHABLE
    assert "nobody answers" in failed.message


def test_disconnect_ends_the_links_and_connect_makes_them_again(
    pair: tuple[Party, Party], carrier: str
) -> None:
    site, asker = pair
    asker.wait_link(site)
    asker.bulk.disconnect(site.id)
    wait_until(lambda: asker.bulk.describe(site.id) == [])
    site.place.objects[X, 1] = blob(MB)
    asker.bulk.pull(X, 1, MB, site.id)
    assert asker.bulk.take() == []
    listener = [link["address"] for link in site.bulk.describe(asker.id)]
    address = listener[0] if listener and carrier != "broker" else site.listen(carrier)
    asker.connect(site, address, carrier)
    asker.pulled()


def test_cancelled_pulls_are_not_reported(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    site.place.objects[X, 1] = site.place.objects[Y, 1] = blob(30 * MB)
    cancelled = threading.Event()

    def cancel() -> None:
        asker.bulk.cancel(X)
        cancelled.set()

    asker.place.on_write = cancel
    asker.bulk.pull(X, 1, 30 * MB, site.id)
    assert cancelled.wait(patience(10))
    asker.place.on_write = lambda: None
    asker.bulk.pull(Y, 1, 30 * MB, site.id)
    assert asker.pulled().id == Y
    assert len(asker.place.aborted) == 1
    assert X not in asker.place.received


# -------------------------------------------------------------------------------------------------- bad manners


@pytest.mark.parametrize("carrier", ["ipc", "direct"])
def test_garbage_is_dropped_and_harms_nobody(pair: tuple[Party, Party], carrier: str) -> None:
    site, asker = pair
    asker.wait_link(site)
    site.place.objects[X, 1] = blob(MB)
    with raw_party(site, asker, carrier) as (vandal, hello):
        garbage = [
            [b""],
            [b"\x01"],
            [b"\x63hello"],
            [b"\x01\xc1\xc1"],
            [os.urandom(1000)],
            [b"\x01" + b"\x91" * 300_000],
            [write_header([FETCH, 1, X, 1, 0, 100, 0, None])],  # before a HELLO
            [write_header([*hello[:4], asker.keys.public])],  # the key of another
            [write_header([BULK_HELLO, 99, *hello[2:]])],
            [write_header(hello)],
            [write_header(hello), b"more", b"frames"],
            [write_header([FETCH, 1, X])],
            [write_header([FETCH, 2, X, 1, 0, 1 << 61, 0, None])],
            [write_header([FETCH, 3, X, 1, 1 << 61, 1, 0, None])],
            [write_header([FETCH, 4, X, 1, 0, 10, 2, None, "/nowhere/at/all"])],
            [write_header([CHUNK, 1, X, 1, 0, 100, 0, None, None]), b"x" * 100],
            [write_header([SUBMIT, 1, 2, 3])],
        ]
        for frames in garbage:
            vandal.send_multipart(frames)
        asker.bulk.pull(X, 1, MB, site.id)
        asker.pulled()
        # Whoever has said who it is gets answers to well-formed questions, whatever else it says.
        vandal.send(write_header([FETCH, 9, X, 1, 0, 100, 0, None]))
        answers: list[list[bytes]] = []

        def is_answered() -> bool:
            while vandal.poll(0):
                answers.append(vandal.recv_multipart())
            return bool(answers) and answers[-1][1:] == [blob(100)]

        wait_until(is_answered, what=lambda: repr(answers))


@contextlib.contextmanager
def raw_party(site: Party, known: Party, carrier: str) -> Iterator[tuple[zmq.Socket[bytes], list[Any]]]:
    """A bare socket, connected to the site with a key that is allowed, and the HELLO that would fit."""
    pair = keys.generate()
    site.bulk.set_allowed({known.keys.public: "user", pair.public: "user"})
    address = site.bulk.listen("tcp://127.0.0.1:*") if carrier == "direct" else f"ipc://{site.folder}/bulk"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.rcvhwm = 1
        if carrier == "direct":
            socket.curve_serverkey = site.keys.public
            socket.curve_publickey, socket.curve_secretkey = pair
        socket.connect(address)
        yield socket, [BULK_HELLO, 1, b"v" * 16, "client", pair.public]
    finally:
        context.destroy(linger=0)


def test_a_taken_address_is_a_typed_error(parties: Callable[..., Party], tmp_path: Path) -> None:
    site, other = parties(b"s"), parties(b"o")
    address = site.listen("direct")
    with pytest.raises(ConfigError, match=address) as caught:
        other.bulk.listen(address)
    assert caught.value.remedy
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="0700"):
        other.bulk.listen(f"ipc://{tmp_path}/open/bulk")
    with pytest.raises(ConfigError):
        other.bulk.listen(f"ipc://{tmp_path}/missing/bulk")
    with pytest.raises(ConfigError):
        other.bulk.listen("tcp://nowhere.invalid:1")
    assert other.listen("direct").startswith("tcp://127.0.0.1:")


def test_close_in_the_middle_aborts_and_releases(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    site.place.objects[X, 1] = blob(200 * MB)
    asker.bulk.pull(X, 1, 200 * MB, site.id)
    wait_until(lambda: asker.bulk.progress(X) not in (None, (0, 200 * MB, None)))
    site.bulk.close()
    assert all(reading.released == 1 for reading in site.place.readings)
    asker.bulk.close()
    assert len(asker.place.aborted) == len(asker.place.received) == 0 or len(asker.place.aborted) == 1
    assert asker.bulk.take() == []


def test_a_thread_that_was_never_started_can_be_closed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    bulk = BulkThread(BulkIdentity(X, "client", keys.generate()), place, place, wake=lambda: None)
    bulk.pull(X, 1, 1, Y)
    bulk.close()
    bulk.close()
    with pytest.raises(RuntimeError, match="ended"):
        bulk.listen("tcp://127.0.0.1:*")


def test_idle_costs_nothing(pair: tuple[Party, Party], parties: Callable[..., Party]) -> None:
    """No polling: with links up and a pull that waits for somebody else, the threads sleep while others work."""
    site, asker = pair
    asker.wait_link(site)
    asker.bulk.pull(X, 1, MB, b"n" * 16)
    asker.bulk.pull(ECHO_ID, 0, 10, site.id)
    asker.pulled()
    idle = [party.bulk._thread.native_id for party in pair]
    seen = [0]

    def switches() -> int:
        found = 0
        for thread in idle:
            status = Path(f"/proc/self/task/{thread}/status").read_text()
            found += sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)
        return found

    def is_settled() -> bool:
        before, seen[0] = seen[0], switches()
        return seen[0] == before

    busy, other = parties(b"b"), parties(b"o")
    other.connect(busy, busy.listen("ipc"), "ipc")
    wait_until(is_settled)
    before = switches()
    for _ in range(500):
        other.bulk.pull(ECHO_ID, 0, 1, busy.id)
        other.pulled()
    assert switches() - before <= 2


def test_the_echo_is_for_everybody_who_may_come_in(
    parties: Callable[..., Party], carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_serving, "ECHO_MAX_BYTES", 4 * MB)
    asker = parties(b"a")
    site = parties(b"s", {asker.keys.public: "peer"})
    asker.connect(site, site.listen(carrier), carrier)
    asker.bulk.pull(ECHO_ID, 0, 3 * MB + 1, site.id, mode=MODE_PATH)
    assert asker.pulled() == Pulled(ECHO_ID, 0, site.id, 3 * MB + 1, {carrier: 3 * MB + 1})
    assert asker.place.received == {ECHO_ID: bytes(3 * MB + 1)}
    assert site.place.requesters == [], "the provider is not asked"
    for attempt, size in ((1, 10), (0, 4 * MB + 1)):
        asker.bulk.pull(ECHO_ID, attempt, size, site.id)
        assert asker.failed().reason is PullReason.NOT_FOUND


# ------------------------------------------------------------------------------------------------------- speed

SOURCE = """
import json, os, socket, sys, threading
from gcref.carriers import keys
from gcref.carriers.bulk.link import BulkIdentity
from gcref.carriers.bulk.thread import BulkThread

size, client_key, address = int(sys.argv[1]), sys.argv[2].encode(), sys.argv[3]
data = memoryview(bytearray(os.urandom(1 << 20) * (size >> 20)))

class Range:
    def __init__(self, buffer): self.buffer = buffer
    def release(self): pass

class Provider:
    def read(self, id, attempt, offset, length, requester, token): return Range(data[offset : offset + length])

pair = keys.generate()
bulk = BulkThread(BulkIdentity(b"s" * 16, "endpoint", pair), Provider(), None, wake=int, allowed={client_key: "user"})
bulk.start()
listener = socket.create_server(("127.0.0.1", 0))
print(json.dumps([bulk.listen(address), pair.public.decode(), listener.getsockname()[1]]), flush=True)

def serve():
    while True:
        there, _ = listener.accept()
        there.sendall(data)
        there.close()

threading.Thread(target=serve, daemon=True).start()
sys.stdin.read()
bulk.close()
"""


class Warm:
    """A sink whose one object is memory that has been touched before."""

    def __init__(self, size: int) -> None:
        self.memory = memoryview(bytearray(b"\1") * size)

    def begin(self, id: bytes, attempt: int, size: int) -> Warm:
        return self

    def adopt(self, id: bytes, attempt: int, path: str, size: int) -> None:
        raise NotImplementedError

    def write(self, offset: int, data: Any) -> None:
        self.memory[offset : offset + len(data)] = data

    def share(self) -> str | None:
        return None

    def seal(self) -> None:
        pass

    def abort(self) -> None:
        pass


@pytest.mark.parametrize("carrier", ["ipc", "direct"])
def test_a_good_part_of_a_plain_copy(carrier: str, tmp_path: Path) -> None:
    """From process to process into warm memory, beside `sendall` → `recv_into` in the same run; the best of four."""
    size, rounds = 256 * MB, 4
    tmp_path.chmod(0o700)
    pair, sink, ended = keys.generate(), Warm(size), threading.Event()
    address = "tcp://127.0.0.1:*" if carrier == "direct" else f"ipc://{tmp_path}/bulk"
    command = [sys.executable, "-c", SOURCE, str(size), pair.public.decode(), address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as source:
        assert source.stdin is not None
        assert source.stdout is not None
        address, key, port = json.loads(source.stdout.readline())
        bulk = BulkThread(BulkIdentity(b"a" * 16, "client", pair), Place(tmp_path), sink, wake=ended.set)
        bulk.start()
        bulk.connect(b"s" * 16, address, key.encode(), carrier)
        best: dict[str, float] = {}
        for _ in range(rounds):
            for name, move in (("plain", plain_copy), ("ours", pull_copy)):
                started = time.perf_counter()
                move(sink.memory, port, bulk, ended)
                rate = size / 1e9 / (time.perf_counter() - started)
                best[name] = max(rate, best.get(name, 0.0))
        bulk.close()
        source.stdin.close()
    print(f"{carrier}: {best['ours']:.2f} GB/s, plain {best['plain']:.2f}")
    # On a quiet machine it is 0.3 to 0.4 with CURVE and above 1 over ipc; others may be using the cores.
    assert best["ours"] >= 0.12 * best["plain"]


def plain_copy(memory: memoryview, port: int, bulk: BulkThread, ended: threading.Event) -> None:
    with socket.create_connection(("127.0.0.1", port)) as there:
        at = 0
        while at < len(memory):
            at += there.recv_into(memory[at:])


def pull_copy(memory: memoryview, port: int, bulk: BulkThread, ended: threading.Event) -> None:
    ended.clear()
    bulk.pull(X, 1, len(memory), b"s" * 16)
    assert ended.wait(patience(60))
    (done,) = bulk.take()
    assert isinstance(done, Pulled), done
