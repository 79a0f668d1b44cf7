"""What SIGUSR1 writes: JSON lines, stacks at once and the brains when the loop turns, whatever is broken."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from endpoint_worker.agent import dump
from endpoint_worker.agent.dump import Dump


class Log:
    """A log file of which the lines can be read."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("log")

    def lines(self) -> list[dict[str, Any]]:
        size = os.fstat(self.fd).st_size
        return [json.loads(line) for line in os.pread(self.fd, size, 0).splitlines()]

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def log() -> Iterator[Log]:
    found = Log()
    yield found
    found.close()


def test_the_stacks_of_all_threads_come_at_once(log: Log) -> None:
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="the other one")
    thread.start()
    woken: list[bool] = []
    found = Dump("polaris", lambda: woken.append(True), log.fd)
    try:
        found.stacks()
    finally:
        gate.set()
        thread.join()
    stacks = {line["text"]: line["stack"] for line in log.lines()}
    (other,) = (stack for text, stack in stacks.items() if "the other one" in text)
    assert any("wait" in frame for frame in other)
    assert any("test_dump.py" in frame for stack in stacks.values() for frame in stack)
    assert all(len(stack) <= dump.FRAMES_MAX for stack in stacks.values())
    assert found.wanted
    assert woken == [True]


def test_every_part_is_told_also_when_one_is_broken(log: Log) -> None:
    def broken() -> Any:
        raise ValueError("this brain is broken")

    found = Dump("polaris", lambda: None, log.fd)
    found.stacks()
    found.brains(
        iter(
            [
                ("first", lambda: {b"i" * 16: {"ids": (b"j" * 16, 1)}}),
                ("second", broken),
                ("third", lambda: [1]),
            ]
        )
    )
    assert not found.wanted
    told = log.lines()[-3:]
    assert told[0]["state"] == {
        "69696969-6969-6969-6969-696969696969": {"ids": ["6a6a6a6a-6a6a-6a6a-6a6a-6a6a6a6a6a6a", 1]}
    }
    assert told[1]["error"] == "ValueError: this brain is broken"
    assert told[2]["state"] == [1]
    assert {line["endpoint"] for line in told} == {"polaris"}


def test_what_is_too_long_is_left_out(log: Log) -> None:
    found = Dump("polaris", lambda: None, log.fd)
    found.brains(iter([("large", lambda: "x" * dump.LINE_MAX_BYTES)]))
    assert "too long" in log.lines()[-1]["text"]


def test_a_log_that_is_gone_ends_nothing() -> None:
    Dump("polaris", lambda: None, -1).stacks()
