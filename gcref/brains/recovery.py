"""The graph after a loss: bytes that are gone, processes that began again.

    BytesLost ──► its task runs again, if it kept what it needs and has a retry left ──► else the object is lost
    Recovered ──► what the store and the workers really have ──► what the dead process may not have said is said again
    HomeRestarted, Reclaimed ──► what the other side's dead process may not have said is taken as said

An agent that starts again has its graph as the journal tells it (`snapshot.load`, `Resolver.replay`). The instructions on the
way to it may have been carried out or not, so `Recovered` gives them once more: outcomes to every subscriber,
subscriptions and relayed tasks to every home, pulls, runnable tasks. Whoever hears a thing twice passes it over.

Rules:
    - An attempt number never means two different runs: a task that runs again has the next one.
    - What a task waits for is told by the graph alone (`_link`), never by what the dead process had begun.
    - Nothing here depends on whether dispatch holds a task or not: a replay, which has no dispatch, decides the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from gcref.brains import resolver_events as ev
from gcref.brains.elsewhere import Elsewhere
from gcref.brains.graph import REF_BYTES, Graph
from gcref.brains.tasks import DISPATCHED, DONE, LOST, READY, WAITING, Extra, Obj, Task, is_task
from gcref.errors import LostReason
from gcref.objects import failure as failures
from gcref.wire import messages as m

PINS_IDS_MAX: Final = 32_768
"""Ids in one PINS: half a megabyte."""
RELAY_TASKS_MAX: Final = 128
"""Tasks in one SUBMIT that is relayed once more."""
TRIES_MAX: Final = 10
"""Failed attempts of a task that are remembered: the latest."""
TRY_TEXT_MAX: Final = 1000
"""Characters that are remembered of each."""

UPLOAD_ATTEMPT: Final = 1
"""What is uploaded has one attempt."""


def has_result(task: Obj) -> bool:
    """Whether a task has run, and its outcome waits for something else: a pin to be confirmed, or the object that it became."""
    extra = task.extra
    return extra is not None and (isinstance(extra.deferred, tuple) or extra.target is not None)


def unfinished(graph: Graph) -> Iterator[Task]:
    """The tasks of this endpoint that are still to run."""
    for obj in graph.objects.values():
        if (
            is_task(obj)
            and obj.state < DONE
            and obj.id not in graph.unknown
            and obj.home == graph.me
            and not has_result(obj)
        ):
            yield obj


def note_failed_attempt(task: Task, failure: list[Any]) -> None:
    """Remember, for EXPLAIN, why an attempt of a task has failed; it is to have another one."""
    extra = task.extra = task.extra or Extra()
    text = f"attempt {task.attempt}: {failure[0]}: {failure[1]}"
    extra.tries = [*(extra.tries or ())[1 - TRIES_MAX :], text[:TRY_TEXT_MAX]]


def wanted_bytes(graph: Graph) -> dict[bytes, tuple[int, int]]:
    """What the graph counts on being in the store: id → (attempt, size in bytes)."""
    wanted: dict[bytes, tuple[int, int]] = {}
    for obj in graph.objects.values():
        if graph.lies_in_store(obj):
            wanted[obj.id] = (obj.attempt, obj.size)
        elif obj.extra is None or obj.state >= DONE:
            continue
        elif isinstance(obj.extra.deferred, tuple):
            _state, value, size = obj.extra.deferred
            if value is None:
                wanted[obj.id] = (obj.attempt, size)
        elif obj.extra.relay is not None and not obj.extra.pulling:
            wanted[obj.id] = (UPLOAD_ATTEMPT, obj.size)
    return wanted


class Recovery:
    """What the resolver does about losses.

    Args:
        graph: the table.
        elsewhere: the dealings with other homes.
    """

    def __init__(self, graph: Graph, elsewhere: Elsewhere) -> None:
        self._graph = graph
        self._elsewhere = elsewhere

    # ------------------------------------------------------------------------------------------------ lost bytes

    def bytes_lost(self, event: ev.BytesLost) -> None:
        """The store does not have these bytes any more."""
        self._lose(event.items)
        self._graph.settle()

    def argument_gone(self, event: ev.ArgumentGone) -> None:
        """An argument was dropped before its task was sent: bring or make it once more, or say that it is lost."""
        graph, task, obj = self._graph, event.task, event.obj
        task.state = WAITING
        if obj.home != graph.me and obj.extra is not None:
            if obj.state == DONE:
                self._elsewhere.copy_gone(obj)
            task.missing += graph.wait_for(task, obj)
        else:
            before = task.missing
            if graph.lies_in_store(obj):
                self._lose([(obj.id, LostReason.BYTES_LOST.value)])
            if obj.state >= DONE:
                graph.fail_dependent(task)
            elif task.missing == before == 0:  # it was being made again already
                task.missing += graph.wait_for(task, obj)
        graph.settle()

    def _lose(self, items: Iterable[tuple[bytes, str]]) -> None:
        """Take bytes as lost; the tasks that need them wait for the next attempt's."""
        graph = self._graph
        again: dict[bytes, Obj] = {}
        lost: set[bytes] = set()
        for id, reason in items:
            obj = graph.objects.get(id)
            if obj is None:
                continue
            if obj.home != graph.me:
                if graph.lies_in_store(obj):
                    graph.frees.append(id)
                    self._elsewhere.copy_gone(obj)
                    if obj.pins and obj.state < DONE:
                        graph.want(obj)
            elif graph.lies_in_store(obj) or self._lies_deferred(obj):
                if self._undo(obj, reason):
                    again[id] = obj
                else:
                    lost.add(id)
        if not again and not lost:
            return
        stale: dict[bytes, Obj] = {}  # what tasks that run again may still be noted as waiting for
        for task in unfinished(graph):
            if task.id in again:
                for dep in task.deps:
                    end = graph.resolve(dep)
                    if end.waiters is not None:
                        stale[end.id] = end
                continue
            for dep in task.deps if task.args is None else (*task.deps, task.args):
                end = graph.resolve(dep)
                if end.id in again:
                    if task.state == READY:
                        graph.withdraws.append(task)
                        task.state = WAITING
                    task.missing += graph.wait_for(task, end)
                elif end.id in lost and task.missing:
                    task.broken = True  # one that misses nothing finds out when it is sent
        for end in stale.values():
            end.waiters = [task for task in end.waiters or () if task.id not in again] or None
        for obj in again.values():
            if not is_task(obj):
                assert obj.group is not None
                graph.out.append(ev.Pull(obj, obj.group.submitter))
                continue
            self._link(obj)
            if obj.missing == 0:
                graph.runnable(obj)

    @staticmethod
    def _lies_deferred(obj: Obj) -> bool:
        """Whether it is a result in the store whose outcome is not told yet."""
        deferred = obj.extra.deferred if obj.extra is not None and obj.state < DONE else None
        return isinstance(deferred, tuple) and deferred[1] is None

    def _undo(self, obj: Obj, reason: str) -> bool:
        """The bytes of one of our objects are gone.

        Returns:
            They will come again: its task runs again, or, for arguments of unfinished tasks, their uploader has them yet.
            Else the object is lost.
        """
        graph = self._graph
        was_done = obj.state == DONE
        graph.frees.append(obj.id)  # what is left of them
        if not was_done:
            assert obj.extra is not None
            obj.extra.deferred = None
        if not is_task(obj) and not obj.pins and obj.holds and obj.group is not None:
            obj.state = WAITING
            obj.extra = obj.extra or Extra()
            obj.extra.pulling = True
            return True
        refs, obj.refs = obj.refs, b""
        for at in range(0, len(refs), REF_BYTES):
            if (inner := graph.objects.get(refs[at : at + 16])) is not None:
                graph.drop(inner)
        text = "the bytes of the result are gone from its home's store"
        failure = failures.make("ObjectLostError", text, reason=reason)
        if is_task(obj):
            graph.counts["done"] -= was_done
            if obj.attempt <= obj.options.retries and (obj.payload is not None or obj.args is not None):
                note_failed_attempt(obj, failure)
                obj.state = WAITING
                obj.attempt += 1
                obj.size = 0
                obj.record = None
                return True
        obj.state = WAITING
        graph.end(obj, LOST, None, 0, failure)
        return False

    def _link(self, task: Task) -> None:
        """Find out anew what a task misses; nothing waits for anything on its behalf."""
        graph = self._graph
        missing = 0
        task.broken = False
        if task.fn is not None and task.fn not in graph.functions:
            graph.fn_waiters.setdefault(task.fn, []).append(task)
            missing += 1
        for dep in task.deps:
            missing += graph.wait_for(task, dep)
        if task.args is not None:
            missing += graph.wait_for(task, task.args)
        task.missing = missing
        task.state = WAITING

    # ------------------------------------------------------------------------------------- another's new process

    def home_restarted(self, event: ev.HomeRestarted) -> None:
        """Another endpoint has a new process: its FORGETs and confirmations may be lost, and its list of pins begins anew."""
        graph = self._graph
        graph.reclaims.pop(event.home, None)
        for obj in list(graph.objects.values()):
            if obj.home != event.home:
                continue
            if obj.state == DONE and not obj.pins and obj.holds == 0:
                graph.delete(obj)
            elif obj.extra is not None and obj.extra.awaited_by and not obj.extra.confirmed:
                graph.subscribe_to(obj, confirm=True)
        graph.settle()

    def reclaimed(self, event: ev.Reclaimed) -> list[bytes]:
        """A restarted endpoint says what it pins here. Returns what it does not pin (any more), once all is said."""
        graph, party = self._graph, event.who.party
        kept = graph.reclaims.setdefault(party, set())
        kept.update(event.ids)
        if event.more:
            return []
        del graph.reclaims[party]
        return [
            obj.id
            for obj in graph.objects.values()
            if obj.home == graph.me and party in obj.pins and obj.id not in kept
        ]

    # -------------------------------------------------------------------------------------------- our new process

    def recovered(self, event: ev.Recovered) -> None:
        """The graph is as the journal tells it; now it meets the world."""
        graph = self._graph
        graph.now = event.now
        gone = self._compare(event.stored)
        for obj in graph.objects.values():
            obj.waiters = None
        graph.fn_waiters.clear()
        lost: list[tuple[bytes, str]] = [(id, LostReason.BYTES_LOST.value) for id in gone]
        for id, reason in lost:
            self._undo(graph.objects[id], reason)
        ask: dict[bytes, set[bytes]] = {}
        for task in unfinished(graph):
            self._link(task)
            if task.fn is not None and task.fn not in graph.functions and task.group is not None:
                ask.setdefault(task.group.submitter, set()).add(task.fn)
            if task.id in event.running:
                task.state = DISPATCHED
            elif task.missing == 0:
                graph.runnable(task)
        graph.settle()
        self._pull_again()
        self._tell_again()
        self._relay_again()
        self._subscribe_again()
        graph.out.extend(ev.NeedFunctions(party, sorted(digests)) for party, digests in ask.items())

    def _compare(self, stored: dict[bytes, tuple[int, int]]) -> list[bytes]:
        """Compare with what the store has: copies that it has not are brought again. Returns our objects that it has not."""
        graph = self._graph
        gone = []
        idle = []
        wanted = wanted_bytes(graph)
        for obj in list(graph.objects.values()):
            extra = obj.extra
            of_other = obj.home != graph.me
            here = obj.id not in wanted or tuple(stored.get(obj.id, ())) == wanted[obj.id]
            if of_other and extra is not None and extra.relay is not None and obj.state < DONE:
                extra.pulling = extra.pulling or not here
            elif of_other:
                if extra is not None:
                    extra.pulling = False
                if not here:
                    self._elsewhere.copy_gone(obj)
                elif obj.id in wanted and extra is not None and not extra.subscribed:
                    idle.append(obj.id)
            elif not here:
                gone.append(obj.id)
        if idle:
            graph.out.append(ev.Idle(idle))
        return gone

    def _pull_again(self) -> None:
        """Order what was on its way: uploads from who has them, and copies that somebody wants."""
        graph = self._graph
        for obj in graph.objects.values():
            extra = obj.extra
            if extra is None or obj.state >= DONE:
                continue
            if extra.pulling and (obj.home == graph.me or extra.relay is not None):
                assert obj.group is not None
                graph.out.append(ev.Pull(obj, obj.group.submitter))
            elif extra.at_home and (
                obj.pins or any(alias.home != graph.me and alias.pins for alias in extra.aliases or ())
            ):
                graph.want(obj)

    def _tell_again(self) -> None:
        """Say to every subscriber how the objects stand that have ended, or have become another home's."""
        graph = self._graph
        graph.notify.clear()  # all of it is said here
        for obj in graph.objects.values():
            if obj.pins and (obj.state >= DONE or self._is_redirected(obj)):
                graph.tell(obj.pins, graph.item(obj))

    def _is_redirected(self, obj: Obj) -> bool:
        return (
            obj.extra is not None and obj.extra.target is not None and obj.extra.target.home != self._graph.me
        )

    def _relay_again(self) -> None:
        """Send once more the tasks and objects of ours for other homes that have not answered."""
        graph = self._graph
        by_head: dict[int, tuple[list[Any], list[list[Any]]]] = {}
        for obj in graph.objects.values():
            extra = obj.extra
            if extra is None or extra.confirmed or obj.state >= DONE or obj.home == graph.me:
                continue
            if extra.unsaid is not None:
                head, item = extra.unsaid
                by_head.setdefault(id(head), (head, []))[1].append(item)
            elif isinstance(extra.deferred, Obj):
                upload = extra.deferred
                if upload.state == DONE and upload.extra is not None and upload.extra.relay is not None:
                    graph.out.append(ev.Relay(obj.home, upload.extra.relay))
            elif extra.relay is not None and not extra.pulling:
                graph.out.append(ev.Relay(obj.home, extra.relay))
        for head, items in by_head.values():
            step = RELAY_TASKS_MAX if head[0] == m.SUBMIT else 1
            for at in range(0, len(items), step):
                graph.out.append(ev.Relay(head[1], [*head, items[at : at + step]]))

    def _subscribe_again(self) -> None:
        """Tell every home what we pin of its objects, and subscribe to it once more."""
        graph = self._graph
        graph.subscribes.clear()  # all of it is said here
        graph.unsubscribes.clear()
        pinned: dict[bytes, list[bytes]] = {home: [] for home in sorted(graph.homes)}
        for obj in graph.objects.values():
            extra = obj.extra
            if obj.home == graph.me or extra is None or not extra.subscribed:
                continue
            pinned[obj.home].append(obj.id)
            if obj.state <= DONE and (not extra.submitted or extra.confirmed or extra.awaited_by):
                graph.subscribe_to(obj, confirm=bool(extra.awaited_by))
        for home, ids in pinned.items():
            for at in range(0, max(len(ids), 1), PINS_IDS_MAX):
                part = ids[at : at + PINS_IDS_MAX]
                graph.out.append(ev.Pins(home, part, at + PINS_IDS_MAX < len(ids)))
