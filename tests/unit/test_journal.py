"""The journal: what was committed is read again, whatever happened to the end of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_worker import journal as journals
from endpoint_worker.journal import Journal

ENTRIES = st.lists(st.tuples(st.integers(1, 200), st.binary(max_size=300)), max_size=12)


def begun(folder: Path, snapshot: list[tuple[int, bytes]] | None = None) -> Journal:
    """A journal as an agent has it: read, then begun with a snapshot."""
    journal = Journal(folder)
    list(journal.read())
    journal.compact(snapshot or [])
    return journal


def left(folder: Path) -> tuple[list[tuple[int, bytes]], Journal]:
    """What a later life reads there."""
    journal = Journal(folder)
    return list(journal.read()), journal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def test_what_is_committed_is_read_again_without_being_closed(folder: Path) -> None:
    journal = begun(folder, [(7, b"state")])
    journal.append(1, b"a packet, ", b"in parts")
    journal.append(2)
    journal.commit()
    journal.append(3, b"never written")
    entries, later = left(folder)
    assert entries == [(7, b"state"), (1, b"a packet, in parts"), (2, b"")]
    assert later.troubles == []
    journal.close()


def test_a_first_life_finds_nothing(folder: Path) -> None:
    entries, journal = left(folder)
    assert (entries, journal.troubles) == ([], [])


def test_lives_follow_each_other(folder: Path) -> None:
    for life in range(3):
        entries, journal = left(folder)
        assert entries == [(1, bytes([n])) for n in range(life)]
        journal.compact(entries)
        journal.append(1, bytes([life]))
        journal.close()
    assert len([path for path in folder.iterdir() if path.suffix == ".log"]) == 1


@given(ENTRIES, ENTRIES, st.data())
def test_a_log_cut_anywhere_gives_its_whole_entries(
    tmp_path_factory: pytest.TempPathFactory,
    snapshot: list[tuple[int, bytes]],
    logged: list[tuple[int, bytes]],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("cut") / "journal"
    journal = begun(folder, snapshot)
    ends = [os.path.getsize(path) for path in folder.glob("*.log")]
    for kind, body in logged:
        journal.append(kind, body)
        journal.commit()
        ends.append(journal._bytes)
    journal.close()
    (path,) = folder.glob("*.log")
    cut = data.draw(st.integers(0, path.stat().st_size))
    os.truncate(path, cut)
    entries, later = left(folder)
    whole = sum(end <= cut for end in ends) - 1
    assert entries == snapshot + logged[: max(whole, 0)]
    assert bool(later.troubles) == (cut not in (0, *ends))
    assert len(list((folder / "kept").glob("*"))) == len(later.troubles)


@pytest.mark.parametrize("at", [0, 3, 20, -1])
def test_a_changed_byte_is_noticed_and_the_file_is_kept(folder: Path, at: int) -> None:
    journal = begun(folder)
    journal.append(1, b"first")
    journal.append(1, b"second")
    journal.close()
    (path,) = folder.glob("*.log")
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)
    entries, later = left(folder)
    assert entries in ([], [(1, b"first")])
    assert len(later.troubles) == 1
    (kept,) = (folder / "kept").iterdir()
    assert kept.read_bytes() == bytes(data)
    assert str(kept) in later.troubles[0]


def test_another_version_is_kept_aside_and_named(folder: Path) -> None:
    begun(folder).close()
    (path,) = folder.glob("*.snapshot")
    data = bytearray(path.read_bytes())
    data[3] = 99
    path.write_bytes(data)
    entries, later = left(folder)
    assert entries == []
    assert "version 99" in later.troubles[0]
    assert not list(folder.glob("*.log"))  # what goes on from an unknown state means nothing
    later.compact([])  # and the new life begins
    later.close()


def test_the_single_file_of_an_earlier_version_is_moved_away(folder: Path) -> None:
    folder.write_bytes(b"GCJ\x01 and so on")
    entries, journal = left(folder)
    assert entries == []
    assert "another version" in journal.troubles[0]
    assert len(list(folder.parent.glob("journal.*"))) == 1


def test_a_snapshot_replaces_what_was_before(folder: Path) -> None:
    journal = begun(folder)
    for n in range(100):
        journal.append(1, b"%d" % n)
    journal.commit()
    journal.append(1, b"is in the snapshot already")
    before = journal.size_bytes
    journal.compact([(7, b"all of it")])
    assert journal.size_bytes < before
    journal.append(1, b"after")
    journal.close()
    assert left(folder)[0] == [(7, b"all of it"), (1, b"after")]
    assert len(list(folder.iterdir())) == 2


def test_it_wants_compaction_in_proportion_to_what_it_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "COMPACT_BYTES", 1000)
    journal = begun(folder, [(7, bytes(2000))])
    wanted = []
    for size in (1500, 3000):
        journal.append(1, bytes(size))
        journal.commit()
        wanted.append(journal.wants_compaction)
    assert wanted == [False, True]
    journal.close()


def test_a_snapshot_that_was_not_finished_does_not_count(folder: Path) -> None:
    journal = begun(folder, [(7, b"old")])
    journal.append(1, b"since")
    journal.close()
    (folder / "000002.new").write_bytes(b"half of a snap")
    assert left(folder)[0] == [(7, b"old"), (1, b"since")]


def test_dying_between_snapshot_and_clearing_away_loses_nothing(folder: Path) -> None:
    journal = begun(folder, [(7, b"old")])
    journal.append(1, b"since")
    journal.commit()
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    journal.compact([(7, b"new")])
    journal.append(1, b"later")
    journal.close()
    for name, data in old.items():
        (folder / name).write_bytes(data)
    assert left(folder)[0] == [(7, b"new"), (1, b"later")]


def test_a_full_disk_keeps_what_was_appended_for_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begun(folder)
    real = os.writev

    def full(fd: int, parts: list[bytes]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    journal.append(1, b"kept")
    with pytest.raises(OSError, match="No space"):
        journal.commit()
    monkeypatch.setattr(os, "writev", lambda fd, parts: real(fd, [parts[0][:3]]))  # and a slow one
    journal.append(2, b"and this")
    journal.commit()
    journal.close()
    assert left(folder)[0] == [(1, b"kept"), (2, b"and this")]
