"""What an agent writes into its journal, and how the next one takes it up: both sides of one format.

    living     packet ─► note_packet ─► journal ─► resolver          (written before it is handled)
               results, ends, cancels, … ─► note_… ─► journal        (written before anything leaves)
               log grown ─► compact: parties, functions, the resolver's rows ─► snapshot

    starting   snapshot ─► functions, parties, `Resolver.load`
               log ─► the same events ─► `Resolver.replay`           (what it answers was obeyed by the dead agent)

Only what changes the resolver is here. Workers, segments and links are not: those that live are met again, and what a dead
agent had sent is said once more (`resolver_events.Recovered`).
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from endpoint_worker.agent import inbox
from endpoint_worker.agent.functions import Functions
from endpoint_worker.journal import Journal
from gcref import ids
from gcref.brains import peers as sessions
from gcref.brains import resolver_events as ev
from gcref.brains.peers import Peers
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DONE, Task
from gcref.errors import ProtocolError
from gcref.wire import codec
from gcref.wire import messages as m

log = logging.getLogger("gcref.agent")

# Kinds of entries.
PARTY: Final = 1  # [number, party, role, owner key, kind, carrier]: who packets are from
PACKET: Final = 2  # number of the sender (u32), unix time (f64), the packet as it came
RESULTS: Final = 3  # number of the worker (u32), its DONE as it came
EVENT: Final = 4  # [name, unix time, fields…]: an event of the resolver that is not a message
FUNCTION: Final = 5  # digest, then the function's bytes
SESSION: Final = 6  # [party, kind, owner key, role, epoch, taken]
STATE: Final = 7  # a row of the resolver's dump
FORGOTTEN: Final = 8  # a party whose session is over
CANCEL: Final = 9  # [task, force, who asked…]: a cancel that is not decided

COMMIT_AGAIN_S: Final = 1.0
"""How long a full disk is left alone before the journal is written again."""

_PACKET: Final = struct.Struct("<Id")
_WORKER: Final = struct.Struct("<I")
_DIGEST_BYTES: Final = 16
_ENTRY_MAX_BYTES: Final = 1 << 34  # it is ours; this only guards against nonsense


class Recalled(NamedTuple):
    """What a new agent has to know beside what its brains know again.

    Attributes:
        cancels: (id, force, who asked) of the cancels for tasks that have not ended.
        workers: parties that were the SDK inside workers.
        last_worker: the highest number of a worker whose results are in the journal.
    """

    cancels: list[tuple[bytes, bool, ev.Who]]
    workers: set[bytes]
    last_worker: int


class Memory:
    """The agent's memory: what the journal holds, in the agent's own terms.

    Args:
        journal: where it is written; None: an agent that does not come back, for which all this does nothing.
        resolver, peers, functions: what is remembered.
        endpoint: the endpoint's name: workers are called by it.

    Attributes:
        deadline: when `commit` is to be tried again after it failed, monotonic seconds; None: it did not fail.
        open_cancels: gives the cancels that are not decided: (id, force, who asked).
    """

    def __init__(
        self, journal: Journal | None, resolver: Resolver, peers: Peers, functions: Functions, endpoint: str
    ) -> None:
        self._journal = journal
        self._resolver = resolver
        self._peers = peers
        self._functions = functions
        self._endpoint = endpoint
        self._numbers: dict[tuple[Any, ...], int] = {}  # of (who…, carrier)
        self._senders: dict[int, tuple[ev.Who, str]] = {}
        self._met: dict[bytes, ev.Who] = {}
        self.deadline: float | None = None
        self.open_cancels: Callable[[], Iterable[tuple[bytes, bool, ev.Who]]] = lambda: ()

    @property
    def returns(self) -> bool:
        """Whether there will be another life to remember this one."""
        return self._journal is not None

    @property
    def size_bytes(self) -> int:
        """Of the journal."""
        return self._journal.size_bytes if self._journal is not None else 0

    @property
    def troubles(self) -> list[str]:
        """What could not be read of an earlier life."""
        return self._journal.troubles if self._journal is not None else []

    # -------------------------------------------------------------------------------------------------- writing

    def note_packet(self, who: ev.Who, carrier: str, frame: bytes, unix: float) -> None:
        """Write a packet, now: it is about to be handled."""
        if self._journal is None:
            return
        number = self._numbers.get((who, carrier))
        if number is None:
            number = self._number(who, carrier)
            self._journal.append(
                PARTY, codec.pack([number, who.party, who.role, who.owner, who.kind, carrier])
            )
        self._journal.append(PACKET, _PACKET.pack(number, unix), frame)
        self.commit()

    def note_results(self, worker: int, done: bytes) -> None:
        """Write a worker's DONE, with the next commit."""
        if self._journal is not None:
            self._journal.append(RESULTS, _WORKER.pack(worker), done)

    def note(self, event: Any) -> None:
        """Write an event of the resolver that is not a message, with the next commit; what leaves no trace is passed over."""
        if self._journal is not None and (write := _WRITERS.get(event.__class__)) is not None:
            fields = write(event)
            self._journal.append(EVENT, codec.pack([event.__class__.__name__, time.time(), *fields]))

    def commit(self) -> bool:
        """Write what was noted. False: the disk does not take it, so nothing that rests on it may leave; try again later."""
        if self._journal is None:
            return True
        try:
            self._journal.commit()
        except OSError as error:
            now = time.monotonic()
            if self.deadline is None:
                log.error("the journal cannot be written, so nothing is acknowledged until it can: %s", error)
            if self.deadline is None or self.deadline <= now:
                self.deadline = now + COMMIT_AGAIN_S
            return False
        if self.deadline is not None:
            self.deadline = None
            log.info("the journal can be written again")
        return True

    def forget(self, party: bytes) -> None:
        """A session is over for good; with the next commit. Should that party come back, it is to see that it was forgotten."""
        if self._journal is not None and party in self._met:
            self._journal.append(FORGOTTEN, party)
            self._drop(party)

    def _drop(self, party: bytes) -> None:
        self._met.pop(party, None)
        for key in [key for key in self._numbers if key[0].party == party]:
            del self._senders[self._numbers.pop(key)]

    def compact_if_due(self) -> None:
        """Replace the log by a snapshot when it has grown."""
        if self._journal is not None and self._journal.wants_compaction:
            self.compact()

    def compact(self) -> None:
        """Replace the log by a snapshot. On a full disk the log goes on growing, and this is tried again."""
        if self._journal is None:
            return
        started = time.monotonic()
        try:
            self._journal.compact(self._entries())
        except OSError as error:
            log.error("the journal could not be compacted: %s", error)
            return
        took_s = time.monotonic() - started
        log.info("journal compacted to %d bytes in %.3f s", self._journal.size_bytes, took_s)

    def _number(self, who: ev.Who, carrier: str) -> int:
        number = self._numbers[(who, carrier)] = max(self._senders, default=0) + 1
        self._senders[number] = (who, carrier)
        self._met[who.party] = who
        return number

    def _entries(self) -> Iterator[tuple[int, bytes]]:
        for digest, code in self._functions.items():
            yield FUNCTION, digest + code
        for (who, carrier), number in self._numbers.items():
            yield PARTY, codec.pack([number, who.party, who.role, who.owner, who.kind, carrier])
        for party, who in self._met.items():
            epoch, taken = self._peers.taken(party)
            yield SESSION, codec.pack([party, who.kind, who.owner, who.role, epoch, taken])
        for row in self._resolver.dump():
            yield STATE, codec.pack(row)
        for id, force, who in self.open_cancels():
            yield CANCEL, codec.pack([id, force, *who])

    # -------------------------------------------------------------------------------------------------- reading

    def recall(self) -> Recalled:
        """Bring the brains to where the journal ends; before anything is noted."""
        reading = _Reading(self)
        if self._journal is not None:
            for kind, body in self._journal.read():
                reading.take(kind, body)
            reading.end_of_rows()
            for trouble in self._journal.troubles:
                log.error("%s", trouble)
        open_cancels = [
            (id, force, who)
            for id, (force, who) in reading.cancels.items()
            if (task := self._resolver.objects.get(id)) is not None and task.state < DONE
        ]
        self.open_cancels = lambda: open_cancels
        workers = {party for party, who in self._met.items() if who.role == "worker"}
        return Recalled(open_cancels, workers, reading.last_worker)


