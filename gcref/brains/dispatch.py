"""Which worker gets which task, and when: the brain between the resolver and the worker channels.

    resolver --Ready--> [ queue, first in first out ] --Assign--> worker 1: [running | held ahead ...]
                            ^                                     worker 2: [running | held ahead ...]
                            '--- given back, stolen, left by a dead worker: at the front, in their order

Rules that hold after every event (`validate` checks them):

* **Order.** Ready tasks leave the queue in its order. Idle workers get work first; what there is, is levelled over the workers.
* **Look-ahead.** A worker may hold tasks worth about `LOOKAHEAD_S` by the measured time of their functions. It is topped up
  when it is down to half, so that it never runs dry. Behind or before a function without a measurement, a task with a
  walltime or one with resources, nothing is held.
* **Chain-ahead.** When the queue is empty, waiting tasks whose missing arguments are all held by one worker may follow
  them there: the first dependent of each task, and more of them only as long as all together are shorter than a round
  trip, because a wide fan-out belongs to all workers.
* **Leases.** A worker starts what it holds freely while its lease lasts: one lease for each worker, brought by every
  `Assign` and `Grant`, of which the latest counts. To start an entry it writes the seq to its progress page, *then* reads
  the clock; when the lease is over it asks. So what a progress page says later than lease + margin is final until we
  extend the lease, and all above it is ours to take back. A worker from which something was taken gets nothing more until
  it has asked and was told. Every `Grant` answers one question, so that no earlier one can be taken for the answer.
* **Stealing.** A worker is idle, the queue is empty, another's lease is over: half of what that one has not started
  comes back.
* **Lent slots.** At most `workers` processes run tasks at any time; a blocked one does not count. More processes are
  started when there is something to run and nobody to run it, and retired when they were idle for `SPARE_S`.
* **Adopted workers.** What a worker runs that an earlier agent had started goes on and uses a slot; one without a task
  counts as a process that is starting. Neither gets anything before it has said that it knows us.

A task that is taken back is READY and in the queue, or WAITING when arguments are missing. This brain reads `waiters`, `deps`,
`missing` and `options` of a task, and writes `state` (READY, DISPATCHED, WAITING), `worker`, `seq` and `sent_at`.

Source: chunks that shrink as the queue does are guided self-scheduling (Polychronopoulos and Kuck, 1987).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from math import inf
from typing import Any, Final, NoReturn

from gcref.brains import dispatch_events as ev
from gcref.brains import dispatch_facts as facts
from gcref.brains.dispatch_ahead import follow
from gcref.brains.dispatch_events import Event, Instruction
from gcref.brains.dispatch_worker import (
    ABSENT,
    AWAITED,
    BLOCKED,
    DEAD,
    LOOKAHEAD_S,
    QUEUED,
    REFUSED,
    RESUMING,
    RETIRING,
    STAYS,
    UP,
    Costs,
    Worker,
    function_of,
)
from gcref.brains.tasks import DEFAULT_OPTIONS, DISPATCHED, READY, STATE_NAMES, WAITING, Task

LEASE_S: Final = 0.020
"""Seconds for which a worker starts what it holds without asking."""
LEASE_MARGIN_S: Final = 0.001
"""Seconds after a lease's end before its worker's progress page counts as final."""
STARTED_AFTER_S: Final = 0.050
"""A task that runs for longer is told to its submitter."""
SPARE_S: Final = 1.0
"""Seconds that a surplus worker stays idle before it is retired: a task that blocks again and again needs no fork each time."""
LOG_EVENTS: Final = 64
"""Events remembered for the text of an `IllegalEventError`."""

_NOTHING: Final = (0, 0.0)
_ALWAYS: Final = {state: state for state in (AWAITED, UP, BLOCKED, RESUMING, REFUSED, RETIRING, DEAD)}

TRANSITIONS: Final[dict[type, dict[str, str]]] = {
    ev.WorkerUp: {ABSENT: UP, DEAD: DEAD},
    ev.Rejoined: {AWAITED: UP, UP: UP, BLOCKED: BLOCKED, DEAD: DEAD},  # once for each that was adopted
    ev.WorkerDown: dict.fromkeys((ABSENT, AWAITED, UP, BLOCKED, RESUMING, REFUSED, RETIRING), DEAD),
    ev.Finished: _ALWAYS,  # and to UP when it is the blocked task that has ended
    ev.GaveBack: _ALWAYS,
    ev.Asked: {UP: UP, REFUSED: UP, RETIRING: RETIRING, DEAD: DEAD},
    ev.Blocked: {UP: BLOCKED, REFUSED: BLOCKED, DEAD: DEAD},  # or to REFUSED, by Deadlocked
    ev.Resume: {BLOCKED: RESUMING, REFUSED: UP, DEAD: DEAD},  # and from RESUMING to UP by Slot
}
"""Worker event → state that it is legal in → state that follows. What is absent is illegal.

