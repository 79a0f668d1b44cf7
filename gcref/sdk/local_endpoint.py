"""`LocalEndpoint`: a named endpoint on this machine, for as long as this object lives.

    LocalEndpoint("polaris") ── starts an agent, waits until it serves ──► its record in GCREF_HOME ──► Executor("polaris")

For tests, examples and notebooks. An endpoint that is to outlive a program is started by `endpoint-worker start`.
"""

from __future__ import annotations

import os
import shutil
import uuid
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from gcref import config, ids
from gcref.directory import records
from gcref.errors import ConfigError
from gcref.sdk.agent_process import AgentProcess

START_WAIT_S: Final = 30.0
"""How long an agent may take to start."""


class LocalEndpoint:
    """An endpoint on this machine: an agent process and its workers.

    It serves when the constructor returns, and stops with `stop`, at the end of a `with` block, or with this process.

    Args:
        name: what to call it. If `GCREF_HOME` has an endpoint of that name that does not run, that one is started, with its
            id, key and configuration; else one is made, and removed when it stops.
        workers: processes that run tasks; None: as configured.
        carriers: the ways that it may use (`"ipc"`, `"direct"`, `"broker"`); None: as configured.
        config: settings, a table as in an endpoint's `config.toml`; they go before those in that file.

    Raises:
        ConfigError: the name or a setting cannot be used, or the endpoint runs already.
        GcrefError: the agent could not start.
    """

    def __init__(
        self,
        name: str,
        *,
        workers: int | None = None,
        carriers: Iterable[str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        home = _home()
        try:
            folder = records.endpoint_dir(name, home)
        except ValueError as error:
            raise ConfigError(str(error), key="name", remedy="choose another name") from None
        ways = None if carriers is None else sorted(_carriers(carriers))
        record = records.read(name, home)
        if record is not None and record.alive_here() is not False:
            raise ConfigError(
                f"endpoint {name!r} runs already (process {record.pid}); stop it with 'endpoint-worker stop {name}', or "
                "choose another name",
                key="name",
                remedy=f"endpoint-worker stop {name}",
            )
        self.name = name
        self._folder = folder
        self._made = record is None or record.ephemeral
        table = {**_configured(folder / "config.toml"), **(config or {})}
        self._id = ids.new_id() if record is None else record.id
        settings = _client_config()
        self._process = AgentProcess(
            self._id,
            name=name,
            home=home,
            workers=workers,
            carriers=ways,
            config=table,
            hub_url=settings.hub_url,
            token=settings.token,
        )
        try:
            self._process.wait_ready(START_WAIT_S)
        except BaseException:
            _stop(self._process, folder if self._made else None, os.getpid())
            raise
        self._end = weakref.finalize(
            self, _stop, self._process, self._folder if self._made else None, os.getpid()
        )
        _living.add(self)

    @property
    def endpoint_id(self) -> uuid.UUID:
        """The endpoint's id."""
        return uuid.UUID(bytes=self._id)

    @property
    def pid(self) -> int:
        """The process id of its agent."""
        return self._process.pid

    def stop(self) -> None:
        """Stops it, with the tasks that run; returns when it is gone. Can be called again."""
        self._end()

    def __enter__(self) -> LocalEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = f"process {self.pid}" if self._end.alive else "stopped"
        return f"<LocalEndpoint {self.name!r} {ids.text(self._id)} {state}>"


# The parameter `config` of the constructor hides the module.
_home = config.home
_carriers = config.carriers_allowed
_client_config = config.client_config


def _stop(process: AgentProcess, folder: Path | None, owner: int) -> None:
    """Stops the agent, and takes away the folder that was made for it; in the process that started it."""
    if os.getpid() != owner:
        return
    process.stop()
    if folder is None:
        return
    record = records.read(folder.name, folder.parent.parent)
    if record is None or record.id == process.id:
        shutil.rmtree(folder, ignore_errors=True)


def _configured(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", file=str(path)) from error
    import tomllib

    try:
        return tomllib.loads(data.decode())
    except ValueError as error:
        raise ConfigError(f"{path} is no TOML: {error}", file=str(path), remedy="correct it there") from error


_living: weakref.WeakSet[LocalEndpoint] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Endpoints belong to the parent; a child that held their pipes open would keep them alive."""
    for endpoint in list(_living):
        endpoint._process.abandon()
    _living.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
