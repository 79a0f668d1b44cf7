"""Sites that can die and come back: a `Site` with a journal and workers that outlive it, for the tests of recovery.

    living     event ─► journal ─► resolver          now and then: dump ─► snapshot, journal begins anew
    crash      what was on its way to others is cut off somewhere; pulls and the queue of tasks are gone; workers run on, or die
    restart    load ─► replay ─► what the workers' pages say ─► Recovered

`canonical` writes a graph down in a form of its own, slot by slot, to compare two of them.
"""

from __future__ import annotations

import pickle
from itertools import count
from typing import Any

from gcref.brains import resolver_events as ev
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, DONE, READY, WAITING, Group, Obj, Options, Task
from gcref.objects import failure as failures
from gcref.wire import codec
from gcref.wire import messages as m
from tests.unit.brains.sites import BIG, CLIENT, SECRET, Site, World

WORKER = ev.Who(b"w" * 16, "worker", b"k" * 40, "client")  # the SDK inside a task
RESTARTED = "restarted"  # in a queue: from here on the sender is a new process


SCALARS = frozenset((type(None), bytes, int, float, str, bool))


def through_msgpack(value: Any) -> Any:
    """A value as it comes back from a file."""
    return codec.unpack(codec.pack(value), 1 << 30)


def canonical(resolver: Resolver) -> Any:
    """All that a resolver knows, in comparable values; what dispatch does with tasks is left out."""
    graph = resolver._graph
    numbers = {id(obj): number for number, obj in enumerate(graph.objects.values())}
    beyond: list[Obj] = []

    def name(obj: Obj) -> int:
        if id(obj) not in numbers:
            numbers[id(obj)] = len(numbers)
            beyond.append(obj)
        return numbers[id(obj)]

    def plain(value: Any, slot: str = "") -> Any:
        if type(value) in SCALARS and slot not in ("waiters", "awaited_by"):
            return value
        if isinstance(value, Obj):
            return ("obj", name(value))
        if isinstance(value, Group | Options):
            return tuple(getattr(value, s) for s in value.__slots__ if s != "__weakref__")
        if slot in ("waiters", "awaited_by"):
            return [name(obj) for obj in value or () if obj.state < DONE]
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if hasattr(value, "__slots__") and not isinstance(value, bytes | str | int | float | frozenset):
            return {s: plain(getattr(value, s), s) for s in value.__slots__}
        return value

    def whole(obj: Obj) -> dict[str, Any]:
        told = {slot: plain(getattr(obj, slot), slot) for slot in Obj.__slots__}
        if isinstance(obj, Task):
            told |= {
                slot: plain(getattr(obj, slot))
                for slot in Task.__slots__
                if slot not in ("worker", "seq", "sent_at")
            }
            if obj.state == DISPATCHED:
                told["state"] = WAITING if obj.missing else READY
        return told

    objects = [whole(obj) for obj in graph.objects.values()]
    objects.extend(map(whole, beyond))  # which grows on the way
    return {
        "objects": objects,
        "ids": list(graph.objects),
        "counts": graph.counts,
        "unknown": [(id, round(until - graph.now, 6)) for id, until in graph.unknown.items()],
        "graves": [list(graves) for graves in graph.graves],
        "turn": None if graph.graves_turn_at is None else round(graph.graves_turn_at - graph.now, 6),
        "functions": graph.functions,
        "fn_waiters": {
            fn: [name(task) for task in tasks if task.state < DONE] for fn, tasks in graph.fn_waiters.items()
        },
        "homes": graph.homes,
        "reclaims": graph.reclaims,
    }


def reloaded(resolver: Resolver) -> Resolver:
    """Another resolver that has loaded what this one dumped."""
    graph = resolver._graph
    twin = Resolver(graph.me, unknown_object_s=600, lease_s=86400)
    twin.load([through_msgpack(row) for row in resolver.dump()], graph.now)
    twin.validate()
    return twin


