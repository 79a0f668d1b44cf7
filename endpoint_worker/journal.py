"""The journal: an append-only, checksummed log of the events that an agent's brains have taken, and snapshots of them.

An agent appends what came in *before* it acts on it and acknowledges it, so that after its death the same brains, fed with
the same events, stand where they stood. Entries are bytes that the caller packed; the journal knows only their kind.

    folder/000007.snapshot   all that counted when log 7 began
    folder/000007.log        what came since; `compact` writes snapshot 8, begins log 8 and removes these two
    folder/kept/…            files that could not be read (to their end): for people to look at

Both files, little endian:

    header   b"GCJ" version(u8) created(f64, unix seconds)
    entry    length(u32) kind(u8) crc32(u32, of kind and body) body

`append` collects; `commit` writes everything collected with one `writev` (the kernel has it then: it survives the death of
the process) and, with `fsync=True`, waits for the disk (it survives power loss). A snapshot is written beside, and
renamed when it is whole; its last entry says so. A log that was cut in the middle of a write ends at its last whole entry.

Source: logs and checkpoints as in the append-only file of Redis, entries as in the logs of LevelDB.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final
from zlib import crc32

MAGIC: Final = b"GCJ"
VERSION: Final = 3
_HEADER: Final = struct.Struct("<3sBd")
_ENTRY: Final = struct.Struct("<IBI")
_IOV_MAX: Final = 512  # buffers of one writev; the platform's limit is 1024
_SNAPSHOT_WRITE_BYTES: Final = 1 << 20  # a snapshot goes out in pieces of this size
_END: Final = 255  # the last entry of a snapshot
_NAME: Final = re.compile(r"(\d{6,})\.(log|snapshot)")
_KEPT_MAX: Final = 4  # damaged files that are kept

COMPACT_BYTES: Final = 16 * 1024 * 1024
"""A log is not compacted before it is this large."""

COMPACT_FACTOR: Final = 2
"""Nor before it is so many times the size of the snapshot that it follows: the cost of snapshots stays in proportion."""


class Journal:
    """A journal that goes on. One thread uses it.

    Args:
        folder: of its files; made if missing.
        fsync: wait for the disk at every `commit`.

    Attributes:
        troubles: what could not be read of an earlier life, in words for people; it is kept in the folder `kept`.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: Path, *, fsync: bool = False) -> None:
        self.folder = folder
        self.troubles: list[str] = []
        self._fsync = fsync
        self._pending: list[bytes] = []
        self._fd = -1
        self._bytes = 0  # of the log
        self._snapshot_bytes = 0
        if folder.is_file():  # as another version made it
            aside = folder.with_name(f"{folder.name}.{time.time():.0f}")
            folder.rename(aside)
            self.troubles.append(f"the journal {folder} is of another version; it was moved to {aside}")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._number = max((number for number, _ in self._files()), default=0)

    @property
    def size_bytes(self) -> int:
        """Bytes of the log and the snapshot before it."""
        return self._bytes + self._snapshot_bytes

    # -------------------------------------------------------------------------------------------------- reading

    def read(self) -> Iterator[tuple[int, bytes]]:
        """What an earlier life left, as (kind, body): the newest snapshot, then the log that follows it.

        Call it once, before anything is written. What cannot be read ends it, is moved aside and told in `troubles`.
        """
        snapshots = sorted((number for number, kind in self._files() if kind == "snapshot"), reverse=True)
        for newest in snapshots[:1]:
            path = self._path(newest, "snapshot")
            entries, trouble = _whole(path)
            if trouble is None and (not entries or entries[-1][0] != _END):
                trouble = "its end is missing"
            if trouble is not None:
                self._put_aside(path, trouble)
                for number, kind in self._files():  # logs that go on from what is not known mean nothing
                    self._put_aside(
                        self._path(number, kind), "it goes on from a snapshot that cannot be read"
                    )
                return
            yield from entries[:-1]
            del entries
        for number in sorted(number for number, kind in self._files() if kind == "log"):
            if snapshots and number < snapshots[0]:
                continue  # its snapshot was written, and it was about to be removed
            path = self._path(number, "log")
            reader = _Reader(path)
            yield from reader
            if reader.trouble is not None:
                self._put_aside(path, reader.trouble)
                return

    def _files(self) -> list[tuple[int, str]]:
        found = (_NAME.fullmatch(name) for name in os.listdir(self.folder))
        return [(int(match[1]), match[2]) for match in found if match]

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:06d}.{kind}"

    def _put_aside(self, path: Path, trouble: str) -> None:
        kept = self.folder / "kept"
        kept.mkdir(mode=0o700, exist_ok=True)
        aside = kept / f"{path.name}.{time.time_ns()}"
        path.rename(aside)
        for old in sorted(kept.iterdir(), key=lambda each: each.name.rpartition(".")[2])[:-_KEPT_MAX]:
            old.unlink()
        self.troubles.append(f"{path} could not be read to its end: {trouble}; it is kept as {aside}")

    # -------------------------------------------------------------------------------------------------- writing

    def append(self, kind: int, *parts: bytes) -> None:
        """Add one entry, whose body is the parts in order; it is on its way with the next `commit`."""
        check = crc32(bytes((kind,)))
        length = 0
        for part in parts:
            check = crc32(part, check)
            length += len(part)
        self._pending.append(_ENTRY.pack(length, kind, check))
        self._pending.extend(parts)

    def commit(self) -> None:
        """Write what was appended.

        Raises:
            OSError: the disk is full or gone; what was appended stays pending.
        """
        pending = self._pending
        if not pending:
            return
        while pending:
            some = pending[:_IOV_MAX]
            written = os.writev(self._fd, some)
            self._bytes += written
            whole = 0
            for part in some:
                if written < len(part):
                    break
                written -= len(part)
                whole += 1
            del pending[:whole]
            if written:
                pending[0] = pending[0][written:]
        if self._fsync:
            os.fdatasync(self._fd)

    @property
    def wants_compaction(self) -> bool:
        """Whether the log has outgrown the state that it describes."""
        return self._bytes > max(COMPACT_BYTES, COMPACT_FACTOR * self._snapshot_bytes)

    def compact(self, entries: Iterable[tuple[int, bytes]]) -> None:
        """Begin a new log, before which stands a snapshot: these entries. What was pending is in it already.

        Raises:
            OSError: the disk is full or gone; the present log goes on.
        """
        number = self._number + 1
        path = self._path(number, "snapshot")
        fresh = path.with_suffix(".new")
        try:
            size = _write_snapshot(fresh, entries, self._fsync)
            fd = self._begin(number)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        fresh.rename(path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._number = fd, number
        self._bytes, self._snapshot_bytes = _HEADER.size, size
        self._pending.clear()
        if self._fsync:
            _sync_folder(self.folder)
        for old, kind in self._files():
            if old < number:
                self._path(old, kind).unlink()

    def _begin(self, number: int) -> int:
        fd = os.open(
            self._path(number, "log"),
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC,
            0o600,
        )
        try:
            os.write(fd, _HEADER.pack(MAGIC, VERSION, time.time()))
        except OSError:
            os.close(fd)
            raise
        return fd

    def close(self) -> None:
        """Write what is pending and close the file."""
        if self._fd >= 0:
            try:
                self.commit()
            finally:
                os.close(self._fd)
                self._fd = -1


def _write_snapshot(path: Path, entries: Iterable[tuple[int, bytes]], fsync: bool) -> int:
    with open(path, "wb", buffering=_SNAPSHOT_WRITE_BYTES, opener=_private) as file:
        file.write(_HEADER.pack(MAGIC, VERSION, time.time()))
        for kind, body in entries:
            file.write(_ENTRY.pack(len(body), kind, crc32(body, crc32(bytes((kind,))))))
            file.write(body)
        file.write(_ENTRY.pack(0, _END, crc32(bytes((_END,)))))
        file.flush()
        if fsync:
            os.fdatasync(file.fileno())
        return file.tell()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Reader:
    """The whole entries of a file, in order.

    Attributes:
        trouble: once it has ended: what kept it from reading on; None: nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trouble: str | None = None

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with open(self._path, "rb", buffering=_SNAPSHOT_WRITE_BYTES) as file:
            header = file.read(_HEADER.size)
            if not header:
                return  # it was about to be begun
            if len(header) < _HEADER.size or header[:3] != MAGIC:
                self.trouble = "it is no journal of this program"
                return
            if header[3] != VERSION:
                self.trouble = f"it is of version {header[3]}, not {VERSION}"
                return
            while head := file.read(_ENTRY.size):
                if len(head) < _ENTRY.size:
                    self.trouble = "it ends in the middle of an entry"
                    return
                length, kind, check = _ENTRY.unpack(head)
                body = file.read(length)
                if len(body) < length:
                    self.trouble = "it ends in the middle of an entry"
                    return
                if crc32(body, crc32(bytes((kind,)))) != check:
                    self.trouble = f"the entry that ends at byte {file.tell()} has changed"
                    return
                yield kind, body


def _whole(path: Path) -> tuple[list[tuple[int, bytes]], str | None]:
    reader = _Reader(path)
    return list(reader), reader.trouble
