"""A real RabbitMQ of one's own: its ports, its name, its folder, its management API. Loopback only, unless told otherwise.

    with Rabbit(folder) as rabbit:
        access = rabbit.party(ids.new_id())     # as the hub would make it
        rabbit.pause(); rabbit.resume()         # SIGSTOP, SIGCONT
        rabbit.kill(); rabbit.restart()         # messages and mailboxes are still there

Nothing of it touches the system's own RabbitMQ: node name, cookie, data folder and the port mapper (epmd) are its own.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from gcref.carriers.mail.post import MailboxAccess, queue_of
from gcref.hub import rabbitmq
from tests.support.leaks import lasts
from tests.support.ports import free_ports
from tests.support.waiting import wait_until

SERVER: Final = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""The server itself: the one in the path is a wrapper that changes the user and the folders."""

START_S: Final = 40.0
MAILBOX_BYTES: Final = 256 * 1024 * 1024
LEASE_S: Final = 24 * 3600

_CONFIG: Final = """\
listeners.tcp.1 = {host}:{port}
management.tcp.ip = {host}
management.tcp.port = {management_port}
default_user = {admin}
default_pass = {password}
loopback_users = none
log.file.level = warning
log.console = false
disk_free_limit.absolute = 100MB
collect_statistics_interval = 5000
"""


