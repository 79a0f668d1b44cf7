"""The journal: an append-only, checksummed log of the events that the agent's brains have taken.

An agent appends what came in *before* it acts on it and acknowledges it, so that after its death the same brains, fed with
the same events, stand where they stood. Entries are bytes that the caller packed; the journal knows only their kind.

File layout, little endian:

    header   b"GCJ" version(u8) created(f64, unix seconds)
    entry    length(u32) kind(u8) crc32(u32, of kind and body) body

`append` collects; `commit` writes everything collected with one `writev` (the kernel has it then: it survives the death of
the process) and, with `fsync=True`, waits for the disk (it survives power loss). A file that was cut in the middle of a
write ends at its last whole entry; `read` says how many bytes were left over.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from zlib import crc32

from gcref.errors import ConfigError

MAGIC: Final = b"GCJ"
VERSION: Final = 1
_HEADER: Final = struct.Struct("<3sBd")
_ENTRY: Final = struct.Struct("<IBI")
_IOV_MAX: Final = 512  # buffers of one writev; the platform's limit is 1024

PACKET: Final = 1  # party id (16 bytes) and the packet as it came
RESULTS: Final = 2  # a worker's DONE, packed
STARTED: Final = 3  # an agent's life began: its epoch


class Journal:
    """A journal open for appending. One thread uses it.

    Args:
        path: the file; made when missing, continued when it is ours.
        fsync: wait for the disk at every `commit`.

    Raises:
        ConfigError: the file is not a journal of this version; it is left as it is.
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self.path = path
        self._fsync = fsync
        self._pending: list[bytes] = []
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._fd).st_size
        if size == 0:
            os.write(self._fd, _HEADER.pack(MAGIC, VERSION, time.time()))
        else:
            _check_header(os.pread(self._fd, _HEADER.size, 0), path)
        self.size_bytes = max(size, _HEADER.size)

    def append(self, kind: int, *parts: bytes) -> None:
        """Add one entry, whose body is the parts in order; it is on its way with the next `commit`."""
        check = crc32(bytes((kind,)))
        length = 0
        for part in parts:
            check = crc32(part, check)
            length += len(part)
        self._pending.append(_ENTRY.pack(length, kind, check))
        self._pending.extend(parts)

    def commit(self) -> None:
        """Write what was appended.

        Raises:
            OSError: the disk is full or gone; what was appended stays pending.
        """
        pending = self._pending
        if not pending:
            return
        while pending:
            some = pending[:_IOV_MAX]
            written = os.writev(self._fd, some)
            self.size_bytes += written
            whole = 0
            for part in some:
                if written < len(part):
                    break
                written -= len(part)
                whole += 1
            del pending[:whole]
            if written:
                pending[0] = pending[0][written:]
        if self._fsync:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Write what is pending and close the file."""
        if self._fd >= 0:
            try:
                self.commit()
            finally:
                os.close(self._fd)
                self._fd = -1


def _check_header(header: bytes, path: Path) -> None:
    if len(header) < _HEADER.size or header[:3] != MAGIC:
        raise ConfigError(
            f"{path} is not a journal of this program; move it away and start again", file=str(path)
        )
    if header[3] != VERSION:
        text = f"{path} is a journal of version {header[3]}, not {VERSION}; move it away and start again"
        raise ConfigError(text, file=str(path))


def read(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole entries of a journal, in order, as (kind, body); stops at the first that is cut or does not check.

    Raises:
        ConfigError: the file is not a journal of this version.
        FileNotFoundError: there is none.
    """
    with open(path, "rb") as file:
        _check_header(file.read(_HEADER.size), path)
        while len(head := file.read(_ENTRY.size)) == _ENTRY.size:
            length, kind, check = _ENTRY.unpack(head)
            body = file.read(length)
            if len(body) < length or crc32(body, crc32(bytes((kind,)))) != check:
                return
            yield kind, body
