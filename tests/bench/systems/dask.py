"""Dask distributed: a scheduler and worker processes on this machine; a site is a group of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import distributed

from tests.bench.system import Setting, System


class Adapter(System):
    name = "dask"
    quiet = False
    first_result = """
import time
start = time.perf_counter()
from distributed import Client

def add(left, right):
    return left + right

if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        value = client.submit(add, 1, 2).result()
        seconds = time.perf_counter() - start
    assert value == 3
    print(seconds)
"""

    def start(self, setting: Setting) -> None:
        self._cluster = distributed.LocalCluster(
            n_workers=setting.sites * setting.workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=50,
        )
        self._client = distributed.Client(self._cluster)
        self._client.wait_for_workers(setting.sites * setting.workers)
        workers = sorted(self._client.scheduler_info(n_workers=-1)["workers"])
        self._site_workers = [
            workers[site * setting.workers : (site + 1) * setting.workers] for site in range(setting.sites)
        ]

    def submit(self, function: Callable[..., Any], *args: Any, site: int = 0) -> Any:
        where = self._site_workers[site] if len(self._site_workers) > 1 else None
        return self._client.submit(function, *args, pure=False, workers=where)

    def result(self, future: Any) -> Any:
        return future.result()

    def results(self, futures: Sequence[Any]) -> list[Any]:
        values: list[Any] = self._client.gather(list(futures))
        return values

    def wait(self, future: Any) -> None:
        distributed.wait(future)

    def stop(self) -> None:
        self._client.close()
        self._cluster.close()

    def version(self) -> str:
        return str(distributed.__version__)