class _Reading:
    """One pass over a journal."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._resolver = memory._resolver
        self._rows: list[Any] | None = []  # of the snapshot; None once they are loaded
        # The journal tells the time of day, the brains want a clock that never goes back: one is laid over the other.
        self._offset = time.monotonic() - time.time()
        self.cancels: dict[bytes, tuple[bool, ev.Who]] = {}
        self.last_worker = 0
        self._table: dict[int, Callable[[bytes], Any]] = {
            PARTY: self._party,
            PACKET: self._packet,
            RESULTS: self._results,
            EVENT: self._event,
            FUNCTION: lambda body: memory._functions.add(body[:_DIGEST_BYTES], body[_DIGEST_BYTES:]),
            SESSION: self._session,
            STATE: self._state,
            FORGOTTEN: self._forgotten,
            CANCEL: self._cancel,
        }

    def take(self, kind: int, body: bytes) -> None:
        """Take one entry. One that is not understood is told, and passed over: the others are worth having."""
        if kind in (PACKET, RESULTS, EVENT):
            self.end_of_rows()
        try:
            self._table[kind](body)
        except (ValueError, TypeError, LookupError, AttributeError, struct.error, ProtocolError):
            log.exception("an entry of kind %d of the journal was not understood", kind)

    def end_of_rows(self) -> None:
        """The snapshot is over: the resolver takes its rows."""
        rows, self._rows = self._rows, None
        if rows:
            self._resolver.load(rows, time.monotonic())

    def _unpack(self, body: bytes) -> Any:
        return codec.unpack(body, _ENTRY_MAX_BYTES)

    def _party(self, body: bytes) -> None:
        number, party, role, owner, kind, carrier = self._unpack(body)
        who = ev.Who(party, role, owner, kind)
        memory = self._memory
        memory._senders[number] = (who, carrier)
        memory._numbers[(who, carrier)] = number
        memory._met[party] = who

    def _session(self, body: bytes) -> None:
        party, kind, owner, role, epoch, taken = self._unpack(body)
        self._memory._met[party] = ev.Who(party, role, owner, kind)
        self._memory._peers.restore(party, kind, owner, epoch, taken)

    def _state(self, body: bytes) -> None:
        assert self._rows is not None, "rows stand before events"
        self._rows.append(self._unpack(body))

    def _cancel(self, body: bytes) -> None:
        id, force, *who = self._unpack(body)
        self.cancels[id] = (force, ev.Who(*who))

    def _packet(self, body: bytes) -> None:
        number, unix = _PACKET.unpack_from(body)
        who, carrier = self._memory._senders[number]
        packet = sessions.replay(body[_PACKET.size :])
        self._memory._peers.restore(who.party, who.kind, who.owner, packet.epoch, packet.last_seq)
        for message in packet.messages:
            self._message(message, who, carrier, unix)

    def _message(self, message: list[Any], who: ev.Who, carrier: str, unix: float) -> None:
        if not inbox.allowed(message[0], who):
            return
        try:
            event = inbox.event_of(message, who, carrier, unix + self._offset, unix)
            if event is not None:
                self._resolver.replay(event)
            elif message[0] == m.FUNCTION:
                if self._memory._functions.add(message[1], message[2]):
                    self._resolver.replay(ev.FunctionsKnown([message[1]]))
            elif message[0] == m.CANCEL:
                for id in inbox.split_ids(message[1]):
                    self.cancels[id] = (bool(message[2]), who)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError):  # as it was with the dead agent
            log.warning("a message of kind %s from %s was not understood", message[0], ids.text(who.party))

    def _results(self, body: bytes) -> None:
        (worker,) = _WORKER.unpack_from(body)
        self.last_worker = max(self.last_worker, worker)
        done = self._unpack(body[_WORKER.size :])
        self._resolver.replay(ev.Finished(f"{self._memory._endpoint}/{worker}", done[1]))

    def _forgotten(self, party: bytes) -> None:
        self._memory._drop(party)
        self._memory._peers.handle(sessions.Forget(party))

    def _event(self, body: bytes) -> None:
        name, unix, *fields = self._unpack(body)
        event = _READERS[name](self._resolver, unix + self._offset, *fields)
        if event is not None:
            self._resolver.replay(event)


# How the events that are not messages are written and read. A task is named by its id and attempt; one that the brains do
# not know (any more) is passed over.


def _named(tasks: list[Task]) -> list[list[Any]]:
    return [[task.id, task.attempt] for task in tasks]


def _found(resolver: Resolver, named: list[list[Any]]) -> list[Task]:
    found = [(resolver.objects.get(id), attempt) for id, attempt in named]
    return [task for task, attempt in found if isinstance(task, Task) and task.attempt == attempt]


def _read_argument_gone(resolver: Resolver, now: float, task: list[Any], obj: bytes) -> Any:
    tasks, argument = _found(resolver, [task]), resolver.objects.get(obj)
    return ev.ArgumentGone(tasks[0], argument) if tasks and argument is not None else None


_WRITERS: Final[dict[type, Callable[[Any], tuple[Any, ...]]]] = {
    ev.Ended: lambda e: (_named(e.tasks), e.failure, e.retry),
    ev.Cancelled: lambda e: (_named(e.tasks),),
    ev.Pulled: lambda e: (e.items,),
    ev.PullFailed: lambda e: tuple(e),
    ev.PartyGone: lambda e: (e.party,),
    ev.HomeLost: lambda e: (e.home, e.failure),
    ev.HomeRestarted: lambda e: (e.home,),
    ev.ArgumentGone: lambda e: ([e.task.id, e.task.attempt], e.obj.id),
    ev.BytesLost: lambda e: (e.items,),
    ev.PullWaits: lambda e: tuple(e),
    ev.Evicted: lambda e: (e.ids,),
    ev.Tick: lambda e: (),
}

_READERS: Final[dict[str, Callable[..., Any]]] = {
    "Ended": lambda r, now, tasks, failure, retry: ev.Ended(_found(r, tasks), failure, retry),
    "Cancelled": lambda r, now, tasks: ev.Cancelled(_found(r, tasks)),
    "Pulled": lambda r, now, items: ev.Pulled([tuple(item) for item in items]),
    "PullFailed": lambda r, now, *fields: ev.PullFailed(*fields),
    "PullWaits": lambda r, now, *fields: ev.PullWaits(*fields),
    "PartyGone": lambda r, now, party: ev.PartyGone(party, now),
    "HomeLost": lambda r, now, home, failure: ev.HomeLost(home, failure),
    "HomeRestarted": lambda r, now, home: ev.HomeRestarted(home),
    "ArgumentGone": _read_argument_gone,
    "BytesLost": lambda r, now, items: ev.BytesLost([tuple(item) for item in items]),
    "Evicted": lambda r, now, ids: ev.Evicted(ids),
    "Tick": lambda r, now: ev.Tick(now),
}
