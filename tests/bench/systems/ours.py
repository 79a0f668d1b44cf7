"""gcref itself: one or two named endpoints of this machine, each an agent with its own workers."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import gcref
from gcref.directory import records
from tests.bench.system import Setting, System


class Adapter(System):
    name = "ours"
    first_result = """
import time
start = time.perf_counter()
from gcref import Executor

def add(left, right):
    return left + right

with Executor() as executor:
    value = executor.submit(add, 1, 2).result()
    seconds = time.perf_counter() - start
assert value == 3
print(seconds)
"""

    def start(self, setting: Setting) -> None:
        self._endpoints = [
            gcref.LocalEndpoint(f"bench-{site}", workers=setting.workers, carriers=setting.carriers)
            for site in range(setting.sites)
        ]
        for endpoint in self._endpoints:
            endpoint.__enter__()
        if setting.carriers == ("broker",):
            for site in range(setting.sites):
                _await_mailbox(f"bench-{site}")
        self._client = gcref.Client()
        self._executors = [
            gcref.Executor(endpoint.endpoint_id, client=self._client) for endpoint in self._endpoints
        ]

    def submit(self, function: Callable[..., Any], *args: Any, site: int = 0) -> Any:
        return self._executors[site].submit(function, *args)

    def result(self, future: Any) -> Any:
        return future.result()

    def wait(self, future: Any) -> None:
        concurrent.futures.wait([future])

    def stop(self) -> None:
        for executor in self._executors:
            executor.shutdown()
        for endpoint in self._endpoints:
            endpoint.stop()

    def version(self) -> str:
        return str(getattr(gcref, "__version__", ""))


def _await_mailbox(name: str) -> None:
    """An agent has its mailbox a moment after its start."""
    until = time.monotonic() + 30
    while not records.resolve(name).mailbox:
        if time.monotonic() > until:
            raise RuntimeError(f"endpoint {name} got no mailbox")
        time.sleep(0.02)
