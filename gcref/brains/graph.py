"""The graph: everything that an endpoint knows of objects and tasks, and how ends and releases travel through it.

    end ──► subscribers are told ──► waiting tasks go on (or fail) ──► aliases end ──► arguments are let go ──► garbage

The resolver and its helper for other homes change the graph through the verbs here (`reference`, `wait_for`, `end`,
`alias`, `drop`, …) and finish each event with `settle`, which carries what has ended and what nobody wants any more to its
neighbours. Ends and releases are work lists, never recursion, so a chain or a fan of any length takes linear time.

What an event brings about is collected (`out`, `ready`, `notify`, …) and turned into instructions by `collect`.
"""

from __future__ import annotations

from collections.abc import Iterable
from hmac import compare_digest
from typing import Any, Final
from weakref import WeakValueDictionary

from gcref.brains import resolver_events as ev
from gcref.brains.tasks import (
    CANCELLED,
    DEFAULT_OPTIONS,
    DISPATCHED,
    DONE,
    FAILED,
    LOST,
    NOBODY,
    READY,
    STATE_NAMES,
    WAITING,
    Extra,
    Group,
    Obj,
    Task,
    is_task,
)
from gcref.errors import LostReason
from gcref.objects import failure as failures
from gcref.objects.ref import read_token
from gcref.wire import messages as m

REF_BYTES: Final = 48
UNCLAIMED: Final = Group(b"", b"", b"", b"")  # of a task whose SUBMIT has not come
TOMBSTONES_MAX: Final = (
    500_000  # in each of two generations: older releases are then answered "never submitted"
)


