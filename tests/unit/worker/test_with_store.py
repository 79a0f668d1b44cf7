"""Workers and the store together, as an agent uses them: no bytes that somebody sees are ever written over (L0)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from endpoint_worker.store import Store
from endpoint_worker.worker import channel
from gcref import ids
from gcref.objects import serialize
from gcref.wire.messages import STORED
from tests.unit.worker.fake_agent import FakeAgent, Result, value_of
from tests.unit.worker.test_runtime import Dependency, drop, keep, read_kept, total

LENGTH = 20_000  # numbers in an array: 160 kB, which is stored


def make(number: float) -> Any:
    return np.full(LENGTH, number)


def scale(array: Any, factor: float) -> Any:
    return array * factor


class StoringAgent(FakeAgent):
    """Also answers ALLOC from a real store, and seals and returns what comes back."""

    def __init__(self, tmp_path: Path, limit_bytes: int) -> None:
        super().__init__()
        self.store = Store(self.folder / "segments", tmp_path / "spill", limit_bytes)
        self.paths: set[str] = set()
        self.ended: list[Result] = []
        self._returned = 0

    def pump(self, timeout_s: float) -> None:
        super().pump(timeout_s)
        while (asked := self.take(channel.ALLOC)) is not None:
            found = self.store.allocate(asked[1], 1, asked[2])
            self.send(1, channel.segment(*found))
        while (done := self.take(channel.DONE)) is not None:
            for result in (Result(*item) for item in done[1]):
                if result.status == STORED:
                    path, size = result.value
                    self.paths.add(path)
                    self.store.seal(result.id, result.attempt, path, size)
                self.ended.append(result)
            self.store.unmapped(1, done[2])

    def all_of(self, entries: list[list[Any]]) -> list[Result]:
        self.tasks(entries)
        self.wait(lambda: len(self.ended) >= len(entries), "the results")
        found, self.ended = self.ended, []
        return found

    def use(self, fn: Any, id: bytes, *args: Any) -> list[Any]:
        return self.entry(fn, Dependency(), *args, deps=[self.store.map_for(1, id)])

    def close(self) -> None:
        self.zygote.close()
        self.store.close()
        super().close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[StoringAgent]:
    with StoringAgent(tmp_path, 64 << 20) as made:
        yield made


def test_l0_a_kept_array_never_changes_while_segments_are_used_again(agent: StoringAgent) -> None:
    """L0: an array in a global of a worker, and 1000 more objects."""
    (first,) = agent.all_of([agent.entry(make, 7.0)])
    agent.all_of([agent.use(keep, first.id)])
    agent.store.free([first.id])
    for n in range(100):
        made = agent.all_of([agent.entry(make, float(n + i)) for i in range(10)])
        sums = agent.all_of([agent.use(total, result.id) for result in made])
        assert [value_of(result) for result in sums] == [LENGTH * float(n + i) for i in range(10)]
        agent.store.free([result.id for result in made])
    numbers = {path.rpartition("/")[2].partition("-")[0] for path in agent.paths}
    assert len(agent.paths) == 1001
    assert len(numbers) < 40, "segments are used again"
    (kept,) = agent.all_of([agent.entry(read_kept)])
    assert value_of(kept) == [LENGTH * 7.0]
    agent.all_of([agent.entry(drop)])
    agent.wait(lambda: agent.store.stats()["used_bytes"] == 0, "all bytes to be free")


def test_results_that_do_not_fit_in_memory_come_back_exact(tmp_path: Path) -> None:
    """L3: made, spilled, mapped from where they lie."""
    with StoringAgent(tmp_path, 2 << 20) as agent:
        made = agent.all_of([agent.entry(make, float(n)) for n in range(50)])
        scaled = agent.all_of([agent.use(scale, result.id, 2.0) for result in made])
        assert agent.store.stats()["disk_bytes"] > 4 << 20
        for n, result in enumerate(scaled):
            reading = agent.store.read(result.id)
            assert np.array_equal(serialize.loads(reading.buffer), np.full(LENGTH, 2.0 * n))
            reading.release()
        agent.store.free([result.id for result in made + scaled])
        agent.wait(lambda: agent.store.stats()["used_bytes"] == 0, "all bytes to be free")
        assert agent.store.stats()["disk_bytes"] == 0


def test_a_dead_workers_segments_are_given_up(agent: StoringAgent) -> None:
    (first,) = agent.all_of([agent.entry(make, 7.0)])
    entry = agent.use(time.sleep, first.id)
    agent.store.map_for(1, first.id)
    agent.store.allocate(1 << 20, 1)
    agent.store.free([first.id])
    assert agent.store.stats()["used_bytes"] > 1 << 20
    agent.tasks([entry])
    agent.zygote.kill(1)
    agent.exited()
    agent.store.worker_gone(1)
    assert agent.store.stats() | {"used_bytes": 0, "pooled_bytes": 0} == agent.store.stats()
    assert ids.new_id() not in agent.store
