"""Endpoints that die, freeze or are cut off while others need them (F3, F4): all goes on, or ends in a typed error.

The sites are reached through proxies only: they listen at 127.0.0.1 and say that they are at 127.0.0.2, where the proxies are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from gcref import Executor, errors, ids
from gcref.config import disk_dir
from gcref.directory import records
from tests.support.endpoints import ask, used_bytes
from tests.support.named import NamedEndpoint
from tests.support.proxy import Proxy
from tests.support.tasks import Gate, blob_of, hold, inc
from tests.support.waiting import patience, wait_until

HEARTBEAT_S = 0.5
LOST_S = 4.0
MB = 1_000_000


class Site(NamedEndpoint):
    """An endpoint behind two proxies, one for messages and one for bulk."""

    def __init__(self, name: str, **settings: Any) -> None:
        reached = {"bind": "127.0.0.1", "advertise": ["127.0.0.2"], "carriers": ["direct"]}
        super().__init__(name, **reached, heartbeat_s=HEARTBEAT_S, **settings)
        self.start()
        record = records.resolve(name)
        self.control = _proxy_of(record.control)
        self.bulk = _proxy_of(record.bulk)

    def cut(self) -> None:
        """Break the connections of those who dialled it."""
        self.control.cut()
        self.bulk.cut()

    def restore(self) -> None:
        """End `cut`."""
        self.control.restore()
        self.bulk.restore()

    def freeze(self) -> None:
        """The network swallows everything, and nobody is told."""
        self.control.freeze()
        self.bulk.freeze()

    def thaw(self) -> None:
        """End `freeze`."""
        self.control.thaw()
        self.bulk.thaw()

    def status(self) -> dict[str, Any]:
        """What it says of itself, past the proxies."""
        record = records.resolve(self.name)
        inside = tuple(each.replace("127.0.0.2", "127.0.0.1") for each in record.control)
        return ask(dataclasses.replace(record, control=inside))

    def sees(self, other: Site) -> bool:
        """Whether it can talk to another one, as far as it knows."""
        found = [link for name, link in self.status()["links"].items() if name == ids.text(other.id)]
        return any(link["up"] for link in found)

    def remove(self) -> None:
        self.thaw()
        self.restore()
        super().remove()
        self.control.close()
        self.bulk.close()


def _proxy_of(addresses: tuple[str, ...]) -> Proxy:
    (address,) = addresses
    return Proxy(address.replace("127.0.0.2", "127.0.0.1"), at=address)


@pytest.fixture
def sites(home: Path) -> Iterator[tuple[Site, Site]]:
    """(A, B). B gives others up soon, A does not."""
    with contextlib.ExitStack() as closing:
        a = Site("polaris", endpoint_lost_s=60.0)
        closing.callback(a.remove)
        b = Site("midway", endpoint_lost_s=LOST_S)
        closing.callback(b.remove)
        yield a, b


@pytest.fixture
def patient(home: Path) -> Iterator[tuple[Site, Site]]:
    """(A, B), both patient."""
    with contextlib.ExitStack() as closing:
        a = Site("polaris", endpoint_lost_s=60.0)
        closing.callback(a.remove)
        b = Site("midway", endpoint_lost_s=60.0)
        closing.callback(b.remove)
        yield a, b


def digest_of(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.blake2b(data, digest_size=8).hexdigest()


def patterned(size: int) -> bytes:
    """The same bytes each time, no two ranges alike."""
    block = b"".join(n.to_bytes(4, "big") for n in range(250_000))
    return (block * (size // len(block) + 1))[:size]


def lost_in(error: BaseException) -> BaseException:
    """What a DependencyError comes from."""
    while isinstance(error, errors.DependencyError) and error.__cause__ is not None:
        error = error.__cause__
    return error


# ------------------------------------------------------------------------------------------------------------- F3


def test_f3_a_source_that_dies_before_the_pull_and_returns(patient: tuple[Site, Site]) -> None:
    a, b = patient
    with Executor("polaris") as at_a, Executor("midway") as at_b:
        large = at_a.submit(patterned, 5 * MB)
        wait([large], patience(30))
        a.kill()
        answer = at_b.submit(digest_of, large)
        wait_until(lambda: b.status()["tasks"]["submitted"] == 1, what="the task to be there")
        assert not answer.done()
        a.start()
        assert answer.result(patience(30)) == digest_of(patterned(5 * MB))


def test_f3_a_source_that_does_not_return_is_a_typed_error_in_time(sites: tuple[Site, Site]) -> None:
    a, _b = sites
    with Executor("polaris") as at_a, Executor("midway") as at_b:
        large = at_a.submit(patterned, 5 * MB)
        small = at_a.submit(inc, 1)
        ended: list[Any] = [large, small]
        wait(ended, patience(30))
        a.kill()
        began = time.monotonic()
        answers: list[Any] = [at_b.submit(digest_of, large), at_b.submit(inc, small)]
        for answer in answers:
            error = answer.exception(patience(LOST_S + 10))
            assert error is not None
            assert isinstance(lost_in(error), errors.EndpointLostError | errors.ObjectLostError), error
        assert time.monotonic() - began < patience(LOST_S + 5)
        assert at_b.submit(inc, 1).result(patience(30)) == 2, "it goes on"
        a.start()
        assert at_b.submit(inc, at_a.submit(inc, 1)).result(patience(30)) == 3, (
            "and meets the other one again"
        )


@pytest.mark.parametrize("how", ["cut", "killed", "stopped"])
def test_f3_in_the_middle_of_a_large_pull_it_goes_on_where_it_was(
    patient: tuple[Site, Site], how: str
) -> None:
    a, b = patient
    size = 300 * MB
    with Executor("polaris") as at_a, Executor("midway") as at_b:
        large = at_a.submit(patterned, size)
        wait([large], patience(60))
        before = a.bulk.bytes_down
        answer = at_b.submit(digest_of, large)
        wait_until(lambda: a.bulk.bytes_down - before > size // 4, timeout_s=30, what="a part of it")
        if how == "cut":
            a.cut()
            wait_until(lambda: not b.sees(a), what="B to notice")
            a.restore()
        elif how == "killed":
            a.kill()
            a.start()
        else:
            a.signal(signal.SIGSTOP)
            wait_until(lambda: not b.sees(a), timeout_s=20, what="B to notice")
            a.signal(signal.SIGCONT)
        assert answer.result(patience(60)) == digest_of(patterned(size))
        moved = a.bulk.bytes_down - before
        assert moved <= 1.1 * size, f"{moved / size:.2f} of it was moved"
        del large
    wait_until(lambda: used_bytes("midway") == 0, timeout_s=20, what="its bytes to be let go")


# ------------------------------------------------------------------------------------------------------------- F4


def test_f4_a_frozen_network_is_noticed_by_both_sides_within_three_heartbeats(
    patient: tuple[Site, Site],
) -> None:
    a, b = patient
    with Executor("polaris") as at_a, Executor("midway") as at_b:
        assert at_b.submit(inc, at_a.submit(inc, 1)).result(patience(30)) == 3
        assert a.sees(b)
        assert b.sees(a)
        # Only one of them has dialled the other; the way between them leads through this proxy or that one.
        a.freeze()
        b.freeze()
        began = time.monotonic()
        wait_until(lambda: not a.sees(b) and not b.sees(a), timeout_s=20, what="both to notice")
        took_s = time.monotonic() - began
        assert took_s <= patience(3 * HEARTBEAT_S + 1.0), f"it took {took_s:.2f} s"
        waiting = at_b.submit(inc, at_a.submit(inc, 10))
        a.thaw()
        b.thaw()
        assert waiting.result(patience(30)) == 12


def test_f4_a_stopped_endpoint_is_given_up_in_time_and_comes_back(
    sites: tuple[Site, Site], tmp_path: Path
) -> None:
    """Who was stopped for too long hears that it was given up: nobody waits for ever, on either side."""
    a, b = sites
    gate = Gate.at(tmp_path)
    with Executor("polaris") as at_a, Executor("midway") as at_b:
        late = at_a.submit(hold, gate, 1)
        here = at_b.submit(inc, late)  # B waits for A
        slow = at_b.submit(hold, gate, 5)
        there = at_a.submit(inc, slow)  # and A for B
        wait_until(lambda: a.sees(b) and b.sees(a), what="them to meet")
        a.signal(signal.SIGSTOP)
        error = here.exception(patience(LOST_S + 15))
        assert error is not None
        assert isinstance(lost_in(error), errors.EndpointLostError | errors.ObjectLostError), error
        a.signal(signal.SIGCONT)
        gate.open()
        assert slow.result(patience(30)) == 5
        assert late.result(patience(30)) == 1
        ended = there.exception(patience(30))
        assert ended is None or isinstance(
            lost_in(ended), errors.EndpointLostError | errors.ObjectLostError
        ), ended
        assert at_b.submit(inc, at_a.submit(inc, 1)).result(patience(30)) == 3
        assert at_a.submit(inc, at_b.submit(inc, 1)).result(patience(30)) == 3


# ------------------------------------------------------------------------------------------------------ wrong bytes


@pytest.mark.parametrize("needed_at", ["polaris", "midway"])
@pytest.mark.parametrize("retries", [0, 1])
def test_bytes_that_changed_on_the_sources_disk_are_found_and_made_again_where_possible(
    home: Path, retries: int, needed_at: str
) -> None:
    """Who finds it is the sender of the bytes, or a worker of that very site."""
    with contextlib.ExitStack() as closing:
        a = Site("polaris", store_limit_bytes=8 * MB)
        closing.callback(a.remove)
        b = Site("midway")
        closing.callback(b.remove)
        with Executor("polaris") as at_a, Executor("midway") as at_b:
            large = at_a.options(retries=retries).submit(patterned, 6 * MB)
            wait([large], patience(30))
            others = [at_a.submit(blob_of, 6 * MB) for _ in range(2)]
            wait(others, patience(30))
            spilled = wait_until(lambda: _spilled(a, patterned(6 * MB)[:4096]), what="it to be on disk")
            assert spilled is not None
            with spilled.open("r+b") as file:
                file.seek(3 * MB)
                file.write(bytes(64))
            answer = (at_a if needed_at == "polaris" else at_b).submit(digest_of, large)
            if retries:
                assert answer.result(patience(30)) == digest_of(patterned(6 * MB))
            else:
                error = answer.exception(patience(30))
                assert error is not None
                lost = lost_in(error)
                assert isinstance(lost, errors.ObjectLostError)
                assert lost.reason == "corrupt"
            assert at_b.submit(inc, 1).result(patience(30)) == 2
            del large, others, answer


def _spilled(site: Site, inside: bytes) -> Path | None:
    """The file on disk that holds these bytes near its beginning."""
    for path in (disk_dir(site.id) / "spill").rglob("*"):
        if path.is_file() and path.stat().st_size >= 6 * MB:
            with open(path, "rb") as file:
                if inside in file.read(1 << 16) and os.path.exists(path):
                    return path
    return None
