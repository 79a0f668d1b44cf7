"""What the bulk thread finds at an agent: where bytes come from (provider) and where they go (sink).

Both are called on the bulk thread. The store takes care of threads itself; of the resolver only `readable` is used, which looks
and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from endpoint_worker.store import Reading, Store, Writable
from gcref.brains.resolver import Resolver
from gcref.brains.resolver_events import Who
from gcref.carriers.bulk.link import Requester
from gcref.errors import AuthError


class StoreProvider:
    """Serves this endpoint's objects to whoever may read them.

    Args:
        resolver: knows what is where, and whose.
        store: has the bytes.
        is_own_task: whether a party is the SDK inside a task of this endpoint.
    """

    def __init__(self, resolver: Resolver, store: Store, is_own_task: Callable[[bytes], bool]) -> None:
        self._resolver = resolver
        self._store = store
        self._is_own_task = is_own_task

    def _find(self, id: bytes, requester: Requester, token: bytes | None) -> bytes:
        role = (
            "worker" if requester.carrier == "ipc" and self._is_own_task(requester.party) else requester.role
        )
        who = Who(requester.party, role, requester.key or b"", requester.kind)
        try:
            return self._resolver.readable(id, who, token).id
        except PermissionError as error:
            raise AuthError(str(error)) from None

    def read(
        self, id: bytes, attempt: int, offset: int, length: int, requester: Requester, token: bytes | None
    ) -> Reading:
        """A range of an object."""
        return self._store.read(self._find(id, requester, token), attempt, offset, length)

    def expose(self, id: bytes, attempt: int, requester: Requester, token: bytes | None) -> tuple[str, int]:
        """Path and size of an object, for a party of this machine and user that will map it."""
        return self._store.expose(self._find(id, requester, token), attempt)

    def fill(self, id: bytes, attempt: int, path: str, requester: Requester, token: bytes | None) -> int:
        """Nobody has an agent write into their files: what a task sends elsewhere is pulled as an object of ours (`expose`)."""
        raise LookupError("an agent writes into nobody's file")


class StoreSink:
    """Takes pulled objects into the store. They are needed now; the resolver says when they are mere caches."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def begin(self, id: bytes, attempt: int, size: int) -> Writable:
        """Room for an object."""
        return self._store.begin(id, attempt, size, cache=False)

    def adopt(self, id: bytes, attempt: int, path: str, size: int) -> Any:
        """Take in a file of another party of this machine, without a copy."""
        return self._store.link(id, attempt, path, size, cache=False)
