"""An endpoint as a daemon: making its folder, starting its agent, finding it, stopping it.

    $GCREF_HOME/endpoints/NAME/    config.toml  key  authorized_keys  record.json  agent.log      (may lie on NFS)
    host_dir(id)/                  lock (held by the living agent)  nonce                          (this machine)

    init ──► folder            start ──► python -m endpoint_worker.agent ◄── SIGTERM ── stop
                                    order (stdin) ▲ │ ready or error (stdout)

Rules:
    - Whether an agent lives is told by its lock, never by a process id: ids are used again. The id is used only to send a
      signal, through a pidfd, and after it is seen that this very process has the lock file open.
    - The folder may be shared by many machines. An agent that was started elsewhere is never touched from here.
    - Everything that can be known to be wrong is found before a process is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from endpoint_worker.config import EndpointConfig, read_table
from endpoint_worker.config_keys import template
from gcref import config, ids
from gcref.carriers import keys
from gcref.directory import launch, records
from gcref.directory.records import EndpointRecord
from gcref.errors import ConfigError, EndpointLostError, GcrefError, NotFoundError

READY_S: Final = 60.0
"""How long an agent may take to start: a cold Python on a busy network file system is slow."""

STOP_S: Final = 20.0
"""How long an agent may take to stop in order before it is killed."""

DIAL_S: Final = 1.0
"""How long an endpoint elsewhere may take to accept a connection when we ask whether it is there."""

LOG_MAX_BYTES: Final = 10_000_000
"""A log that is longer is put aside (`agent.log.1`) at the next start."""

LOG_TAIL_LINES: Final = 5

_AUTHORIZED_KEYS: Final = """\
# Who may use this endpoint, beside its owner: one line each, "KEY user" or "KEY peer", and a comment.
#   user: may submit tasks, and fetch their results     peer: another endpoint, may fetch what it has a reference to
# 'gcref key' prints a person's key. Changes are seen at once; a key that is taken out is disconnected.
"""


class Running(NamedTuple):
    """An agent that has just been started.

    Attributes:
        process: the agent; it goes on when this process ends.
        record: what it said of itself.
        note: something a person should know, or empty.
    """

    process: subprocess.Popen[bytes]
    record: EndpointRecord
    note: str


def folder_of(name: str) -> Path:
    """The folder of an endpoint, whether it exists or not.

    Raises:
        ConfigError: an endpoint cannot be called so.
    """
    try:
        return records.endpoint_dir(name)
    except ValueError as error:
        raise ConfigError(str(error), key="name", remedy="choose another name") from error


def init(name: str, **said: Any) -> EndpointRecord:
    """Make what an endpoint needs: its folder, configuration, key, list of allowed keys and id.

    What is there already is kept, so that a damaged folder can be completed.

    Args:
        name: what to call it.
        said: configuration keys to set, as in `config.toml`.

    Raises:
        ConfigError: it exists already and nothing is missing, or the name or a value is wrong.
    """
    folder = folder_of(name)
    EndpointConfig.from_table(said, "the command line")
    missing = [
        part
        for part in ("config.toml", "key", "authorized_keys", "record.json")
        if not (folder / part).exists()
    ]
    if not missing:
        raise ConfigError(
            f"endpoint {name!r} exists already, in {folder}; edit its config.toml, or choose another name",
            file=str(folder),
            key="name",
            remedy="edit its config.toml, or choose another name",
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_new(folder / "config.toml", template(name, **said))
        _write_new(folder / "authorized_keys", _AUTHORIZED_KEYS)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error.strerror}; set GCREF_HOME to a folder that you can write to",
            file=str(folder),
            key="GCREF_HOME",
            remedy="set GCREF_HOME to a folder that you can write to",
        ) from error
    # The owner's own key too: an agent that starts before its owner's first program is to know it.
    keys.load_or_create(config.home() / "keys" / "user.key")
    pair = keys.load_or_create(folder / "key")
    record = records.read(name)
    if record is None:
        record = EndpointRecord(id=ids.new_id(), name=name, public_key=pair.public.decode("ascii"))
        records.write(record)
    return record


def start(name: str, *, watch: bool = False, timeout_s: float = READY_S) -> Running:
    """Start an endpoint's agent, detached from this terminal, and wait until it serves.

    Args:
        name: the endpoint.
        watch: the agent ends when this process does.
        timeout_s: how long to wait until it serves.

    Raises:
        NotFoundError: there is no such endpoint.
        ConfigError: its configuration, its key or its list of allowed keys is wrong, or it runs already.
        GcrefError: whatever the agent says is wrong.
    """
    record = existing(name)
    folder = folder_of(name)
    table = read_table(folder / "config.toml")
    EndpointConfig.from_table(table, folder / "config.toml")
    keys.load(folder / "key")
    keys.read_authorized(folder / "authorized_keys")
    note = _refuse_if_running(record)
    settings = config.client_config()
    order = launch.order_for(
        record.id,
        name=name,
        home=config.home(),
        config=table,
        watch_stdin=watch,
        hub_url=settings.hub_url,
        token=settings.token,
    )
    with _open_log(folder / "agent.log") as log:
        logged_from = log.tell()
        process = launch.start_process(log)
    try:
        assert process.stdin is not None
        launch.tell(process.stdin, order)
        if not watch:
            process.stdin.close()
        _await_ready(process, name, timeout_s, folder / "agent.log", logged_from)
        return Running(process, existing(name), note)
    except BaseException:
        process.kill()
        process.wait()
        raise


def stop(name: str, *, timeout_s: float = STOP_S) -> str:
    """Stop an endpoint's agent: in order, and by force if that takes too long.

    Returns:
        What was done, for a person.

    Raises:
        NotFoundError: there is no such endpoint.
        ConfigError: it runs on another machine.
    """
    record = existing(name)
    alive = record.alive()
    if alive is None and (address := _answering(record)):
        raise _elsewhere(record, address)
    if not alive:
        was = record.running
        if alive is False:
            _end_workers(record)
        _mark_stopped(name)
        return f"endpoint {name} had died" if was else f"endpoint {name} was not running"
    with _process_of(record) as pidfd:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        forced = not _has_ended(pidfd, timeout_s)
        if forced:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not _has_ended(pidfd, timeout_s):
                raise GcrefError(
                    f"the agent of endpoint {name}, process {record.pid}, does not end, not even by SIGKILL"
                )
            _end_workers(record)
    _mark_stopped(name)
    how = f"killed: it did not stop within {timeout_s:g} s" if forced else "stopped"
    return f"endpoint {name} {how} (process {record.pid})"


def existing(name: str) -> EndpointRecord:
    """The record of an endpoint of this `GCREF_HOME`.

    Raises:
        NotFoundError: there is no such endpoint.
        ConfigError: its folder is incomplete or damaged.
    """
    folder = folder_of(name)
    record = records.read(name)
    if record is not None:
        return record
    if folder.is_dir():
        raise ConfigError(
            f"{folder} has no record.json; 'endpoint-worker init {name}' completes it",
            file=str(folder / "record.json"),
            remedy=f"run 'endpoint-worker init {name}'",
        )
    known = ", ".join(record.name for record in records.list_records()) or "none"
    raise NotFoundError(
        f"there is no endpoint {name!r} in {records.endpoints_dir()} (known: {known}); "
        f"'endpoint-worker init {name}' makes it, or set GCREF_HOME to the folder that has it"
    )


def state_of(record: EndpointRecord) -> str:
    """How an endpoint is, in a few words, as far as it can be known from here."""
    alive = record.alive()
    if alive:
        return f"running, process {record.pid}"
    if alive is None:
        return "running elsewhere, or died with its machine"
    return "died" if record.running else "stopped"


def _refuse_if_running(record: EndpointRecord) -> str:
    """Raise if the endpoint runs; else what a person should know about its last run."""
    alive = record.alive()
    if alive:
        raise ConfigError(
            f"endpoint {record.name!r} runs already, as process {record.pid}; "
            f"'endpoint-worker stop {record.name}' stops it",
            file=str(records.record_path(record.name)),
            key="name",
            remedy=f"run 'endpoint-worker stop {record.name}' first",
        )
    if alive is None:
        if address := _answering(record):
            raise _elsewhere(record, address)
        return "its last run was on another machine, or ended with this one; nobody answers there any more"
    return "its last run did not end in order" if record.running else ""


def _elsewhere(record: EndpointRecord, address: str) -> ConfigError:
    return ConfigError(
        f"endpoint {record.name!r} runs on another machine, at {address}; "
        f"run 'endpoint-worker stop {record.name}' there",
        file=str(records.record_path(record.name)),
        key="name",
        remedy=f"run 'endpoint-worker stop {record.name}' on that machine",
    )


def _answering(record: EndpointRecord) -> str | None:
    """The first TCP address of an endpoint at which somebody listens."""
    for address in record.control:
        if address.startswith("tcp://"):
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=DIAL_S).close()
            except (OSError, ValueError):
                continue
            return address
    return None


def _write_new(path: Path, text: str) -> None:
    # Settings may hold secrets (worker_env), and others must not be able to let themselves in.
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def _open_log(path: Path) -> IO[bytes]:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_MAX_BYTES:
            path.replace(path.with_name(path.name + ".1"))
    log = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")
    log.seek(0, os.SEEK_END)
    return log


def _await_ready(
    process: subprocess.Popen[bytes], name: str, timeout_s: float, log: Path, logged_from: int
) -> None:
    """Wait for the agent's answer; raise what it says is wrong."""
    assert process.stdout is not None
    with process.stdout as answers:
        line = _read_line(answers.fileno(), time.monotonic() + timeout_s)
    if line is None:
        raise EndpointLostError(
            f"endpoint {name} was not ready within {timeout_s:g} s; {_log_says(log, logged_from)}"
        )
    try:
        launch.read_answer(line)
    except ValueError:
        how = launch.how_it_ended(process.wait())
        text = f"the agent of endpoint {name} {how} before it was ready; {_log_says(log, logged_from)}"
        raise EndpointLostError(text) from None


