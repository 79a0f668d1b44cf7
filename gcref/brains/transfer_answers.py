"""What an answer is worth: whether it is what was asked for, and what it tells of the questions before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from gcref.wire.messages import MODE_INTO, MODE_PATH

if TYPE_CHECKING:
    from gcref.brains.transfer_events import Buffer, Chunk
    from gcref.brains.transfer_state import Request


def checksum(data: Buffer) -> int:
    """The checksum of a range, as CHUNK carries it: XXH3, 64 bits."""
    return xxh3_64_intdigest(data)


def mark_passed_over(request: Request) -> list[Request]:
    """The open questions that should have been answered before this one."""
    found: list[Request] = []
    for earlier in request.link.requests.values():
        if earlier is request:
            break
        earlier.overtaken = True
        found.append(earlier)
    return found


def find_wrong(event: Chunk, request: Request) -> str | None:
    """What is wrong with this answer, or None."""
    pull = request.pull
    if (event.id, event.attempt) != (pull.id, pull.attempt):
        return "the answer is about another object or attempt"
    if (event.offset, event.length) != (request.offset, request.length):
        return f"the answer is range {event.offset}+{event.length}"
    if event.error is not None:
        return None
    if pull.way == MODE_PATH:
        return None if event.path else "the answer has no path"
    if pull.way == MODE_INTO:
        return None
    if len(event.data) != request.length:
        return f"the answer has {len(event.data)} bytes"
    if (event.checksum or request.link.rank) and checksum(event.data) != event.checksum:
        return "the checksum does not fit"
    return None
