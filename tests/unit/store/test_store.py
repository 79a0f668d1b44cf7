"""The store on real files: what is written comes back, on disk too, and nothing that is seen is written over."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from endpoint_worker.store import Store, segments
from gcref.errors import ConfigError, LostReason, ObjectLostError, StoreFullError
from tests.support.waiting import wait_until

MB = 1 << 20
A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="gcref-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Iterator[Store]:
    made = Store(folder / "segments", tmp_path / "spill", 8 * MB)
    yield made
    made.close()
    assert not (folder / "segments").exists()
    assert not (tmp_path / "spill").exists()


def data_of(seed: int, size: int = MB) -> bytes:
    return bytes((seed + n) & 0xFF for n in range(256)) * (size // 256)


def put(store: Store, id: bytes, data: bytes, *, attempt: int = 1, cache: bool = False) -> None:
    writable = store.begin(id, attempt, len(data), cache)
    half = len(data) // 2
    writable.write(half, data[half:])
    writable.write(0, memoryview(data)[:half])
    writable.seal()


def put_by_worker(store: Store, id: bytes, data: bytes, worker: int = 1) -> str:
    path = store.allocate(len(data), worker).path
    fd = segments.create(path)
    segments.write_at(fd, data, 0)
    os.close(fd)
    store.seal(id, 1, path, len(data))
    return path_of(store, id)


def path_of(store: Store, id: bytes) -> str:
    """Where a sealed object lies."""
    return store._path(store._index.find(id).segment)


def bytes_of(store: Store, id: bytes, **options: Any) -> bytes:
    reading = store.read(id, **options)
    data = bytes(reading.buffer)
    reading.release()
    return data


def mapped(place: list[Any]) -> mmap.mmap:
    return segments.map_readable(place[0], place[1])


def test_objects_come_back_whole_and_in_ranges(store: Store) -> None:
    put(store, A, data_of(1))
    put_by_worker(store, B, data_of(2))
    assert A in store
    assert bytes_of(store, A) == data_of(1)
    assert bytes_of(store, B, attempt=1, offset=1000, length=77) == data_of(2)[1000:1077]
    assert bytes_of(store, B, offset=MB) == b""
    with pytest.raises(ValueError, match="not inside"):
        store.read(A, offset=MB - 1, length=2)
    for id, attempt in ((C, None), (A, 2)):
        with pytest.raises(LookupError):
            store.read(id, attempt)


def test_what_is_not_sealed_is_not_there(store: Store) -> None:
    writable = store.begin(A, 1, MB)
    writable.write(0, data_of(1))
    assert A not in store
    writable.abort()
    assert A not in store
    assert store.stats()["used_bytes"] == 0


def test_a_file_that_is_too_short_is_not_taken(store: Store) -> None:
    writable = store.begin(A, 1, MB)
    writable.write(0, b"short")
    with pytest.raises(OSError, match="shorter"):
        writable.seal()
    path = store.allocate(MB, 1).path
    with pytest.raises(OSError, match="No such file"):
        store.seal(A, 1, path, MB)
    assert A not in store
    assert store.stats()["used_bytes"] == 0
    with pytest.raises(LookupError):
        store.seal(A, 1, path, MB)
    with pytest.raises(LookupError):
        store.seal(A, 1, "/etc/passwd", 10)
    assert store.lost() == [(A, LostReason.BYTES_LOST)] * 3


def test_warm_segments_are_used_again_and_trimmed_in_time(store: Store) -> None:
    path = put_by_worker(store, A, data_of(1))
    assert next_tick(store) is None
    store.free([A])
    assert store.stats()["pooled_bytes"] == MB
    again = store.allocate(MB, 1)
    assert again.warm
    assert again.path != path, "a path never means two objects"
    assert os.path.exists(again.path)
    assert not os.path.exists(path)
    store.discard([path, "/nowhere"])
    assert store.stats()["used_bytes"] == MB, (
        "what comes late about the old object does no harm to the new one"
    )
    path = again.path
    store.discard([path])
    deadline = next_tick(store)
    assert deadline is not None
    store.tick(deadline - 0.01)
    assert os.path.exists(path)
    store.tick(deadline)
    assert not os.path.exists(path)
    assert next_tick(store) is None


def test_l0_a_mapped_segment_is_not_written_again(store: Store) -> None:
    """L0: an array that somebody keeps never changes, whatever is made afterwards."""
    put(store, A, data_of(1))
    place = store.map_for(1, A)
    view = mapped(place)
    store.free([A])
    for n in range(20):
        put(store, B, data_of(n))
        store.free([B])
    assert view[:] == data_of(1)
    view.close()
    store.unmapped(1, [[place[0], 1, True]])
    assert store.stats()["pooled_bytes"] == 2 * MB


def test_grants_count_and_tainted_segments_go(store: Store) -> None:
    path = put_by_worker(store, A, data_of(1))
    for _ in range(3):
        assert store.map_for(2, A) == [path, MB]
    store.unmapped(2, [[path, 1, True], ["/nowhere", 1, True]])
    store.free([A])
    store.ungrant(2, [path])
    assert store.stats()["pooled_bytes"] == 0
    store.unmapped(2, [[path, 1, False]])
    assert store.stats()["used_bytes"] == store.stats()["pooled_bytes"] == 0
    assert not os.path.exists(path)


def test_a_dead_worker_leaves_nothing(store: Store) -> None:
    put(store, A, data_of(1))
    granted = store.map_for(7, A)[0]
    writing = store.allocate(MB, 7).path
    os.close(segments.create(writing))
    store.free([A])
    store.worker_gone(7)
    assert not os.path.exists(granted)
    assert not os.path.exists(writing)
    assert store.stats()["used_bytes"] == store.stats()["pooled_bytes"] == 0


def test_a_reading_keeps_the_bytes_until_it_is_released(store: Store) -> None:
    put(store, A, data_of(1))
    first, second = store.read(A), store.read(A, offset=10, length=10)
    store.free([A])
    first.release()
    first.release()
    put(store, B, data_of(2))
    assert second.buffer == data_of(1)[10:20]
    assert store.stats()["used_bytes"] == 2 * MB
    second.release()
    assert store.stats() | {"used_bytes": MB, "pooled_bytes": MB} == store.stats()


def test_a_mapping_that_the_network_holds_is_closed_later(store: Store) -> None:
    put(store, A, data_of(1))
    reading = store.read(A)
    held = memoryview(reading._mapped.mapping)  # type: ignore[union-attr]
    store.free([A])
    reading.release()
    assert store.stats()["used_bytes"] == MB
    deadline = store.deadline
    assert deadline is not None
    held.release()
    store.tick(deadline - 0.5)
    assert store.stats()["used_bytes"] == MB
    store.tick(deadline)
    assert store.stats()["used_bytes"] == 0


def test_l3_over_the_limit_objects_go_to_disk_and_come_back_exact(store: Store, tmp_path: Path) -> None:
    """L3: spills and returns byte-exact; the limit holds."""
    ids = [bytes([n]) * 16 for n in range(30)]
    for n, id in enumerate(ids):
        put(store, id, data_of(n))
        assert memory_of(store) <= 8 * MB
    assert len(os.listdir(tmp_path / "spill")) >= 20
    assert all(bytes_of(store, id) == data_of(n) for n, id in enumerate(ids))
    assert memory_of(store) <= 8 * MB
    for n, id in enumerate(ids):
        place = store.map_for(1, id)
        view = mapped(place)
        assert view[:] == data_of(n)
        if len(place) > 2:
            assert segments.checksum(view) == place[2]
        view.close()
    store.worker_gone(1)
    store.free(ids)
    wait_until(lambda: not os.listdir(tmp_path / "spill"), what="the spilled files to go")
    assert store.stats() | {"disk_bytes": 0, "used_bytes": 0, "objects": 0} == store.stats()


def test_l3_the_least_recently_used_goes_to_disk_behind_an_overflow(store: Store) -> None:
    """L3: what is spilled was sealed in memory; pinned objects stay there."""
    for n in range(8):
        put(store, bytes([n]) * 16, data_of(n))
    store._index.pin(b"\0" * 16)
    put(store, b"x" * 16, data_of(99))
    wait_until(lambda: store.stats()["spilled"] >= 1, what="a spill")
    assert store._index.find(b"x" * 16).segment.disk
    assert not store._index.find(b"\0" * 16).segment.disk
    assert store._index.find(b"\1" * 16).segment.disk
    wait_until(lambda: store.allocate(MB, 1).warm, what="room in memory behind the spill")
    store._index.unpin(b"\0" * 16)


def test_bytes_that_went_bad_on_disk_are_not_handed_out(store: Store, tmp_path: Path) -> None:
    for n in range(9):
        put(store, bytes([n]) * 16, data_of(n))
    wait_until(lambda: store.stats()["spilled"], what="a spill")
    id = b"\0" * 16
    place = store.map_for(1, id)
    assert len(place) == 3
    with open(place[0], "r+b") as file:
        file.seek(5000)
        file.write(b"?")
    for use in (lambda: store.read(id), lambda: store.expose(id)):
        with pytest.raises(ObjectLostError, match="lost") as caught:
            use()
        assert caught.value.reason is LostReason.CORRUPT
    assert store._index.find(id).segment.readers == 0


def test_caches_are_evicted_and_told(store: Store) -> None:
    for n in range(8):
        put(store, bytes([n]) * 16, data_of(n), cache=True)
    assert store.evicted() == []
    put(store, b"x" * 16, data_of(9))
    assert store.evicted() == [b"\0" * 16]
    assert store.evicted() == []
    assert b"\0" * 16 not in store
    assert store.stats()["spilled"] == 0


def test_exposed_segments_are_unlinked_and_never_used_again(store: Store) -> None:
    put(store, A, data_of(1))
    path, size = store.expose(A, 1)
    assert (os.path.getsize(path), size) == (MB, MB)
    view = mapped([path, size])
    store.free([A])
    assert not os.path.exists(path)
    put(store, B, data_of(2))
    assert view[:] == data_of(1)
    view.close()


def test_another_stores_object_is_linked(store: Store, folder: Path, tmp_path: Path) -> None:
    other = Store(folder / "other", tmp_path / "other", 8 * MB)
    put(other, A, data_of(1))
    path, size = other.expose(A)
    store.link(A, 1, path, size)
    linked, _ = store.expose(A)
    assert os.path.samefile(path, linked)
    other.free([A])
    put(other, B, data_of(2))
    assert bytes_of(store, A) == data_of(1)
    other.close()
    assert bytes_of(store, A) == data_of(1)
    store.free([A])
    assert not os.path.exists(linked)


def test_links_that_cannot_be_are_os_errors(store: Store, folder: Path, tmp_path: Path) -> None:
    file = folder / "file"
    file.write_bytes(bytes(100))
    (folder / "link").symlink_to(file)
    for path, size in ((file, 101), (folder / "link", 100), (folder / "none", 1), (folder, 1)):
        with pytest.raises(OSError, match=r"."):
            store.link(A, 1, str(path), size)
    put(store, B, data_of(1, 8 * MB))
    store._index.pin(B)
    with pytest.raises(OSError, match="room") as caught:
        store.link(A, 1, str(file), 100)
    assert caught.value.errno == errno.ENOSPC
    on_disk = tmp_path / "file"
    on_disk.write_bytes(data_of(1, 1024))
    store.link(A, 1, str(on_disk), 1024)
    assert bytes_of(store, A) == data_of(1, 1024)


def test_a_shared_file_is_never_used_again(store: Store) -> None:
    for end in ("abort", "seal"):
        writable = store.begin(A, 1, MB)
        path = writable.share()
        assert path is not None
        fd = segments.create(path)
        segments.write_at(fd, data_of(1), 0)
        getattr(writable, end)()
        store.free([A])
        assert not os.path.exists(path)
        put(store, B, data_of(2))
        segments.write_at(fd, b"late", 0)
        os.close(fd)
        assert bytes_of(store, B) == data_of(2)
        store.free([B])


def test_a_full_memory_file_system_moves_a_pull_to_disk(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    writable = store.begin(A, 1, MB)
    writable.write(0, data_of(1)[: MB // 2])
    memory = store._folders.memory
    write = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(memory):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    writable.write(MB // 2, data_of(1)[MB // 2 :])
    writable.seal()
    assert bytes_of(store, A) == data_of(1)
    assert store.stats() | {"used_bytes": 0, "pooled_bytes": 0} == store.stats()
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, offset: full(-1, data, offset) if fd < 0 else _no_space()
    )
    writable = store.begin(B, 1, MB)
    with pytest.raises(StoreFullError, match="spill_dir"):
        writable.write(0, b"data")
    writable.abort()
    assert B not in store


def _no_space() -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_worker_that_finds_no_room_is_sent_to_disk_then_refused(store: Store, tmp_path: Path) -> None:
    put(store, A, data_of(1))
    store.free([A])
    first = store.allocate(2 * MB, 1)
    second = store.allocate(2 * MB, 1, failed=first.path)
    assert second.path.startswith(str(tmp_path))
    assert store.stats()["pooled_bytes"] == 0, "memory is short: the pool goes"
    with pytest.raises(StoreFullError, match=str(tmp_path)) as caught:
        store.allocate(2 * MB, 1, failed=second.path)
    assert caught.value.needed_bytes == 2 * MB
    assert store.stats() | {"used_bytes": 0, "disk_bytes": 0} == store.stats()


def test_a_spill_that_fails_leaves_the_object(store: Store, tmp_path: Path) -> None:
    """L3: the disk is full; the store goes on."""
    (tmp_path / "spill").rename(tmp_path / "elsewhere")
    for n in range(8):
        put(store, bytes([n]) * 16, data_of(n))
    with pytest.raises(OSError, match="No such file"):
        put(store, b"x" * 16, data_of(9))
    wait_until(lambda: not store._index.find(b"\0" * 16).spilling, what="the spill to fail")
    assert all(bytes_of(store, bytes([n]) * 16) == data_of(n) for n in range(8))
    assert store.stats()["spilled"] == 0
    store.free([b"\0" * 16])
    put(store, b"x" * 16, data_of(9))


def test_many_threads_at_once(store: Store) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(40):
                id = bytes([seed, n]) * 8
                put(store, id, data_of(seed + n, 256 * 1024))
                place = store.map_for(seed, id)
                view = mapped(place)
                assert bytes_of(store, id) == view[:] == data_of(seed + n, 256 * 1024)
                store.free([id])
                view.close()
                store.unmapped(seed, [[place[0], 1, True]])
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 50, 100, 150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert store.stats()["used_bytes"] == 0
    store._index.validate()


def test_leftovers_of_an_earlier_life_go(folder: Path, tmp_path: Path) -> None:
    (folder / "segments").mkdir()
    (folder / "segments" / "1f").write_bytes(b"old")
    Store(folder / "segments", tmp_path / "spill", MB).close()
    assert not (folder / "segments").exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="file"):
        Store(tmp_path / "file" / "segments", tmp_path / "spill", MB)


def next_tick(store: Store) -> float | None:
    return store.deadline


def memory_of(store: Store) -> int:
    folder = store._folders.memory
    return sum(os.stat(f"{folder}/{name}").st_blocks * 512 for name in os.listdir(folder))
