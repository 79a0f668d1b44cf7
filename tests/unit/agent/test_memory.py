"""What an agent writes down, the next one recalls: at every point of a life, the brains stand where they stood."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from endpoint_worker.agent import inbox
from endpoint_worker.agent.functions import Functions
from endpoint_worker.agent.memory import COMMIT_AGAIN_S, Memory, Recalled
from endpoint_worker.journal import Journal
from gcref import ids
from gcref.brains import resolver_events as ev
from gcref.brains.peers import Forget, Identity, Peers
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, READY, Task
from gcref.objects import failure as failures
from gcref.wire import codec
from gcref.wire import messages as m

ME, CAROL, MIDWAY = b"me" * 8, b"carol..." * 2, b"midway.." * 2
GROUP, SECRET, KEY = b"group..." * 2, bytes(32), b"k" * 40
CODE = b"pickled function"
FN = hashlib.blake2b(CODE, digest_size=16).digest()
CLIENT = ev.Who(CAROL, "user", KEY, "client")
HOME = ev.Who(MIDWAY, "user", KEY, "endpoint")
TASKS = [bytes([n]) * 16 for n in range(1, 9)]


class Life:
    """An agent's brains and its memory, driven as its control loop does."""

    def __init__(self, folder: Path) -> None:
        self.resolver = Resolver(ME, unknown_object_s=600, lease_s=600)
        self.peers = Peers(Identity(ME, "endpoint", KEY, 1), lambda key, hello: "user")
        self.functions = Functions()
        self.journal = Journal(folder)
        self.memory = Memory(self.journal, self.resolver, self.peers, self.functions, "polaris")
        self.recalled: Recalled = self.memory.recall()
        self._sent: dict[bytes, int] = {}

    def begin(self) -> Life:
        self.memory.compact()
        return self

    def hear(self, who: ev.Who, *messages: list[Any]) -> None:
        first = self._sent.get(who.party, 0) + 1
        self._sent[who.party] = first + len(messages) - 1
        frame = codec.pack_packet(codec.DATA, 77, first, 0, 0, [codec.pack(each) for each in messages])
        unix = time.time()
        self.memory.note_packet(who, "direct", frame, unix)
        self.peers.restore(who.party, who.kind, who.owner, 77, self._sent[who.party])
        for message in codec.unpack_packet(frame).messages:
            m.check(message)
            event = inbox.event_of(message, who, "direct", time.monotonic(), unix)
            if event is not None:
                self.resolver.handle(event)
            elif message[0] == m.FUNCTION and self.functions.add(message[1], message[2]):
                self.resolver.handle(ev.FunctionsKnown([message[1]]))

    def dispatch(self, *wanted: bytes) -> None:
        for id in wanted:
            self.task(id).state = DISPATCHED

    def finish(self, *rows: list[Any]) -> None:
        self.memory.note_results(3, codec.pack([17, list(rows), []]))
        self.resolver.handle(ev.Finished("polaris/3", list(rows)))

    def take(self, event: Any) -> None:
        self.memory.note(event)
        self.resolver.handle(event)

    def task(self, id: bytes) -> Task:
        found = self.resolver.objects[id]
        assert isinstance(found, Task)
        return found

    def state(self) -> list[Any]:
        """All that a later life has to know again, in a form that can be compared. What was dispatched is ready again."""
        graph = [row for row in self.resolver.dump() if row[0] != "graph"]
        for kind, *rows in graph:
            for obj in rows[0] if kind == "objects" else ():
                obj[3] = READY if obj[3] == DISPATCHED else obj[3]
        taken = {party: self.peers.taken(party) for party in (CAROL, MIDWAY)}
        return [graph, dict(self.resolver.counts), taken, dict(self.functions.items())]


Lives = Callable[[Path], Life]


