"""`Client`: who this process is, and its sessions with endpoints; shared by executors.

There is one default client in a process, for executors that are not handed another one. Its thread and its connections are
there while somebody needs them: an executor that was not shut down, or a future. Inside a task a client speaks for the
task, through the task's own agent; whoever makes others there speaks by the same thread, since an agent knows each of its
workers as one party.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from gcref import config, ids, task_context
from gcref.brains.submitter_table import Lane
from gcref.objects.ref import ObjectRef

if TYPE_CHECKING:
    from types import TracebackType

    from gcref.carriers.keys import KeyPair
    from gcref.sdk.executor import Executor
    from gcref.sdk.future import ComputeFuture
    from gcref.sdk.hub_link import HubLink
    from gcref.sdk.loop import Loop

log: Final = logging.getLogger("gcref.sdk")

NO_SECRET: Final = bytes(32)


class FutureLane(Lane):
    """What the futures of one executor share: a lane, and the I/O thread that serves it."""

    __slots__ = ("client",)

    def __init__(
        self,
        loop: Loop,
        home: bytes,
        group: bytes,
        secret: bytes,
        opts: dict[str, Any],
        batch_size: int,
        root: Lane | None = None,
    ) -> None:
        super().__init__(home, group, secret, opts, batch_size, root)
        self.client = loop

    def of_group(self, group: bytes, secret: bytes) -> FutureLane:
        """The same for tasks of another group, or of one whose secret was told by its home."""
        return FutureLane(self.client, self.home, group, secret, self.opts, self.batch_size, self.root)


class _Place:
    """Where an I/O thread is kept: one client's, or that of all clients of a worker.

    Attributes:
        lock: guards what is here, and `users` of the thread.
        loop: the thread; None: nobody has needed one, or it has ended.
    """

    __slots__ = ("lock", "loop")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.loop: Loop | None = None


class Client:
    """The directory and the sessions of this process; shared by executors.

    Args:
        hub_url: address of the hub; None: as configured. Endpoints in `GCREF_HOME` need none.
        token: proves to the hub who the user is; None: as configured.
        carriers: the ways that may be used (`"ipc"`, `"direct"`, `"broker"`); None: as configured.

    Raises:
        ConfigError: the configuration, or the user's key, cannot be used.
    """

    def __init__(
        self, hub_url: str | None = None, token: str | None = None, carriers: Iterable[str] | None = None
    ) -> None:
        self._closed = False
        self._home = _named_home()
        self._context = context = task_context.current
        self._place = _Place() if context is None else _task_place
        self._me = ids.new_id() if context is None else context.party
        self._executors: weakref.WeakSet[Executor] = weakref.WeakSet()
        if context is not None:
            self._carriers = frozenset(("ipc",))
            self.hub_url = hub_url
            self._patience = (config.ENDPOINT_LOST_S, config.HEARTBEAT_S)
        else:
            settings = config.client_config()
            self._patience = (settings.endpoint_lost_s, settings.heartbeat_s)
            self._carriers = config.carriers_allowed(carriers)
            self.hub_url = hub_url or settings.hub_url
            token = token or settings.token
        self._token = token
        self._hub: HubLink | None = None
        _clients.add(self)

    @property
    def id(self) -> str:
        """This client's party id, as text."""
        return ids.text(self._me)

    def _enter(self) -> Loop:
        """The I/O thread, started if need be; it lives at least until `_leave`."""
        place = self._place
        with place.lock:
            if self._closed:
                raise RuntimeError("this client is closed")
            loop = place.loop
            if loop is None or loop.is_broken():
                from gcref.sdk.loop import Loop

                _register_exit()
                lost_s, heartbeat_s = self._patience
                keys = self._keys()
                loop = place.loop = Loop(
                    self._me,
                    keys,
                    self._carriers,
                    self._context,
                    self._let_go,
                    hub=self._link(keys),
                    endpoint_lost_s=lost_s,
                    heartbeat_s=heartbeat_s,
                )
            loop.users += 1
            return loop

    def _link(self, keys: KeyPair) -> HubLink | None:
        """What the next I/O thread has to do with the hub."""
        if self._context is not None or self.hub_url is None:
            return None
        from gcref.sdk.hub_link import HubLink

        self._hub = HubLink(self.hub_url, self._token, self._me, keys, self._hub)
        return self._hub

    def _leave(self, loop: Loop) -> None:
        with self._place.lock:
            loop.users -= 1
        loop.poke()

    def _let_go(self, loop: Loop) -> bool:
        """Asked by an I/O thread that has nothing to do: whether it may end."""
        with self._place.lock:
            if loop.users or loop.queue:
                return False
            if self._place.loop is loop:
                self._place.loop = None
            return True

    def _keys(self) -> KeyPair:
        from gcref.carriers import keys

        if self._context is not None:
            # What a task may do, its agent knows by its party id; the key only has to stay the same.
            global _task_keys
            _task_keys = _task_keys or keys.generate()
            return _task_keys
        return keys.load_or_create(config.home() / "keys" / "user.key")

    def open(self, reference: ObjectRef) -> ComputeFuture[Any]:
        """A future for what a reference refers to."""
        loop, home = self._enter(), reference._home
        try:
            lane = FutureLane(loop, home, bytes(16), NO_SECRET, {}, 1)
            return loop.open(reference._id, home, reference._token, lane)
        finally:
            self._leave(loop)

    def _can_reach_private(self, home: bytes) -> bool:
        """Whether the endpoint is a private one that was started by this client."""
        loop = self._place.loop
        return loop is not None and not loop.is_broken() and loop.where.is_own(home)

    def payload_bytes(self) -> dict[str, int]:
        """Bytes of large values and arguments that passed through this process.

        Returns:
            `"in"`: fetched over the network; `"out"`: sent to endpoints; `"mapped"`: values of this machine that were
            mapped, not copied.
        """
        counts = {"in": 0, "out": 0, "mapped": 0}
        loop = self._place.loop
        if loop is not None:
            for (_party, carrier, direction), size in loop.large.bytes_moved().items():
                counts["mapped" if carrier == "ipc" and direction == "in" else direction] += size
        return counts

    def close(self, timeout: float = config.EXIT_FLUSH_S) -> None:
        """Ends the client: shuts its executors down, sends what is unsent, and closes its connections.

        Private endpoints finish their tasks first. Futures of tasks that go on elsewhere end in an error; inside a task
        they do not, because other clients may wait for them by the same connection.

        Args:
            timeout: how long endpoints may take to acknowledge what they were sent, seconds.
        """
        with self._place.lock:
            if self._closed:
                return
            self._closed = True
        if self._context is None:
            self._end(timeout)
        else:
            for executor in list(self._executors):
                executor.shutdown(wait=False)

    def _end(self, timeout: float) -> None:
        loop = self._place.loop
        if loop is None or loop.is_broken():
            return
        executors = list(self._executors)
        for executor in executors:
            executor._finish_private()
        unclean = {executor._lane.home for executor in executors if not executor._was_shut_down()}
        try:
            loop.post(lambda: _release(loop, unclean))
        except RuntimeError:
            return
        missing = loop.close(timeout)
        if missing:
            log.warning(
                "%d tasks may not have reached their endpoints: these did not answer within %g s",
                missing,
                timeout,
            )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client(carriers={sorted(self._carriers)!r})"


