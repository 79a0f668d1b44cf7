"""What a test module left behind: processes, threads, open files, mapped segments, files in shared memory.

    before = Traces.take()
    … tests …
    assert_nothing_left(before)

Processes are found by a mark in their environment, not by their parent: what a test started is found also when
it has made itself a daemon, and what somebody else runs on the machine is never taken for ours.
"""

from __future__ import annotations

import gc
import os
import threading
import uuid
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

from gcref.directory.records import lock_is_held
from tests.support.waiting import wait_until

MARK: Final = "GCREF_TEST_RUN"
"""The environment variable that all processes of one test run share."""

_lasting: Final[set[int]] = set()

GRACE_S: Final = 10.0
"""How long what is being shut down may take. Pooled segments are trimmed within this time."""


def mark_run() -> str:
    """Give this test run its mark; processes started from now on carry it."""
    return os.environ.setdefault(MARK, uuid.uuid4().hex)


def start_library_threads() -> None:
    """Start what a library keeps for the whole process once it is used, so that it is there before any test.

    pyzmq has one thread (with a context of its own) that lets go of buffers which were sent without a copy.
    """
    from zmq.utils.garbage import gc as senders

    if not senders.is_alive():
        senders.start()
    senders._push_socket  # noqa: B018 - made at first use


class Traces(NamedTuple):
    """What is there at one moment, each with a text that tells a person what it is."""

    processes: dict[int, str]
    threads: dict[int, str]
    descriptors: dict[str, str]
    mappings: dict[str, str]
    segments: dict[str, str]

    @classmethod
    def take(cls, *, collect: bool = True) -> Traces:
        """Look around, after the garbage is collected."""
        if collect:
            gc.collect()
        return cls(run_processes(), _threads(), _descriptors(), _mappings(), _host_files())

    def beyond(self, earlier: Traces) -> list[str]:
        """What is here now and was not `earlier`, one line each."""
        kinds: list[tuple[str, dict[Any, str], dict[Any, str]]] = [
            ("process", self.processes, earlier.processes),
            ("thread", self.threads, earlier.threads),
            ("open file", self.descriptors, earlier.descriptors),
            ("mapped segment", self.mappings, earlier.mappings),
            ("folder in shared memory", self.segments, earlier.segments),
        ]
        return [f"{kind}: {now[key]}" for kind, now, then in kinds for key in now.keys() - then.keys()]


def assert_nothing_left(before: Traces) -> None:
    """Fail, with a list, if something is still there that was not there `before`."""
    found: list[str] = []

    def is_clean() -> bool:
        found[:] = Traces.take().beyond(before)
        return not found

    wait_until(is_clean, timeout_s=GRACE_S, what=lambda: "these to go:\n  " + "\n  ".join(found))


def lasts(pid: int) -> None:
    """A process, with all its children, is kept for more than one module: it is not looked at."""
    _lasting.add(pid)


def run_processes() -> dict[int, str]:
    """The processes of this test run, beside this one: their ids, with their command lines."""
    needle = f"{MARK}={mark_run()}".encode()
    found: dict[int, str] = {}
    lasting = _lasting_ones()
    for process in psutil.process_iter():
        if process.pid == os.getpid() or process.pid in lasting:
            continue
        try:
            # One that has just been forked still has the environment of its parent: it counts.
            if needle in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found[process.pid] = f"{process.pid} ({process.status()}) {' '.join(process.cmdline())[:200]}"
        except (OSError, psutil.Error):
            continue
    for child in psutil.Process().children(recursive=True):
        if child.pid in lasting:
            continue
        try:
            # A zombie has no environment any more.
            found.setdefault(child.pid, f"{child.pid} ({child.status()}) {child.name()}")
        except psutil.Error:
            continue
    return found


def _lasting_ones() -> set[int]:
    found = set(_lasting)
    for pid in _lasting:
        try:
            found.update(child.pid for child in psutil.Process(pid).children(recursive=True))
        except psutil.Error:
            continue
    return found


def _threads() -> dict[int, str]:
    main = threading.main_thread()
    return {id(thread): repr(thread) for thread in threading.enumerate() if thread is not main}


def _descriptors() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that lists this folder
        found[f"{name} {target}"] = f"{name} -> {target}"
    return found


def _mappings() -> dict[str, str]:
    """Segments that this process maps, by their place in memory."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/gcref-" in line:
            place, *_, path = line.split(maxsplit=5)
            found[place] = f"{place} {path}"
    return found


def _host_files() -> dict[str, str]:
    """The host-local folders of parties, except those that a living process of somebody else holds."""
    found: dict[str, str] = {}
    root = Path(f"/dev/shm/gcref-{os.geteuid()}")
    if not root.is_dir():
        return found
    ours = run_processes()
    for folder in root.iterdir():
        lock = folder / "lock"
        if lock_is_held(lock) and not _held_by(lock, ours):
            continue
        try:
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        except OSError:
            continue  # it went while we looked
        found[str(folder)] = f"{folder}: {', '.join(names[:20]) or 'empty'}"
    return found


def _held_by(lock: Path, processes: dict[int, str]) -> bool:
    """Whether one of these processes, or this one, has the lock file open."""
    for pid in (os.getpid(), *processes):
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{name}") == str(lock):
                    return True
        except OSError:
            continue
    return False
