"""The agent's side of the worker channel, as little of it as a test needs: real workers, real sockets, no brains."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import zmq

from endpoint_worker.worker import channel
from endpoint_worker.worker.channel import AgentChannel
from endpoint_worker.worker.remains import Remains
from endpoint_worker.worker.zygote import Exited, Spawned, WorkerConfig, Zygote
from gcref import ids
from gcref.objects import blob, serialize
from gcref.objects.functions import FunctionCache
from gcref.wire.messages import FAILED, OK
from tests.support.waiting import patience, wait_until

LONG_S: Final = 3600.0
AGENT: Final = ids.new_id()
ADOPT_S: Final = 60.0


class Result(NamedTuple):
    """A result as DONE has it."""

    seq: int
    id: bytes
    attempt: int
    status: int
    value: Any
    started: float
    duration: float
    refs: bytes | None
    extra: list[Any] | None


class FakeAgent:
    """One zygote, one channel, and a record of what the workers said.

    Attributes:
        messages: what came and was not looked for, (worker, message), in order.
        exits: workers that ended.
        unmapped: what workers returned, (worker, item).
    """

    def __init__(self, workers: int = 1, adopt_s: float = 0.0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gcref-test-", dir="/dev/shm"))
        self.folders = self.folder / "pages", self.folder / "logs"
        self.zygote = Zygote.start(*self.folders, adopt_s)
        self.channel = AgentChannel(f"ipc://{self.folder}/channel")
        self.messages: deque[tuple[int, list[Any]]] = deque()
        self.exits: list[Exited] = []
        self.unmapped: list[tuple[int, list[Any]]] = []
        self.pids: dict[int, int] = {}
        self._functions = FunctionCache()
        self._sent: set[tuple[int, bytes]] = set()
        self._seq = 0
        self._poller = self._watch()
        for worker in range(1, workers + 1):
            self.spawn(worker)
        for worker in range(1, workers + 1):
            self.expect(channel.READY, worker)

    def _watch(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self.channel.socket, zmq.POLLIN)
        poller.register(self.zygote.fd, zmq.POLLIN)
        return poller

    def die(self) -> None:
        """As a killed process does: its sockets are closed, and nothing is said to anybody."""
        self.zygote.leave()
        self.channel.close()
        self.messages.clear()
        self.exits.clear()
        self.unmapped.clear()

    def come_back(self) -> list[Remains]:
        """Another agent in the same place: what it finds. It has said nothing to the workers yet."""
        zygote = Zygote.adopt(*self.folders)
        assert zygote is not None, "no zygote lives"
        self.zygote = zygote
        self.channel = AgentChannel(self.channel.address)
        self._poller = self._watch()
        return zygote.workers()

    def adopt(self, epoch: int = 1, worker: int = 1) -> None:
        """Tell a worker that there is a new agent, as soon as it can be reached."""
        wait_until(
            lambda: self.channel.send(worker, channel.adopt(epoch)), what="the worker to connect again"
        )

    def spawn(self, worker: int, env: dict[str, str] | None = None, memory_bytes: int | None = None) -> None:
        config = WorkerConfig(
            self.channel.address,
            AGENT,
            "polaris",
            "ipc:///control",
            "ipc:///bulk",
            ids.new_id(),
            memory_bytes,
        )
        self.zygote.spawn(worker, config, env)

    # -------------------------------------------------------------------------------------------- entries

    def entry(
        self,
        fn: Callable[..., Any],
        *args: Any,
        deps: tuple[Any, ...] | list[Any] = (),
        flags: int = 0,
        worker: int = 1,
        id: bytes | None = None,
        by_value: bool = False,
        args_path: list[Any] | None = None,
        payload: bytes | None = None,
    ) -> list[Any]:
        """An entry that calls `fn`; functions that the worker does not have are sent."""
        known = None if by_value else self._functions.get(fn)
        if known is not None and (worker, known[0]) not in self._sent:
            self._sent.add((worker, known[0]))
            self.send(worker, channel.function(*known))
        if payload is None and args_path is None:
            call = serialize.dumps_call(None if known else fn, args, {})
            payload = blob.join(call.encoded)
        self._seq += 1
        digest = known[0] if known else None
        return [
            self._seq, id or ids.new_id(), 1, digest, payload, args_path, list(deps), flags, b"g" * 16, None,
        ]  # fmt: skip

    def send(self, worker: int, frame: bytes) -> None:
        assert self.channel.send(worker, frame)

    def tasks(self, entries: list[list[Any]], *, worker: int = 1, lease_s: float = LONG_S) -> None:
        self.send(worker, channel.tasks(time.monotonic() + lease_s, entries))

    def run(self, fn: Callable[..., Any], *args: Any, worker: int = 1, **options: Any) -> Result:
        """Run one task and wait for its result."""
        entry = self.entry(fn, *args, worker=worker, **options)
        self.tasks([entry], worker=worker)
        return self.results(1, worker)[0]

    def value(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run one task that returns a small value; the value."""
        return value_of(self.run(fn, *args, **options))

    # ------------------------------------------------------------------------------------------- messages

    def pump(self, timeout_s: float) -> None:
        """Wait once, take what is there."""
        for fd, _ in self._poller.poll(int(max(0.0, timeout_s) * 1000)):
            if fd == self.zygote.fd:
                for news in self.zygote.read():
                    if isinstance(news, Spawned):
                        self.pids[news.worker] = news.pid
                    else:
                        self.exits.append(news)
        while found := self.channel.receive():
            for worker, message, _frame in found:
                if message[0] == channel.DONE:
                    self.unmapped += [(worker, item) for item in message[2]]
                self.messages.append((worker, message))

    def wait(self, ready: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
        deadline = time.monotonic() + patience(timeout_s)
        while not (answer := ready()):
            left = deadline - time.monotonic()
            assert left > 0, f"waited in vain for {what}; there is {list(self.messages)[:5]}, {self.exits}"
            self.pump(left)
        return answer

    def take(self, kind: int, worker: int = 1) -> list[Any] | None:
        """The oldest message of that kind that was not taken yet."""
        for index, (sender, message) in enumerate(self.messages):
            if sender == worker and message[0] == kind:
                del self.messages[index]
                return message
        return None

    def expect(self, kind: int, worker: int = 1) -> list[Any]:
        found = self.wait(lambda: self.take(kind, worker), f"message {kind} of worker {worker}")
        assert isinstance(found, list)
        return found

    def results(self, count: int, worker: int = 1) -> list[Result]:
        """Wait for so many results; they may come in several messages."""
        found: list[Result] = []
        while len(found) < count:
            found += [Result(*item) for item in self.expect(channel.DONE, worker)[1]]
        assert len(found) == count
        return found

    def exited(self, worker: int = 1) -> Exited:
        def look() -> Exited | None:
            return next((found for found in self.exits if found.worker == worker), None)

        found = self.wait(look, f"the end of worker {worker}")
        assert isinstance(found, Exited)
        return found

    def returned(self, path: str) -> list[Any] | None:
        """What came back for a path, if it did."""
        return next((item for _, item in self.unmapped if item[0] == path), None)

    # --------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        self.zygote.close()
        self.channel.close()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def value_of(result: Result) -> Any:
    assert result.status == OK, result
    return serialize.loads(result.value)


def failure_of(result: Result) -> list[Any]:
    assert result.status == FAILED, result
    assert isinstance(result.value, list)
    return result.value


def place(path: Path, value: Any) -> tuple[list[Any], bytes]:
    """Write a value's blob where a worker may map it: its place, and the blob."""
    data = blob.join(serialize.dumps(value))
    path.write_bytes(data)
    return [str(path), len(data)], data


def exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def begun(agent: FakeAgent, entry: list[Any], worker: int = 1) -> None:
    wait_until(lambda: agent.zygote.progress(worker) == entry[0], what="the task to start")


def open_pipe(pipe: str, text: str = "here") -> None:
    """Let the task go on that waits for it."""
    Path(pipe).write_text(text)
