"""What the transfer brain is told, and what it orders: the words between it and its shell."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, TypeAlias


class PullReason(enum.StrEnum):
    """Why a pull failed."""

    UNREACHABLE = "unreachable"  # no link to the source for too long
    TIMEOUT = "timeout"  # links, but no answers
    NOT_FOUND = "not_found"  # the source has no such object, or another attempt of it
    REFUSED = "refused"  # the source says that we may not have it, or refused our key
    CORRUPT = "corrupt"  # the bytes were wrong again and again
    SOURCE = "source"  # the source failed to read it
    STORE = "store"  # we failed to write it


Buffer: TypeAlias = "bytes | bytearray | memoryview"

# ------------------------------------------------------------------------------------------------------ events


class Pull(NamedTuple):
    """Get this object. The same pull again is no news; one of another attempt or source replaces the first.

    Attributes:
        id: the object.
        attempt: the attempt that made it; other attempts' bytes are refused.
        size: bytes of the blob.
        source: the party that has it.
        token: read token, or None.
        mode: what to do over a link within this machine: MODE_PATH, MODE_INTO, or MODE_BYTES as over any other.
        key: owner key that the source must have proven; None: any link that says it is the source.
        now: monotonic seconds.
    """

    id: bytes
    attempt: int
    size: int
    source: bytes
    token: bytes | None
    mode: int
    key: bytes | None
    now: float


class Cancel(NamedTuple):
    """Nobody wants it any more. Nothing is reported."""

    id: bytes
    now: float


class LinkUp(NamedTuple):
    """A link answers. `link` is the shell's number for it; `key` the other side's proven owner key."""

    link: int
    party: bytes
    carrier: str
    key: bytes | None
    now: float


class LinkDown(NamedTuple):
    """A link is gone; what was asked over it will not be answered."""

    link: int
    reason: str
    now: float


class Trouble(NamedTuple):
    """A link to this party could not be made. It is told if a pull fails for want of one."""

    party: bytes
    message: str
    refused: bool


class Unsent(NamedTuple):
    """A `Fetch` did not leave: too much is waiting to go out over that link. It will not be answered."""

    link: int
    request: int
    now: float


class Chunk(NamedTuple):
    """An answer: the fields of CHUNK, shape-checked, with the bytes that came along."""

    link: int
    request: int
    id: bytes
    attempt: int
    offset: int
    length: int
    checksum: int
    path: str | None
    error: list[Any] | None
    data: Buffer
    now: float


class WayFailed(NamedTuple):
    """PATH or INTO does not work here for this object: take bytes."""

    id: bytes
    message: str
    now: float


class Sealed(NamedTuple):
    """`Seal` or `Adopt` is done: the object is here."""

    id: bytes
    now: float


class SinkFailed(NamedTuple):
    """`Begin`, `Write` or `Seal` failed here."""

    id: bytes
    message: str
    now: float


class Tick(NamedTuple):
    """Time has passed; due at `Transfers.deadline`."""

    now: float


Event: TypeAlias = (
    Pull | Cancel | LinkUp | LinkDown | Trouble | Unsent | Chunk | WayFailed | Sealed | SinkFailed | Tick
)

# ------------------------------------------------------------------------------------------------ instructions


class Begin(NamedTuple):
    """Make room for the object. Given before the first `Fetch` of bytes or INTO."""

    id: bytes
    attempt: int
    size: int


class Fetch(NamedTuple):
    """Ask over `link`. For MODE_INTO the shell adds the path of what `Begin` made."""

    link: int
    request: int
    id: bytes
    attempt: int
    offset: int
    length: int
    mode: int
    token: bytes | None


class Write(NamedTuple):
    """Put these checked bytes in their place."""

    id: bytes
    offset: int
    data: Buffer


class Seal(NamedTuple):
    """All bytes are here: make it visible, then say `Sealed`."""

    id: bytes


class Adopt(NamedTuple):
    """The object is in this file of the source: link or map it, then say `Sealed` (or `WayFailed`)."""

    id: bytes
    attempt: int
    path: str
    size: int


class Abort(NamedTuple):
    """Drop what `Begin` made."""

    id: bytes


class Done(NamedTuple):
    """The pull is over and the object here. `carriers` says how many bytes came by which."""

    id: bytes
    attempt: int
    source: bytes
    size: int
    carriers: dict[str, int]


class Failed(NamedTuple):
    """The pull is over without the object."""

    id: bytes
    attempt: int
    source: bytes
    reason: PullReason
    message: str


Instruction: TypeAlias = Begin | Fetch | Write | Seal | Adopt | Abort | Done | Failed
