"""What a worker is sent of a task: an entry of its queue, with the places of the arguments that it is to map.

A place is a grant: its bytes stay where they are until the worker returns it. So an entry that cannot be made, or does not
reach its worker, gives back what it was granted.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from endpoint_worker.store import Store
from endpoint_worker.worker import channel
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DONE, Obj, Task

Entry: TypeAlias = tuple[Any, ...]


class ArgumentGone(Exception):  # noqa: N818 - no error: the task waits for its argument again
    """The bytes of an argument are not in the store.

    Attributes:
        obj: whose.
    """

    def __init__(self, obj: Obj) -> None:
        super().__init__()
        self.obj = obj


class Entries:
    """Makes entries.

    Args:
        me: the endpoint's id.
        resolver: knows what the arguments are.
        store: has the large ones.
    """

    def __init__(self, me: bytes, resolver: Resolver, store: Store) -> None:
        self._me = me
        self._resolver = resolver
        self._store = store

    def make(self, worker: int, task: Task) -> Entry:
        """An entry for this worker, with what it needs granted to it.

        Raises:
            ArgumentGone: an argument's bytes are not here (any more); nothing is granted.
        """
        args = deps = None
        try:
            if task.args is not None:
                args = self._place(worker, task.args)
            if task.deps:
                deps = []
                for dep in task.deps:
                    deps.append(self._location(worker, dep))
        except ArgumentGone:
            self._give_back(worker, args, deps or ())
            raise
        flags = channel.KEEP if task.waiters else 0
        group = task.group.id if task.group is not None else b""
        return (
            task.seq, task.id, task.attempt, task.fn, task.payload, args, deps or (), flags, group, task.options.walltime_s,
        )  # fmt: skip

    def not_sent(self, worker: int, entries: list[Entry]) -> None:
        """These did not reach the worker: the places that it was to map were never seen."""
        for entry in entries:
            self._give_back(worker, entry[5], entry[6])

    def _location(self, worker: int, dep: Obj) -> Any:
        """Where a worker finds an argument: the blob itself, a path to map, or its own earlier result."""
        end = self._resolver.resolve(dep)
        if end.value is not None:
            return end.value
        if end.state < DONE and end.home == self._me:
            return [end.id]
        return self._place(worker, end)

    def _place(self, worker: int, obj: Obj) -> list[Any]:
        try:
            return self._store.map_for(worker, obj.id)
        except (LookupError, OSError) as error:
            raise ArgumentGone(obj) from error

    def _give_back(self, worker: int, args: list[Any] | None, deps: Any) -> None:
        places = [] if args is None else [args]
        places += [dep for dep in deps if isinstance(dep, list) and len(dep) > 1]
        self._store.ungrant(worker, [place[0] for place in places])