@pytest.fixture
def lives() -> Iterator[Lives]:
    """Makes lives that end as by `kill -9`: what was not committed is gone."""
    begun: list[Life] = []

    def make(folder: Path) -> Life:
        begun.append(Life(folder))
        return begun[-1]

    yield make
    for life in begun:
        life.journal._pending.clear()
        life.journal.close()


def row(seq: int, id: bytes, value: bytes = b"v", attempt: int = 1) -> list[Any]:
    return [seq, id, attempt, m.OK, value, 1.0, 0.5, None, None]


def spec(id: bytes, deps: bytes | None = None) -> list[Any]:
    return [id, 0, b"payload", deps, None, None]


def submit(*specs: list[Any], retries: int = 0) -> list[Any]:
    return [m.SUBMIT, ME, GROUP, SECRET, {"retries": retries} if retries else {}, [FN], list(specs)]


def a_life(life: Life) -> Iterator[str]:
    """A day of an agent, step by step."""
    remote = b"r" * 16 + MIDWAY + b"t" * 16
    own = TASKS[0] + ME + bytes(16)
    life.hear(CLIENT, submit(spec(TASKS[0]), spec(TASKS[1], own), retries=1), [m.FUNCTION, FN, CODE])
    yield "submitted"
    life.hear(CLIENT, submit(spec(TASKS[2], remote)), submit(spec(TASKS[3]), spec(TASKS[4])))
    yield "one waits for another site"
    life.dispatch(TASKS[0], TASKS[3])
    life.finish(row(1, TASKS[0]))
    yield "one is done"
    life.hear(HOME, [m.OUTCOME, [[b"r" * 16, m.OK, b"value", 1, None]]])
    yield "the other site has answered"
    life.dispatch(TASKS[1])
    life.take(ev.Ended([life.task(TASKS[1])], failures.make("WorkerLostError", "it died"), True))
    yield "a worker died, and its task is tried again"
    life.take(ev.Ended([life.task(TASKS[3])], failures.make("WorkerLostError", "it died"), True))
    yield "and one has no attempt left"
    life.hear(CLIENT, [m.CANCEL, TASKS[4] + TASKS[2], False])
    life.take(ev.Cancelled([life.task(TASKS[4])]))
    yield "one is cancelled, of the other it is not known"
    life.hear(CLIENT, [m.UNSUBSCRIBE, TASKS[0] + TASKS[3]])
    yield "two are let go"
    life.hear(CLIENT, submit(spec(TASKS[5])), [m.OFFER, ME, GROUP, SECRET, [[TASKS[6], 9_000_000, None]]])
    life.take(ev.Pulled([(TASKS[6], 1, {"direct": 9_000_000}, None)]))
    yield "a large value was put"
    life.dispatch(TASKS[5])
    life.finish([1, TASKS[5], 1, m.STORED, ["/dev/shm/x", 1_000_000], 1.0, 0.5, None, ["out", "err"]])
    yield "and a large result"
    life.take(ev.HomeLost(MIDWAY, failures.make("EndpointLostError", "gone")))
    life.take(ev.PartyGone(MIDWAY, 2.0))
    yield "the other site is lost"
    life.take(ev.PartyGone(CAROL, 2.0))
    life.memory.forget(CAROL)
    life.peers.handle(Forget(CAROL))
    yield "the client is gone for good"


STEPS = range(12)


