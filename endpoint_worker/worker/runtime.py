"""What a worker does: take entries, run them in its main thread, send what came of them.

    agent ── TASKS ──► queue ──► arguments ──► the task's function ──► result blob ──► page, parts ── DONE ──► agent
                       │   ▲      mapped, inline, kept                   │  │ large: ALLOC, then written by us
                       │   └ lease over: ASK                             │  └─► kept for entries that follow
                       └─► GIVE_BACK: an argument failed, or is not kept here

Rules:
    - One thread runs tasks and receives. It waits in a blocking receive, and nothing else ever wakes it.
    - Results are sent together: when the queue is empty; `FLUSH_S` after the last time; and before a task that is
      known to be long, or not known at all. Should a task take longer than it used to, a second thread sends what
      has been waiting for `OVERDUE_S`. That thread sleeps unless results wait while a task runs.
    - Whatever a task raises is its result. Nothing that a task does keeps the worker from the next one, except the
      death of the process, which the agent sees.
    - A value is encoded before the next task starts, and nothing of a task is kept here after that.
    - A task that has submitted others is not over before the agent has these (`TaskContext.hand_over`): whatever kills
      this process afterwards takes nothing along.

The loop costs a few microseconds per task and is written for that; measure with `tests/bench` before adding to it.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from types import CoroutineType
from typing import Any, Final

from endpoint_worker.store import segments
from endpoint_worker.worker import calls, channel
from endpoint_worker.worker.calls import PLAIN_TYPES, UNMEASURED, Function, ToldError
from endpoint_worker.worker.channel import KEEP, LEASE_MARGIN_S, WorkerChannel
from endpoint_worker.worker.lending import Lender
from endpoint_worker.worker.output import Output
from endpoint_worker.worker.page import BLOCKED, RETURNED, START, START_AT, Page
from endpoint_worker.worker.values import RECENT_MAX, SMALL_BYTES, Kept, Mappings, values_of
from gcref import task_context
from gcref.config import EXCEPTION_MAX_BYTES, INLINE_MAX_BYTES
from gcref.errors import GcrefError, LocalProtocolError
from gcref.objects import blob, failure
from gcref.objects.serialize import dumps, dumps_call, loads_call
from gcref.task_context import TaskContext
from gcref.wire import codec
from gcref.wire.messages import ALIAS, FAILED, OK, STORED

FLUSH_S: Final = 0.002
OVERDUE_S: Final = 0.010
# A function that takes longer than this is worth a send of its own before it starts.
LONG_S: Final = 0.001
# To unmap a gigabyte takes a tenth of a second. The result of a task that saw more than this does not wait for it.
LARGE_BYTES: Final = 8 * 1024 * 1024
# At most so many bytes of results wait: a message stays far below the largest one.
_PENDING_MAX_BYTES: Final = 4 * 1024 * 1024
# What the agent sends may hold thousands of inline arguments. It is ours, so this only guards against nonsense.
_MESSAGE_MAX_BYTES: Final = 1 << 34
# Idle for so long, the worker looks for mappings that only garbage keeps open.
_COLLECT_AFTER_MS: Final = 50
# How much of a new measurement goes into a function's time.
_WEIGHT: Final = 0.3
# What goes wrong outside of tasks (a signal's handler that raises) is survived, but not without end.
_TROUBLES_MAX: Final = 20

_NO_ARGUMENTS: Final = blob.join(dumps_call(None, (), {}).encoded)

_clock = time.monotonic
_note_start = START.pack_into


class Runtime:
    """The worker of this process. Its main thread runs `run`.

    Args:
        link: the worker's end of the channel.
        page: where it notes what it does.
        output: the process's standard streams.
        worker: its number.
        endpoint: the endpoint's name, for notes in errors.
        agent_id: the endpoint's id.
        control_address, bulk_address: where the SDK inside tasks finds the agent.
        party: what the SDK inside tasks calls itself.
    """

    def __init__(
        self,
        link: WorkerChannel,
        page: Page,
        output: Output,
        *,
        worker: int,
        endpoint: str,
        agent_id: bytes,
        control_address: str,
        bulk_address: str,
        party: bytes,
    ) -> None:
        self._link = link
        self._page = page
        self._output = output
        self._worker = worker
        self._endpoint = endpoint
        self._context = TaskContext(
            agent_id,
            control_address,
            bulk_address,
            party,
            Lender(self._may_lend, self._lend, self._resume).blocking,
        )
        self._functions: dict[bytes, Function] = {}
        self._queue: deque[list[Any]] = deque()
        self._lease = 0.0
        self._answer: list[Any] | None = None
        self._ending = False
        self._troubles = 0
        self._unix_offset = 0.0  # seconds from the monotonic clock to Unix time
        # Of the task that runs.
        self._running: list[Any] | None = None
        self._named: Sequence[Any] = ()  # the futures and references that its result names
        # What tasks look at.
        self._mappings = Mappings()
        self._kept = Kept()
        self._wanted: set[bytes] = set()  # results of the queue that entries of the queue name
        # What waits to be sent. `_sending` guards the socket's sending side, and `_parts` against being sent twice.
        self._sending = threading.Lock()
        self._parts: list[bytes] = []
        self._pending_bytes = 0
        self._given_back: list[int] = []
        self._sent_at = 0.0
        self._flusher: threading.Thread | None = None
        self._armed = False
        self._arm: SimpleQueue[None] = SimpleQueue()
        self._forked = False

    def run(self) -> None:
        """Work until EXIT.

        Raises:
            BaseException: the channel, or the runtime itself, is beyond help.
        """
        task_context.current = self._context
        os.register_at_fork(before=self._mappings.taint, after_in_child=self._in_child)
        self._page.sign()
        self._send([channel.READY, self._worker, os.getpid()])
        while True:
            # Twice, because a task's signal handler may raise anything, anywhere.
            try:
                try:
                    self._loop()
                    return
                except BaseException as error:  # noqa: BLE001 - see above
                    self._survive(error)
            except BaseException:
                if self._troubles > _TROUBLES_MAX:
                    raise

    # --------------------------------------------------------------------------------------------------- tasks

    def _loop(self) -> None:
        # Everything that a task needs is a local name: this is the hot path of the whole system.
        queue, parts, given_back, words = self._queue, self._parts, self._given_back, self._page.words
        page, note_start, note, kept, recent = (
            self._page.mapping,
            _note_start,
            self._page.add,
            self._kept,
            self._kept.recent,
        )
        functions, context, mappings, wanted = self._functions, self._context, self._mappings, self._wanted
        out, err = self._output.out, self._output.err
        clock, pack, execute = _clock, codec.pack, self._execute
        ended = clock()
        while True:
            if not queue:
                if self._ending:
                    self._flush()
                    return
                self._receive()
                continue
            entry = queue.popleft()
            seq, id, attempt, digest, payload, args, deps, flags, group, _walltime_s = entry
            if deps and not kept.has(deps):
                self._give_back(entry)
                continue
            function = functions.get(digest)
            if given_back:
                self._flush()
            elif parts:
                if (
                    function is None
                    or function.seconds > LONG_S
                    or ended - self._sent_at > FLUSH_S
                    or self._pending_bytes > _PENDING_MAX_BYTES
                ):
                    self._flush()
                elif not self._armed:
                    self._arm_flusher()
            note_start(page, START_AT, seq, attempt, id)
            words[0] = seq  # before the clock is read: see channel.LEASE_MARGIN_S
            started = clock()
            if started >= self._lease:
                queue.appendleft(entry)
                self._ask(seq)
                ended = clock()
                continue
            self._running = entry
            context.task_id = id
            context.group = group
            status, value, refs = execute(function, digest, payload, args, deps)
            ended = clock()
            if context.submitted or self._named:
                self._hand_over(seq)
            if function is not None:
                took = ended - started
                before = function.seconds
                function.seconds = took if before == UNMEASURED else before + _WEIGHT * (took - before)
            extra = self._output.take() if out.kept or err.kept else None
            part = pack(
                (seq, id, attempt, status, value, started + self._unix_offset, ended - started, refs, extra)
            )
            note(part)
            parts.append(part)
            self._running = None
            self._pending_bytes += len(part)
            if status == OK:
                if len(value) <= SMALL_BYTES:
                    recent[id] = value
                    if len(recent) > RECENT_MAX:
                        recent = kept.turn()
                elif flags & KEEP or id in wanted:
                    kept.add_large(id, value)
            if mappings.used:
                if mappings.used_bytes > LARGE_BYTES:
                    self._flush()
                mappings.let_go()
            if mappings.held:
                mappings.retry()

    def _execute(
        self,
        function: Function | None,
        digest: bytes | None,
        payload: Any,
        args: list[Any] | None,
        deps: list[Any],
    ) -> tuple[int, Any, bytes | None]:
        """Run one task: status, value and references of its result. Its values live no longer than this call."""
        try:
            try:
                if args is not None or deps:
                    payload = self._map_arguments(payload, args, deps)
                call: tuple[Callable[..., Any] | None, tuple[Any, ...], dict[str, Any]]
                if payload == _NO_ARGUMENTS:
                    call = (None, (), {})
                else:
                    call = loads_call(
                        payload, values_of(deps, self._mappings, self._kept) if deps else calls.no_dependency
                    )
                fn, arguments, keywords = call
                if function is not None:
                    fn = function.call or function.load()
                elif digest is not None:
                    raise LocalProtocolError(f"function {digest.hex()} has not been sent to this worker")
            except GcrefError as error:  # not the task's own: it has not begun
                return FAILED, failure.from_error(error), None
            value = fn(*arguments, **keywords)  # type: ignore[misc]
            if self._forked:
                os._exit(0)  # a child that the task forked came back as if it were the worker
            if type(value) not in PLAIN_TYPES:
                if type(value) is CoroutineType:
                    value = calls.run_coroutine(value)
                if calls.is_future(type(value)):
                    self._named = (value,)
                    return ALIAS, value.ref().pack(), None
            try:
                encoded = dumps(value)
            except GcrefError as error:
                return FAILED, failure.from_error(error), None
            self._named = encoded.named
            if encoded.size <= INLINE_MAX_BYTES:
                return OK, b"".join(encoded.parts), encoded.refs or None
            return STORED, self._store(encoded), encoded.refs or None
        except ToldError as error:
            return FAILED, error.told, None
        except BaseException as error:  # noqa: BLE001 - all that a task raises is its result
            if self._forked:
                traceback.print_exception(error)
                os._exit(1)
            told = self._failure(error)
            calls.forget_frames(error)
            return FAILED, told, None

    def _hand_over(self, seq: int) -> None:
        """What the task has submitted lies in this process still, and would be lost with it."""
        self._page.words[RETURNED] = seq
        context = self._context
        named, self._named = self._named, ()
        context.submitted = False
        if context.hand_over is not None:
            context.hand_over(named)

    def _map_arguments(self, payload: Any, args: list[Any] | None, deps: list[Any]) -> Any:
        """Take up the grants of the entry; gives the blob of the arguments."""
        mappings = self._mappings
        for dep in deps:
            if type(dep) is list and len(dep) > 1:
                mappings.started(dep[0])
        if args is None:
            return payload
        mappings.started(args[0])
        return mappings.map(args)

    def _store(self, encoded: blob.Encoded) -> list[Any]:
        """Write a large result to where the agent says: `[path, size]`.

        Raises:
            ToldError: there is no room.
        """
        self._flush()
        failed: str | None = None
        while True:
            answer = self._request(
                [channel.ALLOC, encoded.size, failed], (channel.SEGMENT, channel.NO_SEGMENT)
            )
            if answer[0] == channel.NO_SEGMENT:
                raise ToldError(answer[1])
            path: str = answer[1]
            try:
                fd = segments.create(path)
                try:
                    blob.pwrite_all(encoded, fd)
                finally:
                    os.close(fd)
            except OSError:
                failed = path  # full, or broken: the agent knows another place, or ends this with NO_SEGMENT
            else:
                return [path, encoded.size]

    def _failure(self, error: BaseException) -> list[Any]:
        """The failure that a task ends with which raised this."""
        return failure.from_exception(
            error, task_id=self._context.task_id, endpoint=self._endpoint, limit_bytes=EXCEPTION_MAX_BYTES
        )

    def _survive(self, error: BaseException) -> None:
        """Something was raised outside of a task: the task it fell upon, if any, fails; the worker goes on."""
        self._troubles += 1
        if self._forked:
            os._exit(1)
        if self._troubles > _TROUBLES_MAX:
            raise error
        self._answer = None
        entry = self._running
        if entry is not None:
            part = codec.pack(
                [*entry[:3], FAILED, self._failure(error), _clock() + self._unix_offset, 0.0, None, None]
            )
            self._page.add(part)
            self._parts.append(part)
            self._running = None
            self._mappings.let_go()
        traceback.print_exception(error)  # last: it runs foreign code

    # ------------------------------------------------------------------------------------------------- receive

    def _receive(self) -> None:
        """The queue is empty: send what waits, wait for a message, take it."""
        socket = self._link.socket
        if self._parts and _clock() - self._sent_at < FLUSH_S:
            with self._sending:  # the other thread may be in the socket
                frame = socket.recv() if self._link.has_input() else None
            if frame is not None:
                self._take(frame)
                return
        self._flush()
        self._context.task_id = self._context.group = b""
        self._wanted.clear()
        if self._mappings.wants_collection and not self._link.has_input(_COLLECT_AFTER_MS):
            self._mappings.collect()
            self._flush()
        self._output.trim()
        self._take(socket.recv())

    def _take(self, frame: bytes) -> None:
        """Take one message of the agent."""
        message = codec.unpack(frame, _MESSAGE_MAX_BYTES)
        kind = message[0]
        if kind == channel.TASKS:
            self._troubles = 0
            self._unix_offset = time.time() - _clock()
            self._lease = message[1] - LEASE_MARGIN_S
            entries = message[2]
            for entry in entries:
                if entry[5] is not None or entry[6]:
                    self._count(entry)
            self._queue.extend(entries)
        elif kind == channel.FUNCTION:
            self._functions[message[1]] = Function(message[2])
        elif kind == channel.GRANT:
            self._lease = message[1] - LEASE_MARGIN_S
            if message[2]:
                self._revoke(set(message[2]))
            self._answer = message
        elif kind in (channel.SEGMENT, channel.NO_SEGMENT, channel.SLOT):
            self._answer = message
        elif kind == channel.UNMAP:
            self._mappings.collect()
        elif kind == channel.ADOPT:
            self._adopt(message[1])
            self._answer = message
        elif kind == channel.EXIT:
            self._ending = True

    def _request(self, message: list[Any], kinds: tuple[int, ...]) -> list[Any]:
        """Send a message and wait for its answer; what else comes meanwhile is taken as always.

        A new agent is asked again, unless `kinds` has ADOPT.
        """
        self._answer = None  # a GRANT may have come unasked
        self._send(message)
        while True:
            # Nothing waits to be sent, so the other thread does not touch the socket.
            self._take(self._link.socket.recv())
            answer = self._take_answer()
            if answer is None:
                continue
            if answer[0] in kinds:
                return answer
            if answer[0] == channel.ADOPT:
                self._send(message)

    def _take_answer(self) -> list[Any] | None:
        answer, self._answer = self._answer, None
        return answer

    def _ask(self, seq: int) -> None:
        """The lease is over: wait for another one. The entry is in the queue still, if it may start."""
        self._page.unstart()
        self._flush()
        self._request([channel.ASK, seq], (channel.GRANT, channel.ADOPT))
        if self._mappings.returned:
            self._flush()

    def _adopt(self, epoch: int) -> None:
        """There is a new agent: what the old one had handed out is void, but for the task that runs."""
        for entry in self._queue:
            self._pass_over(entry)
        self._queue.clear()
        self._given_back.clear()
        self._mappings.void()
        self._flush()
        page = self._page
        running = self._running[0] if self._running is not None else 0
        adopted = [
            channel.ADOPTED, self._worker, os.getpid(), epoch, running, page.progress, page.blocked, list(self._functions)
        ]  # fmt: skip
        with self._sending:
            self._link.send(channel.done(page.results(), []))
            self._link.send(codec.pack(adopted))

    def _count(self, entry: list[Any]) -> None:
        """Note what an entry that came will look at."""
        if entry[5] is not None:
            self._mappings.granted(entry[5][0])
        for dep in entry[6]:
            if type(dep) is list:
                if len(dep) > 1:
                    self._mappings.granted(dep[0])
                else:
                    self._wanted.add(dep[0])

    def _pass_over(self, entry: list[Any]) -> None:
        """An entry of the queue will not start here."""
        if entry[5] is not None:
            self._mappings.passed_over(entry[5][0])
        for dep in entry[6]:
            if type(dep) is list and len(dep) > 1:
                self._mappings.passed_over(dep[0])

    def _revoke(self, seqs: set[int]) -> None:
        queue = self._queue
        for _ in range(len(queue)):
            entry = queue.popleft()
            if entry[0] in seqs:
                self._pass_over(entry)
            else:
                queue.append(entry)

    def _give_back(self, entry: list[Any]) -> None:
        self._pass_over(entry)
        self._given_back.append(entry[0])

    def _give_back_all(self) -> None:
        """Give back whatever has not started."""
        while self._queue:
            self._give_back(self._queue.popleft())
        self._flush()

    # ---------------------------------------------------------------------------------------------------- send

    def _send(self, message: list[Any]) -> None:
        with self._sending:
            self._link.send(codec.pack(message))

    def _flush(self) -> None:
        """Send what waits. Afterwards the other thread leaves the socket alone until there are results again."""
        returned = self._mappings.returned and self._mappings.take_returned()
        with self._sending:
            if self._parts or returned:
                self._send_parts(returned)
            if self._given_back:
                self._link.send(codec.pack([channel.GIVE_BACK, self._given_back]))
                self._given_back.clear()

    def _send_parts(self, returned: list[Any]) -> None:
        """Send the results that wait; `_sending` is held. The main thread may append more meanwhile."""
        parts = self._parts[:]
        self._link.send(channel.done(parts, returned))
        del self._parts[: len(parts)]
        self._pending_bytes = 0
        self._sent_at = _clock()

    def _arm_flusher(self) -> None:
        self._armed = True
        if self._flusher is None:
            self._flusher = threading.Thread(target=self._flush_overdue, name="gcref-flush", daemon=True)
            self._flusher.start()
        self._arm.put(None)

    def _flush_overdue(self) -> None:
        """The second thread: while a task runs, send results that have waited for too long."""
        while True:
            self._arm.get()
            while True:
                rest = self._sent_at + OVERDUE_S - _clock()
                if rest > 0:
                    time.sleep(rest)
                elif self._parts:
                    with self._sending:
                        if self._parts:
                            self._send_parts([])
                else:
                    self._armed = False
                    if not self._parts:
                        break
                    self._armed = True  # one came in between; a second wake-up of the queue does no harm

    # --------------------------------------------------------------------------------------------- lent slots

    def _may_lend(self) -> bool:
        return self._running is not None and not self._forked

    def _lend(self) -> None:
        """The running task waits for a future: its slot may be lent.

        Raises:
            DeadlockError: too many wait already.
        """
        self._give_back_all()
        answer = self._request([channel.BLOCKED, self._context.task_id], (channel.SLOT,))
        self._give_back_all()  # what was on its way meanwhile
        if not answer[1]:
            raise failure.to_exception(answer[2])
        self._page.words[BLOCKED] = 1

    def _resume(self) -> None:
        """It has its value: wait for a slot.

        Raises:
            GcrefError: there is none for it any more.
        """
        try:
            answer = self._request([channel.RESUME, self._context.task_id], (channel.SLOT,))
        finally:
            self._page.words[BLOCKED] = 0
        if not answer[1]:
            raise failure.to_exception(answer[2])

    # --------------------------------------------------------------------------------------------------- forks

    def _in_child(self) -> None:
        """In a child that the task forked: it is no worker, and must never speak as one."""
        self._forked = True
        self._armed = True
        task_context.current = None
