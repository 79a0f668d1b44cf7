"""The process that workers are forked from: made before the agent has a thread or a socket, with all that they import.

    agent ── Zygote (this end) ══ socketpair ══ zygote process ── fork ──► worker, worker, …
              spawn, kill ───►                      │ reaps them
              ◄─── Spawned, Exited ─────────────────┘

Forking an agent that has threads and ZeroMQ contexts would be unsound, and starting an interpreter for each worker would
be slow; a fork of this process takes a few milliseconds, and what it has imported is shared memory.

Rules:
    - Every worker is the leader of a process group. When it dies, the rest of its group dies with it, before its
      exit is reported: what a task started and left behind sees no memory of ours any more.
    - Nothing outlives the agent: when the socketpair ends, the zygote kills all that descends from it (it is the
      reaper of orphans below it), and ends. Should the zygote be killed, the kernel kills the workers.
    - The zygote and its workers are in a session of their own: a Ctrl-C in the agent's terminal is the agent's.
    - A worker starts with the platform's defaults: signal handlers, no threads, an empty `__main__`, the agent's working
      directory. Standard output and error are files; their last lines explain a death.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple, NoReturn

from endpoint_worker.worker import page as pages
from gcref.errors import LostError
from gcref.wire import codec

# Commands to the zygote.
_SPAWN: Final = 1
_KILL: Final = 2
# Its news.
_SPAWNED: Final = 1
_EXITED: Final = 2

_FRAME_MAX_BYTES: Final = 1 << 20
_STDERR_TAIL_BYTES: Final = 4096
_STDERR_TAIL_LINES: Final = 20
# Logs of so many dead workers are kept.
_LOGS_MAX: Final = 16
# The exit code of a worker that could not even be started (EX_OSERR).
_NOT_STARTED: Final = 71

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


class WorkerConfig(NamedTuple):
    """What a worker needs to know.

    Attributes:
        channel: `ipc://…` of the agent's end of the worker channel.
        agent_id: the endpoint's id.
        endpoint: the endpoint's name, for notes in errors.
        control_address: where the SDK inside tasks finds the agent.
        bulk_address: where it finds the agent's bytes.
        party: the party id of the SDK inside this worker's tasks; another one for each worker.
    """

    channel: str
    agent_id: bytes
    endpoint: str
    control_address: str
    bulk_address: str
    party: bytes


class Spawned(NamedTuple):
    """The process of a worker exists; it says READY when it can work."""

    worker: int
    pid: int


class Exited(NamedTuple):
    """A worker is dead, and so is its process group.

    Attributes:
        worker: its number.
        pid: of its process; 0: it could not be started.
        exit_code: its exit code; None: a signal killed it. 0 is the answer to EXIT.
        signal: the number of the signal; None: it exited.
        stderr: the last lines that it wrote there.
        progress: seq of the entry that it started last.
        results: what it finished and may not have been able to send, as in DONE and in order (all that it noted
            last, but for those that `received` told of). Take them like a DONE, *before* `Store.worker_gone`.
            After that, of the entries it held, the one whose seq is `progress` was running, and the others never
            started.
    """

    worker: int
    pid: int
    exit_code: int | None
    signal: int | None
    stderr: str
    progress: int
    results: list[Any]


class _Files(NamedTuple):
    page: str
    out: str
    err: str


class Zygote:
    """The agent's end. One thread uses it.

    Attributes:
        fd: readable when `read` has something.
        pid: of the zygote process.
    """

    def __init__(self, pid: int, link: socket.socket, directory: Path, log_directory: Path) -> None:
        self.pid = pid
        self.fd = link.fileno()
        self._link = link
        self._directory = directory
        self._log_directory = log_directory
        self._workers: dict[int, tuple[pages.Page, _Files]] = {}
        self._received: dict[int, int] = {}
        self._logs: list[_Files] = []
        self._broken = False

    @classmethod
    def start(cls, directory: Path, log_directory: Path) -> Zygote:
        """Fork the zygote. The process has to be single-threaded, and to hold nothing that a child should not.

        Args:
            directory: for the workers' pages, in memory; made if missing.
            log_directory: for the workers' standard output and error; made if missing.

        Raises:
            OSError: no process can be made, or a folder is not usable.
        """
        for folder in (directory, log_directory):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _in_child(lambda: _Process(theirs, str(log_directory / "zygote.err")).run())
        theirs.close()
        return cls(pid, ours, directory, log_directory)

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
        files = _Files(
            str(self._directory / f"worker-{worker}.page"),
            str(self._log_directory / f"worker-{worker}.out"),
            str(self._log_directory / f"worker-{worker}.err"),
        )
        pages.create(files.page)
        self._workers[worker] = (pages.Page(files.page), files)
        self._command([_SPAWN, worker, files, config, dict(env or {})])

    def kill(self, worker: int) -> None:
        """Kill a worker and its process group. `Exited` follows, unless it had come already."""
        if worker in self._workers:
            self._command([_KILL, worker])

    def progress(self, worker: int) -> int:
        """The seq of the entry that a worker started last; 0: none, or no such worker."""
        found = self._workers.get(worker)
        return found[0].progress if found is not None else 0

    def received(self, worker: int, seq: int) -> None:
        """A worker's results up to this one have come: its exit need not tell them again."""
        if worker in self._workers:
            self._received[worker] = seq

    def read(self) -> list[Spawned | Exited]:
        """What has happened. Never blocks.

        Raises:
            LostError: the zygote is gone, and all workers with it: the agent has to start anew.
        """
        news: list[Spawned | Exited] = []
        while (frame := self._receive()) is not None:
            kind, worker, pid, exit_code, signal_number = codec.unpack(frame, _FRAME_MAX_BYTES)
            if kind == _SPAWNED:
                news.append(Spawned(worker, pid))
            elif worker in self._workers:
                news.append(self._exited(worker, pid, exit_code, signal_number))
        return news

    def close(self) -> None:
        """Kill what is left, wait until it is gone, remove the files of dead and living."""
        self._link.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # somebody else has waited for it
        for page, files in self._workers.values():
            page.close()
            _unlink(files.page)
        self._workers.clear()

    def _command(self, command: list[Any]) -> None:
        try:
            self._link.send(codec.pack(command))
        except OSError as error:
            raise self._gone() from error

    def _receive(self) -> bytes | None:
        if self._broken:
            raise self._gone()
        try:
            frame = self._link.recv(_FRAME_MAX_BYTES, socket.MSG_DONTWAIT)
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
        progress = page.progress
        received = self._received.pop(worker, 0)
        results = [result for result in map(codec.unpack, page.results()) if result[0] > received]
        page.close()
        _unlink(files.page)
        stderr = _last_lines(files.err)
        self._logs.append(files)
        if exit_code == 0 or len(self._logs) > _LOGS_MAX:
            old = self._logs.pop(-1 if exit_code == 0 else 0)
            _unlink(old.out)
            _unlink(old.err)
        return Exited(worker, pid, exit_code, signal_number, stderr, progress, results)


