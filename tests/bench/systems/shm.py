"""The measuring stick of sharing: another process maps a file in shared memory and touches every page."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection

from tests.bench import tasks
from tests.bench.system import Setting, System, WrongAnswerError


class Adapter(System):
    name = "shm"
    is_cold_once = False

    def start(self, setting: Setting) -> None:
        self._control, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self._toucher = fork.Process(target=_touch, args=(theirs,), daemon=True)
        self._toucher.start()
        theirs.close()
        self._files: dict[int, int] = {}

    def carry(self, size_bytes: int, seed: int, to_site: int) -> float:
        if size_bytes not in self._files:
            self._files[size_bytes] = _unnamed_file(memoryview(tasks.make_array(size_bytes, seed)).cast("B"))
        start = time.perf_counter()
        self._control.send(f"/proc/{os.getpid()}/fd/{self._files[size_bytes]}")
        seen = self._control.recv()
        seconds = time.perf_counter() - start
        if seen != tasks.touched(size_bytes, seed):
            raise WrongAnswerError("the pages differ")
        return seconds

    def stop(self) -> None:
        self._control.send(None)
        self._toucher.join()


def _unnamed_file(content: memoryview) -> int:
    """A file in shared memory that goes with its last descriptor."""
    handle, path = tempfile.mkstemp(dir="/dev/shm", prefix="gcref-bench-")
    os.unlink(path)
    position = 0
    while position < len(content):
        position += os.write(handle, content[position : position + (64 << 20)])
    return handle


def _touch(control: Connection) -> None:
    import numpy

    while path := control.recv():
        with open(path, "rb") as file:
            area = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        control.send(tasks.touch_array(numpy.frombuffer(area, numpy.uint64))[2])
        area.close()
