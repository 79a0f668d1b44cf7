"""Clients and the hub: names that only the hub knows, work by mail alone, and whatever can be wrong with that.

The site has a `GCREF_HOME` of its own, as on a machine of its own; the client knows it through the hub alone, unless a test
says otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcref import Client, ComputeFuture, Executor, LocalEndpoint, ids
from gcref.carriers import keys
from gcref.carriers.mail.post import queue_of
from gcref.directory import pins, records
from gcref.errors import (
    AuthError,
    ConfigError,
    EndpointLostError,
    GcrefError,
    HubUnavailableError,
    NotFoundError,
)
from tests.support.hub import Hub
from tests.support.programs import output_of
from tests.support.rabbit import Rabbit
from tests.support.tasks import blob_of, identity, inc
from tests.support.waiting import patience, wait_until

WAIT_S = patience(20)
HEARTBEAT_S = 0.5


@pytest.fixture(scope="module")
def hub(rabbit: Rabbit, tmp_path_factory: pytest.TempPathFactory, _nothing_left: None) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub"), rabbit, heartbeat_s=HEARTBEAT_S) as hub:
        yield hub


@contextlib.contextmanager
def at(home: Path, hub: Hub | None = None, user: str = "alice", token: str | None = None) -> Iterator[None]:
    """This process is at a place of its own, with these settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCREF_HOME", str(home))
        if hub is not None:
            patch.setenv("GCREF_HUB_URL", hub.url)
            patch.setenv("GCREF_TOKEN", token or hub.token(user))
        yield


@pytest.fixture(scope="module")
def site_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Alice's endpoint has its record and keys."""
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def site(hub: Hub, site_home: Path) -> Iterator[LocalEndpoint]:
    """Alice's endpoint, which trusts the hub and takes nothing but mail."""
    with at(site_home, hub):
        endpoint = LocalEndpoint("polaris", workers=2, carriers=["broker"], config={"trust_hub": True})
    with endpoint:
        yield endpoint


@pytest.fixture
def away(hub: Hub, tmp_path: Path) -> Iterator[Path]:
    """Alice's laptop."""
    with at(tmp_path / "laptop", hub):
        yield tmp_path / "laptop"


def link_of(future: ComputeFuture[Any]) -> str:
    """The line of the explanation that names the carrier."""
    return next(line for line in future.explain().splitlines() if "reached by" in line)


def is_reached_by(carrier: str, future: ComputeFuture[Any]) -> bool:
    """Whether that is the way to its endpoint."""
    return f"reached by {carrier}" in link_of(future)


def test_work_by_mail_at_an_endpoint_that_only_the_hub_knows(site: LocalEndpoint, away: Path) -> None:
    with Client() as client, Executor("polaris", client) as executor:
        assert executor.endpoint_id == site.endpoint_id
        future = executor.submit(inc, 41)
        assert future.result(WAIT_S) == 42
        assert "reached by broker" in link_of(future)
        futures = [executor.submit(inc, number) for number in range(50)]
        assert [future.result(WAIT_S) for future in futures] == list(range(1, 51))
        with pytest.raises(ZeroDivisionError):
            executor.submit(divmod, 1, 0).result(WAIT_S)
        large = np.arange(200_000)
        there = executor.put(large)
        assert (executor.submit(identity, there).result(WAIT_S) == large).all()
        moved = client.payload_bytes()
        assert moved["out"] >= large.nbytes
        assert moved["in"] >= large.nbytes
        assert moved["mapped"] == 0
        with Executor("alice/polaris", client) as same, Executor(str(site.endpoint_id), client) as too:
            assert same.endpoint_id == too.endpoint_id == site.endpoint_id


def test_the_better_way_is_taken_and_mail_when_there_is_none(hub: Hub, tmp_path: Path) -> None:
    """An endpoint that listens, and has a mailbox too; in its greeting by mail it names its addresses."""
    with at(tmp_path / "near", hub), LocalEndpoint("near", workers=1, carriers=["direct", "broker"]) as near:
        for ways, way in ((["broker"], "broker"), (["direct", "broker"], "direct")):
            with Client(carriers=ways) as client, Executor(near.endpoint_id, client) as executor:
                future = executor.submit(inc, 1)
                assert future.result(WAIT_S) == 2
                wait_until(partial(is_reached_by, way, future), what=future.explain)
        record = records.read("near")
        assert record is not None
        # A firewall, as it looks from here.
        closed = tuple(f"tcp://127.0.0.1:{port}" for port in (9, 10))
        records.write(dataclasses.replace(record, control=closed[:1], bulk=closed[1:]))
        with Client() as client, Executor(near.endpoint_id, client) as executor:
            blob = executor.submit(blob_of, 300_000)
            assert len(blob.result(WAIT_S)) == 300_000
            assert is_reached_by("broker", blob)
            assert "tried direct tcp://127.0.0.1:9" in link_of(blob)


