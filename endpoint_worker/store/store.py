"""The object store: large blobs in shared memory, shared by the agent's threads, its workers and its neighbours.

    worker ── ALLOC ──► allocate ──► writes the file itself ── STORED ──► seal
    pull   ──► begin ──► Writable.write … ──► Writable.seal
    worker ◄── a place ── map_for ◄── dispatch            bulk thread ◄── read / expose
                     unmapped ◄── DONE

`Index` decides, `segments` does the files, this shell holds the lock between them: a decision under the lock, the
files after it. No call waits for room, for a worker or for the disk: what has no room in memory gets a segment on
disk at once, and a thread of the store's own copies what is used least to disk behind it, so that the next one finds
room. It also unlinks large files (giving back a gigabyte of pages takes a tenth of a second). That thread starts
when it is first needed and sleeps without waking.

A spilled object is not copied back: its file is mapped where it lies, and the kernel's page cache is what keeps a
useful one in memory. A place that names a spilled blob carries its crc32, for whoever maps it to check first.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from endpoint_worker.store import segments
from endpoint_worker.store.background import Background
from endpoint_worker.store.index import Index
from endpoint_worker.store.model import PULL, Object, Reserved, Segment, Spill
from gcref import ids as id_module
from gcref.errors import LostReason, ObjectLostError, StoreFullError

# Files up to this size are unlinked at once; above it, by the store's thread.
_UNLINK_INLINE_BYTES: Final = 4 * 1024 * 1024
# A mapping that the network has not let go of is tried again after this long.
_RETRY_S: Final = 1.0
POOL_TRIM_S: Final = 8.0


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

    def __init__(self, store: Store, mapped: _Mapped, buffer: memoryview) -> None:
        self._store = store
        self._mapped: _Mapped | None = mapped
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
                raise self._store._translate(error, self._size) from error
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
            raise self._store._translate(error, self._size) from error

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
            raise self._store._translate(error, self._size) from error
        finally:
            os.close(old_fd)
            self._store._abandon(source, reusable=False)


class _Mapped:
    """One mapping of a segment in this process, shared by the readings of it."""

    __slots__ = ("mapping", "segment", "users")

    def __init__(self, segment: Segment, mapping: mmap.mmap) -> None:
        self.segment = segment
        self.mapping = mapping
        self.users = 0


class Store:
    """The store of one endpoint. Any thread may call anything.

    Args:
        directory: for segments in memory; made, emptied, and removed at the end.
        spill_directory: for segments on disk; likewise.
        limit_bytes: what all segments in memory may take, pooled ones too.
        spill_limit_bytes: what segments on disk may take; None: what the disk has.
        pool_trim_s: how long unused segments are kept, in seconds.

    Raises:
        ConfigError: a folder cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        spill_directory: Path,
        limit_bytes: int,
        *,
        spill_limit_bytes: int | None = None,
        pool_trim_s: float = POOL_TRIM_S,
    ) -> None:
        self._folders = segments.Folders(directory, spill_directory)
        self._index = Index(limit_bytes, spill_limit_bytes, pool_trim_s)
        self._lock = threading.Lock()
        self._mapped: dict[int, _Mapped] = {}
        self._stuck: list[_Mapped] = []
        self._retry_at = 0.0
        self._checked: set[int] = set()  # segments whose crc was found right in this process
        self._background = Background("gcref-store")
        self._closed = False

    # ------------------------------------------------------------------------------------------------ writing

    def allocate(self, size: int, worker: int, failed: str | None = None) -> Allocated:
        """Find a segment for a worker's result; the answer to ALLOC.

        Args:
            size: of the blob, in bytes.
            worker: who will write it.
            failed: the path given before, where there turned out to be no room.

        Raises:
            StoreFullError: the object is larger than the store, or disk is full too.
        """
        disk = False
        if failed is not None:
            disk = True
            with self._lock:
                gone = self._abandon_failed(failed)
            self._unlink(gone)
            if gone and gone[0].disk:
                raise self._disk_full(size)
        found = self._reserve(size, worker, disk=disk)
        return Allocated(self._path(found.segment), found.segment.capacity, found.warm)

    def seal(self, id: bytes, attempt: int, path: str, size: int) -> None:
        """A worker wrote the object into the segment at `path`. An older attempt of the object goes.

        Raises:
            LookupError: nobody is writing there.
            OSError: the file is shorter than that; the segment is gone.
        """
        with self._lock:
            segment = self._written(path)
        self._seal(segment, id, attempt, size, cache=False, shared=False)

    def discard(self, paths: Iterable[str]) -> None:
        """Workers wrote these, but nobody may see them. Unknown paths are passed over."""
        unlink: list[Segment] = []
        with self._lock:
            for path in paths:
                try:
                    unlink += self._index.abandon(self._written(path).number, time.monotonic(), reusable=True)
                except LookupError:
                    continue  # its worker is gone, and so is the segment
        self._unlink(unlink)

    def begin(self, id: bytes, attempt: int, size: int, cache: bool = True) -> Writable:
        """Start to write an object that comes from elsewhere.

        Args:
            id: of the object.
            attempt: whose bytes they are.
            size: of the blob.
            cache: it has its home elsewhere, so it may be dropped when memory is short.

        Raises:
            StoreFullError: there is no room, in memory or on disk.
        """
        return Writable(self, self._reserve(size, PULL).segment, id, attempt, size, cache)

    def link(self, id: bytes, attempt: int, path: str, size: int, cache: bool = True) -> None:
        """Take over another party's file by a hard link: the same bytes, no copy.

        The other party must never write that file again (`expose` promises that).

        Raises:
            OSError: it is no such file, lies on another file system, or the store has no room: have the bytes sent.
        """
        disk = self._folders.is_on_disk(path, size)
        try:
            with self._lock:
                segment, _, unlink = self._index.adopt(size, disk=disk)
        except StoreFullError as error:
            raise OSError(errno.ENOSPC, str(error), path) from error
        self._unlink(unlink)
        try:
            os.link(path, self._path(segment), follow_symlinks=False)
        except OSError:
            self._abandon(segment, reusable=False)
            raise
        self._seal(segment, id, attempt, size, cache, shared=True)

    # ------------------------------------------------------------------------------------------------ using

    def __contains__(self, id: bytes) -> bool:
        return id in self._index.objects

    def read(
        self, id: bytes, attempt: int | None = None, offset: int = 0, length: int | None = None
    ) -> Reading:
        """Map a range of an object, to send it. It counts as seen until the reading is released.

        Args:
            id: of the object.
            attempt: whose bytes are wanted; None: whichever are here.
            offset: where the range begins.
            length: of the range; None: to the end.

        Raises:
            LookupError: it is not here, or only another attempt's.
            ValueError: the range is not inside the object.
            ObjectLostError: its bytes on disk have gone bad.
        """
        with self._lock:
            found = self._index.find(id, attempt)
            end = found.size if length is None else offset + length
            if not 0 <= offset <= end <= found.size:
                raise ValueError(
                    f"the range {offset}..{end} is not inside object {id.hex()} of {found.size} bytes"
                )
            mapped = self._map(found)
        reading = Reading(self, mapped, memoryview(mapped.mapping)[offset:end])
        try:
            self._check(found.id, mapped.segment, mapped.mapping)
        except ObjectLostError:
            reading.release()
            raise
        return reading

    def expose(self, id: bytes, attempt: int | None = None) -> tuple[str, int]:
        """Name the object's file, and its size, to another party of this machine, which will map or link it.

        Raises:
            LookupError: it is not here, or only another attempt's.
            ObjectLostError: its bytes on disk have gone bad.
        """
        if self._index.find(id, attempt).segment.crc is not None:
            self.read(id, attempt).release()
        with self._lock:
            found = self._index.find(id, attempt)
            found.segment.exposed = True
            return self._path(found.segment), found.size

    def map_for(self, worker: int, id: bytes) -> list[Any]:
        """Grant a worker to map the object: the place to put into an entry. The worker returns it with DONE.

        Raises:
            LookupError: it is not here.
        """
        with self._lock:
            found = self._index.grant(worker, id)
            path = self._path(found.segment)
            crc = found.segment.crc
        return [path, found.size] if crc is None else [path, found.size, crc]

    def unmapped(self, worker: int, items: Iterable[Any]) -> None:
        """A worker returns grants: the second field of DONE, as it came.

        Raises:
            ValueError: that is not what the field looks like.
        """
        unlink: list[Segment] = []
        now = time.monotonic()
        with self._lock:
            for path, grants, reusable in items:
                try:
                    number = self._folders.number(path)
                except LookupError:
                    continue  # a place of its own making harms nobody
                unlink += self._index.ungrant(worker, number, grants, reusable=bool(reusable), now=now)
        self._unlink(unlink)

    def ungrant(self, worker: int, paths: Iterable[str]) -> None:
        """Places of `map_for` never reached the worker: one grant each comes back."""
        self.unmapped(worker, [(path, 1, True) for path in paths])

    def worker_gone(self, worker: int) -> None:
        """A worker is dead: what it mapped and what it was writing is nobody's now."""
        with self._lock:
            unlink = self._index.worker_gone(worker, time.monotonic())
        self._unlink(unlink)

    def pin(self, id: bytes) -> None:
        """It is in use: neither evict nor spill it. Unknown ids are passed over."""
        with self._lock:
            self._index.pin(id)

    def unpin(self, id: bytes) -> None:
        """Undo one `pin`."""
        with self._lock:
            self._index.unpin(id)

    def set_cache(self, ids: Iterable[bytes], cache: bool) -> None:
        """Say whether these may be dropped when there is no room: copies of other homes' objects that nobody needs now."""
        with self._lock:
            for id in ids:
                self._index.set_cache(id, cache)

    def free(self, ids: Iterable[bytes]) -> None:
        """Nobody wants these any more; unknown ids are passed over. Bytes that are seen go when they are not."""
        unlink: list[Segment] = []
        now = time.monotonic()
        with self._lock:
            for id in ids:
                unlink += self._index.free(id, now)
        self._unlink(unlink)

    def evicted(self) -> list[bytes]:
        """The caches dropped to make room since the last call."""
        if not self._index.evict_count:
            return []
        with self._lock:
            return self._index.evicted()

    # ------------------------------------------------------------------------------------------- housekeeping

    def stats(self) -> dict[str, int]:
        """Figures for people: `used_bytes` is memory without the pool."""
        index = self._index
        with self._lock:
            return {
                "objects": len(index.objects),
                "limit_bytes": index.limit_bytes,
                "used_bytes": index.memory_bytes - index.pooled_bytes,
                "pooled_bytes": index.pooled_bytes,
                "disk_bytes": index.disk_bytes,
                "spilled": index.spill_count,
                "evicted": index.evict_count,
            }

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do, in monotonic seconds; None: never, as things are."""
        trim = self._index.deadline
        if self._stuck:
            return self._retry_at if trim is None else min(trim, self._retry_at)
        return trim

    def tick(self, now: float) -> None:
        """Do what is due: trim the pool, try again to close mappings."""
        with self._lock:
            unlink = self._index.trim(now)
            stuck, self._stuck = (self._stuck, []) if self._retry_at <= now else ([], self._stuck)
            for mapped in stuck:
                unlink += self._unmap(mapped, now)
        self._unlink(unlink)

    def close(self) -> None:
        """Remove every file. Only when the workers are dead and the bulk thread has ended."""
        self._closed = True
        self._background.close()
        self._folders.remove()

    # ------------------------------------------------------------------------------------------------- inside

    def _path(self, segment: Segment) -> str:
        return self._folders.path(segment)

    def _reserve(self, size: int, writer: int, *, disk: bool = False) -> Reserved:
        with self._lock:
            found = self._index.reserve(size, writer, disk=disk)
            spills = self._index.victims()
        self._unlink(found.unlink)
        if found.warm:
            self._folders.name_again(found.segment)
        for spill in spills:
            self._background.submit(partial(self._spill, spill))
        return found

    def _written(self, path: str) -> Segment:
        """The segment that is being written at a path; under the lock."""
        segment = self._index.segments.get(self._folders.number(path))
        if segment is None or segment.writer is None or self._path(segment) != path:
            raise LookupError(f"nobody is writing a segment at {path}")
        return segment

    def _abandon_failed(self, path: str) -> list[Segment]:
        try:
            segment = self._written(path)
        except LookupError:
            return []
        now = time.monotonic()
        return self._index.abandon(segment.number, now, reusable=False) + self._index.drop_pool()

    def _abandon(self, segment: Segment, *, reusable: bool) -> None:
        with self._lock:
            unlink = self._index.abandon(segment.number, time.monotonic(), reusable=reusable)
        self._unlink(unlink)

    def _seal(self, segment: Segment, id: bytes, attempt: int, size: int, cache: bool, shared: bool) -> None:
        path = self._path(segment)
        try:
            # Touching a mapping beyond the end of its file is fatal, so nobody's word is taken for the size.
            if os.stat(path).st_size < size:
                raise OSError(errno.EIO, f"shorter than the object of {size} bytes", path)
        except OSError:
            self._abandon(segment, reusable=False)
            raise
        with self._lock:
            segment.exposed = segment.exposed or shared
            unlink = self._index.seal(id, attempt, segment.number, size, cache=cache, now=time.monotonic())
        self._unlink(unlink)

    def _map(self, found: Object) -> _Mapped:
        """Map an object's segment here, or share the mapping that there is; under the lock."""
        mapped = self._mapped.get(found.segment.number)
        if mapped is None:
            try:
                mapping = segments.map_readable(self._path(found.segment), found.size)
            except OSError as error:
                raise _lost(found.id, LostReason.BYTES_LOST, str(error)) from error
            mapped = self._mapped[found.segment.number] = _Mapped(found.segment, mapping)
        mapped.users += 1
        self._index.begin_read(found)
        return mapped

    def _release(self, mapped: _Mapped, buffer: memoryview) -> None:
        buffer.release()
        now = time.monotonic()
        with self._lock:
            mapped.users -= 1
            unlink = (
                self._unmap(mapped, now) if not mapped.users else self._index.end_read(mapped.segment, now)
            )
        self._unlink(unlink)

    def _unmap(self, mapped: _Mapped, now: float) -> list[Segment]:
        """Close a mapping that has no users; under the lock. The last read ends only when it is closed."""
        if mapped.users:
            # Somebody shares it again since it was stuck; the reading left over ends with this call.
            return self._index.end_read(mapped.segment, now)
        try:
            mapped.mapping.close()
        except BufferError:
            self._stuck.append(mapped)
            self._retry_at = now + _RETRY_S
            return []
        self._mapped.pop(mapped.segment.number, None)
        return self._index.end_read(mapped.segment, now)

    def _check(self, id: bytes, segment: Segment, mapping: mmap.mmap) -> None:
        """Check a spilled object against its checksum, once in the life of its segment; not under the lock."""
        if segment.crc is None or segment.number in self._checked:
            return
        if segments.checksum(mapping) != segment.crc:
            raise _lost(id, LostReason.CORRUPT, f"its bytes at {self._path(segment)} have changed")
        self._checked.add(segment.number)

    def _translate(self, error: OSError, size: int) -> Exception:
        return self._disk_full(size) if error.errno in (errno.ENOSPC, errno.EDQUOT) else error

    def _disk_full(self, size: int) -> StoreFullError:
        return StoreFullError(
            f"no room for {size} bytes: shared memory is full, and so is the disk at {self._folders.disk}; make room "
            "there, set spill_dir to a larger disk, or drop results that are not needed any more",
            needed_bytes=size,
            limit_bytes=self._index.limit_bytes,
        )

    # ------------------------------------------------------------------------------------------------- thread

    def _unlink(self, gone: list[Segment]) -> None:
        for segment in gone:
            self._checked.discard(segment.number)
            path = self._path(segment)
            if segment.capacity <= _UNLINK_INLINE_BYTES:
                segments.unlink(path)
            else:
                self._background.submit(partial(segments.unlink, path))

    def _spill(self, spill: Spill) -> None:
        crc: int | None = None
        if not self._closed:
            try:
                crc = segments.copy_to(self._path(spill.source), self._path(spill.target), spill.object.size)
            except OSError:
                pass  # the disk is full or broken: the object stays in memory
        with self._lock:
            unlink = self._index.spilled(spill, crc, time.monotonic())
        self._unlink(unlink)


def _lost(id: bytes, reason: LostReason, why: str) -> ObjectLostError:
    text = id_module.text(id)
    return ObjectLostError(f"object {text} is lost: {why}", reason=reason, object_id=text)
