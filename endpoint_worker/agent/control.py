"""The agent's control loop: one thread that owns the sockets and drives the brains.

    carrier.poll ─► Peers (sessions) ─► Resolver ─► Dispatch ─► worker channel
         ▲              │                  │  ▲                      │
         └── Transmit ◄─┴──── Notify ◄─────┘  └──── Finished ◄───────┘
                                           └─ Pull ─► bulk thread ─► Pulled

Each turn of the loop waits once, takes everything that is ready, lets the brains decide, and flushes once: one packet per
peer, one write to the journal. Nothing in it waits for a party or a disk; bytes of large objects go through the bulk
thread. What a brain says is obeyed by the table in `_obey`; the loop itself decides nothing.
"""

from __future__ import annotations

import logging
import math
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from endpoint_worker.agent import inbox
from endpoint_worker.agent.cancels import Cancels
from endpoint_worker.agent.dump import Dump
from endpoint_worker.agent.entries import ArgumentGone, Entries, Entry
from endpoint_worker.agent.functions import Functions
from endpoint_worker.agent.guests import Guests
from endpoint_worker.agent.hub_link import HubLink
from endpoint_worker.agent.losses import pull_failure, unread_arguments, worker_lost
from endpoint_worker.agent.memory import Memory
from endpoint_worker.agent.neighbours import KeyRing, Neighbours
from endpoint_worker.agent.outbox import Outbox
from endpoint_worker.agent.pool import Message, Pool
from endpoint_worker.agent.presence import Presence
from endpoint_worker.agent.reaching import Reaching
from endpoint_worker.agent.recovery import TakenUp
from endpoint_worker.agent.room import Room
from endpoint_worker.agent.task_news import TaskNews
from endpoint_worker.agent.telling import Teller
from endpoint_worker.agent.trials import Trials
from endpoint_worker.store import Store
from endpoint_worker.worker import channel
from endpoint_worker.worker.zygote import Exited, Spawned
from gcref import ids
from gcref.brains import dispatch_events as dp
from gcref.brains import peers_events as pe
from gcref.brains import resolver_events as ev
from gcref.brains.dispatch import Dispatch
from gcref.brains.peers import Peers
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import Obj, Task
from gcref.carriers.base import Carrier, FdReady
from gcref.carriers.bulk.ports import Pulled, PullFailed
from gcref.carriers.bulk.thread import BulkThread
from gcref.errors import LostError, ProtocolError
from gcref.objects import blob
from gcref.objects import failure as failures
from gcref.wire import codec
from gcref.wire import messages as m

log = logging.getLogger("gcref.agent")

NOTIFY_LATER_S: Final = 0.002  # how long outcomes wait for company that only their submitter has not heard of
RELEASE_LATER_S: Final = 0.02  # how long it waits for company that objects are let go
_SOURCE_LOST: Final = ("not_found", "source")  # a pull failed so: its home has a remedy
STOP_WORKERS_S: Final = 5.0  # how long a stop waits for the news that the workers are dead
OUTCOME_ITEMS_MAX: Final = 256  # in one message: 256 inline values of 100 KiB stay below the message limit


