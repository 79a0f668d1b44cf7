"""A RabbitMQ of the hub's own, for those who have none: `[broker] start = true` in hub.toml.

    hub ── OwnRabbit.start ──► rabbitmq-server, with name, cookie, data, ports and port mapper of its own

It is the installed `rabbitmq-server` (package of that name), run as this user; a RabbitMQ that the system runs is not touched.
It ends with the hub, also when that is killed; its mailboxes stay in the folder and are there after the next start. Who wants
the broker to outlive the hub, or to be more than one machine, runs RabbitMQ by themselves.

Rules:
    - Parties see the AMQP port alone. Management, distribution and port mapper listen on loopback.
    - The administrator's password is made once and lies, closed to others, in the folder; it is in no argument and no log.
"""

from __future__ import annotations

import base64
import ctypes
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from gcref.errors import ConfigError, HubUnavailableError
from gcref.hub.config import BrokerConfig, OwnBrokerConfig

START_S: Final = 60.0
"""How long a start may take; some seconds are usual, more on a busy machine."""
STOP_S: Final = 20.0

USER: Final = "gcref-hub"
_RUNNING: Final = "running.json"  # while it runs, how it is reached; a secret

_PLACES: Final = ("/usr/lib/rabbitmq/bin", "/usr/local/lib/rabbitmq/bin", "/opt/rabbitmq/sbin")
"""Where the server itself lies; what is in the path is often a wrapper that changes user and folders."""
_FREE_DISK_BYTES: Final = 256 * 1024 * 1024
_PR_SET_PDEATHSIG: Final = 1

_SETTINGS: Final = """\
{listeners}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management_port}
default_user = {user}
default_pass = {password}
loopback_users = none
log.file.level = warning
log.console = false
disk_free_limit.absolute = {disk}
"""


