"""Ray: one node with the workers, or a cluster of two nodes on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.bench.system import Setting, System

STORE_BYTES = 3 << 30
"""Per node: room for two arrays of 1 GB."""


class Adapter(System):
    name = "ray"
    quiet = False
    first_result = """
import time
start = time.perf_counter()
import ray

@ray.remote
def add(left, right):
    return left + right

ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
value = ray.get(add.remote(1, 2))
seconds = time.perf_counter() - start
assert value == 3
ray.shutdown()
print(seconds)
"""

    def start(self, setting: Setting) -> None:
        self._remote: dict[tuple[Callable[..., Any], int], Any] = {}
        self._cluster: Any = None
        self._sites = setting.sites
        quietly = {"logging_level": logging.ERROR, "log_to_driver": False}
        if setting.sites == 1:
            ray.init(
                num_cpus=setting.workers, include_dashboard=False, object_store_memory=STORE_BYTES, **quietly
            )
            return
        self._cluster = Cluster()
        for site in range(setting.sites):
            self._cluster.add_node(
                num_cpus=setting.workers, resources={f"site{site}": 1000}, object_store_memory=STORE_BYTES
            )
        ray.init(address=self._cluster.address, **quietly)

    def submit(self, function: Callable[..., Any], *args: Any, site: int = 0) -> Any:
        remote = self._remote.get((function, site))
        if remote is None:
            remote = ray.remote(function)
            if self._sites > 1:
                remote = remote.options(resources={f"site{site}": 1})
            self._remote[function, site] = remote
        return remote.remote(*args)

    def result(self, future: Any) -> Any:
        return ray.get(future)

    def results(self, futures: Sequence[Any]) -> list[Any]:
        values: list[Any] = ray.get(list(futures))
        return values

    def wait(self, future: Any) -> None:
        ray.wait([future], fetch_local=False)

    def stop(self) -> None:
        ray.shutdown()
        if self._cluster is not None:
            self._cluster.shutdown()

    def version(self) -> str:
        return str(ray.__version__)
