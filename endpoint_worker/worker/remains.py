"""What is known of workers from outside: what they were started with, how they ended, what their pages say.

Pages outlive the workers, the zygote and the agent, so that an agent that is started again finds out what had been
done (`results`), and what was being done (`started`), by whoever is alive and whoever is not.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from endpoint_worker.worker.page import Page
from gcref.errors import ProtocolError
from gcref.wire import codec

_ROW_MAX_BYTES: Final = 1 << 20
_STDERR_TAIL_BYTES: Final = 4096
_STDERR_TAIL_LINES: Final = 20
# Workers die with their zygote, by a signal of the kernel's; so long we wait for it to arrive.
_DEATH_S: Final = 10.0
_RETRY_S: Final = 0.005


class WorkerConfig(NamedTuple):
    """What a worker needs to know.

    Attributes:
        channel: `ipc://…` of the agent's end of the worker channel.
        agent_id: the endpoint's id.
        endpoint: the endpoint's name, for notes in errors.
        control_address: where the SDK inside tasks finds the agent.
        bulk_address: where it finds the agent's bytes.
        party: the party id of the SDK inside this worker's tasks; another one for each worker.
        memory_bytes: what its tasks may take of memory, beside what it takes itself; None: no limit.
    """

    channel: str
    agent_id: bytes
    endpoint: str
    control_address: str
    bulk_address: str
    party: bytes
    memory_bytes: int | None = None


class Exited(NamedTuple):
    """A worker is dead, and so is its process group.

    Attributes:
        worker: its number.
        pid: of its process; 0: it could not be started.
        exit_code: its exit code; None: a signal killed it. 0 is the answer to EXIT.
        signal: the number of the signal; None: it exited.
        stderr: the last lines that it wrote there.
        progress: seq of the last entry that began.
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


class Remains(NamedTuple):
    """A worker that an earlier agent had started.

    Attributes:
        worker: its number.
        pid: of its process; 0: it is dead.
        config: what it was started with.
        exited: how it ended; None: it is alive.
        started: seq, id and attempt of the entry that it runs, or was running when it died: begun, and without a result.
        blocked: the task of `started` has lent its slot.
        results: all results that its page holds, in order. The dead agent may have had them, or not.
    """

    worker: int
    pid: int
    config: WorkerConfig
    exited: Exited | None
    started: tuple[int, bytes, int] | None
    blocked: bool
    results: list[Any]


class Files(NamedTuple):
    """The files of a worker: its page, and where its standard streams go."""

    page: str
    out: str
    err: str

    @classmethod
    def of(cls, worker: int, directory: Path, log_directory: Path) -> Files:
        """Where they are."""
        return cls(
            str(directory / f"worker-{worker}.page"),
            str(log_directory / f"worker-{worker}.out"),
            str(log_directory / f"worker-{worker}.err"),
        )


def pages_in(directory: Path) -> Iterator[int]:
    """The numbers of the workers that have a page here, in order."""
    names = [name for name in os.listdir(directory) if name.startswith("worker-") and name.endswith(".page")]
    return iter(sorted(int(number) for name in names if (number := name[7:-5]).isdecimal()))


def results_of(page: Page) -> list[Any]:
    """The results of a page, in order; what a task has spoiled there is passed over."""
    found: list[Any] = []
    for packed in page.results():
        try:
            row = codec.unpack(packed, _ROW_MAX_BYTES)
        except ProtocolError:
            continue
        if isinstance(row, list) and len(row) == 9 and isinstance(row[0], int):
            found.append(row)
    return found


def read(worker: int, pid: int, page: Page, files: Files) -> Remains | None:
    """What there is of a worker; None: not even what it was started with."""
    try:
        config = WorkerConfig(*codec.unpack(page.note(), _ROW_MAX_BYTES))
    except (ProtocolError, TypeError):
        return None
    results = results_of(page)
    noted = page.started()
    started = None
    if noted is not None and not any(row[0] == noted[0] for row in results):
        seq, attempt, id = noted
        started = (seq, id, attempt)
    exited = None
    if not pid:
        # Nobody who could tell has seen its end: then it went with its zygote.
        code, number = page.end() or (None, int(signal.SIGKILL))
        exited = Exited(worker, page.pid, code, number, last_lines(files.err), page.begun(), results)
    return Remains(worker, pid, config, exited, started, started is not None and page.blocked, results)


def make_sure_it_is_dead(page: Page, files: Files) -> None:
    """Kill the process that has mapped a page, and wait for its end. For a page whose zygote is dead."""
    pid = page.pid
    until = time.monotonic() + _DEATH_S
    while pid and _maps(pid, files.page) and time.monotonic() < until:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        time.sleep(_RETRY_S)


def _maps(pid: int, path: str) -> bool:
    """Whether the process is the one that we think: numbers of processes are used again."""
    real = os.path.realpath(path)
    try:
        with open(f"/proc/{pid}/maps") as maps:
            return any(line.endswith(f" {real}\n") for line in maps)
    except OSError:
        return False


def last_lines(path: str) -> str:
    """The end of a log."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _STDERR_TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_STDERR_TAIL_LINES:])


def unlink(path: str) -> None:
    """Remove a file, if it is there."""
    try:
        os.unlink(path)
    except OSError:
        pass
