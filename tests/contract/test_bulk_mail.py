"""Bulk through mailboxes: what the broker, and whoever else writes there, may do to a pull."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gcref.brains import transfer_windows
from gcref.brains.transfer_events import PullReason
from gcref.brains.transfer_windows import MAIL_WINDOW_BYTES, RANGE_BYTES
from gcref.carriers import keys
from gcref.carriers.bulk import mail as bulk_mail
from gcref.carriers.bulk.link import BulkIdentity, write_header
from gcref.carriers.bulk.mail import MailLink
from gcref.carriers.bulk.ports import Pulled, PullFailed
from gcref.carriers.bulk.thread import BulkThread
from gcref.carriers.mail import memory as memory_post
from gcref.carriers.mail.memory import MemoryMailbox, Post
from gcref.carriers.mail.post import BULK, address_of
from gcref.carriers.mail.seal import Sealer
from gcref.wire.messages import BULK_HELLO, CHUNK, ECHO_ID, FETCH, MODE_PATH, SUBMIT
from tests.contract.bulk_parties import MB, Party, Place, X, Y, blob, some_parties
from tests.support.proxy import Proxy
from tests.support.waiting import patience, wait_until

NEVER_S = 1e6
"""A patience with ranges that no test has: whatever is asked again was not asked because time was up."""

WINDOW_RANGES = MAIL_WINDOW_BYTES // RANGE_BYTES


@pytest.fixture
def post() -> Post:
    """The broker, in memory."""
    return Post()


@pytest.fixture
def parties(tmp_path: Path, post: Post) -> Iterator[Callable[..., Party]]:
    """Makes parties; they end with the test."""
    with some_parties(tmp_path, post) as make:
        yield make


@pytest.fixture
def pair(parties: Callable[..., Party]) -> tuple[Party, Party]:
    """(site, asker): the asker reaches the site through its mailbox, and never gives up on a range for its age."""
    asker = parties(b"a", range_timeout_s=NEVER_S)
    site = parties(b"s", {asker.keys.public: "user"}, range_timeout_s=NEVER_S)
    asker.connect(site, address_of(site.id), "broker", "user")
    return site, asker


def at_range(number: int, party: Party, do: Callable[[], object]) -> threading.Event:
    """Do something when this range has come, on the party's bulk thread. Returns what is set then."""
    count, done = [0], threading.Event()

    def note() -> None:
        count[0] += 1
        if count[0] == number:
            do()
            done.set()

    party.place.on_write = note
    return done


def state_of(party: Party, other: Party) -> dict[str, Any]:
    found = [link for link in party.bulk.describe(other.id) if link["carrier"] == "broker"]
    return found[0] if found else {"state": ""}


# ------------------------------------------------------------------------------------------------------- bounds


class Void:
    """A sink that keeps nothing."""

    def __init__(self) -> None:
        self.on_write: Callable[[], None] = lambda: None

    def begin(self, id: bytes, attempt: int, size: int) -> Void:
        return self

    def adopt(self, id: bytes, attempt: int, path: str, size: int) -> None:
        raise NotImplementedError

    def write(self, offset: int, data: Any) -> None:
        self.on_write()

    def share(self) -> str | None:
        return None

    def seal(self) -> None:
        pass

    def abort(self) -> None:
        pass


