"""Segments and objects, as the store's accounts know them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

# Capacities are in steps of 1/16 of the power of two below: at most 6 % is lost to rounding.
_STEP_SHIFT: Final = 4
_PAGE_BYTES: Final = 4096

# The writer of a segment that a pull fills; workers have numbers from 0 on.
PULL: Final = -1


class Segment:
    """One file.

    Attributes:
        number: unique in all lives of a store.
        use: how many times it was taken out of the pool.
        name: what its file is called now; empty: it never had one. The shell's; see `names`.
        capacity: bytes that it counts for.
        disk: it lies on disk, not in memory.
        writer: the worker that fills it, or `PULL`; None once it is sealed.
        owner: id of the object that lies in it; None while it is written, dying or pooled.
        grants: by worker, how many times it was told that it may map it and has not returned that.
        readers: sends and copies of it under way in this process.
        exposed: somebody whom we cannot ask may see it.
        crc: of the bytes of a spilled object; None: not known, or not needed.
        pooled_at: when it was pooled.
    """

    __slots__ = (
        "capacity",
        "crc",
        "disk",
        "exposed",
        "grants",
        "name",
        "number",
        "owner",
        "pooled_at",
        "readers",
        "use",
        "writer",
    )

    def __init__(self, number: int, capacity: int, disk: bool, writer: int | None) -> None:
        self.number = number
        self.use = 0
        self.name = ""
        self.capacity = capacity
        self.disk = disk
        self.writer = writer
        self.owner: bytes | None = None
        self.grants: dict[int, int] = {}
        self.readers = 0
        self.exposed = False
        self.crc: int | None = None
        self.pooled_at = 0.0

    @property
    def seen(self) -> bool:
        """Somebody writes or may see its bytes, now."""
        return self.writer is not None or bool(self.grants) or self.readers > 0


class Object:
    """A sealed object.

    Attributes:
        lost: its bytes turned out to be gone or damaged, and that was said.
    """

    __slots__ = ("attempt", "cache", "id", "lost", "pins", "segment", "size", "spilling")

    def __init__(self, id: bytes, attempt: int, size: int, segment: Segment, cache: bool) -> None:
        self.id = id
        self.attempt = attempt
        self.size = size
        self.segment = segment
        self.cache = cache
        self.pins = 0
        self.spilling = False
        self.lost = False

    @property
    def idle(self) -> bool:
        """It may be evicted or spilled."""
        return not (self.pins or self.spilling or self.segment.grants or self.segment.readers)


class Idle:
    """Objects that may go, least recently used first, and what they take."""

    __slots__ = ("bytes", "objects")

    def __init__(self) -> None:
        self.objects: OrderedDict[bytes, Object] = OrderedDict()
        self.bytes = 0

    def add(self, found: Object) -> None:
        """Put it at the recently used end."""
        self.objects[found.id] = found
        self.bytes += found.segment.capacity

    def remove(self, found: Object) -> None:
        """Take it out, if it is here."""
        if self.objects.pop(found.id, None) is not None:
            self.bytes -= found.segment.capacity

    def oldest(self) -> Object:
        """The one that goes first; there has to be one."""
        return next(iter(self.objects.values()))


class Reserved(NamedTuple):
    """Room for an object: the segment, whether its pages are warm, and what had to go for it."""

    segment: Segment
    warm: bool
    unlink: list[Segment]


class Spill(NamedTuple):
    """Copy this object from its segment to the other one, then tell `spilled`."""

    object: Object
    source: Segment
    target: Segment


def capacity_for(size: int) -> int:
    """The capacity of a segment for an object of this size: the next step of its size class, in bytes."""
    size = max(size, 1)
    step = step_at(size)
    return -(-size // step) * step


def step_at(size: int) -> int:
    """How far apart capacities are at about this size, in bytes."""
    return max(_PAGE_BYTES, 1 << max(size.bit_length() - 1 - _STEP_SHIFT, 0))