class _Process:
    """The zygote's own process."""

    def __init__(self, link: socket.socket, log: str) -> None:
        self._link = link
        self._log = log
        self._workers: dict[int, int] = {}  # pid: number
        self._wake, self._wake_write = -1, -1

    def run(self) -> None:
        """Serve until the agent is gone."""
        os.setsid()
        _detach(self._link.fileno(), self._log)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _reset_signals()
        _import_workers_needs()
        self._wake, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # What there is now is never garbage, and is not to be written to by a collection: its pages stay shared.
        gc.collect()
        gc.freeze()
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._wake:
                    self._reap()
                elif not self._obey():
                    self._end()
                    return

    def _obey(self) -> bool:
        frame = self._link.recv(_FRAME_MAX_BYTES)
        if not frame:
            return False
        command = codec.unpack(frame, _FRAME_MAX_BYTES)
        if command[0] == _SPAWN:
            self._spawn(*command[1:])
        else:
            for pid, number in self._workers.items():
                if number == command[1]:
                    _kill_group(pid)
        return True

    def _spawn(self, worker: int, files: list[str], config: list[Any], env: dict[str, str]) -> None:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            self._tell([_EXITED, worker, 0, _NOT_STARTED, None])
            return
        if pid == 0:
            fds = (self._link.fileno(), self._wake, self._wake_write)
            _in_child(lambda: _run_worker(parent, fds, worker, _Files(*files), WorkerConfig(*config), env))
        try:
            os.setpgid(pid, pid)  # as the child does: whoever is first
        except OSError:
            pass
        self._workers[pid] = worker
        self._tell([_SPAWNED, worker, pid, None, None])

    def _reap(self) -> None:
        try:
            os.read(self._wake, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                # Leave it a zombie: its pid, which is also the number of its group, is not used again until then.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            worker = self._workers.pop(pid, None)
            if worker is not None:
                _kill_group(pid)
            os.waitpid(pid, 0)
            if worker is not None:
                exited = found.si_code == os.CLD_EXITED
                code, number = (found.si_status, None) if exited else (None, found.si_status)
                self._tell([_EXITED, worker, pid, code, number])

    def _tell(self, news: list[Any]) -> None:
        try:
            self._link.send(codec.pack(news))
        except OSError:
            pass  # the agent is gone; the next poll says so

    def _end(self) -> None:
        """Kill all that descends from here. Children of the dead become ours, so this ends when there are none."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for pid in self._workers:
            _kill_group(pid)
        while True:
            for pid in _children():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def _in_child(run: Any) -> NoReturn:
    """Run something in a forked child, which never returns to where it was forked."""
    code = 1
    try:
        run()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - nobody else will report it
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _detach(keep: int, log: str) -> None:
    """Leave everything behind that belongs to the agent: descriptors, and what ought to happen at its exit."""
    import atexit

    atexit._clear()
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd != keep:
            try:
                os.close(fd)
            except OSError:
                pass  # the one that listed the folder
    _redirect(os.devnull, 0)
    _redirect(os.devnull, 1)
    _redirect(log, 2)
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _redirect(path: str, fd: int) -> None:
    flags = os.O_RDWR | (os.O_CREAT | os.O_TRUNC | os.O_APPEND if fd == 2 or path != os.devnull else 0)
    opened = os.open(path, flags, 0o600)
    os.dup2(opened, fd)  # inheritable, as the standard streams are
    if opened != fd:
        os.close(opened)


def _reset_signals() -> None:
    """What the interpreter itself sets up, and nothing else."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass  # the C library keeps some for itself
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _import_workers_needs() -> None:
    """Import once what every worker needs, here, where the agent does not wait for it."""
    import endpoint_worker.worker.runtime  # noqa: F401 - for its effect
    from gcref.objects import blob, serialize

    # A function by value there and back: that is what most users send, and what it takes loads on first use.
    serialize.loads(blob.join(serialize.dumps(lambda: None)))


def _run_worker(
    parent: int, fds: tuple[int, ...], worker: int, files: _Files, config: WorkerConfig, env: dict[str, str]
) -> None:
    """The main function of a worker process."""
    from endpoint_worker.worker.channel import WorkerChannel
    from endpoint_worker.worker.output import Output
    from endpoint_worker.worker.runtime import Runtime

    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the kernel knew that we want to die with it
    try:
        os.setpgid(0, 0)
    except OSError:
        pass  # the zygote was first
    _reset_signals()
    for fd in fds:
        os.close(fd)
    _redirect(files.out, 1)
    _redirect(files.err, 2)
    output = Output()
    output.install()
    os.environ.update(env)
    sys.argv = ["gcref-worker"]
    # Tasks that look for `__main__` (and children of multiprocessing, which import it again) must not find the agent's.
    sys.modules["__main__"] = main = ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    link = WorkerChannel(config.channel, worker)
    runtime = Runtime(link, pages.Page(files.page), output, worker=worker, **_runtime_arguments(config))
    runtime.run()
    _finish_interpreter()
    link.close()


def _runtime_arguments(config: WorkerConfig) -> dict[str, Any]:
    arguments = config._asdict()
    del arguments["channel"]
    return arguments


def _finish_interpreter() -> None:
    """What the end of an interpreter does for its program: wait for its threads, call its exit handlers."""
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def _prctl(option: int, value: int) -> None:
    import ctypes

    # Without it (not Linux) the zygote still kills its workers when the agent is gone.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # the group may not be there yet
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _children() -> list[int]:
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as listing:
            return [int(child) for child in listing.read().split()]
    except OSError:
        return []


def _last_lines(path: str) -> str:
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _STDERR_TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_STDERR_TAIL_LINES:])


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
