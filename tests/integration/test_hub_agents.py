"""Endpoints and the hub: they register, are found, work by mail alone, let in whom the hub names, and go on without it.

Each place has a `GCREF_HOME` of its own, as on machines of its own: without the hub nobody here knows anybody.
"""

from __future__ import annotations

import contextlib
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from endpoint_worker.agent.hub_link import LAST_WORD_S
from gcref import Client, Executor, LocalEndpoint
from gcref.brains import peers as pe
from gcref.carriers import keys
from gcref.carriers.base import FdReady
from gcref.carriers.zeromq import ZeroMQCarrier
from gcref.directory import pins, records
from gcref.directory.hub import HubClient
from gcref.directory.records import EndpointRecord
from gcref.errors import AuthError, DependencyError, EndpointLostError, NotFoundError
from tests.support.endpoints import ask
from tests.support.hub import Hub
from tests.support.named import NamedEndpoint
from tests.support.rabbit import Rabbit
from tests.support.tasks import Gate, blob_of, hold, identity, inc
from tests.support.waiting import patience, wait_until

WAIT_S = patience(30)
HEARTBEAT_S = 0.5
MAIL = ("broker",)
DIRECT = ("direct",)


class Place:
    """Somebody's machine: a `GCREF_HOME`, and a token for the hub.

    Args:
        home: the folder.
        hub: the hub that its settings name.
        user: whose token it has.
    """

    def __init__(self, home: Path, hub: Hub, user: str) -> None:
        self.home = home
        self._variables = {"GCREF_HOME": str(home), "GCREF_HUB_URL": hub.url, "GCREF_TOKEN": hub.token(user)}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This process is there."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._variables.items():
                patch.setenv(name, value)
            yield

    def endpoint(self, name: str, carriers: tuple[str, ...] = MAIL) -> LocalEndpoint:
        """A running endpoint there, with one worker; whoever calls stops it."""
        with self.entered():
            return LocalEndpoint(name, workers=1, carriers=carriers, config=SETTINGS)

    @contextlib.contextmanager
    def named(self, name: str, hub: HubClient) -> Iterator[NamedEndpoint]:
        """A running endpoint there that can be stopped and started; what is done to it is done where it is (`entered`)."""
        with self.entered():
            site = NamedEndpoint(name, workers=1, carriers=list(MAIL), **SETTINGS)
            site.start()
        try:
            yield site
        finally:
            with self.entered():
                site.remove()
            hub.withdraw(site.id)

    def status(self, name: str) -> dict[str, Any]:
        """What the endpoint of that name says of its hub."""
        with self.entered():
            return dict(ask(name)["hub"])

    @contextlib.contextmanager
    def executor(self, name: str, carriers: tuple[str, ...] = MAIL) -> Iterator[Executor]:
        """An executor there, with a client of its own."""
        with self.entered(), Client(carriers=carriers) as client, Executor(name, client) as executor:
            yield executor


SETTINGS = {"trust_hub": True, "heartbeat_s": 1.0}
Places = Callable[..., Place]


@pytest.fixture(scope="module")
def hub(rabbit: Rabbit, tmp_path_factory: pytest.TempPathFactory, _nothing_left: None) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub"), rabbit, heartbeat_s=HEARTBEAT_S) as hub:
        yield hub


@pytest.fixture
def ada(hub: Hub) -> HubClient:
    """The line of our user to the hub."""
    return hub.client("ada")


@pytest.fixture
def places(hub: Hub, tmp_path: Path) -> Places:
    """Makes places by name, each for a user."""
    return lambda name, user="ada": Place(tmp_path / name, hub, user)