def test_a_reference_leads_to_an_endpoint_that_nobody_has_named(site: LocalEndpoint, away: Path) -> None:
    with Client() as one, Client() as other, Executor(site.endpoint_id, one) as executor:
        kept = executor.submit(inc, 1)
        assert kept.result(WAIT_S) == 2
        assert other.open(kept.ref()).result(WAIT_S) == 2


def test_a_mailbox_lasts_as_long_as_its_client(site: LocalEndpoint, away: Path, rabbit: Rabbit) -> None:
    with Client() as client:
        with Executor(site.endpoint_id, client) as executor:
            assert executor.submit(inc, 1).result(WAIT_S) == 2
            assert has_mailbox(client, rabbit)
        loop = client._place.loop
        assert loop is not None
        wait_until(loop.is_broken, what="the idle client to let go")
        wait_until(lambda: not has_mailbox(client, rabbit), what="its mailbox to go")
        with Executor(site.endpoint_id, client) as executor:
            assert executor.submit(inc, 2).result(WAIT_S) == 3, "it comes back as the same party"
    assert not has_mailbox(client, rabbit)


def has_mailbox(client: Client, rabbit: Rabbit) -> bool:
    """Whether the broker has a mailbox for it."""
    return queue_of(ids.parse(client.id)) in {queue["name"] for queue in rabbit.manage("GET", "queues/%2F")}


def test_a_function_that_is_registered_in_one_program_and_used_in_another(
    site: LocalEndpoint, away: Path
) -> None:
    with Client() as client, Executor(site.endpoint_id, client) as executor:
        name = executor.register_function(lambda x: 3 * x)
    with Client() as client, Executor(site.endpoint_id, client) as executor:
        assert executor.submit_to_registered_function(name, [4]).result(WAIT_S) == 12
        assert executor.submit_to_registered_function(name, kwargs={"x": 5}).result(WAIT_S) == 15
        with pytest.raises(NotFoundError):
            executor.submit_to_registered_function(str(site.endpoint_id))
        with pytest.raises(NotFoundError):
            executor.submit_to_registered_function("no id")


# ------------------------------------------------------------------------------------------ what can be wrong


def refusal(client: Client, endpoint: str) -> Exception:
    """Why there is no executor; it takes no time."""
    since = time.monotonic()
    with pytest.raises(GcrefError) as caught:
        Executor(endpoint, client)
    assert time.monotonic() - since < patience(5)
    return caught.value


def test_names_and_tokens_that_are_wrong(site: LocalEndpoint, away: Path, hub: Hub) -> None:
    with Client() as client:
        error = refusal(client, "nowhere")
        assert isinstance(error, NotFoundError)
        assert hub.url in str(error), "who was asked"
        with Executor("polaris", client) as executor:
            refusal(client, "alice/nowhere")
            assert executor.submit(inc, 1).result(WAIT_S) == 2
    with Client(token=hub.token("bob")) as client:
        assert type(refusal(client, "alice/polaris")) is NotFoundError, "it is not shared with bob"
        assert type(refusal(client, str(site.endpoint_id))) is NotFoundError
    with Client(token="nobody's") as client:
        assert type(refusal(client, "polaris")) is AuthError
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GCREF_TOKEN")
        with Client() as client:
            error = refusal(client, "polaris")
            assert isinstance(error, AuthError)
            assert "GCREF_TOKEN" in str(error)
    with Client(hub_url="http://127.0.0.1:9") as client:
        assert type(refusal(client, "polaris")) is HubUnavailableError
    with Client(carriers=["direct"]) as client, Executor("polaris", client) as executor:
        failure = executor.submit(inc, 1).exception(WAIT_S)
        assert isinstance(failure, ConfigError)
        assert "Allow another carrier" in str(failure)


def test_a_key_that_is_not_the_one_of_the_first_contact(site: LocalEndpoint, away: Path, hub: Hub) -> None:
    other = keys.generate().public
    pins.replace(site.endpoint_id.bytes, other, "polaris")
    with Client() as client:
        error = refusal(client, "polaris")
        assert isinstance(error, AuthError)
        assert "gcref trust polaris" in str(error)
        said = hub.command("trust", "polaris")
        assert other.decode() in said
        with Executor("polaris", client) as executor:
            assert executor.submit(inc, 1).result(WAIT_S) == 2