class Control:
    """The agent's parts, wired together; `run` is the loop.

    Args:
        me: the endpoint's id.
        name: its name, for records and errors.
        carrier: the sockets of the control messages.
        peers: the sessions.
        resolver, dispatch: the brains of the graph and of the workers.
        pool: the workers.
        store: the bytes.
        bulk: the thread that moves bytes.
        neighbours: finds other endpoints.
        allowed: whose keys may come in over TCP.
        functions: the functions that it knows.
        memory: where events are written down before they count.
        hub: the line to the hub; None: there is none.
        endpoint_lost_s: how long another endpoint may be away before it is given up, seconds.
        lease_s: how long an absent client keeps its pins, seconds.
        store_wait_s: how long results and pulls wait for room in a full store, seconds.
    """

    def __init__(
        self,
        *,
        me: bytes,
        name: str,
        carrier: Carrier,
        peers: Peers,
        resolver: Resolver,
        dispatch: Dispatch,
        pool: Pool,
        store: Store,
        bulk: BulkThread,
        neighbours: Neighbours,
        allowed: KeyRing,
        functions: Functions,
        memory: Memory,
        hub: HubLink | None = None,
        endpoint_lost_s: float,
        lease_s: float,
        store_wait_s: float,
    ) -> None:
        self.me = me
        self.name = name
        self._carrier = carrier
        self._peers = peers
        self._resolver = resolver
        self._dispatch = dispatch
        self._pool = pool
        self._store = store
        self._bulk = bulk
        self._allowed = allowed
        self._functions = functions
        self._memory = memory
        self._hub = hub
        self._stopping = False
        self.failed = False  # it ended because something of it is broken
        self.trials: Trials | None = None
        self._started = time.time()
        self._endpoint_lost_s = endpoint_lost_s
        # Until, attempt, failure; the oldest first.
        self._pull_waits: dict[bytes, tuple[float, int, list[Any]]] = {}
        self._room = room = Room(
            me=me,
            resolver=resolver,
            dispatch=dispatch,
            store=store,
            pool=pool,
            start=self._start_pull,
            give_up=lambda id, failure: self._take(ev.PullFailed(id, failure), time.monotonic()),
            wait_s=store_wait_s,
        )
        self._out = Outbox(peers)
        self._entries = Entries(me, resolver, store)
        self._guests = Guests()
        presence = Presence(lease_s=lease_s, endpoint_lost_s=endpoint_lost_s)
        self._reaching = reaching = Reaching(
            name=name,
            peers=peers,
            bulk=bulk,
            neighbours=neighbours,
            presence=presence,
            functions=functions,
            is_worker=lambda party: pool.worker_of_party(party) is not None,
            guests=self._guests,
            memory=memory,
            out=self._out,
            hub=hub,
            endpoint_lost_s=endpoint_lost_s,
            take=self._take,
            obey=self._obey,
        )
        self._news = TaskNews(resolver, hub.report) if hub is not None else None
        timed = (peers, resolver, dispatch, store, pool, reaching, room, self._news)
        self._timed = tuple(each for each in timed if each is not None)
        self._due_at = math.inf
        self._posted: deque[Callable[[float], None]] = deque()
        if hub is not None:
            hub.attach(self.post)
        self._cancels = Cancels(
            resolver, dispatch, pool, self._out, take=self._take, obey=self._obey, to_home=reaching.to_home
        )
        memory.open_cancels = self._cancels.open
        self._killed: dict[int, list[Any]] = {}  # workers that we kill, and what their task is told
        self._refused = 0
        self._teller = Teller(
            me=me,
            resolver=resolver,
            dispatch=dispatch,
            peers=peers,
            pool=pool,
            store=store,
            bulk=bulk,
            functions=functions,
            presence=presence,
            now=time.monotonic(),
        )
        self.dump = Dump(name, carrier.wake)
        self._fds: dict[Any, Callable[[float], None]] = {}
        self._table: dict[type, Callable[[Any, float], None]] = {
            # sessions
            pe.Transmit: lambda i, now: self._transmit(i),
            pe.Deliver: self._deliver,
            pe.Dial: lambda i, now: carrier.dial(i.link, i.address, i.server_key),
            pe.Hangup: lambda i, now: carrier.hangup(i.link),
            pe.PeerUp: reaching.peer_up,
            pe.PeerDown: reaching.peer_down,
            pe.DialBack: reaching.dial_back,
            pe.PeerReset: reaching.peer_reset,
            pe.AuthRefused: reaching.refused,
            pe.Mismatch: reaching.mismatch,
            pe.Rejected: lambda i, now: log.warning("dropped what came on a link: %s", i.reason),
            # the graph
            ev.Runnable: self._runnable,
            ev.Withdraw: lambda i, now: self._obey(self._dispatch.handle(dp.Withdraw(i.tasks, now)), now),
            ev.Notify: lambda i, now: self._notify(i.party, i.items),
            ev.NotifyLater: lambda i, now: self._notify(i.party, i.items, now + NOTIFY_LATER_S),
            ev.Subscribe: lambda i, now: reaching.to_home(i.home, [m.SUBSCRIBE, i.home, i.items], now),
            ev.Pins: lambda i, now: reaching.to_home(i.home, [m.PINS, b"".join(i.ids), i.more], now),
            ev.Unsubscribe: lambda i, now: self._out.say_by(
                i.home, [m.UNSUBSCRIBE, b"".join(i.ids)], now + RELEASE_LATER_S
            ),
            ev.Forget: lambda i, now: self._out.say_by(
                i.party, [m.FORGET, b"".join(i.ids)], now + RELEASE_LATER_S
            ),
            ev.Relay: self._relay,
            ev.NeedFunctions: lambda i, now: self._out.say(i.party, [m.NEED_FUNCTION, i.digests]),
            ev.Tasks: lambda i, now: self._out.say(i.party, [m.TASKS, i.group, i.secret, i.tasks]),
            ev.Pull: room.pull,
            ev.CancelPull: self._cancel_pull,
            ev.Idle: self._idle,
            ev.Needed: lambda i, now: self._store.set_cache(i.ids, False),
            ev.Free: self._free,
            ev.Discard: lambda i, now: self._store.discard(i.paths),
            ev.Stored: lambda i, now: self._stored(i),
            # the workers
            dp.Assign: self._assign,
            dp.Grant: lambda i, now: pool.grant(i.worker, i.lease_until, i.revoked),
            dp.Slot: lambda i, now: pool.slot(i.worker, None),
            dp.Deadlocked: self._deadlocked,
            dp.Cancelled: self._cancels.will_not_run,
            dp.NotCancelled: self._cancels.run_already,
            dp.Spawn: lambda i, now: pool.spawn(i.workers),
            dp.Retire: lambda i, now: pool.retire(i.worker),
            dp.Started: self._tasks_started,
            dp.Lost: lambda i, now: None,  # told with the worker's exit: see _worker_exited
            dp.Overran: self._overran,
        }

    # ------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Serve until `stop`."""
        carrier, peers, memory, rates = self._carrier, self._peers, self._memory, self._teller.rates
        room = self._room
        fds = list(self._fds)
        while not self._stopping:
            events = carrier.poll(self._wait_s(), fds)
            now = time.monotonic()
            if now >= rates.due:
                rates.sample(now)
            for event in events:
                if isinstance(event, FdReady):
                    self._fds[event.fd](now)
                else:
                    self._obey(peers.handle(event), now)
            if self._bulk.completions:
                self._bulk_done(now)
            while self._posted:
                self._posted.popleft()(now)
            if now >= self._due_at:
                self._due(now)
            room.turn(now)
            self._forget_evicted()
            if revoked := self._allowed.revoked(now):
                log.info("the keys of %d others have no rights any more", len(revoked))
                self._obey(peers.handle(pe.Revoke(revoked, now)), now)
            self._tell_lost(now)
            if memory.commit():  # else nothing leaves that the journal does not have
                self._obey(peers.flush(now), now)
                memory.compact_if_due()
            if self.dump.wanted:
                self.dump.brains(self._teller.parts())

        self._finish(time.monotonic())

    def begin(self, taken_up: TakenUp, now: float) -> None:
        """Go on from where an earlier life ended, and have the workers started that are missing; before `run`.

        Args:
            taken_up: what it left.
            now: monotonic seconds.
        """
        self._pool.adopt(taken_up.remains)
        self._obey(self._dispatch.handle(dp.Adopted(taken_up.adopted, now)), now)
        self._obey(taken_up.instructions, now)
        for id, force, who in taken_up.cancels:
            self._cancels.asked([id], force, who, now)
        for party in taken_up.gone:
            self._reaching.party_gone(party, now)
        for party in {*self._resolver.parties(), *self._peers.parties()}:
            if not self._peers.is_up(party) and self._pool.worker_of_party(party) is None:
                self._reaching.is_away(party, now)

    def _finish(self, now: float) -> None:
        """We were told to stop: the tasks that run end with their workers, which those who wait are to know at once."""
        if self._memory.returns:
            self._end_workers(now + STOP_WORKERS_S)
        self._out.flush()
        if self._memory.commit():
            self._obey(self._peers.close(now), now)

    def _end_workers(self, until: float) -> None:
        """Kill them, and take what their pages have: what has ended is not to run again, what runs has lost an attempt."""
        self._table[dp.Spawn] = lambda i, now: None
        stopped = failures.make("WorkerLostError", "the endpoint was stopped while it ran this task")
        told: set[int] = set()
        while (left := self._pool.progress()) and (rest := until - time.monotonic()) > 0 and not self.failed:
            for worker in left.keys() - told:  # also those whose start we hear of only now
                self._killed.setdefault(worker, stopped)
                self._pool.kill(worker)
                told.add(worker)
            select.select([self._pool.zygote.fd], [], [], rest)
            self._worker_processes(time.monotonic())

    def say(self, party: bytes, message: list[Any]) -> None:
        """Send a message to a party; in the loop."""
        self._out.say(party, message)

    def watch_workers(self, channel_socket: Any, zygote_fd: int) -> None:
        """Listen to the workers and to the process that makes them; before `run`."""
        self.watch(channel_socket, self._worker_messages)
        self.watch(zygote_fd, self._worker_processes)

    def _worker_messages(self, now: float) -> None:
        for message in self._pool.receive():
            self._worker_message(message, now)

    def watch(self, fd: Any, ready: Callable[[float], None]) -> None:
        """Call `ready(now)` in the loop whenever `fd` (a descriptor or a socket) can be read; before `run`."""
        self._fds[fd] = ready

    def post(self, fn: Callable[[float], None]) -> None:
        """Have the loop call `fn(now)`, soon, in the order of posting; from any thread."""
        self._posted.append(fn)
        self._carrier.wake()

    def stop(self) -> None:
        """End the loop; from any thread or signal handler."""
        self._stopping = True
        self._carrier.wake()

    def _wait_s(self) -> float | None:
        """How long to wait at most; remembers until when, so that a turn before that need not ask the brains again."""
        due = self._out.deadline
        again = self._memory.deadline  # while the journal cannot be written, the sessions wait for it
        for brain in self._timed:
            at = brain.deadline if again is None or brain is not self._peers else again
            if at is not None and (due is None or at < due):
                due = at
        if self._pull_waits:
            until = next(iter(self._pull_waits.values()))[0]
            due = until if due is None else min(due, until)
        if due is None:
            self._due_at = math.inf
            return None
        self._due_at = due
        return max(0.0, due - time.monotonic())

    def _due(self, now: float) -> None:
        """Tell each brain whose deadline has come."""
        if (at := self._out.deadline) is not None and at <= now:
            self._out.flush()
        if (at := self._dispatch.deadline) is not None and at <= now:
            self._obey(self._dispatch.handle(dp.Tick(self._pool.progress(), now)), now)
        if (at := self._peers.deadline) is not None and at <= now:
            self._obey(self._peers.handle(pe.Tick(now)), now)
        if (at := self._resolver.deadline) is not None and at <= now:
            self._take(ev.Tick(now), now)
        if (at := self._store.deadline) is not None and at <= now:
            self._store.tick(now)
        if (at := self._pool.deadline) is not None and at <= now:
            self._pool.tick(now)
        if (at := self._reaching.deadline) is not None and at <= now:
            self._reaching.tick(now)
        if (at := self._room.deadline) is not None and at <= now:
            self._room.tick(now)
        if self._news is not None and (at := self._news.deadline) is not None and at <= now:
            self._news.tick(now, time.time())
        for id, (until, attempt, failure) in list(self._pull_waits.items()):
            if until > now:
                break
            del self._pull_waits[id]
            self._take(ev.PullFailed(id, failure, attempt), now)

    def _take(self, event: Any, now: float) -> None:
        """Take an event of the resolver that is not a message: write it down, and do what follows from it."""
        self._memory.note(event)
        self._obey(self._resolver.handle(event), now)

    def _obey(self, instructions: list[Any], now: float) -> None:
        table = self._table
        for instruction in instructions:
            table[instruction.__class__](instruction, now)

    # ------------------------------------------------------------------------------------------------- sessions

    def _transmit(self, instruction: pe.Transmit) -> None:
        self._carrier.send(instruction.link, instruction.frame)

    def _deliver(self, delivered: pe.Deliver, now: float) -> None:
        # Nobody answers for an endpoint whose key is not known yet.
        speaks_as = pe.CLIENT if self._reaching.is_unproven(delivered.party) else delivered.kind
        who = ev.Who(delivered.party, delivered.role, delivered.owner_key, speaks_as)
        unix = time.time()
        carrier = delivered.carrier
        if not self._guests.only_asks(who.party, delivered.messages):
            self._memory.note_packet(who, carrier, delivered.raw_frame, unix)
            self._reaching.owner_keys[who.party] = who.owner
        for message in delivered.messages:
            kind = message[0]
            try:
                if not inbox.allowed(kind, who):
                    self._refuse(message, who)
                    continue
                event = inbox.event_of(message, who, carrier, now, unix)
                if event is not None:
                    self._obey(self._resolver.handle(event), now)
                    if kind == m.SUBMIT and self._news is not None and message[1] == self.me:
                        self._news.submitted([task[0] for task in message[6]], now)
                else:
                    self._other_message(kind, message, who, now)
            except (ValueError, TypeError, IndexError, KeyError, AttributeError):
                log.exception("a message of kind %s from %s was not understood", kind, ids.text(who.party))

    def _refuse(self, message: list[Any], who: ev.Who) -> None:
        what = m.NAMES[message[0]]
        self._refused += 1
        if self._refused <= 10:
            log.warning("refused: %s from %s, whose role is %s", what, ids.text(who.party), who.role)
        text = f"endpoint {self.name} lets your key in as a {who.role}, which may not {what}; its owner can change that"
        failure = failures.make("AuthError", text)
        self._notify(who.party, [[id, m.FAILED, failure, 0, None] for id in inbox.awaited(message)])

    def _other_message(self, kind: int, message: list[Any], who: ev.Who, now: float) -> None:
        if kind == m.FUNCTION:
            if self._functions.add(message[1], message[2]):
                self._obey(self._resolver.handle(ev.FunctionsKnown([message[1]])), now)
            else:
                log.warning("function bytes from %s do not have their digest", ids.text(who.party))
        elif kind == m.NEED_FUNCTION:
            for digest in message[1]:
                if (code := self._functions.get(digest)) is not None:
                    self._out.say(who.party, [m.FUNCTION, digest, code])
        elif kind == m.CANCEL:
            self._cancels.asked(inbox.split_ids(message[1]), message[2], who, now)
        elif kind == m.CANCELLED:
            for id, gone in zip(inbox.split_ids(message[1]), message[2], strict=False):
                self._cancels.answer(id, bool(gone))
        elif kind == m.STARTED:
            for item in message[1]:
                obj = self._resolver.objects.get(item[0])
                for party in obj.pins if obj is not None and obj.home == who.party else ():
                    self._out.say(party, [m.STARTED, [item]])
        elif kind == m.EXPLAIN:
            told = [self._teller.explain(id, who) for id in inbox.split_ids(message[2])]
            self._out.say(who.party, [m.EXPLAINED, message[1], told])
        elif kind == m.STATUS:
            self._out.say(who.party, [m.STATUS_IS, message[1], self.describe(who.party)])
        elif kind == m.TRY and self.trials is not None:
            self.trials.asked(message, who)

    def _relay(self, relay: ev.Relay, now: float) -> None:
        message = relay.message
        if message[0] == m.SUBMIT:
            for digest in message[5]:
                if (code := self._functions.to_send(relay.home, digest)) is not None:
                    self._reaching.to_home(relay.home, [m.FUNCTION, digest, code], now)
        self._reaching.to_home(relay.home, message, now)

    def _notify(self, party: bytes, items: list[Any], by: float | None = None) -> None:
        for at in range(0, len(items), OUTCOME_ITEMS_MAX):
            message = [m.OUTCOME, items[at : at + OUTCOME_ITEMS_MAX]]
            if by is None:
                self._out.say(party, message)
            else:
                self._out.say_by(party, message, by)

    # --------------------------------------------------------------------------------------------------- bytes

    def _start_pull(self, pull: ev.Pull) -> None:
        obj, source = pull.obj, pull.source
        if source == obj.home:
            token, mode = (obj.extra.token if obj.extra is not None else b"") or None, m.MODE_PATH
            attempt = obj.attempt
        else:  # an upload: its client writes it into our file; another agent, which relays it, shares its own
            from_agent = self._peers.kind_of(source) == pe.ENDPOINT
            token, mode, attempt = self._resolver.token_of(obj), m.MODE_PATH if from_agent else m.MODE_INTO, 1
        self._bulk.pull(obj.id, attempt, obj.size, source, token, mode, self._reaching.owner_keys.get(source))

    def _cancel_pull(self, cancel: ev.CancelPull, now: float) -> None:
        self._bulk.cancel(cancel.id)
        self._room.ended(cancel.id)

    def _idle(self, idle: ev.Idle, now: float) -> None:
        self._store.set_cache(idle.ids, True)
        self._room.released(idle.ids)

    def _free(self, free: ev.Free, now: float) -> None:
        self._room.released(free.ids)
        self._store.free(free.ids)

    def _runnable(self, runnable: ev.Runnable, now: float) -> None:
        self._room.runnable(runnable.tasks)
        self._obey(self._dispatch.handle(dp.Ready(runnable.tasks, now)), now)

    def _bulk_done(self, now: float) -> None:
        pulled: list[tuple[bytes, int, dict[str, int], bytes | None]] = []
        for done in self._bulk.take():
            if isinstance(done, Pulled):
                obj = self._resolver.objects.get(done.id)
                refs = self._refs_in(done.id) if obj is not None and obj.home == self.me else None
                pulled.append((done.id, done.attempt, done.carriers, refs))
            elif not self._room.refused(done, now):
                log.warning("pull of %s failed: %s %s", ids.text(done.id), done.reason, done.message)
                self._pull_failed(done, now)
        if pulled:
            self._take(ev.Pulled(pulled), now)
            self._room.arrived([item[0] for item in pulled])

    def _pull_failed(self, done: PullFailed, now: float) -> None:
        self._room.ended(done.id)
        failure = pull_failure(done)
        obj = self._resolver.objects.get(done.id)
        if done.reason in _SOURCE_LOST and obj is not None and obj.home == done.source:
            # Its home has lost the bytes too, and either makes them again or says that they are lost.
            self._take(ev.PullWaits(done.id, done.attempt), now)
            self._pull_waits[done.id] = (now + self._endpoint_lost_s, done.attempt, failure)
        else:
            self._take(ev.PullFailed(done.id, failure), now)

    def _refs_in(self, id: bytes) -> bytes | None:
        """The references inside an object of the store; only its head is read."""
        try:
            head = self._store.read(id, None, 0, blob.HEADER_BYTES)
            count = blob.count_refs(head.buffer)
            head.release()
            if not count:
                return None
            whole = self._store.read(id, None, 0, blob.HEADER_BYTES + count * blob.REF_BYTES)
            refs = blob.refs_of(whole.buffer)
            whole.release()
            return refs
        except (LookupError, ProtocolError, LostError, OSError):
            return None  # damaged, or freed already: the affair of whoever reads it

    def _stored(self, stored: ev.Stored) -> None:
        for id, attempt, path, size in stored.items:
            try:
                self._store.seal(id, attempt, path, size)
            except (LookupError, OSError) as error:  # the store's `lost` tells of it
                log.error("the result %s is not where its worker wrote it: %s", ids.text(id), error)

    # ------------------------------------------------------------------------------------------------- workers

    def _assign(self, assign: dp.Assign, now: float) -> None:
        worker, pool = assign.worker, self._pool
        entries: list[Entry] = []
        missing: list[tuple[Task, Obj]] = []
        for task in assign.tasks:
            if task.fn is not None and not pool.has_function(worker, task.fn):
                pool.send_function(worker, task.fn, self._functions.get(task.fn) or b"")
            try:
                entries.append(self._entries.make(worker, task))
            except ArgumentGone as gone:
                missing.append((task, gone.obj))
        if entries and not pool.send_tasks(worker, assign.lease_until, entries):
            # It died a moment ago, and its exit will bring the tasks back.
            self._entries.not_sent(worker, entries)
        for task, obj in missing:
            self._obey(self._dispatch.handle(dp.Withdraw([task], now)), now)
            self._take(ev.ArgumentGone(task, obj), now)

    def _worker_message(self, message: Message, now: float) -> None:
        """Take one message of a worker."""
        worker, body = message.worker, message.body
        kind = body[0]
        if kind == channel.DONE:
            self._worker_done(worker, body[1], body[2], message.raw, now)
        elif kind == channel.ASK:
            self._obey(self._dispatch.handle(dp.Asked(worker, body[1], now)), now)
        elif kind == channel.ALLOC:
            self._room.allocate(worker, body[1], body[2], now)
        elif kind == channel.ADOPTED:
            _, _, _, _, running, last, lent, _ = body
            self._store.settle(worker)  # it has told again all that it made
            self._obey(self._dispatch.handle(dp.Rejoined(worker, running, last, lent, now)), now)
        elif kind == channel.READY:
            self._obey(self._dispatch.handle(dp.WorkerUp(worker, now)), now)
        elif kind == channel.GIVE_BACK:
            self._obey(self._dispatch.handle(dp.GaveBack(worker, body[1], now)), now)
        elif kind in (channel.BLOCKED, channel.RESUME):
            self._lend(worker, kind, body[1], now)

    def _lend(self, worker: int, kind: int, id: bytes, now: float) -> None:
        task = self._resolver.objects.get(id)
        if not isinstance(task, Task) or task.worker != worker:
            # It has ended for us (cancelled by force): its process is about to end too.
            self._pool.slot(worker, None)
        elif kind == channel.RESUME:
            self._obey(self._dispatch.handle(dp.Resume(worker, task, now)), now)
        else:
            told = self._dispatch.handle(dp.Blocked(worker, task, now))
            if not any(instruction.__class__ is dp.Deadlocked for instruction in told):
                self._pool.slot(worker, None)
            self._obey(told, now)

    def _worker_done(
        self, worker: int, results: list[Any], unmapped: list[str], raw: bytes, now: float
    ) -> None:
        if unmapped:
            self._store.unmapped(worker, unmapped)
        if not results:
            return
        ended = results
        unread = unread_arguments(results, self._resolver, self._store)
        if unread:  # they did not run, and have not ended: what they miss is made again, or lost
            again = {task.id for task, _ in unread}
            ended = [row for row in results if row[1] not in again]
            raw = codec.pack([channel.DONE, ended, []])
        self._memory.note_results(worker, raw)
        self._pool.zygote.received(worker, results[-1][0])
        told = self._resolver.handle(ev.Finished(self._pool.name_of(worker), ended))
        # The bytes come first: dispatch may give a task that needs them to another worker at once. Then dispatch: it is to
        # know that this worker is free before it hears of what has become runnable.
        self._obey([each for each in told if each.__class__ is ev.Stored], now)
        self._obey(self._dispatch.handle(dp.Finished(worker, results, now)), now)
        self._obey([each for each in told if each.__class__ is not ev.Stored], now)
        if unread:
            self._tell_lost(now)
            for task, obj in unread:
                self._take(ev.ArgumentGone(task, obj), now)

    def _tell_lost(self, now: float) -> None:
        if lost := self._store.lost():
            self._take(ev.BytesLost([(id, reason.value) for id, reason in lost]), now)

    def _forget_evicted(self) -> None:
        if evicted := self._store.evicted():
            self._room.released(evicted)
            self._take(ev.Evicted(evicted), time.monotonic())

    def _worker_processes(self, now: float) -> None:
        """The zygote has news: processes that started or ended."""
        try:
            news = self._pool.zygote.read()
        except LostError as error:
            # Its workers are dead already, and there will be no others.
            log.critical("%s: the agent ends", error)
            self.failed = True
            self.stop()
            return
        for one in news:
            if isinstance(one, Spawned):
                self._pool.started(one.worker, one.pid)
            else:
                self._worker_exited(one, now)

    def _worker_exited(self, exited: Exited, now: float) -> None:
        """A worker's process is gone: its task lost an attempt, the rest of its queue goes elsewhere."""
        worker = exited.worker
        if exited.results and self._dispatch.is_up(worker):
            self._worker_done(worker, exited.results, [], codec.pack([channel.DONE, exited.results, []]), now)
        self._store.worker_gone(worker)
        self._room.worker_gone(worker)
        party = self._pool.gone(exited)
        failure = self._killed.pop(worker, None) or worker_lost(exited)
        for instruction in self._dispatch.handle(dp.WorkerDown(worker, exited.progress, now)):
            if instruction.__class__ is dp.Lost:
                log.warning("worker %s is lost: %s", self._pool.name_of(worker), failure[1])
                self._take(ev.Ended(instruction.tasks, failure, True), now)
            else:
                self._obey([instruction], now)
        self._cancels.worker_gone(worker, now)
        self._reaching.party_gone(party, now)

    def _tasks_started(self, started: dp.Started, now: float) -> None:
        unix = time.time()
        for task, since in zip(started.tasks, started.since, strict=True):
            for party in task.pins:
                self._out.say(party, [m.STARTED, [[task.id, task.attempt, unix - (now - since)]]])

    def _overran(self, overran: dp.Overran, now: float) -> None:
        task = overran.task
        if not self._pool.kill_at(overran.worker, task.seq):
            return  # it has just ended
        text = f"the task ran for longer than its walltime_s of {task.options.walltime_s:g} s"
        failure = failures.make("WalltimeExceededError", text, walltime_s=task.options.walltime_s)
        self._killed[overran.worker] = failure
        self._take(ev.Ended([task], failure, False), now)

    def _deadlocked(self, deadlocked: dp.Deadlocked, now: float) -> None:
        text = (
            "too many tasks of this endpoint wait for other tasks; return the future instead of waiting for it "
            "(a tail call), or give the endpoint more workers"
        )
        self._pool.slot(deadlocked.worker, failures.make("DeadlockError", text))

    # -------------------------------------------------------------------------------------------------- status

    def describe(self, asker: bytes) -> dict[str, Any]:
        """What `endpoint-worker status` shows to a party; plain values only."""
        return {
            "name": self.name,
            "started_unix_s": self._started,
            **self._teller.status(asker),
            "store": {**self._store.stats(), **self._room.describe()},
            "journal_bytes": self._memory.size_bytes,
            "journal_troubles": self._memory.troubles,
            "refused_messages": self._refused,
            "dropped_packets": dict(self._peers.counts),
            "hub": self._hub.describe() if self._hub is not None else None,
        }
