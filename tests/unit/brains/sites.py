"""A model of sites for tests of the resolver: real resolvers, joined by queues, with a dice-driven client, workers and network.

Every choice (which message arrives next, which worker finishes, what the task does) comes from the given `random.Random`, so
Hypothesis can shrink a failing history.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict, deque
from typing import Any

from gcref.brains import resolver_events as ev
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, DONE, READY, Task
from gcref.objects import failure as failures
from gcref.objects.ref import read_token
from gcref.wire import messages as m

CLIENT = b"c" * 16
OWNER = b"k" * 40
SECRET = b"s" * 32
GROUP = b"g" * 16
BIG = 200_000  # a value above this "size" is stored
USER = ev.Who(CLIENT, "user", OWNER, "client")


def object_id(number: int) -> bytes:
    """The id of task `number`."""
    return b"%016d" % number


def ref_to(id: bytes, home: bytes) -> bytes:
    """A packed reference with the right token."""
    return id + home + read_token(SECRET, id)


class Site:
    """One endpoint: its resolver, its store, and the tasks that its workers may run now."""

    def __init__(self, name: bytes, world: World) -> None:
        self.id = name
        self.world = world
        self.resolver = Resolver(name, unknown_object_s=600, lease_s=86400)
        self.store: dict[bytes, bytes] = {}
        self.runnable: list[Task] = []
        self.pulls: list[ev.Pull] = []
        self.attempts: dict[bytes, int] = {}  # of what is in the store
        self.runs: dict[bytes, int] = defaultdict(int)
        self.pulled: dict[bytes, int] = defaultdict(int)
        self.seq = itertools.count(1)

    def handle(self, event: Any) -> None:
        """Feed the resolver and carry out what it says."""
        for instruction in self.resolver.handle(event):
            match instruction:
                case ev.Runnable(tasks):
                    assert all(task.state == READY and task.missing == 0 for task in tasks)
                    self.runnable += tasks
                case ev.Withdraw(tasks):
                    self.runnable = [task for task in self.runnable if task not in tasks]
                case ev.Notify(party, items) | ev.NotifyLater(party, items):
                    self.world.post(self.id, party, [m.OUTCOME, items])
                case ev.Subscribe(home, items):
                    self.world.post(self.id, home, [m.SUBSCRIBE, home, items])
                case ev.Unsubscribe(home, ids):
                    self.world.post(self.id, home, [m.UNSUBSCRIBE, b"".join(ids)])
                case ev.Forget(party, ids):
                    self.world.post(self.id, party, [m.FORGET, b"".join(ids)])
                case ev.Pins(home, ids, more):
                    self.world.post(self.id, home, [m.PINS, b"".join(ids), more])
                case ev.Relay(home, message):
                    self.world.post(self.id, home, message)
                case ev.Pull():
                    self.pulls.append(instruction)
                case ev.CancelPull(id):
                    self.pulls = [pull for pull in self.pulls if pull.obj.id != id]
                case ev.Idle() | ev.Needed():
                    pass  # this store drops nothing
                case ev.Free(ids):
                    for id in ids:
                        self.store.pop(id, None)
                case ev.Stored(items):
                    for id, attempt, path, _size in items:
                        self.store[id] = self.world.written.pop(path)
                        self.attempts[id] = attempt
                case ev.Discard(paths):
                    for path in paths:
                        self.world.written.pop(path, None)
                case _:
                    raise AssertionError(f"unexpected {instruction}")
        self.resolver.validate()

    def value_of(self, dep: Any) -> bytes:
        """The bytes that a worker would see for an argument; they must be here."""
        end = self.resolver.resolve(dep)
        assert end.state == DONE
        return end.value if end.value is not None else self.store[end.id]

    def take(self, sender: bytes, message: list[Any]) -> None:
        """A message has arrived."""
        who = USER if sender == CLIENT else ev.Who(sender, "peer", b"p" * 40, "endpoint")
        now = self.world.now
        match message:
            case [m.SUBMIT, home, group, secret, opts, fns, tasks]:
                self.handle(ev.Submitted(who, home, group, secret, opts, fns, tasks, now, now))
            case [m.OFFER, home, group, secret, items]:
                self.handle(ev.Offered(who, home, group, secret, items, now))
            case [m.SUBSCRIBE, home, items]:
                self.handle(ev.Subscribed(who, home, items, now))
            case [m.UNSUBSCRIBE, joined]:
                self.handle(ev.Unsubscribed(who, split(joined)))
            case [m.FORGET, joined]:
                self.handle(ev.Forgotten(sender, split(joined)))
            case [m.OUTCOME, items]:
                self.handle(ev.Outcomes(sender, items, "direct"))

    def run(self, task: Task) -> None:
        """A worker runs the task to its end."""
        self.runnable.remove(task)
        task.state, task.worker, task.seq = DISPATCHED, 1, next(self.seq)
        self.runs[task.id] += 1
        status, value, refs = self.world.play(self, task)
        self.handle(
            ev.Finished("w", [[task.seq, task.id, task.attempt, status, value, 1.0, 0.1, refs, None]])
        )

    def cancel(self, task: Task) -> None:
        """The task has not begun, and will not."""
        if task in self.runnable:
            self.runnable.remove(task)
        self.handle(ev.Cancelled([task]))

    def finish_pull(self, pull: ev.Pull) -> None:
        """The bulk thread has brought the bytes."""
        self.pulls.remove(pull)
        if pull.source == CLIENT:
            self.store[pull.obj.id], self.attempts[pull.obj.id] = self.world.uploads[pull.obj.id], 1
            self.handle(ev.Pulled([(pull.obj.id, 1, {"direct": BIG}, None)]))
            return
        source = self.world.sites[pull.source]
        assert pull.obj.extra is not None
        reader = ev.Who(self.id, "peer", b"p" * 40, "endpoint")
        found = source.resolver.readable(pull.obj.id, reader, pull.obj.extra.token)
        self.store[pull.obj.id] = source.store[found.id]
        self.attempts[pull.obj.id] = pull.obj.attempt
        self.pulled[pull.obj.id] += 1
        self.handle(ev.Pulled([(pull.obj.id, pull.obj.attempt, {"direct": pull.obj.size}, None)]))


def split(joined: bytes) -> list[bytes]:
    """Ids out of their concatenation."""
    return [joined[at : at + 16] for at in range(0, len(joined), 16)]


class World:
    """Sites, a client, and the network between them."""

    def __init__(
        self,
        dice: random.Random,
        sites: int = 2,
        *,
        failing: float = 0.15,
        big: float = 0.3,
        alias: float = 0.1,
        put: float = 0.1,
        retries: int = 0,
        site: type[Site] = Site,
    ) -> None:
        self.dice = dice
        self.now = 1.0
        self.odds = (failing, big, alias, put)
        self.opts: dict[str, Any] = {"retries": retries} if retries else {}
        self.queues: dict[tuple[bytes, bytes], deque[list[Any]]] = defaultdict(deque)
        self.written: dict[str, bytes] = {}
        self.uploads: dict[bytes, bytes] = {}
        self.sites = {name: site(name, self) for name in (b"%c" % (65 + i) * 16 for i in range(sites))}
        self.home: dict[bytes, bytes] = {}
        self.deps: dict[bytes, list[bytes]] = {}
        self.fate: dict[bytes, tuple[str, Any]] = {}
        self.outcome: dict[bytes, tuple[int, Any]] = {}
        self.redirected: dict[bytes, list[bytes]] = defaultdict(list)  # target: futures that follow it
        self.released: set[bytes] = set()
        self.count = 0

    # ------------------------------------------------------------------------------------------- the network

    def post(self, sender: bytes, receiver: bytes, message: list[Any]) -> None:
        """Put a message on its way."""
        self.queues[sender, receiver].append(message)

    def deliver(self, sender: bytes, receiver: bytes) -> None:
        """The oldest message of this pair arrives."""
        message = self.queues[sender, receiver].popleft()
        if receiver == CLIENT:
            self.client_takes(sender, message)
        else:
            self.sites[receiver].take(sender, message)

    def steps(self) -> list[Any]:
        """Everything that could happen next."""
        found: list[Any] = [lambda p=pair: self.deliver(*p) for pair, queue in self.queues.items() if queue]
        for site in self.sites.values():
            found += [lambda s=site, t=task: s.run(t) for task in site.runnable[:3]]
            found += [
                lambda s=site, p=pull: s.finish_pull(p)
                for pull in site.pulls[:3]
                if pull.source == CLIENT or pull.obj.id in self.bytes_at(pull.source)
            ]
        return found

    def bytes_at(self, site: bytes) -> dict[bytes, bytes]:
        """Ids whose bytes that site can serve, aliases included."""
        there = self.sites[site]
        return {
            id: b""
            for id, obj in there.resolver.objects.items()
            if obj.state == DONE and there.resolver.resolve(obj).id in there.store
        }

    def step(self) -> bool:
        """One thing happens; False when nothing can."""
        steps = self.steps()
        if not steps:
            return False
        self.dice.choice(steps)()
        return True

    def drain(self) -> None:
        """Let everything happen."""
        for _ in range(100_000):
            if not self.step():
                return
        raise AssertionError("it never comes to rest")

    # -------------------------------------------------------------------------------------------- the client

    def submit(self) -> bytes:
        """The client submits a task, or puts a value, with dice-chosen home, arguments and fate."""
        dice = self.dice
        id, home = object_id(self.count), dice.choice(list(self.sites))
        self.count += 1
        failing, big, alias, put = self.odds
        if dice.random() < put:
            self.home[id], self.deps[id], self.fate[id] = home, [], ("put", None)
            large = dice.random() < big
            self.uploads[id] = id
            item = [id, BIG if large else len(id), None if large else id]
            self.post(CLIENT, home, [m.OFFER, home, GROUP, SECRET, [item]])
            return id
        known = list(self.home)
        deps = dice.sample(known, k=min(len(known), dice.choice((0, 0, 1, 1, 2, 3))))
        throw = dice.random()
        if throw < failing:
            self.fate[id] = ("fail", None)
        elif throw < failing + alias and known:
            self.fate[id] = ("alias", dice.choice(known))
        else:
            self.fate[id] = ("value", dice.random() < big)
        self.home[id], self.deps[id] = home, deps
        packed = b"".join(ref_to(dep, self.home[dep]) for dep in deps) or None
        self.post(
            CLIENT, home, [m.SUBMIT, home, GROUP, SECRET, self.opts, [], [[id, -1, b"p", packed, None, None]]]
        )
        return id

    def client_takes(self, sender: bytes, message: list[Any]) -> None:
        """The client hears of outcomes, and fetches what is large."""
        for id, status, value, _attempt, _record in message[1]:
            if status == m.PENDING or (status == m.STORED and id not in self.bytes_at(sender)):
                continue
            if status == m.ALIAS:
                if id in self.released:
                    continue
                target, home = value[:16], value[16:32]
                self.redirected[target].append(id)
                self.post(CLIENT, home, [m.SUBSCRIBE, home, [[target, value[32:], None, False]]])
                continue
            followers = self.redirected.pop(id, [])
            for done in [*([id] if id in self.fate else []), *followers]:
                self.outcome.setdefault(
                    done,
                    (
                        status,
                        value
                        if status != m.STORED
                        else self.sites[sender].store[
                            self.sites[sender].resolver.resolve(self.sites[sender].resolver.objects[id]).id
                        ],
                    ),
                )

    def release(self, ids: list[bytes]) -> None:
        """The client drops these futures."""
        self.released.update(ids)
        for id in ids:
            self.post(CLIENT, self.home[id], [m.UNSUBSCRIBE, id])

    # ------------------------------------------------------------------------------------------- the tasks

    def play(self, site: Site, task: Task) -> tuple[int, Any, bytes | None]:
        """What running the task gives: status, value, contained references."""
        fate, what = self.fate[task.id]
        values = [site.value_of(dep) for dep in task.deps]
        if fate == "fail":
            return m.FAILED, failures.make("raised", task.id.decode()), None
        if fate == "alias":
            return m.ALIAS, ref_to(what, self.home[what]), None
        value = task.id + b"".join(values)[:64]
        if what:
            path = f"/{task.id!r}"
            self.written[path] = value
            return m.STORED, [path, BIG], None
        return m.OK, value, None

    def expected(self, id: bytes) -> tuple[int, Any]:
        """What sequential evaluation gives."""
        memo: dict[bytes, tuple[int, Any]] = {}
        for each in sorted(self.fate):  # arguments and targets come before the tasks that use them
            deps = [memo[d] for d in self.deps[each]]
            fate, what = self.fate[each]
            if any(status == m.FAILED for status, _ in deps) or fate == "fail":
                memo[each] = (m.FAILED, None)
            elif fate == "alias":
                memo[each] = memo[what]
            else:
                memo[each] = (m.OK, each + b"".join(value for _, value in deps)[:64])
        return memo[id]
