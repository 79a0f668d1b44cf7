"""The client comes back: killed and started again (F8), cut off for a while (F9), away for longer than its lease.

Or its endpoint comes back, by a new process or at another address. What was asked for is answered, or ends in a typed error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Final

import pytest

from gcref import Client, ComputeFuture, Executor, LocalEndpoint, errors
from gcref.directory import records
from tests.conftest import Sites
from tests.support.endpoints import store_of, used_bytes
from tests.support.named import NamedEndpoint, running
from tests.support.programs import command_of, environment
from tests.support.proxy import Proxy, proxied
from tests.support.tasks import Gate, blob_of, fail, hold, inc, touch
from tests.support.waiting import patience, wait_until

WAIT_S: Final = patience(30)
LARGE: Final = 3_000_000

FIRST_LIFE: Final = """
import sys
group, gate = sys.argv[1], Gate(sys.argv[2])
a, b = (gcref.Executor(name, task_group_id=group) for name in ("polaris", "midway"))
done = [a.submit(inc, n) for n in range(3)]
large, bad = a.submit(blob_of, 3_000_000), a.submit(fail, "on purpose")
held = a.submit(hold, gate, 7)
after = a.submit(inc, held)
there = b.submit(inc, held)
length = b.submit(len, large)
for f in (*done, length):
    f.result(30)
assert bad.exception(30) is not None
while not held.running():
    pass
