"""Ids: sixteen random bytes that are a version 4 UUID.

Inside gcref an id is always `bytes`: it is hashed, compared and packed far more often than it is read by a
person. Text is made on demand, where a person or a file sees it. Random bytes come from the system in pools,
because a system call for each id would cost more than the rest of a submit; a forked child drops the pool, so
that no two processes ever hand out the same id.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from uuid import UUID

ID_BYTES: Final = 16

# One refill costs a system call and about 30 µs; 256 ids make that small beside the rest of a submit.
_POOL_IDS: Final = 256
_VARIANT_MASK: Final = int.from_bytes(bytes.fromhex("ffffffffffff0fff3fffffffffffffff") * _POOL_IDS, "big")
_VARIANT_BITS: Final = int.from_bytes(bytes.fromhex("00000000000040008000000000000000") * _POOL_IDS, "big")

_pool: list[bytes] = []


def new_id() -> bytes:
    """Make a new random id: 16 bytes with the bits of a version 4 UUID. Any thread may call it."""
    try:
        return _pool.pop()
    except IndexError:
        return _refill()


def text(id: bytes) -> str:
    """Give the canonical text of an id: `8-4-4-4-12` hexadecimal digits, lower case."""
    digits = id.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def parse(value: bytes | str | UUID) -> bytes:
    """Give the 16 bytes of an id in any of its forms.

    Args:
        value: 16 bytes, a `uuid.UUID`, or text: canonical, or 32 hexadecimal digits, in either case.

    Raises:
        ValueError: it is none of these. Names of endpoints are no ids either.
    """
    if isinstance(value, str):
        return _parse_text(value)
    # A UUID is told by its `bytes`, so that nobody imports `uuid` only to be asked for one.
    id = value if isinstance(value, bytes) else getattr(value, "bytes", None)
    if not isinstance(id, bytes) or len(id) != ID_BYTES:
        raise ValueError(f"not an id: {value!r} (an id is 16 bytes, a uuid.UUID or its text)")
    return id


def _parse_text(value: str) -> bytes:
    digits = value
    if len(value) == 36 and value[8] == value[13] == value[18] == value[23] == "-":
        digits = value.replace("-", "")
    try:
        # `fromhex` skips blanks, so the length of the outcome is checked too.
        id = bytes.fromhex(digits) if len(digits) == 2 * ID_BYTES else b""
    except ValueError:
        id = b""
    if len(id) != ID_BYTES:
        raise ValueError(f"not an id: {value!r} (expected the text of a UUID)")
    return id


def _refill() -> bytes:
    size = ID_BYTES * _POOL_IDS
    number = int.from_bytes(os.urandom(size), "big") & _VARIANT_MASK | _VARIANT_BITS
    run = number.to_bytes(size, "big")
    fresh = [run[at : at + ID_BYTES] for at in range(0, size, ID_BYTES)]
    first = fresh.pop()
    # One list operation: two threads that refill at once only make the pool longer.
    _pool.extend(fresh)
    return first


os.register_at_fork(after_in_child=_pool.clear)
