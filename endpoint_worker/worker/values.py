"""The bytes that a worker's tasks look at: mapped blobs, and results kept for tasks that follow here.

    entry received ── granted(path) ──► counted
    task starts ───── map(place) ─────► one mapping per path ──► values, read-only views of it
    task ended ────── let_go ─────────► closed, if no value is left that looks at it ──► returned to the agent
                                        └─ else held, and tried again after later tasks

A path may come in many entries; each is a grant that the agent counts, and all grants of a path are returned together
when its mapping is closed (or when no entry is left that would have mapped it). `mmap.close` fails while an array
looks at the mapping: that is how the bytes of an array that a task keeps in a global stay what they are.
"""

from __future__ import annotations

import gc
import mmap
import os
import resource
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final

from gcref.errors import LostReason, ObjectLostError
from gcref.objects.serialize import loads

# After each task so many of the mappings that could not be closed are tried again.
_RETRY_COUNT: Final = 8
# Results up to this size are small; of those, up to twice `RECENT_MAX` are kept.
SMALL_BYTES: Final = 1024
RECENT_MAX: Final = 512
# What larger ones that are kept may take together.
_LARGE_BYTES: Final = 8 * 1024 * 1024
_PIECE_BYTES: Final = 8 * 1024 * 1024


class _Path:
    """A path that the agent told us.

    Attributes:
        mapping: what is mapped; `bytes` where there were too many descriptors; None: not mapped.
        grants: how many entries named it.
        awaited: how many of those are still in the queue.
        held: it is among those to be tried again.
        reusable: no child of this process can see it.
        void: it was an earlier agent's.
    """

    __slots__ = ("awaited", "grants", "held", "mapping", "reusable", "void")

    def __init__(self) -> None:
        self.mapping: mmap.mmap | bytes | None = None
        self.grants = 0
        self.awaited = 0
        self.held = False
        self.reusable = True
        self.void = False


class Mappings:
    """The mapped blobs of a worker. Its main thread uses it.

    Attributes:
        used: paths that the running task may have mapped.
        used_bytes: how much of it was mapped for that task.
        returned: what to tell the agent with the next DONE: `[path, grants, reusable]`.
        wants_collection: something is held that was not there at the last `collect`.
    """

    def __init__(self) -> None:
        self.used: list[str] = []
        self.used_bytes = 0
        self.returned: list[list[Any]] = []
        self.wants_collection = False
        self._paths: dict[str, _Path] = {}
        self._held: deque[str] = deque()
        self._mappings = 0
        self._set_aside = 0

    @property
    def held(self) -> int:
        """How many mappings are waiting for values of ended tasks to go."""
        return len(self._held)

    def granted(self, path: str) -> None:
        """An entry came that may map this path."""
        found = self._paths.get(path)
        if found is None or found.void:
            if found is not None:
                self._put_aside(path, found)
            found = self._paths[path] = _Path()
        found.grants += 1
        found.awaited += 1

    def passed_over(self, path: str) -> None:
        """An entry that might have mapped this path will not be started here."""
        found = self._paths[path]
        found.awaited -= 1
        self._close_or_hold(path, found)

    def started(self, path: str) -> None:
        """An entry that may map this path starts now."""
        self._paths[path].awaited -= 1
        self.used.append(path)

    def map(self, place: list[Any]) -> memoryview:
        """Map a place of the running task, or share the mapping that there is.

        Raises:
            ObjectLostError: it is not what it was when it was written, or not there.
        """
        found = self._paths[place[0]]
        if found.mapping is None:
            mapping = self._open(place[0], place[1])
            if len(place) > 2 and _checksum(mapping) != place[2]:
                self._forget(mapping)
                raise _lost(place[0], LostReason.CORRUPT, "its bytes have changed on disk")
            found.mapping = mapping
        self.used_bytes += place[1]
        return memoryview(found.mapping)

    def let_go(self) -> None:
        """The task has ended and its values are gone: close what nobody looks at."""
        used, self.used = self.used, []
        self.used_bytes = 0
        for path in used:
            found = self._paths.get(path)
            if found is not None:  # else it was there twice
                self._close_or_hold(path, found)

    def retry(self, *, everything: bool = False) -> None:
        """Try again to close what is held: a few of them, or everything."""
        held = self._held
        for _ in range(len(held) if everything else min(len(held), _RETRY_COUNT)):
            path = held.popleft()
            found = self._paths.get(path)
            if found is not None:
                found.held = False
                self._close_or_hold(path, found)

    def collect(self) -> None:
        """Values may hang in reference cycles: collect those, then try all again."""
        gc.collect()
        self.retry(everything=True)
        self.wants_collection = False

    def taint(self) -> None:
        """This process is about to fork, and its child will see what is mapped now, for as long as it lives."""
        for found in self._paths.values():
            if found.mapping is not None:
                found.reusable = False

    def void(self) -> None:
        """The agent that counts our grants is another one, which has counted none. What is mapped stays mapped."""
        self.returned.clear()
        for found in self._paths.values():
            found.grants = 0
            found.void = True

    def _put_aside(self, path: str, found: _Path) -> None:
        """What an earlier agent had at this path may be something else: it goes when nobody looks at it any more."""
        self._set_aside += 1
        aside = f"{path}\0{self._set_aside}"
        self._paths[aside] = found
        found.held = True
        self._held.append(aside)

    def take_returned(self) -> list[list[Any]]:
        """What the agent gets back since the last call."""
        returned, self.returned = self.returned, []
        return returned

    def _open(self, path: str, size: int) -> mmap.mmap | bytes:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _lost(path, LostReason.BYTES_LOST, str(error)) from error
        try:
            if os.fstat(fd).st_size < size:
                raise _lost(path, LostReason.BYTES_LOST, f"the file is shorter than its {size} bytes")
            # Each mapping takes a descriptor; the task needs some too.
            if self._mappings >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
                return _read_all(fd, size)
            mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            self._mappings += 1
            return mapping
        finally:
            os.close(fd)

    def _close_or_hold(self, path: str, found: _Path) -> None:
        if found.awaited:
            return
        try:
            self._forget(found.mapping)
        except BufferError:
            if not found.held:
                found.held = True
                self.wants_collection = True
                self._held.append(path)
            return
        del self._paths[path]
        if found.grants:
            self.returned.append([path, found.grants, found.reusable])

    def _forget(self, mapping: mmap.mmap | bytes | None) -> None:
        if isinstance(mapping, mmap.mmap):
            mapping.close()
            self._mappings -= 1


