"""Memory and disk run out (L3): tasks come in turn, objects spill and come back exact, what has no room ends in typed errors.

The disks here are small file systems of their own, so that "full" is what the kernel says.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Final

import pytest

from gcref import Client, ComputeFuture, Executor, LocalEndpoint
from gcref.errors import DependencyError, StoreFullError, WorkerLostError
from tests.support.deaths import runs, wait_forever
from tests.support.endpoints import ask, host_folder, store_of, used_bytes
from tests.support.named import running
from tests.support.tasks import Gate, blob_of, hold, inc
from tests.support.waiting import patience, wait_until

WAIT_S: Final = patience(60)
MB: Final = 1_000_000
LIMIT: Final = 20 * MB
BIG: Final = 12 * MB
"""60 % of the limit."""
CARRIERS: Final = ("direct",)  # bytes are to be moved, not linked

Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Makes a small file system and gives the folder where it is mounted."""
    with ExitStack() as mounted:

        def mount(size: int) -> Path:
            folder = tmp_path / f"disk{size}"
            folder.mkdir()
            mount_at(folder, size, mounted)
            return folder

        yield mount


def mount_at(folder: Path, size: int, mounted: ExitStack) -> None:
    assert os.geteuid() == 0, "only root can mount a file system"
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no file system can be mounted here: {done.stderr}"
    mounted.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)


def digest_of(*blobs: bytes) -> bytes:
    return blake2b(b"".join(blobs)).digest()


def note(log: str, name: int, *blobs: bytes) -> bytes:
    """Writes down that it ran, and gives the digest of what it was given."""
    with open(log, "a", encoding="ascii") as file:
        file.write(f"{name}\n")
    return digest_of(*blobs)


def noted(log: Path) -> list[int]:
    return [int(line) for line in log.read_text(encoding="ascii").split()] if log.exists() else []


def digests(values: list[ComputeFuture[bytes]]) -> list[bytes]:
    return [digest_of(value.result(WAIT_S)) for value in values]


@pytest.fixture
def sites(home: Path) -> Iterator[tuple[Executor, Executor]]:
    """Executors at "large", where values are made, and at "small", whose store has room for one of 60 %."""
    with (
        LocalEndpoint("large", workers=2, carriers=CARRIERS),
        LocalEndpoint("small", workers=2, carriers=CARRIERS, config={"store_limit_bytes": LIMIT}),
        Client() as client,
    ):
        yield Executor("large", client), Executor("small", client)


# ------------------------------------------------------------------------------------------------------ admission


def test_l3_tasks_of_60_percent_of_memory_run_in_turn_and_in_memory(
    sites: tuple[Executor, Executor], tmp_path: Path
) -> None:
    large, small = sites
    values = [large.submit(blob_of, BIG) for _ in range(8)]
    expected = digests(values)
    log = tmp_path / "log"
    found = [small.submit(note, str(log), n, value) for n, value in enumerate(values)]
    assert [future.result(WAIT_S) for future in found] == expected
    assert noted(log) == list(range(8)), "in the order in which they were submitted"
    store = store_of("small")
    assert (store["disk_bytes"], store["spilled"]) == (0, 0), "nobody had to go to disk for that"