def _release(loop: Loop, unclean: set[bytes]) -> None:
    """Lets go of what is done, on the I/O thread; but not of arguments, nor at homes that were not left in order."""
    from gcref.brains import submitter_events as ev
    from gcref.brains.submitter_table import ENDED

    entries = loop.entries()
    kept = [holder for entry in entries if entry.state != ENDED for holder in entry.args or ()]
    needed = frozenset(id for holder in kept if (id := getattr(holder, "_id", None)) is not None)
    loop.tell(ev.Leaving(frozenset(entry.home for entry in entries) - unclean, needed))


_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_task_place = _Place()
_default: Client | None = None
_task_keys: KeyPair | None = None
_default_lock = threading.Lock()
_exit_registered = False


def default_client() -> Client:
    """The client that executors share which are not handed another one."""
    global _default
    with _default_lock:
        client = _default
        # Another GCREF_HOME means other keys and other endpoints.
        if client is None or client._closed or client._home != _named_home():
            client = _default = Client()
        return client


def _named_home() -> str | None:
    return os.environ.get("GCREF_HOME")


def open_reference(reference: ObjectRef) -> ComputeFuture[Any]:
    """The future that stands for a reference here; the same one as long as the reference lives."""
    from gcref.sdk.future import ComputeFuture

    pinned = reference._pin
    if isinstance(pinned, ComputeFuture):
        return pinned
    future = None
    for client in list(_clients):
        if client._can_reach_private(reference._home):
            future = client.open(reference)
            break
    if future is None:
        future = default_client().open(reference)
    # What has kept the object until now lives on: our own word may reach its home later than that one's end.
    future._kept = pinned
    reference._pin = future
    return future


def _register_exit() -> None:
    """Has `_at_exit` called before the interpreter joins threads, as the stdlib's executors have."""
    global _exit_registered
    if _exit_registered:
        return
    _exit_registered = True
    register = getattr(threading, "_register_atexit", None)
    if register is None:
        atexit.register(_at_exit)
        return
    register(_at_exit)


def _at_exit() -> None:
    for client in list(_clients):
        client.close()
    loop = _task_place.loop
    if loop is not None:
        loop.close(config.EXIT_FLUSH_S)


def _after_fork_in_child() -> None:
    global _default, _default_lock, _clients, _task_place
    _default = None
    _task_place = _Place()
    _default_lock = threading.Lock()
    _clients = weakref.WeakSet()  # what the parent owns, the parent ends
    task_context.current = None


os.register_at_fork(after_in_child=_after_fork_in_child)
