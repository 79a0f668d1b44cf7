"""The page of a worker: what it did last, in memory that outlives it.

A file mapped by the worker, which writes it, and by its agent, which reads it:

    0      seq of the entry that it started last        u64, written before that entry starts
    8      bytes used in each of two areas              2 × u64
    24     the area that is being written               u64
    4096   area 0, area 1                               results: length u32, the packed result

What a process has handed to a socket is not sent yet when it dies the next moment (`os._exit` in a task, SIGKILL), so
a worker writes every result here too, before it starts the next entry. When one area is full the other is begun; what
falls out is half a megabyte old, and arrived long ago. Thus of the entries that a dead worker held, those with a result
here have ended, the one that it started last was running, and no other one ever started.

Words are written by one machine instruction each; a result counts from the moment when its area's word says so.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

_HEADER_BYTES: Final = 4096
# Two of them hold many thousand small results, or several of the largest that travel inline. Pages that are never
# written take no memory.
_AREA_BYTES: Final = 512 * 1024
_SIZE_BYTES: Final = _HEADER_BYTES + 2 * _AREA_BYTES
_LENGTH_BYTES: Final = 4

_SEQ: Final = 0
_USED: Final = 1
_AREA: Final = 3


def create(path: str) -> None:
    """Make the file of a page; one that is there becomes empty.

    Raises:
        OSError: it cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, _SIZE_BYTES)
    finally:
        os.close(fd)


class Page:
    """A mapping of a page.

    Attributes:
        words: the header, as numbers; `words[0] = seq` is how a worker says what it starts.

    Raises:
        OSError: there is no such file.
    """

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._mapping = mmap.mmap(fd, _SIZE_BYTES)
        finally:
            os.close(fd)
        self.words = memoryview(self._mapping)[:_HEADER_BYTES].cast("Q")
        self._area = self.words[_AREA] & 1
        self._at = _HEADER_BYTES + self._area * _AREA_BYTES + self.words[_USED + self._area]
        self._end = _HEADER_BYTES + (self._area + 1) * _AREA_BYTES

    @property
    def progress(self) -> int:
        """The seq of the entry that was started last; 0: none."""
        return self.words[_SEQ]

    def add(self, result: bytes) -> None:
        """Note a packed result. One that is larger than an area is passed over."""
        at = self._at
        end = at + _LENGTH_BYTES + len(result)
        if end > self._end:
            if not self._turn(len(result)):
                return
            at = self._at
            end = at + _LENGTH_BYTES + len(result)
        self._mapping[at:end] = len(result).to_bytes(_LENGTH_BYTES, "little") + result
        self._at = end
        area = self._area
        self.words[_USED + area] = end - _HEADER_BYTES - area * _AREA_BYTES

    def _turn(self, size: int) -> bool:
        if size + _LENGTH_BYTES > _AREA_BYTES:
            return False
        self._area = area = 1 - self._area
        self._at = _HEADER_BYTES + area * _AREA_BYTES
        self._end = self._at + _AREA_BYTES
        self.words[_USED + area] = 0
        self.words[_AREA] = area
        return True

    def results(self) -> list[bytes]:
        """The packed results that are here, in order. For the agent, once the worker is dead."""
        found: list[bytes] = []
        current = self.words[_AREA] & 1
        for area in (1 - current, current):
            start = _HEADER_BYTES + area * _AREA_BYTES
            data = self._mapping[start : start + min(self.words[_USED + area], _AREA_BYTES)]
            at = 0
            # A worker's memory is its tasks' to spoil: nothing here is believed without looking.
            while at + _LENGTH_BYTES <= len(data):
                end = at + _LENGTH_BYTES + int.from_bytes(data[at : at + _LENGTH_BYTES], "little")
                if end > len(data):
                    break
                found.append(data[at + _LENGTH_BYTES : end])
                at = end
        return found

    def close(self) -> None:
        """Unmap it."""
        self.words.release()
        self._mapping.close()