print(*[f.task_id for f in (*done, large, bad, held, after)], flush=True)
print(*[f.task_id for f in (there, length)], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A closed gate; opened at the end, so that no task is left waiting."""
    found = Gate.at(tmp_path)
    yield found
    found.open()


def killed_client(group: str, gate: Gate, folder: Path) -> tuple[list[str], list[str]]:
    """A client that submits a graph over two sites, and is killed while it waits.

    Returns:
        The ids of its tasks at polaris, in the order of submission, and at midway.
    """
    with subprocess.Popen(
        [*command_of(FIRST_LIFE, folder), group, gate.path],
        cwd=folder,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        here, there = process.stdout.readline().split(), process.stdout.readline().split()
        process.kill()
    assert len(here) == 7
    return here, there


# ------------------------------------------------------------------------------------------------------------- F8


def test_f8_a_killed_client_and_its_successor(two_sites: Sites, gate: Gate, tmp_path: Path) -> None:
    """It finds all tasks of the group; what ran goes on; what was done is done, large values too."""
    group = str(uuid.uuid4())
    here, there = killed_client(group, gate, tmp_path)
    with (
        Client() as client,
        Executor("polaris", client, task_group_id=group) as a,
        Executor("midway", client, task_group_id=group) as b,
    ):
        found = {f.task_id: f for f in a.reload_tasks()}
        assert set(found) == set(here)
        assert [f.done() for f in map(found.__getitem__, here)] == [True] * 5 + [False] * 2
        assert found[here[5]].running()
        assert [found[id].result(0) for id in here[:3]] == [1, 2, 3]
        assert len(found[here[3]].result(WAIT_S)) == LARGE
        with pytest.raises(ValueError, match="on purpose"):
            found[here[4]].result(0)
        elsewhere = {f.task_id: f for f in b.reload_tasks()}
        assert set(elsewhere) == set(there)
        assert [elsewhere[id].done() for id in there] == [False, True]
        assert elsewhere[there[1]].result(0) == LARGE
        again = a.reload_tasks()
        assert {id(f) for f in again} == {id(f) for f in found.values()}, "who has a future gets the same"
        more = b.submit(inc, found[here[6]])
        gate.open()
        assert [found[id].result(WAIT_S) for id in here[5:]] == [7, 8]
        assert elsewhere[there[0]].result(WAIT_S) == 8
        assert more.result(WAIT_S) == 9


def test_f8_the_graph_goes_on_without_its_client(two_sites: Sites, gate: Gate, tmp_path: Path) -> None:
    group = str(uuid.uuid4())
    here, there = killed_client(group, gate, tmp_path)
    gate.open()
    with Client() as client, Executor("midway", client) as b:

        def ended() -> bool:
            return all(f.done() for f in b.reload_tasks(group))

        wait_until(ended, timeout_s=30, what="the graph to end by itself")
        found = {f.task_id: f.result(0) for f in b.reload_tasks(group)}
        assert found == {there[0]: 8, there[1]: LARGE}
        with Executor("polaris", client) as a:
            assert len(a.reload_tasks(group)) == len(here)


def test_f8_the_agent_is_killed_too(home: Path, gate: Gate, tmp_path: Path) -> None:
    """Client and agents die, the agents are started again, and then a new client comes."""
    group = str(uuid.uuid4())
    sites = [NamedEndpoint(name, workers=1, bind="127.0.0.1") for name in ("polaris", "midway")]
    try:
        for site in sites:
            site.start()
        here, there = killed_client(group, gate, tmp_path)
        for site in sites:
            site.kill()
        for site in sites:
            site.start()
        gate.open()
        with Client() as client, Executor("polaris", client) as a, Executor("midway", client) as b:
            found = {f.task_id: f for f in a.reload_tasks(group)}
            assert set(found) == set(here)
            assert [found[id].result(WAIT_S) for id in here[:3]] == [1, 2, 3]
            assert len(found[here[3]].result(WAIT_S)) == LARGE
            assert isinstance(found[here[4]].exception(WAIT_S), ValueError)
            assert [found[id].result(WAIT_S) for id in here[5:]] == [7, 8]
            elsewhere = {f.task_id: f.result(WAIT_S) for f in b.reload_tasks(group)}
            assert elsewhere == {there[0]: 8, there[1]: LARGE}
    finally:
        gate.open()
        for site in sites:
            site.remove()


def test_f8_a_group_stays_when_one_of_its_clients_has_left(two_sites: Sites) -> None:
    group = uuid.uuid4()
    with Client() as first, Executor("polaris", first, task_group_id=group) as a:
        kept = a.submit(inc, 1)
        assert kept.result(WAIT_S) == 2
        with Client() as second, Executor("polaris", second, task_group_id=group) as b:
            f = b.submit(inc, 5)
            assert f.result(WAIT_S) == 6
            assert {g.task_id for g in b.reload_tasks()} == {kept.task_id, f.task_id}
        del f

        def reloaded() -> set[str]:
            with Client() as third, Executor("polaris", third) as c:
                return {g.task_id for g in c.reload_tasks(group)}

        wait_until(lambda: reloaded() == {kept.task_id}, what="what the second client had to be released")


def test_f8_what_is_reloaded_and_dropped_is_released(two_sites: Sites) -> None:
    group, before = uuid.uuid4(), used_bytes("polaris")  # killed clients keep theirs as long as their lease
    with Client() as first, Executor("polaris", first, task_group_id=group) as a:
        f = a.submit(blob_of, LARGE)
        f.exception(WAIT_S)
        with Client() as second, Executor("polaris", second, task_group_id=group) as b:
            found = b.reload_tasks()
            del f
            assert len(found[0].result(WAIT_S)) == LARGE, "it keeps what the first one has let go of"
            del found
            wait_until(lambda: not a.reload_tasks(), what="the last future to be gone")
    wait_until(lambda: used_bytes("polaris") == before, what="the bytes to go")


def test_f8_a_group_that_nobody_knows_has_no_tasks(two_sites: Sites) -> None:
    with Executor("polaris") as executor:
        assert executor.reload_tasks() == []
        assert executor.reload_tasks(uuid.uuid4()) == []


def test_f8_an_endpoint_that_does_not_run_is_a_typed_error(home: Path) -> None:
    with LocalEndpoint("site", workers=1), Executor("site") as executor:
        executor.reload_tasks()
    with pytest.raises(RuntimeError):
        executor.reload_tasks()
    site = NamedEndpoint("polaris", workers=1, bind="127.0.0.1")
    try:
        site.start()
        site.stop()
        with (
            Client() as client,
            Executor("polaris", client) as executor,
            pytest.raises(errors.EndpointLostError, match="endpoint-worker start polaris"),
        ):
            executor.reload_tasks()
    finally:
        site.remove()


# ------------------------------------------------------------------------------------------------------------- F9

OUTAGES: Final = {"broken": ("cut", "restore"), "silent": ("freeze", "thaw")}


@pytest.mark.parametrize("outage", OUTAGES)
def test_f9_a_network_that_is_away_for_a_while_changes_nothing_but_time(
    home: Path, gate: Gate, tmp_path: Path, outage: str
) -> None:
    """Tasks that run, end and are submitted meanwhile; values on their way in both directions; requests to cancel."""
    (home / "config.toml").parent.mkdir(parents=True)
    (home / "config.toml").write_text("heartbeat_s = 0.3\n")
    ends = Gate.at(tmp_path, "ends")
    away, back = OUTAGES[outage]
    with (
        LocalEndpoint("polaris", workers=3, config={"heartbeat_s": 0.3}),
        proxied("polaris") as proxies,
        Client(carriers=("direct",)) as client,
        Executor("polaris", client) as executor,
    ):
        large, fetched = executor.submit(blob_of, LARGE), executor.submit(blob_of, LARGE)
        assert len(fetched.result(WAIT_S)) == LARGE
        large.exception(WAIT_S)
        held, ended = executor.submit(hold, gate, 1), executor.submit(hold, ends, 2)
        waiting = executor.submit(touch, str(tmp_path / "never"), held)
        wait_until(lambda: held.running() and ended.running(), what="the tasks to run")
        for proxy in proxies:
            getattr(proxy, away)()
        wait_until(lambda: "out of reach" in held.explain(), timeout_s=15, what=held.explain)
        ends.open()
        sent = executor.submit(inc, ended)
        uploaded = executor.submit(len, bytes(LARGE))
        since = time.monotonic()
        assert waiting.cancel() is False
        assert time.monotonic() - since < patience(1.5)
        with pytest.raises(TimeoutError):
            large.result(0.2)
        pending: list[ComputeFuture[Any]] = [held, ended, sent, uploaded, waiting]
        assert not any(f.done() for f in pending)
        for proxy in proxies:
            getattr(proxy, back)()
        assert sent.result(WAIT_S) == 3
        assert ended.result(WAIT_S) == 2
        assert uploaded.result(WAIT_S) == LARGE
        assert len(large.result(WAIT_S)) == LARGE
        with pytest.raises(CancelledError):
            waiting.result(WAIT_S)
        gate.open()
        assert held.result(WAIT_S) == 1
    assert not (tmp_path / "never").exists(), "the request to cancel stood"


def test_f9_it_is_given_up_after_the_configured_time(home: Path, gate: Gate) -> None:
    home.mkdir(parents=True)
    (home / "config.toml").write_text("endpoint_lost_s = 1.0\nheartbeat_s = 0.2\n")
    with (
        LocalEndpoint("polaris", workers=1),
        proxied("polaris") as proxies,
        Client(carriers=("direct",)) as client,
        Executor("polaris", client) as executor,
    ):
        large, held = executor.submit(blob_of, LARGE), executor.submit(hold, gate)
        wait_until(held.running, what="the task to run")
        for proxy in proxies:
            proxy.freeze()
        since = time.monotonic()
        with pytest.raises(errors.EndpointLostError, match="out of reach for 1 s"):
            held.result(WAIT_S)
        with pytest.raises(errors.LostError):
            large.result(WAIT_S)
        late = executor.submit(inc, 1)
        assert isinstance(late.exception(WAIT_S), errors.EndpointLostError)
        assert time.monotonic() - since < patience(10)
        for proxy in proxies:
            proxy.thaw()
        gate.open()

        def is_back() -> bool:
            return executor.submit(inc, 1).exception(WAIT_S) is None

        wait_until(
            is_back, timeout_s=30, what="it to be reached again; a busy machine may take its second for that"
        )
        assert len(large.result(WAIT_S)) == LARGE, "it can be tried again"


# ---------------------------------------------------------------------------------------------------------- leases


def test_a_client_that_was_away_for_longer_than_its_lease_hears_that_its_tasks_are_gone(
    home: Path, gate: Gate
) -> None:
    config = {"lease_s": 0.5, "heartbeat_s": 0.2}
    with (
        LocalEndpoint("polaris", workers=1, config=config),
        contextlib.ExitStack() as stack,
        Client(carriers=("direct",)) as client,
    ):
        record = records.resolve("polaris")  # leads past the proxies
        proxies = stack.enter_context(proxied("polaris"))
        executor = stack.enter_context(Executor("polaris", client))
        done, held = executor.submit(blob_of, LARGE), executor.submit(hold, gate)
        wait_until(held.running, what="the task to run")
        done.exception(WAIT_S)
        for proxy in proxies:
            proxy.cut()
        wait_until(lambda: not store_of(record)["used_bytes"], what="the lease to end")
        for proxy in proxies:
            proxy.restore()
        with pytest.raises(errors.EndpointLostError, match="submit it again"):
            held.result(WAIT_S)
        with pytest.raises(errors.ObjectLostError):
            done.result(WAIT_S)
        gate.open()
        assert executor.submit(inc, 1).result(WAIT_S) == 2


# ------------------------------------------------------------------------------------------ the endpoint comes back


@pytest.fixture
def polaris(home: Path) -> Iterator[NamedEndpoint]:
    """An endpoint that can be killed and started again."""
    with running("polaris", workers=1, bind="127.0.0.1") as endpoint:
        yield endpoint


def test_what_an_endpoint_was_asked_before_it_died_it_is_asked_again(
    polaris: NamedEndpoint, gate: Gate, tmp_path: Path
) -> None:
    """A request to cancel stands; a large argument comes through; the functions are known still."""
    with Client() as client, Executor("polaris", client) as executor:
        held = executor.submit(hold, gate, 1)
        waiting = executor.submit(touch, str(tmp_path / "never"), held)
        wait_until(held.running, what="the task to run")
        polaris.signal(signal.SIGSTOP)
        assert waiting.cancel() is False
        uploaded = executor.submit(len, bytes(LARGE))
        again = executor.submit(hold, gate, 2)
        polaris.kill()
        polaris.start()
        with pytest.raises(CancelledError):
            waiting.result(WAIT_S)
        gate.open()
        assert held.result(WAIT_S) == 1
        assert uploaded.result(WAIT_S) == LARGE
        assert again.result(WAIT_S) == 2
        assert {f.task_id for f in executor.reload_tasks()} == {
            f.task_id for f in (held, waiting, uploaded, again)
        }
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("carrier", ["ipc", "direct"])
def test_an_endpoint_that_is_started_again_is_found_soon(polaris: NamedEndpoint, carrier: str) -> None:
    """However long it was away: what was tried in vain is not waited for."""
    with Client(carriers=(carrier,)) as client, Executor("polaris", client) as executor:
        assert executor.submit(inc, 1).result(WAIT_S) == 2
        polaris.kill()
        f = executor.submit(inc, 2)
        away = time.monotonic()
        wait_until(
            lambda: time.monotonic() - away > 3, what="it to be away for so long that it is tried rarely"
        )
        polaris.start()
        since = time.monotonic()
        assert f.result(WAIT_S) == 3
        assert time.monotonic() - since < patience(1.5)


def test_an_endpoint_that_listens_elsewhere_is_found_soon(home: Path) -> None:
    with (
        LocalEndpoint("polaris", workers=1),
        proxied("polaris") as (control, bulk),
        Client(carriers=("direct",)) as client,
        Executor("polaris", client) as executor,
    ):
        large = executor.submit(blob_of, LARGE)
        assert large.exception(WAIT_S) is None
        assert executor.submit(len, bytes(LARGE)).result(WAIT_S) == LARGE
        record = records.resolve("polaris")
        with Proxy(control.address) as moved, Proxy(bulk.address) as bulk_moved:
            moved_record = dataclasses.replace(record, control=(moved.address,), bulk=(bulk_moved.address,))
            records.write(moved_record)
            assert moved.connections == 0, "nobody looks while all is well"
            control.cut()
            control.restore()
            f = executor.submit(inc, 1)
            since = time.monotonic()
            assert f.result(WAIT_S) == 2
            assert time.monotonic() - since < patience(1.5)
            assert len(large.result(WAIT_S)) == LARGE
            assert moved.connections > 0


def test_a_client_that_was_suspended_goes_on(two_sites: Sites, gate: Gate, tmp_path: Path) -> None:
    """A laptop that sleeps: nobody has ended a connection, and time has passed."""
    text = f"""
        import sys
        a = gcref.Executor("polaris")
        held, large = a.submit(hold, Gate({gate.path!r}), 7), a.submit(blob_of, 3_000_000)
        while not held.running():
            pass
        print("ready", flush=True)
        print(held.result(30), len(large.result(30)), a.submit(inc, held).result(30), flush=True)
        """
    with subprocess.Popen(
        command_of(text, tmp_path), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        gate.open()
        with Executor("polaris") as executor:
            assert executor.submit(inc, 1).result(WAIT_S) == 2
            assert isinstance(executor.submit(fail, "meanwhile").exception(WAIT_S), ValueError)
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout.read().split() == ["7", str(LARGE), "8"]
