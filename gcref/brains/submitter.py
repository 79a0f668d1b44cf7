"""The submitter: what a client knows of its tasks, and what it does about what it hears.

    Submitted, Opened ──► entries ──► outbox of the peer ──(peer is up)──► Send(FUNCTION, SUBMIT, …)
    Heard(OUTCOME)    ──► Settle(ends)                      alias: subscribe to what it stands for, end with it
    Dropped           ──► Send(UNSUBSCRIBE), once the task has ended and nobody here stands for the object
    PeerLost, Tick    ──► Settle(ends with a failure): every wait ends

An *entry* stands for one object that futures here stand for; a *peer* for an endpoint that is spoken to. A client
speaks to the home of each object; inside a task it speaks to one peer, its own agent, which passes things on.

Rules that hold after every event (`validate` checks them):

* an entry ends once; what comes later changes nothing;
* an object is pinned at its home while a future or an alias here stands for it, or its task has not ended; then it
  is unsubscribed, once;
* the futures of a task's arguments are kept until the task has ended;
* a function is sent to a peer before the first task that calls it;
* while a peer that has unfinished entries cannot be reached, there is a deadline;
* what a peer was asked and has not answered, its next process is asked again.

Holders (weak references to futures), requests and arguments are opaque here: they are handed in, kept and handed out.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED
from typing import Any, Final, NamedTuple

from gcref import config, ids
from gcref.brains import submitter_events as ev
from gcref.brains.submitter_table import (
    APART,
    CONNECTING,
    DOWN,
    ENDED,
    LOOK_AFTER_S,
    LOOK_EVERY_S,
    NEVER,
    RUNNING,
    SEEN_GONE,
    SEEN_STOPPED,
    SENT,
    UNSENT,
    UP,
    Entry,
    Extra,
    Lane,
    Peer,
    Stored,
)
from gcref.objects import failure as failures
from gcref.wire import messages as m

NOT_RUNNING_S: Final = 2.0
"""How long an endpoint that was never reached may be found stopped: it may be starting."""

_AWAY: Final = frozenset((CONNECTING, DOWN))

SUBMIT_MAX_BYTES: Final = 4 * 1024 * 1024
"""A SUBMIT takes no more tasks when their arguments have so many bytes."""

REFUSED_GRACE_S: Final = 0.5
"""How long an endpoint that has refused us by one way may let us in by another one."""

EXPLAIN_WAIT_S: Final = 1.0
"""How long `explain` waits for the agent's answer."""


class _Cancel:
    """A cancel request that waits for answers."""

    __slots__ = ("answers", "deadline", "force", "ids", "missing", "request")

    def __init__(self, request: Any, ids: list[bytes], force: bool, deadline: float) -> None:
        self.request = request
        self.ids = ids
        self.force = force
        self.answers: dict[bytes, bool] = {}
        self.missing = 0
        self.deadline = deadline


class _Question(NamedTuple):
    """Something that a peer was asked: by `message`, which is said again to a new process of it."""

    request: Any
    peer: Peer
    message: list[Any]
    deadline: float


