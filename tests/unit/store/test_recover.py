"""A store that takes up what an earlier life left: by the names of its files alone, and nothing that it should not."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_worker.store import Store, names, segments
from endpoint_worker.store.model import PULL
from gcref.errors import LostReason, ObjectLostError
from tests.support.waiting import wait_until

MB = 1 << 20
A, B, C, D = (bytes([n]) * 16 for n in (1, 2, 3, 4))
Life = Callable[..., Store]


@pytest.fixture
def memory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="gcref-test-", dir="/dev/shm"))
    yield path / "segments"
    shutil.rmtree(path)


@pytest.fixture
def life(memory: Path, tmp_path: Path) -> Iterator[Life]:
    """Begin the next life of the store; the one before was killed."""
    lives: list[Store] = []

    def begin(**options: Any) -> Store:
        for store in lives:  # its thread is ours, not the dead process's
            store._background.close()
        lives.append(Store(memory, tmp_path / "spill", 8 * MB, recover=True, **options))
        return lives[-1]

    yield begin
    lives[-1].close()
    assert not memory.exists()
    assert not (tmp_path / "spill").exists()


def data_of(seed: int, size: int = MB) -> bytes:
    return bytes((seed + n) & 0xFF for n in range(256)) * (size // 256)


def put(store: Store, id: bytes, data: bytes, *, cache: bool = False, attempt: int = 1) -> None:
    writable = store.begin(id, attempt, len(data), cache)
    writable.write(0, data)
    writable.seal()


def fill(path: str, data: bytes) -> None:
    fd = segments.create(path)
    segments.write_at(fd, data, 0)
    os.close(fd)


def bytes_of(store: Store, id: bytes, attempt: int | None = None) -> bytes:
    reading = store.read(id, attempt)
    data = bytes(reading.buffer)
    reading.release()
    return data


def files(store: Store) -> list[str]:
    return sorted(name for _, name, _ in store._folders.scan())


def test_wanted_objects_are_taken_up_and_the_rest_goes(life: Life) -> None:
    first = life()
    put(first, A, data_of(1))
    put(first, B, data_of(2), attempt=3)
    put(first, C, data_of(3))
    put(first, D, data_of(4))
    first.free([D])
    half = first.begin(D, 2, MB)
    half.write(0, b"half a pull")
    half._close()  # as the kernel does when a process is killed
    second = life()
    assert A not in second
    wanted = {A: (1, MB), B: (2, MB), C: (1, MB + 1), D: (1, MB)}
    assert second.recover(wanted, ()) == {A: (1, MB)}, "attempt and size must be right"
    assert bytes_of(second, A) == data_of(1)
    assert len(files(second)) == 1
    assert second.stats()["used_bytes"] == MB
    second._index.validate()


def test_a_file_cut_short_is_not_taken(life: Life) -> None:
    first = life()
    put(first, A, data_of(1))
    os.truncate(first._path(first._index.find(A).segment), MB - 1)
    second = life()
    assert second.recover({A: (1, MB)}, ()) == {}
    assert files(second) == []


def test_a_pooled_segment_names_its_object_until_it_is_used_again(life: Life) -> None:
    """The bytes of a freed object are its own until the next one's first byte: whatever is asked for, nothing foreign comes."""
    first = life()
    put(first, A, data_of(1))
    first.free([A])
    writable = first.begin(B, 1, MB)
    writable.write(0, data_of(2)[: MB // 2])
    writable._close()
    second = life()
    assert second.recover({A: (1, MB), B: (1, MB)}, ()) == {}
    assert files(second) == []


def test_what_was_taken_up_is_never_written_again(life: Life) -> None:
    """L0: a worker of before may look at it, and nobody can ask."""
    put(life(), A, data_of(1))
    second = life()
    second.recover({A: (1, MB)}, ())
    path, size = second.map_for(1, A)
    view = segments.map_readable(path, size)
    second.unmapped(1, [[path, 1, True]])
    second.free([A])
    assert not os.path.exists(path)
    assert second.stats()["pooled_bytes"] == 0
    put(second, B, data_of(2))
    assert view[:] == data_of(1)
    view.close()


def test_spilled_objects_are_taken_up_with_their_checksums(life: Life) -> None:
    first = life()
    for n in range(9):
        put(first, bytes([n]) * 16, data_of(n))
    wait_until(lambda: first.stats()["spilled"] >= 2, what="a spill")
    first.tick(first.deadline or 0.0)  # what they were copied from goes
    second = life()
    wanted = {bytes([n]) * 16: (1, MB) for n in range(9)}
    assert second.recover(wanted, ()) == wanted
    place = second.map_for(1, b"\0" * 16)
    assert len(place) == 3
    assert all(bytes_of(second, id) == data_of(id[0]) for id in wanted)
    with open(second.map_for(1, b"\1" * 16)[0], "r+b") as file:
        file.write(b"?")
    third = life()
    assert third.recover(wanted, ()) == wanted
    with pytest.raises(ObjectLostError):
        third.read(b"\1" * 16)
    with pytest.raises(ObjectLostError):
        third.expose(b"\1" * 16)
    assert third.lost() == [(b"\1" * 16, LostReason.CORRUPT)], "each is told of once"
    assert third.lost() == []


def test_caches_that_are_taken_up_may_be_evicted(life: Life) -> None:
    first = life()
    for n in range(8):
        put(first, bytes([n]) * 16, data_of(n), cache=True)
    wanted = {bytes([n]) * 16: (1, MB) for n in range(8)}
    second = life()
    assert second.recover(wanted, (), caches={b"\2" * 16}) == wanted
    put(second, A * 1, data_of(9), attempt=2)
    assert second.evicted() == [b"\2" * 16]


def test_a_living_worker_goes_on_writing(life: Life) -> None:
    first = life()
    made = first.allocate(MB, 7)
    fill(made.path, data_of(1))
    not_made_yet = first.allocate(MB, 7).path
    of_the_dead = first.allocate(MB, 8).path
    fill(of_the_dead, data_of(8))
    second = life()
    assert second.recover({}, {7}) == {}
    assert not os.path.exists(of_the_dead)
    second.seal(A, 1, made.path, MB)
    assert bytes_of(second, A) == data_of(1)
    fill(not_made_yet, data_of(2))
    second.seal(B, 1, not_made_yet, MB)
    assert bytes_of(second, B) == data_of(2)
    second.seal(B, 1, not_made_yet, MB)
    second.discard([made.path, not_made_yet])
    assert bytes_of(second, B) == data_of(2), "what is told twice does no harm"
    for path in (of_the_dead, not_made_yet.replace(".w.7.", ".w.8.")):
        with pytest.raises(LookupError):
            second.seal(C, 1, path, MB)
    second._index.validate()


def test_a_worker_of_before_that_dies_leaves_nothing(life: Life) -> None:
    first = life()
    made, not_made_yet = first.allocate(MB, 7).path, first.allocate(MB, 7).path
    fill(made, data_of(1))
    second = life()
    second.recover({}, {7})
    fill(not_made_yet, data_of(2))
    second.worker_gone(7)
    assert files(second) == []
    assert second.stats()["used_bytes"] == 0


def test_a_worker_of_before_that_found_no_room_is_sent_to_disk(life: Life, tmp_path: Path) -> None:
    path = life().allocate(MB, 7).path
    second = life()
    second.recover({}, {7})
    fill(path, b"part")
    again = second.allocate(MB, 7, failed=path).path
    assert again.startswith(str(tmp_path))
    assert not os.path.exists(path)


@pytest.mark.parametrize("told", ["before recover", "after recover"])
def test_a_result_that_was_sealed_but_never_written_down_is_sealed_again(life: Life, told: str) -> None:
    """The process died between the seal and the journal: the worker tells its result again, by the path it knows."""
    first = life()
    path = first.allocate(MB, 7).path
    fill(path, data_of(1))
    first.seal(A, 1, path, MB)
    second = life()
    if told == "before recover":
        second.seal(A, 1, path, MB)
        assert second.recover({A: (1, MB)}, ()) == {A: (1, MB)}
    else:
        assert second.recover({}, {7}) == {}
        assert A not in second
        second.seal(A, 1, path, MB)
    assert bytes_of(second, A) == data_of(1)
    second.settle(7)
    assert bytes_of(second, A) == data_of(1)
    second._index.validate()


def test_a_worker_tells_of_bytes_in_whose_place_others_lie_by_now(life: Life) -> None:
    """Its page still has a result whose object was spilled or freed; the segment serves another object since."""
    first = life()
    path = first.allocate(MB, 7).path
    fill(path, data_of(1))
    first.seal(A, 1, path, MB)
    first.free([A])
    put(first, B, data_of(2))
    assert first._path(first._index.find(B).segment).rpartition("-")[0] == path.rpartition("-")[0]
    second = life()
    with pytest.raises(LookupError):
        second.seal(A, 1, path, MB)
    assert second.describe()["strays"] == []
    assert second.recover({A: (1, MB), B: (1, MB)}, {7}) == {B: (1, MB)}
    assert bytes_of(second, B) == data_of(2)
    second.settle(7)
    second.free([B])
    assert second.stats()["used_bytes"] == 0
    second._index.validate()


@pytest.mark.parametrize("lives", [True, False])
def test_a_result_that_was_made_while_the_new_life_began(life: Life, lives: bool) -> None:
    """Its worker had the path from the old one, and made the file when the new one had looked."""
    first = life()
    path = first.allocate(MB, 7).path
    (stray,) = first.describe()["strays"]
    assert (stray["writer"], stray["capacity"]) == (7, MB)
    second = life()
    fill(path, data_of(1))
    second.seal(A, 1, path, MB)
    assert second.recover({A: (1, MB)}, {7} if lives else ()) == {A: (1, MB)}
    assert bytes_of(second, A) == data_of(1)
    second.free([A])
    assert files(second) == []
    second._index.validate()


def test_what_a_settled_worker_did_not_tell_of_goes(life: Life) -> None:
    first = life()
    path, writing = first.allocate(MB, 7).path, first.allocate(MB, 7).path
    fill(path, data_of(1))
    fill(writing, data_of(2))
    first.seal(A, 1, path, MB)
    second = life()
    second.recover({}, {7})
    second.settle(7)
    with pytest.raises(LookupError):
        second.seal(A, 1, path, MB)
    second.seal(B, 1, writing, MB)
    assert files(second) == [os.path.basename(second._path(second._index.find(B).segment))]


def test_many_lives(life: Life) -> None:
    store = life()
    path = store.allocate(MB, 1).path
    fill(path, data_of(0))
    for n in range(5):
        put(store, bytes([n]) * 16, data_of(n))
        wanted = {bytes([k]) * 16: (1, MB) for k in range(n + 1)}
        store = life()
        assert store.recover(wanted, {1}) == wanted
    store.seal(D * 1, 9, path, MB)
    assert bytes_of(store, D, 9) == data_of(0)
    assert all(bytes_of(store, bytes([n]) * 16, 1) == data_of(n) for n in range(4))


def test_a_clean_end_may_keep_what_is_no_cache(life: Life, memory: Path, tmp_path: Path) -> None:
    first = life()
    for n in range(9):
        put(first, bytes([n]) * 16, data_of(n), cache=n == 8)
    first.allocate(MB, 1)
    wait_until(lambda: first.stats()["spilled"], what="a spill")
    assert first.close(keep=True)
    assert memory.exists()
    second = life()
    wanted = {bytes([n]) * 16: (1, MB) for n in range(9)}
    assert second.recover(wanted, ()).keys() == wanted.keys() - {b"\x08" * 16}
    second.free(wanted)
    assert not second.close(keep=True)
    assert not memory.exists()


def test_what_is_not_the_stores_is_removed_or_left(life: Life, memory: Path) -> None:
    memory.mkdir()
    (memory / "1f").write_bytes(b"old")
    (memory / "1-0.o.zz.1.1.p").write_bytes(b"odd")
    (memory / "folder").mkdir()
    store = life()
    store.recover({}, ())
    assert files(store) == ["folder"]
    (memory / "folder").rmdir()


def test_bytes_that_are_gone_are_told(life: Life) -> None:
    store = life()
    put(store, A, data_of(1))
    os.unlink(store._path(store._index.find(A).segment))
    for _ in range(2):
        with pytest.raises(ObjectLostError) as caught:
            store.read(A)
        assert caught.value.reason is LostReason.BYTES_LOST
    assert store.lost() == [(A, LostReason.BYTES_LOST)]
    put(store, A, data_of(2), attempt=2)
    assert bytes_of(store, A) == data_of(2)
    assert store.lost() == []


numbers = st.integers(0, 2**60)


@given(numbers, numbers, st.integers(PULL, 5000), numbers)
def test_names_of_files_being_written_come_back(number: int, use: int, writer: int, capacity: int) -> None:
    capacity = 0 if writer == PULL else capacity
    name = names.writing(number, use, writer, capacity)
    assert names.parse(name) == names.Writing(number, use, writer, capacity)
    assert name.startswith(names.stem(number, use) + ".")


@given(
    numbers,
    numbers,
    st.integers(PULL, 5000),
    st.binary(min_size=16, max_size=16),
    numbers,
    numbers,
    st.none() | numbers,
)
def test_names_of_whole_files_come_back(
    number: int, use: int, writer: int, id: bytes, attempt: int, size: int, crc: int | None
) -> None:
    name = names.whole(number, use, writer, id, attempt, size, crc)
    assert names.parse(name) == names.Whole(number, use, writer, id, attempt, size, crc)
    assert len(name) < 255


@given(st.text(max_size=60) | st.text("0123456789abcdef-.owp", max_size=60))
def test_any_name_is_judged(name: str) -> None:
    names.parse(name)
