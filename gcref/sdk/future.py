"""`ComputeFuture`: a `concurrent.futures.Future` whose work is done at an endpoint.

It is the stdlib's future in everything that can be seen, and costs a fraction of one: the condition, the list of
waiters and the list of callbacks are made when somebody first asks for them, and a value is decoded when it is
first read, in the thread that reads it.

    I/O thread ── settle(batch) ──► _state, _raw ──► result(): decode (a large value: fetch first) ──► _result
                        │ only where somebody watches
                        └─► waiters, condition, callbacks (on the client's callback thread)

Rules:
    - Only the I/O thread ends a future, once. Whether somebody watches is decided under `_settling`, which
      everybody holds who makes a condition: a future without one is ended by writing its state; a future with
      one is ended while holding it, so that `wait` and `as_completed` never miss or count an end twice.
    - `_raw` is what came and is not decoded yet: `bytes` (a blob), `list` (a failure) or `Stored` (it lies at its
      home). `_result` or `_exception` are written before `_raw` is cleared, so a reader needs no lock.
    - Callbacks never run on the I/O thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    LOGGER,
    PENDING,
    RUNNING,
)
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, Protocol, TypeVar

from gcref import ids, task_context
from gcref.brains.submitter_table import Stored
from gcref.objects import blob, failure, serialize
from gcref.objects.ref import ObjectRef, read_token
from gcref.sdk import lending

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

T = TypeVar("T")

ENDED: Final = frozenset((CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED))

_LAZY: Final = frozenset(("_condition", "_waiters", "_done_callbacks"))

# Held to make a condition, and to end futures that have none. Re-entrant: a finalizer or a signal handler may
# run anywhere.
_settling = threading.RLock()
# Held to publish a decoded value, never while decoding.
_publishing = threading.RLock()


class Record(NamedTuple):
    """What is known of a task's run once it is done.

    Attributes:
        received_s: when its endpoint took it, Unix seconds.
        started_s: when its (last) attempt started, Unix seconds.
        ended_s: when that ended, Unix seconds.
        worker: name of the worker that ran it.
        attempts: how many times it was started.
        pulled_bytes: bytes that its endpoint fetched from other endpoints for it, by carrier.
        stdout: the last lines that it printed.
        stderr: the last lines that it wrote to standard error.
    """

    received_s: float | None
    started_s: float | None
    ended_s: float | None
    worker: str | None
    attempts: int
    pulled_bytes: dict[str, int]
    stdout: str
    stderr: str

    @classmethod
    def from_wire(cls, fields: Sequence[Any]) -> Record:
        """The record in an OUTCOME; fields that are missing at its end are empty."""
        received, started, ended, worker, attempts, pulled, stdout, stderr = (*fields, *[None] * 8)[:8]
        return cls(received, started, ended, worker, attempts or 0, pulled or {}, stdout or "", stderr or "")


class Fetch(Protocol):
    """One fetch of a stored value; many may wait for it."""

    def wait(self, timeout: float | None) -> Any:
        """The blob's bytes, read-only.

        Raises:
            TimeoutError: they are not here in time; the fetch goes on.
            LostError: they cannot be had; the next fetch tries again.
        """

    def when_done(self, fn: Callable[[], None]) -> None:
        """Calls `fn`, on any thread, once `wait` would not block; at once if that is so now."""


class Home(Protocol):
    """What a future asks of its client. Everything may be called from any thread."""

    def check(self) -> None:
        """Raises RuntimeError in a forked child."""

    def keep(self, id: bytes) -> None:
        """One more than its futures stands for that object, until it says `drop`."""

    def drop(self, id: bytes) -> None:
        """The future of that id is gone. Cheap, and safe in a finalizer."""

    def hold(self, future: ComputeFuture[Any]) -> None:
        """Keeps a future that has callbacks alive until it ends."""

    def call_soon(self, fn: Callable[..., None], *args: Any) -> None:
        """Calls `fn` on the callback thread; calls are made in this order."""

    def fetch(self, stored: Stored) -> Fetch:
        """Starts to fetch, or joins the fetch under way."""

    def cancel(self, ids: list[bytes], force: bool) -> list[bool]:
        """Asks for these tasks not to run; at most about a second."""

    def explain(self, future: ComputeFuture[Any]) -> str:
        """Where the task is and what it waits for."""


class Lane(Protocol):
    """What the futures of one executor share."""

    @property
    def client(self) -> Home:
        """The client that they live by."""

    @property
    def home(self) -> bytes:
        """Id of the endpoint that their tasks were submitted to."""

    @property
    def secret(self) -> bytes:
        """What read tokens are made of."""


class _Local:
    """A callback that runs once the value is here, with the reason why it could not be had, or None."""

    __slots__ = ("fn",)

    def __init__(self, fn: Callable[[BaseException | None], None]) -> None:
        self.fn = fn


class _Hold:
    """Holds an object as a future does, without being one: the value of a future must not hold the future."""

    __slots__ = ("_client", "_id")

    def __init__(self, client: Home, id: bytes) -> None:
        self._client = client
        self._id = id
        client.keep(id)

    def __del__(self) -> None:
        self._client.drop(self._id)


class ComputeFuture(Future[T]):
    """The result of a task to come; a `concurrent.futures.Future`.

    Give it to `submit` as an argument, anywhere inside the arguments: the task will see its value. `done()` means
    done at its endpoint; a large value is fetched by the first `result()`.
    """

    # Defaults of the class: a pending future has nothing of its own but its id and its lane.
    _state: str = PENDING
    _result: Any = None
    _exception: BaseException | None = None
    _raw: Any = None
    _fields: tuple[Any, ...] | None = (
        None  # a tuple of plain values is soon of no interest to the garbage collector
    )
    _token: bytes | None = None
    _size: int | None = None
    _guard: threading.Condition | None = None
    _kept: object = None  # what lives as long as this future

    def __init__(self, lane: Lane, id: bytes, token: bytes | None = None) -> None:
        # Not Future.__init__: see `__getattr__`.
        self._lane = lane
        self._id = id
        if token is not None:
            self._token = token

    def __getattr__(self, name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with _settling:
            if self._guard is None:
                self._waiters = [] if task_context.current is None else lending.Waiters()
                self._done_callbacks: list[Any] = []
                self._condition = condition = threading.Condition()
                self._guard = condition
        return object.__getattribute__(self, name)

    def __del__(self) -> None:
        try:
            self._lane.client.drop(self._id)
        except AttributeError:
            pass  # it was never made whole

    # ------------------------------------------------------------------------------------------------- what it is

    @property
    def task_id(self) -> str:
        """The task's id, as text."""
        return ids.text(self._id)

    @property
    def size_bytes(self) -> int | None:
        """Size of the result's blob; None while it is not known, and for a failure."""
        raw = self._raw
        if type(raw) is Stored:
            return raw.size
        return len(raw) if type(raw) is bytes else self._size

    @property
    def record(self) -> Record | None:
        """Times, worker, attempts, bytes pulled and output of the run; None while the task is not done."""
        fields = self._fields
        return None if fields is None else Record.from_wire(fields)

    def ref(self) -> ObjectRef:
        """A reference to the result: as an argument it is handed over as it is, and nothing waits for it."""
        made = ObjectRef(self._id, self._lane.home, self._read_token())
        made._pin = self
        return made

    def explain(self) -> str:
        """Where the task is, what it waits for, over which carrier, since when."""
        return self._lane.client.explain(self)

    def _read_token(self) -> bytes:
        return read_token(self._lane.secret, self._id) if self._token is None else self._token

    def __repr__(self) -> str:
        state = self._state
        told = "cancelled" if state == CANCELLED_AND_NOTIFIED else state.lower()
        if state == FINISHED:
            if self._exception is not None:
                told += f" raised {type(self._exception).__name__}"
            elif type(self._raw) is list:
                told += f" raised {self._raw[0] if self._raw else 'an exception'}"
            elif self._raw is None:
                told += f" returned {type(self._result).__name__}"
        return f"<{type(self).__name__} {self.task_id} state={told}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return serialize.note_dependency(self, self._id)

    # ------------------------------------------------------------------------------------------------- how it stands

    def done(self) -> bool:
        """Whether the task has ended, at its home."""
        return self._state in ENDED

    def running(self) -> bool:
        """Whether the task is known to run."""
        return self._state == RUNNING

    def cancelled(self) -> bool:
        """Whether the task was cancelled."""
        return self._state in ENDED and self._state != FINISHED

    def cancel(self, force: bool = False) -> bool:
        """Asks that the task does not run, for a second at the most.

        A thread that runs an event loop is held up for a twentieth of that at the most.

        Args:
            force: also if it runs already: its worker process is killed.

        Returns:
            Whether it is certain that it will not run (any further). False may also mean that the endpoint
            did not answer in time; the request stands.
        """
        state = self._state
        if state in ENDED:
            return state != FINISHED
        return self._lane.client.cancel([self._id], force)[0]

    # ------------------------------------------------------------------------------------------------- its value

    def result(self, timeout: float | None = None) -> T:
        """The value of the task; waits for it, and fetches it where it is large.

        Args:
            timeout: seconds; None waits until the task ends.

        Raises:
            CancelledError: the task was cancelled.
            TimeoutError: it has not ended, or its value is not here, in time.
            LostError: the value could not be fetched; a later call tries again.
            Exception: what the task raised.
        """
        try:
            if self._state not in ENDED or self._raw is not None:
                deadline = None if timeout is None else time.monotonic() + timeout
                if self._state not in ENDED:
                    self._await_end(timeout)
                if self._raw is not None:
                    self._decode(deadline)
            if self._state != FINISHED:
                raise CancelledError()
            if self._exception is not None:
                raise self._exception
            return self._result  # type: ignore[no-any-return]
        finally:
            # Break the reference cycle with the exception, whose traceback holds this frame.
            self = None  # type: ignore[assignment]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception that the task raised, or None; waits for the task, but fetches nothing.

        Raises:
            CancelledError: the task was cancelled.
            TimeoutError: it has not ended in time.
        """
        if self._state not in ENDED:
            self._await_end(timeout)
        if self._state != FINISHED:
            raise CancelledError()
        if type(self._raw) is list:
            self._decode(None)
        return self._exception

    def _await_end(self, timeout: float | None) -> None:
        self._lane.client.check()
        with lending.while_waiting(timeout):
            condition = self._condition
            with condition:
                if not condition.wait_for(self.done, timeout):
                    raise TimeoutError()

    def _decode(self, deadline: float | None, pull: Fetch | None = None) -> None:
        """Turns what came into the value or the exception, and keeps it.

        Args:
            deadline: when to stop waiting for a value that is fetched; None: never.
            pull: the fetch to take it from, if one was made already.
        """
        raw = self._raw
        value, error = None, None
        if raw is None:
            return
        if type(raw) is list:
            error = failure.to_exception(raw)
        elif type(raw) is Stored:
            if pull is None:
                self._lane.client.check()
                pull = self._lane.client.fetch(raw)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            value = self._loads(pull.wait(left))
        else:
            value = self._loads(raw)
        size = self.size_bytes
        with _publishing:
            if self._raw is raw:  # the first one to decode decides what everybody sees
                self._size = size
                self._result = value
                self._exception = error
                self._raw = None

    def _loads(self, data: bytes | memoryview) -> Any:
        """The value of a blob. While a reference in it lives, so does this object, which holds what it refers to."""
        return serialize.loads(data, _Hold(self._lane.client, self._id) if blob.has_refs(data) else None)

    # ------------------------------------------------------------------------------------------------- callbacks

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Calls `fn(self)` when the task has ended; at once, here, if it has.

        Callbacks run in the order in which they were added, on one thread of the client's. Those that asyncio
        adds run when the value is here, so that no event loop ever waits for one.
        """
        if getattr(fn, "__module__", None) == "asyncio.futures":

            def local(error: BaseException | None) -> None:
                fn(self if error is None else _failed(error))

            self._when_local(local)
            return
        if not self._add(fn):
            try:
                fn(self)
            except Exception:  # noqa: BLE001 - as the stdlib does
                LOGGER.exception("exception calling callback for %r", self)

    def _add(self, callback: Any) -> bool:
        """Keeps a callback for the end; False if the future has ended."""
        client = self._lane.client
        client.check()
        with self._condition:
            if self._state in ENDED:
                return False
            if not self._done_callbacks:
                client.hold(self)
            self._done_callbacks.append(callback)
            return True

    def _when_local(self, fn: Callable[[BaseException | None], None]) -> None:
        """Calls `fn` once `result` neither waits nor decodes."""
        if self._state in ENDED and self._raw is None:
            fn(None)
        elif not self._add(_Local(fn)):
            self._lane.client.call_soon(self._bring, fn)

    def _bring(self, fn: Callable[[BaseException | None], None]) -> None:
        """On the callback thread: gets the value, then calls `fn`."""
        raw = self._raw
        if type(raw) is Stored:
            client = self._lane.client
            pull = client.fetch(raw)
            pull.when_done(lambda: client.call_soon(self._brought, fn, pull))
        else:
            self._brought(fn, None)

    def _brought(self, fn: Callable[[BaseException | None], None], pull: Fetch | None) -> None:
        try:
            self._decode(None, pull)
        except BaseException as error:  # noqa: BLE001 - whatever it is, who awaits the value must hear of it
            fn(error)
        else:
            fn(None)

    def _invoke_callbacks(self) -> None:
        """Has the callbacks called, on their thread."""
        callbacks = self._done_callbacks
        if callbacks:
            self._done_callbacks = []
            self._lane.client.call_soon(self._call, callbacks)

    def _call(self, callbacks: Iterable[Any]) -> None:
        for fn in callbacks:
            try:
                if type(fn) is _Local:
                    self._bring(fn.fn)
                else:
                    fn(self)
            except BaseException:  # noqa: BLE001 - a callback harms only itself, also by SystemExit
                LOGGER.exception("exception calling callback for %r", self)

    def __await__(self) -> Generator[Any, None, T]:
        """Waits for the value in asyncio, fetching it off the loop. Can be awaited again; may be cancelled."""
        import asyncio

        if self._state not in ENDED or self._raw is not None:
            with lending.while_awaiting():
                yield from self._gate(asyncio.get_running_loop())
        if self._state != FINISHED:
            raise asyncio.CancelledError()
        return self.result(0)

    def _gate(self, loop: AbstractEventLoop) -> Generator[Any, None, None]:
        gate: Any = loop.create_future()

        def pass_on(error: BaseException | None) -> None:
            if gate.done():
                return
            if error is None:
                gate.set_result(None)
            else:
                gate.set_exception(error)

        def local(error: BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(pass_on, error)
            except RuntimeError:
                pass  # the loop is closed: nobody waits

        self._when_local(local)
        yield from gate

    # ------------------------------------------------------------------------------------------------- how it ends

    def set_running_or_notify_cancel(self) -> NoReturn:
        """Not for this kind of future: its endpoint says when its task runs."""
        raise RuntimeError("a ComputeFuture is driven by its endpoint")

    def set_result(self, result: Any) -> NoReturn:
        """Not for this kind of future: its endpoint ends it."""
        raise InvalidStateError(f"{self._state}: {self!r} is ended by its endpoint")

    def set_exception(self, exception: BaseException | None) -> NoReturn:
        """Not for this kind of future: its endpoint ends it."""
        raise InvalidStateError(f"{self._state}: {self!r} is ended by its endpoint")

    def _end_watched(self, state: str, failed: bool, raw: Any, fields: list[Any] | None) -> None:
        """Ends a future that has a condition."""
        with self._condition:
            if self._state in ENDED:
                return
            self._raw = raw
            if fields is not None:
                self._fields = tuple(fields)
            self._state = state
            for waiter in self._waiters:
                if state != FINISHED:
                    waiter.add_cancelled(self)
                elif failed:
                    waiter.add_exception(self)
                else:
                    waiter.add_result(self)
            self._condition.notify_all()
        self._invoke_callbacks()


End = tuple[ComputeFuture[Any], str, bool, Any, "list[Any] | None"]
"""How a future ends: its state, whether it failed, what came, the fields of its record."""


def settle(ends: Iterable[End]) -> None:
    """Ends futures; the I/O thread alone calls this. One that has ended is left as it is."""
    watched: list[End] | None = None
    with _settling:
        for end in ends:
            future, state, _failed, raw, fields = end
            if future._guard is not None:
                if watched is None:
                    watched = []
                watched.append(end)
            elif future._state not in ENDED:
                future._raw = raw
                if fields is not None:
                    future._fields = tuple(fields)
                future._state = state
    for future, state, failed, raw, fields in watched or ():
        future._end_watched(state, failed, raw, fields)


def mark_running(futures: Iterable[ComputeFuture[Any]]) -> None:
    """Notes that these tasks run; the I/O thread alone calls this."""
    for future in futures:
        if future._state == PENDING:
            future._state = RUNNING


def _failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def after_fork_in_child() -> None:
    """A lock that another thread held when the process forked is held for ever in the child."""
    global _settling, _publishing
    _settling = threading.RLock()
    _publishing = threading.RLock()
