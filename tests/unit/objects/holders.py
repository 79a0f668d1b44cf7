"""A future as this room sees one: it reports itself when it is pickled, and gives its reference."""

from __future__ import annotations

from typing import Any, SupportsIndex

from gcref import ids
from gcref.objects import serialize
from gcref.objects.ref import ObjectRef

HOME = bytes(range(16))
TOKEN = bytes(range(16, 32))


class Holder:
    """Stands for a `ComputeFuture`."""

    def __init__(self, id: bytes | None = None) -> None:
        self.id = id or ids.new_id()

    def ref(self) -> ObjectRef:
        return ObjectRef(self.id, HOME, TOKEN)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return serialize.note_dependency(self, self.id)


def make_ref() -> ObjectRef:
    return ObjectRef(ids.new_id(), HOME, TOKEN)
