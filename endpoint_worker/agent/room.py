"""Room for bytes: which pulls go now, and who waits while the store is full.

    resolver ──Pull──► Admission ──Start──► bulk thread ──► store        (too full: back into the queue of `Admission`)
    worker ──ALLOC──► store: a segment        (too full: the worker waits, until there is room or `wait_s` is over)

The brain `Admission` decides about pulls; here it is told what happens, and obeyed. A worker that waits for room keeps its
slot: that is the back-pressure, since nothing new starts that would make more results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from endpoint_worker.agent.losses import pull_failure
from endpoint_worker.agent.pool import Pool
from endpoint_worker.store import Store
from gcref.brains import admission as ad
from gcref.brains import resolver_events as ev
from gcref.brains.dispatch import Dispatch
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, READY, Task
from gcref.carriers.bulk.ports import PullFailed
from gcref.errors import StoreFullError
from gcref.objects import failure as failures

_RETRY_FIRST_S: Final = 0.02
_RETRY_MAX_S: Final = 0.5
_LEAVING_S: Final = 5.0
"""A worker lets go of the arguments of a task soon after its end, unless the task keeps them: then it may be never."""


class Room:
    """What pulls and results wait for.

    Args:
        me: the endpoint's id.
        resolver, dispatch: to be looked at.
        store: where there is room, or not.
        pool: the workers.
        start: begins a pull.
        give_up: the failure of a pull that the store has refused for too long.
        wait_s: how long to wait for room in a full store, in seconds.
    """

    def __init__(
        self,
        *,
        me: bytes,
        resolver: Resolver,
        dispatch: Dispatch,
        store: Store,
        pool: Pool,
        start: Callable[[ev.Pull], None],
        give_up: Callable[[bytes, list[Any]], None],
        wait_s: float,
    ) -> None:
        self._me = me
        self._resolver = resolver
        self._dispatch = dispatch
        self._store = store
        self._pool = pool
        self._start = start
        self._give_up = give_up
        self._wait_s = wait_s
        self._admission = ad.Admission(store.limit_bytes, wait_s)
        self._pulls: dict[bytes, ev.Pull] = {}  # of those that the brain knows and that have not ended
        self._allocations: dict[int, int] = {}  # workers that wait, and for how many bytes
        self._until: dict[int, float] = {}  # when a worker's present result is given up
        # What nobody needs, and somebody still maps: numbers of the store's, and how long it is thought to be given back soon.
        self._leaving: dict[bytes, tuple[int, float]] = {}
        self._seen = 0  # of the store's `freed`, when we looked last
        self._retry_s = _RETRY_FIRST_S
        self._retry_at = 0.0

    # ---------------------------------------------------------------------------------------------------- pulls

    def pull(self, pull: ev.Pull, now: float) -> None:
        """Bytes are wanted; `start` is called when there is room for them."""
        obj = pull.obj
        self._pulls[obj.id] = pull
        self._leaving.pop(obj.id, None)
        task = obj.waiters[0] if obj.waiters else None
        copy = obj.home != self._me
        order = now if task is None else task.received_at
        self._tell(ad.Want(obj.id, obj.size, None if task is None else task.id, order, copy))

    def ended(self, id: bytes) -> None:
        """A pull has failed, or nobody wants it any more."""
        self._pulls.pop(id, None)
        self._tell(ad.Gone(id))

    def arrived(self, arrived: Iterable[bytes]) -> None:
        """Pulls are done, and the resolver's answer to that is obeyed."""
        for id in arrived:
            self._pulls.pop(id, None)
            self._tell(ad.Arrived(id))

    def refused(self, done: PullFailed, now: float) -> bool:
        """A pull has failed: whether it was for want of room, and will be tried again."""
        cause = done.cause
        if not isinstance(cause, StoreFullError) or _never_fits(cause) or done.id not in self._pulls:
            return False
        self._tell(ad.Refused(done.id, pull_failure(done), now))
        return True

    def runnable(self, tasks: list[Task]) -> None:
        """These tasks have all they need."""
        admission = self._admission
        if not admission.taken:
            return
        resolve = self._resolver.resolve
        users = []
        for task in tasks:
            uses = [resolve(dep).id for dep in task.deps]
            if task.args is not None:
                uses.append(task.args.id)
            if uses:
                users.append((task.id, uses))
        if users:
            self._tell(ad.Runnable(users))

    def released(self, released: list[bytes]) -> None:
        """Nobody needs these bytes now. To be said before the store frees them: a worker may still map them."""
        if self._admission.busy:
            seen = self._store.seen(released)
            for id, number in seen.items():
                self._leaving[id] = number, time.monotonic() + _LEAVING_S
            self._tell(ad.Released([id for id in released if id not in seen]))

    def _tell(self, event: ad.Event) -> None:
        events = [event]
        given_up: list[tuple[bytes, list[Any]]] = []
        while events:
            for instruction in self._admission.handle(events.pop()):
                match instruction:
                    case ad.Start(id):
                        self._start(self._pulls[id])
                    case ad.Drop(ids):
                        self._store.set_cache(ids, True)
                    case ad.Ask(task):
                        if not self._goes_on(task):
                            events.append(ad.Paused(task))
                    case ad.GiveUp(id, failure):
                        del self._pulls[id]
                        given_up.append((id, failure))
        for id, failure in given_up:  # last: it brings about other events of ours
            self._give_up(id, failure)

    def _goes_on(self, id: bytes) -> bool:
        """Whether a task, or what another one has left mapped, will give memory back without our help."""
        if any(until > time.monotonic() for _, until in self._leaving.values()):
            self._pool.unmap()
            return True
        task = self._resolver.objects.get(id)
        if not isinstance(task, Task) or task.state not in (READY, DISPATCHED):
            return False
        return not self._dispatch.is_blocked(task)

    # -------------------------------------------------------------------------------------------------- results

    def allocate(self, worker: int, size: int, failed: str | None, now: float) -> None:
        """Answer a worker's ALLOC, now or when there is room."""
        if failed is None:
            self._until.pop(worker, None)  # that was about the result before
        self._try(worker, size, failed, now)

    def _try(self, worker: int, size: int, failed: str | None, now: float) -> None:
        try:
            path, capacity, warm = self._store.allocate(size, worker, failed)
        except StoreFullError as error:
            if _never_fits(error) or self._until.setdefault(worker, now + self._wait_s) <= now:
                self.worker_gone(worker)
                self._pool.no_segment(worker, failures.from_error(error))
                return
            if not self._allocations:
                self._retry_s = _RETRY_FIRST_S
                self._retry_at = now + self._retry_s
            self._allocations[worker] = size
        else:
            self._allocations.pop(worker, None)
            self._pool.segment(worker, path, capacity, warm)

    def worker_gone(self, worker: int) -> None:
        """A worker does not wait for room any more."""
        self._allocations.pop(worker, None)
        self._until.pop(worker, None)

    # ----------------------------------------------------------------------------------------------------- time

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do, in monotonic seconds; None: never, as things are."""
        due = self._admission.deadline
        if self._allocations:
            due = self._retry_at if due is None else min(due, self._retry_at)
        return due

    def tick(self, now: float) -> None:
        """Do what is due."""
        if (due := self._admission.deadline) is not None and due <= now:
            self._tell(ad.Tick(now))
        if self._allocations and self._retry_at <= now:
            self._allocate_again(now)

    def turn(self, now: float) -> None:
        """A turn of the loop: if bytes have gone, those that wait for room are tried again."""
        if self._store.freed == self._seen:
            return
        self._seen = self._store.freed
        if self._leaving:
            gone = [id for id, (number, _) in self._leaving.items() if not self._store.is_seen(number)]
            for id in gone:
                del self._leaving[id]
            self._tell(ad.Released(gone))
        if self._allocations:
            self._retry_s = _RETRY_FIRST_S
            self._allocate_again(now)

    def _allocate_again(self, now: float) -> None:
        self._retry_at = now + self._retry_s
        self._retry_s = min(_RETRY_MAX_S, 2 * self._retry_s)
        for worker, size in list(self._allocations.items()):
            self._try(worker, size, None, now)

    def describe(self) -> dict[str, int]:
        """Figures for people."""
        return {**self._admission.describe(), "results_waiting": len(self._allocations)}


def _never_fits(error: StoreFullError) -> bool:
    return bool(error.needed_bytes and error.limit_bytes and error.needed_bytes > error.limit_bytes)
