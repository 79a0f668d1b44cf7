"""The measuring stick: `ProcessPoolExecutor`. A site is a pool; values are forwarded by hand."""

from __future__ import annotations

import concurrent.futures
import platform
from collections.abc import Callable
from typing import Any

from tests.bench import tasks
from tests.bench.system import Setting, System


class Adapter(System):
    name = "pool"
    passes_futures = False
    first_result = """
import time
start = time.perf_counter()
from concurrent.futures import ProcessPoolExecutor

def add(left, right):
    return left + right

if __name__ == "__main__":
    with ProcessPoolExecutor(2) as executor:
        value = executor.submit(add, 1, 2).result()
        seconds = time.perf_counter() - start
    assert value == 3
    print(seconds)
"""

    def start(self, setting: Setting) -> None:
        self._pools = [concurrent.futures.ProcessPoolExecutor(setting.workers) for _ in range(setting.sites)]
        for pool in self._pools:
            # Each submit may start one more worker: all are there before anything is measured.
            started = [pool.submit(tasks.nap, 0.05, None) for _ in range(setting.workers)]
            concurrent.futures.wait(started)

    def submit(self, function: Callable[..., Any], *args: Any, site: int = 0) -> Any:
        return self._pools[site].submit(function, *args)

    def result(self, future: Any) -> Any:
        return future.result()

    def wait(self, future: Any) -> None:
        concurrent.futures.wait([future])

    def stop(self) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def version(self) -> str:
        return platform.python_version()
