"""Objects on their way out of the store and into it: what `Store.read`, `begin` and `allocate` give."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from endpoint_worker.store import segments
from endpoint_worker.store.model import PULL, Segment

if TYPE_CHECKING:
    from endpoint_worker.store.store import Store


class Allocated(NamedTuple):
    """A segment for a worker to fill: what SEGMENT says."""

    path: str
    capacity: int
    warm: bool


class Reading:
    """A range of an object, mapped for a send.

    Attributes:
        buffer: exactly the range asked for, read-only.
    """

    __slots__ = ("_mapped", "_store", "buffer")

    def __init__(self, store: Store, mapped: Mapped, buffer: memoryview) -> None:
        self._store = store
        self._mapped: Mapped | None = mapped
        self.buffer = buffer

    def release(self) -> None:
        """The bytes are not looked at any more. Call it once; again does nothing."""
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            self._store._release(mapped, self.buffer)


class Writable:
    """An object on its way into the store. Nobody sees it before `seal`. One thread uses it.

    Attributes:
        buffer: always None: the bytes go in by `write`.
    """

    __slots__ = ("_attempt", "_cache", "_fd", "_id", "_segment", "_shared", "_size", "_store")

    buffer: Final = None

    def __init__(
        self, store: Store, segment: Segment, id: bytes, attempt: int, size: int, cache: bool
    ) -> None:
        self._store = store
        self._segment = segment
        self._id = id
        self._attempt = attempt
        self._size = size
        self._cache = cache
        self._shared = False
        self._fd = -1
        self._open()

    def write(self, offset: int, data: Any) -> None:
        """Write bytes at an offset.

        Raises:
            StoreFullError: memory and disk are full.
        """
        try:
            segments.write_at(self._fd, data, offset)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self._segment.disk or self._shared:
                raise self._store._troubles.translate(error, self._size) from error
            self._move_to_disk()
            self.write(offset, data)

    def share(self) -> str | None:
        """A path where another process may write the blob. The file is never used for another object then."""
        self._shared = True
        return self._store._path(self._segment)

    def seal(self) -> None:
        """All bytes are there: the object is in the store.

        Raises:
            OSError: the file is shorter than the object.
        """
        self._close()
        self._store._seal(self._segment, self._id, self._attempt, self._size, self._cache, self._shared)

    def abort(self) -> None:
        """Give up; the bytes go."""
        self._close()
        self._store._abandon(self._segment, reusable=not self._shared)

    def _open(self) -> None:
        try:
            self._fd = segments.create(self._store._path(self._segment))
        except OSError as error:
            self._store._abandon(self._segment, reusable=False)
            raise self._store._troubles.translate(error, self._size) from error

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _move_to_disk(self) -> None:
        source, old_fd = self._segment, self._fd
        self._segment = self._store._reserve(self._size, PULL, disk=True).segment
        self._open()
        try:
            at = 0
            while piece := os.pread(old_fd, segments.PIECE_BYTES, at):
                segments.write_at(self._fd, piece[: self._size - at], at)
                at += len(piece)
        except OSError as error:
            raise self._store._troubles.translate(error, self._size) from error
        finally:
            os.close(old_fd)
            self._store._abandon(source, reusable=False)


class Mapped:
    """One mapping of a segment in this process, shared by the readings of it."""

    __slots__ = ("mapping", "segment", "users")

    def __init__(self, segment: Segment, mapping: mmap.mmap) -> None:
        self.segment = segment
        self.mapping = mapping
        self.users = 0
