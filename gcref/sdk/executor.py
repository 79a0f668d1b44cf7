"""`Executor`: a `concurrent.futures.Executor` whose workers are at an endpoint.

    submit(fn, *args) ── FunctionCache ──► (digest, bytes)
                      ── dumps_call ─────► payload, references to the arguments that are futures
                      ──► one tuple in the client's queue ──► I/O thread ──► SUBMIT

`submit` serializes in the caller's thread, so that a bad argument raises here and harms nothing else; it waits for
nothing. All that views of an executor (`options`) share is in `_Core`; what tells them apart is their lane.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
import uuid
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from gcref import config, ids, task_context
from gcref.errors import ConfigError, HubUnavailableError, NotFoundError
from gcref.objects import blob, serialize
from gcref.objects.functions import FunctionCache
from gcref.sdk import lending
from gcref.sdk.client import Client, FutureLane, default_client
from gcref.sdk.future import ComputeFuture
from gcref.sdk.mapping import chunked, first, flat, results_of
from gcref.sdk.options import checked_options, is_whole
from gcref.sdk.private_endpoint import PrivateEndpoint
from gcref.sdk.reloading import reload

if TYPE_CHECKING:
    from gcref.sdk.agent_process import AgentProcess
    from gcref.sdk.hub_link import HubLink
    from gcref.sdk.loop import Loop

log: Final = logging.getLogger("gcref.sdk")

T = TypeVar("T")

RELOAD_WAIT_S: Final = 60.0
"""How long `reload_tasks` waits for the endpoint."""

SAY_SO_AFTER_S: Final = 5.0
"""`shutdown` that waits for so long says if that is because the endpoint is out of reach."""

LARGE_FUNCTIONS_KEPT: Final = 16
"""Functions too large for a message that stay at the endpoint, for their next call."""

_INLINE_MAX_BYTES: Final = config.INLINE_MAX_BYTES
_OPTIONS: Final = ("retries", "walltime_s", "resource_specification")

_functions: Final = FunctionCache()
_ref: Final = weakref.ref


class _Core:
    """What an executor and its views share."""

    def __init__(self, client: Client, loop: Loop) -> None:
        self.client = client
        self.loop = loop
        self.private: PrivateEndpoint | None = None
        self.leave: weakref.finalize[Any, Any] | None = None
        self.problem: str | None = None
        self.registered: dict[str, Callable[..., Any]] = {}
        self.fetched: dict[bytes, bytes] = {}  # functions that the hub keeps, by digest
        self.large_functions: OrderedDict[bytes, ComputeFuture[Any]] = OrderedDict()
        self.lock = threading.Lock()


class Executor(concurrent.futures.Executor):
    """Runs functions at an endpoint.

    Args:
        endpoint_id: the endpoint: its UUID, that as text, or its name; where a hub is configured also `owner/name`. None: a
            private endpoint on this machine, which starts with the executor and ends with it; inside a task: the endpoint
            that the task runs at.
        client: the client to use; None: the one that executors of this process share.
        task_group_id: the group that the tasks belong to; None: a new one.
        label: a name for people.
        retries: how often a task is run again when its worker dies.
        walltime_s: how long a task may run, seconds; None: as long as it takes.
        resource_specification: what a task needs, for engines that understand it.
        user_endpoint_config: configuration of a private endpoint, a table as in an endpoint's TOML.
        batch_size: most tasks in one message.
        ship_modules: modules, or their names, whose functions and classes travel with the tasks, because the endpoint does not
            have them.

    Raises:
        NotFoundError: there is no such endpoint; the message names those that are known.
        HubUnavailableError: it is not known here, and the hub does not answer.
        AuthError: the hub does not take the token, or names another key for the endpoint than at first contact.
        ConfigError: a setting cannot be used.
    """

    def __init__(
        self,
        endpoint_id: uuid.UUID | str | None = None,
        client: Client | None = None,
        *,
        task_group_id: uuid.UUID | str | None = None,
        label: str | None = None,
        retries: int = 0,
        walltime_s: float | None = None,
        resource_specification: Mapping[str, Any] | None = None,
        user_endpoint_config: Mapping[str, Any] | None = None,
        batch_size: int = config.DEFAULT_BATCH,
        ship_modules: Iterable[str | ModuleType] = (),
    ) -> None:
        opts = checked_options(retries, walltime_s, resource_specification)
        if not is_whole(batch_size) or batch_size < 1:
            raise ConfigError(
                f"batch_size is {batch_size!r}; it must be a whole number, at least 1", key="batch_size"
            )
        group = ids.new_id() if task_group_id is None else ids.parse(task_group_id)
        if ship_modules:
            serialize.ship_modules(ship_modules)
        context = task_context.current
        process = None
        if endpoint_id is None and context is None:
            process = _start_private(user_endpoint_config)
        try:
            client = default_client() if client is None else client
            loop = client._enter()
            try:
                home = _resolve(endpoint_id, loop) if process is None else process.id
                if process is not None:
                    loop.start_process(process)  # from now on the loop reads from it: nothing below may fail
                elif user_endpoint_config:
                    warnings.warn(
                        "user_endpoint_config configures a private endpoint; this one has its own configuration",
                        stacklevel=2,
                    )
            except BaseException:
                client._leave(loop)
                raise
        except BaseException:
            if process is not None:
                process.stop()
            raise
        self.label = label
        self._core = core = _Core(client, loop)
        self._options: dict[str, Any] = {
            "retries": retries,
            "walltime_s": walltime_s,
            "resource_specification": resource_specification,
        }
        self._lane = FutureLane(loop, home, group, loop.secret_of(group), opts, batch_size)
        if process is not None:
            core.private = private = PrivateEndpoint(process)
            weakref.finalize(core, private.end, loop, self._lane).atexit = False
        core.leave = weakref.finalize(core, client._leave, loop)
        core.leave.atexit = False
        client._executors.add(self)

    # --------------------------------------------------------------------------------------------------- submitting

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> ComputeFuture[T]:
        """Has `fn(*args, **kwargs)` run at the endpoint.

        Futures of gcref's anywhere in the arguments are resolved: the function sees their values, and runs when
        these are there. References (`ObjectRef`) are passed as they are.

        Raises:
            SerializationError: the function or an argument cannot be pickled; a `TypeError` that names it.
            RuntimeError: the executor was shut down.
        """
        core = self._core
        if core.problem is not None or core.loop._broken is not None:
            self._refuse()
        function = _functions.get(fn)
        if function is None:
            call = self._dumps_with_function(fn, args, kwargs)
        else:
            call = serialize.dumps_call(None, args, kwargs)
        return self._send(function, call)

    def _send(self, function: tuple[bytes, bytes] | None, call: serialize.Call) -> ComputeFuture[Any]:
        lane = self._lane
        id = ids.new_id()
        future: ComputeFuture[Any] = ComputeFuture(lane, id)
        encoded, deps, passed = call
        loop = lane.client
        if encoded.size > _INLINE_MAX_BYTES or deps or passed:
            wish = self._with_references(id, function, call, future)
        else:
            wish = (lane, id, function, b"".join(encoded.parts), None, None, None, None, _ref(future))
        loop.queue.append(wish)
        if loop.asleep:
            loop.wake()
        if loop.context is not None:
            loop.context.submitted = True
        return future

    def _with_references(
        self,
        id: bytes,
        function: tuple[bytes, bytes] | None,
        call: serialize.Call,
        future: ComputeFuture[Any],
    ) -> tuple[Any, ...]:
        encoded, deps, passed = call
        home = self._lane.home
        kept: list[Any] = [*deps, *passed]
        payload, upload = None, None
        if encoded.size > _INLINE_MAX_BYTES:
            upload = self._core.loop.large.upload(ids.new_id(), encoded, home)
            kept.append(upload)
        else:
            payload = blob.join(encoded)
        packed_deps = b"".join([_packed(holder, home) for holder in deps]) if deps else None
        packed_refs = b"".join([holder.ref().pack() for holder in passed]) if passed else None
        return (
            self._lane,
            id,
            function,
            payload,
            packed_deps,
            packed_refs,
            upload,
            tuple(kept),
            _ref(future),
        )

    def _dumps_with_function(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> serialize.Call:
        """A call whose function travels inside; a large function is put at the endpoint once, and referred to."""
        call = serialize.dumps_call(fn, args, kwargs)
        if call.encoded.size <= _INLINE_MAX_BYTES:
            return call
        encoded = serialize.dumps(fn)
        if encoded.size <= _INLINE_MAX_BYTES or encoded.refs:
            return call
        digest = blake2b(digest_size=16)
        for part in encoded.parts:
            digest.update(part)
        core, key = self._core, digest.digest()
        with core.lock:
            known = core.large_functions.get(key)
            if known is None:
                known = core.large_functions[key] = self._put(encoded, ())
                if len(core.large_functions) > LARGE_FUNCTIONS_KEPT:
                    core.large_functions.popitem(last=False)
            else:
                core.large_functions.move_to_end(key)
        return serialize.dumps_call(known, args, kwargs)  # type: ignore[arg-type]

    def put(self, value: T) -> ComputeFuture[T]:
        """Puts a value at the endpoint, once, for many tasks.

        Returns:
            A future that is done when the bytes are there. Tasks that use it need not wait for that.

        Raises:
            SerializationError: the value cannot be pickled.
        """
        self._check()
        encoded = serialize.dumps(value)
        # What the value refers to is pinned by its home; futures here must live until that is done.
        return self._put(encoded, tuple(encoded.named))

    def _put(self, encoded: blob.Encoded, kept: tuple[Any, ...]) -> ComputeFuture[Any]:
        from gcref.brains import submitter_events as ev

        lane, id = self._lane, ids.new_id()
        future: ComputeFuture[Any] = ComputeFuture(lane, id)
        data = None
        if encoded.size > _INLINE_MAX_BYTES:
            kept = (*kept, lane.client.large.upload(id, encoded, lane.home))
        else:
            data = blob.join(encoded)
        offered = ev.Offered([(lane, id, encoded.size, data, kept, _ref(future))], time.monotonic())
        lane.client.post(offered)
        if lane.client.context is not None:
            lane.client.context.submitted = True
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[T]:
        """The results of `fn` for each item, in order; all tasks are submitted at once.

        Args:
            fn: takes as many arguments as there are iterables.
            iterables: the arguments.
            timeout: seconds from now within which each result must be there.
            chunksize: calls that make up one task.

        Raises:
            TimeoutError: a result is not there in time.
            Exception: what a call raised. The tasks that have not begun are cancelled.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        end = None if timeout is None else time.monotonic() + timeout
        if chunksize == 1:
            return results_of(
                [self.submit(fn, *arguments) for arguments in zip(*iterables, strict=False)], end
            )
        run = chunked(fn)
        calls = zip(*iterables, strict=False)
        futures: list[ComputeFuture[list[T]]] = []
        while chunk := list(first(calls, chunksize)):
            futures.append(self.submit(run, chunk))
        return flat(results_of(futures, end))

    # ------------------------------------------------------------------------------------------- registered functions

    def register_function(self, fn: Callable[..., Any]) -> str:
        """Names a function for `submit_to_registered_function`.

        Where a hub is configured it keeps the function for this user's other programs, and this call waits for it.

        Returns:
            Its id: the text of a UUID. The same function has the same id.

        Raises:
            SerializationError: it cannot be pickled.
            HubError: the hub does not take it.
        """
        self._check()
        function = _functions.get(fn)
        name = ids.text(ids.new_id() if function is None else function[0])
        hub = self._core.loop.hub
        if hub is not None and function is not None and name not in self._core.registered:
            hub.client().put_function(*function)
        self._core.registered[name] = fn
        return name

    def submit_to_registered_function(
        self, function_id: str, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> ComputeFuture[Any]:
        """Has a registered function run.

        Raises:
            NotFoundError: no function was registered under that id, with this executor or with the hub.
            HubError: the hub does not tell.
        """
        core, name = self._core, str(function_id)
        fn = core.registered.get(name)
        if fn is not None:
            return self.submit(fn, *args, **(kwargs or {}))
        self._check()
        digest = _digest_of(name)
        hub = core.loop.hub
        if hub is None or digest is None:
            raise NotFoundError(
                f"no function {name} was registered with this executor: use register_function"
            )
        code = core.fetched.get(digest)
        if code is None:
            code = core.fetched[digest] = hub.client().get_function(digest)
        return self._send((digest, code), serialize.dumps_call(None, tuple(args), dict(kwargs or {})))

    # -------------------------------------------------------------------------------------------------- life and views

    def options(self, **changes: Any) -> Executor:
        """A view of this executor whose tasks run with other options. It shares everything else, also its end.

        Args:
            changes: `retries`, `walltime_s`, `resource_specification`, as in `Executor`.
        """
        unknown = sorted(changes.keys() - set(_OPTIONS))
        if unknown:
            raise TypeError(f"options() takes {', '.join(_OPTIONS)}, not {unknown[0]!r}")
        view = Executor.__new__(Executor)
        view.label = self.label
        view._core = self._core
        view._options = {**self._options, **changes}
        lane = self._lane
        opts = checked_options(**view._options)
        view._lane = FutureLane(
            lane.client, lane.home, lane.group, lane.secret, opts, lane.batch_size, lane.root
        )
        return view

    def reload_tasks(self, task_group_id: uuid.UUID | str | None = None) -> list[ComputeFuture[Any]]:
        """Futures for all tasks of a group that the endpoint knows; after a restart of the client.

        Args:
            task_group_id: the group; None: this executor's own, which its `task_group_id` named.

        Raises:
            LostError: the endpoint does not answer.
        """
        self._check()
        lane = self._lane
        group = lane.group if task_group_id is None else ids.parse(task_group_id)
        if group != lane.group:
            lane = lane.of_group(group, lane.client.secret_of(group))
        return reload(lane.client, lane, RELOAD_WAIT_S)

    @property
    def endpoint_id(self) -> uuid.UUID:
        """The endpoint's id."""
        return uuid.UUID(bytes=self._lane.home)

    @property
    def task_group_id(self) -> uuid.UUID:
        """The id of the task group."""
        return uuid.UUID(bytes=self._lane.group)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the executor: it takes no more tasks.

        A private endpoint stops when its tasks have ended, and when the values of their futures are here.

        Args:
            wait: return when all tasks have ended, and the private endpoint with them.
            cancel_futures: cancel what has not begun.
        """
        core = self._core
        core.problem = core.problem or "cannot schedule new futures after shutdown"
        core.large_functions.clear()
        loop = core.loop
        if cancel_futures and not loop.is_broken():
            self._cancel_all()
        if core.private is not None:
            core.private.end(loop, self._root_lane())
        if loop.is_broken():
            return
        try:
            if wait:
                self._wait_for_tasks()
        finally:
            if core.leave is not None:
                core.leave()

    def _wait_for_tasks(self) -> None:
        core, loop, root = self._core, self._core.loop, self._lane.root
        ended = core.private.ended if core.private is not None else threading.Event()
        if core.private is None:
            try:
                loop.when_quiet(root, ended.set)
            except RuntimeError:
                return
        told = False
        with lending.while_waiting(None):
            while not ended.wait(SAY_SO_AFTER_S):
                text = "" if told else loop.questions.out_of_reach(root.home)[1]
                if text:
                    log.warning("shutdown waits for %d tasks: %s", root.open, text)
                    told = True

    def _root_lane(self) -> FutureLane:
        root = self._lane.root
        assert isinstance(root, FutureLane)
        return root

    def _cancel_all(self) -> None:
        try:
            self._core.loop.questions.cancel_open(self._lane.root)
        except RuntimeError:
            pass  # the I/O thread has ended: there is nothing to cancel

    def _finish_private(self) -> None:
        """The interpreter ends: what a private endpoint was given is done first, as the stdlib does."""
        if self._core.private is not None:
            self._core.private.end(self._core.loop, self._root_lane())
            self._core.private.wait_at_exit(self._core.loop)

    def _was_shut_down(self) -> bool:
        return self._core.problem is not None

    def _check(self) -> None:
        if self._core.problem is not None or self._core.loop.is_broken():
            self._refuse()

    def _refuse(self) -> NoReturn:
        self._core.loop.check()
        raise RuntimeError(self._core.problem)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Executor cannot be sent to a task; make one there: Executor() is the endpoint that the task runs at, "
            "Executor(endpoint_id) any other one"
        )

    def __repr__(self) -> str:
        label = "" if self.label is None else f" {self.label!r}"
        return f"<Executor{label} at {self._core.loop.where.name_of(self._lane.home)}>"


def _packed(holder: Any, home: bytes) -> bytes:
    """The reference to an argument. Where a task's home owns it too, nobody asks for a token."""
    if type(holder) is ComputeFuture:
        lane = holder._lane
        if lane.home == home and holder._token is None:
            return holder._id + home + _NO_TOKEN
    packed: bytes = holder.ref().pack()
    return packed


_NO_TOKEN: Final = bytes(16)


def _digest_of(function_id: str) -> bytes | None:
    try:
        return ids.parse(function_id)
    except ValueError:
        return None


def _start_private(table: Mapping[str, Any] | None) -> AgentProcess:
    from gcref.sdk.agent_process import AgentProcess

    return AgentProcess(ids.new_id(), carriers=["ipc"], config=table)


def _resolve(endpoint: uuid.UUID | str | None, loop: Loop) -> bytes:
    context = task_context.current
    if endpoint is None:
        assert context is not None
        return context.agent_id
    try:
        id = ids.parse(endpoint)
    except ValueError:
        id = None
    if id is not None and (context is not None or loop.where.knows(id)):
        return id  # inside a task its agent finds the endpoint
    from gcref.directory import records

    try:
        record = records.resolve(endpoint)
    except NotFoundError as error:
        if loop.hub is None:
            raise
        return _resolve_at_hub(loop.hub, endpoint, error)
    loop.where.remember(record)
    return record.id


def _resolve_at_hub(hub: HubLink, endpoint: uuid.UUID | str, not_here: NotFoundError) -> bytes:
    try:
        return hub.resolve(endpoint).id
    except NotFoundError as error:
        raise NotFoundError(f"{not_here} The hub at {hub.url} was asked too: {error}") from None
    except HubUnavailableError as error:
        raise HubUnavailableError(f"endpoint {str(endpoint)!r} is not known here, and {error}") from None