What a dead worker has said before its end may arrive after it, and changes nothing.
"""


class IllegalEventError(Exception):
    """An event that its subject's state does not allow. Nothing was changed; the text tells the subject's last events."""


class Dispatch:
    """The dispatch brain of one endpoint.

    Args:
        workers: slots, which is how many tasks run at the same time. So many processes the shell is starting already.
        max_extra: how many processes more there may be while tasks are blocked.
        now: monotonic seconds.
    """

    def __init__(self, workers: int, *, max_extra: int, now: float) -> None:
        self._slots = workers
        self._max_workers = workers + max_extra
        self._now = now
        self._queue: deque[Task] = deque()
        self._withdrawn: set[Task] = set()  # still in the queue, to be skipped
        self._costs = Costs()
        self._workers: dict[int, Worker] = {}
        self._idle: dict[int, Worker] = {}  # up and holding nothing; the most recent last
        self._starting = workers
        self._awaited: set[int] = set()  # adopted without a task; they are among those that are starting
        self._adopted = 0
        self._retiring: set[int] = set()
        self._dead: set[int] = set()
        self._blocked = 0  # workers BLOCKED or RESUMING
        self._kept = 0  # of these, the ones that keep their slot
        self._resuming: deque[Worker] = deque()
        self._log: deque[tuple[float, str, int | None, bytes]] = deque(maxlen=LOG_EVENTS)
        self._out: list[Instruction] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.Ready: self._ready,
            ev.WorkerUp: self._worker_up,
            ev.WorkerDown: self._worker_down,
            ev.Adopted: self._adopt,
            ev.Rejoined: self._rejoined,
            ev.Finished: self._finished,
            ev.GaveBack: self._gave_back,
            ev.Asked: self._asked,
            ev.Blocked: self._block,
            ev.Resume: self._resume,
            ev.Withdraw: self._withdraw,
            ev.Cancel: self._cancel,
            ev.Tick: self._tick,
        }

    # ------------------------------------------------------------------------------------------------- outside

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event and say what to do, in order.

        Raises:
            IllegalEventError: the event is not legal now; nothing was changed.
        """
        out: list[Instruction] = []
        self._out = out
        self._handlers[type(event)](event)
        if self._queue and not self._idle:
            self._spawn_for_demand()
        return out

    @property
    def deadline(self) -> float | None:
        """When `Tick` is due: monotonic seconds, maybe past (then at once); None when only events can change anything."""
        first = inf
        workers, idle = self._workers, self._idle
        if len(idle) < len(workers):
            helpers = not self._queue and self._helpers() > 0
            for worker in workers.values():
                if not worker.held:
                    continue
                due = worker.notice_at
                if due is not None and due < first:
                    first = due
                due = worker.overrun_at
                if due is not None and due < first:
                    first = due
                if not worker.settled and worker.lease_until + LEASE_MARGIN_S < first:
                    ahead = next(reversed(worker.held)) > worker.started
                    if worker.cancelling or (ahead and (helpers or worker.blocked is not None)):
                        first = worker.lease_until + LEASE_MARGIN_S
        if idle and self._surplus() > 0:
            first = min(first, next(iter(idle.values())).idle_since + SPARE_S)
        return None if first == inf else first

    def is_up(self, worker: int) -> bool:
        """Whether the worker came up and is not down."""
        return worker in self._workers or worker in self._retiring or worker in self._awaited

    def is_blocked(self, task: Task) -> bool:
        """Whether it has begun, and waits for a future."""
        worker = self._workers.get(task.worker) if task.worker is not None else None
        return worker is not None and worker.blocked is task

    def is_running(self, task: Task) -> bool | None:
        """True: started, its end not known here. False: not started. None: held by a worker that may be starting it."""
        worker = self._workers.get(task.worker) if task.worker is not None else None
        if worker is None:
            return False
        if task.seq <= worker.started:
            return True
        return False if worker.settled else None

    def describe(self, progress: Mapping[int, int], now: float) -> dict[str, Any]:
        """The state of the dispatch, for STATUS: plain values. `progress`: as in `Tick`."""
        workers = [facts.of_worker(w, progress.get(w.number, 0), now) for w in self._workers.values()]
        return {
            "slots": self._slots, "free_slots": self._free(), "queued": self._queued(), "starting": self._starting,
            "blocked": self._blocked, "resuming": len(self._resuming), "retiring": len(self._retiring),
            "functions_measured": len(self._costs), "workers": workers,
        }  # fmt: skip

    def places_of(
        self, tasks: Iterable[Task], progress: Mapping[int, int], now: float
    ) -> dict[Task, dict[str, Any]]:
        """Where tasks are that are READY or DISPATCHED, for EXPLAIN. `progress`: as in `Tick`."""
        return facts.of_tasks(tasks, self._workers, self._queue, progress, now)

    def head(self, count: int) -> list[Task]:
        """The first tasks of the queue."""
        return list(islice(self._queue, count))

    # -------------------------------------------------------------------------------------------------- legality

    def _move(self, event: Any) -> tuple[Worker | None, str]:
        """The worker of an event, and the state that follows; None for one that is not up."""
        number: int = event.worker
        worker = self._workers.get(number)
        if worker is not None:
            state = worker.state
        else:
            state = (
                RETIRING
                if number in self._retiring
                else DEAD
                if number in self._dead
                else AWAITED
                if number in self._awaited
                else ABSENT
            )
        after = TRANSITIONS[type(event)].get(state)
        if after is None:
            self._refuse(event, f"worker {number} is {state}", number, None)
        self._now = event.now
        return worker, after

    def _refuse(self, event: Any, why: str, worker: int | None, task: Task | None) -> NoReturn:
        lines = [f"{type(event).__name__} is illegal: {why}"]
        if task is not None:
            state = STATE_NAMES[task.state]
            lines.append(
                f"task {task.id.hex()}: {state}, worker {task.worker}, seq {task.seq}, missing {task.missing}"
            )
        for at, what, number, ids in self._log:
            if task is not None:
                ours = any(ids.startswith(task.id, i) for i in range(0, len(ids), 16))
            else:
                ours = number == worker
            if ours:
                where = "" if number is None else f" worker {number}"
                lines.append(f"  {at:.6f} {what}{where} ({len(ids) // 16} tasks)")
        raise IllegalEventError("\n".join(lines))

    def _note(self, now: float, what: str, worker: int | None, tasks: Iterable[Task] = ()) -> None:
        self._log.append((now, what, worker, b"".join([task.id for task in tasks])))

    # ---------------------------------------------------------------------------------------------------- counts

    def _queued(self) -> int:
        return len(self._queue) - len(self._withdrawn)

    def _free(self) -> int:
        """Slots that nobody uses."""
        return self._slots - self._kept - (len(self._workers) - len(self._idle) - self._blocked)

    def _helpers(self) -> int:
        """How many workers could take something over now: idle ones, or processes to be started for lent slots."""
        if self._resuming:
            return 0
        if self._idle:
            found = min(len(self._idle), self._free())
        elif self._blocked:
            found = min(self._free(), self._max_workers - len(self._workers)) - self._starting
        else:
            return 0
        # More may be starting than there are slots: those who lent theirs have come back meanwhile.
        return max(0, found)

    def _surplus(self) -> int:
        """Workers that could run tasks, beyond the slots."""
        return len(self._workers) - self._blocked - self._slots

    # ----------------------------------------------------------------------------------------------------- tasks

    def _ready(self, event: ev.Ready) -> None:
        tasks, now = event.tasks, event.now
        for task in tasks:
            if task.worker is not None or task.seq == QUEUED or task.state > READY or task.missing:
                self._refuse(event, "a task is queued, held, ended, or lacks an argument", None, task)
        if len(tasks) > 1 and len(set(tasks)) < len(tasks):
            self._refuse(event, "a task is in it twice", None, max(tasks, key=list(tasks).count))
        self._now = now
        for task in tasks:
            task.state = READY
            task.seq = QUEUED
        self._note(now, "Ready", None, tasks)
        if self._withdrawn:
            back = self._withdrawn.intersection(tasks)
            if back:  # these never left the queue
                self._withdrawn -= back
                tasks = [task for task in tasks if task not in back]
        # Workers that have room while others queue are topped up when they are next heard of.
        idle_queue = not self._queue
        self._queue.extend(tasks)
        if idle_queue or self._idle:
            self._fill(now)

    def _withdraw(self, event: ev.Withdraw) -> None:
        now = self._now = event.now
        self._note(now, "Withdraw", None, event.tasks)
        for worker, tasks in self._by_worker(event.tasks).items():
            worker.haunted = worker.haunted or any(task.seq <= worker.started for task in tasks)
            worker.dropped += self._let_go(worker, tasks, now)
            if not worker.held:
                self._rest(worker, now)
        self._balance(now)

    def _by_worker(self, tasks: Sequence[Task]) -> dict[Worker, list[Task]]:
        """Drop the queued ones of these from the queue; the held ones by worker."""
        held: dict[Worker, list[Task]] = {}
        for task in tasks:
            if task.worker is not None:
                held.setdefault(self._workers[task.worker], []).append(task)
            elif task.seq == QUEUED:
                task.seq = STAYS
                if task.state == READY:
                    task.state = WAITING
                self._withdrawn.add(task)
        if len(self._withdrawn) * 2 > len(self._queue):
            self._sweep()
        return held

    def _sweep(self) -> None:
        """Drop the withdrawn tasks from the queue. It is never empty but for them."""
        gone = self._withdrawn
        self._queue = deque([task for task in self._queue if task not in gone])
        self._withdrawn = set()

    def _cancel(self, event: ev.Cancel) -> None:
        now = self._now = event.now
        self._note(now, "Cancel", None, event.tasks)
        cancelled: list[Task] = []
        not_cancelled: list[Task] = []
        unknown = []
        for task in dict.fromkeys(event.tasks):
            if task.worker is not None:
                unknown.append(task)
            elif task.state <= READY:
                cancelled.append(task)
            else:
                not_cancelled.append(task)
        self._by_worker(cancelled)
        for task in cancelled:
            task.state = WAITING
        for worker, tasks in self._by_worker(unknown).items():
            fresh = [task for task in tasks if task not in worker.cancelling]
            started = [task for task in fresh if task.seq <= worker.started]
            not_cancelled += started
            fresh = [task for task in fresh if task.seq > worker.started]
            if worker.settled:
                cancelled += fresh
                worker.revoked += self._let_go(worker, fresh, now)
            else:
                worker.cancelling.update(dict.fromkeys(fresh))
        self._answer(cancelled, not_cancelled)
        self._balance(now)

    def _answer(self, cancelled: list[Task], not_cancelled: list[Task]) -> None:
        if cancelled:
            for task in cancelled:
                task.seq = STAYS  # until the resolver ends it
            self._out.append(ev.Cancelled(cancelled))
        if not_cancelled:
            self._out.append(ev.NotCancelled(not_cancelled))

    def _decide_cancels(self, worker: Worker, started: int, now: float) -> None:
        """The worker has started nothing above `started`, for certain: answer what was asked of it."""
        asked = list(worker.cancelling)
        worker.cancelling.clear()
        stopped = [task for task in asked if task.seq > started]
        runs = [task for task in asked if task.seq <= started]
        worker.revoked += self._let_go(worker, stopped, now)
        self._answer(stopped, runs)

    # --------------------------------------------------------------------------------------------------- workers

    def _worker_up(self, event: ev.WorkerUp) -> None:
        if self._move(event)[1] == DEAD:
            return
        now = event.now
        worker = Worker(event.worker, now)
        self._starting = max(len(self._awaited), self._starting - 1)
        self._workers[event.worker] = self._idle[event.worker] = worker
        self._note(now, "WorkerUp", event.worker)
        self._balance(now)

    def _worker_down(self, event: ev.WorkerDown) -> None:
        known = self.is_up(event.worker) or event.worker in self._dead
        if not known and self._starting <= len(self._awaited):
            self._refuse(event, f"worker {event.worker} is absent, and none is starting", event.worker, None)
        worker, _ = self._move(event)
        now = event.now
        self._note(now, "WorkerDown", event.worker, worker.held.values() if worker is not None else ())
        self._dead.add(event.worker)
        self._awaited.discard(event.worker)
        if event.worker in self._retiring:
            self._retiring.discard(event.worker)
            return
        if worker is None:
            self._starting = max(len(self._awaited), self._starting - 1)
        else:
            if worker.blocked is not None:
                self._unblock(worker)
            if worker in self._resuming:
                self._resuming.remove(worker)
            del self._workers[event.worker]
            self._idle.pop(event.worker, None)
            worker.started = max(worker.started, event.started_seq)
            self._decide_cancels(worker, worker.started, now)
            back = [task for seq, task in worker.held.items() if seq > worker.started]
            ran = [task for seq, task in worker.held.items() if seq <= worker.started]
            worker.release(back + ran)
            lost = [task for task in ran if task.state == DISPATCHED]  # the resolver has not ended them
            for task in lost:
                task.state = WAITING
            if lost:
                self._out.append(ev.Lost(lost))
            self._requeue(back)
        self._replace_missing()
        self._balance(now)

    def _replace_missing(self) -> None:
        missing = self._slots - len(self._workers) - self._starting
        if missing > 0:
            self._starting += missing
            self._out.append(ev.Spawn(missing))

    def _adopt(self, event: ev.Adopted) -> None:
        if self._workers or self._dead or self._awaited:
            self._refuse(event, "there are workers already", None, None)
        numbers = [number for number, _, _, _ in event.workers]
        if len(set(numbers)) < len(numbers):
            self._refuse(event, "a worker is in it twice", None, None)
        tasks = [task for _, task, _, _ in event.workers if task is not None]
        if len(set(tasks)) < len(tasks):
            self._refuse(event, "a task is in it twice", None, max(tasks, key=tasks.count))
        for known in tasks:
            if known.worker is not None or known.seq == QUEUED or known.state > DISPATCHED:
                self._refuse(event, "a task is queued, held, or has ended", None, known)
        now = self._now = event.now
        self._adopted = len(numbers)
        self._note(now, "Adopted", None, tasks)
        for number, task, seq, blocked in event.workers:
            if task is None:
                self._awaited.add(number)
            else:
                self._workers[number] = self._take_over(number, task, seq, blocked, now)
        self._starting = len(self._awaited)
        self._replace_missing()
        self._balance(now)

    def _take_over(self, number: int, task: Task, seq: int, blocked: bool, now: float) -> Worker:
        worker = Worker(number, now)
        worker.away = worker.settled = True
        worker.started = worker.last_seq = seq
        # There may be fewer slots than under the agent before.
        worker.uninvited = True
        task.state, task.worker, task.seq, task.sent_at = DISPATCHED, number, seq, now
        worker.held[seq] = task
        worker.tally[function_of(task)] = 1
        worker.notice_at = now + STARTED_AFTER_S
        walltime_s = task.options.walltime_s
        worker.overrun_at = None if walltime_s is None else now + walltime_s
        if blocked:
            self._lend(worker, task)
        return worker

    def _rejoined(self, event: ev.Rejoined) -> None:
        known = self._workers.get(event.worker)
        if known is not None and not known.away:
            self._refuse(event, f"worker {event.worker} is not away", event.worker, None)
        worker, after = self._move(event)
        if after == DEAD:
            return
        now = event.now
        self._note(now, "Rejoined", event.worker)
        if worker is None:
            self._awaited.discard(event.worker)
            self._starting = max(len(self._awaited), self._starting - 1)
            worker = self._workers[event.worker] = Worker(event.worker, now)
        worker.away = False
        worker.last_seq = max(worker.last_seq, event.last)
        worker.revoked, worker.dropped = [], []
        if event.running not in worker.held:
            if worker.blocked is not None:
                self._unblock(worker)
            self._take_back(worker, list(worker.held.values()))
        elif event.blocked and worker.blocked is None:
            self._lend(worker, worker.held[event.running])
        elif worker.blocked is not None and not event.blocked:
            self._unblock(worker)
            worker.uninvited = True
        worker.started = max(worker.started, event.last)
        self._heard(worker, now)
        if event.running and not worker.held:
            # What it runs is nobody's any more. It was in nobody's count either.
            worker.haunted = worker.uninvited = True
            self._idle.pop(worker.number, None)
        self._balance(now)

    def _finished(self, event: ev.Finished) -> None:
        worker, _ = self._move(event)
        if worker is None:
            return
        now = event.now
        held = worker.held
        tasks: list[Task] = []
        ran: dict[object, tuple[int, float]] = {}
        function: object = None
        count = 0
        total = 0.0
        for row in event.results:
            task = held.pop(row[0], None)
            if task is None:
                continue
            tasks.append(task)
            task.worker = None
            # `function_of`, written out for the common case
            of = task.fn if task.options is DEFAULT_OPTIONS and task.fn is not None else function_of(task)
            if of != function:
                if count:
                    ran[function] = (count, total)
                function = of
                count, total = ran.get(of, _NOTHING)
            count += 1
            total += row[6]
        if count:
            ran[function] = (count, total)
            for function, (count, total) in ran.items():
                worker.count_out(function, count)
                self._costs.measure(function, count, total)
        self._note(now, "Finished", worker.number, tasks)
        if tasks:
            worker.started = max(worker.started, tasks[-1].seq)
            worker.barren = False
            if worker.cancelling:
                ended = [task for task in worker.cancelling if task.worker is None]
                for task in ended:
                    del worker.cancelling[task]
                self._answer([], ended)
            number = worker.number
            frontier = worker.frontier
            while frontier and frontier[0].worker != number:
                frontier.popleft()
            if worker.blocked is not None and worker.blocked.worker is None:
                self._unblock(worker)  # it ended without a Resume
                worker.uninvited = True
        if worker.revoked or worker.dropped:
            self._forget_passed(worker, event.results)
        self._heard(worker, now)
        # The others were seen to before: only this worker has more room than it had.
        if self._resuming:
            self._balance(now)
        elif self._queue:
            self._top_up(worker, now)
        elif (
            held
            and (worker.frontier or worker.tail is not None)
            and self._room_behind(worker, now) is not None
        ):
            self._send(worker, [], now)
        if self._idle and not self._queue:
            self._steal(now)

    def _forget_passed(self, worker: Worker, results: Sequence[Sequence[Any]]) -> None:
        """What a worker has run, or has passed, it need not be told of any more."""
        ran = {row[0] for row in results}
        last = max(ran, default=0)
        worker.revoked = [seq for seq in worker.revoked if seq not in ran]
        worker.dropped = [seq for seq in worker.dropped if seq > last]

    def _heard(self, worker: Worker, now: float) -> None:
        """The worker has spoken: it is alive and not deep in a task."""
        worker.heard_at = now
        worker.haunted = False
        if worker.held:
            worker.notice_at = now + STARTED_AFTER_S
        else:
            self._rest(worker, now)

    def _rest(self, worker: Worker, now: float) -> None:
        """The worker holds nothing: it is idle, unless it has to ask first or is busy with what was withdrawn."""
        worker.notice_at = worker.overrun_at = worker.tail = None
        worker.uninvited = False
        number = worker.number
        if (
            worker.blocked is None
            and not worker.revoked
            and not worker.haunted
            and not worker.away
            and number not in self._idle
        ):
            worker.idle_since = now
            self._idle[number] = worker

    def _gave_back(self, event: ev.GaveBack) -> None:
        worker, _ = self._move(event)
        if worker is None:
            return
        now = event.now
        tasks = [worker.held[seq] for seq in sorted(set(event.seqs)) if seq in worker.held]
        self._note(now, "GaveBack", worker.number, tasks)
        told = set(event.seqs)
        # Those that need them cannot start there: no need to tell the worker before it may go on.
        worker.dropped += self._take_back(worker, tasks)
        for task in tasks:
            if task.state == WAITING:
                task.seq = STAYS
        worker.revoked = [seq for seq in worker.revoked if seq not in told]
        worker.dropped = [seq for seq in worker.dropped if seq not in told]
        self._heard(worker, now)
        self._balance(now)

    def _asked(self, event: ev.Asked) -> None:
        worker, after = self._move(event)
        now = event.now
        self._note(now, "Asked", event.worker)
        if worker is None:
            if after == RETIRING:
                # It has nothing to start, and EXIT is on its way.
                self._out.append(ev.Grant(event.worker, now, []))
            return
        worker.state = after
        # It stands before `seq` and waits for us: the best time to decide.
        worker.started = max(worker.started, event.seq - 1)
        if worker.cancelling:
            self._decide_cancels(worker, event.seq - 1, now)
        worker.settled = True
        worker.barren = False
        if not self._queue:
            self._share(worker, event.seq - 1)
        self._grant(worker, now)
        self._heard(worker, now)
        self._balance(now)

    def _grant(self, worker: Worker, now: float) -> None:
        worker.lease_until = now + LEASE_S
        worker.settled = worker.barren = False
        self._out.append(ev.Grant(worker.number, worker.lease_until, worker.revoked + worker.dropped))
        worker.revoked = []
        worker.dropped = []

    # ------------------------------------------------------------------------------------------------ lent slots

    def _block(self, event: ev.Blocked) -> None:
        worker, _ = self._move(event)
        if worker is None:
            return
        now, task = event.now, event.task
        self._note(now, "Blocked", worker.number, (task,))
        if task.worker == worker.number:
            worker.started = max(worker.started, task.seq)
        kept = bool(task.options.resources)
        others = len(self._workers) - 1 - self._blocked + self._starting
        may_spawn = len(self._workers) + self._starting < self._max_workers
        if self._slots - self._kept - kept <= 0 or (others == 0 and not may_spawn):
            worker.state = REFUSED
            self._out.append(ev.Deadlocked(worker.number, task))
            return
        self._lend(worker, task)
        self._idle.pop(worker.number, None)
        self._balance(now)

    def _lend(self, worker: Worker, task: Task) -> None:
        worker.state = BLOCKED
        worker.blocked = task
        self._blocked += 1
        if not worker.lends():
            self._kept += 1

    def _unblock(self, worker: Worker) -> None:
        self._blocked -= 1
        if not worker.lends():
            self._kept -= 1
        worker.blocked = None
        worker.state = UP
        if self._resuming and worker in self._resuming:
            self._resuming.remove(worker)

    def _resume(self, event: ev.Resume) -> None:
        worker, after = self._move(event)
        if worker is None:
            return
        now = event.now
        self._note(now, "Resume", worker.number, (event.task,))
        worker.state = after
        if after == UP:
            return  # Deadlocked was the answer
        if worker.lends():
            self._resuming.append(worker)
        else:
            self._unblock(worker)
            self._go_on(worker, now)
        self._balance(now)

    def _serve(self, now: float) -> None:
        """Give free slots to those who resume, in order."""
        while self._resuming and self._free() > 0:
            worker = self._resuming.popleft()
            self._unblock(worker)
            self._go_on(worker, now)

    def _go_on(self, worker: Worker, now: float) -> None:
        self._heard(worker, now)
        self._out.append(ev.Slot(worker.number, True))

    def _spawn_for_demand(self) -> None:
        """There is something to run and nobody idle: are there slots without a process?"""
        count = min(
            self._free() - self._starting,
            self._queued(),
            self._max_workers - len(self._workers) - self._starting,
        )
        if count > 0:
            self._starting += count
            self._out.append(ev.Spawn(count))

    # ------------------------------------------------------------------------------------------------------ time

    def _tick(self, event: ev.Tick) -> None:
        now = self._now = event.now
        started: list[Task] = []
        since: list[float] = []
        progress = event.progress
        for worker in list(self._workers.values()):
            seq = progress.get(worker.number)
            if seq is not None:
                worker.started = max(worker.started, seq)
                if not worker.settled and now >= worker.lease_until + LEASE_MARGIN_S:
                    worker.settled = True
                    worker.barren = False
                    if worker.cancelling:
                        self._decide_cancels(worker, worker.started, now)
            if worker.settled and worker.blocked is not None:
                # What was on its way to it when it blocked.
                ahead = [task for task in worker.held.values() if task.seq > worker.started]
                worker.revoked += self._take_back(worker, ahead)
            running = worker.held.get(worker.started)
            if worker.notice_at is not None and now >= worker.notice_at:
                worker.notice_at = None if running is not None else now + STARTED_AFTER_S
                if running is not None and worker.noticed != worker.started:
                    worker.noticed = worker.started
                    started.append(running)
                    since.append(max(running.sent_at, worker.heard_at))
            if worker.overrun_at is not None and now >= worker.overrun_at:
                worker.overrun_at = None
                if running is not None and running.options.walltime_s is not None:
                    self._out.append(ev.Overran(worker.number, running))
                elif worker.held:  # not started yet
                    walltime_s = next(iter(worker.held.values())).options.walltime_s
                    worker.overrun_at = None if walltime_s is None else now + walltime_s
        if started:
            self._out.append(ev.Started(started, since))
        self._balance(now)
        self._retire(now)

    def _retire(self, now: float) -> None:
        surplus = self._surplus()
        for worker in list(self._idle.values()):
            if surplus <= 0 or worker.idle_since + SPARE_S > now:
                break
            surplus -= 1
            del self._idle[worker.number], self._workers[worker.number]
            self._retiring.add(worker.number)
            self._note(now, "Retire", worker.number)
            self._out.append(ev.Retire(worker.number))

    # ---------------------------------------------------------------------------------------------------- giving

    def _balance(self, now: float) -> None:
        """See to everybody: those who resume, those with room, those who are idle."""
        if self._resuming:
            self._serve(now)
        if self._queue:
            self._fill(now)
        if not self._queue:
            self._steal(now)

    def _room_behind(self, worker: Worker, now: float) -> float | None:
        """The load of a busy worker that is to be topped up; None when it is not."""
        if (
            worker.blocked is not None
            or worker.revoked
            or worker.cancelling
            or worker.away
            or now - worker.heard_at > LEASE_S
        ):
            return None  # deep in a task, or its lease must not be extended
        load = worker.load(self._costs)
        if load <= LOOKAHEAD_S / 2 or (len(worker.held) == 1 and load < LOOKAHEAD_S):
            return load
        return None

    def _top_up(self, worker: Worker, now: float) -> None:
        """Fill one worker: up to its look-ahead while the queue is long, to its share of the queue at the end."""
        load: float | None
        if worker.number in self._idle:
            if self._free() <= 0:
                return
            load = 0.0
        else:
            if not worker.held:
                return
            load = self._room_behind(worker, now)
            if load is None:
                return
        share = self._costs.get(function_of(self._queue[0]), inf) * self._queued() / self._slots
        batch = self._take(worker, load, min(LOOKAHEAD_S, load + share), now)
        self._send(worker, batch, now)

    def _fill(self, now: float) -> None:
        """Spread the queue over all workers that have room: idle ones first, then level."""
        if self._resuming:
            return  # slots that become free are for them
        idle = self._idle
        count = self._queued()
        free = max(0, min(len(idle), self._free()))
        if count <= free:
            for _ in range(count):
                worker = next(reversed(idle.values()))
                self._send(worker, self._take(worker, 0.0, 0.0, now), now)
            return
        room: list[tuple[float, int, Worker]] = [
            (0.0, i, w) for i, w in enumerate(islice(reversed(idle.values()), free))
        ]
        for worker in self._workers.values():
            if worker.held:
                load = self._room_behind(worker, now)
                if load is not None:
                    room.append((load, worker.number, worker))
        if not room:
            return
        room.sort(key=lambda r: r[:2])
        level = self._level([r[0] for r in room], self._costs.get(function_of(self._queue[0]), inf) * count)
        batches = [self._take(worker, load, level, now) if self._queue else [] for load, _, worker in room]
        if self._queue and level < LOOKAHEAD_S:  # the head was cheaper than the rest
            for (_, _, worker), batch in zip(room, batches, strict=True):
                if self._queue:
                    batch += self._take(worker, worker.load(self._costs), LOOKAHEAD_S, now)
        for (_, _, worker), batch in zip(room, batches, strict=True):
            self._send(worker, batch, now)

    @staticmethod
    def _level(loads: list[float], work: float) -> float:
        """The common load of the first workers after `work` seconds were poured over these, which are sorted."""
        total = work
        level = 0.0
        for at, load in enumerate(loads, start=1):
            total += load
            level = total / at
            if at < len(loads) and level <= loads[at]:
                break
        return min(level, LOOKAHEAD_S)

    def _take(self, worker: Worker, load: float, level: float, now: float) -> list[Task]:
        """Move tasks from the queue to the worker until its load reaches `level`; at least one if it holds none."""
        queue, withdrawn, costs, held, tally = (
            self._queue,
            self._withdrawn,
            self._costs,
            worker.held,
            worker.tally,
        )
        number, seq = worker.number, worker.last_seq
        batch: list[Task] = []
        function: object = None
        count = 0
        cost = 0.0
        level -= 1e-9  # sums of equal costs may miss it by a hair
        while queue:
            task = queue[0]
            if withdrawn and task in withdrawn:
                withdrawn.discard(task)
                queue.popleft()
                continue
            # `function_of`, written out for the common case
            of = task.fn if task.options is DEFAULT_OPTIONS and task.fn is not None else function_of(task)
            if of != function:
                if count:
                    tally[function] = tally.get(function, 0) + count
                    count = 0
                function = of
                cost = costs.get(of, inf)
            if held and (load >= level or cost >= LOOKAHEAD_S):
                break
            queue.popleft()
            seq += 1
            task.seq = seq
            task.worker = number
            task.state = DISPATCHED
            task.sent_at = now
            held[seq] = task
            batch.append(task)
            count += 1
            load += cost
            if task.waiters is not None:
                worker.frontier.append(task)
        if count:
            tally[function] = tally.get(function, 0) + count
        worker.last_seq = seq
        self._idle.pop(number, None)
        if withdrawn and len(withdrawn) == len(queue):
            self._sweep()
        return batch

    def _send(self, worker: Worker, batch: list[Task], now: float) -> None:
        """Send what was taken for a worker, and what may follow it."""
        if batch:
            worker.tail = batch[-1]
        tail = worker.tail
        if not self._queue and (worker.frontier or (tail is not None and tail.waiters is not None)):
            follow(worker, batch, self._costs, self._slots > 1, now)
        if not batch:
            return
        if len(worker.held) == len(batch):  # it was idle
            worker.heard_at = now
            worker.notice_at = now + STARTED_AFTER_S
            walltime_s = batch[-1].options.walltime_s
            worker.overrun_at = None if walltime_s is None else now + walltime_s
        worker.lease_until = lease = now + LEASE_S
        worker.settled = worker.barren = False
        self._note(now, "Assign", worker.number, batch)
        self._out.append(ev.Assign(worker.number, batch, lease))

    # ----------------------------------------------------------------------------------------------- taking back

    def _take_back(self, worker: Worker, tasks: list[Task]) -> list[int]:
        """Take unstarted tasks and their dependents back, to the front of the queue or to wait. Returns all their seqs."""
        if not tasks:
            return []
        tasks = worker.with_dependents(tasks)
        seqs = [task.seq for task in tasks]
        if worker.cancelling:
            cancelled = [task for task in tasks if task in worker.cancelling]
            for task in cancelled:
                del worker.cancelling[task]
            worker.release(cancelled)
            for task in cancelled:
                if task.state == DISPATCHED:
                    task.state = WAITING
            self._answer(cancelled, [])
            tasks = [task for task in tasks if task.worker is not None]
        self._note(self._now, "taken back", worker.number, tasks)
        worker.release(tasks)
        self._requeue(tasks)
        return seqs

    def _requeue(self, tasks: list[Task]) -> None:
        """Tasks that nobody holds any more: to the front of the queue in their order, or to wait."""
        back = []
        for task in tasks:
            if task.state != DISPATCHED:
                continue  # the resolver has ended it
            if task.missing:
                task.state = WAITING
            else:
                task.state = READY
                task.seq = QUEUED
                back.append(task)
        back.reverse()
        self._queue.extendleft(back)

    def _let_go(self, worker: Worker, tasks: list[Task], now: float) -> list[int]:
        """Take tasks from the worker for good; what it holds for their results waits again. Returns all their seqs."""
        if not tasks:
            return []
        gone = set(tasks)
        everything = worker.with_dependents(tasks)
        seqs = [task.seq for task in everything]
        pending = [task for task in everything if task in worker.cancelling]
        for task in pending:
            del worker.cancelling[task]
        self._note(now, "let go", worker.number, everything)
        worker.release(everything)
        for task in everything:
            if task.state == DISPATCHED and (task in gone or task in pending):
                task.state = WAITING
        self._requeue(everything)
        self._answer([t for t in pending if t not in gone], [t for t in pending if t in gone])
        return seqs

    # -------------------------------------------------------------------------------------------------- stealing

    def _share(self, worker: Worker, started: int) -> None:
        """A worker asks while others are idle: they get their part of what it has not started."""
        helpers = self._helpers()
        tasks = worker.stealable(started) if helpers > 0 else []
        count = len(tasks) * helpers // (helpers + 1)
        if count:
            worker.revoked += self._take_back(worker, tasks[-count:])

    def _steal(self, now: float) -> None:
        """Somebody could run something and the queue is empty: take from those who cannot start what they hold."""
        while len(self._idle) < len(self._workers) and not self._queue and (helpers := self._helpers()) > 0:
            most: list[Task] = []
            victim: Worker | None = None
            for worker in self._workers.values():
                if worker.settled and not worker.barren and worker.held and worker.blocked is None:
                    tasks = worker.stealable(worker.started)
                    worker.barren = not tasks
                    if len(tasks) > len(most):
                        most, victim = tasks, worker
            if victim is None:
                return
            count = -(-len(most) * helpers // (helpers + 1))
            victim.revoked += self._take_back(victim, most[-count:])
            self._fill(now)

    # --------------------------------------------------------------------------------------------------- for tests

    def validate(self) -> None:
        """Check every rule, in time linear in everything. For tests."""
        queue = [task for task in self._queue if task not in self._withdrawn]
        assert len(set(self._queue)) == len(self._queue), "a task is queued once"
        assert self._withdrawn <= set(self._queue)
        assert queue or not self._queue, "a queue of withdrawn tasks is swept"
        for task in queue:
            assert task.state == READY, f"a queued task is {STATE_NAMES[task.state]}"
            assert task.worker is None
            assert task.seq == QUEUED
            assert not task.missing
        for worker in self._workers.values():
            worker.validate(worker.number in self._idle)
        free = self._free()
        assert free >= 0 or any(w.uninvited or w.away for w in self._workers.values()), (
            "more tasks run than there are slots"
        )
        assert self._blocked == sum(w.blocked is not None for w in self._workers.values())
        assert self._kept == sum(w.blocked is not None and not w.lends() for w in self._workers.values())
        assert list(self._resuming) == [w for w in self._resuming if w.state == RESUMING]
        assert not (self._resuming and free > 0), "a free slot goes to those who resume"
        assert not (queue and self._idle and free > 0 and not self._resuming), (
            "somebody idle, a slot, and something to run"
        )
        assert len(self._workers) + self._starting <= max(self._max_workers, self._adopted)
        assert len(self._awaited) <= self._starting
        assert len(self._workers) + self._starting >= self._slots, "the dead are replaced"
