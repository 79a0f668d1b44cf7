"""The resolver: turns "this task needs these objects" into subscriptions, pulls and runnable tasks.

It owns the table of everything that an endpoint knows: its own tasks and objects, and the objects of other homes that
tasks here need. It is a brain: `handle(event)` answers with instructions and does nothing else.

    SUBMIT ──► table ──► missing arguments? ──no──► Runnable ──► (dispatch, worker) ──► Finished ──► Notify subscribers
                              │yes                                                          │
                              ├─ ours: wait for its end  ◄─────────────────────────────────┘
                              └─ another home's: one Subscribe ──► Outcomes ──► small: here · large: one Pull ──► Pulled

Rules that hold after every event (`validate` checks them):

* one subscription and at most one pull for each object of another home, however many tasks want it;
* a task is runnable exactly when nothing is missing; a task with a failed argument never runs, and says which failed;
* an object is kept while a party pins it or something here holds it, and not longer;
* an outcome counts once: results of an old attempt, or for a task that has ended, are discarded.

Ends propagate by a work list, never by recursion; the cost of a task is linear in its own edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gcref.brains import recovery, snapshot
from gcref.brains import resolver_events as ev
from gcref.brains import resolver_facts as facts
from gcref.brains.elsewhere import Elsewhere
from gcref.brains.graph import REF_BYTES, Graph
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
    Options,
    Task,
)
from gcref.errors import ProtocolError
from gcref.objects import failure as failures
from gcref.objects.blob import refs_of
from gcref.wire import messages as m


class Resolver:
    """The decisions about one endpoint's tasks and objects.

    Args:
        me: the endpoint's id, 16 bytes.
        unknown_object_s: how long a subscription waits for an object that nobody has submitted, seconds.
        lease_s: how long released objects are remembered, seconds.

    Attributes:
        me: the endpoint's id.
        objects: everything known here, by id; for looking only.
        functions: digests of the functions whose bytes are here.
    """

    def __init__(self, me: bytes, *, unknown_object_s: float, lease_s: float) -> None:
        self.me = me
        self._graph = graph = Graph(me, unknown_object_s=unknown_object_s, lease_s=lease_s)
        self._elsewhere = elsewhere = Elsewhere(graph)
        self.objects = graph.objects
        self.counts = graph.counts
        self.functions = graph.functions
        self._recovery = losses = recovery.Recovery(graph, elsewhere)
        self.resolve = graph.resolve
        self.may_read = graph.may_read
        self.token_of = graph.token_of
        self.validate = graph.validate
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.Submitted: self._submitted,
            ev.FunctionsKnown: self._functions_known,
            ev.Offered: self._offered,
            ev.Subscribed: self._subscribed,
            ev.Unsubscribed: self._unsubscribed,
            ev.Attached: self._attached,
            ev.PartyGone: self._party_gone,
            ev.Finished: self._finished,
            ev.Ended: self._tasks_ended,
            ev.Cancelled: self._cancelled,
            ev.Forgotten: elsewhere.forgotten,
            ev.Outcomes: elsewhere.outcomes,
            ev.Pulled: elsewhere.pulled,
            ev.PullFailed: elsewhere.pull_failed,
            ev.Evicted: elsewhere.evicted,
            ev.HomeLost: elsewhere.home_lost,
            ev.PullWaits: elsewhere.pull_waits,
            ev.ArgumentGone: losses.argument_gone,
            ev.BytesLost: losses.bytes_lost,
            ev.HomeRestarted: losses.home_restarted,
            ev.Reclaimed: self._reclaimed,
            ev.Recovered: losses.recovered,
            ev.Tick: lambda event: graph.expire(event.now),
        }

    def handle(self, event: Any) -> list[ev.Instruction]:
        """Take one event (a batch) and say what to do about it."""
        self._handlers[type(event)](event)
        return self._graph.collect()

    def dump(self) -> Iterator[list[Any]]:
        """Everything that is known here, as rows of plain values; to be exhausted before the next event."""
        return snapshot.dump(self._graph)

    def load(self, rows: Iterable[list[Any]], now: float) -> None:
        """Take up what another resolver of this endpoint has dumped; before any event.

        Args:
            rows: of its `dump`, in their order.
            now: monotonic seconds; what is left of waiting times counts from here.

        Raises:
            ValueError: these rows are not of this version, or of another endpoint.
        """
        snapshot.load(self._graph, rows, now)

    def replay(self, event: Any) -> None:
        """Take an event that a process before this one took; what is to be done about it was its affair.

        Dispatch does not take part, so a result counts also for a task that nobody is seen to run.
        """
        if isinstance(event, ev.Finished):
            for _seq, id, attempt, *_ in event.results:
                task = self._graph.objects.get(id)
                if (
                    isinstance(task, Task)
                    and task.state in (WAITING, READY)
                    and task.attempt == attempt
                    and id not in self._graph.unknown
                    and not recovery.has_result(task)
                ):
                    task.state = DISPATCHED
        self.handle(event)

    def wanted_bytes(self) -> dict[bytes, tuple[int, int]]:
        """What is counted on to be in the store: id → (attempt, size in bytes)."""
        return recovery.wanted_bytes(self._graph)

    def parties(self) -> set[bytes]:
        """All parties that pin something."""
        sets = {obj.pins for obj in self._graph.objects.values()}
        return set().union(*sets)

    @property
    def deadline(self) -> float | None:
        """When `Tick` is due (monotonic seconds), or None."""
        return self._graph.deadline

    def readable(self, id: bytes, who: ev.Who, token: bytes | None) -> Obj:
        """The object for a FETCH; safe to call from the bulk thread (it only looks).

        Raises:
            LookupError: it is not here.
            PermissionError: the party may not read it.
        """
        obj = self._graph.objects.get(id)
        if obj is None or (obj.state != DONE and not (obj.extra and obj.extra.relay)):
            raise LookupError("no such object here")
        if not self._graph.may_read(obj, who, token):
            raise PermissionError("no right to read this object")
        return self._graph.resolve(obj)

    def explain(self, id: bytes, who: ev.Who, now: float) -> list[facts.Node]:
        """What may be told to `who` of an object and of what it waits for; see `resolver_facts`."""
        return facts.explain(self._graph, id, who, self.functions, now)

    def describe(self) -> dict[str, Any]:
        """The table at a glance, in plain values; bounded in time and size."""
        return facts.overview(self._graph)

    # -------------------------------------------------------------------------------------------------- submits

    def _group(self, group: bytes, secret: bytes, who: ev.Who) -> Group:
        known = self._graph.groups.get(group)
        if known is None or known.submitter != who.party:
            # The same group may be submitted to by a later process of its owner: what it adds is its own.
            if known is not None and known.owner == who.owner:
                secret = known.secret
            known = self._graph.groups[group] = Group(group, secret, who.party, who.owner)
        return known

    def _submitted(self, event: ev.Submitted) -> None:
        who = event.who
        group = self._group(event.group, event.secret, who)
        if event.home != self._graph.me:
            self._elsewhere.relay_submit(event, group)
            return
        self._graph.now = event.now
        opts = event.opts
        options = (
            Options(opts.get("retries", 0), opts.get("walltime_s"), opts.get("resources"))
            if opts
            else DEFAULT_OPTIONS
        )
        me, unix, fns, objects, ready = (
            self._graph.me,
            event.unix,
            event.fns,
            self._graph.objects,
            self._graph.ready,
        )
        unknown_fns = [fn for fn in fns if fn not in self.functions]
        plain = not unknown_fns and not options.resources
        count = 0
        young, old = self._graph.graves
        for id, fnx, payload, deps, passed, args, *_ in event.tasks:
            if id in young or id in old:
                self._released_already(id, group)
                continue
            task = Task(id, me, group, fns[fnx] if fnx >= 0 else None, payload, options, unix)
            known = objects.setdefault(id, task)
            if known is not task:
                adopted = self._adopt_placeholder(known, task)
                if adopted is None:
                    continue
                task = adopted
            count += 1
            if plain and deps is None and passed is None and args is None:
                task.state = READY
                ready.append(task)
            else:
                self._link(task, deps, passed, args, who)
        self._graph.counts["submitted"] += count
        if unknown_fns:
            self._graph.out.append(ev.NeedFunctions(who.party, unknown_fns))
        self._graph.settle()

    def _adopt_placeholder(self, known: Obj, task: Task) -> Task | None:
        """Fill in a task that was subscribed to before its SUBMIT came; None for a repeated SUBMIT."""
        assert task.group is not None
        if not isinstance(known, Task) or self._graph.unknown.pop(known.id, None) is None:
            self._known_already(known, task.group)
            return None
        for name in ("group", "fn", "payload", "options", "received_at"):
            setattr(known, name, getattr(task, name))
        self._graph.check_claims(known, task.pins)
        known.missing = 0
        return known

    def _known_already(self, known: Obj, group: Group) -> None:
        """A SUBMIT or OFFER comes once more, or its object was given up before it came: its sender hears how that stands."""
        self._graph.counts["duplicates"] += 1
        if known.group is None:
            known.group = group
        if known.group.owner == group.owner:
            known.pins |= group.only_submitter
            if known.state >= DONE:
                self._graph.tell(group.only_submitter, self._graph.item(known))

    def _released_already(self, id: bytes, group: Group) -> None:
        """It was given up before it came, and whoever waited for it has let go."""
        self._graph.counts["duplicates"] += 1
        self._graph.tell(group.only_submitter, self._graph.item(self._graph.released(id)))

    def _link(
        self, task: Task, deps: bytes | None, passed: bytes | None, args: list[Any] | None, who: ev.Who
    ) -> None:
        """Tie a new task to the objects that it needs."""
        if task.options.resources:
            keys = ", ".join(sorted(map(str, task.options.resources)))
            text = f"this endpoint's engine understands no resource_specification; remove it (given: {keys})"
            self._graph.fail(task, failures.make("RejectedError", text))
            return
        missing = 0
        if task.fn is not None and task.fn not in self.functions:
            self._graph.fn_waiters.setdefault(task.fn, []).append(task)
            missing += 1
        if passed is not None:
            task.passed = tuple(
                [self._graph.reference(passed, at, who) for at in range(0, len(passed), REF_BYTES)]
            )
        if deps is not None:
            task.deps = held = tuple(
                [self._graph.reference(deps, at, who) for at in range(0, len(deps), REF_BYTES)]
            )
            for dep in held:
                missing += self._graph.wait_for(task, dep)
        if args is not None:
            task.args = upload = Obj(args[0], self._graph.me, task.group, NOBODY)
            upload.size = args[1]
            upload.holds = 1
            upload.extra = Extra()
            upload.extra.pulling = True
            upload.waiters = [task]
            self._graph.objects[upload.id] = upload
            self._graph.out.append(ev.Pull(upload, who.party))
            missing += 1
        task.missing = missing
        if missing == 0:
            self._graph.runnable(task)

    def _functions_known(self, event: ev.FunctionsKnown) -> None:
        for digest in event.digests:
            self.functions.add(digest)
            for task in self._graph.fn_waiters.pop(digest, ()):
                self._graph.arrived(task)
        self._graph.settle()

    def _offered(self, event: ev.Offered) -> None:
        who = event.who
        self._graph.now = event.now
        group = self._group(event.group, event.secret, who)
        for id, size, blob, *_ in event.items:
            if event.home != self._graph.me:
                self._elsewhere.relay_offer(event, group, id, size, blob)
                continue
            if self._graph.is_grave(id):
                self._released_already(id, group)
                continue
            obj: Obj = Obj(id, self._graph.me, group, group.only_submitter)
            known = self._graph.objects.setdefault(id, obj)
            if known is not obj:
                if self._graph.unknown.pop(id, None) is None:
                    self._known_already(known, group)
                    continue
                obj = known
                obj.group = group
                obj.extra = obj.extra or Extra()
                obj.extra.put = True
                self._graph.check_claims(obj, group.only_submitter)
            obj.attempt = 1
            obj.size = size
            if blob is not None:
                self._graph.done(obj, blob, size, _refs_in(blob), who)
            else:
                obj.extra = obj.extra or Extra()
                obj.extra.pulling = True
                self._graph.out.append(ev.Pull(obj, who.party))
        self._graph.settle()

    # -------------------------------------------------------------------------------------------- subscriptions

    def _subscribed(self, event: ev.Subscribed) -> None:
        who, party = event.who, event.who.party
        self._graph.now = event.now
        told = self._graph.notify.setdefault(party, [])
        for id, token, have, confirm, *_ in event.items:
            obj = self._graph.objects.get(id)
            if event.home != self._graph.me:
                if obj is None:
                    obj = self._graph.objects[id] = Obj(id, event.home, None, NOBODY)
                    obj.extra = Extra(token or b"")
                if obj.extra is not None and not obj.extra.subscribed:
                    self._graph.subscribe_to(obj)
                self._graph.want(obj)
            elif obj is None:
                if self._graph.is_grave(id):
                    told.append(self._graph.item(self._graph.released(id)))
                    continue
                obj = self._graph.placeholder(id)
            if id in self._graph.unknown:
                obj.extra = obj.extra or Extra()
                obj.extra.claims = [*(obj.extra.claims or ()), (who, token or b"")]
                obj.pins |= {party}
                if confirm:
                    told.append(self._graph.item(obj))
                continue
            # What was never submitted has no owner, and no bytes: that it is cancelled, or lost, anybody may hear.
            if obj.group is not None and not self._graph.may_read(obj, who, token):
                told.append(
                    [id, m.FAILED, failures.make("AuthError", "no right to read this object"), 0, None]
                )
                continue
            obj.pins |= {party}
            if obj.extra is not None and obj.extra.cachers:
                obj.extra.cachers.discard(party)
            if (
                (obj.state >= DONE and have != obj.attempt)
                or confirm
                or (
                    obj.state < DONE
                    and obj.extra is not None
                    and obj.extra.target is not None
                    and obj.extra.target.home != self._graph.me
                )
            ):
                told.append(self._graph.item(obj))
        self._graph.settle()

    def _unsubscribed(self, event: ev.Unsubscribed) -> None:
        party, objects, endpoint = event.who.party, self._graph.objects, event.who.kind == "endpoint"
        only = None
        for id in event.ids:
            obj = objects.get(id)
            if obj is None:
                continue
            pins = obj.pins
            if len(pins) == 1 and party in pins:
                obj.pins = NOBODY
            elif party in pins:
                only = frozenset((party,)) if only is None else only
                obj.pins = pins - only
            else:
                continue
            if endpoint and (
                obj.state in (DONE, LOST) or obj.attempt > 1
            ):  # it may keep the bytes of some attempt
                obj.extra = obj.extra or Extra()
                obj.extra.cachers = (obj.extra.cachers or set()) | {party}
            if not obj.pins and obj.holds == 0:
                self._graph.garbage.append(obj)
        self._graph.settle()

    def _reclaimed(self, event: ev.Reclaimed) -> None:
        fallen = self._recovery.reclaimed(event)
        if fallen:
            self._unsubscribed(ev.Unsubscribed(event.who, fallen))

    def _attached(self, event: ev.Attached) -> None:
        who = event.who
        # Not by the group's name in the table: that is the latest submitter's, whose tasks may all be released.
        tasks = [task for task in self._graph.tasks_of(event.group) if self._graph.may_read(task, who, None)]
        secret = next((task.group.secret for task in tasks if task.group is not None), b"")
        told = [[task.id, STATE_NAMES[task.state]] for task in tasks]
        self._graph.out.append(ev.Tasks(who.party, event.group, secret, told))
        for task in tasks:  # pinned until it subscribes or lets go: a SUBSCRIBE is answered with the outcome
            task.pins |= {who.party}

    def _party_gone(self, event: ev.PartyGone) -> None:
        party = event.party
        self._graph.now = event.now
        only = frozenset((party,))
        for obj in self._graph.objects.values():
            if party in obj.pins:
                obj.pins -= only
                if not obj.pins and obj.holds == 0:
                    self._graph.garbage.append(obj)
            if obj.extra is not None and obj.extra.cachers:
                obj.extra.cachers.discard(party)
        self._elsewhere.submitter_gone(party)
        self._graph.settle()

    # -------------------------------------------------------------------------------------------- ends of tasks

    def _finished(self, event: ev.Finished) -> None:
        objects, notify, worker, ok = self._graph.objects, self._graph.notify, event.worker, m.OK
        stored: list[tuple[bytes, int, str, int]] = []
        done = 0
        for _seq, id, attempt, status, value, started, duration, refs, extra in event.results:
            task = objects.get(id)
            if task.__class__ is not Task or task.state != DISPATCHED or task.attempt != attempt:
                self._graph.counts["stale"] += 1
                if status == m.STORED:
                    self._graph.out.append(ev.Discard([value[0]]))
                continue
            if extra is None and not task.deps:
                record = [task.received_at, started, started + duration, worker, attempt, None, None, None]
            else:
                out, err = extra or (None, None)
                moved = self._moved_for(task)
                record = [task.received_at, started, started + duration, worker, attempt, moved, out, err]
            task.record = record
            if status == ok and refs is None:
                # The common way, without a call: a small value to its subscribers, waiting tasks go on.
                done += 1
                task.state = DONE
                task.value = value
                task.size = len(value)
                item = [id, ok, value, attempt, record]
                pins = task.pins
                if task.waiters is None and len(pins) < 2:
                    for party in pins:
                        told = notify.get(party)
                        if told is None:
                            notify[party] = [item]
                        else:
                            told.append(item)
                else:
                    self._tell_users_first(task, item)
                if task.waiters is not None or task.extra is not None:
                    self._graph.wake(task)
                if task.deps or task.passed or task.args is not None:
                    self._graph.let_go(task)
                task.payload = None
                if not pins and task.holds == 0:
                    self._graph.garbage.append(task)
                continue
            if status == m.STORED:
                stored.append((id, attempt, value[0], value[1]))
            self._take_result(task, status, value, refs)
        self._graph.counts["done"] += done
        if stored:
            self._graph.out.append(ev.Stored(stored))
        self._graph.settle()

    def _tell_users_first(self, task: Task, item: list[Any]) -> None:
        """Tell of a result that goes on to other tasks: the sites that need it at once, its submitter when it suits."""
        submitter = task.group.submitter if task.group is not None else b""
        for party in task.pins:
            told = self._graph.notify_later if party == submitter else self._graph.notify
            told.setdefault(party, []).append(item)

    def _moved_for(self, task: Task) -> dict[str, int] | None:
        """Bytes that came here from other homes for this task, by carrier; each object is counted once."""
        moved: dict[str, int] | None = None
        for dep in task.deps:
            end = self._graph.resolve(dep)
            if end.extra is not None and end.extra.moved is not None:
                moved = moved or {}
                for carrier, size in end.extra.moved.items():
                    moved[carrier] = moved.get(carrier, 0) + size
                end.extra.moved = None
        return moved

    def _take_result(self, task: Task, status: int, value: Any, refs: bytes | None) -> None:
        task.state = WAITING  # dispatch hears of it by itself: nothing to withdraw
        if status == m.FAILED:
            self._graph.end(task, FAILED, None, 0, value)
        elif status == m.ALIAS:
            task.missing += 1  # the target; it never becomes runnable again
            self._graph.alias(task, value)
        else:
            inline = value if status == m.OK else None
            size = len(value) if status == m.OK else value[1]
            task.missing += 1  # until its outcome is told; it never becomes runnable again
            owner = task.group.owner if task.group is not None else b""
            self._graph.done(task, inline, size, refs, ev.Who(b"", "worker", owner, "client"))

    def _tasks_ended(self, event: ev.Ended) -> None:
        for task in event.tasks:
            if task.state >= DONE or self._graph.objects.get(task.id) is not task:
                continue
            task.state = WAITING
            if event.retry and task.attempt <= task.options.retries:
                recovery.note_failed_attempt(task, event.failure)
                task.attempt += 1
                if task.missing == 0:  # else it was sent ahead of an argument, and waits for that again
                    self._graph.runnable(task)
            else:
                self._graph.end(task, FAILED, None, 0, event.failure)
        self._graph.settle()

    def _cancelled(self, event: ev.Cancelled) -> None:
        for task in event.tasks:
            if task.state < DONE:
                self._graph.unknown.pop(task.id, None)  # its submitter will not send it
                task.state = WAITING
                self._graph.end(task, CANCELLED, None, 0, failures.cancelled())
        self._graph.settle()


def _refs_in(blob: bytes) -> bytes | None:
    """The references in an uploaded blob; one that is damaged is the affair of whoever reads it."""
    try:
        return refs_of(blob)
    except ProtocolError:
        return None
