"""What the store knows: which bytes lie where, who may see them, and what may go. Pure: no file, no clock, no lock.

A *segment* is a file, in memory or on disk, that holds one object at a time. An object goes through segments:

    reserve ──► writing ──► seal ──► live ──► free ──► (somebody sees it still: dying) ──► pooled ──► reserve …
                   └─ abandon                                                          └─► gone (unlinked)

Rules:
    - Nobody's bytes change. A segment is written again only when its object is gone, no send of it is under way,
      and every grant to map it has been returned. When somebody whom we cannot ask may see it (`exposed`: another
      party, a child of a task, a dead worker's children), it is unlinked and never written again.
    - Every segment in memory counts against the limit with its whole capacity, pooled ones too.
    - Room is found in this order: a pooled segment of about this size; free room; pooled segments dropped; idle
      caches evicted; and if that is not enough, a segment on disk, at once: nobody waits for room. Each such
      overflow asks for a spill, so that what is used least lies on disk and the next one finds room in memory.
    - What is pinned, granted, read or being written is never evicted and never spilled.

The methods return the segments whose files the shell is to unlink. Every operation costs O(1), amortized.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

from endpoint_worker.store.model import PULL, Idle, Object, Reserved, Segment, Spill, capacity_for
from endpoint_worker.store.pool import Pool
from gcref.errors import StoreFullError

# A spill makes room for a quarter of the limit at once, so that not every allocation overflows.
_SPILL_SHARE: Final = 0.25
STRAYS_MAX: Final = 20


class Index:
    """The accounts of one store.

    Args:
        limit_bytes: what all segments in memory may take.
        spill_limit_bytes: what all segments on disk may take; None: what the disk has.
        pool_trim_s: an unused segment is dropped after this long.
        first_number: of the segments that it makes; those of earlier lives have smaller ones.
    """

    def __init__(
        self,
        limit_bytes: int,
        spill_limit_bytes: int | None = None,
        pool_trim_s: float = 8.0,
        first_number: int = 1,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.spill_limit_bytes = spill_limit_bytes
        self.objects: dict[bytes, Object] = {}
        self.segments: dict[int, Segment] = {}
        self.memory_bytes = 0
        self.disk_bytes = 0
        self.spill_count = 0
        self.evict_count = 0
        self.freed_count = 0  # grows whenever there may be more room than before
        self._next_number = first_number
        self._pool = Pool(pool_trim_s)
        self._idle = Idle()
        self._idle_caches = Idle()
        self._idle_disk_caches = Idle()
        self._spilling_bytes = 0
        self._overflow_bytes = 0  # the largest reservation that went to disk since the last `victims`
        self._by_worker: dict[int, dict[int, Segment]] = {}  # segments that a worker writes or was granted
        self._evicted: list[bytes] = []

    # ------------------------------------------------------------------------------------------------ writing

    def reserve(self, size: int, writer: int, *, disk: bool = False) -> Reserved:
        """Find a segment for an object.

        Args:
            size: of its blob, in bytes.
            writer: the worker that will fill it, or `PULL`.
            disk: memory turned out to be full, whatever the accounts say.

        Raises:
            StoreFullError: the object is larger than the store, or disk is full too.
        """
        capacity = capacity_for(size)
        if size > self.limit_bytes:
            raise self._full(
                size,
                f"an object of {size} bytes is larger than the object store ({self.limit_bytes} bytes); "
                "raise store_limit_bytes in the endpoint's configuration, or return the data in parts",
            )
        if not disk:
            pooled = self._pool.take(capacity)
            if pooled is not None:
                pooled.use += 1
                return Reserved(self._start_writing(pooled, writer), True, [])
            unlink = self._make_room(capacity)
            if unlink is not None:
                return Reserved(self._start_writing(self._new(capacity, disk=False), writer), False, unlink)
            self._overflow_bytes = max(self._overflow_bytes, capacity)
        unlink = self._make_disk_room(size, capacity)
        return Reserved(self._start_writing(self._new(capacity, disk=True), writer), False, unlink)

    def seal(
        self, id: bytes, attempt: int, number: int, size: int, *, cache: bool, now: float
    ) -> list[Segment]:
        """The object is written. An older attempt of it goes; the same attempt again is dropped.

        Raises:
            LookupError: nobody writes this segment.
        """
        segment = self._writing(number)
        old = self.objects.get(id)
        if old is not None and old.attempt == attempt:
            return self.abandon(number, now, reusable=not segment.exposed)
        self._stop_writing(segment)
        unlink: list[Segment] = []
        found = Object(id, attempt, size, segment, cache)
        if old is not None:
            found.pins = old.pins
            unlink = self._detach(old, now)
        segment.owner = id
        self.objects[id] = found
        self._settle(found)
        return unlink

    def abandon(self, number: int, now: float, *, reusable: bool) -> list[Segment]:
        """Give up a segment that is being written.

        Args:
            number: the segment.
            now: monotonic seconds.
            reusable: nobody can write to it any more.

        Raises:
            LookupError: nobody writes this segment.
        """
        segment = self._writing(number)
        self._stop_writing(segment)
        segment.exposed = segment.exposed or not reusable
        return self._retire(segment, now)

    def adopt(self, size: int, *, disk: bool) -> Reserved:
        """Make a segment for a file that another party wrote, to be linked; `seal` comes next.

        Raises:
            StoreFullError: no room.
        """
        capacity = capacity_for(size)
        unlink = None if size > self.limit_bytes else [] if disk else self._make_room(capacity)
        if unlink is None:
            raise self._full(
                size, f"the object store has no room for a link to {size} bytes; raise its limit"
            )
        segment = self._start_writing(self._new(capacity, disk=disk), PULL)
        segment.exposed = True
        return Reserved(segment, False, unlink)

    def take_up(self, number: int, use: int, capacity: int, *, disk: bool, writer: int) -> Segment:
        """Enter a segment of an earlier life, as one that is being written. Somebody of then may see it: it is exposed."""
        segment = self._start_writing(self._add(Segment(number, capacity, disk, None)), writer)
        segment.use = use
        segment.exposed = True
        return segment

    # ------------------------------------------------------------------------------------------------ seeing

    def find(self, id: bytes, attempt: int | None = None) -> Object:
        """The object, if it is here.

        Raises:
            LookupError: it is not, or not of this attempt.
        """
        found = self.objects.get(id)
        if found is None or (attempt is not None and found.attempt != attempt):
            raise LookupError(f"object {id.hex()} (attempt {attempt}) is not in the store")
        return found

    def grant(self, worker: int, id: bytes) -> Object:
        """Let a worker map the object, once more.

        Raises:
            LookupError: it is not here.
        """
        found = self.find(id)
        grants = found.segment.grants
        grants[worker] = grants.get(worker, 0) + 1
        self._of_worker(worker)[found.segment.number] = found.segment
        self._settle(found)
        return found

    def ungrant(self, worker: int, number: int, grants: int, *, reusable: bool, now: float) -> list[Segment]:
        """A worker returns grants. What is not known (any more) is passed over: the worker may be gone."""
        segment = self.segments.get(number)
        if segment is None or worker not in segment.grants:
            return []
        segment.exposed = segment.exposed or not reusable
        left = segment.grants[worker] - grants
        if left > 0:
            segment.grants[worker] = left
            return []
        del segment.grants[worker]
        del self._by_worker[worker][number]
        return self._unseen(segment, now)

    def written_by(self, worker: int) -> list[Segment]:
        """What a worker is writing."""
        return [segment for segment in self._by_worker.get(worker, {}).values() if segment.writer == worker]

    def workers(self) -> list[int]:
        """The workers that are writing something, or were granted something."""
        return [worker for worker, segments in self._by_worker.items() if segments]

    def worker_gone(self, worker: int, now: float) -> list[Segment]:
        """A worker is dead. Children that it may have left behind make its segments exposed."""
        unlink: list[Segment] = []
        for segment in self._by_worker.pop(worker, {}).values():
            segment.exposed = True
            segment.grants.pop(worker, None)
            if segment.writer == worker:
                segment.writer = None
            unlink += self._unseen(segment, now)
        return unlink

    def begin_read(self, found: Object) -> None:
        """A send or copy of it begins."""
        found.segment.readers += 1
        self._settle(found)

    def end_read(self, segment: Segment, now: float) -> list[Segment]:
        """A send or copy has ended, once for each `begin_read`."""
        segment.readers -= 1
        return self._unseen(segment, now)

    def pin(self, id: bytes) -> None:
        """It is in use: neither evict nor spill it. Unknown ids are passed over."""
        found = self.objects.get(id)
        if found is not None:
            found.pins += 1
            self._settle(found)

    def unpin(self, id: bytes) -> None:
        """Undo one `pin`."""
        found = self.objects.get(id)
        if found is not None and found.pins:
            found.pins -= 1
            self._settle(found)

    def is_seen(self, number: int) -> bool:
        """Whether somebody writes or may see this segment."""
        segment = self.segments.get(number)
        return segment is not None and segment.seen

    # ------------------------------------------------------------------------------------------------ going

    def free(self, id: bytes, now: float) -> list[Segment]:
        """Nobody wants the object any more; its segment goes when nobody can see it. Unknown ids are passed over."""
        found = self.objects.get(id)
        return [] if found is None else self._detach(found, now)

    @property
    def has_evicted(self) -> bool:
        """Whether `evicted` has something."""
        return bool(self._evicted)

    def evicted(self) -> list[bytes]:
        """The caches dropped to make room since the last call."""
        found, self._evicted = self._evicted, []
        return found

    def victims(self) -> list[Spill]:
        """What to copy to disk after reservations overflowed: least recently used first, until there is room again."""
        if not self._overflow_bytes:
            return []
        wanted = min(self.limit_bytes, max(self._overflow_bytes, int(self.limit_bytes * _SPILL_SHARE)))
        self._overflow_bytes = 0
        goes = self._pool.bytes + self._idle_caches.bytes + self._spilling_bytes
        chosen: list[Spill] = []
        while self._idle.objects and self.memory_bytes - goes > self.limit_bytes - wanted:
            found = self._idle.oldest()
            source = found.segment
            if (
                self.spill_limit_bytes is not None
                and self.disk_bytes + source.capacity > self.spill_limit_bytes
            ):
                break
            target = self._start_writing(self._new(source.capacity, disk=True), PULL)
            found.spilling = True
            source.readers += 1
            self._settle(found)
            self._spilling_bytes += source.capacity
            goes += source.capacity
            chosen.append(Spill(found, source, target))
        return chosen

    def spilled(self, spill: Spill, crc: int | None, now: float) -> list[Segment]:
        """A copy to disk has ended.

        Args:
            spill: as `victims` gave it.
            crc: crc32 of the blob; None: the copy failed, the object stays where it is.
            now: monotonic seconds.
        """
        found, source, target = spill
        self._spilling_bytes -= source.capacity
        found.spilling = False
        self._stop_writing(target)
        source.readers -= 1
        is_used = self.objects.get(found.id) is not found or not found.idle
        if crc is None or is_used:
            unlink = self._retire(target, now)
        else:
            target.crc = crc
            target.owner, source.owner = source.owner, None
            found.segment = target
            self.spill_count += 1
            self._settle(found)
            unlink = []
        return unlink + self._unseen(source, now)

    def set_cache(self, id: bytes, cache: bool) -> None:
        """Whether it may be dropped when memory is short. Unknown ids are passed over."""
        found = self.objects.get(id)
        if found is not None and found.cache != cache:
            self._unlist(found)
            found.cache = cache
            self._settle(found)

    def trim(self, now: float) -> list[Segment]:
        """Drop what has been pooled for too long."""
        return [self._gone(segment) for segment in self._pool.due(now)]

    def drop_pool(self) -> list[Segment]:
        """Drop all pooled segments: memory is scarcer than the accounts say."""
        unlink: list[Segment] = []
        while (oldest := self._pool.drop_oldest()) is not None:
            unlink.append(self._gone(oldest))
        return unlink

    @property
    def pooled_bytes(self) -> int:
        """What pooled segments take."""
        return self._pool.bytes

    @property
    def deadline(self) -> float | None:
        """When `trim` has something to do; None: never, as things are."""
        return self._pool.deadline

    def strays(self) -> list[dict[str, Any]]:
        """Segments that belong to no object and are kept because somebody sees them: who does; `STRAYS_MAX` of them."""
        found = (each for each in self.segments.values() if each.owner is None and each.seen)
        return [
            {
                "name": each.name, "capacity": each.capacity, "disk": each.disk, "writer": each.writer,
                "granted": dict(each.grants), "readers": each.readers, "exposed": each.exposed,
            }
            for each in islice(found, STRAYS_MAX)
        ]  # fmt: skip

    def validate(self) -> None:
        """Check the accounts against themselves. For tests; takes as long as there are segments.

        Raises:
            AssertionError: they disagree.
        """
        here = self.segments.values()
        assert self.memory_bytes == sum(s.capacity for s in here if not s.disk) <= self.limit_bytes
        assert self.disk_bytes == sum(s.capacity for s in here if s.disk)
        self._pool.validate()
        assert {id: found.segment.owner for id, found in self.objects.items()} == {
            id: id for id in self.objects
        }
        for listed in (self._idle, self._idle_caches, self._idle_disk_caches):
            may_go = {id for id, o in self.objects.items() if o.idle and self._list_of(o) is listed}
            assert listed.objects.keys() == may_go
            assert listed.bytes == sum(o.segment.capacity for o in listed.objects.values())
        for worker, segments in self._by_worker.items():
            assert all(s.writer == worker or worker in s.grants for s in segments.values())

    # ------------------------------------------------------------------------------------------------ inside

    def _new(self, capacity: int, *, disk: bool) -> Segment:
        segment = Segment(self._next_number, capacity, disk, None)
        self._next_number += 1
        return self._add(segment)

    def _add(self, segment: Segment) -> Segment:
        self.segments[segment.number] = segment
        if segment.disk:
            self.disk_bytes += segment.capacity
        else:
            self.memory_bytes += segment.capacity
        return segment

    def _gone(self, segment: Segment) -> Segment:
        del self.segments[segment.number]
        if segment.disk:
            self.disk_bytes -= segment.capacity
        else:
            self.memory_bytes -= segment.capacity
        return segment

    def _of_worker(self, worker: int) -> dict[int, Segment]:
        return self._by_worker.setdefault(worker, {})

    def _writing(self, number: int) -> Segment:
        segment = self.segments.get(number)
        if segment is None or segment.writer is None:
            raise LookupError(f"segment {number} is not being written")
        return segment

    def _start_writing(self, segment: Segment, writer: int) -> Segment:
        segment.writer = writer
        if writer != PULL:
            self._of_worker(writer)[segment.number] = segment
        return segment

    def _stop_writing(self, segment: Segment) -> None:
        writer, segment.writer = segment.writer, None
        if writer is not None and writer != PULL:
            del self._by_worker[writer][segment.number]

    def _make_room(self, capacity: int) -> list[Segment] | None:
        """Make room in memory; None, and nothing done, when what may go is not enough."""
        over = self.memory_bytes + capacity - self.limit_bytes
        if over > self._pool.bytes + self._idle_caches.bytes:
            return None
        unlink: list[Segment] = []
        while over > 0 and (oldest := self._pool.drop_oldest()) is not None:
            over -= oldest.capacity
            unlink.append(self._gone(oldest))
        while over > 0:
            cache = self._idle_caches.oldest()
            over -= cache.segment.capacity
            unlink.append(self._evict(cache))
        return unlink

    def _make_disk_room(self, size: int, capacity: int) -> list[Segment]:
        unlink: list[Segment] = []
        if self.spill_limit_bytes is None:
            return unlink
        if self.disk_bytes + capacity - self._idle_disk_caches.bytes > self.spill_limit_bytes:
            raise self._full(
                size,
                f"no room for {size} bytes: the object store has reached its limit in memory "
                f"({self.limit_bytes} bytes) and on disk ({self.spill_limit_bytes} bytes); "
                "drop results that are not needed any more, or raise the limits in the endpoint's configuration",
            )
        while self.disk_bytes + capacity > self.spill_limit_bytes:
            unlink.append(self._evict(self._idle_disk_caches.oldest()))
        return unlink

    def _full(self, size: int, message: str) -> StoreFullError:
        return StoreFullError(message, needed_bytes=size, limit_bytes=self.limit_bytes)

    def _evict(self, cache: Object) -> Segment:
        self.freed_count += 1
        self._evicted.append(cache.id)
        self.evict_count += 1
        self._unlist(cache)
        del self.objects[cache.id]
        cache.segment.owner = None
        return self._gone(cache.segment)

    def _detach(self, found: Object, now: float) -> list[Segment]:
        self._unlist(found)
        del self.objects[found.id]
        found.segment.owner = None
        return self._unseen(found.segment, now)

    def _unseen(self, segment: Segment, now: float) -> list[Segment]:
        """Somebody stopped looking: the segment goes if its object has gone before, else its object may be idle now."""
        if segment.owner is not None:
            self.freed_count += 1
            self._settle(self.objects[segment.owner])
            return []
        return [] if segment.seen else self._retire(segment, now)

    def _retire(self, segment: Segment, now: float) -> list[Segment]:
        self.freed_count += 1
        if segment.disk or segment.exposed:
            return [self._gone(segment)]
        self._pool.add(segment, now)
        return []

    def _list_of(self, found: Object) -> Idle | None:
        if not found.segment.disk:
            return self._idle_caches if found.cache else self._idle
        return self._idle_disk_caches if found.cache else None

    def _unlist(self, found: Object) -> None:
        listed = self._list_of(found)
        if listed is not None:
            listed.remove(found)

    def _settle(self, found: Object) -> None:
        """Put it at the recently used end of the list it belongs to, or into none."""
        self._unlist(found)
        listed = self._list_of(found)
        if listed is not None and found.idle:
            listed.add(found)
