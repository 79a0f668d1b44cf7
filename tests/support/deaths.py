"""Tasks that end their worker, each in its own way.

New workers import this for every one of them, so it needs nothing but the standard library.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def inc(x: int) -> int:
    return x + 1


def note(path: str) -> int:
    """Counts the runs of a task in a file; gives the number of this one."""
    with open(path, "a", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    return len(runs(path))


def runs(path: str | pathlib.Path) -> list[int]:
    """The processes that ran it, in order."""
    try:
        return [int(line) for line in pathlib.Path(path).read_text().split()]
    except FileNotFoundError:
        return []


def leave() -> None:
    os._exit(7)


def shoot_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def die_noted(path: str, death: Callable[[], None], until: int) -> str:
    """Dies in its first runs, and says where it lived in the next one."""
    if note(path) <= until:
        death()
    return "alive"


def wait_forever(path: str) -> None:
    note(path)
    while True:
        time.sleep(1)


def speak_and_die(lines: int) -> None:
    for number in range(lines):
        print("line", number, file=sys.stderr)
    os.write(2, b"last words without a newline")
    os._exit(3)


class DeadlyArgument:
    """Ends whoever unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (5,)


def sleep_forever() -> None:
    """As `wait_forever`, without a note."""
    while True:
        time.sleep(1)


class EndlessArgument:
    """Whoever unpickles it never gets done."""

    def __reduce__(self) -> Any:
        return sleep_forever, ()


class EndlessResult:
    """Whoever pickles it never gets done."""

    def __reduce__(self) -> Any:
        sleep_forever()
        raise AssertionError


def give_endless() -> EndlessResult:
    return EndlessResult()


def note_and_die(path: str) -> None:
    note(path)
    os._exit(5)


class NotedDeath:
    """Ends whoever unpickles it (`argument`), or whoever pickles it, and notes that in a file."""

    def __init__(self, path: str, argument: bool = False) -> None:
        self._path = path
        self._argument = argument

    def __reduce__(self) -> Any:
        if self._argument:
            return note_and_die, (self._path,)
        note_and_die(self._path)
        raise AssertionError


def give_noted_death(path: str) -> NotedDeath:
    return NotedDeath(path)


def size_of(array: Any) -> int:
    return int(array.nbytes)


def take_memory(size: int) -> int:
    return len(bytearray(size))


def take_memory_and_abort(size: int) -> None:
    """As a library in C++ does whose `new` fails, and nobody catches it."""
    try:
        bytearray(size)
    except MemoryError:
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.abort()


class DeadlyResult:
    """Ends whoever pickles it."""

    def __reduce__(self) -> Any:
        os._exit(6)


def give_and_die(path: str) -> bytes:
    """Writes a large result, and is killed by a thread at about that time."""
    note(path)
    threading.Timer(0.05, shoot_oneself).start()
    return os.urandom(50_000_000)


def give_deadly(padding: int) -> list[Any]:
    """A result that cannot be pickled by anybody who wants to live."""
    return [b"x" * padding, DeadlyResult()]


def fail_noted(path: str) -> None:
    """Raises, in each run."""
    note(path)
    raise ValueError("once")
