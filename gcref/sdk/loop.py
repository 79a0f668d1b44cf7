"""The client's I/O thread: it owns the sockets and drives the brains.

    user's threads ──► queue ──┐                                  ┌──► futures (settle)
                        wake   ▼                                  │
                     ┌─► drain ──► Submitter ──► Send ──► Peers ──┼──► carrier ──► endpoints
                     │                 ▲                   │      │
                     └── carrier.poll ─┴──── Deliver ◄─────┘      └──► bulk thread ──► Pull (large values)

Whatever a user's thread wants is put into one queue, so that it is done in the order in which it was wanted: a task
(a tuple), the end of a future (its id), an event of the brain, or a function to call here. The thread is woken only
when it sleeps. It waits for nothing but its `poll`: no user's code runs on it, and nothing in it blocks.

Futures are held weakly, so that the thread notices when nobody wants them any more; those with callbacks are held until
they end.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from gcref import config
from gcref.brains import submitter_events as ev
from gcref.brains.submitter import Submitter
from gcref.brains.submitter_table import CONNECTING, DOWN, UP, Entry, Lane, Stored
from gcref.carriers.base import FdReady
from gcref.errors import EndpointLostError, GcrefError
from gcref.objects import failure as failures
from gcref.sdk import future as futures
from gcref.sdk.agent_process import AgentProcess
from gcref.sdk.backlog import Backlog
from gcref.sdk.callbacks import Caller
from gcref.sdk.future import ComputeFuture
from gcref.sdk.handover import Handover
from gcref.sdk.large_values import LargeValues
from gcref.sdk.questions import Questions
from gcref.sdk.reaching import Reaching
from gcref.sdk.request import Request
from gcref.sdk.transfers import Pull
from gcref.sdk.whereabouts import BROKER, Whereabouts
from gcref.wire import messages as m

if TYPE_CHECKING:
    from gcref.brains.peers import Peers
    from gcref.carriers.base import Carrier
    from gcref.carriers.keys import KeyPair
    from gcref.directory.records import Candidate
    from gcref.sdk.hub_link import HubLink
    from gcref.task_context import TaskContext

log: Final = logging.getLogger("gcref.sdk")

DRAIN_MAX: Final = 1024
"""Wishes taken from the queue in one turn: the first tasks of a long run leave while the last ones are made."""

DROPS_EVERY_S: Final = 0.05
"""Futures that end singly wake the thread at most so often."""

LINGER_S: Final = 1.0
"""How long the thread waits for somebody who needs it, before it ends."""

WITHDRAW_S: Final = 2.0
"""How long the last word to the hub may take. What it does not hear, it forgets by itself some day."""

WITHDRAW_MIN_S: Final = 0.3
"""The same, when the endpoints have taken all the time that there was."""


class Loop:
    """One client's I/O thread and everything that it owns.

    Args:
        me: the client's party id.
        keys: its owner's keys.
        carriers: the ways that it may use.
        context: inside a task: its surroundings.
        may_end: asked when there has been nothing to do for a while: whether the thread may end.
        hub: what to do with the hub; None: there is none.
        endpoint_lost_s: how long an endpoint may be out of reach, seconds.
        heartbeat_s: silence after which it is asked for a sign of life, seconds.

    Attributes:
        queue: what user's threads want.
        asleep: the thread waits, and has to be woken for what is put into the queue.
        context: inside a task: its surroundings.
        users: executors that may use it still; guarded by the client.
        peers: the sessions; the thread's own.
    """

    def __init__(
        self,
        me: bytes,
        keys: KeyPair,
        carriers: frozenset[str],
        context: TaskContext | None = None,
        may_end: Callable[[Loop], bool] = lambda loop: False,
        *,
        hub: HubLink | None = None,
        endpoint_lost_s: float = config.ENDPOINT_LOST_S,
        heartbeat_s: float = config.HEARTBEAT_S,
    ) -> None:
        self.me = me
        self.queue: deque[Any] = deque()
        self.asleep = False
        self.hub = hub
        self.context = context
        self.where = Whereabouts(carriers, context, hub)
        self.users = 0
        self._may_end = may_end
        self._idle_at: float | None = None
        self._calm = False  # asleep, and not about to look for dropped futures anyway
        self._keys = keys
        self._relay = None if context is None else context.agent_id
        self._heartbeat_s = heartbeat_s
        self._broken: str | None = None
        self._brain = Submitter(self._relay, endpoint_lost_s=endpoint_lost_s)
        self._caller = Caller()
        self._held: dict[bytes, tuple[Any, ...]] = {}
        self.large = LargeValues(self, keys, self._relay, endpoint_lost_s)
        self.questions = Questions(self, self._brain)
        self._handover = None if context is None else Handover(self, self._brain, context)
        self._quiet: dict[Lane, list[Callable[[], None]]] = {}
        self._due_at: float | None = None  # when the brain is to be told the time
        self.reaching = Reaching(self, keys.public)
        self._backlog = Backlog(self.tell)
        self._ends: list[Any] = []  # outcomes that futures have not been told yet
        self._dropped_at = -DROPS_EVERY_S
        self._ending: tuple[float, Request] | None = None
        self._burying = threading.RLock()
        self.peers: Peers
        self._carrier: Carrier | None = None
        self._has_mailbox = False
        self._table: dict[type, Callable[[Any], None]] = {
            ev.Send: self._send,
            ev.Settle: self._settle,
            ev.Renewed: lambda i: self.large.renewed(i.items),
            ev.Running: self._running,
            ev.Answer: self._answer,
            ev.Reach: lambda i: self.reaching.reach(i.peer),
            ev.Leave: lambda i: self.reaching.leave(i.peer),
            ev.Look: lambda i: self.reaching.look(i.peer),
            ev.Idle: self._idle,
            ev.Uploaded: lambda i: self.large.forget_uploads(i.ids),
        }
        if hub is not None:
            hub.attach(self)
        self._thread = threading.Thread(target=self._run, name="gcref-io", daemon=True)
        _loops.add(self)
        self._thread.start()

    # ------------------------------------------------------------------------------- what any thread may call

    def check(self) -> None:
        """Raises RuntimeError where this client cannot be used any more: in a forked child, or after its end."""
        if self._broken is not None:
            raise RuntimeError(self._broken)

    def is_broken(self) -> bool:
        """Whether this thread has ended, or never was (in a forked child)."""
        return self._broken is not None

    def secret_of(self, group: bytes) -> bytes:
        """What the read tokens of a task group are made of: the same in each process of this user, and 32 bytes."""
        return blake2b(group, key=self._keys.secret, digest_size=32, person=b"gcref group").digest()

    def post(self, wish: Any) -> None:
        """Has the I/O thread take an event of the brain, or call a function."""
        self.check()
        self.queue.append(wish)
        if self.asleep:
            self.wake()

    def wake(self) -> None:
        """Has the thread look at the queue."""
        if self._broken is not None:
            self._bury()
            return
        self.asleep = self._calm = False
        carrier = self._carrier
        if carrier is not None:
            carrier.wake()

    def poke(self) -> None:
        """Has the thread see whether it is needed."""
        if self.asleep and self._broken is None:
            self.wake()

    def keep(self, id: bytes) -> None:
        """One more than its futures stands for that object, until it says `drop`; a future of it lives still."""
        self.queue.append(ev.Kept([id]))

    def drop(self, id: bytes) -> None:
        """The future of that id is gone."""
        self.queue.append(id)
        if self._calm:
            self.wake()

    def hold(self, future: ComputeFuture[Any], *others: Any) -> None:
        """Keeps a future, and others with it, alive until it ends."""
        self._held[future._id] = (future, *others, *self._held.get(future._id, ()))

    def call_soon(self, fn: Callable[..., None], *args: Any) -> None:
        """Calls `fn` on the callback thread."""
        self._caller.call(fn, *args)

    def cancel(self, ids: list[bytes], force: bool) -> list[bool]:
        """Asks for these tasks not to run, and waits for the answer: a second at the most."""
        return self.questions.cancel(ids, force)

    def open(self, id: bytes, home: bytes, token: bytes | None, lane: Any) -> ComputeFuture[Any]:
        """A future for an object that exists elsewhere; the one that is there already, if there is one.

        Args:
            id: of the object.
            home: its home.
            token: the right to read it; None: this client may do so without one.
            lane: what the future is told to belong to.
        """
        self.check()
        known = self.future_of(id)
        if known is not None:
            return known
        future: ComputeFuture[Any] = ComputeFuture(lane, id, token)
        self.post(ev.Opened([(id, home, token, None, weakref.ref(future))], time.monotonic()))
        return future

    def future_of(self, id: bytes) -> ComputeFuture[Any] | None:
        """The future here that stands for an object, if there is one."""
        entry = self._brain.find(id)
        return None if entry is None else future_of(entry)

    def fetch(self, stored: Stored) -> Pull:
        """Starts to fetch a value, or joins the fetch under way."""
        return self.large.fetch(stored)

    def when_quiet(self, lane: Lane, fn: Callable[[], None]) -> None:
        """Calls `fn`, on the I/O thread, once no task of the lane is open."""

        def ask() -> None:
            if lane.open == 0:
                fn()
            else:
                self._quiet.setdefault(lane, []).append(fn)

        self.post(ask)

    def entries(self) -> list[Entry]:
        """All objects that futures here stand for, in the order in which they came; on the I/O thread."""
        return list(self._brain.entries.values())

    def start_process(self, process: AgentProcess) -> None:
        """Watches an agent that was started for this client alone."""
        self.where.add_process(process)
        self.post(lambda: self.reaching.watch(process))

    def explain(self, future: ComputeFuture[Any]) -> str:
        """Where a task is, what it waits for, over which carrier, since when."""
        return self.questions.explain(future)

    # ----------------------------------------------------------------------------------------------- life and end

    def close(self, timeout: float) -> int:
        """Flushes what is unacknowledged, and ends the thread; what waits for it then ends in an error.

        Args:
            timeout: how long the flush may take, seconds.

        Returns:
            How many tasks were perhaps not taken by their endpoints in time.
        """
        request = Request()
        deadline = time.monotonic() + timeout
        try:
            self.post(lambda: setattr(self, "_ending", (deadline, request)))
        except RuntimeError:
            return 0
        if self.is_io_thread():
            return 0
        self._thread.join(timeout + 2.0)
        return int(request.answer or 0)

    def forked(self) -> None:
        """In a forked child: nothing of this works here, and nothing of the parent's is touched."""
        self._broken = "this executor belongs to the parent process; make another one after a fork"
        self.asleep = self._calm = False
        self._carrier = None
        for process in self.where.processes():
            process.abandon()

    def is_io_thread(self) -> bool:
        """Whether it is this thread that asks."""
        return threading.get_ident() == self._thread.ident

    def _run(self) -> None:
        text = "this client has ended"
        try:
            self._set_up()
            while self._turn():
                pass
            self._obey(self.peers.close(time.monotonic()))
        except BaseException as error:
            log.exception("the I/O thread of a client has failed")
            text = f"the I/O thread of the client has failed: {type(error).__name__}: {error}"
        finally:
            self._broken = text
            self.asleep = True  # whoever comes too late finds out
            self._bury()
            carrier, self._carrier = self._carrier, None
            if carrier is not None:
                carrier.close()
            self.large.close()
            if self.hub is not None:
                left_s = WITHDRAW_S if self._ending is None else self._ending[0] - time.monotonic()
                self.hub.close(min(WITHDRAW_S, max(WITHDRAW_MIN_S, left_s)))
            self._caller.close()

    def _has_ended(self, now: float, deadline: float, request: Request) -> bool:
        missing, waiting = 0, False
        for party, peer in self._brain.peers.items():
            if self.where.is_own(party) or not (peer.outbox or self.peers.pending(party)):
                continue
            missing += peer.open
            waiting |= peer.open > 0 or peer.state == UP
        if waiting and now < deadline:
            return False
        request.set(missing)
        return True

    def _bury(self) -> None:
        """Ends everything that waits for this thread, which has ended; on whatever thread finds something."""
        with self._burying:
            lost = failures.from_error(EndpointLostError(str(self._broken)))
            table = self._table
            self._table = dict.fromkeys(table, lambda _: None) | {kind: table[kind] for kind in _LAST_RITES}
            while self.queue:
                self._drain(_try)
            for peer in list(self._brain.peers):
                self.tell(ev.PeerFailed(peer, lost))
            self._end_futures()
            quiet, self._quiet = self._quiet, {}
            for waiting in quiet.values():
                for fn in waiting:
                    fn()
            self.large.end_all(lambda: EndpointLostError(str(self._broken)))
            if self._handover is not None:
                self._handover.end()

    def _set_up(self) -> None:
        from gcref.brains import peers as pe
        from gcref.carriers.zeromq import ZeroMQCarrier

        identity = pe.Identity(self.me, pe.CLIENT, self._keys.public, time.time_ns() // 1000)
        self.peers = pe.Peers(
            identity,
            lambda key, hello: pe.PEER if hello.kind == pe.ENDPOINT else None,
            heartbeat_s=self._heartbeat_s,
        )
        carrier = ZeroMQCarrier(self._keys)
        self._table.update(
            {
                pe.Transmit: self._transmit,
                pe.Deliver: self._deliver,
                pe.Dial: self._dial,
                pe.Hangup: self._hangup,
                pe.PeerUp: lambda i: self.tell(ev.PeerUp(i.party, i.fresh, time.monotonic())),
                pe.PeerDown: lambda i: self.tell(ev.PeerDown(i.party, i.reason, time.monotonic())),
                pe.PeerReset: lambda i: self.tell(ev.PeerReset(i.party, i.kept, time.monotonic())),
                pe.AuthRefused: lambda i: self.reaching.refused(i.party, "AuthError", i.message, i.ours),
                pe.Mismatch: lambda i: self.reaching.refused(i.party, "VersionMismatchError", i.message),
                pe.DialBack: lambda _i: None,  # its record names its addresses too, and nobody dials a client
                pe.Rejected: lambda i: log.warning("a message was dropped: %s", i.reason),
            }
        )
        self._ways_event = pe.Know
        self._carrier = carrier

    def _turn(self) -> bool:
        """Does all there is to do, then waits for more; False at the end."""
        if self.queue:
            self._drain()
        now = time.monotonic()
        if self._due_at is not None and self._due_at <= now:
            self.tell(ev.Tick(now))
        if self._handover is not None:
            self._handover.look()
        self._obey(self.peers.flush(now))
        if self._backlog.is_due and self._backlog.look(self.peers):
            self._obey(self.peers.flush(time.monotonic()))
        if self.users == 0 or self._idle_at is not None:
            self._see_whether_idle(now)
        if self._ending is not None:
            self._end_futures()
            if self._has_ended(now, *self._ending):
                return False
        self.asleep = True
        # Only ids of dropped futures may wait a little for more of their kind; `_drain` has taken all else.
        timeout = 0.0 if self.queue else self._wait_s(now)
        self._end_futures()  # last of all: who waits for them runs when the wait below lets go of the interpreter
        carrier = self._carrier
        assert carrier is not None
        events = carrier.poll(timeout, self.reaching.descriptors)
        self.asleep = self._calm = False
        for event in events:
            if isinstance(event, FdReady):
                self.reaching.descriptor_ready(event.fd)
            else:
                self._obey(self.peers.handle(event))
        self.large.take_completions()
        return True

    def _see_whether_idle(self, now: float) -> None:
        """Ends when nobody has needed this thread for a while: no executor, no future, no task."""
        # A worker's agent may be starting anew, and is to hear what was let go meanwhile.
        is_unheard = self._relay is not None and self.peers.pending() > 0
        if self.users or self.queue or self._brain.entries or self.large.is_busy() or is_unheard:
            self._idle_at = None
        elif self._idle_at is None:
            self._idle_at = now
        elif self._ending is None and now >= self._idle_at + LINGER_S and self._may_end(self):
            self._ending = (now + config.EXIT_FLUSH_S, Request())

    def _wait_s(self, now: float) -> float | None:
        self._due_at = self._brain.deadline
        due = [at for at in (self._due_at, self.peers.deadline) if at is not None]
        if self._ending is not None:
            due.append(self._ending[0])
        elif self._idle_at is not None:
            due.append(self._idle_at + LINGER_S)
        if self._handover is not None and (at := self._handover.deadline) is not None:
            due.append(at)
        if self._dropped_at + DROPS_EVERY_S > now:
            due.append(self._dropped_at + DROPS_EVERY_S)
        else:
            self._calm = True
            if self.queue:
                return 0.0
        return max(0.0, min(due) - now) if due else None

    def _drain(self, call: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Takes what user's threads want, in order; `call` is what to do with functions, if not to call them."""
        popleft = self.queue.popleft
        tasks: list[Any] = []
        gone: list[bytes] = []
        now = time.monotonic()
        try:
            for _ in range(DRAIN_MAX):
                wish = popleft()
                kind = type(wish)
                if kind is tuple:
                    tasks.append(wish)
                elif kind is bytes:
                    gone.append(wish)
                else:
                    tasks, gone = self._take(tasks, gone, now)
                    if kind in _EVENTS:
                        self.tell(wish)
                    elif call is None:
                        wish()
                    else:
                        call(wish)
        except IndexError:
            pass
        self._take(tasks, gone, now)

    def _take(self, tasks: list[Any], gone: list[bytes], now: float) -> tuple[list[Any], list[bytes]]:
        # A future is made before it is dropped, so tasks come first.
        if tasks:
            self.tell(ev.Submitted(tasks, now))
        if gone:
            self._dropped_at = now
            self.tell(ev.Dropped(gone))
        return [], []

    def tell(self, event: Any) -> None:
        """Tells the brain, and does what it says; on the I/O thread."""
        self._obey(self._brain.handle(event))

    def is_away(self, party: bytes) -> bool:
        """Whether that party is needed and not there; on the I/O thread."""
        peer = self._brain.peers.get(party)
        return peer is not None and peer.state in (CONNECTING, DOWN)

    def dial_all(self, party: bytes, candidates: list[Candidate]) -> None:
        """These are the ways to a party: what is new is dialled, what is gone hung up; on the I/O thread."""
        self._obey(self.peers.handle(self._ways_event(party, candidates, time.monotonic())))

    def _obey(self, instructions: list[Any]) -> None:
        table = self._table
        for instruction in instructions:
            table[instruction.__class__](instruction)

    # ------------------------------------------------------------------------------------- what the brains want

    def _dial(self, dial: Any) -> None:
        carrier = self._carrier
        assert carrier is not None
        if dial.carrier == BROKER and not self._has_mailbox:
            from gcref.carriers.combined import Carriers

            assert self.hub is not None
            carrier = self._carrier = Carriers(carrier, self.hub.mailbox())
            self._has_mailbox = True
        try:
            carrier.dial(dial.link, dial.address, dial.server_key)
        except GcrefError as error:
            self.tell(ev.PeerFailed(dial.party, failures.from_error(error)))

    def _hangup(self, hangup: Any) -> None:
        if self._carrier is not None:
            self._carrier.hangup(hangup.link)

    def _transmit(self, transmit: Any) -> None:
        if self._carrier is not None:
            self._carrier.send(transmit.link, transmit.frame)  # what is not sent is sent again

    def _send(self, send: ev.Send) -> None:
        try:
            self.peers.send(send.peer, send.message)
        except GcrefError as error:
            log.warning("a message cannot be sent: %s", error)
            if send.message[0] == m.SUBMIT:
                self.tell(ev.Unsendable([task[0] for task in send.message[6]], failures.from_error(error)))
        else:
            self._backlog.sent(send.peer)
            if self._handover is not None and send.message[0] in (m.SUBMIT, m.OFFER):
                self._handover.sent_submit()

    def _settle(self, settle: ev.Settle) -> None:
        ends = self._ends
        for holder, state, failed, raw, record in settle.ends:
            future = holder()
            if future is not None:
                ends.append((future, state, failed, raw, record))

    def _end_futures(self) -> None:
        if self._ends:
            ends, self._ends = self._ends, []
            futures.settle(ends)
            # Only now: a callback may have been added a moment ago.
            if self._held:
                for end in ends:
                    self._held.pop(end[0]._id, None)

    def _running(self, running: ev.Running) -> None:
        futures.mark_running([future for holder in running.holders if (future := holder()) is not None])

    def _answer(self, answer: ev.Answer) -> None:
        self._end_futures()
        answer.request.set(answer.answer)

    def _idle(self, idle: ev.Idle) -> None:
        self._end_futures()
        for fn in self._quiet.pop(idle.lane, ()):
            fn()

    def _deliver(self, delivered: Any) -> None:
        try:
            self.tell(ev.Heard(delivered.party, delivered.messages, time.monotonic()))
        except (ValueError, TypeError, IndexError, KeyError, AttributeError):
            log.exception("messages from %s were not understood", self.where.name_of(delivered.party))


_EVENTS: Final = frozenset((ev.AttachAsked, ev.Opened, ev.Offered, ev.Kept))
_LAST_RITES: Final = (ev.Settle, ev.Answer, ev.Idle)


def _try(fn: Callable[[], None]) -> None:
    """What was wanted of a thread that has ended; some of it can be done, and nobody waits for the rest."""
    try:
        fn()
    except Exception:
        log.debug("this came too late", exc_info=True)


def future_of(entry: Entry) -> ComputeFuture[Any] | None:
    """The future that stands for an entry's object, if it lives."""
    holder = entry.holder[-1] if type(entry.holder) is list else entry.holder
    found: ComputeFuture[Any] | None = None if holder is None else holder()
    return found


_loops: weakref.WeakSet[Loop] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    futures.after_fork_in_child()
    for loop in list(_loops):
        loop.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
