"""Copying an object to disk. Its file has its last name only when it is whole."""

from __future__ import annotations

import errno
import os

from endpoint_worker.store import names, segments
from endpoint_worker.store.model import PULL, Spill


def copy(spill: Spill, folders: segments.Folders) -> int:
    """Copy an object from its segment in memory to the one on disk.

    Returns:
        The crc32 of its blob.

    Raises:
        OSError: the disk is full or broken; nothing is left there.
    """
    found, source, target = spill
    if not folders.has_room(True, found.size):
        raise OSError(errno.ENOSPC, "no room to spill an object", folders.disk)
    part = f"{folders.disk}/{names.stem(target.number, target.use)}{names.PART}"
    crc = segments.copy_to(folders.path(source), part, found.size)
    name = names.whole(target.number, target.use, PULL, found.id, found.attempt, found.size, crc)
    try:
        os.rename(part, f"{folders.disk}/{name}")
    except OSError:
        segments.unlink(part)
        raise
    target.name = name
    return crc
