"""Functions for tasks, and a gate that holds them; a worker imports this module in no time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until


@dataclasses.dataclass(frozen=True)
class Gate:
    """Tasks wait until it is opened. It is a file, so that it reaches every process of this machine.

    Attributes:
        path: the file that is there once the gate is open.
    """

    path: str

    @classmethod
    def at(cls, folder: Path, name: str = "gate") -> Gate:
        """A closed gate in that folder."""
        return cls(str(folder / name))

    def open(self) -> None:
        """Let all tasks go on, now and later."""
        Path(self.path).touch()


def inc(x: int) -> int:
    return x + 1


def fail(text: str) -> None:
    raise ValueError(text)


def blob_of(size: int) -> bytes:
    return os.urandom(size)


def identity(value: Any) -> Any:
    return value


def hold(gate: Gate, value: Any = 1, *_after: Any) -> Any:
    """Returns the value once the gate is open."""
    wait_until(lambda: os.path.exists(gate.path), timeout_s=60, what="the gate to be opened")
    return value


def touch(path: str, *_after: Any) -> str:
    """Leaves a file that proves that this ran."""
    Path(path).touch()
    return path


def die_once(path: str) -> str:
    """Kills its worker at its first run."""
    if not os.path.exists(path):
        Path(path).touch()
        os._exit(7)
    return "second"
