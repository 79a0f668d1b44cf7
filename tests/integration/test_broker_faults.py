"""A broker that is restarted or stands still, a hub that is restarted, and people who would like to be somebody else (F7)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.exceptions import ChannelClosedByBroker, ProbableAuthenticationError

from gcref import Client, Executor, LocalEndpoint, errors, ids
from gcref.carriers import keys
from gcref.carriers.mail.post import CONTROL, queue_of
from gcref.carriers.mail.seal import Sealer
from gcref.config import home
from gcref.directory import records
from gcref.directory.hub import HubClient, Registration
from tests.support.endpoints import ask
from tests.support.hub import Hub
from tests.support.rabbit import Rabbit
from tests.support.waiting import patience, wait_until

SETTINGS = {"heartbeat_s": 0.5, "trust_hub": True}
PAUSE_S = 4.0
"""Eight heartbeats: a minute and a half of the real ones."""


@pytest.fixture(scope="module")
def hub(_nothing_left: None, rabbit: Rabbit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with (
        Hub(tmp_path_factory.mktemp("hub"), rabbit, heartbeat_s=1) as found,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("GCREF_HUB_URL", found.url)
        patch.setenv("GCREF_TOKEN", found.token("ada"))
        yield found


@pytest.fixture(scope="module")
def post(hub: Hub) -> Iterator[LocalEndpoint]:
    """An endpoint that is reached by mail alone."""
    with LocalEndpoint("post", workers=2, carriers=("broker",), config=SETTINGS) as found:
        _await_mail("post")
        yield found


@pytest.fixture(scope="module")
def port(hub: Hub) -> Iterator[LocalEndpoint]:
    """An endpoint that can be dialled, and has a mailbox too."""
    with LocalEndpoint("port", workers=1, carriers=("direct", "broker"), config=SETTINGS) as found:
        _await_mail("port")
        yield found


def _await_mail(name: str) -> None:
    wait_until(lambda: records.resolve(name).mailbox, what=f"{name} to have a mailbox")


@pytest.fixture
def by_mail(hub: Hub, post: LocalEndpoint) -> Iterator[Executor]:
    with Client(carriers=("broker",)) as client, Executor("post", client) as executor:
        assert executor.submit(pow, 2, 3).result(timeout=patience(30)) == 8
        yield executor


@pytest.fixture
def direct(hub: Hub, port: LocalEndpoint) -> Iterator[Executor]:
    with Client(carriers=("direct", "broker")) as client, Executor("port", client) as executor:
        assert executor.submit(pow, 2, 3).result(timeout=patience(30)) == 8
        yield executor


def note(folder: str, number: int) -> int:
    """Leaves a file for each run of a task."""
    os.close(tempfile.mkstemp(prefix=f"{number}-", dir=folder)[0])
    return number


def runs_in(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[0]) for path in folder.iterdir())


def test_f7_a_broker_that_is_killed_during_a_thousand_tasks_costs_no_result_and_repeats_none(
    by_mail: Executor, rabbit: Rabbit, tmp_path: Path
) -> None:
    futures = [by_mail.submit(note, str(tmp_path), number) for number in range(500)]
    futures[0].result(timeout=patience(30))
    rabbit.kill()
    futures += [by_mail.submit(note, str(tmp_path), number) for number in range(500, 1000)]
    rabbit.restart()
    assert [future.result(timeout=patience(60)) for future in futures] == list(range(1000))
    assert runs_in(tmp_path) == list(range(1000)), "each task ran once"


def test_f7_a_broker_that_stands_still_delays_mail_and_nothing_else(
    by_mail: Executor, direct: Executor, rabbit: Rabbit, tmp_path: Path
) -> None:
    rabbit.pause()
    try:
        began = time.monotonic()
        waiting = [by_mail.submit(note, str(tmp_path), number) for number in range(100)]
        slowest = 0.0
        while time.monotonic() - began < PAUSE_S:
            start = time.monotonic()
            assert direct.submit(pow, 2, 10).result(timeout=patience(10)) == 1024
            slowest = max(slowest, time.monotonic() - start)
        assert slowest < patience(0.5), "what goes directly does not wait for the broker"
        assert not any(future.done() for future in waiting)
    finally:
        rabbit.resume()
    assert [future.result(timeout=patience(60)) for future in waiting] == list(range(100))
    assert runs_in(tmp_path) == list(range(100)), "each task ran once"


def test_a_hub_that_is_restarted_disturbs_nobody_who_is_connected(by_mail: Executor, hub: Hub) -> None:
    hub.kill()
    assert by_mail.submit(pow, 2, 11).result(timeout=patience(30)) == 2048
    with pytest.raises(errors.HubUnavailableError), Client(carriers=("broker",)) as client:
        Executor("somewhere/else", client)
    hub.start()
    # Its memory is whole: a client that comes now is let in, and finds what was there.
    with Client(carriers=("broker",)) as client, Executor("post", client) as executor:
        assert executor.submit(pow, 2, 12).result(timeout=patience(30)) == 4096


# ------------------------------------------------------------------------------------------------ security


def test_another_users_token_finds_nothing_and_takes_nothing(hub: Hub, post: LocalEndpoint) -> None:
    eve = hub.client("eve")
    assert eve.endpoints() == []
    for name in ("post", "ada/post", post.endpoint_id.bytes):
        with pytest.raises(errors.NotFoundError):
            eve.find(name)
    own = keys.generate().public.decode("ascii")
    with pytest.raises(errors.HubError):  # she is not to get the mail of an endpoint of ada's
        eve.register(Registration(post.endpoint_id.bytes, "client", "post", own))
    with pytest.raises(errors.HubError):
        eve.heartbeat(post.endpoint_id.bytes)
    with contextlib.suppress(errors.HubError):
        eve.withdraw(post.endpoint_id.bytes)
    assert hub.client("ada").find("post").running


def test_a_stranger_with_a_mailbox_is_not_let_in(
    hub: Hub, post: LocalEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eve knows everything about the endpoint but a key that it lets in."""
    eves = tmp_path / "eve"
    (eves / "endpoints").mkdir(parents=True, mode=0o700)
    shutil.copytree(home() / "endpoints" / "post", eves / "endpoints" / "post", ignore=lambda *_: ["key"])
    monkeypatch.setenv("GCREF_HOME", str(eves))
    monkeypatch.setenv("GCREF_TOKEN", hub.token("eve"))
    with Client(carriers=("broker",)) as client:
        future = Executor("post", client).submit(pow, 2, 3)
        refused = future.exception(timeout=patience(60))
    assert isinstance(refused, errors.AuthError), repr(refused)