@pytest.mark.parametrize("compact_at", [None, 0, 3, 8], ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_a_later_life_stands_where_the_last_one_stood(
    tmp_path: Path, lives: Lives, steps: int, compact_at: int | None
) -> None:
    life = lives(tmp_path / "journal").begin()
    day, told = a_life(life), ""
    for number in range(steps + 1):
        told = next(day)
        if number == compact_at:
            life.memory.compact()
    life.memory.commit()
    later = lives(tmp_path / "journal")
    assert later.state()[1:] == life.state()[1:], told
    assert sorted(map(repr, later.state()[0])) == sorted(map(repr, life.state()[0])), told
    again = lives(tmp_path / "journal")
    again.begin()
    assert lives(tmp_path / "journal").state()[1:] == life.state()[1:], (
        "also through a snapshot of what was recalled"
    )


def test_a_cancel_that_was_not_decided_is_asked_again(tmp_path: Path, lives: Lives) -> None:
    life = lives(tmp_path / "journal").begin()
    life.hear(CLIENT, submit(spec(TASKS[0]), spec(TASKS[1])), [m.CANCEL, TASKS[0] + TASKS[1], True])
    life.take(ev.Cancelled([life.task(TASKS[0])]))
    life.memory.commit()
    assert lives(tmp_path / "journal").recalled.cancels == [(TASKS[1], True, CLIENT)]
    lives(tmp_path / "journal").begin()  # which has made a snapshot, and decided nothing
    last = lives(tmp_path / "journal").begin()
    assert last.recalled.cancels == [(TASKS[1], True, CLIENT)]
    last.take(ev.Cancelled([last.task(TASKS[1])]))
    last.memory.commit()
    assert lives(tmp_path / "journal").recalled.cancels == []


def test_the_parties_of_workers_are_known_again(tmp_path: Path, lives: Lives) -> None:
    life = lives(tmp_path / "journal").begin()
    inside = ev.Who(ids.new_id(), "worker", KEY, "client")
    life.hear(inside, [m.STATUS, 1])
    life.hear(CLIENT, [m.STATUS, 1])
    assert lives(tmp_path / "journal").recalled.workers == {inside.party}


def test_what_a_role_may_not_do_is_not_done_in_the_recall_either(tmp_path: Path, lives: Lives) -> None:
    life = lives(tmp_path / "journal").begin()
    peer = ev.Who(MIDWAY, "peer", KEY, "endpoint")
    frame = codec.pack_packet(codec.DATA, 77, 1, 0, 0, [codec.pack(submit(spec(TASKS[0])))])
    life.memory.note_packet(peer, "direct", frame, time.time())
    assert TASKS[0] not in lives(tmp_path / "journal").resolver.objects


def test_an_entry_that_is_not_understood_is_passed_over(
    tmp_path: Path, lives: Lives, caplog: pytest.LogCaptureFixture
) -> None:
    life = lives(tmp_path / "journal").begin()
    life.journal.append(4, codec.pack(["NeverHeardOf", 0.0]))
    life.journal.append(99, b"")
    life.hear(CLIENT, submit(spec(TASKS[0])))
    assert TASKS[0] in lives(tmp_path / "journal").resolver.objects
    assert len([one for one in caplog.records if "not understood" in one.message]) == 2


def test_while_the_disk_is_full_nothing_counts_as_written(
    tmp_path: Path, lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = lives(tmp_path / "journal").begin()
    with monkeypatch.context() as patch:
        patch.setattr("os.writev", _full)
        life.hear(CLIENT, submit(spec(TASKS[0])))
        assert not life.memory.commit()
        assert 0 < (retry_at(life) or 0.0) - time.monotonic() <= COMMIT_AGAIN_S
    assert life.memory.commit()
    assert retry_at(life) is None
    assert TASKS[0] in lives(tmp_path / "journal").resolver.objects


def retry_at(life: Life) -> float | None:
    return life.memory.deadline


def _full(fd: int, parts: list[bytes]) -> int:
    raise OSError(28, "No space left on device")


def test_an_agent_that_does_not_come_back_writes_nothing(tmp_path: Path, lives: Lives) -> None:
    life = lives(tmp_path / "journal")
    memory = Memory(None, life.resolver, life.peers, life.functions, "polaris")
    memory.note_packet(CLIENT, "ipc", b"", 0.0)
    memory.note(ev.PartyGone(CAROL, 2.0))
    memory.compact()
    assert memory.commit()
    assert (memory.returns, memory.size_bytes, memory.troubles) == (False, 0, [])
    assert memory.recall() == Recalled([], set(), 0)
