"""Looking at endpoints from outside: what an agent says of itself, and what the machine says of its processes and files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endpoint_worker import status
from gcref.directory import records
from gcref.directory.records import EndpointRecord


def ask(endpoint: str | EndpointRecord) -> dict[str, Any]:
    """What `endpoint-worker status` shows.

    Args:
        endpoint: its name, or its record; with the record it is asked also while its name leads elsewhere.
    """
    return status.ask(records.resolve(endpoint) if isinstance(endpoint, str) else endpoint)


def store_of(endpoint: str | EndpointRecord) -> dict[str, int]:
    """The figures of its store: `used_bytes`, `pooled_bytes`, `disk_bytes`, `objects`."""
    store: dict[str, int] = ask(endpoint)["store"]
    return store


def used_bytes(*endpoints: str) -> int:
    """Bytes of objects at all these endpoints; segments that are kept for reuse count as free."""
    stores = [store_of(endpoint) for endpoint in endpoints]
    return sum(store["used_bytes"] + store["disk_bytes"] for store in stores)


def worker_pids(endpoint: str) -> set[int]:
    """The processes of its workers that are up."""
    return {worker["pid"] for worker in ask(endpoint)["workers"]}


def host_folder(endpoint: str) -> Path:
    """The folder of an endpoint in shared memory: sockets, lock, segments."""
    return host_root() / records.resolve(endpoint).id.hex()


def host_root() -> Path:
    """The folder in shared memory that holds those of all parties of this user."""
    return Path(f"/dev/shm/gcref-{os.geteuid()}")


def shared_bytes(*folders: Path) -> int:
    """Bytes of the files in these folders; a file with two names counts once."""
    found = {(stat.st_dev, stat.st_ino): stat.st_size for stat in _stats(*folders)}
    return sum(found.values())


def _stats(*folders: Path) -> Iterator[os.stat_result]:
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                if path.is_file():
                    yield path.stat()
            except FileNotFoundError:
                continue  # it went while we looked