def _read_line(descriptor: int, deadline: float) -> bytes | None:
    """Everything up to the first line's end or the end of the file; `None` when the time is up."""
    data = b""
    while not data.endswith(b"\n"):
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        piece = os.read(descriptor, 65536)
        if not piece:
            break
        data += piece
    return data


def _log_says(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return f"the last lines of {log}:\n" + "\n".join(lines) if lines else f"{log} says nothing"


@contextlib.contextmanager
def _process_of(record: EndpointRecord) -> Iterator[int]:
    """A pidfd of the agent: of the process that has the endpoint's lock open."""
    lock = config.host_dir(None) / record.id.hex() / "lock"
    try:
        pidfd = os.pidfd_open(record.pid)
    except OSError as error:
        raise _not_the_agent(record, lock) from error
    try:
        # Opened first, looked at second: from here on it stays the same process, or ends.
        if not _has_open(record.pid, lock):
            raise _not_the_agent(record, lock)
        yield pidfd
    finally:
        os.close(pidfd)


def _not_the_agent(record: EndpointRecord, lock: Path) -> ConfigError:
    return ConfigError(
        f"{lock} is held, but not by process {record.pid}, which the record of endpoint {record.name!r} names; "
        f"'fuser {lock}' tells which process it is",
        file=str(records.record_path(record.name)),
        key="pid",
        remedy="find the process that holds the lock, and end it",
    )


def _has_open(pid: int, path: Path) -> bool:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.path.samefile(f"{folder}/{name}", path):
                    return True
    return False


def _has_ended(pidfd: int, timeout_s: float) -> bool:
    return bool(select.select([pidfd], [], [], timeout_s)[0])


def _end_workers(record: EndpointRecord) -> None:
    """Its agent is dead; the workers wait for the next one, which is not to come soon."""
    from endpoint_worker.worker.zygote import Zygote  # here: no other command needs it

    Zygote.end(config.host_dir(None) / record.id.hex() / "workers")


def _mark_stopped(name: str) -> None:
    record = records.read(name)
    if record is not None and record.running:
        records.write(dataclasses.replace(record, running=False))