class Submitter:
    """A client's table of tasks and objects, and the decisions about them.

    Args:
        relay: the one party to speak to, whatever the home (inside a task); None speaks to each home.
        endpoint_lost_s: how long a peer may be out of reach before what is open there fails, seconds.
    """

    def __init__(
        self, relay: bytes | None = None, *, endpoint_lost_s: float = config.ENDPOINT_LOST_S
    ) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.peers: dict[bytes, Peer] = {}
        self._relay = relay
        self._endpoint_lost_s = endpoint_lost_s
        self._cancels: list[_Cancel] = []
        self._answered: set[bytes] = set()  # groups whose tasks came with the present event
        self._explains: dict[int, _Question] = {}
        self._attaches: dict[bytes, list[_Question]] = {}
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.Submitted: self._submitted,
            ev.Offered: self._offered,
            ev.Opened: self._opened,
            ev.Kept: self._kept,
            ev.Dropped: self._dropped,
            ev.CancelAsked: self._cancel_asked,
            ev.ExplainAsked: self._explain_asked,
            ev.AttachAsked: self._attach_asked,
            ev.Leaving: self._leaving,
            ev.FetchBegan: self._fetch_began,
            ev.FetchEnded: self._fetch_ended,
            ev.Unsendable: self._unsendable,
            ev.PeerFull: self._peer_full,
            ev.Heard: self._heard,
            ev.PeerUp: self._peer_up,
            ev.PeerDown: self._peer_down,
            ev.PeerReset: self._peer_reset,
            ev.PeerFailed: self._peer_failed,
            ev.PeerRefused: self._peer_refused,
            ev.PeerSeen: self._peer_seen,
            ev.Tick: self._tick,
        }
        self._readers: dict[int, Callable[[Peer, list[Any]], None]] = {
            m.OUTCOME: self._outcome,
            m.STARTED: self._started,
            m.NEED_FUNCTION: self._need_function,
            m.CANCELLED: self._cancelled,
            m.TASKS: self._tasks,
            m.EXPLAINED: self._explained,
            m.FORGET: self._forget,
        }
        # What one event has brought about; `_collect` puts it in order.
        self._out: list[ev.Instruction] = []
        self._ends: list[tuple[Any, str, bool, Any, list[Any] | None]] = []
        self._unsubscribe: dict[bytes, list[bytes]] = {}
        self._renewed: list[tuple[Any, int, Any, int]] = []

    # --------------------------------------------------------------------------------------------------- outside

    def handle(self, event: ev.Event) -> list[ev.Instruction]:
        """Takes one event (a batch) and says what to do about it."""
        self._handlers[type(event)](event)
        return self._collect()

    @property
    def deadline(self) -> float | None:
        """When `Tick` is due (monotonic seconds), or None."""
        due: list[float] = []
        if self._cancels or self._explains or self._attaches:
            due += [cancel.deadline for cancel in self._cancels]
            due += [question.deadline for question in self._explains.values()]
            due += [question.deadline for questions in self._attaches.values() for question in questions]
        for peer in self.peers.values():
            if peer.state in _AWAY and self._is_needed(peer):
                due.append(min(peer.look_at, peer.give_up_at, peer.since + self._endpoint_lost_s))
        return min(due) if due else None

    def find(self, id: bytes) -> Entry | None:
        """The entry of an object. It may be asked from any thread, and may be out of date at once."""
        return self.entries.get(id)

    def _collect(self) -> list[ev.Instruction]:
        out, self._out = self._out, []
        if self._ends:
            # Before all else: whoever hears that a lane is idle finds its futures done.
            out.insert(0, ev.Settle(self._ends))
            self._ends = []
        if self._renewed:
            out.append(ev.Renewed(self._renewed))
            self._renewed = []
        if self._unsubscribe:
            for peer, gone in self._unsubscribe.items():
                out.append(ev.Send(peer, [m.UNSUBSCRIBE, b"".join(gone)]))
            self._unsubscribe = {}
        return out

    # ---------------------------------------------------------------------------------------------- from the user

    def _submitted(self, event: ev.Submitted) -> None:
        entries, now, relay = self.entries, event.now, self._relay
        touched: dict[Peer, None] = {}
        home, peer = b"", None
        for spec in event.items:
            lane, id = spec[0], spec[1]
            if peer is None or lane.home != home:
                home = lane.home
                peer = self._peer(home if relay is None else relay, now)
                touched[peer] = None
            entry = entries[id] = Entry(id, home, peer, lane, spec[8])
            entry.fn = spec[2]
            entry.spec = spec
            entry.args = spec[7]
            lane.root.open += 1
            peer.open += 1
            peer.outbox.append(entry)
        for peer in touched:
            if peer.state == UP and not peer.full:
                self._flush(peer)

    def _offered(self, event: ev.Offered) -> None:
        for spec in event.items:
            lane, id, _size, _blob, kept, holder = spec
            peer = self._peer(self._relay or lane.home, event.now)
            entry = self.entries[id] = Entry(id, lane.home, peer, lane, holder)
            entry.spec = spec
            entry.args = kept
            lane.root.open += 1
            peer.open += 1
            peer.outbox.append(entry)
            if peer.state == UP and not peer.full:
                self._flush(peer)

    def _opened(self, event: ev.Opened) -> None:
        for id, home, token, lane, holder in event.items:
            entry = self.entries.get(id)
            if entry is not None:
                # Another future stands for it already; this one is told at its end, or what its home says again.
                held = entry.holder
                entry.holder = [*held, holder] if type(held) is list else [held, holder]
                entry.extra = entry.extra or Extra(token)
                entry.users += 1
                if entry.state == ENDED:
                    self._reopen(entry, event.now)
                continue
            peer = self._peer(self._relay or home, event.now)
            entry = self.entries[id] = Entry(id, home, peer, lane, holder)
            if token is not None:
                entry.extra = Extra(token)
            if lane is not None:
                lane.root.open += 1
                entry.pinned = True  # by the ATTACH that has told of it
            self._subscribe(entry)

    def _subscribe(self, entry: Entry) -> None:
        peer = entry.peer
        entry.state = UNSENT
        peer.open += 1
        peer.outbox.append(entry)
        if peer.state == UP and not peer.full:
            self._flush(peer)

    def _reopen(self, entry: Entry, now: float) -> None:
        """Has the home say again how an entry ended: what it said has been handed on, and is not kept."""
        entry.peer = self._peer(entry.peer.id, now)
        target = self._part(entry)  # it will say so again
        if target is not None:
            self._release(target)
        self._subscribe(entry)

    def _kept(self, event: ev.Kept) -> None:
        for id in event.ids:
            entry = self.entries.get(id)
            if entry is not None:
                entry.users += 1

    def _dropped(self, event: ev.Dropped) -> None:
        for id in event.ids:
            entry = self.entries.get(id)
            if entry is not None:
                entry.users -= 1
                if entry.users == 0 and (entry.state == ENDED or entry.lane is None):
                    self._release(entry)

    def _release(self, entry: Entry) -> None:
        """Nobody here stands for the object any more."""
        pending = [entry]
        while pending:
            entry = pending.pop()
            self.entries.pop(entry.id, None)
            if entry.state != ENDED:
                entry.state = ENDED
                entry.peer.open -= 1
            entry.spec = entry.args = entry.fn = None
            if entry.pinned:
                entry.pinned = False
                gone = self._unsubscribe.get(entry.peer.id)
                if gone is None:
                    self._unsubscribe[entry.peer.id] = [entry.id]
                else:
                    gone.append(entry.id)
            target = self._part(entry)
            if target is not None:
                pending.append(target)

    def _part(self, entry: Entry) -> Entry | None:
        """Parts an alias from what it stands for; returns that, if nobody needs it any more."""
        extra = entry.extra
        target = extra.target if extra is not None else None
        if extra is None or target is None:
            return None
        extra.target = None
        target.users -= 1
        if target.extra is not None:
            target.extra.followers.pop(entry, None)
        return target if target.users == 0 and (target.state == ENDED or target.lane is None) else None

    def _cancel_asked(self, event: ev.CancelAsked) -> None:
        cancel = _Cancel(event.request, event.ids, event.force, event.now + config.CANCEL_WAIT_S)
        ask: dict[bytes, list[bytes]] = {}
        for id in dict.fromkeys(event.ids):
            entry = self.entries.get(id)
            if entry is None or entry.state == ENDED or entry.lane is None:
                cancel.answers[id] = False
            elif entry.state == UNSENT and entry.spec is not None:  # else its home has it already
                cancel.answers[id] = True
                entry.extra = entry.extra or Extra()
                entry.extra.revoked = True
                self._end(entry, CANCELLED_AND_NOTIFIED, False, None, None)
            else:
                entry.extra = entry.extra or Extra()
                entry.extra.cancels.append(cancel)
                cancel.missing += 1
                ask.setdefault(entry.peer.id, []).append(id)
        for peer, asked in ask.items():
            self._out.append(ev.Send(peer, [m.CANCEL, b"".join(asked), event.force]))
        if cancel.missing:
            self._cancels.append(cancel)
        else:
            self._answer_cancel(cancel)

    def _answer_cancel(self, cancel: _Cancel) -> None:
        self._out.append(ev.Answer(cancel.request, [cancel.answers.get(id, False) for id in cancel.ids]))

    def _explain_asked(self, event: ev.ExplainAsked) -> None:
        entry = self.entries.get(event.ids[0]) if event.ids else None
        if entry is None or entry.peer.state != UP:
            self._out.append(ev.Answer(event.request, None))
            return
        message = [m.EXPLAIN, event.number, b"".join(event.ids)]
        self._explains[event.number] = _Question(
            event.request, entry.peer, message, event.now + EXPLAIN_WAIT_S
        )
        self._out.append(ev.Send(entry.peer.id, message))

    def _attach_asked(self, event: ev.AttachAsked) -> None:
        peer = self._peer(self._relay or event.home, event.now)
        message = [m.ATTACH, event.group]
        question = _Question(event.request, peer, message, event.deadline)
        self._attaches.setdefault(event.group, []).append(question)
        self._out.append(ev.Send(peer.id, message))

    def _leaving(self, event: ev.Leaving) -> None:
        for entry in list(self.entries.values()):
            if entry.state == ENDED and entry.home in event.homes and entry.id not in event.keep:
                entry.users = 0
                self._release(entry)

    def _fetch_began(self, event: ev.FetchBegan) -> None:
        self._peer(event.peer, event.now).fetches += 1

    def _fetch_ended(self, event: ev.FetchEnded) -> None:
        peer = self.peers.get(event.peer)
        if peer is not None and peer.fetches:
            peer.fetches -= 1

    # -------------------------------------------------------------------------------------------------- to the peer

    def _peer(self, id: bytes, now: float) -> Peer:
        """The peer, with somebody trying to reach it."""
        peer = self.peers.get(id)
        if peer is None:
            peer = self.peers[id] = Peer(id)
        if peer.state == APART:
            peer.state = CONNECTING
            peer.since = now
            peer.look_in = LOOK_AFTER_S
            peer.look_at = now + LOOK_AFTER_S
            # It has failed before: it is given little time to show that something has changed.
            peer.give_up_at = NEVER if peer.failure is None else now + NOT_RUNNING_S
            self._out.append(ev.Reach(id))
        elif peer.state == DOWN and not self._is_needed(peer):
            # Nobody has counted the time while nothing was open there.
            peer.since = now
            peer.look_in = LOOK_AFTER_S
            peer.look_at = now
        return peer

    def _flush(self, peer: Peer) -> None:
        """Says what waits in the outbox: consecutive tasks of one lane in one SUBMIT, up to the batch size."""
        outbox, out, functions = peer.outbox, self._out, peer.functions
        lane: Lane | None = None
        tasks: list[Any] = []
        fns: dict[bytes, int] = {}
        last_fn: tuple[bytes, bytes] | None = None
        fn_index, room, size = -1, 0, 0
        wanted: list[Any] = []
        wanted_home = b""
        revoked: dict[bytes, list[Entry]] = {}
        while outbox:
            entry = outbox.popleft()
            if entry.state != UNSENT:
                if entry.users and entry.extra is not None and entry.extra.revoked:
                    revoked.setdefault(entry.home, []).append(entry)
                continue
            entry.state = SENT
            entry.pinned = True
            spec = entry.spec
            entry.spec = None
            if spec is None:
                token = entry.extra.token if entry.extra is not None else None
                if entry.home != wanted_home or not wanted:
                    wanted, wanted_home, lane = [], entry.home, None
                    out.append(ev.Send(peer.id, [m.SUBSCRIBE, wanted_home, wanted]))
                wanted.append([entry.id, token, None, False])
                continue
            if len(spec) == 6:
                of, id, size, blob, _kept, _holder = spec
                out.append(ev.Send(peer.id, [m.OFFER, of.home, of.group, of.secret, [[id, size, blob]]]))
                lane = None
                continue
            of, id, fn, payload, deps, passed, upload, _kept, _holder = spec
            if of is not lane or room == 0 or size > SUBMIT_MAX_BYTES:
                size = 0
                lane, room, tasks, fns, last_fn, wanted = of, of.batch_size, [], {}, None, []
                # The dict of functions becomes a list when all tasks of the message are known: see below.
                message = [m.SUBMIT, of.home, of.group, of.secret, of.opts, fns, tasks]
                out.append(ev.Send(peer.id, message))
            room -= 1
            size += len(payload or b"") + len(deps or b"")
            if fn is None:
                fn_index = -1
                last_fn = None
            elif fn is not last_fn:
                last_fn = fn
                digest = fn[0]
                if digest not in functions:
                    functions.add(digest)
                    # Before the SUBMIT that is being filled: a function comes before its first task.
                    out.insert(len(out) - 1, ev.Send(peer.id, [m.FUNCTION, digest, fn[1]]))
                fn_index = fns.setdefault(digest, len(fns))
            args = None if upload is None else [upload.id, upload.size]
            tasks.append([id, fn_index, payload, deps, passed, args])
        for instruction in out:
            if type(instruction) is ev.Send and instruction.message[0] == m.SUBMIT:
                instruction.message[5] = list(instruction.message[5])
        for home, entries in revoked.items():
            self._revoke(peer, home, entries)

    def _revoke(self, peer: Peer, home: bytes, entries: list[Entry]) -> None:
        """Tells a home of tasks that it will never be sent: others may wait for them there, or ask for them later."""
        for entry in entries:
            assert entry.extra is not None
            entry.extra.revoked = False
            entry.pinned = True
        self._out.append(
            ev.Send(peer.id, [m.SUBSCRIBE, home, [[entry.id, None, None, False] for entry in entries]])
        )
        self._out.append(ev.Send(peer.id, [m.CANCEL, b"".join([entry.id for entry in entries]), False]))

    # ------------------------------------------------------------------------------------------------ from the peer

    def _heard(self, event: ev.Heard) -> None:
        peer = self.peers.get(event.peer)
        if peer is None:
            return
        self._now = event.now
        self._answered.clear()
        for message in event.messages:
            reader = self._readers.get(message[0])
            if reader is not None:
                reader(peer, message)

    def _outcome(self, peer: Peer, message: list[Any]) -> None:
        entries, ends, ok = self.entries, self._ends, m.OK
        for item in message[1]:
            id, status, value, attempt, record = item if len(item) == 5 else item[:5]
            entry = entries.get(id)
            if entry is None or entry.state == ENDED:
                if attempt > 1 and entry is not None and status in (ok, m.STORED):
                    self._renew(entry, status, value, attempt)
                continue
            lane = entry.lane
            if status == ok and entry.extra is None and lane is not None and entry.state != UNSENT:
                # The common way, without a call.
                entry.state = ENDED
                entry.lane = entry.fn = entry.args = None
                entry.peer.open -= 1
                root = lane.root
                root.open -= 1
                if root.open == 0:
                    self._out.append(ev.Idle(root))
                if entry.users:
                    ends.append((entry.holder, FINISHED, False, value, record))
                else:
                    self._release(entry)
                continue
            self._take(entry, status, value, attempt, record)

    def _renew(self, entry: Entry, status: int, value: Any, attempt: int) -> None:
        """Its home has run a task again that had ended, because the bytes were lost: who has not fetched them may now."""
        told = [entry] + [
            alias
            for alias in self.entries.values()
            if alias.extra is not None and alias.extra.target is entry and alias.state == ENDED
        ]
        for one in told:
            for holder in one.holder if type(one.holder) is list else (one.holder,):
                if holder is not None:
                    self._renewed.append((holder, status, value, attempt))

    def _take(self, entry: Entry, status: int, value: Any, attempt: int, record: list[Any] | None) -> None:
        if status == m.OK:
            self._end(entry, FINISHED, False, value, record)
        elif status == m.STORED:
            token = entry.extra.token if entry.extra is not None else None
            self._end(entry, FINISHED, False, Stored(entry.id, entry.home, value, attempt, token), record)
        elif status == m.FAILED:
            self._end(entry, FINISHED, True, value, record)
        elif status == m.CANCELLED_STATUS:
            self._end(entry, CANCELLED_AND_NOTIFIED, False, None, record)
        elif status == m.LOST:
            reason, text = value[:2]
            lost = failures.make("ObjectLostError", text, reason=reason, object_id=ids.text(entry.id))
            self._end(entry, FINISHED, True, lost, record)
        elif status == m.ALIAS:
            self._alias(entry, value, record)

    def _alias(self, entry: Entry, ref: bytes, record: list[Any] | None) -> None:
        """The object is whatever another one is: that one is subscribed to, and `entry` ends when it ends."""
        id, home, token = ref[:16], ref[16:32], ref[32:48]
        extra = entry.extra = entry.extra or Extra()
        if extra.target is not None:
            return  # said again
        extra.record = record
        target = self.entries.get(id)
        end = target
        while end is not None and end is not entry:
            end = end.extra.target if end.extra is not None else None
        if end is entry:
            text = "a task returned a future that waits for the task itself"
            self._end(entry, FINISHED, True, failures.make("DeadlockError", text), record)
            return
        if target is None:
            peer = self._peer(self._relay or home, self._now)
            target = self.entries[id] = Entry(id, home, peer, None, None)
            target.users = 0
            target.extra = Extra(token)
            self._subscribe(target)
        elif target.state == ENDED:
            self._reopen(target, self._now)
        target.users += 1
        extra.target = target
        target.extra = target.extra or Extra()
        target.extra.followers[entry] = None

    def _end(self, entry: Entry, state: str, failed: bool, raw: Any, record: list[Any] | None) -> None:
        """Ends an entry and all that follow it."""
        pending = [entry]
        while pending:
            entry = pending.pop()
            if entry.state == ENDED:
                continue
            entry.state = ENDED
            entry.peer.open -= 1
            entry.spec = entry.args = entry.fn = None
            lane, entry.lane = entry.lane, None
            if lane is not None:
                lane.root.open -= 1
                if lane.root.open == 0:
                    self._out.append(ev.Idle(lane.root))
            extra = entry.extra
            own_record = record
            if extra is not None:
                own_record = extra.record or record
                pending.extend(extra.followers)
                extra.followers = {}
                for cancel in extra.cancels:
                    self._cancel_known(cancel, entry.id, state == CANCELLED_AND_NOTIFIED)
                extra.cancels = []
            holders = entry.holder if type(entry.holder) is list else (entry.holder,)
            for holder in holders:
                if holder is not None:
                    self._ends.append((holder, state, failed, raw, own_record))
            entry.holder = holders[-1]
            if entry.users == 0:
                self._release(entry)

    def _cancel_known(self, cancel: _Cancel, id: bytes, answer: bool) -> None:
        if id in cancel.answers:
            return
        cancel.answers[id] = answer
        cancel.missing -= 1
        if cancel.missing == 0 and cancel in self._cancels:
            self._cancels.remove(cancel)
            self._answer_cancel(cancel)

    def _cancelled(self, peer: Peer, message: list[Any]) -> None:
        joined, answers = message[1:3]
        for at, answer in enumerate(answers):
            entry = self.entries.get(joined[16 * at : 16 * at + 16])
            if entry is None or entry.state == ENDED:
                continue
            if answer:
                self._end(entry, CANCELLED_AND_NOTIFIED, False, None, None)
            elif entry.extra is not None:
                waiting, entry.extra.cancels = entry.extra.cancels, []
                for cancel in waiting:
                    self._cancel_known(cancel, entry.id, False)

    def _started(self, peer: Peer, message: list[Any]) -> None:
        holders: list[Any] = []
        for item in message[1]:
            entry = self.entries.get(item[0])
            if entry is not None and entry.state == SENT:
                entry.state = RUNNING
                holders.extend(entry.holder if type(entry.holder) is list else (entry.holder,))
        holders = [holder for holder in holders if holder is not None]
        if holders:
            self._out.append(ev.Running(holders))

    def _need_function(self, peer: Peer, message: list[Any]) -> None:
        wanted = set(message[1])
        for entry in self.entries.values():
            if not wanted:
                break
            fn = entry.fn
            if fn is not None and fn[0] in wanted and entry.peer is peer:
                wanted.discard(fn[0])
                peer.functions.add(fn[0])
                self._out.append(ev.Send(peer.id, [m.FUNCTION, fn[0], fn[1]]))

    def _tasks(self, peer: Peer, message: list[Any]) -> None:
        group, secret, items = message[1:4]
        kept = []
        for question in self._attaches.pop(group, ()):
            if question.peer is peer:
                self._out.append(ev.Answer(question.request, [secret, items]))
                self._answered.add(group)
            else:
                kept.append(question)
        if kept:
            self._attaches[group] = kept
        if group not in self._answered:
            # Said twice, or too late: nobody here wants what the ATTACH has pinned.
            strays = [item[0] for item in items if item[0] not in self.entries]
            if strays:
                self._out.append(ev.Send(peer.id, [m.UNSUBSCRIBE, b"".join(strays)]))

    def _explained(self, peer: Peer, message: list[Any]) -> None:
        question = self._explains.get(message[1])
        if question is not None and question.peer is peer:
            del self._explains[message[1]]
            self._out.append(ev.Answer(question.request, message[2]))

    def _forget(self, peer: Peer, message: list[Any]) -> None:
        joined = message[1]
        self._out.append(ev.Uploaded([joined[at : at + 16] for at in range(0, len(joined), 16)]))

    # ------------------------------------------------------------------------------------------- about the peer

    def _is_needed(self, peer: Peer) -> bool:
        return (
            peer.open > 0
            or peer.fetches > 0
            or any(q.peer is peer for qs in self._attaches.values() for q in qs)
        )

    def _peer_up(self, event: ev.PeerUp) -> None:
        peer = self.peers.get(event.peer)
        if peer is None:
            return
        peer.state = UP
        peer.since = event.now
        peer.trouble = ""
        peer.failure = peer.obstacle = None
        peer.give_up_at = NEVER
        if event.fresh and peer.met:
            self._ask_again(peer)
        peer.met = True
        if not peer.full:
            self._flush(peer)

    def _ask_again(self, peer: Peer) -> None:
        """A new process of the peer: answers of the old one may be lost, and questions have no place in its journal."""
        for questions in (self._explains.values(), *self._attaches.values()):
            self._out += [ev.Send(peer.id, asked.message) for asked in questions if asked.peer is peer]
        again: dict[bool, list[bytes]] = {}
        for entry in self.entries.values():
            if entry.peer is peer and entry.state in (SENT, RUNNING) and entry.extra and entry.extra.cancels:
                force = any(cancel.force for cancel in entry.extra.cancels)
                again.setdefault(force, []).append(entry.id)
        for force, asked_for in again.items():
            self._out.append(ev.Send(peer.id, [m.CANCEL, b"".join(asked_for), force]))

    def _peer_full(self, event: ev.PeerFull) -> None:
        peer = self.peers.get(event.peer)
        if peer is not None:
            peer.full = event.full
            if peer.state == UP and not peer.full:
                self._flush(peer)

    def _unsendable(self, event: ev.Unsendable) -> None:
        for id in event.ids:
            entry = self.entries.get(id)
            if entry is not None:
                entry.pinned = False
                self._end(entry, FINISHED, True, event.failure, None)

    def _peer_down(self, event: ev.PeerDown) -> None:
        peer = self.peers.get(event.peer)
        if peer is None or peer.state == APART:
            return
        peer.trouble = event.reason
        if peer.state == UP:
            peer.state = DOWN
            peer.since = event.now
            peer.look_in = LOOK_AFTER_S
            peer.look_at = event.now
            if event.now >= peer.refused_at + REFUSED_GRACE_S:
                peer.failure = None  # it was refused by another way, long ago
            peer.give_up_at = NEVER if peer.failure is None else event.now + REFUSED_GRACE_S

    def _peer_refused(self, event: ev.PeerRefused) -> None:
        peer = self.peers.get(event.peer)
        if peer is not None:
            peer.failure = event.failure
            peer.trouble = event.failure[1]
            peer.refused_at = event.now
            peer.give_up_at = min(peer.give_up_at, event.now + REFUSED_GRACE_S)

    def _peer_reset(self, event: ev.PeerReset) -> None:
        peer = self.peers.get(event.peer)
        if peer is None:
            return
        peer.functions = {message[1] for message in event.kept if message[0] == m.FUNCTION}
        safe: set[bytes] = set()
        for message in event.kept:
            if message[0] == m.SUBMIT:
                safe.update(task[0] for task in message[6])
            elif message[0] == m.OFFER:
                safe.update(item[0] for item in message[4])
            elif message[0] == m.SUBSCRIBE:
                safe.update(item[0] for item in message[2])
        text = f"endpoint {ids.text(peer.id)} came back without what it knew of this task; submit it again"
        self._fail(peer, self._lost(peer, text), lambda entry: entry.state != UNSENT and entry.id not in safe)

    def _peer_failed(self, event: ev.PeerFailed) -> None:
        peer = self.peers.get(event.peer)
        if peer is not None:
            self._give_up(peer, event.failure, for_good=True)

    def _peer_seen(self, event: ev.PeerSeen) -> None:
        peer = self.peers.get(event.peer)
        if peer is None or peer.state in (APART, UP):
            return
        peer.trouble = event.text or peer.trouble
        peer.obstacle = None if peer.met else event.failure
        tired = peer.state == CONNECTING and event.now - peer.since >= NOT_RUNNING_S
        if event.seen == SEEN_GONE:
            self._give_up(peer, self._lost(peer, event.text), for_good=True)
        elif event.seen == SEEN_STOPPED and tired:
            self._give_up(peer, self._lost(peer, event.text))

    def _lost(self, peer: Peer, text: str) -> list[Any]:
        return failures.make("EndpointLostError", text, endpoint_id=ids.text(peer.id))

    def _give_up(self, peer: Peer, failure: list[Any], *, for_good: bool = False) -> None:
        peer.state = APART
        peer.failure = failure
        peer.functions.clear()
        self._out.append(ev.Leave(peer.id))
        peer.outbox.clear()
        if not for_good:
            # Should we meet again: it may have some of them, and others there may wait for those that never came.
            for entry in self.entries.values():
                if entry.peer is peer and entry.lane is not None and entry.state != ENDED:
                    entry.extra = entry.extra or Extra()
                    entry.extra.revoked = True
                    peer.outbox.append(entry)
        self._fail(peer, failure, lambda entry: True)
        for group, questions in list(self._attaches.items()):
            kept = [question for question in questions if question.peer is not peer]
            for question in questions:
                if question.peer is peer:
                    self._out.append(ev.Answer(question.request, ev.Failure(failure)))
            if kept:
                self._attaches[group] = kept
            else:
                del self._attaches[group]

    def _fail(self, peer: Peer, failure: list[Any], which: Callable[[Entry], bool]) -> None:
        for entry in list(self.entries.values()):
            if entry.peer is peer and entry.state != ENDED and which(entry):
                self._end(entry, FINISHED, True, failure, None)

    def _tick(self, event: ev.Tick) -> None:
        now = event.now
        self._now = now
        for cancel in [cancel for cancel in self._cancels if cancel.deadline <= now]:
            self._cancels.remove(cancel)
            self._answer_cancel(cancel)
        for number, question in list(self._explains.items()):
            if question.deadline <= now:
                del self._explains[number]
                self._out.append(ev.Answer(question.request, None))
        self._tick_attaches(now)
        for peer in list(self.peers.values()):
            if peer.state in _AWAY and self._is_needed(peer):
                self._tick_peer(peer, now)

    def _tick_attaches(self, now: float) -> None:
        for group, questions in list(self._attaches.items()):
            late = [question for question in questions if question.deadline <= now]
            for question in late:
                questions.remove(question)
                text = f"endpoint {ids.text(question.peer.id)} did not answer in time; is it running?"
                self._out.append(ev.Answer(question.request, ev.Failure(self._lost(question.peer, text))))
            if not questions:
                del self._attaches[group]

    def _tick_peer(self, peer: Peer, now: float) -> None:
        if now >= peer.since + self._endpoint_lost_s:  # the very sum of `deadline`
            text = f"endpoint {ids.text(peer.id)} was out of reach for {self._endpoint_lost_s:g} s"
            if peer.trouble:
                text += f" ({peer.trouble})"
            self._give_up(peer, peer.obstacle or self._lost(peer, text))
        elif now >= peer.give_up_at and peer.failure is not None:
            self._give_up(peer, peer.failure)
        elif now >= peer.look_at:
            peer.look_at = now + peer.look_in
            peer.look_in = min(2 * peer.look_in, LOOK_EVERY_S)
            self._out.append(ev.Look(peer.id))

    # ------------------------------------------------------------------------------------------------- for tests

    def validate(self) -> None:
        """Checks the rules of the table; for tests."""
        by_peer: dict[Peer, int] = {}
        by_lane: dict[Lane, int] = {}
        followers: dict[bytes, int] = {}
        for entry in self.entries.values():
            if entry.extra is not None and entry.extra.target is not None:
                target = entry.extra.target
                followers[target.id] = followers.get(target.id, 0) + 1
                assert self.entries.get(target.id) is target, "what an alias stands for is kept"
                if entry.state != ENDED:
                    assert target.state != ENDED, "an alias ends with what it stands for"
        for entry in self.entries.values():
            assert entry.users >= followers.get(entry.id, 0), "aliases are users"
            if entry.state == ENDED:
                assert entry.users > 0, "what nobody stands for is released when it ends"
                assert (entry.lane, entry.args, entry.fn, entry.spec) == (None, None, None, None)
                continue
            by_peer[entry.peer] = by_peer.get(entry.peer, 0) + 1
            if entry.lane is not None:
                by_lane[entry.lane.root] = by_lane.get(entry.lane.root, 0) + 1
            if entry.state == UNSENT:
                assert entry in entry.peer.outbox, "what is unsent waits in an outbox"
                assert entry.peer.state != UP or entry.peer.full, "nothing waits for a peer that is up"
            assert entry.peer.state != APART, "somebody tries to reach a peer that is needed"
            if entry.peer.state != UP:
                assert self.deadline is not None, "every wait ends"
        for peer in self.peers.values():
            assert peer.open == by_peer.get(peer, 0), f"open: {peer.open}, not {by_peer.get(peer, 0)}"
        for lane, count in by_lane.items():
            assert lane.open == count, f"lane: {lane.open}, not {count}"