def test_the_commands_show_what_the_hub_knows(site: LocalEndpoint, away: Path, hub: Hub) -> None:
    shown = hub.command("endpoints")
    assert str(site.endpoint_id) in shown
    assert "broker mailbox://" in shown
    with Client() as client, Executor("polaris", client) as executor:
        future = executor.submit(inc, 1)
        assert future.result(WAIT_S) == 2
        assert "polaris" in hub.command("explain", future.task_id, "--endpoint", "polaris")


@pytest.fixture(scope="module")
def poor_hub(tmp_path_factory: pytest.TempPathFactory, _nothing_left: None) -> Iterator[Hub]:
    """A hub without a broker."""
    with Hub(tmp_path_factory.mktemp("poor"), heartbeat_s=HEARTBEAT_S) as hub:
        yield hub


def test_without_a_broker_at_the_hub(
    site: LocalEndpoint, site_home: Path, poor_hub: Hub, tmp_path: Path
) -> None:
    """Its own record tells the endpoint's mailbox; our hub has none for us. Who can be reached otherwise is not harmed."""
    with at(site_home, poor_hub), Client(carriers=["broker"]) as client:
        with Executor(site.endpoint_id, client) as executor:
            for _ in range(2):
                error = executor.submit(inc, 1).exception(WAIT_S)
                assert isinstance(error, ConfigError)
                assert "no broker" in str(error)
                assert poor_hub.url in str(error)
        with Executor(client=client) as private:
            assert private.submit(inc, 1).result(WAIT_S) == 2
    with (
        at(tmp_path / "home", poor_hub),
        LocalEndpoint("near", workers=1) as near,
        Client() as client,
        Executor(near.endpoint_id, client) as executor,
    ):
        assert executor.submit(inc, 1).result(WAIT_S) == 2


def test_without_a_hub_at_all(site: LocalEndpoint, site_home: Path) -> None:
    with at(site_home), Client(carriers=["broker"]) as client, Executor("polaris", client) as executor:
        error = executor.submit(inc, 1).exception(WAIT_S)
        assert isinstance(error, ConfigError)
        assert "GCREF_HUB_URL" in str(error)


def test_an_endpoint_without_a_mailbox(poor_hub: Hub, tmp_path: Path) -> None:
    with (
        at(tmp_path / "home", poor_hub),
        LocalEndpoint("deaf", workers=1, carriers=["direct"]) as deaf,
        Client(carriers=["broker"]) as client,
        Executor(deaf.endpoint_id, client) as executor,
    ):
        error = executor.submit(inc, 1).exception(WAIT_S)
        assert isinstance(error, ConfigError)
        assert "no mailbox" in str(error)


# --------------------------------------------------------------------------------------- hub or broker stand still


def test_a_hub_that_stands_still_is_in_nobodys_way(site: LocalEndpoint, away: Path, hub: Hub) -> None:
    with Client() as client, Executor("polaris", client) as executor:
        assert executor.submit(inc, 1).result(WAIT_S) == 2
        hub.signal(signal.SIGSTOP)
        try:
            assert executor.submit(inc, 2).result(WAIT_S) == 3
            since = time.monotonic()
            executor.shutdown()
            client.close()
            assert time.monotonic() - since < patience(4)
        finally:
            hub.signal(signal.SIGCONT)


def test_a_broker_that_stands_still_delays_and_nothing_else(
    site: LocalEndpoint, away: Path, rabbit: Rabbit
) -> None:
    with Client() as client, Executor("polaris", client) as executor:
        assert executor.submit(inc, 1).result(WAIT_S) == 2
        rabbit.pause()
        try:
            late = executor.submit(inc, 2)
            with pytest.raises(TimeoutError):
                late.result(0.5)
        finally:
            rabbit.resume()
        assert late.result(WAIT_S) == 3
    with Client() as client:
        executor = Executor("polaris", client)
        assert executor.submit(inc, 1).result(WAIT_S) == 2
        rabbit.pause()
        try:
            lost = executor.submit(inc, 2)
            since = time.monotonic()
            executor.shutdown(wait=False)
            client.close(timeout=1.0)
            assert time.monotonic() - since < patience(5)
            assert isinstance(lost.exception(0), EndpointLostError)
        finally:
            rabbit.resume()


# ---------------------------------------------------------------------------------------------- what it must not cost


def test_who_needs_no_hub_does_not_pay_for_it(away: Path) -> None:
    """A hub is configured, and everything happens on this machine."""
    said = output_of(
        """
        import sys
        with gcref.Executor(user_endpoint_config={"workers": 1}) as executor:
            assert executor.submit(inc, 1).result(30) == 2
        print(sorted({"requests", "pika", "nacl", "gcref.directory.hub"} & set(sys.modules)))
        """,
        away.parent,
    )
    assert said.strip() == "[]"
