"""L4: what an endpoint and its client hold on a machine goes with them, whether they end in order or are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from gcref import Executor, LocalEndpoint
from gcref.config import disk_dir, host_dir
from tests.support.leaks import run_processes
from tests.support.programs import ROOT, environment
from tests.support.waiting import patience, wait_until

CLIENT: Final = """
import json, os, sys
from gcref import Executor, LocalEndpoint

if __name__ == "__main__":
    with LocalEndpoint("site", workers=2) as site, Executor("site") as there, Executor() as here:
        large = [executor.submit(bytes, 5_000_000) for executor in (there, here)]
        seen = [future.result() for future in large]
        print(json.dumps({"agents": [site.pid], "ids": [str(site.endpoint_id), str(here.endpoint_id)]}), flush=True)
        sys.stdin.read()
"""
"""A program with a named and a private endpoint, which holds large values in stores and mapped, and waits to be told."""


def places(id: str | uuid.UUID) -> list[Path]:
    """Where a party keeps its things on this machine."""
    name = uuid.UUID(str(id)).hex
    return [host_dir(None) / name, disk_dir(None) / name]


def left_of(ids: list[str]) -> list[str]:
    """What is there still."""
    found = [str(path) for id in ids for path in places(id) if path.exists()]
    return found + list(run_processes().values())


def all_gone(ids: list[str]) -> None:
    wait_until(lambda: not left_of(ids), timeout_s=15, what=lambda: f"these to go: {left_of(ids)}")


@pytest.fixture
def client(home: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The program, running, and what it says of its endpoints."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert all(places(id)[0].exists() for id in told["ids"])
        yield process, told
        process.kill()


def test_l4_after_an_orderly_end_nothing_is_left(
    client: tuple[subprocess.Popen[str], dict[str, Any]],
) -> None:
    process, told = client
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(patience(30)) == 0
    assert not left_of(told["ids"])


def test_l4_after_the_death_of_the_client_its_endpoints_go_by_themselves(
    client: tuple[subprocess.Popen[str], dict[str, Any]],
) -> None:
    process, told = client
    process.kill()
    process.wait()
    all_gone(told["ids"])


def test_l4_after_the_death_of_client_and_agents_the_next_start_sweeps(
    client: tuple[subprocess.Popen[str], dict[str, Any]],
) -> None:
    process, told = client
    agents = [pid for pid, text in run_processes().items() if "endpoint_worker.agent" in text]
    for pid in (*agents, process.pid):
        with contextlib.suppress(ProcessLookupError):  # the workers' zygote is faster when its agent dies
            os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not run_processes(), what=lambda: f"the end of {run_processes()}")
    with LocalEndpoint("another", workers=1):
        # Another endpoint of this user that starts just now may be the one that sweeps: then ours does not wait for it.
        wait_until(
            lambda: not [path for id in told["ids"] for path in places(id) if path.exists()],
            what=lambda: f"the sweep of {left_of(told['ids'])}",
        )


def test_l4_an_endpoint_whose_workers_are_killed_leaves_nothing(home: Path) -> None:
    with LocalEndpoint("site", workers=2) as site, Executor("site") as executor:
        executor.submit(bytes, 5_000_000).result(timeout=patience(30))
        for pid in run_processes():
            if pid != site.pid:
                os.kill(pid, signal.SIGKILL)
        id = str(site.endpoint_id)
    all_gone([id])
