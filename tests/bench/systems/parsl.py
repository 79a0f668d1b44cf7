"""Parsl's high-throughput executor; a site is an executor. Values pass through the submitting process."""

from __future__ import annotations

import concurrent.futures
import tempfile
from collections.abc import Callable
from typing import Any

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

from tests.bench.system import Setting, System


class Adapter(System):
    name = "parsl"
    quiet = False
    first_result = """
import tempfile, time
start = time.perf_counter()
import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

@parsl.python_app
def add(left, right):
    return left + right

if __name__ == "__main__":
    executor = HighThroughputExecutor(
        max_workers_per_node=2, address="127.0.0.1", provider=LocalProvider(init_blocks=1, max_blocks=1)
    )
    with tempfile.TemporaryDirectory() as run_dir:
        with parsl.load(Config(executors=[executor], run_dir=run_dir)):
            value = add(1, 2).result()
            seconds = time.perf_counter() - start
    assert value == 3
    print(seconds)
"""

    def start(self, setting: Setting) -> None:
        self._run_dir = tempfile.TemporaryDirectory(prefix="gcref-bench-", ignore_cleanup_errors=True)
        executors = [
            HighThroughputExecutor(
                label=f"site{site}",
                max_workers_per_node=setting.workers,
                address="127.0.0.1",
                provider=LocalProvider(init_blocks=1, max_blocks=1),
            )
            for site in range(setting.sites)
        ]
        parsl.load(Config(executors=executors, run_dir=self._run_dir.name, strategy="none"))
        self._apps: dict[tuple[Callable[..., Any], int], Any] = {}

    def submit(self, function: Callable[..., Any], *args: Any, site: int = 0) -> Any:
        app = self._apps.get((function, site))
        if app is None:
            app = self._apps[function, site] = parsl.python_app(function, executors=[f"site{site}"])
        return app(*args)

    def result(self, future: Any) -> Any:
        return future.result()

    def wait(self, future: Any) -> None:
        concurrent.futures.wait([future])

    def stop(self) -> None:
        parsl.dfk().cleanup()
        parsl.clear()
        self._run_dir.cleanup()

    def version(self) -> str:
        return str(parsl.__version__)
