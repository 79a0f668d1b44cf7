"""The functions that an endpoint knows: their pickled bytes by digest, and who has been sent which."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

DIGEST_BYTES: Final = 16


class Functions:
    """Functions by digest, never unpickled here."""

    def __init__(self) -> None:
        self._bytes: dict[bytes, bytes] = {}
        self._sent: dict[bytes, set[bytes]] = {}

    def add(self, digest: bytes, code: bytes) -> bool:
        """Keep a function's bytes; False when they do not have that digest."""
        if hashlib.blake2b(code, digest_size=DIGEST_BYTES).digest() != digest:
            return False
        self._bytes[digest] = code
        return True

    def get(self, digest: bytes) -> bytes | None:
        """The bytes, or None."""
        return self._bytes.get(digest)

    def items(self) -> Iterable[tuple[bytes, bytes]]:
        """All functions: digest and bytes."""
        return self._bytes.items()

    def to_send(self, party: bytes, digest: bytes) -> bytes | None:
        """The bytes, when the party has not been sent them yet; counts them as sent."""
        sent = self._sent.setdefault(party, set())
        if digest in sent:
            return None
        code = self._bytes.get(digest)
        if code is not None:
            sent.add(digest)
        return code

    def forget_sent(self, party: bytes) -> None:
        """The party has lost what it knew."""
        self._sent.pop(party, None)