class LastingSite(Site):
    """A site whose journal and workers outlive its agent."""

    world: LastingWorld

    def __init__(self, name: bytes, world: World) -> None:
        super().__init__(name, world)
        self.snapshot: list[Any] = []
        self.journal: list[Any] = []
        self.running: dict[bytes, tuple[int, list[Any]]] = {}  # task: (attempt, the row of its result)
        self.numbers = count(1)
        self.deaths = 0

    # ---------------------------------------------------------------------------------------------------- living

    def handle(self, event: Any) -> None:
        self.journal.append(self._written(event))
        super().handle(event)

    @staticmethod
    def _written(event: Any) -> Any:
        if isinstance(event, ev.Ended):
            return ("Ended", [task.id for task in event.tasks], event.failure, event.retry)
        if isinstance(event, ev.ArgumentGone):
            return ("ArgumentGone", event.task.id, event.obj.id)
        return pickle.dumps(event)

    def compact(self) -> None:
        """A snapshot takes the journal's place."""
        self.snapshot = [through_msgpack(row) for row in self.resolver.dump()]
        self.journal = []

    def start(self, task: Task) -> None:
        """A worker begins to run the task, if its arguments are here."""
        self.runnable.remove(task)
        for dep in task.deps:
            end = self.resolver.resolve(dep)
            if end.value is None and (end.state != DONE or end.id not in self.store):
                self.handle(ev.ArgumentGone(task, end))
                return
        task.state, task.worker, task.seq = DISPATCHED, 1, next(self.seq)
        self.runs[task.id] += 1
        status, value, refs = self.world.play(self, task)
        if status == m.STORED:
            path = f"{value[0]}/{next(self.numbers)}"
            self.world.written[path] = self.world.written.pop(value[0])
            value = [path, value[1]]
        row = [task.seq, task.id, task.attempt, status, value, 1.0, 0.1, refs, None]
        self.running[task.id] = (task.attempt, row)

    def finish(self, id: bytes) -> None:
        """Its worker has a result."""
        _attempt, row = self.running.pop(id)
        self.handle(ev.Finished("w", [row]))

    def lose_worker(self, id: bytes) -> None:
        """Its worker dies."""
        _attempt, row = self.running.pop(id)
        if row[3] == m.STORED:
            self.world.written.pop(row[4][0], None)
        task = self.resolver.objects.get(id)
        if isinstance(task, Task) and task.state == DISPATCHED:
            task.state, task.worker = WAITING, None
            self.handle(ev.Ended([task], failures.make("WorkerLostError", "killed"), True))

    def lose_bytes(self, id: bytes) -> None:
        """The bytes of an object in the store are gone, and the store finds out."""
        del self.store[id]
        self.handle(ev.BytesLost([(id, "bytes_lost")]))

    def spawn(self, home: bytes, *, large: bool) -> bytes:
        """A task here submits to another endpoint."""
        id = b"spawn%011d" % len(self.world.spawned)
        self.world.spawned[id] = home
        args = [b"args" + id[4:], BIG] if large else None
        spec = [id, -1, None if large else b"p", None, None, args]
        group = b"spawned by " + self.id[:5]
        now = self.world.now
        self.handle(ev.Submitted(WORKER, home, group, SECRET, {}, [], [spec], now, now))
        return id

    def upload(self, pull: ev.Pull) -> None:
        """The argument blob of a task is here: from the worker that submits it, or from its endpoint."""
        self.pulls.remove(pull)
        self.store[pull.obj.id], self.attempts[pull.obj.id] = b"args", 1
        self.handle(ev.Pulled([(pull.obj.id, 1, {"ipc": BIG}, None)]))

    # -------------------------------------------------------------------------------------------- dying, restarting

    def die(self, workers: float = 0.0, losses: float = 0.0) -> None:
        """The agent is killed and started again.

        Args:
            workers: the share of its workers that die with it.
            losses: the share of the store's bytes that are lost.
        """
        dice, world = self.world.dice, self.world
        self.deaths += 1
        for (sender, _receiver), queue in world.queues.items():
            if sender == self.id:
                for _ in range(dice.randint(0, len(queue))):
                    queue.pop()
        for id in [id for id in self.store if dice.random() < losses and world.can_be_lost(id)]:
            del self.store[id]
        self.pulls.clear()
        self.runnable.clear()
        for site in world.sites:
            if site != self.id:
                world.post(self.id, site, [RESTARTED])
        self.resolver = resolver = Resolver(self.id, unknown_object_s=600, lease_s=86400)
        if self.snapshot:
            resolver.load(self.snapshot, world.now)
        for event in self.journal:
            resolver.replay(self._read(event))
            resolver.validate()
        self._read_pages(workers)
        wanted = resolver.wanted_bytes()
        for id in list(self.store):
            if id not in wanted or self.attempts[id] != wanted[id][0]:
                del self.store[id]
        stored = {id: (self.attempts[id], wanted[id][1]) for id in self.store}
        running = {
            id: 1
            for id, (attempt, _row) in self.running.items()
            if id in resolver.objects and resolver.objects[id].attempt == attempt
        }
        self.journal = []
        super().handle(ev.Recovered(running, stored, world.now))
        self.compact()

    def _read(self, written: Any) -> Any:
        if isinstance(written, bytes):
            return pickle.loads(written)
        if written[0] == "Ended":
            tasks = [self.resolver.objects.get(id) for id in written[1]]
            return ev.Ended([task for task in tasks if isinstance(task, Task)], written[2], written[3])
        return ev.ArgumentGone(_same(self.resolver, written[1]), self.resolver.objects[written[2]])

    def _read_pages(self, deaths: float) -> None:
        """What workers did since: some have a result, some died."""
        dice, resolver = self.world.dice, self.resolver
        for id, (attempt, row) in list(self.running.items()):
            throw = dice.random()
            if throw < deaths:
                del self.running[id]
                if row[3] == m.STORED:
                    self.world.written.pop(row[4][0], None)
                task = resolver.objects.get(id)
                if isinstance(task, Task) and task.state < DONE and task.attempt == attempt:
                    resolver.replay(ev.Ended([task], failures.make("WorkerLostError", "killed"), True))
            elif throw < deaths + 0.3:
                del self.running[id]
                resolver.replay(ev.Finished("w", [row]))
                if row[3] == m.STORED:
                    data = self.world.written.pop(row[4][0])
                    if resolver.wanted_bytes().get(id) == (attempt, BIG):
                        self.store[id], self.attempts[id] = data, attempt

    def take(self, sender: bytes, message: list[Any]) -> None:
        if message == [RESTARTED]:
            self.handle(ev.HomeRestarted(sender))
        elif message[0] == m.SUBMIT and sender != CLIENT:
            who = ev.Who(sender, "user", b"k" * 40, "endpoint")
            home, group, secret, opts, fns, tasks = message[1:]
            now = self.world.now
            self.handle(ev.Submitted(who, home, group, secret, opts, fns, tasks, now, now))
        elif message[0] == m.PINS:
            who = ev.Who(sender, "peer", b"p" * 40, "endpoint")
            ids = [message[1][at : at + 16] for at in range(0, len(message[1]), 16)]
            self.handle(ev.Reclaimed(who, ids, message[2]))
        else:
            super().take(sender, message)

    def reload(self) -> None:
        """The resolver is replaced by what it dumped; the world must not notice."""
        old = self.resolver
        self.resolver = new = reloaded(old)
        assert canonical(new) == canonical(old)
        self.runnable = [_same(new, task.id) for task in self.runnable]
        self.pulls = [ev.Pull(new.objects[pull.obj.id], pull.source) for pull in self.pulls]
        for id in self.running:
            if isinstance(task := new.objects.get(id), Task) and old.objects[id].state == DISPATCHED:
                task.state = DISPATCHED


