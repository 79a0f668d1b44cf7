"""Cancelling: who asked for which task not to run, and who is to be answered what.

    CANCEL ─┬► waits here: it ends, yes
            ├► with dispatch: that decides, or by force its worker dies first
            └► of another home: asked there
    CANCELLED ◄─ to everybody who asked, once it is certain

An answer is one word for all: the task will not run, or it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

from endpoint_worker.agent.outbox import Outbox
from endpoint_worker.agent.pool import Pool
from gcref.brains import dispatch_events as dp
from gcref.brains import resolver_events as ev
from gcref.brains.dispatch import Dispatch
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import CANCELLED, DISPATCHED, DONE, WAITING, Obj, Task, is_task
from gcref.wire import messages as m


class Cancels:
    """The cancels that are under way.

    Args:
        resolver, dispatch, pool: what is asked.
        out: where answers go.
        take: takes an event of the resolver (and writes it down).
        obey: does what dispatch answers.
        to_home: sends to another endpoint.
    """

    def __init__(
        self,
        resolver: Resolver,
        dispatch: Dispatch,
        pool: Pool,
        out: Outbox,
        *,
        take: Callable[[Any, float], None],
        obey: Callable[[list[Any], float], None],
        to_home: Callable[[bytes, list[Any], float], None],
    ) -> None:
        self._resolver = resolver
        self._dispatch = dispatch
        self._pool = pool
        self._out = out
        self._take = take
        self._obey = obey
        self._to_home = to_home
        # By id: who waits for the answer, and whether by force.
        self._asked: dict[bytes, list[tuple[ev.Who, bool]]] = {}
        self._forced: set[bytes] = set()  # those that may kill
        self._dying: dict[int, list[Task]] = {}  # by worker: tasks that it was killed for, until it is dead

    def asked(self, wanted: list[bytes], force: bool, who: ev.Who, now: float) -> None:
        """Somebody asks for these not to run; each is answered once."""
        for id in wanted:
            obj = self._resolver.objects.get(id)
            if obj is None or obj.state >= DONE or not self._may_cancel(obj, who):
                self._out.say(who.party, [m.CANCELLED, id, [False]])
                continue
            self._asked.setdefault(id, []).append((who, force))
            if any(obj in tasks for tasks in self._dying.values()):
                continue
            if obj.home != self._resolver.me:
                self._to_home(obj.home, [m.CANCEL, id, force], now)
            elif not is_task(obj):
                self.answer(id, False)
            elif obj.state == WAITING:
                if obj.missing and obj.extra is not None and obj.extra.target is not None:
                    self.answer(id, False)  # it ran, and its result is another task's
                else:
                    self._take(ev.Cancelled([obj]), now)
                    self.answer(id, True)
            elif force and self._dispatch.is_running(obj):
                self._by_force(obj, now)
            else:
                if force:
                    self._forced.add(id)
                self._obey(self._dispatch.handle(dp.Cancel([obj], now)), now)

    def will_not_run(self, cancelled: dp.Cancelled, now: float) -> None:
        """Dispatch is certain."""
        self._take(ev.Cancelled(cancelled.tasks), now)
        for task in cancelled.tasks:
            self._forced.discard(task.id)
            self.answer(task.id, True)

    def run_already(self, kept: dp.NotCancelled, now: float) -> None:
        """Dispatch cannot help it, but a signal can."""
        for task in kept.tasks:
            if task.id in self._forced and task.state == DISPATCHED and task.worker is not None:
                self._by_force(task, now)
            else:
                self.answer(task.id, False)
            self._forced.discard(task.id)

    def answer(self, id: bytes, gone: bool) -> None:
        """Tell everybody who asked."""
        for who, _force in self._asked.pop(id, ()):
            self._out.say(who.party, [m.CANCELLED, id, [gone]])

    def open(self) -> Iterator[tuple[bytes, bool, ev.Who]]:
        """What is not decided: (id, force, who asked). The journal keeps it."""
        for id, asked in self._asked.items():
            who, force = max(asked, key=itemgetter(1))
            yield id, force, who

    def _may_cancel(self, obj: Obj, who: ev.Who) -> bool:
        # Nobody has submitted it yet: whoever may do that may also say that it will not come.
        unclaimed = obj.home == self._resolver.me and obj.group is None
        return unclaimed or self._resolver.may_read(obj, who, None)

    def _by_force(self, task: Task, now: float) -> None:
        """Kill its worker. Until that is dead nothing is certain: it may begin yet, or come to its end."""
        worker = task.worker
        assert worker is not None, "it is running"
        if not self._pool.kill_at(worker, task.seq):
            self.answer(task.id, False)
            return
        self._obey(self._dispatch.handle(dp.Withdraw([task], now)), now)
        self._dying.setdefault(worker, []).append(task)

    def worker_gone(self, worker: int, now: float) -> None:
        """A worker is dead, and its last results are taken."""
        for task in self._dying.pop(worker, ()):
            if task.state < DONE:
                self._take(ev.Cancelled([task]), now)
            self.answer(task.id, task.state == CANCELLED)