def test_a_graph_over_two_sites_by_mail_alone(places: Places) -> None:
    """They are found by their names, and values large and small go from one to the other."""
    with (
        places("p").endpoint("polaris"),
        places("m").endpoint("midway"),
        places("laptop").entered(),
        Client(carriers=MAIL) as client,
        Executor("polaris", client) as a,
        Executor("midway", client) as b,
    ):
        small, large = a.submit(inc, 1), a.submit(blob_of, 3_000_000)
        assert b.submit(inc, small).result(WAIT_S) == 3
        length = b.submit(len, large)
        assert length.result(WAIT_S) == 3_000_000
        assert length.record is not None
        assert length.record.pulled_bytes["broker"] >= 3_000_000
        assert b.submit(identity, large).result(WAIT_S) == large.result(WAIT_S)


def test_an_endpoint_tells_how_it_stands_with_the_hub(places: Places, ada: HubClient) -> None:
    here = places("here")
    with here.endpoint("site") as site:
        record = records.read("site", here.home)
        assert record is not None
        assert record.mailbox
        assert record.control == (), "it listens nowhere"
        told = wait_until(lambda: _with_mail(here.status("site")), what="its mailbox to be open")
        assert (told["owner"], told["error"], told["trusted"]) == ("ada", None, True)
        assert told["mailbox"]["up"]
        assert "amqp" not in str(told), "no secrets"
        assert ada.find("site").id == site.endpoint_id.bytes
    with pytest.raises(NotFoundError):
        ada.find(site.endpoint_id.bytes)  # it was there for one program, and took its leave


def test_one_that_comes_back_stays_known_while_it_is_stopped(places: Places, ada: HubClient) -> None:
    here = places("here")
    with here.named("site", ada) as site:
        assert ada.find(site.id).running
        with here.entered():
            site.stop()
            assert not ada.find(site.id).running


@pytest.mark.parametrize("carriers", [MAIL, DIRECT])
def test_a_user_is_let_in_by_sharing_and_put_out_again_on_the_open_link(
    places: Places, ada: HubClient, carriers: tuple[str, ...]
) -> None:
    bob = places("bobs", "bob")
    with (
        places("here").endpoint("site", (*carriers, "ipc")),
        bob.entered(),
        Client(carriers=carriers) as client,
    ):
        with pytest.raises(NotFoundError):
            Executor("ada/site", client)
        ada.share("site", "bob")
        with Executor("ada/site", client) as executor:
            assert executor.submit(inc, 1).result(WAIT_S) == 2
            ada.unshare("site", "bob")
            refused = wait_until(lambda: _refusal(executor), timeout_s=30, what="bob to be put out")
            assert isinstance(refused, (AuthError, EndpointLostError)), (
                "the endpoint or the hub says it first"
            )


def test_a_key_that_is_not_the_one_of_the_first_contact_is_not_believed(places: Places) -> None:
    """The task that needs a value from there fails with the reason."""
    polaris = places("p")
    with polaris.endpoint("polaris"), places("m").endpoint("midway") as midway:
        pins.replace(
            midway.endpoint_id.bytes, b"W3+Lc1u0!Xc-Rg<9l#?769[0KGbmGldxHcOkrHug", "midway", polaris.home
        )
        with (
            places("laptop").entered(),
            Client(carriers=MAIL) as client,
            Executor("polaris", client) as a,
            Executor("midway", client) as b,
        ):
            with pytest.raises((AuthError, DependencyError)) as caught:
                a.submit(inc, b.submit(inc, 1)).result(WAIT_S)
            assert "gcref trust midway" in f"{caught.value} {caught.value.__cause__}"