def _same(resolver: Resolver, id: bytes) -> Task:
    found = resolver.objects[id]
    assert isinstance(found, Task)
    return found


class LastingWorld(World):
    """Sites that die and come back."""

    sites: dict[bytes, LastingSite]  # type: ignore[assignment]

    def __init__(self, dice: Any, sites: int, **odds: Any) -> None:
        super().__init__(dice, sites, site=LastingSite, **odds)
        self.spawned: dict[bytes, bytes] = {}  # task that a task submitted elsewhere: its home
        self.heard: set[bytes] = set()  # of those, the ones whose outcome their submitter knows

    def play(self, site: Site, task: Task) -> tuple[int, Any, bytes | None]:
        return (m.OK, b"v", None) if task.id in self.spawned else super().play(site, task)

    def deliver(self, sender: bytes, receiver: bytes) -> None:
        if receiver == WORKER.party:
            message = self.queues[sender, receiver].popleft()
            self.heard.update(item[0] for item in message[1] if item[1] != m.PENDING)
        elif receiver == CLIENT and self.queues[sender, receiver][0][0] == RESTARTED:
            self.queues[sender, receiver].popleft()
        else:
            super().deliver(sender, receiver)

    def steps(self) -> list[Any]:
        """Everything that could happen next, but for deaths and losses."""
        found: list[Any] = [lambda p=pair: self.deliver(*p) for pair, queue in self.queues.items() if queue]
        for site in self.sites.values():
            found += [lambda s=site, t=task: s.start(t) for task in site.runnable[:3]]
            found += [lambda s=site, i=id: s.finish(i) for id in list(site.running)[:3]]
            for pull in site.pulls[:3]:
                if pull.obj.id.startswith(b"args"):
                    if pull.source == WORKER.party or pull.obj.id in self.sites[pull.source].store:
                        found.append(lambda s=site, p=pull: s.upload(p))
                elif self._has(pull):
                    found.append(lambda s=site, p=pull: s.finish_pull(p))
                else:
                    found.append(lambda s=site, p=pull: self._refuse(s, p))
        return found

    def can_be_lost(self, id: bytes) -> bool:
        """Whether its bytes can be made again, or need not be. Nobody has those of a put twice."""
        return not self.opts or id not in self.uploads

    def _has(self, pull: ev.Pull) -> bool:
        if pull.source == CLIENT:
            return True
        there = self.sites[pull.source].resolver.objects.get(pull.obj.id)
        return (
            there is not None
            and there.attempt == pull.obj.attempt
            and pull.obj.id in self.bytes_at(pull.source)
        )

    @staticmethod
    def _refuse(site: LastingSite, pull: ev.Pull) -> None:
        site.pulls.remove(pull)
        site.handle(ev.PullWaits(pull.obj.id, pull.obj.attempt))
