"""F2: the agent is killed at any moment; the next one takes up its journal, its workers and its bytes, and all completes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest

from gcref import Executor, errors
from gcref.config import disk_dir
from tests.support import deaths
from tests.support.deaths import runs
from tests.support.endpoints import ask, host_folder, worker_pids
from tests.support.named import NamedEndpoint, running
from tests.support.tasks import Gate, hold, inc
from tests.support.waiting import patience, wait_until

SETTINGS = {"workers": 2, "bind": "127.0.0.1", "heartbeat_s": 1.0, "endpoint_lost_s": 60.0}


@pytest.fixture
def polaris(home: Path) -> Iterator[NamedEndpoint]:
    """A running endpoint of its own."""
    with running("polaris", **SETTINGS) as endpoint:
        yield endpoint


@pytest.fixture
def midway(home: Path) -> Iterator[NamedEndpoint]:
    with running("midway", **SETTINGS) as endpoint:
        yield endpoint


def note_and_hold(path: str, gate: Gate, value: object = 1) -> object:
    """Leaves a line for each run, and ends when the gate is open."""
    return hold(gate, note(path, value))


def note(path: str, value: object = 1, *_after: object) -> object:
    deaths.note(path)
    return value


def total(array: np.ndarray) -> float:
    return float(array.sum())


def ones(count: int) -> np.ndarray:
    return np.ones(count)


def test_f2_waiting_queued_running_and_done_but_not_delivered(polaris: NamedEndpoint, tmp_path: Path) -> None:
    gate = Gate.at(tmp_path)
    lines = [tmp_path / f"runs-{n}" for n in range(6)]
    with Executor("polaris") as executor:
        done = executor.submit(note, str(lines[0]), "done")
        assert done.result(patience(30)) == "done"
        running = [executor.submit(note_and_hold, str(lines[n]), gate, n) for n in (1, 2)]
        wait_until(lambda: runs(lines[1]) and runs(lines[2]), what="both workers to be busy")
        queued = [executor.submit(note, str(lines[n]), n) for n in (3, 4)]
        waiting = executor.submit(note, str(lines[5]), "waited", *running)
        before = worker_pids("polaris")
        polaris.kill()
        assert not done.cancel()
        polaris.start()
        assert worker_pids("polaris") == before, "they live, and are adopted"
        gate.open()
        assert [future.result(patience(30)) for future in running] == [1, 2]
        assert [future.result(patience(30)) for future in queued] == [3, 4]
        assert waiting.result(patience(30)) == "waited"
    assert [len(runs(path)) for path in lines] == [1] * 6, "each ran once"


def test_f2_tasks_end_in_their_workers_while_nobody_listens(polaris: NamedEndpoint, tmp_path: Path) -> None:
    gate = Gate.at(tmp_path)
    path = tmp_path / "runs"
    with Executor("polaris") as executor:
        small = executor.submit(note_and_hold, str(path), gate, "small")
        large = executor.submit(hold, gate, np.arange(1_000_000))
        wait_until(lambda: ask("polaris")["tasks"]["submitted"] == 2 and runs(path), what="the tasks to run")
        wait_until(
            lambda: sum(w["running"] is not None for w in ask("polaris")["dispatch"]["workers"]) == 2,
            what="both to be started",
        )
        polaris.kill()
        gate.open()
        polaris.start()
        assert small.result(patience(30)) == "small"
        assert np.array_equal(large.result(patience(30)), np.arange(1_000_000))
    assert len(runs(path)) == 1


def test_f2_a_worker_that_died_meanwhile_has_used_an_attempt(polaris: NamedEndpoint, tmp_path: Path) -> None:
    gate = Gate.at(tmp_path)
    paths = [tmp_path / "once", tmp_path / "twice"]
    with Executor("polaris") as executor:
        once = executor.submit(note_and_hold, str(paths[0]), gate)
        twice = executor.options(retries=1).submit(note_and_hold, str(paths[1]), gate)
        wait_until(lambda: all(runs(path) for path in paths), what="both to run")
        polaris.kill()
        for path in paths:
            os.kill(runs(path)[0], signal.SIGKILL)
        gate.open()
        polaris.start()
        with pytest.raises(errors.WorkerLostError, match="SIGKILL"):
            once.result(patience(30))
        assert twice.result(patience(30)) == 1
    assert [len(runs(path)) for path in paths] == [1, 2]


def test_f2_large_values_survive_where_they_lie(polaris: NamedEndpoint, midway: NamedEndpoint) -> None:
    with Executor("polaris") as a, Executor("midway") as b:
        array = a.submit(ones, 2_000_000)
        put = a.put(np.full(1_000_000, 2.0))
        wait([array, put], patience(30))
        polaris.kill()
        polaris.start()
        assert b.submit(total, array).result(patience(30)) == 2_000_000
        assert b.submit(total, put).result(patience(30)) == 2_000_000
        assert float(array.result(patience(30)).sum()) == 2_000_000
        folder = host_folder("polaris")
        del array, put
        wait_until(
            lambda: not [p for p in (folder / "segments").iterdir() if p.is_file()],
            timeout_s=15,
            what="the segments to be freed",
        )


def test_f2_a_graph_over_two_sites_whose_agents_die_in_turn(
    polaris: NamedEndpoint, midway: NamedEndpoint, tmp_path: Path
) -> None:
    gate = Gate.at(tmp_path)
    with Executor("polaris") as a, Executor("midway") as b:
        assert [each.submit(inc, 0).result(patience(30)) for each in (a, b)] == [1, 1]  # they are met
        first = a.submit(hold, gate, 0)
        chain = [first]
        for n in range(40):
            chain.append((b if n % 2 else a).submit(inc, chain[-1]))
        polaris.kill()
        polaris.start()
        midway.kill()
        midway.start()
        gate.open()
        assert [future.result(patience(60)) for future in chain] == list(range(41))
        polaris.kill()
        more = b.submit(inc, chain[-2])
        polaris.start()
        assert more.result(patience(60)) == 40


def test_f2_killed_again_and_again(polaris: NamedEndpoint, tmp_path: Path) -> None:
    count = 400
    paths = [tmp_path / str(n) for n in range(count)]
    with Executor("polaris") as executor:
        assert executor.submit(inc, 0).result(patience(30)) == 1  # it is met
        futures = [executor.submit(note, str(path), n) for n, path in enumerate(paths)]
        for _ in range(3):
            polaris.kill()
            polaris.start()
            futures += [executor.submit(inc, future) for future in futures[:20]]
        assert [future.result(patience(60)) for future in futures[:count]] == list(range(count))
        assert [future.result(patience(60)) for future in futures[count:]] == [*range(1, 21)] * 3
    assert {len(runs(path)) for path in paths} == {1}


def test_an_orderly_stop_and_start_is_no_loss_either(polaris: NamedEndpoint, tmp_path: Path) -> None:
    gate = Gate.at(tmp_path)
    path = tmp_path / "runs"
    with Executor("polaris") as executor:
        lost = executor.submit(note_and_hold, str(path), gate)
        again = executor.options(retries=1).submit(note_and_hold, str(path), gate, "again")
        array = executor.put(np.arange(100_000))
        array.result(patience(30))
        wait_until(lambda: len(runs(path)) == 2, what="both to run")
        waiting = [executor.submit(inc, again) for _ in range(3)]
        polaris.stop()
        with pytest.raises(errors.WorkerLostError, match="stopped"):
            lost.result(patience(10))
        gate.open()
        polaris.start()
        assert again.result(patience(30)) == "again"
        for future in waiting:
            with pytest.raises(TypeError):
                future.result(patience(30))
        assert executor.submit(total, array).result(patience(30)) == sum(range(100_000))


def test_a_journal_that_cannot_be_read_is_kept_and_told(polaris: NamedEndpoint) -> None:
    with Executor("polaris") as executor:
        future = executor.submit(inc, 1)
        assert future.result(patience(30)) == 2
        polaris.kill()
        (snapshot,) = (disk_dir(polaris.id) / "journal").glob("*.snapshot")
        data = bytearray(snapshot.read_bytes())
        data[3] = 99
        snapshot.write_bytes(data)
        polaris.start()
        troubles = ask("polaris")["journal_troubles"]
        assert "version 99" in troubles[0]
        assert list((disk_dir(polaris.id) / "journal" / "kept").glob("*.snapshot.*"))
        assert executor.submit(inc, 5).result(patience(30)) == 6


def test_what_was_given_up_holds_up_nothing_that_comes_later(polaris: NamedEndpoint) -> None:
    polaris.stop()
    with Executor("polaris") as executor:
        lost = executor.submit(inc, 1)
        with pytest.raises(errors.EndpointLostError, match="not running"):
            lost.result(patience(30))
        polaris.start()
        with pytest.raises(errors.DependencyError):
            executor.submit(inc, lost).result(patience(30))
        assert executor.submit(inc, 2).result(patience(30)) == 3
