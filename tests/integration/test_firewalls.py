"""Sites behind firewalls: no way between them, one direction only, a way that is cut and comes back; and what doctor says."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from gcref import Client, ComputeFuture, Executor
from tests.support import netns
from tests.support.waiting import patience, wait_until
from tests.support.walled import WalledSites

HEARTBEAT_S = 0.5
MB = 1_000_000
BIG = 200 * MB


@pytest.fixture(scope="module")
def sites(_nothing_left: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WalledSites]:
    assert netns.missing() is None, netns.missing()
    with WalledSites(tmp_path_factory.mktemp("walled"), heartbeat_s=HEARTBEAT_S) as found:
        yield found


@pytest.fixture
def walls(sites: WalledSites) -> Iterator[WalledSites]:
    """The sites, with nothing passing between them, at the beginning and at the end."""
    yield sites
    sites.net.close("polaris", "midway")


@pytest.fixture
def client(walls: WalledSites) -> Iterator[Client]:
    with walls.client() as found:
        yield found


@pytest.fixture
def polaris(client: Client) -> Iterator[Executor]:
    with Executor("polaris", client) as executor:
        yield executor


@pytest.fixture
def midway(client: Client) -> Iterator[Executor]:
    with Executor("midway", client) as executor:
        yield executor


def made(size: int) -> bytes:
    return bytes(range(256)) * (size // 256)


def digest(data: bytes) -> tuple[int, int]:
    return len(data), zlib.crc32(data)


def pulled(future: ComputeFuture[Any]) -> dict[str, int]:
    """Bytes that the task's arguments took to come, by carrier."""
    future.result(timeout=patience(60))
    assert future.record is not None
    return dict(future.record.pulled_bytes)


def on_its_way(future: ComputeFuture[Any]) -> tuple[int, str]:
    """How much of the argument that a task waits for is here, in per cent, and over which carrier it comes."""
    told = re.search(r"on their way: .*\((\d+) %\)(.*)", future.explain())
    return (0, "") if told is None else (int(told[1]), told[2])


def test_f5_without_any_way_between_the_sites_everything_goes_through_the_broker(
    polaris: Executor, midway: Executor
) -> None:
    squares = [polaris.submit(pow, n, 2) for n in range(20)]
    whole = midway.submit(sum, squares)
    assert whole.result(timeout=patience(60)) == sum(n * n for n in range(20))

    big = polaris.submit(made, 5 * MB)
    seen = midway.submit(digest, big)
    assert seen.result(timeout=patience(60)) == digest(made(5 * MB))
    assert pulled(seen).keys() == {"broker"}
    assert pulled(seen)["broker"] > 5 * MB - 256
    told = seen.explain()
    assert "by broker" in told
    assert "reached by broker" in told
    assert "tried direct tcp://" in told

    back = polaris.submit(len, midway.submit(made, 2 * MB))  # and the other way round
    assert back.result(timeout=patience(60)) == 2 * MB - 2 * MB % 256
    assert pulled(back).keys() == {"broker"}


@pytest.mark.parametrize(("caller", "called"), [("polaris", "midway"), ("midway", "polaris")])
def test_f6_where_only_one_side_can_dial_both_have_the_direct_way(
    walls: WalledSites, polaris: Executor, midway: Executor, caller: str, called: str
) -> None:
    walls.net.open(caller, called)

    def is_direct(maker: Executor, user: Executor) -> bool:
        return pulled(user.submit(len, maker.submit(made, MB))).keys() == {"direct"}

    wait_until(lambda: is_direct(polaris, midway), timeout_s=30, what="midway to pull over the direct way")
    wait_until(lambda: is_direct(midway, polaris), timeout_s=30, what="polaris to pull over the direct way")


def test_a_direct_way_that_is_cut_in_the_middle_of_an_object_goes_on_over_the_broker_and_back(
    walls: WalledSites, polaris: Executor, midway: Executor
) -> None:
    """F5, F6: the next offset goes over the next best way, and nothing is fetched twice but what was under way."""
    walls.net.open("midway", "polaris")
    wait_until(
        lambda: pulled(midway.submit(len, polaris.submit(made, MB))).keys() == {"direct"},
        timeout_s=30,
        what="the direct way",
    )
    walls.net.open("midway", "polaris", mbytes_per_s=40)
    big = polaris.submit(made, BIG)
    wait_until(big.done, timeout_s=60, what="the object to be made")
    seen = midway.submit(digest, big)
    cut = wait_until(lambda: (here := on_its_way(seen)[0]) > 10 and here, what="a part of it to be here")
    walls.net.close("midway", "polaris")
    wait_until(lambda: on_its_way(seen)[0] > cut + 15, timeout_s=30, what="the broker to take over")
    walls.net.open("midway", "polaris")
    assert seen.result(timeout=patience(60)) == digest(made(BIG))
    ways = pulled(seen)
    print(cut, ways)
    assert ways.keys() == {"direct", "broker"}
    assert BIG - 256 < sum(ways.values()) < 1.05 * BIG


def test_doctor_tells_which_ways_there_are_and_why_others_fail(walls: WalledSites) -> None:
    walls.net.open("midway", "polaris")
    # At a site, and over the broker alone: its user is anywhere.
    there, back = json.loads(walls.polaris.run("gcref.cli", "doctor", "polaris", "midway", "--json"))
    assert (there["from"], there["to"], there["chosen"]) == ("polaris", "midway", "dial-back")
    assert (back["from"], back["to"], back["chosen"]) == ("midway", "polaris", "direct")
    ways = {way["carrier"]: way for way in there["ways"]}
    assert not ways["direct"]["works"]
    assert "a firewall drops it" in ways["direct"]["problem"]
    assert "bulk_port" in ways["direct"]["remedy"]
    for way in (
        ways["dial-back"],
        ways["broker"],
        *(way for way in back["ways"] if way["carrier"] == "direct"),
    ):
        assert way["works"], way
        assert 0 < way["latency_s"] < patience(1)
        assert way["bytes_per_s"] > MB
    walls.net.close("midway", "polaris")

    shown = walls.midway.run("gcref.cli", "doctor", "polaris")
    assert "this client → polaris: broker" in shown
    assert "►  broker" in shown


def test_doctor_says_whom_it_could_not_ask(walls: WalledSites) -> None:
    nobody = walls.polaris.run("gcref.cli", "doctor", "polaris", "atlantis", code=1)
    assert nobody == ""