def test_what_is_on_its_way_is_bounded(
    parties: Callable[..., Party], post: Post, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size: neither the broker nor the two sides ever hold more than the window."""
    pair_of_keys, ended, void = keys.generate(), threading.Event(), Void()
    site = parties(b"s", {pair_of_keys.public: "peer"})
    me = b"a" * 16
    mailbox = MemoryMailbox(post, me, pair_of_keys)
    mailbox.use(post.access(me))
    bulk = BulkThread(
        BulkIdentity(me, "client", pair_of_keys), Place(tmp_path), void, wake=ended.set, mailbox=mailbox
    )
    depths: list[int] = []
    void.on_write = lambda: depths.append(post.depth(me))
    try:
        bulk.start()
        bulk.connect(site.id, address_of(site.id), site.keys.public, "broker")
        bulk.pull(ECHO_ID, 0, 150 * RANGE_BYTES, site.id)
        assert ended.wait(patience(60))
        assert isinstance(bulk.take()[0], Pulled)
    finally:
        bulk.close()
        mailbox.close()
    assert len(depths) == 150
    # What is handled together is asked anew range by range, and acknowledged in the end; and there was a greeting.
    assert max(depths) <= 2 * WINDOW_RANGES + 1
    assert site.mailbox.describe()["waiting_bytes"] == 0


def test_all_sources_share_what_may_be_on_its_way(parties: Callable[..., Party], post: Post) -> None:
    asker = parties(b"a")
    sites = [parties(name, {asker.keys.public: "user"}) for name in (b"p", b"q", b"r", b"s")]
    depths: list[int] = []
    asker.place.on_write = lambda: depths.append(post.depth(asker.id))
    for site in sites:
        site.place.objects[site.id, 1] = blob(20 * RANGE_BYTES, site.id[0])
        asker.connect(site, address_of(site.id), "broker")
        asker.bulk.pull(site.id, 1, 20 * RANGE_BYTES, site.id, b"t" * 16)
    for _ in sites:
        asker.pulled()
    for site in sites:
        assert asker.place.received[site.id] == blob(20 * RANGE_BYTES, site.id[0])
    assert max(depths) <= 2 * transfer_windows.MAIL_TOTAL_BYTES // RANGE_BYTES + len(sites)


def test_links_that_others_made_are_bounded(
    parties: Callable[..., Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_mail, "GUESTS_MAX", 3)
    askers = [parties(name) for name in (b"a", b"b", b"c", b"d", b"e")]
    site = parties(b"s", {asker.keys.public: "user" for asker in askers})
    site.place.objects[X, 1] = blob(MB)
    for asker in (*askers, askers[0]):
        asker.connect(site, address_of(site.id), "broker", "user")
        asker.bulk.pull(X, 1, MB, site.id)
        asker.pulled()
        known = [each for each in askers if site.bulk.describe(each.id)]
        assert len(known) <= 3
        assert asker in known, "the one that was heard longest ago goes"


# ------------------------------------------------------------------------------------------------ back-pressure


def test_answers_that_have_no_room_wait_for_it(
    pair: tuple[Party, Party], post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_post, "WAITING_MAX_BYTES", 2 * MB)
    site, asker = pair
    site.place.objects[X, 1] = blob(30 * MB)
    asker.bulk.pull(X, 1, 30 * MB, site.id)
    stuck = at_range(3, asker, lambda: post.fill(asker.id))
    assert stuck.wait(patience(10))
    wait_until(lambda: site.bulk._server.retry_at is not None, what="questions that wait")
    assert asker.bulk.take() == []
    post.drain(asker.id)
    assert asker.pulled().carriers == {"broker": 30 * MB}
    assert asker.place.received == {X: blob(30 * MB)}
    wait_until(lambda: site.bulk._server.retry_at is None)
    assert all(reading.released == 1 for reading in site.place.readings)


def test_questions_that_have_no_room_are_asked_again(
    pair: tuple[Party, Party], post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_post, "WAITING_MAX_BYTES", 1)
    monkeypatch.setattr(bulk_mail, "RETRY_S", 0.05)
    site, asker = pair
    site.place.objects[X, 1] = blob(30 * MB)
    asker.bulk.pull(X, 1, 30 * MB, site.id)
    stuck = at_range(3, asker, lambda: post.fill(site.id))
    assert stuck.wait(patience(10))
    wait_until(lambda: asker.mailbox.describe()["waiting_bytes"], what="a question that waits")
    wait_until(lambda: post.depth(asker.id) == 0)
    assert asker.bulk.take() == []
    post.drain(site.id)
    asker.pulled()
    assert asker.place.received == {X: blob(30 * MB)}


def test_a_question_that_does_not_leave_is_repeated_after_a_pause(
    parties: Callable[..., Party], post: Post
) -> None:
    """A mailbox that has no room for anybody, and says so by nothing but `False`."""
    refused = [0]

    class Busy(MemoryMailbox):
        def post(self, to: bytes, key: bytes, lane: int, *rest: Any) -> bool:
            if refused[0] < 5:
                refused[0] += 1
                return False
            return super().post(to, key, lane, *rest)

    def make_busy(party: bytes, pair: keys.KeyPair) -> MemoryMailbox:
        mailbox = Busy(post, party, pair)
        mailbox.use(post.access(party))
        return mailbox

    asker = parties(b"a", mailbox_for=make_busy, range_timeout_s=NEVER_S)
    site = parties(b"s", {asker.keys.public: "user"})
    site.place.objects[X, 1] = blob(12 * MB)
    asker.connect(site, address_of(site.id), "broker")
    asker.bulk.pull(X, 1, 12 * MB, site.id)
    asker.pulled()
    assert asker.place.received == {X: blob(12 * MB)}
    assert refused == [5]


# --------------------------------------------------------------------------------------------- broken mailboxes


def test_a_broker_that_goes_and_comes_costs_nothing_but_time(pair: tuple[Party, Party], post: Post) -> None:
    site, asker = pair
    site.place.objects[X, 1] = blob(30 * MB)
    asker.bulk.pull(X, 1, 30 * MB, site.id)
    gone = at_range(5, asker, post.stop)
    assert gone.wait(patience(10))
    wait_until(lambda: state_of(asker, site)["state"] == "dialling")
    assert "the broker has gone" in state_of(asker, site)["error"]
    received = asker.bulk.progress(X)
    assert received is not None
    assert received[2] is None
    post.start()
    assert asker.pulled().size == 30 * MB
    assert asker.place.received == {X: blob(30 * MB)}
    assert asker.place.aborted == []


def test_a_pull_waits_for_a_mailbox_as_for_any_link(parties: Callable[..., Party], post: Post) -> None:
    asker = parties(b"a", mailbox_for=lambda party, pair: MemoryMailbox(post, party, pair))
    site = parties(b"s", {asker.keys.public: "user"})
    site.place.objects[X, 1] = blob(MB)
    asker.connect(site, address_of(site.id), "broker")
    asker.bulk.pull(X, 1, MB, site.id)
    wait_until(lambda: "no mailbox yet" in state_of(asker, site).get("error", ""))
    assert isinstance(asker.mailbox, MemoryMailbox)
    asker.mailbox.use(post.access(asker.id))
    asker.pulled()


def test_without_a_mailbox_nobody_is_reached_through_one(
    parties: Callable[..., Party], tmp_path: Path
) -> None:
    site, ended, place = parties(b"s"), threading.Event(), Place(tmp_path)
    me = BulkIdentity(b"a" * 16, "client", keys.generate())
    bulk = BulkThread(me, place, place, wake=ended.set, no_link_s=0.1)
    try:
        bulk.start()
        bulk.connect(site.id, address_of(site.id), site.keys.public, "broker")
        bulk.pull(X, 1, MB, site.id)
        assert ended.wait(patience(10))
        (failed,) = bulk.take()
    finally:
        bulk.close()
    assert isinstance(failed, PullFailed)
    assert failed.reason is PullReason.UNREACHABLE
    assert "this side has no mailbox" in failed.message


def test_a_party_without_a_mailbox_is_out_of_reach_until_it_has_one(
    parties: Callable[..., Party], post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_mail, "RETRY_S", 0.02)
    asker = parties(b"a", no_link_s=0.2)
    site = parties(
        b"s", {asker.keys.public: "user"}, mailbox_for=lambda party, pair: MemoryMailbox(post, party, pair)
    )
    site.place.objects[X, 1] = blob(MB)
    asker.connect(site, address_of(site.id), "broker")
    asker.bulk.pull(X, 1, MB, site.id)
    failed = asker.failed()
    assert failed.reason is PullReason.UNREACHABLE
    assert "mailbox" in failed.message
    assert isinstance(site.mailbox, MemoryMailbox)
    site.mailbox.use(post.access(site.id))
    asker.wait_link(site)
    asker.bulk.pull(X, 1, MB, site.id)
    asker.pulled()


def test_a_dead_party_behind_its_mailbox_ends_in_a_timeout(parties: Callable[..., Party]) -> None:
    asker = parties(b"a", range_timeout_s=0.05)
    site = parties(b"s", {asker.keys.public: "user"})
    site.bulk.close()
    asker.connect(site, address_of(site.id), "broker")
    asker.bulk.pull(X, 1, MB, site.id)
    assert asker.failed().reason is PullReason.TIMEOUT


def test_whoever_was_started_anew_is_greeted_again(
    parties: Callable[..., Party], post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload, and the site has forgotten who reaches it: it hears so when it is reached once more."""
    monkeypatch.setattr(bulk_mail, "GREET_AGAIN_S", 0.0)
    client = parties(b"c")
    allowed = {client.keys.public: "user"}
    site = parties(b"s", allowed)
    client.connect(site, address_of(site.id), "broker", "user")
    site.wait_link(client)
    site.bulk.close()
    site.bulk = BulkThread(
        BulkIdentity(site.id, "endpoint", site.keys), site.place, site.place, wake=site.woken.set, allowed=allowed,
        mailbox=site.mailbox,
    )  # fmt: skip
    site.bulk.start()
    client.place.objects[X, 1] = blob(MB)
    site.bulk.pull(X, 1, MB, client.id, key=client.keys.public)
    client.connect(site, address_of(site.id), "broker", "user")
    assert site.pulled().carriers == {"broker": MB}
    (requester, *_) = client.place.requesters
    assert (requester.kind, requester.role, requester.key) == ("endpoint", "user", site.keys.public)


# ----------------------------------------------------------------------------------------------- other carriers


def test_a_direct_link_takes_over_and_the_broker_after_it(parties: Callable[..., Party]) -> None:
    asker = parties(b"a", range_timeout_s=NEVER_S)
    site = parties(b"s", {asker.keys.public: "user"})
    size = 120 * RANGE_BYTES
    site.place.objects[X, 1] = blob(size)
    with Proxy(site.listen("direct")) as proxy:
        asker.connect(site, address_of(site.id), "broker")
        asker.bulk.pull(X, 1, size, site.id)
        moment = at_range(10, asker, lambda: asker.connect(site, proxy.address))
        assert moment.wait(patience(10))
        wait_until(lambda: asker.bulk.counters().get((site.id, "direct", "in"), 0) > 10 * RANGE_BYTES)
        proxy.cut()
        pulled = asker.pulled()
    assert asker.place.received == {X: blob(size)}
    assert set(pulled.carriers) == {"broker", "direct"}
    assert sum(pulled.carriers.values()) == size
    assert pulled.carriers["broker"] > 10 * RANGE_BYTES
    assert asker.place.aborted == []
    assert site.place.reads <= 120 + 16 + 1, "only what was in flight when the link broke is asked again"
    assert asker.bulk.counters() == {
        (site.id, carrier, "in"): count for carrier, count in pulled.carriers.items()
    }


def test_reach_drops_a_mailbox_that_is_not_named_any_more(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    asker.wait_link(site)
    asker.bulk.reach(site.id, [("broker", address_of(site.id), site.keys.public)])
    asker.bulk.pull(ECHO_ID, 0, 1, site.id)
    asker.pulled()
    asker.bulk.reach(site.id, [])
    wait_until(lambda: asker.bulk.describe(site.id) == [])


@pytest.mark.parametrize("address", ["mailbox://" + "00" * 16, "mailbox://xyz", "tcp://127.0.0.1:1"])
def test_a_mailbox_of_another_is_not_used(parties: Callable[..., Party], address: str) -> None:
    site, asker = parties(b"s"), parties(b"a")
    asker.connect(site, address, "broker")
    asker.connect(site, site.listen("ipc"), "ipc")
    asker.wait_link(site)
    assert [link["carrier"] for link in asker.bulk.describe(site.id)] == ["ipc"]


def test_files_are_not_shared_through_mailboxes(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    site.place.objects[X, 1] = blob(MB)
    asker.bulk.pull(X, 1, MB, site.id, mode=MODE_PATH)
    assert asker.pulled().carriers == {"broker": MB}


# -------------------------------------------------------------------------------------------------- bad manners


def test_a_stranger_is_told_that_he_may_not_and_leaves_no_trace(parties: Callable[..., Party]) -> None:
    site, stranger = parties(b"s"), parties(b"a")
    site.place.objects[X, 1] = blob(MB)
    stranger.connect(site, address_of(site.id), "broker")
    for id, attempt in ((X, 1), (ECHO_ID, 0)):
        stranger.bulk.pull(id, attempt, MB, site.id, b"t" * 16)
        assert stranger.failed().reason is PullReason.REFUSED
    assert site.place.requesters == []
    assert site.bulk.describe(stranger.id) == []
    site.bulk.set_allowed({stranger.keys.public: "user"})
    site.bulk.pull(ECHO_ID, 0, 1, stranger.id)  # waits for a link, which only a party with rights makes
    wait_until(lambda: site.bulk.pulls() == [ECHO_ID])
    stranger.bulk.pull(X, 1, MB, site.id)
    stranger.pulled()
    site.pulled()


@pytest.mark.parametrize("fault", ["drop", "duplicate", "delay", "restart", "replay"])
def test_what_the_broker_does_to_mail_changes_nothing(
    pair: tuple[Party, Party], post: Post, fault: str
) -> None:
    site, asker = pair
    size = 60 * RANGE_BYTES
    site.place.objects[X, 1] = blob(size)

    def do() -> None:
        match fault:
            case "drop":
                post.drop(4)
            case "duplicate":
                post.duplicate(20)
            case "delay":
                post.delay(4)
            case "restart":
                post.restart()
            case "replay":
                for to, envelope in list(post.captured):
                    post.forge(to, envelope)

    asker.bulk.pull(X, 1, size, site.id)
    count = [0]

    def at_write() -> None:
        count[0] += 1
        if count[0] in (5, 25):
            do()
        elif count[0] in (15, 35):
            post.release()

    asker.place.on_write = at_write
    assert asker.pulled() == Pulled(X, 1, site.id, size, {"broker": size})
    assert asker.place.received == {X: blob(size)}
    assert asker.place.aborted == []
    assert count == [60], "each range is written once"


def test_garbage_in_the_mail_is_dropped_and_harms_nobody(parties: Callable[..., Party], post: Post) -> None:
    asker, vandal = parties(b"a"), keys.generate()
    site = parties(b"s", {asker.keys.public: "user", vandal.public: "user"})
    me = b"v" * 16
    mailbox = MemoryMailbox(post, me, vandal)
    mailbox.use(post.access(me))
    try:
        link = MailLink(1, site.id, site.keys.public, mailbox, wanted=True)
        mailbox.attach(BULK, lambda: None)
        for mail in (
            b"",
            b"\0",
            b"\0\0\0\xff",
            b"\xff\xff\xff\xffmore",
            b"\0\0\0\1\x63",
            b"\0\0\0\5" + bytes(5),
        ):
            assert mailbox.post(site.id, site.keys.public, BULK, [mail])
        for fields in (
            [FETCH, 1, X],
            [FETCH, 2, X, 1, 0, 1 << 61, 0, None],
            [FETCH, 3, X, 1, 1 << 61, 1, 0, None],
            [FETCH, 4, X, 1, 0, 10, 2, None, "/nowhere/at/all"],
            [FETCH, 5, X, 1, 0, 10, 0, None, None, 7],
            [CHUNK, 6, X, 1, 0, 100, 0, None, None],
            [BULK_HELLO, 1, me, "client", vandal.public],
            [SUBMIT, 1, 2, 3],
        ):
            assert link.send(write_header(fields), b"x" * 100)
        for number, carried in ((1, b"nonsense"), (2, b"\1" * 300)):
            assert number
            post.forge(site.id, carried)
        site.place.objects[X, 1] = blob(MB)
        asker.connect(site, address_of(site.id), "broker")
        asker.bulk.pull(X, 1, MB, site.id)
        asker.pulled()
        assert asker.place.received == {X: blob(MB)}
    finally:
        mailbox.close()


def test_somebody_with_rights_cannot_speak_for_the_source(parties: Callable[..., Party], post: Post) -> None:
    """His mail says that it is from the source; his key says that it is not."""
    liar = keys.generate()
    asker = parties(b"a", {liar.public: "user"})
    site = parties(b"s", {asker.keys.public: "user"})
    site.place.objects[X, 1] = blob(MB)
    lies = Sealer(site.id, liar)

    def lie(fields: list[Any], data: bytes = b"") -> None:
        header = write_header(fields)
        frame = [len(header).to_bytes(4, "big") + header, data]
        for envelope in lies.seal(asker.id, asker.keys.public, BULK, frame):
            post.forge(asker.id, envelope)

    lie([FETCH, 1, ECHO_ID, 0, 0, 0, 0, None])
    asker.wait_link(site)
    asker.bulk.pull(X, 1, MB, site.id, key=site.keys.public)
    wait_until(lambda: asker.bulk.progress(X) == (0, MB, None), what="a pull that asks nobody")
    asker.place.on_write = lambda: None
    moment, asked = threading.Event(), asker.bulk._brain._next_request

    def answer_first() -> None:
        for number in range(asked, asked + 3):
            lie([CHUNK, number, X, 1, 0, RANGE_BYTES, 0, None, [1, "it is gone"]])
        moment.set()

    site.place.on_read = answer_first
    asker.connect(site, address_of(site.id), "broker")
    asker.pulled()
    assert moment.is_set()
    assert asker.place.received == {X: blob(MB)}
    assert {link["state"] for link in asker.bulk.describe(site.id)} == {"up"}


def test_a_pull_of_one_party_does_not_wait_for_a_full_mailbox_of_another(
    parties: Callable[..., Party], post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_post, "WAITING_MAX_BYTES", MB)
    stuck, asker = parties(b"a"), parties(b"b")
    site = parties(b"s", {stuck.keys.public: "user", asker.keys.public: "user"})
    site.place.objects[X, 1] = site.place.objects[Y, 1] = blob(20 * MB)
    stuck.connect(site, address_of(site.id), "broker")
    stuck.bulk.pull(X, 1, 20 * MB, site.id)
    assert at_range(2, stuck, lambda: post.fill(stuck.id)).wait(patience(10))
    wait_until(lambda: site.bulk._server.retry_at is not None)
    asker.connect(site, address_of(site.id), "broker")
    asker.bulk.pull(Y, 1, 20 * MB, site.id)
    asker.pulled()
    assert stuck.bulk.take() == []
    post.drain(stuck.id)
    stuck.pulled()
