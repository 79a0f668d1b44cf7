"""The blob: the one layout of an object's bytes, in memory, in shared memory, on disk and on the wire.

    ┌────────────┬──────────────┬──────────────────────┬────────┬─────┬──────────┬─────┬──────────┐
    │ header 16  │ references   │ table, 16 × (1 + n)  │ stream │ pad │ buffer 0 │ pad │ buffer … │
    │            │ 48 × n_refs  │ only if n_buffers    │        │     │          │     │          │
    └────────────┴──────────────┴──────────────────────┴────────┴─────┴──────────┴─────┴──────────┘
      header      little endian: magic "GCB", version, flags, 3 zero bytes, n_refs u32, n_buffers u32
      reference   id 16, home 16, token 16: what the value refers to, readable without unpickling anything
      table       (offset u64, length u64) of the stream, then of each buffer, from the start of the blob
      stream      pickle, protocol 5; without a table it is everything after the references
      buffers     the stream's out-of-band buffers, each aligned to 64 bytes

Rules: every number is checked against the bytes at hand before it is used, so a foreign blob can be refused
but never crashes its reader. Encoding copies nothing: an `Encoded` is a list of parts that still belong to
the value, until `join`, `write_into` or `pwrite_all` makes the one copy. Nothing here unpickles.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from gcref.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gcref.objects.ref import ObjectRef

VERSION: Final = 1
HEADER_BYTES: Final = 16
REF_BYTES: Final = 48
# A cache line, and the widest vector registers: arrays of a mapped blob are as aligned as arrays that numpy
# makes.
ALIGN_BYTES: Final = 64

_HEADER: Final = Struct("<3sBB3xII")
_NO_REFS: Final = bytes(4)
_ENTRY: Final = Struct("<QQ")
_PREFIX: Final = b"GCB" + bytes((VERSION, 0, 0, 0, 0))
_PADDING: Final = tuple(bytes(size) for size in range(ALIGN_BYTES))

# The kernel takes at most this many pieces in one call (IOV_MAX).
_PIECES_PER_CALL: Final = 1024

PLAIN_HEADER: Final = _HEADER.pack(b"GCB", VERSION, 0, 0, 0)


class Encoded(NamedTuple):
    """A value as bytes that are not joined yet.

    The parts may be the value's own memory: use them up before the owner of the value can change it.

    Attributes:
        parts: pieces of one byte per item, in order.
        size: bytes of the blob.
        refs: 48 bytes for each reference in the value, as they stand in the blob.
        named: these references; while they live, so does what they refer to.
    """

    parts: Sequence[bytes | bytearray | memoryview]
    size: int
    refs: bytes
    named: Sequence[ObjectRef] = ()


class Layout(NamedTuple):
    """Where things are in a blob, checked.

    Attributes:
        refs: (start, end) of the references.
        stream: (start, end) of the pickle stream.
        buffers: (start, end) of each out-of-band buffer.
    """

    refs: tuple[int, int]
    stream: tuple[int, int]
    buffers: list[tuple[int, int]]


def encode(
    stream: Sequence[bytes | bytearray | memoryview],
    buffers: Sequence[memoryview] = (),
    named: Sequence[ObjectRef] = (),
) -> Encoded:
    """Lay out a blob.

    Args:
        stream: the pickle stream, in pieces.
        buffers: its out-of-band buffers, of one byte per item.
        named: the references in the value.
    """
    n_refs = len(named)
    refs = b"".join([ref.pack() for ref in named])
    header = _HEADER.pack(b"GCB", VERSION, 0, n_refs, len(buffers))
    stream_size = sum(map(len, stream))
    if not buffers:
        return Encoded([header, refs, *stream], HEADER_BYTES + len(refs) + stream_size, refs, named)
    at = HEADER_BYTES + len(refs) + _ENTRY.size * (1 + len(buffers))
    table = [_ENTRY.pack(at, stream_size)]
    at += stream_size
    body: list[bytes | bytearray | memoryview] = []
    for buffer in buffers:
        padding = _PADDING[-at % ALIGN_BYTES]
        at += len(padding)
        table.append(_ENTRY.pack(at, len(buffer)))
        at += len(buffer)
        body.append(padding)
        body.append(buffer)
    return Encoded([header, refs, b"".join(table), *stream, *body], at, refs, named)


def join(encoded: Encoded) -> bytes:
    """Give the blob as one `bytes`."""
    parts = encoded.parts
    if len(parts) == 1 and type(parts[0]) is bytes:
        return parts[0]
    return b"".join(parts)


def write_into(encoded: Encoded, target: memoryview) -> None:
    """Copy the blob to the beginning of a writable view of bytes.

    Raises:
        ValueError: the target is shorter than the blob.
    """
    if len(target) < encoded.size:
        raise ValueError(f"a blob of {encoded.size} bytes does not fit into {len(target)} bytes")
    at = 0
    for part in encoded.parts:
        end = at + len(part)
        target[at:end] = part
        at = end


def pwrite_all(encoded: Encoded, fd: int) -> None:
    """Write the blob to the beginning of a file. The file's position stays where it is; the GIL is free meanwhile.

    Raises:
        OSError: as `os.pwritev` does, with `ENOSPC` where memory or disk is full.
    """
    pending = [memoryview(part) for part in encoded.parts if len(part)]
    pending.reverse()
    at = 0
    while pending:
        batch = pending[: -_PIECES_PER_CALL - 1 : -1]
        written = os.pwritev(fd, batch, at)
        at += written
        # The kernel may stop anywhere: in the middle of a piece, and always after 2 GiB.
        while pending and written >= len(pending[-1]):
            written -= len(pending.pop())
        if written:
            pending[-1] = pending[-1][written:]


def layout(buffer: bytes | bytearray | memoryview) -> Layout:
    """Read where things are in a blob.

    Raises:
        ProtocolError: this is no blob, one of another version, or a damaged one.
    """
    size = len(buffer)
    n_refs, n_buffers = _read_header(buffer)
    refs_end = HEADER_BYTES + REF_BYTES * n_refs
    if not n_buffers:
        if refs_end > size:
            raise _damaged("its references are cut off", size)
        return Layout((HEADER_BYTES, refs_end), (refs_end, size), [])
    end = refs_end + _ENTRY.size * (1 + n_buffers)
    if end > size:
        raise _damaged("its table is cut off", size)
    spans: list[tuple[int, int]] = []
    for offset, length in _ENTRY.iter_unpack(memoryview(buffer)[refs_end:end]):
        if offset < end or offset + length > size:
            raise _damaged(f"its part {len(spans)} is out of bounds", size)
        if spans and offset % ALIGN_BYTES:
            raise _damaged(f"its part {len(spans)} is not aligned", size)
        end = offset + length
        spans.append((offset, end))
    return Layout((HEADER_BYTES, refs_end), spans[0], spans[1:])


def count_refs(header: bytes | bytearray | memoryview) -> int:
    """Tell from its first `HEADER_BYTES` how many references a blob has.

    Raises:
        ProtocolError: this is no blob, one of another version, or a damaged one.
    """
    return _read_header(header)[0]


def refs_of(buffer: bytes | bytearray | memoryview) -> bytes:
    """Give the references in a blob: 48 bytes for each.

    Raises:
        ProtocolError: this is no blob, one of another version, or a damaged one.
    """
    n_refs, _ = _read_header(buffer)
    end = HEADER_BYTES + REF_BYTES * n_refs
    if end > len(buffer):
        raise _damaged("its references are cut off", len(buffer))
    return bytes(buffer[HEADER_BYTES:end])


def has_refs(buffer: bytes | bytearray | memoryview) -> bool:
    """Whether there are references in a blob, as its header says; nothing else is looked at."""
    return buffer[8:12] != _NO_REFS


def _read_header(buffer: bytes | bytearray | memoryview) -> tuple[int, int]:
    if len(buffer) < HEADER_BYTES:
        raise _damaged("its header is cut off", len(buffer))
    prefix = bytes(buffer[:8])
    if prefix != _PREFIX:
        if prefix[:3] != b"GCB":
            raise _damaged("it does not begin with GCB", len(buffer))
        if prefix[3] != VERSION:
            raise ProtocolError(
                f"a blob has layout version {prefix[3]}, this gcref reads version {VERSION}; "
                "use the same gcref on both sides"
            )
        raise _damaged("its flags are unknown", len(buffer))
    _, _, _, n_refs, n_buffers = _HEADER.unpack_from(buffer)
    return n_refs, n_buffers


def _damaged(what: str, size: int) -> ProtocolError:
    return ProtocolError(f"not a blob, or a damaged one ({size} bytes): {what}")
