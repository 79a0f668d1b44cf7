"""What a pickling meets: the futures and references inside a value, found without looking into any container.

While `dumps_call` or `dumps` pickles in a thread, the notes of that thread are open. Pickle calls the
`__reduce_ex__` of every future and reference on its way, however deep it lies, and those ask here what to
write:

    in the arguments of a call     future ─▶ a loader of the value, noted in `deps`     reference ─▶ itself, noted in `refs`
    in a value (a result)          future ─▶ its reference, noted in `refs`             reference ─▶ itself, noted in `refs`
    in a function by itself        either one stops it: such a function travels inside the arguments
    anywhere else                  future ─▶ TypeError                                  reference ─▶ itself

Picklings nest: a `__reduce__` may pickle something of its own, or even submit a task. The former writes into
the notes that are open; the latter puts them aside and brings them back (`put_aside`, `bring_back`).

There is one `Notes` for each thread, used again and again: making one for each call would be a good part of a
call's cost.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pickle import PickleBuffer

CLOSED: Final = 0
IN_CALL: Final = 1
IN_VALUE: Final = 2
IN_FUNCTION: Final = 3


class MeetsReferenceError(Exception):
    """A function that was to be pickled by itself has a future or a reference inside. Never leaves this room."""


class Notes:
    """What the pickling, or unpickling, that runs in a thread has to know.

    Attributes:
        kind: what is being pickled: one of the constants above.
        met: whether a future or a reference was met.
        deps: futures by id, each with its index.
        refs: references by id.
        buffers: the out-of-band buffers, in order.
        keep: appends to `buffers`; kept, because a method bound for each call costs.
        keeper: what references keep alive that are made while a value is unpickled; or None.
        trouble: what `resolve` raised.
        resolve: gives the value of the dependency with an index, while arguments are unpickled; or None.
    """

    __slots__ = ("buffers", "deps", "keep", "keeper", "kind", "met", "refs", "resolve", "trouble")

    def __init__(self) -> None:
        self.kind = CLOSED
        self.met = False
        self.deps: dict[bytes, tuple[int, Any]] = {}
        self.refs: dict[bytes, Any] = {}
        self.buffers: list[PickleBuffer] = []
        self.keep = self.buffers.append
        self.resolve: Callable[[int], Any] | None = None
        self.keeper: object = None
        self.trouble: BaseException | None = None

    def clear(self) -> None:
        """Forget what was noted. What was handed out stays as it is."""
        self.met = False
        self.deps = {}
        self.refs = {}
        self.buffers = []
        self.keep = self.buffers.append

    def put_aside(self) -> tuple[Any, ...]:
        """Close the notes and give what they hold, for `bring_back`."""
        held = (self.kind, self.met, self.deps, self.refs, self.buffers)
        self.kind = CLOSED
        self.clear()
        return held

    def bring_back(self, held: tuple[Any, ...]) -> None:
        """Open the notes again as they were."""
        self.kind, self.met, self.deps, self.refs, self.buffers = held
        self.keep = self.buffers.append

    def add_dependency(self, id: bytes, holder: object) -> int:
        """Note a future and give its index. The same future again has the same index."""
        self.met = True
        deps = self.deps
        return deps.setdefault(id, (len(deps), holder))[0]

    def add_reference(self, id: bytes, ref: object) -> None:
        """Note a reference.

        Raises:
            MeetsReferenceError: it is inside a function that is being pickled by itself.
        """
        if self.kind == IN_FUNCTION:
            self.stop()
        self.met = True
        self.refs.setdefault(id, ref)

    def stop(self) -> NoReturn:
        """Stop the pickling of a function that has a future or a reference inside.

        Raises:
            MeetsReferenceError: always.
        """
        self.met = True
        raise MeetsReferenceError


class _Here(threading.local):
    """The notes of this thread, as `here.notes`."""

    def __init__(self) -> None:
        self.notes = Notes()


here: Final = _Here()
