"""A million tasks pass through an endpoint, and its journal stays small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gcref import Executor
from gcref.config import disk_dir
from tests.support.named import NamedEndpoint, running
from tests.support.tasks import inc
from tests.support.waiting import patience

BATCH, BATCHES = 20_000, 50
LIMIT_BYTES = 50_000_000


@pytest.fixture
def polaris(home: Path) -> Iterator[NamedEndpoint]:
    with running("polaris") as endpoint:
        yield endpoint


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


@pytest.mark.timeout(400)
def test_a_million_tasks_leave_less_than_50_mb(polaris: NamedEndpoint) -> None:
    folder = disk_dir(polaris.id) / "journal"
    largest = 0
    with Executor("polaris") as executor:
        for _ in range(BATCHES):
            futures = [executor.submit(inc, number) for number in range(BATCH)]
            assert sum(future.result(patience(60)) for future in futures) == BATCH * (BATCH + 1) // 2
            del futures
            largest = max(largest, folder_bytes(folder))
        polaris.kill()
        polaris.start()  # and is read again soon
        assert executor.submit(inc, 1).result(patience(30)) == 2
    assert 0 < largest < LIMIT_BYTES
