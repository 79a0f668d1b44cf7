"""A real hub of one's own: `gcref hub start` as a process, with its own port, database and settings.

with Hub(folder, rabbit) as hub:
    alice = hub.client("alice")             # a HubClient with alice's token; she is made when first named
    hub.restart(); hub.kill(); hub.stop()   # the port and the database stay
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from gcref import cli
from gcref.directory.hub import HubClient
from gcref.hub import users
from gcref.hub.config import load
from gcref.hub.database import Database
from gcref.hub.rabbitmq import die_with_us
from tests.support.ports import free_ports
from tests.support.programs import environment
from tests.support.waiting import patience, wait_until

if TYPE_CHECKING:
    from tests.support.rabbit import Rabbit

START_S: Final = 30.0


class Hub:
    """A hub, started by the constructor, which waits until it can be reached.

    Args:
        folder: where its settings, database and log go.
        rabbit: its broker; None: it hands out no mailboxes.
        host: the address that it listens at.
        broker: other values for the table `[broker]` than the rabbit's.
        settings: more keys of its `hub.toml`.

    Attributes:
        url: where it is.
        config: its `hub.toml`.
        database_url: its database, as SQLAlchemy says it.
    """

    def __init__(
        self,
        folder: Path,
        rabbit: Rabbit | None = None,
        *,
        host: str = "127.0.0.1",
        broker: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.host = host
        (self.port,) = free_ports(1, host)
        scheme = "https" if "cert" in settings else "http"
        self.url = f"{scheme}://{host}:{self.port}"
        self.config = folder / "hub.toml"
        self.log = folder / "hub.log"
        self._tokens: dict[str, str] = {}
        self._clients: list[HubClient] = []
        self._process: subprocess.Popen[str] | None = None
        self._write(rabbit, broker or {}, {"host": host, "port": self.port, **settings})
        self.database_url = load(self.config).database
        self.start()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self) -> None:
        """Start it, on the same port and database."""
        command = [sys.executable, "-m", "gcref.cli", "hub", "start", "--config", str(self.config)]
        with open(self.log, "a") as log:
            self._process = subprocess.Popen(
                command,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                preexec_fn=die_with_us,
            )
        try:
            wait_until(
                self._is_ready, timeout_s=START_S, what=lambda: f"the hub:\n{self.log.read_text()[-3000:]}"
            )
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it in order."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(patience(20))

    def kill(self) -> None:
        """End it with SIGKILL."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def restart(self) -> None:
        """End it in order, and start it again."""
        self.stop()
        self.start()

    def signal(self, number: int) -> None:
        """Send it a signal: SIGSTOP freezes it."""
        os.kill(self.pid, number)

    def command(self, *arguments: str) -> str:
        """What `gcref …` prints; `--config` is added to commands of `gcref hub`."""
        more = ["--config", str(self.config)] if arguments[0] == "hub" else []
        # In this process: another one would take seconds to load what the hub stands on.
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert cli.main([*arguments, *more]) == 0
        return output.getvalue()

    def add_user(self, name: str) -> str:
        """Make a user; gives the token."""
        database = Database(self.database_url)
        try:
            self._tokens[name] = users.add(database, name).secret
        finally:
            database.close()
        return self._tokens[name]

    def token(self, name: str) -> str:
        """The token of a user, who is made when first named."""
        return self._tokens.get(name) or self.add_user(name)

    def client(self, name: str) -> HubClient:
        """The line of a user to this hub; closed with it."""
        client = HubClient(self.url, self.token(name))
        self._clients.append(client)
        return client

    @contextlib.contextmanager
    def used_by(self, name: str) -> Iterator[None]:
        """The environment of this process names this hub, and the token of a user."""
        before = {key: os.environ.get(key) for key in ("GCREF_HUB_URL", "GCREF_TOKEN")}
        os.environ.update(GCREF_HUB_URL=self.url, GCREF_TOKEN=self.token(name))
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value

    def close(self) -> None:
        """End it for good."""
        for client in self._clients:
            client.close()
        self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, rabbit: Rabbit | None, other: Mapping[str, Any], settings: dict[str, Any]) -> None:
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        if rabbit is not None:
            place = rabbit.url.rpartition("@")[2].partition("/")[0]
            broker = {
                "url": f"amqp://{place}",
                "management_url": rabbit.management_url,
                "user": rabbit.admin,
                "password": rabbit.password,
                **other,
            }
            lines += ["[broker]", *(f"{key} = {json.dumps(value)}" for key, value in broker.items())]
        self.config.touch(0o600)
        self.config.write_text("\n".join(lines) + "\n")

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the hub ended:\n{self.log.read_text()[-3000:]}"
        try:
            socket.create_connection((self.host, self.port), 1.0).close()
        except OSError:
            return False
        return f"ready at {self.url}" in self.log.read_text()
