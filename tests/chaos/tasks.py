"""The functions that run at the sites, one for each way in which a task gets at its values.

Each leaves lines in a file of its own node, one when it starts and one when it has its value. They are appended with one
write each, so nothing is lost or torn by a death, and the checker can count what really happened.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, NamedTuple

from gcref import ComputeFuture, Executor, ObjectRef
from tests.chaos.graphs import Kind, Node, digest, gather, handed_on, key_of, make

STARTED, ENDED = "started", "ended"


class Setting(NamedTuple):
    """What tasks must know beside their node.

    Attributes:
        folder: where they leave their effects.
        homes: the ids of the sites, as text.
    """

    folder: str
    homes: tuple[str, ...]


def work(node: Node, setting: Setting, /, *args: Any, **keywords: Any) -> Any:
    """A task that is given values."""
    values = _begin(node, setting, args, keywords)
    given = [digest(value) for value in values]
    _pass_time(node, setting)
    return _end(node, setting, given, values)


def tail(node: Node, inner: Node, setting: Setting, /, *args: Any, **keywords: Any) -> Any:
    """A task whose value is another task's."""
    values = _begin(node, setting, args, keywords)
    key = key_of(node.number, [digest(value) for value in values])
    _pass_time(node, setting)
    future = _submit_inner(inner, setting, key)
    _note(node, setting, ENDED)
    return future


def nest(node: Node, inner: Node, setting: Setting, /, *args: Any, **keywords: Any) -> Any:
    """A task that waits for another one."""
    values = _begin(node, setting, args, keywords)
    given = [digest(value) for value in values]
    _pass_time(node, setting)
    inside = _submit_inner(inner, setting, key_of(node.number, given)).result()
    return _end(node, setting, [*given, digest(inside)], values)


def refs(node: Node, setting: Setting, /, *references: ObjectRef) -> Any:
    """A task that is passed references."""
    _begin(node, setting, (), {})
    _pass_time(node, setting)
    values = [reference.get() for reference in references]
    return _end(node, setting, [digest(value) for value in values], values)


def box(node: Node, setting: Setting, reference: ObjectRef, /) -> Any:
    """A task that hands a reference on."""
    _begin(node, setting, (), {})
    _pass_time(node, setting)
    _note(node, setting, ENDED)
    return {"key": key_of(node.number, ()), "ref": reference}


def unbox(node: Node, setting: Setting, holder: dict[str, Any], /) -> Any:
    """A task that gets at what a reference in its argument refers to."""
    _begin(node, setting, (), {})
    _pass_time(node, setting)
    values = [holder, holder["ref"].get()]
    return _end(node, setting, [digest(value) for value in values], values)


def _begin(node: Node, setting: Setting, args: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    run = _note(node, setting, STARTED)
    if node.kind is Kind.DIE and run <= node.deaths:
        time.sleep(node.duration_s)
        if node.number % 2:
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    return gather(node.layout, args, keywords) if args or keywords else []


def _pass_time(node: Node, setting: Setting) -> None:
    time.sleep(node.duration_s)
    if node.kind is Kind.FAIL:
        raise ValueError(f"node {node.number} fails as planned")


def _end(node: Node, setting: Setting, given: list[str], values: list[Any]) -> Any:
    """Make the value, after a second look at what we were given: nobody may have changed it meanwhile."""
    again = [digest(value) for value in values]
    if again != given[: len(again)]:
        raise AssertionError(
            f"what node {node.number} was given has changed while it ran: {given}, now {again}"
        )
    made = make(node.shape, node.size, key_of(node.number, given))
    _note(node, setting, ENDED)
    return made


def _submit_inner(inner: Node, setting: Setting, key: int) -> ComputeFuture[Any]:
    executor = Executor(setting.homes[inner.site], retries=inner.retries)
    return executor.submit(work, inner, setting, handed_on(inner, key))


def _note(node: Node, setting: Setting, what: str) -> int:
    """Append a line to the node's file; gives how many lines with this word there are now."""
    path = os.path.join(setting.folder, str(node.number))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, f"{what} {os.getpid()} {time.monotonic():.6f}\n".encode())
        return os.pread(descriptor, 1 << 20, 0).decode().count(what)
    finally:
        os.close(descriptor)


class Effect(NamedTuple):
    """One line of an effects' file.

    Attributes:
        what: `STARTED` or `ENDED`.
        pid: the worker's process.
        at_s: when, seconds of the machine's monotonic clock.
    """

    what: str
    pid: int
    at_s: float


def effects(folder: str) -> dict[int, list[Effect]]:
    """What the tasks have left so far, by node."""
    found: dict[int, list[Effect]] = {}
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), encoding="ascii") as file:
            rows = [line.split() for line in file]
        found[int(name)] = [Effect(what, int(pid), float(at_s)) for what, pid, at_s in rows]
    return found
