"""`endpoint-worker stop` and `start`: what is kept, and how long a stop takes."""

from __future__ import annotations

import time
from pathlib import Path

from endpoint_worker.agent.control import STOP_WORKERS_S
from gcref import Executor
from tests.support.endpoints import store_of
from tests.support.named import NamedEndpoint
from tests.support.tasks import blob_of
from tests.support.waiting import patience, wait_until

MB = 1_000_000
ROUNDS = 6
"""A start and a stop meet in the one moment that matters about every other time."""


def test_spilled_values_outlive_a_stop_also_in_a_folder_of_their_own(home: Path, tmp_path: Path) -> None:
    """With `spill_dir`, as with the default."""
    disk = tmp_path / "disk"
    disk.mkdir()
    site = NamedEndpoint("site", workers=1, store_limit_bytes=8 * MB, spill_dir=str(disk))
    site.start()
    try:
        with Executor("site") as executor:
            values = [executor.submit(blob_of, 3 * MB) for _ in range(4)]
            lengths = [executor.submit(len, value) for value in values]
            assert [length.result(patience(30)) for length in lengths] == [3 * MB] * 4
            wait_until(lambda: store_of("site")["disk_bytes"] > 0, what="something to be spilled")
            before = store_of("site")["objects"]
            site.stop()
            site.start()
            assert store_of("site")["objects"] == before, "what was on disk is there still"
            again = [executor.submit(len, value) for value in values]
            assert [length.result(patience(30)) for length in again] == [3 * MB] * 4
    finally:
        site.remove()


def test_a_stop_does_not_wait_for_workers_that_are_just_starting(home: Path) -> None:
    """Those whose processes appear after the others were killed are killed too."""
    site = NamedEndpoint("site", workers=16)
    try:
        for _ in range(ROUNDS):
            site.start()
            began = time.monotonic()
            site.stop()
            assert time.monotonic() - began < STOP_WORKERS_S, "it waited for one in vain"
    finally:
        site.remove()