def test_l3_of_a_task_all_arguments_are_brought_or_none(
    sites: tuple[Executor, Executor], tmp_path: Path
) -> None:
    """Tasks of 2 × 30 %: a store that brings one argument of each has no room for the second ones."""
    large, small = sites
    values = [large.submit(blob_of, BIG // 2) for _ in range(16)]
    expected = [
        digest_of(a.result(WAIT_S), b.result(WAIT_S)) for a, b in zip(values[:8], values[8:], strict=True)
    ]
    log = tmp_path / "log"
    found = [
        small.submit(note, str(log), n, a, b)
        for n, (a, b) in enumerate(zip(values[:8], values[8:], strict=True))
    ]
    assert [future.result(WAIT_S) for future in found] == expected
    assert sorted(noted(log)) == list(range(8))
    assert store_of("small")["spilled"] == 0


def test_l3_uploads_take_turns_too(sites: tuple[Executor, Executor], tmp_path: Path) -> None:
    _, small = sites
    values = [os.urandom(BIG) for _ in range(6)]
    log = tmp_path / "log"
    found = [small.submit(note, str(log), n, value) for n, value in enumerate(values)]
    assert [future.result(WAIT_S) for future in found] == [digest_of(value) for value in values]
    assert noted(log) == list(range(6))
    assert store_of("small")["spilled"] == 0


def nested(value: bytes) -> bytes:
    """While it holds its own 60 %, it waits for a task of its own endpoint that needs 60 % too."""
    from gcref import Executor

    with Executor("large") as large, Executor("small") as small:
        other = large.submit(blob_of, BIG)
        return digest_of(value) + small.submit(read_of, other).result(WAIT_S)


def read_of(value: bytes) -> bytes:
    return digest_of(value)


def test_l3_a_task_that_waits_for_another_large_one_does_not_stop_it(
    sites: tuple[Executor, Executor],
) -> None:
    large, small = sites
    value = large.submit(blob_of, BIG)
    (digest,) = digests([value])
    found = small.submit(nested, value).result(WAIT_S)
    assert found[: len(digest)] == digest
    assert len(found) == 2 * len(digest)


def test_l3_a_small_one_need_not_wait_for_the_large_ones(
    sites: tuple[Executor, Executor], tmp_path: Path
) -> None:
    large, small = sites
    gate = Gate.at(tmp_path)
    values = [large.submit(blob_of, BIG) for _ in range(2)]
    little = large.submit(blob_of, MB)
    expected = digests([*values, little])
    holding = small.submit(hold, gate, 1, values[0])
    wait_until(holding.running, what="the first to run")
    waiting = small.submit(read_of, values[1])
    assert small.submit(read_of, little).result(WAIT_S) == expected[2]
    assert not waiting.done()
    gate.open()
    assert (holding.result(WAIT_S), waiting.result(WAIT_S)) == (1, expected[1])


def test_l3_an_argument_larger_than_the_store_is_refused_at_once(sites: tuple[Executor, Executor]) -> None:
    large, small = sites
    value = large.submit(blob_of, LIMIT + MB)
    with pytest.raises((StoreFullError, DependencyError)) as caught:
        small.submit(read_of, value).result(10)
    error = caught.value
    assert isinstance(error if isinstance(error, StoreFullError) else error.__cause__, StoreFullError)
    assert small.submit(inc, 1).result(WAIT_S) == 2


# ------------------------------------------------------------------------------------------------- full, for real


def endpoint(name: str, disk: Path, *, wait_s: float, workers: int = 2) -> LocalEndpoint:
    config = {"store_limit_bytes": LIMIT, "spill_dir": str(disk), "store_wait_s": wait_s}
    return LocalEndpoint(name, workers=workers, carriers=CARRIERS, config=config)


def test_l3_spilled_values_come_back_exact_and_then_the_disk_is_full(home: Path, disk: Disk) -> None:
    """L3: spill, then back-pressure, then a `StoreFullError` for what has no room; the agent lives."""
    with endpoint("site", disk(12 * MB), wait_s=0.5) as site, Client() as client:
        executor = Executor("site", client)
        values = [executor.submit(blob_of, 5 * MB) for _ in range(9)]
        failed = [value for value in values if value.exception(WAIT_S) is not None]
        assert failed, "45 MB do not fit into 20 + 12"
        assert all(isinstance(value.exception(), StoreFullError) for value in failed)
        kept = [value for value in values if value not in failed]
        assert len(kept) >= 4
        assert store_of("site")["disk_bytes"] > 0
        first = digests(kept)
        assert [executor.submit(read_of, value).result(WAIT_S) for value in kept] == first
        kept.clear()
        values.clear()
        failed.clear()
        gc.collect()
        wait_until(lambda: not used_bytes("site"), what="everything to be freed")
        assert len(executor.submit(blob_of, 5 * MB).result(WAIT_S)) == 5 * MB
        assert ask("site")["name"] == "site"
        assert site.pid


def test_l3_results_wait_for_room(home: Path, disk: Disk) -> None:
    """Back-pressure: what does not fit now is there as soon as something else is let go."""
    with endpoint("site", disk(10 * MB), wait_s=WAIT_S), Client() as client:
        executor = Executor("site", client)
        kept = [executor.submit(blob_of, 9 * MB) for _ in range(3)]  # two in memory, one on disk
        assert [future.exception(WAIT_S) for future in kept] == [None] * 3
        late = [executor.submit(blob_of, 9 * MB) for _ in range(3)]
        wait_until(lambda: ask("site")["store"]["results_waiting"] == 2, what="both workers to wait for room")
        assert not any(future.done() for future in late)
        while kept:
            kept.pop()
            gc.collect()
        del kept
        wait_until(lambda: all(future.done() for future in late), timeout_s=WAIT_S, what="those that waited")
        assert [len(future.result(WAIT_S)) for future in late] == [9 * MB] * 3


def test_l3_pulls_wait_for_room(home: Path, disk: Disk) -> None:
    with (
        LocalEndpoint("large", workers=1, carriers=CARRIERS),
        endpoint("site", disk(10 * MB), wait_s=WAIT_S),
        Client() as client,
    ):
        large, executor = Executor("large", client), Executor("site", client)
        source = large.submit(blob_of, 9 * MB)
        expected = digests([source])
        kept = [executor.submit(blob_of, 9 * MB) for _ in range(3)]
        assert [future.exception(WAIT_S) for future in kept] == [None] * 3
        late = executor.submit(read_of, source)
        wait_until(lambda: ask("site")["store"]["pulls_refused"] == 1, what="the pull to be refused")
        assert not late.done()
        kept.pop()
        gc.collect()
        assert late.result(WAIT_S) == expected[0]


def leave_large_and_wait(path: str, site: str) -> None:
    """Submits a task with a large argument, which is not fetched yet when its worker dies."""
    left = Executor(site).submit(len, bytes(9 * MB))
    wait_forever(path)
    left.result()


@pytest.mark.parametrize("site", ["site", "other"])
@pytest.mark.parametrize("agent_dies", [False, True])
def test_nobody_waits_for_arguments_that_died_with_their_worker(
    home: Path, disk: Disk, tmp_path: Path, site: str, agent_dies: bool
) -> None:
    config = {"bind": "127.0.0.1", "store_limit_bytes": LIMIT, "spill_dir": str(disk(10 * MB))}
    with (
        running("site", store_wait_s=WAIT_S, **config) as one,
        running("other", workers=1),
        Client() as client,
    ):
        executor = Executor("site", client)
        kept = [executor.submit(blob_of, 9 * MB) for _ in range(3)]
        assert [future.exception(WAIT_S) for future in kept] == [None] * 3
        before = ask("site")["objects"]
        path = tmp_path / "runs"
        lost = executor.submit(leave_large_and_wait, str(path), site)
        (pid,) = wait_until(lambda: runs(path), what="the task to submit another one")
        wait_until(lambda: ask("site")["store"]["pulls_refused"] == 1, what="its argument to wait for room")
        if agent_dies:
            one.kill()
        os.kill(pid, signal.SIGKILL)
        if agent_dies:
            one.start()
        assert isinstance(lost.exception(WAIT_S), WorkerLostError)
        del lost
        wait_until(lambda: ask("site")["objects"] == before, what="what it has left behind to be given up")
        store = ask("site")["store"]
        assert (store["pulls_waiting"], store["pulls_in_flight"]) == (0, 0)
        links = ask("site")["links"].values()
        away = [link for link in links if link["kind"] == "client" and not link["up"]]
        assert not away, "the worker is not expected back"


def test_l3_a_pull_that_finds_no_room_ends_in_a_typed_error(home: Path, disk: Disk) -> None:
    with (
        LocalEndpoint("large", workers=1, carriers=CARRIERS),
        endpoint("site", disk(10 * MB), wait_s=0.5),
        Client() as client,
    ):
        large, executor = Executor("large", client), Executor("site", client)
        source = large.submit(blob_of, 9 * MB)
        kept = [executor.submit(blob_of, 9 * MB) for _ in range(3)]
        assert [future.exception(WAIT_S) for future in kept] == [None] * 3
        error = executor.submit(read_of, source).exception(WAIT_S)
        assert isinstance(error, DependencyError | StoreFullError)
        assert isinstance(error if isinstance(error, StoreFullError) else error.__cause__, StoreFullError)
        assert executor.submit(inc, 1).result(WAIT_S) == 2
        kept.clear()
        gc.collect()
        assert executor.submit(read_of, source).exception(WAIT_S) is None, "the next one finds room"


def test_l3_shared_memory_that_others_have_filled(home: Path, disk: Disk) -> None:
    """The store may take more than there is: what the kernel refuses goes to disk, and is refused when that is full too."""
    with (
        endpoint("site", disk(10 * MB), wait_s=0.5, workers=1),
        ExitStack() as mounted,
        Client() as client,
    ):
        mount_at(host_folder("site") / "segments", 8 * MB, mounted)
        executor = Executor("site", client)
        kept = [executor.submit(blob_of, 6 * MB) for _ in range(2)]
        assert [future.exception(WAIT_S) for future in kept] == [None, None]
        assert store_of("site")["disk_bytes"] > 0
        full = executor.submit(blob_of, 6 * MB).exception(WAIT_S)
        assert isinstance(full, StoreFullError)
        sums = digests(kept)
        assert [executor.submit(read_of, future).result(WAIT_S) for future in kept] == sums
        assert executor.submit(inc, 1).result(WAIT_S) == 2
        kept.clear()
        gc.collect()
        wait_until(lambda: not used_bytes("site"), what="everything to be freed")
        assert len(executor.submit(blob_of, 6 * MB).result(WAIT_S)) == 6 * MB