class Kept:
    """Results of this worker, kept for entries that name them by `[id]`: the last ones, within bounds.

    Small ones are kept without being asked, because their consumer may be on its way already. They live in `recent`,
    which the runtime fills by itself, once for each task; when it is long enough, `turn` makes it the older half.

    Attributes:
        recent: the newest small results.
    """

    def __init__(self) -> None:
        self.recent: dict[bytes, bytes] = {}
        self._older: dict[bytes, bytes] = {}
        self._large: OrderedDict[bytes, bytes] = OrderedDict()
        self._large_bytes = 0

    def turn(self) -> dict[bytes, bytes]:
        """Begin a new `recent`, and forget what was there before the last one."""
        self._older, self.recent = self.recent, {}
        return self.recent

    def add_large(self, id: bytes, blob: bytes) -> None:
        """Keep the blob of a result that is not small."""
        self._large[id] = blob
        self._large_bytes += len(blob)
        while self._large_bytes > _LARGE_BYTES:
            _, old = self._large.popitem(last=False)
            self._large_bytes -= len(old)

    def get(self, id: bytes) -> bytes | None:
        """The blob of a result, if it is (still) kept."""
        return self.recent.get(id) or self._older.get(id) or self._large.get(id)

    def has(self, deps: list[Any]) -> bool:
        """Whether all dependencies of an entry are here that are named by [id] alone."""
        return all(type(dep) is bytes or len(dep) > 1 or self.get(dep[0]) is not None for dep in deps)


def values_of(deps: list[Any], mappings: Mappings, kept: Kept) -> Callable[[int], Any]:
    """What gives the values of an entry's dependencies by their index, each unpickled once; `kept.has` them all."""
    values: dict[int, Any] = {}

    def resolve(index: int) -> Any:
        if index in values:
            return values[index]
        dep = deps[index]
        if type(dep) is bytes:
            value = loads(dep)
        elif len(dep) > 1:
            value = loads(mappings.map(dep))
        else:
            value = loads(kept.get(dep[0]) or b"")
        values[index] = value
        return value

    return resolve


def _read_all(fd: int, size: int) -> bytes:
    pieces = []
    at = 0
    while at < size:
        piece = os.pread(fd, min(size - at, _PIECE_BYTES), at)
        if not piece:
            raise OSError("the file ends before its size")
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


def _checksum(buffer: Any) -> int:
    crc = 0
    with memoryview(buffer) as view:
        for at in range(0, len(view), _PIECE_BYTES):
            crc = zlib.crc32(view[at : at + _PIECE_BYTES], crc)
    return crc


def _lost(path: str, reason: LostReason, why: str) -> ObjectLostError:
    return ObjectLostError(f"an argument is lost: {why} ({path})", reason=reason)
