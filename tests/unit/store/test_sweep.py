"""What dead parties left goes at the next start; what living ones have never does (L4)."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from endpoint_worker.store import sweep as module
from endpoint_worker.store.sweep import (
    claim,
    is_recoverable,
    mark_recoverable,
    release,
    sweep,
    unmark_recoverable,
)
from gcref import config

NAME = "0123456789abcdef" * 2
OTHER = "f" * 32
EMPTY = "e" * 32


@pytest.fixture
def host() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="gcref-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def furnish(folder: Path) -> None:
    (folder / "segments").mkdir(parents=True)
    (folder / "segments" / "1").write_bytes(b"blob")
    (folder / "control.sock").write_bytes(b"")


def test_l4_a_dead_partys_folder_goes(host: Path) -> None:
    """L4: the latest at the next start of any party."""
    lock = claim(host / NAME)
    furnish(host / NAME)
    os.close(lock)  # as the kernel does when a process is killed
    assert sweep(host) == [NAME]
    assert list(host.iterdir()) == []
    assert sweep(host) == []


def test_a_living_partys_folder_stays(host: Path, tmp_path: Path) -> None:
    lock = claim(host / NAME)
    furnish(host / NAME)
    furnish(tmp_path / NAME / "spill")
    assert sweep(host, tmp_path) == []
    assert (host / NAME / "segments" / "1").read_bytes() == b"blob"
    assert (tmp_path / NAME / "spill" / "segments" / "1").exists()
    release(host / NAME, lock)
    assert not (host / NAME).exists()


def test_what_is_not_a_partys_is_left_alone(host: Path) -> None:
    furnish(host / "somebody-else")
    furnish(host / NAME.upper())
    (host / OTHER).write_bytes(b"a file")
    assert sweep(host) == []
    assert len(list(host.iterdir())) == 3


def test_a_spill_goes_and_a_journal_stays(host: Path, tmp_path: Path) -> None:
    for name in (NAME, OTHER):
        furnish(tmp_path / name / "spill")
    (tmp_path / NAME / "journal").write_bytes(b"log")
    (tmp_path / EMPTY).mkdir()
    assert sweep(host) == [], "without being told of a disk it leaves the disk alone"
    assert sweep(host, tmp_path) == [NAME, EMPTY, OTHER]
    assert [path.name for path in tmp_path.rglob("*")] == [NAME, "journal"]
    assert list(host.iterdir()) == []


def test_a_folder_without_a_lock_is_being_made_unless_it_is_old(host: Path) -> None:
    (host / OTHER).mkdir()
    furnish(host / NAME)
    assert sweep(host) == []
    assert [path.name for path in host.iterdir()] == [NAME], "an empty one can be made again"
    an_hour_ago = time.time() - 3600
    os.utime(host / NAME, (an_hour_ago, an_hour_ago))
    assert sweep(host) == [NAME]


def test_a_claim_finds_an_empty_folder(host: Path) -> None:
    furnish(host / NAME)
    lock = claim(host / NAME)
    assert [path.name for path in (host / NAME).iterdir()] == ["lock"]
    release(host / NAME, lock)


def test_a_claim_leaves_what_the_party_takes_up(host: Path) -> None:
    furnish(host / NAME)
    (host / NAME / "workers").mkdir()
    lock = claim(host / NAME, keep=("segments", "spill"))
    assert sorted(path.name for path in (host / NAME).iterdir()) == ["lock", "segments"]
    assert (host / NAME / "segments" / "1").read_bytes() == b"blob"
    release(host / NAME, lock, keep=("segments",))
    assert (host / NAME / "segments" / "1").read_bytes() == b"blob"
    lock = claim(host / NAME)
    release(host / NAME, lock, keep=("segments",))
    assert not (host / NAME).exists(), "nothing was left to keep"


def test_a_party_that_may_come_back_is_left_alone(host: Path, tmp_path: Path) -> None:
    disk, home = tmp_path / "disk", tmp_path / "home"
    home.mkdir()
    for name in (NAME, OTHER):
        os.close(claim(host / name))
        furnish(host / name)
        furnish(disk / name / "spill")
        (disk / name / "journal").mkdir()
        mark_recoverable(disk / name, [disk / name / "journal", home])
    assert is_recoverable(disk / NAME)
    assert sweep(host, disk) == []
    assert (host / NAME / "segments" / "1").read_bytes() == b"blob"
    assert (disk / NAME / "spill" / "segments" / "1").exists()
    shutil.rmtree(host / NAME)  # as a reboot does
    assert sweep(host, disk) == []
    assert (disk / NAME / "spill" / "segments" / "1").exists()
    (disk / OTHER / "journal").rmdir()
    assert not is_recoverable(disk / OTHER)
    assert sweep(host, disk) == [OTHER]
    assert [path.name for path in disk.iterdir()] == [NAME]
    home.rmdir()
    assert sweep(host, disk) == [NAME], "its endpoint is gone: nobody will start it again"
    assert list(disk.iterdir()) == list(host.iterdir()) == []


def test_l4_a_party_that_ended_well_is_not_waited_for(host: Path, tmp_path: Path) -> None:
    furnish(tmp_path / NAME / "spill")
    (tmp_path / NAME / "journal").write_bytes(b"log")
    mark_recoverable(tmp_path / NAME, [tmp_path / NAME / "journal"])
    unmark_recoverable(tmp_path / NAME)
    unmark_recoverable(tmp_path / NAME)
    assert not is_recoverable(tmp_path / NAME)
    assert sweep(host, tmp_path) == [NAME]
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ["journal"]


def test_a_claim_of_a_living_partys_folder_is_refused(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLAIM_S", 0.05)
    lock = claim(host / NAME)
    furnish(host / NAME)
    with pytest.raises(BlockingIOError, match=NAME):
        claim(host / NAME)
    assert (host / NAME / "segments" / "1").exists()
    release(host / NAME, lock)


def test_starting_and_sweeping_at_once_never_harms_a_party(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parties start, live and are killed while others sweep: while one lives, its folder is its own."""
    monkeypatch.setattr(config, "_SHARED_MEMORY", str(host))
    errors: list[BaseException] = []
    ended = threading.Event()

    def live(name: str) -> None:
        try:
            for n in range(150):
                folder = config.host_dir(bytes.fromhex(name))
                lock = claim(folder)
                mark = folder / "mark"
                mark.write_text(f"{n}")
                assert os.path.samestat(os.stat(folder / "lock"), os.fstat(lock))
                assert mark.read_text() == f"{n}"
                if n % 2:
                    release(folder, lock)
                else:
                    os.close(lock)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    def clean() -> None:
        try:
            while not ended.is_set():
                sweep(config.host_dir())
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    parties = [threading.Thread(target=live, args=(name,)) for name in (NAME, OTHER)]
    sweepers = [threading.Thread(target=clean) for _ in range(2)]
    for thread in parties + sweepers:
        thread.start()
    for thread in parties:
        thread.join()
    ended.set()
    for thread in sweepers:
        thread.join()
    assert not errors, errors
