"""The files of the store: where they lie, how they are filled, mapped, linked and checked.

Segments in memory lie in one folder, segments on disk in another. A file's name begins with its segment's number and
how many times that was used, so a path never means two objects: a message that comes late about one (the last words of
a dead worker) can do no harm to the next. The rest of the name says what is in the file: see `names`.

Files are filled with `pwrite` alone. On tmpfs that is faster than writing through a mapping (fresh pages 0.84
against 0.74 GB/s, warm ones 5.4 against 1.7), it holds no GIL, and a full file system is then an `OSError` where
a mapping would be a SIGBUS; so nothing needs to be allocated beforehand either. They are read through mappings.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import zlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, Final

from endpoint_worker.store.model import Segment
from gcref.errors import ConfigError

# Checksums and copies go in pieces, so that a large object does not need twice its memory in caches.
PIECE_BYTES: Final = 8 * 1024 * 1024


class Folders:
    """The two folders. What an earlier life left there belongs to nobody, unless it is to be kept.

    Args:
        memory: for segments in memory; made if missing.
        disk: for segments on disk; made if missing.
        keep: leave what is there; else they are emptied.

    Raises:
        ConfigError: one of them cannot be used.
    """

    def __init__(self, memory: Path, disk: Path, *, keep: bool = False) -> None:
        self.memory = str(_prepare(memory, keep=keep))
        self.disk = str(_prepare(disk, keep=keep))
        self._memory_device = os.stat(self.memory).st_dev
        self._disk_device = os.stat(self.disk).st_dev

    def path(self, segment: Segment) -> str:
        """Where a segment lies."""
        return f"{self.disk if segment.disk else self.memory}/{segment.name}"

    def rename(self, segment: Segment, name: str) -> None:
        """Give the file of a segment another name.

        Raises:
            OSError: it keeps the one it had.
        """
        before = self.path(segment)
        os.rename(before, f"{self.disk if segment.disk else self.memory}/{name}")
        segment.name = name

    def has_room(self, disk: bool, size: int) -> bool:
        """Whether the file system has room for so many bytes, now. Whoever writes them may find out otherwise."""
        found = os.statvfs(self.disk if disk else self.memory)
        return found.f_bavail * found.f_frsize >= size

    def scan(self) -> Iterator[tuple[str, str, bool]]:
        """Every file: folder, name, and whether it is on disk."""
        for folder, disk in ((self.memory, False), (self.disk, True)):
            for name in os.listdir(folder):
                yield folder, name, disk

    def split(self, path: str) -> tuple[int, str, bool]:
        """Take apart the path of a segment, as somebody else names it: its number, its file's name, whether it is on disk.

        Raises:
            LookupError: no segment can lie there.
        """
        folder, _, name = path.rpartition("/")
        try:
            if folder in (self.memory, self.disk):
                return int(name.partition("-")[0], 16), name, folder == self.disk
        except ValueError:
            pass
        raise LookupError(f"{path!r} is no segment of this store")

    def is_on_disk(self, path: str, size: int) -> bool:
        """Whether a link to this file would be one on disk.

        Raises:
            OSError: it is no regular file of at least `size` bytes, or lies on a third file system.
        """
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size < size:
            raise OSError(errno.EINVAL, f"no regular file of at least {size} bytes", path)
        if found.st_dev == self._memory_device:
            return False
        if found.st_dev == self._disk_device:
            return True
        raise OSError(errno.EXDEV, "neither on the store's file system nor on its disk's", path)

    def remove(self, keep: Container[str] = ()) -> None:
        """Remove both folders and what is in them, except for the files at these paths (and a folder that has one)."""
        for folder in (self.memory, self.disk):
            _clear(folder, keep)
            try:
                os.rmdir(folder)
            except OSError:
                pass  # something is kept, or somebody put a folder there that is not ours to remove


def _prepare(folder: Path, *, keep: bool) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not keep:
            _clear(str(folder))
    except OSError as error:
        raise ConfigError(
            f"the object store cannot use the folder {folder}: {error.strerror}; make it one that you can write to",
            file=str(folder),
            remedy="make it a folder that you can write to",
        ) from error
    return folder.absolute()


def _clear(folder: str, keep: Container[str] = ()) -> None:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        path = f"{folder}/{name}"
        if path not in keep:
            try:
                os.unlink(path)
            except (FileNotFoundError, IsADirectoryError):
                pass


def unlink(path: str) -> None:
    """Remove a segment's file; one that was never made is fine too."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def create(path: str) -> int:
    """Open a segment for writing, made if missing; the file descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def write_at(fd: int, data: Any, offset: int) -> None:
    """Write all of the bytes-like `data` at the offset.

    Raises:
        OSError: ENOSPC and the like; part of it may have been written.
    """
    with memoryview(data).cast("B") as view:
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)


def map_readable(path: str, size: int) -> mmap.mmap:
    """Map the first `size` bytes of a segment, read-only.

    Raises:
        OSError: it is gone, or shorter than that (touching such a mapping would be fatal).
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_size < size:
            raise OSError(errno.EIO, f"shorter than {size} bytes", path)
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def checksum(buffer: Any) -> int:
    """crc32 of a buffer. It guards against a disk's errors, not against an enemy; it lets other threads run."""
    crc = 0
    with memoryview(buffer).cast("B") as view:
        for at in range(0, len(view), PIECE_BYTES):
            crc = zlib.crc32(view[at : at + PIECE_BYTES], crc)
    return crc


def copy_to(source: str, target: str, size: int) -> int:
    """Copy a blob into a file that nobody knows yet; its crc32.

    Raises:
        OSError: no room, or a defect of the disk; the target is not there then.
    """
    crc = 0
    mapping = map_readable(source, size)
    try:
        fd = create(target)
        try:
            with memoryview(mapping) as view:
                for at in range(0, size, PIECE_BYTES):
                    with view[at : at + PIECE_BYTES] as piece:
                        write_at(fd, piece, at)
                        crc = zlib.crc32(piece, crc)
        finally:
            os.close(fd)
    except OSError:
        unlink(target)
        raise
    finally:
        mapping.close()
    return crc
