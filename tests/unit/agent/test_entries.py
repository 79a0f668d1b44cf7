"""What a worker is sent of a task, and that places which it never saw are given back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from endpoint_worker.agent.entries import ArgumentGone, Entries
from endpoint_worker.store import Store
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DEFAULT_OPTIONS, DONE, Group, Obj, Task

ME, GROUP = b"me" * 8, Group(b"group..." * 2, bytes(32), b"client.." * 2, b"k" * 40)
SIZE = 1 << 20
WORKER = 7
ARGS, FIRST, SECOND, SMALL, EARLIER = (bytes([n]) * 16 for n in range(1, 6))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    folder = Path(tempfile.mkdtemp(prefix="gcref-test-", dir="/dev/shm"))
    made = Store(folder / "segments", tmp_path / "spill", 16 * SIZE)
    for id in (ARGS, FIRST, SECOND):
        writable = made.begin(id, 1, SIZE)
        writable.write(0, bytes(SIZE))
        writable.seal()
    yield made
    made.close()
    shutil.rmtree(folder)


@pytest.fixture
def entries(store: Store) -> Entries:
    return Entries(ME, Resolver(ME, unknown_object_s=600, lease_s=600), store)


def stored(id: bytes) -> Obj:
    obj = Obj(id, ME, None, frozenset())
    obj.state, obj.size = DONE, SIZE
    return obj


def task_of(*deps: Obj, args: Obj | None = None) -> Task:
    task = Task(b"t" * 16, ME, GROUP, b"f" * 16, None, DEFAULT_OPTIONS, 0.0)
    task.deps, task.args = deps, args
    return task


def used(store: Store) -> int:
    return store.stats()["used_bytes"]


def test_an_entry_names_values_places_and_earlier_results(store: Store, entries: Entries) -> None:
    small = stored(SMALL)
    small.value = b"blob"
    entry = entries.make(
        WORKER, task_of(stored(FIRST), small, Obj(EARLIER, ME, None, frozenset()), args=stored(ARGS))
    )
    place, value, earlier = entry[6]
    assert (place[1], value, earlier) == (SIZE, b"blob", [EARLIER])
    assert entry[5][1] == SIZE
    assert set(store.seen([ARGS, FIRST, SECOND])) == {ARGS, FIRST}


def test_what_was_granted_comes_back_when_another_argument_is_gone(store: Store, entries: Entries) -> None:
    store.free([SECOND])
    gone = stored(SECOND)
    with pytest.raises(ArgumentGone) as caught:
        entries.make(WORKER, task_of(stored(FIRST), gone, args=stored(ARGS)))
    assert caught.value.obj is gone
    assert not store.seen([ARGS, FIRST])
    store.free([ARGS, FIRST])
    assert used(store) == 0


def test_what_was_granted_comes_back_when_the_worker_is_not_reached(store: Store, entries: Entries) -> None:
    made = [entries.make(WORKER, task_of(stored(FIRST), args=stored(ARGS))) for _ in range(2)]
    store.free([ARGS, FIRST, SECOND])
    assert used(store) == 2 * SIZE
    entries.not_sent(WORKER, made)
    assert used(store) == 0
