"""gcref at an endpoint that comes back: everything that its agent hears goes into the journal first."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, ClassVar

import gcref
from endpoint_worker import daemon
from gcref.config import disk_dir
from tests.bench.system import Setting, System


class Adapter(System):
    name = "journal"
    fsync: ClassVar[bool] = False

    def start(self, setting: Setting) -> None:
        self._home = tempfile.mkdtemp(prefix="gcref-bench-")
        os.environ["GCREF_HOME"] = self._home
        self._endpoint = daemon.init(self.name, workers=setting.workers, journal_fsync=self.fsync).id
        self._running = daemon.start(self.name, watch=True)
        self._client = gcref.Client()
        self._executor = gcref.Executor(self.name, client=self._client)

    def submit(self, function: Callable[..., Any], *args: Any, site: int = 0) -> Any:
        return self._executor.submit(function, *args)

    def result(self, future: Any) -> Any:
        return future.result()

    def stop(self) -> None:
        self._executor.shutdown()
        self._client.close()
        daemon.stop(self.name)
        shutil.rmtree(disk_dir(self._endpoint), ignore_errors=True)
        shutil.rmtree(self._home)

    def version(self) -> str:
        return str(getattr(gcref, "__version__", ""))
