"""The page of a worker: what it did last, in memory that outlives it.

A file mapped by the worker, which writes it, and by its agent, which reads it; also by an agent that comes after:

    0      seq of the entry that it started last        u64, written before that entry starts
    8      bytes used in each of two areas              2 × u64
    24     the area that is being written               u64
    32     1 while the running task has lent its slot   u64
    40     pid                                          u64
    48     how it ended: exit code + 1, or 0; signal    2 × u64, written by the zygote after its death
    64     the start: seq, attempt, id                  u64, u64, 16 bytes
    96     seq of the entry whose function has returned, while the agent is handed what it submitted   u64
    256    what it was started with                     length u32, packed
    4096   area 0, area 1                               results: length u32, the packed result

What a process has handed to a socket is not sent yet when it dies the next moment (`os._exit` in a task, SIGKILL), so
a worker writes every result here too, before it starts the next entry. When one area is full the other is begun; what
falls out is half a megabyte old, and arrived long ago. Thus of the entries that a dead worker held, those with a result
here have ended, the one that it started last was running, and no other one ever started.

Words are written by one machine instruction each; a result counts from the moment when its area's word says so. The
start is written before the seq at the head, and counts when the two name the same entry. While they do not, the entry at
the head has ended, because only one that has is followed by another: there is nothing to tell of it, and one slot is enough.
An entry that must not start without asking is taken from the slot before the question goes out, so that what the slot names
is held by nobody else.
"""

from __future__ import annotations

import mmap
import os
import struct
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
BLOCKED: Final = 4
_PID: Final = 5
_END_AT: Final = 48
START_AT: Final = 64
RETURNED: Final = 12
_NOTE_AT: Final = 256
_NOTE_MAX_BYTES: Final = _HEADER_BYTES - _NOTE_AT - _LENGTH_BYTES

_END: Final = struct.Struct("=QQ")
START: Final = struct.Struct("=QQ16s")

# A reader looks again so often when the page changes under its eyes: a worker changes it once per task.
_LOOKS: Final = 100


def create(path: str, note: bytes = b"") -> None:
    """Make the file of a page; one that is there becomes empty.

    Args:
        path: where.
        note: kept in it, for whoever reads it when everybody else is dead.

    Raises:
        OSError: it cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, _SIZE_BYTES)
        if note:
            assert len(note) <= _NOTE_MAX_BYTES
            os.pwrite(fd, len(note).to_bytes(_LENGTH_BYTES, "little") + note, _NOTE_AT)
    finally:
        os.close(fd)


def note_end(path: str, exit_code: int | None, signal: int | None) -> None:
    """Write into a dead worker's page how it ended; for the one who reaped it."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return  # nobody waits for it any more
    try:
        os.pwrite(fd, _END.pack(0 if exit_code is None else exit_code + 1, signal or 0), _END_AT)
    finally:
        os.close(fd)


class Page:
    """A mapping of a page.

    Attributes:
        words: the header, as numbers; `words[0] = seq` is how a worker says what it starts.
        mapping: all of it; `START.pack_into(mapping, START_AT, seq, attempt, id)` comes before that.

    Raises:
        OSError: there is no such file, or it is no page.
    """

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != _SIZE_BYTES:
                raise OSError(f"{path} is no page")
            self.mapping = mmap.mmap(fd, _SIZE_BYTES)
        finally:
            os.close(fd)
        self.words = memoryview(self.mapping)[:_HEADER_BYTES].cast("Q")
        self._area = self.words[_AREA] & 1
        self._at = _HEADER_BYTES + self._area * _AREA_BYTES + self.words[_USED + self._area]
        self._end = _HEADER_BYTES + (self._area + 1) * _AREA_BYTES

    # --------------------------------------------------------------------------------------- the worker writes

    def sign(self) -> None:
        """This process is the worker."""
        self.words[_PID] = os.getpid()

    def start(self, seq: int, attempt: int, id: bytes) -> None:
        """Note what starts now. The runtime has this written out."""
        START.pack_into(self.mapping, START_AT, seq, attempt, id)
        self.words[_SEQ] = seq

    def unstart(self) -> None:
        """What was noted last does not start before the agent has been asked."""
        START.pack_into(self.mapping, START_AT, 0, 0, b"")

    def add(self, result: bytes) -> None:
        """Note a packed result. One that is larger than an area is passed over."""
        at = self._at
        end = at + _LENGTH_BYTES + len(result)
        if end > self._end:
            if not self._turn(len(result)):
                return
            at = self._at
            end = at + _LENGTH_BYTES + len(result)
        self.mapping[at:end] = len(result).to_bytes(_LENGTH_BYTES, "little") + result
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

    # ------------------------------------------------------------------------------------------- others read

    @property
    def progress(self) -> int:
        """The seq of the entry that was started last; 0: none."""
        return self.words[_SEQ]

    @property
    def pid(self) -> int:
        """The worker's process; 0: it has not come that far."""
        return self.words[_PID]

    @property
    def blocked(self) -> bool:
        """Whether the running task has lent its slot."""
        return self.words[BLOCKED] == 1

    def has_returned(self, seq: int) -> bool:
        """Whether the function of an entry that was started has returned. Its result may not be here yet."""
        return self.words[_SEQ] > seq or self.words[RETURNED] == seq

    def started(self) -> tuple[int, int, bytes] | None:
        """What was started last: seq, attempt, id; None: nothing, or that has ended and the next one is just starting."""
        for _ in range(_LOOKS):
            seq = self.words[_SEQ]
            noted, attempt, id = START.unpack_from(self.mapping, START_AT)
            if seq and noted == seq == self.words[_SEQ] == START.unpack_from(self.mapping, START_AT)[0]:
                return seq, attempt, id
        return None

    def begun(self) -> int:
        """Of a dead worker: the seq of the last entry that really began; one that had to ask first did not."""
        noted = self.started()
        return noted[0] if noted is not None else max(0, self.words[_SEQ] - 1)

    def end(self) -> tuple[int | None, int | None] | None:
        """How the worker ended: exit code or None, signal or None; None: nobody has seen its end."""
        code, signal = _END.unpack_from(self.mapping, _END_AT)
        if not code and not signal:
            return None
        return (code - 1 if code else None), signal or None

    def note(self) -> bytes:
        """What `create` was given."""
        size = int.from_bytes(self.mapping[_NOTE_AT : _NOTE_AT + _LENGTH_BYTES], "little")
        start = _NOTE_AT + _LENGTH_BYTES
        return self.mapping[start : start + min(size, _NOTE_MAX_BYTES)]

    def results(self) -> list[bytes]:
        """The packed results that are here, in order. The worker may be dead, or write meanwhile."""
        found: list[bytes] = []
        for _ in range(_LOOKS):
            before = bytes(self.words[_USED : _AREA + 1])
            found = self._results()
            if bytes(self.words[_USED : _AREA + 1]) == before:
                break
        return found

    def _results(self) -> list[bytes]:
        found: list[bytes] = []
        current = self.words[_AREA] & 1
        for area in (1 - current, current):
            start = _HEADER_BYTES + area * _AREA_BYTES
            data = self.mapping[start : start + min(self.words[_USED + area], _AREA_BYTES)]
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
        self.mapping.close()