class Impostor:
    """A party with a key that is let in, under the id of somebody's endpoint.

    Args:
        id: whose id.
        pair: her own key.
    """

    def __init__(self, id: bytes, pair: keys.KeyPair) -> None:
        identity = pe.Identity(id, pe.ENDPOINT, pair.public, time.time_ns() // 1000)
        self._peers = pe.Peers(identity, lambda key, hello: pe.PEER, time.monotonic())
        self._carrier = ZeroMQCarrier(pair, {})

    def come_in(self, record: EndpointRecord) -> bool:
        """Speak to an endpoint; gives whether it lets her in. The connection stays."""
        ways = record.candidates(frozenset(DIRECT))
        todo: list[Any] = [*self._peers.handle(pe.Know(record.id, ways, time.monotonic()))]

        def look() -> bool:
            while todo:
                match todo.pop(0):
                    case pe.Dial() as dial:
                        self._carrier.dial(dial.link, dial.address, dial.server_key)
                    case pe.Transmit(link, frame):
                        self._carrier.send(link, frame)
            for event in self._carrier.poll(0.01):
                if not isinstance(event, FdReady):
                    todo.extend(self._peers.handle(event))
            todo.extend(self._peers.handle(pe.Tick(time.monotonic())))
            todo.extend(self._peers.flush(time.monotonic()))
            return self._peers.is_up(record.id)

        return wait_until(look, what="an answer", timeout_s=30)

    def close(self) -> None:
        self._carrier.close()


def test_who_comes_in_as_another_endpoint_is_put_out_when_that_is_needed(
    places: Places, ada: HubClient
) -> None:
    """Eve's key may come in at Polaris, and Polaris has not met Midway."""
    polariss, eve = places("p"), keys.generate()
    with polariss.endpoint("polaris", ("direct", "ipc")), places("m").endpoint("midway", DIRECT) as midway:
        polaris = records.read("polaris", polariss.home)
        assert polaris is not None
        allowed = polariss.home / "endpoints" / "polaris" / "authorized_keys"
        allowed.parent.mkdir(parents=True, exist_ok=True)
        allowed.write_text(f"{eve.public.decode()} peer eve\n")
        impostor = Impostor(midway.endpoint_id.bytes, eve)
        try:
            assert impostor.come_in(polaris)
            with (
                places("laptop").entered(),
                Client(carriers=DIRECT) as client,
                Executor("polaris", client) as a,
                Executor("midway", client) as b,
            ):
                assert a.submit(inc, b.submit(inc, 1)).result(WAIT_S) == 3
        finally:
            impostor.close()


def test_without_the_hub_who_is_connected_goes_on_and_others_are_found_when_it_is_back(
    places: Places, hub: Hub, tmp_path: Path
) -> None:
    gate = Gate.at(tmp_path)
    with (
        places("p").endpoint("polaris"),
        places("m").endpoint("midway"),
        places("laptop").entered(),
        Client(carriers=MAIL) as client,
        Executor("polaris", client) as a,
        Executor("midway", client) as b,
    ):
        first = a.submit(inc, 1)
        held = b.submit(hold, gate, 7)
        assert first.result(WAIT_S) == 2
        wait_until(held.running, what="it to run")
        hub.stop()
        try:
            assert a.submit(inc, 2).result(WAIT_S) == 3
            there = b.submit(inc, first)  # midway has never met polaris
            gate.open()
            assert held.result(WAIT_S) == 7
        finally:
            hub.start()
        assert there.result(WAIT_S) == 3
        assert a.submit(inc, held).result(WAIT_S) == 8


def test_who_was_forgotten_by_the_hub_registers_again(places: Places, ada: HubClient) -> None:
    here = places("here")
    with here.endpoint("site") as site:
        id = site.endpoint_id.bytes
        ada.withdraw(id)
        wait_until(lambda: _found(ada, id), what="it to be registered again")
        wait_until(lambda: here.status("site")["mailbox"]["up"], timeout_s=20, what="its mailbox to be back")
        with places("laptop").executor("site") as executor:
            assert executor.submit(inc, 1).result(WAIT_S) == 2


def test_f2_an_agent_that_is_killed_asks_again_by_mail_for_what_it_waits_for(
    places: Places, ada: HubClient, tmp_path: Path
) -> None:
    """Its journal names the home, and only the hub knows where that is."""
    gate, there = Gate.at(tmp_path), places("m")
    with (
        places("p").endpoint("polaris"),
        there.named("midway", ada) as midway,
        places("laptop").entered(),
        Client(carriers=MAIL) as client,
        Executor("polaris", client) as a,
        Executor("midway", client) as b,
    ):
        held = a.submit(hold, gate, 7)
        waits = b.submit(inc, held)
        assert b.submit(inc, 1).result(WAIT_S) == 2, "what came before it has come too"
        with there.entered():
            midway.kill()
            midway.start()
        gate.open()
        assert waits.result(WAIT_S) == 8


def test_a_mailbox_that_the_broker_has_lost_is_made_again(places: Places, rabbit: Rabbit) -> None:
    here = places("here")
    with here.endpoint("site") as site, places("laptop").executor("site") as executor:
        assert executor.submit(inc, 1).result(WAIT_S) == 2
        connects = here.status("site")["mailbox"]["connects"]
        rabbit.remove(site.endpoint_id.bytes)
        wait_until(
            lambda: _with_mail(here.status("site")) and here.status("site")["mailbox"]["connects"] > connects,
            timeout_s=20,
            what="its mailbox to be back",
        )
        assert executor.submit(inc, 2).result(WAIT_S) == 3


def test_an_endpoint_whose_owner_is_removed_lets_nobody_in_by_the_hubs_word(places: Places, hub: Hub) -> None:
    here = places("carols", "carol")
    with here.endpoint("site"), places("laptop", "carol").executor("site") as executor:
        assert executor.submit(inc, 1).result(WAIT_S) == 2
        hub.command("hub", "user", "remove", "carol")
        told = wait_until(lambda: _refused_by_hub(here.status("site")), what="the hub to refuse it")
        assert told["registered_unix_s"] is None
        assert not told["mailbox"]["up"]


def test_a_stop_waits_for_the_hub_no_longer_than_for_a_word(places: Places, hub: Hub) -> None:
    site = places("here").endpoint("site")
    hub.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        site.stop()
        assert time.monotonic() - began < LAST_WORD_S + 4
    finally:
        hub.signal(signal.SIGCONT)


def test_the_hub_hears_of_tasks_that_take_their_time(places: Places, ada: HubClient, tmp_path: Path) -> None:
    gate = Gate.at(tmp_path)
    with places("here").endpoint("site") as site, places("laptop").executor("site") as executor:
        short, held = executor.submit(inc, 1), executor.submit(hold, gate)
        task, other = uuid.UUID(held.task_id).bytes, uuid.UUID(short.task_id).bytes
        event = wait_until(lambda: ada.where_is(task), what="the hub to know of the task")[0]
        gate.open()
        assert (event.endpoint, event.endpoint_name) == (site.endpoint_id.bytes, "ada/site")
        assert held.result(WAIT_S) == 1
        assert ada.where_is(other) == [], "nobody has to know of a task that is over"


def test_a_wrong_token_harms_nothing_but_the_hubs_part(places: Places, hub: Hub) -> None:
    """The endpoint works for those who find it without the hub, and says what is wrong."""
    here = places("here")
    here._variables["GCREF_TOKEN"] = "not-a-token"
    with here.endpoint("site", ("ipc", "broker")):
        told = here.status("site")
        assert "token" in told["error"]
        assert told["registered_unix_s"] is None
        assert told["mailbox"]["error"] == told["error"]
        assert "not-a-token" not in str(told)
        with here.executor("site", ("ipc",)) as executor:
            assert executor.submit(inc, 1).result(WAIT_S) == 2


def _found(client: HubClient, id: bytes) -> bool:
    """Whether the hub knows an endpoint, with a mailbox if it wants one."""
    try:
        client.find(id)
    except NotFoundError:
        return False
    return True


def _with_mail(hub: dict[str, Any]) -> dict[str, Any]:
    """These facts of an endpoint, once its mailbox is open."""
    return hub if hub["mailbox"]["up"] else {}


def _refused_by_hub(hub: dict[str, Any]) -> dict[str, Any]:
    """These facts of an endpoint, once the hub refuses it."""
    return hub if hub["error"] is not None else {}


def _refusal(executor: Executor) -> BaseException | None:
    return executor.submit(inc, 1).exception(WAIT_S)
