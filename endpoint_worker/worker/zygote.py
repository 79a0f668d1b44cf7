"""The process that workers are forked from: made before the agent has a thread or a socket, with all that they import.

    agent ── Zygote (this end) ══ socketpair ══ zygote process ── fork ──► worker, worker, …
              spawn, kill ───►                      │ reaps them
              ◄─── Spawned, Exited ─────────────────┘

Forking an agent that has threads and ZeroMQ contexts would be unsound, and starting an interpreter for each worker would
be slow; a fork of this process takes a few milliseconds, and what it has imported is shared memory.

Rules:
    - Every worker is the leader of a process group. When it dies, the rest of its group dies with it, before its
      exit is reported: what a task started and left behind sees no memory of ours any more.
    - Nothing outlives `close`: the zygote kills all that descends from it (it is the reaper of orphans below it), and
      ends. An agent that is killed is outlived by `adopt_s`: 0 is not at all. Should the zygote be killed, the
      kernel kills the workers.
    - The next agent takes the zygote over (`adopt`, then `workers`), or, when none lives, what its workers have left
      (`remains`). One of the two, and in the same folders.
    - What `read`, `workers` and `remains` have told of the dead stays in their pages until the next `read` of a zygote
      of that folder: by then the agent has written it down.
    - The zygote and its workers are in a session of their own: a Ctrl-C in the agent's terminal is the agent's.
    - A worker starts with the platform's defaults: signal handlers, no threads, an empty `__main__`, the agent's working
      directory. Standard output and error are files; their last lines explain a death.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from endpoint_worker.worker import page as pages
from endpoint_worker.worker import remains, zygote_process
from endpoint_worker.worker.channel import LEASE_MARGIN_S
from endpoint_worker.worker.remains import Exited as Exited
from endpoint_worker.worker.remains import Files, Remains
from endpoint_worker.worker.remains import WorkerConfig as WorkerConfig
from endpoint_worker.worker.zygote_process import FRAME_MAX_BYTES
from gcref.brains.dispatch import LEASE_S
from gcref.errors import LostError, ProtocolError
from gcref.wire import codec

# Logs of so many dead workers are kept.
_LOGS_MAX: Final = 16
# In the folder of the pages: where a zygote that may be adopted listens, and what it keeps locked while it lives.
_SOCKET: Final = "zygote.sock"
_LOCK: Final = "zygote.lock"
# A zygote answers at once, unless somebody has stopped it; one that ends has to see its workers die.
_ANSWER_S: Final = 5.0
_END_S: Final = 10.0
_RETRY_S: Final = 0.005


class Spawned(NamedTuple):
    """The process of a worker exists; it says READY when it can work."""

    worker: int
    pid: int


class Zygote:
    """The agent's end. One thread uses it.

    Attributes:
        fd: readable when `read` has something.
        pid: of the zygote process.
    """

    def __init__(
        self, pid: int, link: socket.socket, directory: Path, log_directory: Path, *, outlives: bool
    ) -> None:
        self.pid = pid
        self.fd = link.fileno()
        self._link = link
        self._directory = directory
        self._log_directory = log_directory
        self._outlives = outlives
        self._workers: dict[int, tuple[pages.Page, Files]] = {}
        self._remains: list[Remains] = []
        self._received: dict[int, int] = {}
        self._told: list[str] = []  # pages of the dead
        self._logs: list[Files] = []
        self._broken = False

    # ----------------------------------------------------------------------------------------- beginnings

    @classmethod
    def start(cls, directory: Path, log_directory: Path, adopt_s: float = 0.0) -> Zygote:
        """Fork the zygote. The process has to be single-threaded, and to hold nothing that a child should not.

        Args:
            directory: for the workers' pages, in memory; made if missing.
            log_directory: for the workers' standard output and error; made if missing.
            adopt_s: for how long it waits for another agent when this one dies without `close`, seconds.

        Raises:
            OSError: no process can be made, a folder is not usable, or another zygote lives there.
        """
        for folder in (directory, log_directory):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        listener, lock = _listen(directory) if adopt_s > 0 else (None, -1)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            log = str(log_directory / "zygote.err")
            zygote_process.in_child(
                lambda: zygote_process.Process(theirs, log, listener, lock, adopt_s).run()
            )
        theirs.close()
        if listener is not None:
            listener.close()
            os.close(lock)
        made = cls(pid, ours, directory, log_directory, outlives=adopt_s > 0)
        made._told = [
            Files.of(worker, directory, log_directory).page for worker in remains.pages_in(directory)
        ]
        return made

    @classmethod
    def adopt(cls, directory: Path, log_directory: Path) -> Zygote | None:
        """Take over the zygote of an agent that is dead, with its workers; `workers` tells of them.

        Args:
            directory, log_directory: as `start` had them.

        Returns:
            None: no zygote lives there, nor does a worker; `remains` says what they left.
        """
        link = _connect(directory / _SOCKET)
        if link is not None:
            answer = _ask(link)
            if answer is not None:
                _, pid, alone_since, living = answer
                # What the last lease let start has started by then, and its page says so.
                time.sleep(max(0.0, alone_since + LEASE_S + LEASE_MARGIN_S - time.monotonic()))
                adopted = cls(pid, link, directory, log_directory, outlives=True)
                adopted._take_over(dict(living))
                return adopted
            link.close()
        _see_it_end(directory / _LOCK)
        return None

    @staticmethod
    def remains(directory: Path, log_directory: Path) -> list[Remains]:
        """What the workers of a dead zygote have left, by number. Workers that live still are killed first.

        The pages stay until the first `read` of the zygote that is started there next.
        """
        found: list[Remains] = []
        if not directory.is_dir():
            return found
        for worker in remains.pages_in(directory):
            files = Files.of(worker, directory, log_directory)
            one = _look_at_dead(worker, files)
            if one is not None:
                found.append(one)
        return found

    @staticmethod
    def end(directory: Path) -> None:
        """End the zygote of a dead agent, if one lives there, with its workers. What they left stays for `remains`."""
        if not directory.is_dir():
            return
        link = _connect(directory / _SOCKET)
        if link is not None:
            with suppress(OSError):
                link.send(codec.pack([zygote_process.STOP]))
            link.close()
        _see_it_end(directory / _LOCK)

    def workers(self) -> list[Remains]:
        """After `adopt`: the workers that there are, living and dead, by number. Told once."""
        told, self._remains = self._remains, []
        return told

    def _take_over(self, living: dict[int, int]) -> None:
        for worker in remains.pages_in(self._directory):
            files = Files.of(worker, self._directory, self._log_directory)
            pid = living.pop(worker, 0)
            if not pid:
                self._told.append(files.page)
                self._logs.append(files)
                one = _look_at_dead(worker, files)
            else:
                one = self._look_at_living(worker, pid, files)
            if one is not None:
                self._remains.append(one)
        for worker in living:  # nobody knows what it is
            self._command([zygote_process.KILL, worker])

    def _look_at_living(self, worker: int, pid: int, files: Files) -> Remains | None:
        try:
            page = pages.Page(files.page)
        except OSError:
            found = None
        else:
            found = remains.read(worker, pid, page, files)
            if found is not None:
                self._workers[worker] = (page, files)
            else:
                page.close()
        if found is None:  # its task has spoiled it
            self._command([zygote_process.KILL, worker])
            self._told.append(files.page)
        return found

    # -------------------------------------------------------------------------------------------- workers

    def spawn(self, worker: int, config: WorkerConfig, env: Mapping[str, str] | None = None) -> None:
        """Start a worker. `Spawned` follows, or `Exited` if it could not be started.

        Args:
            worker: its number, never used before.
            config: what it needs to know.
            env: environment variables that it gets beside the agent's.

        Raises:
            OSError: there is no room for its page.
            LostError: the zygote is gone.
        """
        files = Files.of(worker, self._directory, self._log_directory)
        pages.create(files.page, codec.pack(list(config)))
        self._workers[worker] = (pages.Page(files.page), files)
        self._command([zygote_process.SPAWN, worker, files, config, dict(env or {})])

    def kill(self, worker: int) -> None:
        """Kill a worker and its process group. `Exited` follows, unless it had come already."""
        if worker in self._workers:
            self._command([zygote_process.KILL, worker])

    def progress(self, worker: int) -> int:
        """The seq of the entry that a worker started last; 0: none, or no such worker."""
        found = self._workers.get(worker)
        return found[0].progress if found is not None else 0

    def has_ended(self, worker: int, seq: int) -> bool:
        """Whether a worker has ended an entry that it had started, but perhaps for handing over what that submitted."""
        found = self._workers.get(worker)
        if found is None:
            return False
        page = found[0]
        return page.has_returned(seq) or any(result[0] == seq for result in remains.results_of(page))

    def received(self, worker: int, seq: int) -> None:
        """A worker's results up to this one have come: its exit need not tell them again."""
        if worker in self._workers:
            self._received[worker] = seq

    def read(self) -> list[Spawned | Exited]:
        """What has happened. Never blocks. What was told before this call counts as written down.

        Raises:
            LostError: the zygote is gone, and all workers with it: the agent has to start anew.
        """
        self._settle()
        news: list[Spawned | Exited] = []
        while (frame := self._receive()) is not None:
            kind, worker, pid, exit_code, signal_number = codec.unpack(frame, FRAME_MAX_BYTES)
            if kind == zygote_process.SPAWNED:
                news.append(Spawned(worker, pid))
            elif worker in self._workers:
                news.append(self._exited(worker, pid, exit_code, signal_number))
        return news

    def close(self) -> None:
        """Kill what is left, wait until it is gone, remove the files of dead and living."""
        try:
            self._link.send(codec.pack([zygote_process.STOP]))
            self._link.settimeout(_END_S)
            while self._link.recv(FRAME_MAX_BYTES):
                pass
        except OSError:
            pass  # it is gone; or it is stopped, and dies with the link or not at all
        self._link.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # somebody else has waited for it, or it was adopted
        self._settle()
        for page, files in self._workers.values():
            page.close()
            remains.unlink(files.page)
        self._workers.clear()
        if self._outlives:
            remains.unlink(str(self._directory / _SOCKET))
            remains.unlink(str(self._directory / _LOCK))

    def leave(self) -> None:
        """Let go as if we had died: another agent may adopt what there is. With `adopt_s` 0 this is `close`."""
        if not self._outlives:
            self.close()
            return
        self._link.close()
        for page, _ in self._workers.values():
            page.close()
        self._workers.clear()

    def _settle(self) -> None:
        for path in self._told:
            remains.unlink(path)
        self._told.clear()

    def _command(self, command: list[Any]) -> None:
        try:
            self._link.send(codec.pack(command))
        except OSError as error:
            raise self._gone() from error

    def _receive(self) -> bytes | None:
        if self._broken:
            raise self._gone()
        try:
            frame = self._link.recv(FRAME_MAX_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._gone() from error
        if not frame:
            # What was read before this is news still; the next call raises.
            self._broken = True
            return None
        return frame

    def _gone(self) -> LostError:
        return LostError(
            f"the process that makes the workers (pid {self.pid}) is gone; start the endpoint again"
        )

    def _exited(self, worker: int, pid: int, exit_code: int | None, signal_number: int | None) -> Exited:
        page, files = self._workers.pop(worker)
        progress = page.begun()
        received = self._received.pop(worker, 0)
        results = [result for result in remains.results_of(page) if result[0] > received]
        page.close()
        if self._outlives:
            self._told.append(files.page)
        else:
            remains.unlink(files.page)
        stderr = remains.last_lines(files.err)
        self._logs.append(files)
        if exit_code == 0 or len(self._logs) > _LOGS_MAX:
            old = self._logs.pop(-1 if exit_code == 0 else 0)
            remains.unlink(old.out)
            remains.unlink(old.err)
        return Exited(worker, pid, exit_code, signal_number, stderr, progress, results)


def _look_at_dead(worker: int, files: Files) -> Remains | None:
    try:
        page = pages.Page(files.page)
    except OSError:
        return None
    try:
        remains.make_sure_it_is_dead(page, files)
        return remains.read(worker, 0, page, files)
    finally:
        page.close()


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """The path of a socket in a folder whose own path may be too long for one."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _listen(directory: Path) -> tuple[socket.socket, int]:
    """Where the next agent will connect, and the lock that tells that somebody serves there."""
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remains.unlink(str(directory / _SOCKET))
        with _short(directory / _SOCKET) as path:
            listener.bind(path)
        listener.listen(1)
    except BaseException:
        listener.close()
        os.close(lock)
        raise
    return listener, lock


def _connect(path: Path) -> socket.socket | None:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.settimeout(_ANSWER_S)
    try:
        with _short(path) as short:
            link.connect(short)
    except OSError:
        link.close()
        return None
    return link


def _ask(link: socket.socket) -> list[Any] | None:
    """What a zygote says to its new agent; None: it will not have us, or has ended."""
    try:
        link.send(codec.pack([zygote_process.ADOPT, zygote_process.VERSION]))
        answer = codec.unpack(link.recv(FRAME_MAX_BYTES), FRAME_MAX_BYTES)
        link.setblocking(True)
    except (OSError, ProtocolError):
        return None
    return answer if answer[0] == zygote_process.ADOPTED else None


def _see_it_end(path: Path) -> None:
    """Wait until no zygote holds this lock; one that is stopped, or cannot get done, is killed."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # there was none
    try:
        patience = time.monotonic() + _END_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > patience:
                    os.kill(int(os.pread(lock, 32, 0)), signal.SIGKILL)
                time.sleep(_RETRY_S)
    finally:
        os.close(lock)
