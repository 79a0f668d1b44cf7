"""What the store says when there is no room, or when bytes are lost."""

from __future__ import annotations

import errno

from gcref import ids
from gcref.errors import LostReason, ObjectLostError, StoreFullError


class Troubles:
    """Makes errors that name this store.

    Args:
        disk: where its segments on disk lie.
        limit_bytes: what all segments in memory may take.
    """

    def __init__(self, disk: str, limit_bytes: int) -> None:
        self._disk = disk
        self._limit_bytes = limit_bytes

    def translate(self, error: OSError, size: int) -> Exception:
        """The error to raise for a write that failed, of an object of this many bytes."""
        return self.disk_full(size) if error.errno in (errno.ENOSPC, errno.EDQUOT) else error

    def disk_full(self, size: int) -> StoreFullError:
        """There is no room for so many bytes, in memory or on disk."""
        return StoreFullError(
            f"no room for {size} bytes: shared memory is full, and so is the disk at {self._disk}; make room "
            "there, set spill_dir to a larger disk, or drop results that are not needed any more",
            needed_bytes=size,
            limit_bytes=self._limit_bytes,
        )


def lost(id: bytes, reason: LostReason, why: str) -> ObjectLostError:
    """The bytes of an object are gone or damaged."""
    text = ids.text(id)
    return ObjectLostError(f"object {text} is lost: {why}", reason=reason, object_id=text)
