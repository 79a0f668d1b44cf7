"""Endpoints as their owner runs them, with a name that outlives each agent: for tests in which agents end and come back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

from endpoint_worker import daemon
from endpoint_worker.store.sweep import sweep
from gcref.config import disk_dir, host_dir
from gcref.directory import records
from tests.support.waiting import patience


class NamedEndpoint:
    """One endpoint, made with the first `start`.

    Args:
        name: what to call it.
        settings: keys of its `config.toml`.

    Attributes:
        id: its id.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.name = name
        self.id = daemon.init(name, **{"workers": 2, **settings}).id
        self._agent: daemon.Running | None = None

    @property
    def pid(self) -> int:
        """Of its agent."""
        assert self._agent is not None
        return self._agent.process.pid

    def start(self) -> None:
        """`endpoint-worker start`: returns when it serves."""
        self._agent = daemon.start(self.name, timeout_s=patience(30))

    def stop(self) -> None:
        """`endpoint-worker stop`."""
        daemon.stop(self.name)
        self._reap()

    def kill(self) -> None:
        """`kill -9` of its agent, and of nothing else."""
        self.signal(signal.SIGKILL)
        self._reap()

    def signal(self, number: int) -> None:
        """Send its agent a signal."""
        os.kill(self.pid, number)

    def is_running(self) -> bool:
        """Whether its agent is up."""
        return self._agent is not None and self._agent.process.poll() is None

    def remove(self) -> None:
        """Stop it, and take away what its journal and its record would keep for the next start."""
        if self.is_running():
            self.signal(signal.SIGCONT)
            self.stop()
        else:  # what outlives a killed agent is taken up by the next one, which can be stopped
            self.start()
            self.stop()
        records.remove(self.name)
        shutil.rmtree(disk_dir(self.id), ignore_errors=True)
        # Bytes that somebody pins wait for the next start; other agents that start just now may be sweeping there too.
        sweep(host_dir(), disk_dir())

    def _reap(self) -> None:
        assert self._agent is not None
        self._agent.process.wait(patience(30))


@contextlib.contextmanager
def running(name: str, **settings: Any) -> Iterator[NamedEndpoint]:
    """An endpoint that runs, and of which nothing is left afterwards."""
    endpoint = NamedEndpoint(name, **settings)
    endpoint.start()
    try:
        yield endpoint
    finally:
        endpoint.remove()
