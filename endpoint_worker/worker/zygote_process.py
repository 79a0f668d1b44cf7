"""The zygote's own process: forks workers, reaps them, tells the agent, and outlives it for as long as it was told to.

agent ── STOP, or (not to be adopted) its death ──► kill all that descends from here, end
      ── its death ──► wait `adopt_s` for another agent to connect; go on reaping, and note each end in the dead
                       worker's page ──► ADOPT: say who is alive, serve on ┃ nobody came: as above
"""

from __future__ import annotations

import gc
import math
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, NoReturn

from endpoint_worker.worker import page as pages
from endpoint_worker.worker.remains import Files, WorkerConfig
from gcref.wire import codec

# Commands to the zygote.
SPAWN: Final = 1
KILL: Final = 2
STOP: Final = 3
ADOPT: Final = 4
# Its news.
SPAWNED: Final = 1
EXITED: Final = 2
ADOPTED: Final = 3
REFUSED: Final = 4

VERSION: Final = 1
"""Of what a zygote and its agent say to each other, of the worker channel and of the pages. Agents adopt only their own."""

FRAME_MAX_BYTES: Final = 1 << 20
EXIT_GRACE_S: Final = 5.0
"""How long a worker that was told to exit waits for its threads and exit handlers."""
# The exit code of a worker that could not even be started (EX_OSERR).
_NOT_STARTED: Final = 71

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


class Process:
    """The zygote, in its process.

    Args:
        link: to the agent that forked it.
        log: where its standard error goes.
        listener: where another agent may connect; None: nobody adopts it.
        lock: a descriptor whose lock tells that this process lives; -1: none.
        adopt_s: how long to wait for another agent, seconds.
    """

    def __init__(
        self, link: socket.socket, log: str, listener: socket.socket | None, lock: int, adopt_s: float
    ) -> None:
        self._link: socket.socket | None = link
        self._log = log
        self._listener = listener
        self._lock = lock
        self._adopt_s = adopt_s
        self._alone_since = -math.inf
        self._workers: dict[int, tuple[int, str]] = {}  # pid: number, page
        self._wake, self._wake_write = -1, -1

    def run(self) -> None:
        """Serve until the agent stops us, or is gone for too long."""
        os.setsid()
        _detach(self._fds(), self._log)
        if self._lock >= 0:
            os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)
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
        poll.register(self._wake, select.POLLIN)
        watched = -1
        while True:
            heard = self._link if self._link is not None else self._listener
            if heard is None:
                break
            if heard.fileno() != watched:
                watched = heard.fileno()
                poll.register(watched, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(self._patience_ms())}
            if self._wake in ready:
                self._reap()
            if self._link is None and not ready and time.monotonic() >= self._alone_since + self._adopt_s:
                break
            if watched not in ready:
                continue
            if self._link is None:
                self._welcome()
            elif not self._obey(self._link):
                break
            if heard is not (self._link or self._listener):
                poll.unregister(watched)
                if heard is not self._listener:
                    heard.close()
                watched = -1
        self._end()

    def _fds(self) -> list[int]:
        """What this process holds and its workers should not."""
        ends = [end.fileno() for end in (self._link, self._listener) if end is not None]
        return [fd for fd in (*ends, self._lock, self._wake, self._wake_write) if fd >= 0]

    def _patience_ms(self) -> float | None:
        if self._link is not None:
            return None
        return max(0.0, self._alone_since + self._adopt_s - time.monotonic()) * 1000 + 1

    def _obey(self, link: socket.socket) -> bool:
        """Take a command. False: we are to end."""
        try:
            frame = link.recv(FRAME_MAX_BYTES)
        except OSError:
            frame = b""
        if not frame:
            self._link = None
            self._alone_since = time.monotonic()
            for pid in self._workers:  # the agent may have stopped one to look at it, a moment before it died
                os.kill(pid, signal.SIGCONT)
            return self._listener is not None
        command = codec.unpack(frame, FRAME_MAX_BYTES)
        if command[0] == SPAWN:
            self._spawn(*command[1:])
        elif command[0] == KILL:
            for pid, (number, _page) in self._workers.items():
                if number == command[1]:
                    _kill_group(pid)
        elif command[0] == ADOPT:
            if command[1] != VERSION:
                self._tell([REFUSED])
                return False
            living = [[number, pid] for pid, (number, _page) in self._workers.items()]
            self._tell([ADOPTED, os.getpid(), self._alone_since, living])
        return bool(command[0] != STOP)

    def _welcome(self) -> None:
        """Somebody has connected: from now on that is the agent."""
        assert self._listener is not None
        try:
            self._link, _ = self._listener.accept()
            self._link.setblocking(True)
        except OSError:
            self._link = None  # it is gone again

    def _spawn(self, worker: int, files: list[str], config: list[Any], env: dict[str, str]) -> None:
        parent = os.getpid()
        page = files[0]
        try:
            pid = os.fork()
        except OSError:
            pages.note_end(page, _NOT_STARTED, None)
            self._tell([EXITED, worker, 0, _NOT_STARTED, None])
            return
        if pid == 0:
            fds = self._fds()
            in_child(lambda: _run_worker(parent, fds, worker, Files(*files), WorkerConfig(*config), env))
        try:
            os.setpgid(pid, pid)  # as the child does: whoever is first
        except OSError:
            pass
        self._workers[pid] = (worker, page)
        self._tell([SPAWNED, worker, pid, None, None])

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
            worker, page = self._workers.pop(pid, (None, ""))
            if worker is not None:
                _kill_group(pid)
            os.waitpid(pid, 0)
            if worker is not None:
                exited = found.si_code == os.CLD_EXITED
                code, number = (found.si_status, None) if exited else (None, found.si_status)
                pages.note_end(page, code, number)  # first: nobody may be there to be told
                self._tell([EXITED, worker, pid, code, number])

    def _tell(self, news: list[Any]) -> None:
        if self._link is None:
            return
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


def in_child(run: Callable[[], object]) -> NoReturn:
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


def _detach(keep: list[int], log: str) -> None:
    """Leave everything behind that belongs to the agent: descriptors, and what ought to happen at its exit."""
    import atexit

    atexit._clear()
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
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
    parent: int, fds: list[int], worker: int, files: Files, config: WorkerConfig, env: dict[str, str]
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
    if config.memory_bytes is not None:
        _limit_memory(config.memory_bytes)
    runtime.run()
    # Whatever waits there for ever, it does not keep the endpoint from ending this worker.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, EXIT_GRACE_S)
    _finish_interpreter()
    link.close()


def _runtime_arguments(config: WorkerConfig) -> dict[str, Any]:
    arguments = config._asdict()
    del arguments["channel"], arguments["memory_bytes"]
    return arguments


def _limit_memory(limit_bytes: int) -> None:
    """Let this process take so much more private memory. What it maps of the store is not counted by this limit."""
    import resource

    with open("/proc/self/status") as status:
        now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + limit_bytes, now + limit_bytes))


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