class Rabbit:
    """A broker, started by the constructor, which waits until it takes connections.

    Args:
        folder: where its data, logs and settings go.
        host: the address that it listens at; `0.0.0.0` for network namespaces.

    Attributes:
        host: where it listens.
        port: its AMQP port; the same for all its processes.
        management_port: the port of its HTTP API.
        admin: a user with all rights.
        password: that user's password.
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder = folder
        self.host = host
        self.port, self.management_port, self._dist_port, self._epmd_port = free_ports(4)
        self.admin = "admin"
        self.password = secrets.token_hex(16)
        self._server: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._paused = False
        folder.mkdir(parents=True, exist_ok=True)
        self._write_settings()
        self._start()

    @property
    def url(self) -> str:
        """AMQP, as the administrator."""
        return self.url_of(self.admin, self.password)

    @property
    def management_url(self) -> str:
        """The HTTP API."""
        return f"http://{self._near}:{self.management_port}"

    @property
    def pid(self) -> int:
        """The process of the broker."""
        assert self._server is not None, "it does not run"
        return self._server.pid

    def url_of(self, user: str, password: str) -> str:
        """AMQP, as this user."""
        return f"amqp://{user}:{password}@{self._near}:{self.port}/%2F"

    # ------------------------------------------------------------------------------------------------- mailboxes

    def party(self, id: bytes, *, max_bytes: int = MAILBOX_BYTES) -> MailboxAccess:
        """Make user, rights and queue of a party, as the hub does. Again: another password, and the same mailbox."""
        user, password = f"party.{id.hex()}", secrets.token_urlsafe(16)
        self.manage("PUT", f"users/{user}", {"password": password, "tags": ""})
        rights = {"configure": "^$", "write": "^amq\\.default$", "read": f"^mailbox\\.{id.hex()}$"}
        self.manage("PUT", f"permissions/%2F/{user}", rights)
        self.make_mailbox(id, max_bytes=max_bytes)
        return MailboxAccess(self.url_of(user, password), queue_of(id))

    def make_mailbox(self, id: bytes, *, max_bytes: int = MAILBOX_BYTES) -> None:
        """Make a party's queue alone."""
        arguments = {
            "x-expires": LEASE_S * 1000,
            "x-message-ttl": LEASE_S * 1000,
            "x-max-length-bytes": max_bytes,
            "x-overflow": "reject-publish",
        }
        self.manage("PUT", f"queues/%2F/{queue_of(id)}", {"durable": True, "arguments": arguments})

    def remove(self, id: bytes) -> None:
        """Remove a party with everything that it has, as the hub does when it withdraws."""
        self.revoke(id)
        self.remove_mailbox(id)

    def revoke(self, id: bytes) -> None:
        """Remove a party's user, and end its connections."""
        user = f"party.{id.hex()}"
        self.manage("DELETE", f"users/{user}")
        # The list of connections is made of statistics, so one that is seconds old may be missing: each is asked for.
        self.eval(f'rabbit_networking:close_all_user_connections(<<"{user}">>, "revoked")')

    def remove_mailbox(self, id: bytes) -> None:
        """Delete a party's queue; the user stays."""
        self.manage("DELETE", f"queues/%2F/{queue_of(id)}")

    def depth(self, id: bytes) -> int:
        """Messages in a mailbox, those included that were handed out and not acknowledged. Some seconds late."""
        return int(self.manage("GET", f"queues/%2F/{queue_of(id)}").get("messages", 0))

    def manage(self, method: str, path: str, body: object = None) -> Any:
        """Ask the management API, as the administrator. Who is not there to be deleted is deleted.

        Raises:
            urllib.error.HTTPError: it said no.
        """
        request = urllib.request.Request(
            f"{self.management_url}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Basic {self._basic}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                found = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                if method == "DELETE" and error.code == 404:
                    return None
                raise
        return json.loads(found) if found else None

    def eval(self, expression: str) -> str:
        """Run an Erlang expression inside the broker. Takes about a second."""
        done = subprocess.run(
            [str(SERVER.with_name("rabbitmqctl")), "eval", f"{expression}."],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    # ---------------------------------------------------------------------------------------------------- faults

    def pause(self) -> None:
        """Stop it as SIGSTOP does: connections stay, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """End a `pause`."""
        os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def kill(self) -> None:
        """End it with SIGKILL. What it had written stays."""
        server = self._server
        if server is not None and not self._paused and server.poll() is None:
            # Its database writes mailboxes that were just made a moment later; that race is not what tests are after.
            self.eval("mnesia:sync_log()")
        self._end()

    def _end(self) -> None:
        server, self._server = self._server, None
        self._paused = False
        if server is not None:
            server.kill()
            server.wait()

    def restart(self) -> None:
        """Kill it, if it runs, and start it again on the same ports with the same data."""
        self.kill()
        self._start()

    def close(self) -> None:
        """End it for good."""
        self._end()
        epmd, self._epmd = self._epmd, None
        if epmd is not None:
            epmd.kill()
            epmd.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------------- inside

    @property
    def _near(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    @property
    def _basic(self) -> str:
        return base64.b64encode(f"{self.admin}:{self.password}".encode()).decode()

    def _write_settings(self) -> None:
        settings = _CONFIG.format(
            host=self.host,
            port=self.port,
            management_port=self.management_port,
            admin=self.admin,
            password=self.password,
        )
        (self.folder / "rabbitmq.conf").write_text(settings)
        (self.folder / "environment").write_text("")
        (self.folder / "plugins").write_text("[rabbitmq_management].\n")
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(16))
        cookie.chmod(0o400)

    def _environment(self) -> dict[str, str]:
        return rabbitmq.environment_of(self.folder, self._dist_port, self._epmd_port)

    def _start(self) -> None:
        assert SERVER.exists(), "RabbitMQ is not installed: bash tests/run does it"
        environment = self._environment()
        if self._epmd is None:
            self._epmd = subprocess.Popen(
                ["epmd", "-address", "127.0.0.1", "-port", str(self._epmd_port)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=rabbitmq.die_with_us,
            )
            lasts(self._epmd.pid)
        output = self.folder / "output"
        with open(output, "ab") as file:
            self._server = subprocess.Popen(
                [str(SERVER)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                preexec_fn=rabbitmq.die_with_us,
            )
        lasts(self._server.pid)
        try:
            wait_until(
                self._is_ready, timeout_s=START_S, what=lambda: f"RabbitMQ:\n{output.read_text()[-3000:]}"
            )
        except BaseException:
            self.close()
            raise

    def _is_ready(self) -> bool:
        assert self._server is not None
        assert self._server.poll() is None, f"RabbitMQ ended:\n{(self.folder / 'output').read_text()[-3000:]}"
        try:
            socket.create_connection((self._near, self.port), 1.0).close()
            self.manage("GET", "overview")
        except OSError:  # URLError is one
            return False
        return True