def test_a_token_that_is_revoked_opens_nothing_any_more(hub: Hub, rabbit: Rabbit) -> None:
    token = hub.token("mallory")
    client = HubClient(hub.url, token)
    party = ids.new_id()
    told = client.register(Registration(party, "client", "laptop", keys.generate().public.decode("ascii")))
    assert told.mailbox is not None
    url = told.mailbox.url
    _broker(url).close()  # it is open
    number = hub.command("hub", "token", "list", "mallory").split()
    hub.command("hub", "token", "revoke", next(word for word in number if word.isdigit()))
    with pytest.raises(errors.AuthError):
        client.endpoints()

    def is_shut() -> bool:
        try:
            _broker(url).close()
        except ProbableAuthenticationError:
            return True
        return False

    wait_until(is_shut, what="the mailbox's password to be worthless")
    client.close()


def test_the_name_of_a_mailbox_opens_it_to_nobody_else(hub: Hub, post: LocalEndpoint) -> None:
    eve = hub.client("eve")
    told = eve.register(
        Registration(ids.new_id(), "client", "laptop", keys.generate().public.decode("ascii"))
    )
    assert told.mailbox is not None
    for method in ("basic_get", "queue_purge", "queue_delete"):
        connection = _broker(told.mailbox.url)
        try:
            with pytest.raises(ChannelClosedByBroker, match="403"):
                getattr(connection.channel(), method)(queue_of(post.endpoint_id.bytes))
        finally:
            connection.close()


def test_who_owns_the_broker_reads_nothing_and_forges_nothing(
    by_mail: Executor, post: LocalEndpoint, rabbit: Rabbit
) -> None:
    """An administrator of the broker takes mail out, puts it back twice, changes it, and writes some of their own."""
    secret = b"attack at dawn " * 10
    queue = queue_of(post.endpoint_id.bytes)
    connection = _broker(rabbit.url)
    channel = connection.channel()
    taken: list[Any] = []
    try:
        # Whoever consumes too gets a part of the mail.
        channel.basic_consume(
            queue, lambda _channel, _method, _properties, body: taken.append(body), auto_ack=True
        )
        futures = [by_mail.submit(len, secret) for _ in range(20)]
        until = time.monotonic() + patience(10)
        while not taken and time.monotonic() < until:
            connection.process_data_events(time_limit=0.1)
            futures.append(by_mail.submit(len, secret))
        channel.close()
        assert taken, "nothing was taken"
        assert not any(b"attack" in body for body in taken)

        before = _dropped()
        channel = connection.channel()
        stranger = keys.generate()
        forged = Sealer(ids.new_id(), stranger).seal(
            post.endpoint_id.bytes, ask_key(post), CONTROL, [b"\x01\x90"]
        )
        flipped = [bytes(body[:-1]) + bytes([body[-1] ^ 1]) for body in taken]
        for body in (*flipped, *taken, *taken, b"", b"nonsense", *[bytes(part) for part in forged]):
            channel.basic_publish("", queue, body)
        channel.close()
    finally:
        connection.close()
    # What was taken is said again, what was forged counts for nothing.
    assert [future.result(timeout=patience(60)) for future in futures] == [len(secret)] * len(futures)
    wait_until(
        lambda: _dropped() >= before + len(flipped) + 2,
        what=lambda: f"the forgeries to be dropped: {_dropped()}",
    )


def ask_key(endpoint: LocalEndpoint) -> bytes:
    return records.resolve(endpoint.endpoint_id).public_key.encode("ascii")


def _dropped() -> int:
    """Mail that the endpoint has refused so far, for whatever reason."""
    counts: dict[str, int] = ask("post")["hub"]["mailbox"]["dropped"]
    return sum(counts.values())


def _broker(url: str) -> pika.BlockingConnection:
    return pika.BlockingConnection(pika.URLParameters(url))