class OwnRabbit:
    """A RabbitMQ that runs from `start` to `stop`.

    Args:
        settings: where its data are, and what parties dial.
        listen: the address that it listens at.
        cert: with `key`, files for TLS; parties then dial `amqps://`.
        key: the key of the certificate.
    """

    def __init__(
        self, settings: OwnBrokerConfig, listen: str, cert: str | None = None, key: str | None = None
    ) -> None:
        self._settings = settings
        self._folder = settings.folder
        self._host = listen
        self._port = settings.port
        self._tls = (cert, key) if cert and key else None
        self._password = ""
        self._management_port = 0
        self._processes: list[subprocess.Popen[bytes]] = []

    def __repr__(self) -> str:
        return f"OwnRabbit({str(self._folder)!r})"

    def start(self) -> BrokerConfig:
        """Start it, and wait until it takes connections. From the main thread: with that it ends.

        Returns:
            How the hub reaches it.

        Raises:
            ConfigError: RabbitMQ is not installed, or its folder or port cannot be had.
            HubUnavailableError: it does not start; the message has its last lines.
        """
        server = _server()
        epmd = shutil.which("epmd")
        if epmd is None:
            raise _not_installed("epmd, a part of Erlang,")
        environment = self._prepare(server)
        port_mapper = environment["ERL_EPMD_PORT"]
        try:
            with open(self._folder / "output", "wb") as output:
                for command in ([epmd, "-address", "127.0.0.1", "-port", port_mapper], [str(server)]):
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            cwd=self._folder,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=output,
                            start_new_session=True,  # Ctrl-C in the hub's terminal is for the hub
                            preexec_fn=die_with_us,
                        )
                    )
            self._await_ready(time.monotonic() + START_S)
            host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
            found = BrokerConfig(
                f"{'amqps' if self._tls else 'amqp'}://{host}:{self._port}",
                "/",
                f"http://127.0.0.1:{self._management_port}",
                USER,
                self._password,
                self._settings.mailbox_bytes,
            )
            _write(self._folder / _RUNNING, json.dumps(found))
            return found
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it in order; by force if that takes too long. Idempotent."""
        (self._folder / _RUNNING).unlink(missing_ok=True)
        processes, self._processes = self._processes, []
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # ------------------------------------------------------------------------------------------------------ inside

    def _prepare(self, server: Path) -> dict[str, str]:
        """Write its settings, and say what its environment is to be."""
        folder = self._folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._password = _secret(folder / "password")
            _secret(folder / ".erlang.cookie", mode=0o400)
        except OSError as error:
            raise ConfigError(
                f"the broker's folder {folder} cannot be had: {error.strerror}",
                file=str(folder),
                remedy="make hub.toml lie in a folder that you can write to",
            ) from error
        wanted = self._port or _free_port(self._host)
        _await_free(self._host, wanted)
        self._port = wanted
        self._management_port, distribution, port_mapper = (_free_port("127.0.0.1") for _ in range(3))
        place = f"[{self._host}]" if ":" in self._host else self._host
        listeners = f"listeners.tcp.1 = {place}:{self._port}"
        if self._tls is not None:
            cert, key = self._tls
            listeners = (
                f"listeners.tcp = none\nlisteners.ssl.1 = {place}:{self._port}\nssl_options.certfile = {cert}\n"
                f"ssl_options.keyfile = {key}\nssl_options.cacertfile = {cert}\nssl_options.verify = verify_none\n"
                "ssl_options.fail_if_no_peer_cert = false"
            )
        settings = _SETTINGS.format(
            listeners=listeners,
            management_port=self._management_port,
            user=USER,
            password=self._password,
            disk=_FREE_DISK_BYTES,
        )
        _write(folder / "rabbitmq.conf", settings)
        _write(folder / "environment", "")
        _write(folder / "plugins", "[rabbitmq_management].\n")
        return environment_of(folder, distribution, port_mapper)

    def _await_ready(self, until: float) -> None:
        server = self._processes[-1]
        while not self._is_ready():
            if server.poll() is not None or time.monotonic() > until:
                how = (
                    f"ended with code {server.returncode}"
                    if server.returncode is not None
                    else "does not answer"
                )
                tail = (self._folder / "output").read_text(errors="replace")[-2000:].strip()
                raise HubUnavailableError(f"the broker {how}; its log is in {self._folder / 'logs'}. {tail}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        connection = http.client.HTTPConnection("127.0.0.1", self._management_port, timeout=5)
        login = base64.b64encode(f"{USER}:{self._password}".encode()).decode()
        try:
            socket.create_connection((host, self._port), 1.0).close()
            connection.request("GET", "/api/overview", headers={"Authorization": f"Basic {login}"})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def running(settings: OwnBrokerConfig) -> BrokerConfig | None:
    """The broker that another process, the hub, has started; None: none runs, as far as is known."""
    try:
        found = BrokerConfig(*json.loads((settings.folder / _RUNNING).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return found


def _server() -> Path:
    for folder in _PLACES:
        path = Path(folder) / "rabbitmq-server"
        if os.access(path, os.X_OK):
            return path
    found = shutil.which(
        "rabbitmq-server", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))
    )
    if found is None:
        raise _not_installed("RabbitMQ")
    return Path(found)


def _not_installed(what: str) -> ConfigError:
    remedy = (
        "install it (Debian, Ubuntu: apt-get install rabbitmq-server), or name a broker that runs in hub.toml"
    )
    return ConfigError(f"{what} is not installed here; {remedy}", key="broker.start", remedy=remedy)


def environment_of(folder: Path, distribution_port: int, epmd_port: int) -> dict[str, str]:
    """The environment in which RabbitMQ's programs keep to a folder, to these ports, and to loopback among themselves."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        # Data lie under the node's name: it stays the same whatever the ports are.
        "RABBITMQ_NODENAME": f"gcref-{_digest(folder)}@localhost",
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_MNESIA_BASE": f"{folder}/data",
        "RABBITMQ_LOG_BASE": f"{folder}/logs",
        "RABBITMQ_PID_FILE": f"{folder}/pid",
        "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
        "RABBITMQ_CONF_ENV_FILE": f"{folder}/environment",
        "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
        # The host's own name may resolve to an address that is not loopback; nobody outside may come in.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        # Then the script becomes the server, instead of waiting for it: signals reach it.
        "RUNNING_UNDER_SYSTEMD": "true",
    } | _mark()


def die_with_us() -> None:
    """In a child before it runs its program: it ends with its parent, also one that is killed. Nobody else would end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _mark() -> dict[str, str]:
    # Whoever runs the hub may find its processes by a variable of theirs.
    return {name: value for name, value in os.environ.items() if name.startswith("GCREF_TEST_")}


def _secret(path: Path, mode: int = 0o600) -> str:
    """The secret in a file that is made, once, if it is missing."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        text = secrets.token_hex(24)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        return text


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _digest(folder: Path) -> str:
    from hashlib import blake2b

    return blake2b(str(folder.absolute()).encode(), digest_size=4).hexdigest()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


def _await_free(host: str, port: int) -> None:
    """Wait until nobody has the port: the broker of a hub that was killed a moment ago takes some seconds to go."""
    until = time.monotonic() + STOP_S
    while True:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ConfigError(
                    f"the broker cannot listen at {host}:{port}: {error.strerror}",
                    key="broker.port",
                    remedy="set broker.port in hub.toml to a port that is free",
                ) from error
            time.sleep(0.2)