class Graph:
    """The table of objects, its invariants, and what the current event has brought about.

    Args:
        me: the endpoint's id, 16 bytes.
        unknown_object_s: how long a subscription waits for an object that nobody has submitted, seconds.
        lease_s: how long released objects are remembered, seconds.
    """

    def __init__(self, me: bytes, *, unknown_object_s: float, lease_s: float) -> None:
        self.me = me
        self.now = 0.0
        self.objects: dict[bytes, Obj] = {}
        self.groups: WeakValueDictionary[bytes, Group] = WeakValueDictionary()  # kept by their tasks
        self.counts = dict.fromkeys(
            ("submitted", "done", "failed", "cancelled", "lost", "duplicates", "stale"), 0
        )
        self.unknown: dict[bytes, float] = {}  # placeholders by deadline, oldest first
        self.functions: set[bytes] = set()  # digests of those whose bytes are here
        self.fn_waiters: dict[bytes, list[Task]] = {}
        self.homes: set[bytes] = set()  # other endpoints that may know pins of ours
        self.reclaims: dict[bytes, set[bytes]] = {}  # what a restarted endpoint has said so far that it pins
        self._unknown_object_s = unknown_object_s
        self._lease_s = lease_s
        self.graves: tuple[dict[bytes, None], dict[bytes, None]] = ({}, {})
        self.graves_turn_at: float | None = None
        # What one event has brought about.
        self.out: list[ev.Instruction] = []
        self.ready: list[Task] = []
        self.withdraws: list[Task] = []
        self.notify: dict[bytes, list[Any]] = {}
        self.notify_later: dict[bytes, list[Any]] = {}
        self.subscribes: dict[bytes, list[Any]] = {}
        self.unsubscribes: dict[bytes, list[bytes]] = {}
        self.forgets: dict[bytes, list[bytes]] = {}
        self.frees: list[bytes] = []
        self.garbage: list[Obj] = []
        self._ended: list[Obj] = []

    # -------------------------------------------------------------------------------------------------- looking

    @property
    def deadline(self) -> float | None:
        """When `expire` is due (monotonic seconds), or None."""
        first = next(iter(self.unknown.values()), None)
        turn = self.graves_turn_at
        if first is None or turn is None:
            return turn if first is None else first
        return min(first, turn)

    @staticmethod
    def resolve(obj: Obj) -> Obj:
        """The object that `obj` is, in the end, an alias of; itself, when it is none."""
        while (extra := obj.extra) is not None and extra.target is not None:
            obj = extra.target
        return obj

    @staticmethod
    def lies_in_store(obj: Obj) -> bool:
        """Whether the value of `obj` is bytes of its own in the store."""
        return obj.state == DONE and obj.value is None and (obj.extra is None or obj.extra.target is None)

    def may_read(self, obj: Obj, who: ev.Who, token: bytes | None) -> bool:
        """Whether the party may see the object: its owner, a task here, or the holder of its read token."""
        group = obj.group
        if who.role == "worker" or (group is not None and who.role == "user" and group.owner == who.owner):
            return True
        return (
            bool(token)
            and group is not None
            and compare_digest(token or b"", read_token(group.secret, obj.id))
        )

    def token_of(self, obj: Obj) -> bytes:
        """The read token of an object whose group is known here."""
        return read_token(obj.group.secret, obj.id) if obj.group is not None else bytes(16)

    def tasks_of(self, group: bytes) -> list[Task]:
        """All tasks of a task group that are still known here."""
        return [
            o for o in self.objects.values() if is_task(o) and o.group is not None and o.group.id == group
        ]

    def item(self, obj: Obj) -> list[Any]:
        """The OUTCOME item that tells a subscriber how `obj` stands."""
        state = obj.state
        if state == DONE:
            if obj.value is not None:
                return [obj.id, m.OK, obj.value, obj.attempt, obj.record]
            if obj.extra is not None and obj.extra.target is not None:
                return [obj.id, m.ALIAS, self._packed(obj.extra.target), obj.attempt, obj.record]
            return [obj.id, m.STORED, obj.size, obj.attempt, obj.record]
        if state == FAILED:
            return [obj.id, m.FAILED, obj.failure, obj.attempt, obj.record]
        if state == CANCELLED:
            return [obj.id, m.CANCELLED_STATUS, None, obj.attempt, obj.record]
        if state == LOST:
            fields = (obj.failure or ["", "", {}])[2]
            return [
                obj.id,
                m.LOST,
                [fields.get("reason", "bytes_lost"), (obj.failure or ["", ""])[1]],
                obj.attempt,
                None,
            ]
        if obj.extra is not None and obj.extra.target is not None and obj.extra.target.home != self.me:
            return [obj.id, m.ALIAS, self._packed(obj.extra.target), obj.attempt, None]
        return [obj.id, m.PENDING, None, obj.attempt, None]

    # ----------------------------------------------------------------------------------------------- references

    def reference(self, refs: bytes, at: int, who: ev.Who) -> Obj:
        """The object that the packed reference at offset `at` names, held once more."""
        id, home, token = refs[at : at + 16], refs[at + 16 : at + 32], refs[at + 32 : at + 48]
        obj = self.objects.get(id)
        if home == self.me:
            if obj is None:
                obj = self.released(id) if self.is_grave(id) else self.placeholder(id)
            elif obj.group is not None and not self.may_read(obj, who, token):
                obj = Obj(id, home, None, NOBODY)
                obj.state = FAILED
                obj.failure = failures.make("AuthError", "the submitter has no right to read this argument")
        elif obj is None:
            obj = self.objects[id] = Obj(id, home, None, NOBODY)
            obj.extra = Extra(token)
            self.subscribe_to(obj)
        elif obj.extra is not None and not obj.extra.subscribed:
            self.subscribe_to(obj)
            if obj.state == DONE and obj.value is None:
                self.out.append(ev.Needed([id]))
        obj.holds += 1
        return obj

    def placeholder(self, id: bytes) -> Task:
        """Make room for one of our objects that somebody asks for before its SUBMIT came."""
        task = Task(id, self.me, UNCLAIMED, None, None, DEFAULT_OPTIONS, 0.0)
        task.group = None
        task.pins = NOBODY
        task.missing = 1  # its SUBMIT
        self.objects[id] = task
        self.unknown[id] = self.now + self._unknown_object_s
        return task

    def released(self, id: bytes) -> Obj:
        """What stands for an object that was released: lost, and why."""
        obj = Obj(id, self.me, None, NOBODY)
        obj.state = LOST
        obj.failure = failures.make(
            "ObjectLostError", "the object was released", reason=LostReason.RELEASED.value
        )
        return obj

    def check_claims(self, obj: Obj, owner_pins: frozenset[bytes]) -> None:
        """Now that the owner is known, keep only those early subscribers who prove their right, of those that still want it."""
        extra = obj.extra
        wanted_by, obj.pins = obj.pins, owner_pins
        group = obj.group
        if extra is None or extra.claims is None or group is None:
            return
        claims, extra.claims = extra.claims, None
        for who, token in claims:
            if who.party not in wanted_by:
                continue
            if self.may_read(obj, who, token):
                obj.pins |= {who.party}
            else:
                self.tell(
                    (who.party,),
                    [obj.id, m.FAILED, failures.make("AuthError", "no right to read this object"), 0, None],
                )

    def subscribe_to(self, obj: Obj, confirm: bool = False) -> None:
        """Order a SUBSCRIBE to the home of `obj`; with `confirm`, its answer is wanted even while the object is pending."""
        extra = obj.extra
        assert extra is not None
        extra.subscribed = True
        self.homes.add(obj.home)
        have = obj.attempt if obj.state == DONE else None
        self.subscribes.setdefault(obj.home, []).append([obj.id, extra.token or None, have, confirm])

    def pin_confirmed(self, obj: Obj) -> None:
        """Results that contain a reference to `obj` may be told now."""
        assert obj.extra is not None
        awaited_by, obj.extra.awaited_by = obj.extra.awaited_by, None
        for holder in awaited_by or ():
            extra = holder.extra
            assert extra is not None
            extra.unconfirmed -= 1
            if extra.unconfirmed == 0 and extra.deferred is not None and holder.state < DONE:
                (state, value, size), extra.deferred = extra.deferred, None
                self.end(holder, state, value, size)

    # -------------------------------------------------------------------------------------------------- waiting

    def wait_for(self, task: Task, dep: Obj) -> int:
        """Make `task` wait for `dep` if it must: 1, else 0."""
        end = self.resolve(dep)
        if end.state >= DONE:
            if end.state != DONE:
                task.broken = True
            return 0
        if end.waiters is None:
            end.waiters = [task]
        else:
            end.waiters.append(task)
        self.want(end)
        return 1

    def want(self, obj: Obj) -> None:
        """Somebody here needs the bytes of another home's object."""
        extra = obj.extra
        if extra is not None and extra.at_home and not extra.pulling:
            extra.pulling = True
            self.out.append(ev.Pull(obj, obj.home))

    def arrived(self, task: Task) -> None:
        """One of the things that `task` misses is here, or will never be."""
        task.missing -= 1
        if task.missing == 0:
            self._arrived_last(task)

    def _arrived_last(self, task: Task) -> None:
        if task.state == WAITING:
            self.runnable(task)
        elif task.state == DISPATCHED and task.broken:
            self.fail_dependent(task)

    def runnable(self, task: Task) -> None:
        """Nothing is missing any more: hand the task to dispatch, or fail it for its failed arguments."""
        if task.broken:
            self.fail_dependent(task)
        else:
            task.state = READY
            self.ready.append(task)

    # ----------------------------------------------------------------------------------------------------- ends

    def end(
        self, obj: Obj, state: int, value: bytes | None, size: int, failure: list[Any] | None = None
    ) -> None:
        """Set the end of an object; `_settle` lets the others know."""
        was = obj.state
        obj.state = state
        obj.value = value
        obj.size = size
        obj.failure = failure
        if was in (READY, DISPATCHED) and state != DONE and isinstance(obj, Task):
            self.withdraws.append(obj)
        if obj.home == self.me and is_task(obj):
            self.counts[STATE_NAMES[state]] += 1
        self._ended.append(obj)

    def done(self, obj: Obj, value: bytes | None, size: int, refs: bytes | None, who: ev.Who) -> None:
        """End an object that has its value, once the references inside it are pinned.

        Args:
            value: the blob, or None when it lies in the store.
            size: of the blob, bytes.
            refs: 48 bytes for each reference in it.
            who: by whose rights they are pinned.
        """
        if refs and self._pin_contained(obj, refs, who):
            assert obj.extra is not None
            obj.extra.deferred = (DONE, value, size)
        else:
            self.end(obj, DONE, value, size)

    def _pin_contained(self, obj: Obj, refs: bytes, who: ev.Who) -> bool:
        """Pin the references inside a blob; True when its outcome must wait for their homes to confirm."""
        obj.refs = refs
        extra = obj.extra = obj.extra or Extra()
        for at in range(0, len(refs), REF_BYTES):
            new = refs[at : at + 16] not in self.objects
            inner = self.reference(refs, at, who)
            known = inner.extra is None or inner.extra.confirmed or inner.state >= DONE
            if inner.home == self.me or inner.extra is None or known:
                continue
            if new:
                self.subscribes[inner.home][-1][3] = True
            else:
                self.subscribe_to(inner, confirm=True)
            inner.extra.awaited_by = [*(inner.extra.awaited_by or ()), obj]
            extra.unconfirmed += 1
        return extra.unconfirmed > 0

    def fail(self, task: Obj, failure: list[Any]) -> None:
        """End an object with a failure."""
        self.end(task, FAILED, None, 0, failure)

    def fail_dependent(self, task: Task) -> None:
        """End a task whose arguments cannot be had."""
        bad = [dep for dep in task.deps if self.resolve(dep).state > DONE]
        if not bad:  # its own large arguments did not come through: no other task is to blame
            assert task.args is not None
            self.fail(task, task.args.failure or failures.make("GcrefError", "an argument was lost"))
            return
        cause = self.resolve(bad[0]).failure or failures.make("GcrefError", "an argument was lost")
        self.end(task, FAILED, None, 0, failures.dependency([b.id for b in bad], cause))

    def settle(self) -> None:
        """Carry ends and releases through the graph, by work lists."""
        ended, garbage = self._ended, self.garbage
        while ended or garbage:
            if ended:
                obj = ended.pop()
                target = obj.extra.target if obj.extra is not None else None
                if (
                    target is None or obj.home == self.me or target.home == self.me
                ):  # else they were sent to it
                    self.tell(obj.pins, self.item(obj))
                self.wake(obj)
                if isinstance(obj, Task):
                    if not self.may_run_again(obj):
                        self.let_go(obj)
                        obj.payload = None
                elif obj.extra is not None and isinstance(
                    obj.extra.deferred, Obj
                ):  # a relayed task's argument blob
                    self.drop(obj.extra.deferred)
                    obj.extra.deferred = None
                if not obj.pins and obj.holds == 0:
                    garbage.append(obj)
            else:
                self._collect_garbage(garbage.pop())

    def tell(self, parties: Iterable[bytes], item: list[Any]) -> None:
        """Tell parties of an outcome."""
        for party in parties:
            self.notify.setdefault(party, []).append(item)

    def wake(self, obj: Obj) -> None:
        """An object has ended: its waiting tasks and its aliases go on."""
        waiters = obj.waiters
        if waiters is not None:
            obj.waiters = None
            broken = obj.state != DONE
            for task in waiters:
                task.missing -= 1
                if broken:
                    task.broken = True
                if task.missing == 0:
                    self._arrived_last(task)
        extra = obj.extra
        if extra is not None and extra.aliases:
            for alias in extra.aliases:
                if alias.state < DONE:
                    self._end_alias(alias, obj)

    def let_go(self, task: Task) -> None:
        """A task that has ended needs its arguments no more."""
        for dep in task.deps:
            self.drop(dep)
        for dep in task.passed:
            self.drop(dep)
        if task.args is not None:
            self.drop(task.args)
        task.deps = task.passed = ()
        task.args = None

    @staticmethod
    def may_run_again(task: Task) -> bool:
        """Whether a task that has ended keeps what is needed to run it: its bytes could be lost, and it has a retry left."""
        return task.attempt <= task.options.retries and Graph.lies_in_store(task)

    def drop(self, obj: Obj) -> None:
        """Hold `obj` once less."""
        obj.holds -= 1
        if obj.holds == 0 and not obj.pins:
            self.garbage.append(obj)

    # -------------------------------------------------------------------------------------------------- aliases

    def _packed(self, target: Obj) -> bytes:
        """The reference that subscribers of an alias are sent to. Not before it is told: a target's SUBMIT may come late."""
        token = (
            target.extra.token
            if target.extra is not None and target.home != self.me
            else self.token_of(target)
        )
        return target.id + target.home + token

    def alias(self, obj: Obj, ref: bytes) -> None:
        """`obj` is whatever the reference is: subscribers are redirected, chains collapse, a cycle fails."""
        group = obj.group
        who = ev.Who(b"", "worker", group.owner if group is not None else b"", "client")
        target = self.reference(ref, 0, who)
        end = self.resolve(target)
        if end is obj:
            self.drop(target)
            self.fail(
                obj, failures.make("DeadlockError", "a task returned a future that waits for the task itself")
            )
            return
        if end is not target:
            end.holds += 1
            self.drop(target)
        obj.extra = obj.extra or Extra()
        end.extra = end.extra or Extra()
        followers = [obj, *(obj.extra.aliases or ())]
        obj.extra.aliases = None
        end.extra.aliases = end.extra.aliases or []
        end.extra.aliases.extend(followers)
        for follower in followers:
            assert follower.extra is not None
            if follower is not obj:
                obj.holds -= 1
                end.holds += 1
            follower.extra.target = end
            if end.home != self.me and end.state < DONE:
                self.tell(follower.pins, self.item(follower))
        if not obj.pins and obj.holds == 0:
            self.garbage.append(obj)  # only its followers held it
        if end.extra.at_home:
            self.end_aliases_of(end)
        waiters, obj.waiters = obj.waiters, None
        if end.state >= DONE:
            for task in waiters or ():
                task.broken = task.broken or end.state != DONE
                self.arrived(task)
            for follower in followers:
                if follower.state < DONE:
                    self._end_alias(follower, end, redirected=False)
            return
        if waiters:
            end.waiters = [*(end.waiters or ()), *waiters]
        if waiters or any(f.pins for f in followers if f.home != self.me):
            self.want(end)

    def _end_alias(self, alias: Obj, end: Obj, redirected: bool = True) -> None:
        """The target of `alias` has ended; `redirected`: the subscribers of `alias` were sent to it already."""
        if (
            alias.home != self.me
            or end.home == self.me
            or end.state > DONE
            or (end.value is not None and not redirected)
        ):
            self.end(alias, end.state, end.value, end.size, end.failure)
            if not redirected and alias.home != self.me and end.home != self.me:
                self.tell(alias.pins, self.item(alias))
            return
        alias.state = DONE
        if not redirected:
            self.tell(alias.pins, self.item(alias))
        if isinstance(alias, Task):
            self.counts["done"] += 1
            self.let_go(alias)
            alias.payload = None
        if not alias.pins and alias.holds == 0:
            self.garbage.append(alias)

    def end_aliases_of(self, end: Obj) -> None:
        """`end` is done at its home, so our aliases of it are done, wherever its bytes are."""
        for alias in (end.extra.aliases if end.extra is not None else None) or ():
            if alias.home == self.me and alias.state < DONE:
                self._end_alias(alias, end)

    # -------------------------------------------------------------------------------------------------- release

    def _collect_garbage(self, obj: Obj) -> None:
        """Nobody pins or holds `obj`: let it go, unless it is still being made."""
        if obj.pins or obj.holds or self.objects.get(obj.id) is not obj:
            return
        if obj.home == self.me:
            if obj.state >= DONE:
                self.delete(obj)
                self._bury(obj.id)
            elif obj.id in self.unknown:
                del self.unknown[obj.id]
                del self.objects[obj.id]
            elif not is_task(obj):  # an upload that nobody wants any more
                self.out.append(ev.CancelPull(obj.id))
                del self.objects[obj.id]
            return
        extra = obj.extra
        if obj.state < DONE and extra is not None and (extra.unsaid or isinstance(extra.deferred, Obj)):
            return  # a task of ours for another home runs though nobody waits for it: until its outcome it stays
        if extra is not None and extra.subscribed:
            extra.subscribed = extra.confirmed = False
            self.unsubscribes.setdefault(obj.home, []).append(obj.id)
            if obj.state == DONE and obj.value is None and extra.target is None:
                self.out.append(ev.Idle([obj.id]))
        if obj.state != DONE or (extra is not None and extra.target is not None):
            if extra is not None and extra.pulling:
                self.out.append(ev.CancelPull(obj.id))
                self.frees.append(obj.id)  # bytes of an earlier attempt, if there are any
            self.delete(obj)

    def delete(self, obj: Obj) -> None:
        """Take an object out of the table, with its bytes and what it held."""
        self.objects.pop(obj.id, None)
        extra = obj.extra
        stored = obj.state == DONE and obj.value is None and (extra is None or extra.target is None)
        if stored:  # as `lies_in_store`, without a call
            self.frees.append(obj.id)
            if isinstance(obj, Task):
                self.let_go(obj)  # what it kept to run again
        if extra is not None:
            if extra.target is not None:
                target_extra = extra.target.extra
                if target_extra is not None and target_extra.aliases and obj in target_extra.aliases:
                    target_extra.aliases.remove(obj)
                self.drop(extra.target)
            for party in extra.cachers or ():
                self.forgets.setdefault(party, []).append(obj.id)
        for at in range(0, len(obj.refs), REF_BYTES):
            inner = self.objects.get(obj.refs[at : at + 16])
            if inner is not None:
                self.drop(inner)

    def is_grave(self, id: bytes) -> bool:
        """Whether an object of that id was released here not long ago."""
        return id in self.graves[0] or id in self.graves[1]

    def _bury(self, id: bytes) -> None:
        young, _old = self.graves
        young[id] = None
        if self.graves_turn_at is None:
            self.graves_turn_at = self.now + self._lease_s
        if len(young) > TOMBSTONES_MAX:
            self.graves = ({}, young)

    def expire(self, now: float) -> None:
        """Time has passed: give up what nobody submitted, forget old releases."""
        self.now = now
        for id, deadline in list(self.unknown.items()):
            if deadline > now:
                break
            del self.unknown[id]
            text = f"nobody submitted this object within {self._unknown_object_s:g} s"
            reason = LostReason.NEVER_SUBMITTED.value
            self.end(self.objects[id], LOST, None, 0, failures.make("ObjectLostError", text, reason=reason))
        if self.graves_turn_at is not None and now >= self.graves_turn_at:
            self.graves = ({}, self.graves[0])
            self.graves_turn_at = now + self._lease_s if self.graves[1] else None
        self.settle()

    # --------------------------------------------------------------------------------------------- instructions

    def collect(self) -> list[ev.Instruction]:
        """The instructions for what the event has brought about; starts afresh."""
        out, self.out = self.out, []
        if self.withdraws:
            out.append(ev.Withdraw(self.withdraws))
            self.withdraws = []
            self.ready = [task for task in self.ready if task.state == READY]
        if self.ready:
            out.append(ev.Runnable(self.ready))
            self.ready = []
        if self.notify:
            out.extend([ev.Notify(party, items) for party, items in self.notify.items() if items])
            self.notify = {}
        if self.notify_later:
            out.extend([ev.NotifyLater(party, items) for party, items in self.notify_later.items()])
            self.notify_later = {}
        if self.subscribes:
            out.extend([ev.Subscribe(home, items) for home, items in self.subscribes.items()])
            self.subscribes = {}
        if self.unsubscribes:
            out.extend([ev.Unsubscribe(home, ids) for home, ids in self.unsubscribes.items()])
            self.unsubscribes = {}
        if self.forgets:
            out.extend([ev.Forget(party, ids) for party, ids in self.forgets.items()])
            self.forgets = {}
        if self.frees:
            out.append(ev.Free(self.frees))
            self.frees = []
        return out

    def validate(self) -> None:
        """Check the rules of the table; for tests."""
        holds: dict[int, int] = {}
        for obj in self.objects.values():
            held: list[Obj] = []
            if isinstance(obj, Task):
                held += [*obj.deps, *obj.passed] + ([obj.args] if obj.args is not None else [])
                if obj.state == READY:
                    assert obj.missing == 0, "a runnable task misses nothing"
            if obj.extra is not None and obj.extra.target is not None:
                held.append(obj.extra.target)
            if obj.extra is not None and isinstance(obj.extra.deferred, Obj):
                held.append(obj.extra.deferred)
            held += [
                self.objects[obj.refs[at : at + 16]]
                for at in range(0, len(obj.refs), REF_BYTES)
                if obj.refs[at : at + 16] in self.objects
            ]
            for h in held:
                holds[id(h)] = holds.get(id(h), 0) + 1
            assert obj.waiters is None or obj.state < DONE, "an ended object has no waiters"
        for obj in self.objects.values():
            assert obj.holds == holds.get(id(obj), 0), f"holds of {obj.id.hex()}: {obj.holds}"
            if obj.home == self.me and obj.state >= DONE:
                assert obj.pins or obj.holds, "an ended object that nobody wants is released"
