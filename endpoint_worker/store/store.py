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

The store may outlive its process: with `recover` a new one takes up what an earlier life left. Files say by their names
what is in them (`names`), so nothing else is written for that:

    Store(recover=True) ─► seal what dead or living workers tell of ─► recover(wanted, workers) ─► … settle(worker)

A spilled object is not copied back: its file is mapped where it lies, and the kernel's page cache is what keeps a
useful one in memory. A place that names a spilled blob carries its crc32, for whoever maps it to check first.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from endpoint_worker.store import names, segments, spilling, troubles
from endpoint_worker.store.background import Background
from endpoint_worker.store.earlier import EarlierLife
from endpoint_worker.store.handles import Allocated, Mapped, Reading, Writable
from endpoint_worker.store.index import Index
from endpoint_worker.store.model import PULL, Object, Reserved, Segment, Spill
from gcref.errors import LostReason, ObjectLostError, StoreFullError

# Files up to this size are unlinked at once; above it, by the store's thread.
_UNLINK_INLINE_BYTES: Final = 4 * 1024 * 1024
# A mapping that the network has not let go of is tried again after this long.
_RETRY_S: Final = 1.0
POOL_TRIM_S: Final = 8.0


class Store:
    """The store of one endpoint. Any thread may call anything.

    Args:
        directory: for segments in memory; made, emptied, and removed at the end.
        spill_directory: for segments on disk; likewise.
        limit_bytes: what all segments in memory may take, pooled ones too.
        spill_limit_bytes: what segments on disk may take; None: what the disk has.
        pool_trim_s: how long unused segments are kept, in seconds.
        recover: leave what is there: `recover` comes.
        wake: called, on any thread, when `lost` has something new.

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
        recover: bool = False,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._folders = segments.Folders(directory, spill_directory, keep=recover)
        # Workers of earlier lives may still speak of numbers whose files are gone: the clock makes sure that none comes again.
        first_number = time.time_ns() // 1000 if recover else 1
        self._index = Index(limit_bytes, spill_limit_bytes, pool_trim_s, first_number)
        self._earlier = EarlierLife(self._folders, self._index, first_number)
        self._troubles = troubles.Troubles(self._folders.disk, limit_bytes)
        self._lock = threading.Lock()
        self._mapped: dict[int, Mapped] = {}
        self._stuck: list[Mapped] = []
        self._retry_at = 0.0
        self._checked: set[int] = set()  # segments whose crc was found right in this process
        self._lost: list[tuple[bytes, LostReason]] = []
        self._wake = wake
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
                raise self._troubles.disk_full(size)
        found = self._reserve(size, worker, disk=disk)
        return Allocated(self._path(found.segment), found.segment.capacity, found.warm)

    def seal(self, id: bytes, attempt: int, path: str, size: int) -> None:
        """A worker wrote the object into the segment at `path`. An older attempt of the object goes.

        It may be a worker of an earlier life, and this may have been said in that life too: with `recover`, a path is
        understood until its bytes are freed.

        Raises:
            LookupError: nobody is writing there.
            OSError: the file is shorter than that; the segment is gone.
        """
        try:
            with self._lock:
                if self._is_sealed(id, attempt, path):
                    return  # it was told twice
                segment = self._written(path)
            self._seal(segment, id, attempt, size, cache=False, shared=False)
        except (LookupError, OSError):
            self._tell_lost(id, LostReason.BYTES_LOST)
            raise

    def discard(self, paths: Iterable[str]) -> None:
        """Workers wrote these, but nobody may see them. Unknown paths are passed over."""
        unlink: list[Segment] = []
        with self._lock:
            for path in paths:
                with suppress(LookupError):  # its worker is gone, and so is the segment
                    unlink += self._index.abandon(self._written(path).number, time.monotonic(), reusable=True)
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
        segment.name = names.whole(segment.number, segment.use, PULL, id, attempt, size, None)
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

    def verify(self, id: bytes) -> bool:
        """Look at an object's bytes again: whether they are here and, if they were spilled, what they were.

        What is lost is told by `lost` too.
        """
        with self._lock:
            found = self._index.objects.get(id)
            self._checked.discard(found.segment.number if found is not None else -1)
        try:
            self.read(id).release()
        except (LookupError, ObjectLostError):
            return False
        return True

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
                with suppress(LookupError):  # a place of its own making harms nobody
                    number = self._folders.split(path)[0]
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
        self._earlier.worker_gone(worker)

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

    def seen(self, ids: Iterable[bytes]) -> dict[bytes, int]:
        """Which of these somebody maps or sends now, each with a number for `is_seen`."""
        with self._lock:
            found = [self._index.objects.get(id) for id in ids]
            return {here.id: here.segment.number for here in found if here is not None and here.segment.seen}

    def is_seen(self, number: int) -> bool:
        """Whether somebody still sees the bytes that `seen` numbered, be the object freed or not."""
        return self._index.is_seen(number)

    def evicted(self) -> list[bytes]:
        """The caches dropped to make room since the last call."""
        if not self._index.has_evicted:
            return []
        with self._lock:
            return self._index.evicted()

    def lost(self) -> list[tuple[bytes, LostReason]]:
        """The objects whose bytes turned out to be gone or damaged since the last call, or could not be sealed; once each."""
        if not self._lost:
            return []
        with self._lock:
            lost, self._lost = self._lost, []
        return lost

    # --------------------------------------------------------------------------------------------- an earlier life

    def recover(
        self,
        wanted: Mapping[bytes, tuple[int, int]],
        workers: Collection[int],
        caches: Collection[bytes] = (),
    ) -> dict[bytes, tuple[int, int]]:
        """Take up what an earlier life left, and remove the rest of it. Once, after `Store(…, recover=True)`.

        What is taken up is never written again, because somebody of then may still see it: it is unlinked when it is freed.

        Args:
            wanted: attempt and size of each object that ought to be here.
            workers: those of then that live, or of whose results `seal` is still to be told. What they were writing
                stays, and so does what they wrote that nobody wants yet, until `settle` or `worker_gone`.
            caches: which of the wanted have their home elsewhere and may be dropped when memory is short.

        Returns:
            Attempt and size of each wanted object that is here, whole and as wanted.
        """
        now = time.monotonic()
        with self._lock:
            taken, unlink = self._earlier.recover(wanted, frozenset(workers), caches, now)
            self._lost.clear()  # what could not be sealed before is not among those taken
        self._unlink(unlink)
        return taken

    def settle(self, worker: int) -> None:
        """A worker of an earlier life has told all its results: what it wrote then and nobody took goes."""
        now = time.monotonic()
        unlink: list[Segment] = []
        with self._lock:
            for segment in self._earlier.untold(worker):
                unlink += self._index.abandon(segment.number, now, reusable=False)
        self._unlink(unlink)

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

    def describe(self) -> dict[str, Any]:
        """For developers: the figures, and who keeps bytes that belong to no object (any more); bounded."""
        with self._lock:
            strays = self._index.strays()
        return {**self.stats(), "strays": strays}

    @property
    def limit_bytes(self) -> int:
        """What all segments in memory may take."""
        return self._index.limit_bytes

    @property
    def freed(self) -> int:
        """A number that grows whenever there may be more room than before."""
        return self._index.freed_count

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

    def close(self, *, keep: bool = False) -> bool:
        """Remove every file. Only when the workers are dead and the bulk thread has ended.

        Args:
            keep: leave the objects that are no caches, for a later life to `recover`.

        Returns:
            Whether something was left.
        """
        self._closed = True
        self._background.close()
        kept = {self._path(o.segment) for o in self._index.objects.values() if not o.cache} if keep else set()
        self._folders.remove(kept)
        return bool(kept)

    # ------------------------------------------------------------------------------------------------- inside

    def _path(self, segment: Segment) -> str:
        return self._folders.path(segment)

    def _reserve(self, size: int, writer: int, *, disk: bool = False) -> Reserved:
        with self._lock:
            found = self._index.reserve(size, writer, disk=disk)
            spills = self._index.victims()
        self._unlink(found.unlink)
        for spill in spills:
            self._background.submit(partial(self._spill, spill))
        segment = found.segment
        if not found.warm and not self._folders.has_room(segment.disk, size):
            self._abandon(segment, reusable=False)
            if segment.disk:
                raise self._troubles.disk_full(size)
            self._unlink_pool()
            return self._reserve(size, writer, disk=True)
        name = names.writing(segment.number, segment.use, writer, segment.capacity)
        if found.warm:
            try:
                self._folders.rename(segment, name)
            except FileNotFoundError:
                pass  # somebody cleaned up behind our back; whoever writes it makes it
        segment.name = name
        return found

    def _written(self, path: str) -> Segment:
        """The segment that is being written at a path, by whichever name it is known; under the lock."""
        number, name, _ = self._folders.split(path)
        segment = self._index.segments.get(number)
        if segment is None:
            segment = self._earlier.find(number, path)
        if segment is None or segment.writer is None or names.stem_of(segment.name) != names.stem_of(name):
            raise LookupError(f"nobody is writing a segment at {path}")
        return segment

    def _is_sealed(self, id: bytes, attempt: int, path: str) -> bool:
        """Whether this attempt of the object lies at this very path; under the lock."""
        found = self._index.objects.get(id)
        if found is None or found.attempt != attempt:
            return False
        _, name, disk = self._folders.split(path)
        return disk == found.segment.disk and names.stem_of(name) == names.stem_of(found.segment.name)

    def _abandon_failed(self, path: str) -> list[Segment]:
        try:
            segment = self._written(path)
        except LookupError:
            return []
        now = time.monotonic()
        return self._index.abandon(segment.number, now, reusable=False) + self._index.drop_pool()

    def _unlink_pool(self) -> None:
        """Memory is scarcer than the accounts say: what is only kept in case goes."""
        with self._lock:
            unlink = self._index.drop_pool()
        self._unlink(unlink)

    def _abandon(self, segment: Segment, *, reusable: bool) -> None:
        with self._lock:
            unlink = self._index.abandon(segment.number, time.monotonic(), reusable=reusable)
        self._unlink(unlink)

    def _seal(self, segment: Segment, id: bytes, attempt: int, size: int, cache: bool, shared: bool) -> None:
        path = self._path(segment)
        writer = PULL if segment.writer is None else segment.writer
        name = names.whole(segment.number, segment.use, writer, id, attempt, size, None)
        try:
            # Touching a mapping beyond the end of its file is fatal, so nobody's word is taken for the size.
            if os.stat(path).st_size < size:
                raise OSError(errno.EIO, f"shorter than the object of {size} bytes", path)
            self._name(segment, name)
        except OSError:
            self._abandon(segment, reusable=False)
            raise
        with self._lock:
            segment.exposed = segment.exposed or shared
            unlink = self._index.seal(id, attempt, segment.number, size, cache=cache, now=time.monotonic())
        self._unlink(unlink)

    def _name(self, segment: Segment, name: str) -> None:
        if segment.name != name:
            try:
                self._folders.rename(segment, name)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise  # else the folder cannot take a longer name: a later life will not find it, this one does

    def _map(self, found: Object) -> Mapped:
        """Map an object's segment here, or share the mapping that there is; under the lock."""
        mapped = self._mapped.get(found.segment.number)
        if mapped is None:
            try:
                mapping = segments.map_readable(self._path(found.segment), found.size)
            except OSError as error:
                self._note_lost(found, LostReason.BYTES_LOST)
                raise troubles.lost(found.id, LostReason.BYTES_LOST, str(error)) from error
            mapped = self._mapped[found.segment.number] = Mapped(found.segment, mapping)
        mapped.users += 1
        self._index.begin_read(found)
        return mapped

    def _release(self, mapped: Mapped, buffer: memoryview) -> None:
        buffer.release()
        now = time.monotonic()
        with self._lock:
            mapped.users -= 1
            unlink = (
                self._unmap(mapped, now) if not mapped.users else self._index.end_read(mapped.segment, now)
            )
        self._unlink(unlink)

    def _unmap(self, mapped: Mapped, now: float) -> list[Segment]:
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
            with self._lock:
                found = self._index.objects.get(id)
                if found is not None and found.segment is segment:
                    self._note_lost(found, LostReason.CORRUPT)
            raise troubles.lost(id, LostReason.CORRUPT, f"its bytes at {self._path(segment)} have changed")
        self._checked.add(segment.number)

    def _note_lost(self, found: Object, reason: LostReason) -> None:
        """Under the lock."""
        if not found.lost:
            found.lost = True
            self._tell_lost(found.id, reason)

    def _tell_lost(self, id: bytes, reason: LostReason) -> None:
        self._lost.append((id, reason))
        self._wake()

    # ------------------------------------------------------------------------------------------------- thread

    def _unlink(self, gone: list[Segment]) -> None:
        for segment in gone:
            self._checked.discard(segment.number)
            if not segment.name:
                continue  # it never had a file
            path = self._path(segment)
            if segment.capacity <= _UNLINK_INLINE_BYTES:
                segments.unlink(path)
            else:
                self._background.submit(partial(segments.unlink, path))

    def _spill(self, spill: Spill) -> None:
        crc: int | None = None
        if not self._closed:
            try:
                crc = spilling.copy(spill, self._folders)
            except OSError:
                pass  # the disk is full or broken: the object stays in memory
        with self._lock:
            unlink = self._index.spilled(spill, crc, time.monotonic())
        self._unlink(unlink)
