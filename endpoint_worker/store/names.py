"""The names of the store's files: each says what is in it, so that a later life of the store needs no list of them.

    <number>-<use>.w.<worker>.<capacity>                being written by a worker
    <number>-<use>.p                                    being written by this process
    <number>-<use>.o.<id>.<attempt>.<size>.<worker>[.<crc>]     a whole object; who wrote it; its checksum if it was spilled

Numbers are hexadecimal; a worker is "p" where this process wrote the object itself.

A name of the third kind is given when all bytes are there, and taken away before the first byte changes: whatever else a
file with such a name is (freed, pooled, a copy left over by a spill), its bytes are those of that attempt of that object.
The part before the first dot, the *stem*, never means two objects, so whoever knows a file by an earlier name can still
be understood.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from endpoint_worker.store.model import PULL

PART: Final = ".part"  # of a file that a spill has not finished
_OURS: Final = "p"


class Writing(NamedTuple):
    """A file that somebody is (or was) writing.

    Attributes:
        number, use: of its segment.
        writer: the worker, or `PULL`.
        capacity: what was promised to the writer, in bytes; 0 where nothing was.
    """

    number: int
    use: int
    writer: int
    capacity: int


class Whole(NamedTuple):
    """A file that holds an object.

    Attributes:
        number, use: of its segment.
        writer: the worker that wrote it, or `PULL`.
        id, attempt, size: of the object.
        crc: crc32 of its bytes; None: not known.
    """

    number: int
    use: int
    writer: int
    id: bytes
    attempt: int
    size: int
    crc: int | None


def stem(number: int, use: int) -> str:
    """The part of a name that stays."""
    return f"{number:x}-{use:x}"


def stem_of(name: str) -> str:
    """The part of this name that stays."""
    return name.partition(".")[0]


def writing(number: int, use: int, writer: int, capacity: int) -> str:
    """The name of a file while it is being written."""
    return f"{number:x}-{use:x}.p" if writer == PULL else f"{number:x}-{use:x}.w.{writer:x}.{capacity:x}"


def whole(number: int, use: int, writer: int, id: bytes, attempt: int, size: int, crc: int | None) -> str:
    """The name of a file that holds an object."""
    by = _OURS if writer == PULL else f"{writer:x}"
    name = f"{number:x}-{use:x}.o.{id.hex()}.{attempt:x}.{size:x}.{by}"
    return name if crc is None else f"{name}.{crc:x}"


def parse(name: str) -> Writing | Whole | None:
    """What a name says; None: it is not one of ours."""
    head, *fields = name.split(".")
    kind = fields.pop(0) if fields else ""
    number, _, use = head.partition("-")
    try:
        at = int(number, 16), int(use, 16)
        if kind == "p" and not fields:
            return Writing(*at, PULL, 0)
        if kind == "w" and len(fields) == 2:
            return Writing(*at, int(fields[0], 16), int(fields[1], 16))
        if kind == "o" and len(fields) in (4, 5):
            id = bytes.fromhex(fields[0])
            crc = int(fields[4], 16) if len(fields) == 5 else None
            return Whole(*at, _writer(fields[3]), id, int(fields[1], 16), int(fields[2], 16), crc)
    except ValueError:
        pass
    return None


def _writer(text: str) -> int:
    return PULL if text == _OURS else int(text, 16)
