"""The store's accounts beside an obvious twin: limits are kept, and nobody's bytes are ever written over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from endpoint_worker.store.index import Index
from endpoint_worker.store.model import PULL, Segment, Spill, capacity_for
from gcref.errors import StoreFullError

PAGE = 4096
LIMIT = 40 * PAGE
SPILL_LIMIT = 24 * PAGE
TRIM_S = 10.0
FIRST = 1000  # numbers below belong to an earlier life
WORKERS = (1, 2)

ids = st.integers(0, 3).map(lambda n: bytes([n]) * 16)
sizes = st.sampled_from((PAGE, 4 * PAGE, 4 * PAGE - 100, 12 * PAGE))


class Twin:
    """What is true of one segment, kept in the most stupid way."""

    def __init__(self, segment: Segment, writer: int) -> None:
        self.segment = segment
        self.writer: int | None = writer
        self.grants: list[int] = []
        self.readers = 0
        self.exposed = False
        self.unlinked = False

    @property
    def seen(self) -> bool:
        return self.writer is not None or bool(self.grants) or self.readers > 0


class StoreMachine(RuleBasedStateMachine):
    """Does everything to an index that a shell may do."""

    writing: Bundle[int] = Bundle("writing")
    readings: Bundle[int] = Bundle("readings")
    spills: Bundle[Spill] = Bundle("spills")

    @initialize(limited=st.booleans(), count=st.integers(0, 4), cache=st.booleans())
    def begin(self, limited: bool, count: int, cache: bool) -> None:
        self.index = Index(LIMIT, SPILL_LIMIT if limited else None, TRIM_S, FIRST)
        self.earlier = 0  # segments taken up
        self.now = 0.0
        self.twins: dict[int, Twin] = {}
        self.objects: dict[bytes, tuple[int, int, bool]] = {}  # id: attempt, segment, cache
        self.pins: dict[bytes, int] = {}
        self.attempt = 0
        for n in range(count):  # it takes some objects before anything can go wrong
            self.seal(self.reserve(12 * PAGE, PULL, False), bytes([n]) * 16, cache, False)

    # ---------------------------------------------------------------------------------------- what happens

    @rule(target=writing, size=sizes, writer=st.sampled_from((PULL, *WORKERS)), disk=st.booleans())
    def reserve(self, size: int, writer: int, disk: bool) -> int:
        try:
            found = self.index.reserve(size, writer, disk=disk)
        except StoreFullError:
            assert self.index.spill_limit_bytes is not None
            return -1
        self.gone(found.unlink)
        segment = found.segment
        assert segment.capacity >= size
        known = self.twins.get(segment.number)
        assert found.warm == (known is not None)
        if known is not None:
            assert not known.seen, "a segment that somebody sees is written again"
            assert not known.exposed, "a segment that was exposed is written again"
            assert not known.unlinked
            assert segment.number not in {at for _, at, _ in self.objects.values()}
        self.twins[segment.number] = Twin(segment, writer)
        return segment.number

    @rule(number=consumes(writing), id=ids, cache=st.booleans(), again=st.booleans())
    def seal(self, number: int, id: bytes, cache: bool, again: bool) -> None:
        if not self.is_written(number):
            return
        self.attempt += 1
        attempt = self.objects[id][0] if again and id in self.objects else self.attempt
        repeated = id in self.objects and self.objects[id][0] == attempt
        self.twins[number].writer = None
        unlink = self.index.seal(id, attempt, number, 1, cache=cache, now=self.now)
        if not repeated:
            self.objects[id] = (attempt, number, cache)
        self.gone(unlink)

    @rule(number=consumes(writing), reusable=st.booleans())
    def abandon(self, number: int, reusable: bool) -> None:
        if self.is_written(number):
            self.twins[number].writer = None
            self.twins[number].exposed |= not reusable
            self.gone(self.index.abandon(number, self.now, reusable=reusable))

    @rule(target=writing, size=sizes, disk=st.booleans())
    def adopt(self, size: int, disk: bool) -> int:
        try:
            segment, warm, unlink = self.index.adopt(size, disk=disk)
        except StoreFullError:
            return -1
        assert not warm
        self.gone(unlink)
        self.twins[segment.number] = Twin(segment, PULL)
        self.twins[segment.number].exposed = True
        return segment.number

    @rule(target=writing, size=sizes, writer=st.sampled_from((PULL, *WORKERS)), disk=st.booleans())
    def take_up(self, size: int, writer: int, disk: bool) -> int:
        taken = self.index.disk_bytes if disk else self.index.memory_bytes
        if taken + size > (SPILL_LIMIT if disk else LIMIT):
            return -1  # it fitted into the same store before
        self.earlier += 1
        segment = self.index.take_up(self.earlier, 3, capacity_for(size), disk=disk, writer=writer)
        self.twins[segment.number] = Twin(segment, writer)
        self.twins[segment.number].exposed = True
        return segment.number

    @rule(id=ids, worker=st.sampled_from(WORKERS), times=st.integers(1, 3))
    def grant(self, id: bytes, worker: int, times: int = 1) -> None:
        if id not in self.objects:
            with pytest.raises(LookupError):
                self.index.grant(worker, id)
            return
        for _ in range(times):
            found = self.index.grant(worker, id)
            assert found.segment.number == self.objects[id][1]
            self.twins[found.segment.number].grants.append(worker)

    @rule(data=st.data(), reusable=st.booleans())
    def ungrant(self, data: Any, reusable: bool) -> None:
        granted = [(n, w) for n, twin in self.twins.items() for w in set(twin.grants)]
        if granted:
            number, worker = data.draw(st.sampled_from(sorted(granted)))
            twin = self.twins[number]
            count = data.draw(st.integers(1, twin.grants.count(worker)))
            for _ in range(count):
                twin.grants.remove(worker)
            twin.exposed |= not reusable
            self.gone(self.index.ungrant(worker, number, count, reusable=reusable, now=self.now))

    @rule(number=st.integers(0, 60), worker=st.sampled_from(WORKERS))
    def ungrant_what_was_not_granted(self, number: int, worker: int) -> None:
        twin = self.twins.get(number)
        if twin is None or worker not in twin.grants:
            assert self.index.ungrant(worker, number, 1, reusable=False, now=self.now) == []

    @rule(worker=st.sampled_from(WORKERS))
    def worker_gone(self, worker: int) -> None:
        for twin in self.twins.values():
            if worker in twin.grants or twin.writer == worker:
                twin.exposed = True
            twin.grants = [holder for holder in twin.grants if holder != worker]
            if twin.writer == worker:
                twin.writer = None
        self.gone(self.index.worker_gone(worker, self.now))

    @rule(target=readings, id=ids)
    def begin_read(self, id: bytes) -> int:
        if id not in self.objects:
            return -1
        found = self.index.find(id)
        self.index.begin_read(found)
        self.twins[found.segment.number].readers += 1
        return found.segment.number

    @rule(number=consumes(readings))
    def end_read(self, number: int) -> None:
        if number >= 0:
            self.twins[number].readers -= 1
            self.gone(self.index.end_read(self.twins[number].segment, self.now))

    @rule(id=ids)
    def expose(self, id: bytes) -> None:
        if id in self.objects:
            self.index.find(id).segment.exposed = True
            self.twins[self.objects[id][1]].exposed = True

    @rule(id=ids, cache=st.booleans())
    def set_cache(self, id: bytes, cache: bool) -> None:
        self.index.set_cache(id, cache)
        if id in self.objects:
            self.objects[id] = (*self.objects[id][:2], cache)

    @rule(id=ids)
    def pin(self, id: bytes) -> None:
        self.index.pin(id)
        if id in self.objects:
            self.pins[id] = self.pins.get(id, 0) + 1

    @rule(id=ids)
    def unpin(self, id: bytes) -> None:
        self.index.unpin(id)
        if self.pins.get(id):
            self.pins[id] -= 1

    @rule(id=ids)
    def free(self, id: bytes) -> None:
        self.objects.pop(id, None)
        self.pins.pop(id, None)
        self.gone(self.index.free(id, self.now))

    @rule(target=spills)
    def spill(self) -> Any:
        chosen = self.index.victims()
        for spill in chosen:
            assert not self.pins.get(spill.object.id), "a pinned object is spilled"
            assert not self.twins[spill.source.number].grants, "a mapped object is spilled"
            self.twins[spill.source.number].readers += 1
            self.twins[spill.target.number] = Twin(spill.target, PULL)
        self.chosen = chosen
        return multiple(*chosen)

    @rule(spill=consumes(spills), works=st.booleans())
    def spilled(self, spill: Spill, works: bool) -> None:
        self.twins[spill.source.number].readers -= 1
        self.twins[spill.target.number].writer = None
        unlink = self.index.spilled(spill, 7 if works else None, self.now)
        known = self.index.objects.get(spill.object.id)
        if known is spill.object and known.segment is spill.target:
            assert works
            attempt, _, cache = self.objects[known.id]
            self.objects[known.id] = (attempt, spill.target.number, cache)
        self.gone(unlink)

    @rule(
        size=sizes, meanwhile=st.sampled_from(("grant", "pin", "free", "read", "cache")), works=st.booleans()
    )
    def overflow(self, size: int, meanwhile: str, works: bool) -> None:
        """Something happens to an object while it is copied to disk."""
        self.reserve(size, PULL, True)
        self.index._overflow_bytes = LIMIT
        self.spill()
        for spill in self.chosen:
            happens: dict[str, Callable[[bytes], object]] = {
                "grant": partial(self.grant, worker=1),
                "pin": self.pin,
                "free": self.free,
                "read": self.begin_read,
                "cache": partial(self.set_cache, cache=True),
            }
            happens[meanwhile](spill.object.id)
            self.spilled(spill, works)

    @rule(seconds=st.floats(0, 12))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        deadline = self.index.deadline
        unlink = self.index.trim(self.now)
        assert bool(unlink) == (deadline is not None and deadline <= self.now)
        self.gone(unlink)
        assert self.index.deadline is None or self.index.deadline > self.now

    @rule()
    def drop_pool(self) -> None:
        self.gone(self.index.drop_pool())
        assert self.index.pooled_bytes == 0

    # ---------------------------------------------------------------------------------------- what is true

    def is_written(self, number: int) -> bool:
        """Whether a segment is (still) being written; its worker may be dead."""
        return number >= 0 and self.twins[number].writer is not None

    def gone(self, unlink: list[Segment]) -> None:
        """These files go: nobody may be looking."""
        for id in self.index.evicted():
            assert self.objects[id][2], "an object that is no cache was evicted"
            assert not self.pins.get(id), "a pinned cache was evicted"
            del self.objects[id]
            self.pins.pop(id, None)
        alive = {at for _, at, _ in self.objects.values()}
        for segment in unlink:
            twin = self.twins[segment.number]
            assert not twin.unlinked
            assert not twin.seen, "a segment goes that somebody sees"
            assert segment.number not in alive, "the bytes of an object go"
            twin.unlinked = True

    @invariant()
    def limits_are_kept(self) -> None:
        if not hasattr(self, "index"):
            return
        here = [twin.segment for twin in self.twins.values() if not twin.unlinked]
        memory = sum(segment.capacity for segment in here if not segment.disk)
        disk = sum(segment.capacity for segment in here if segment.disk)
        assert (memory, disk) == (self.index.memory_bytes, self.index.disk_bytes)
        assert memory <= LIMIT
        self.index.validate()

    @invariant()
    def it_is_known_who_sees_what(self) -> None:
        for twin in self.twins.values() if hasattr(self, "twins") else ():
            if not twin.unlinked:
                assert (twin.segment.seen, twin.segment.exposed) == (twin.seen, twin.exposed)

    @invariant()
    def objects_are_where_they_were_put(self) -> None:
        if not hasattr(self, "index"):
            return
        found = {id: (o.attempt, o.segment.number, o.cache) for id, o in self.index.objects.items()}
        assert found == self.objects

    @invariant()
    def what_is_not_used_is_pooled_or_gone(self) -> None:
        if not hasattr(self, "index"):
            return
        alive = {at for _, at, _ in self.objects.values()}
        pooled = sum(
            twin.segment.capacity
            for number, twin in self.twins.items()
            if not (twin.unlinked or twin.seen or number in alive)
        )
        assert pooled == self.index.pooled_bytes


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=100, stateful_step_count=40)


def held(index: Index, id: bytes, size: int, *, cache: bool = False, now: float = 0.0) -> Segment:
    segment = index.reserve(size, PULL).segment
    assert index.seal(id, 1, segment.number, size, cache=cache, now=now) == []
    return segment


def test_capacity_wastes_little_and_has_few_steps() -> None:
    for size in (1, PAGE, 100 * 1024 + 1, 1 << 20, (1 << 20) + 1, 10_000_000, 1 << 30, (1 << 30) + 1):
        capacity = capacity_for(size)
        assert size <= capacity <= max(size * 1.0625 + PAGE, PAGE)
        assert capacity_for(capacity) == capacity


def test_freed_segments_serve_objects_of_about_their_size() -> None:
    index = Index(100 << 20)
    number = held(index, b"a", 1 << 20).number
    index.free(b"a", 0.0)
    assert not index.reserve(512 << 10, PULL).warm, "half of a segment would lie idle"
    again = index.reserve((1 << 20) - 5000, PULL)
    assert (again.warm, again.segment.number) == (True, number)


def test_the_pool_goes_before_caches_and_caches_before_the_disk() -> None:
    index = Index(4 << 20)
    for name in (b"1", b"2"):
        held(index, name, 1 << 20, cache=True)
    old = held(index, b"3", 1 << 20)
    held(index, b"4", 1 << 20)
    index.free(b"3", 0.0)
    taken = index.reserve(512 << 10, PULL)
    assert taken.unlink == [old]
    assert not index.evicted()
    taken = index.reserve(1 << 20, PULL)
    assert not taken.segment.disk
    assert index.evicted() == [b"1"], "the least recently used one"
    taken = index.reserve(3 << 20, PULL)
    assert taken.segment.disk
    assert not index.evicted(), "evicting the other one would not have been enough"


def test_an_overflow_spills_what_was_used_least() -> None:
    index = Index(4 << 20)
    for name in (b"1", b"2", b"3", b"4"):
        held(index, name, 1 << 20)
    index.begin_read(index.find(b"1"))
    index.end_read(index.find(b"1").segment, 0.0)
    index.pin(b"2")
    assert index.victims() == []
    assert index.reserve(1 << 20, PULL).segment.disk
    (spill,) = index.victims()
    assert spill.object.id == b"3"
    assert index.victims() == []
    assert index.spilled(spill, 1, 1.0) == []
    assert index.find(b"3").segment.disk
    assert index.reserve(1 << 20, PULL).warm, "its segment is free for the next one"


def test_an_object_that_is_used_during_its_spill_stays() -> None:
    index = Index(2 << 20)
    held(index, b"1", 2 << 20)
    index.reserve(1 << 20, PULL)
    (spill,) = index.victims()
    index.grant(1, b"1")
    assert index.spilled(spill, 1, 1.0) == [spill.target]
    assert index.find(b"1").segment is spill.source


def test_a_new_attempt_takes_the_place_and_the_pins_of_the_old_one() -> None:
    index = Index(8 << 20)
    old = held(index, b"1", 1 << 20)
    index.pin(b"1")
    new = index.reserve(2 << 20, PULL).segment
    index.seal(b"1", 2, new.number, 5, cache=False, now=0.0)
    assert (index.find(b"1", 2).segment, index.find(b"1").idle) == (new, False)
    assert index.pooled_bytes == old.capacity
    late = index.reserve(2 << 20, PULL).segment
    index.seal(b"1", 2, late.number, 5, cache=False, now=0.0)
    assert index.find(b"1").segment is new, "the same attempt again changes nothing"


def test_an_object_larger_than_the_store_is_refused_with_a_remedy() -> None:
    with pytest.raises(StoreFullError, match="store_limit_bytes") as caught:
        Index(1 << 20).reserve((1 << 20) + 1, PULL)
    assert (caught.value.needed_bytes, caught.value.limit_bytes) == ((1 << 20) + 1, 1 << 20)


def test_when_memory_and_disk_are_full_that_is_said() -> None:
    index = Index(1 << 20, spill_limit_bytes=1 << 20)
    held(index, b"1", 1 << 20)
    assert index.reserve(1 << 20, PULL).segment.disk
    with pytest.raises(StoreFullError, match=r"memory .* and on disk"):
        index.reserve(1 << 20, PULL)


def test_a_grant_that_crosses_its_return_keeps_the_segment() -> None:
    """L0: the place was sent again while the news that it is unmapped was on its way."""
    index = Index(4 << 20)
    segment = held(index, b"1", 1 << 20)
    index.grant(1, b"1")
    index.grant(1, b"1")
    index.free(b"1", 0.0)
    assert index.ungrant(1, segment.number, 1, reusable=True, now=0.0) == []
    assert not index.reserve(1 << 20, PULL).warm
    index.ungrant(1, segment.number, 1, reusable=True, now=0.0)
    assert index.reserve(1 << 20, PULL).segment is segment


def test_trimming_is_one_wake_up_for_what_falls_due_together() -> None:
    index = Index(16 << 20, pool_trim_s=10.0)
    for name in (b"1", b"2", b"3"):
        held(index, name, 1 << 20)
    for n, name in enumerate((b"1", b"2", b"3")):
        index.free(name, n * 0.4)
    assert index.deadline == 10.0
    assert len(index.trim(10.0)) == 3
    assert index.deadline is None


def test_unknown_things_are_refused_or_passed_over() -> None:
    index = Index(1 << 20)
    index.pin(b"?")
    index.unpin(b"?")
    assert index.free(b"?", 0.0) == []
    assert index.worker_gone(9, 0.0) == []
    for illegal in (
        lambda: index.seal(b"1", 1, 99, 1, cache=False, now=0.0),
        lambda: index.abandon(99, 0.0, reusable=True),
        lambda: index.find(b"?"),
        lambda: index.grant(1, b"?"),
    ):
        with pytest.raises(LookupError):
            illegal()
    held(index, b"1", 10)
    with pytest.raises(LookupError):
        index.find(b"1", attempt=2)
