"""The hub's settings: the file `hub.toml`, checked as a whole when the hub starts.

    host = "127.0.0.1"              # where it listens
    port = 8780                     # 0: any that is free
    cert = "hub.crt"                # with `key`: TLS
    key  = "hub.key"
    insecure = true                 # instead of `cert`, in a network that you trust: tokens and passwords travel in clear
    database = "hub.db"             # a file on a disk of this machine, or postgresql+psycopg://user:password@host/name
    heartbeat_s = 30                # how often parties report
    lease_s = 86400                 # silence after which a party has gone, and how long mail waits for it
    sweep_s = 60                    # how often what is over is cleared away

    [broker]                        # without it there are no mailboxes
    url = "amqp://rabbit.example.org:5672"             # as parties dial it; a path names the virtual host
    management_url = "http://127.0.0.1:15672"          # as the hub asks it
    user = "gcref-hub"              # may administer
    password = "…"                  # or the environment: GCREF_HUB_BROKER_PASSWORD
    mailbox_bytes = 268435456       # what one mailbox may hold

    [broker]                        # or: a RabbitMQ of the hub's own, which starts and ends with it
    start = true                    # needs rabbitmq-server to be installed; data in the folder `broker` beside this file
    host = "hub.example.org"        # as parties dial it; default: the hub's own `host`
    port = 8781

The environment's `GCREF_HUB_DATABASE` and `GCREF_HUB_BROKER_PASSWORD` come before the file. Paths are relative to the file.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from gcref import config
from gcref.errors import ConfigError

DEFAULT_PORT: Final = 8780
HEARTBEAT_S: Final = 30.0
SWEEP_S: Final = 60.0
DEFAULT_BROKER_PORT: Final = 8781
MAILBOX_BYTES: Final = 256 * 1024 * 1024


class BrokerConfig(NamedTuple):
    """Where RabbitMQ is.

    Attributes:
        url: as parties dial it, `amqp://` or `amqps://`, without user and virtual host.
        vhost: the virtual host of all mailboxes.
        management_url: of its management API, as the hub asks it.
        user: an administrator there.
        password: theirs. A secret.
        mailbox_bytes: what one mailbox may hold.
    """

    url: str
    vhost: str
    management_url: str
    user: str
    password: str
    mailbox_bytes: int = MAILBOX_BYTES

    def __repr__(self) -> str:
        return f"BrokerConfig(url={self.url!r}, management_url={self.management_url!r}, password=…)"

    def url_for(self, user: str, password: str) -> str:
        """The URL with which a user of the broker dials it. A secret."""
        scheme, _, place = self.url.partition("://")
        return f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{place}/{quote(self.vhost, safe='')}"


class OwnBrokerConfig(NamedTuple):
    """A RabbitMQ that the hub starts for itself.

    Attributes:
        folder: its data and log.
        host: the name of this machine as parties dial it.
        port: its AMQP port; 0: any that is free.
        mailbox_bytes: what one mailbox may hold.
    """

    folder: Path
    host: str
    port: int = DEFAULT_BROKER_PORT
    mailbox_bytes: int = MAILBOX_BYTES


class HubConfig(NamedTuple):
    """The hub's settings; see the module. It has no broker, one that runs, or one of its own."""

    database: str
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    cert: str | None = None
    key: str | None = None
    insecure: bool = False
    heartbeat_s: float = HEARTBEAT_S
    lease_s: float = config.LEASE_S
    sweep_s: float = SWEEP_S
    broker: BrokerConfig | None = None
    own_broker: OwnBrokerConfig | None = None

    def __repr__(self) -> str:
        # A database's URL may hold a password.
        return f"HubConfig(host={self.host!r}, port={self.port}, database=…, broker={self.broker!r})"


def load(path: Path | None = None) -> HubConfig:
    """Read the hub's settings.

    Args:
        path: of the file; None: `hub.toml` in `GCREF_HOME`, where it may be missing.

    Raises:
        ConfigError: with file, key and remedy.
    """
    file = config.home() / "hub.toml" if path is None else path.expanduser().absolute()
    try:
        table = tomllib.loads(file.read_bytes().decode())
    except FileNotFoundError:
        if path is not None:
            raise _wrong(file, None, "is not there", "name the hub's configuration file") from None
        table = {}
    except OSError as error:
        raise _wrong(file, None, f"cannot be read: {error.strerror}", "make it readable for you") from error
    except ValueError as error:
        raise _wrong(file, None, f"is no TOML: {error}", "correct it there") from error
    return from_table(table, file)


def from_table(table: Mapping[str, Any], file: Path) -> HubConfig:
    """Check a table of settings.

    Args:
        table: as in the file.
        file: for messages, and the folder of relative paths.

    Raises:
        ConfigError: with file, key and remedy.
    """
    broker = table.get("broker")
    if broker is not None and not isinstance(broker, dict):
        raise _wrong(file, "broker", "is no table", "begin it with a line [broker]")
    found = _checked({key: value for key, value in table.items() if key != "broker"}, _KEYS, "", file)
    if ("cert" in found) != ("key" in found):
        raise _wrong(file, "cert", "and key belong together", "name both for TLS, or none")
    for key in ("cert", "key"):
        if key in found:
            found[key] = str(file.parent / Path(found[key]).expanduser())
            if not os.access(found[key], os.R_OK):
                raise _wrong(file, key, f"names {found[key]}, which cannot be read", "write a file's path")
    found["database"] = _database(
        os.environ.get("GCREF_HUB_DATABASE") or found.get("database", "hub.db"), file
    )
    settings = HubConfig(**found)
    if settings.cert is None and not settings.insecure and not _is_this_machine(settings.host):
        raise _wrong(file, "host", *_IN_CLEAR)
    if broker is None:
        return settings
    if broker.get("start") is not None:
        return settings._replace(own_broker=_own_broker(broker, settings.host, file))
    named = _broker(broker, file)
    parts = urlsplit(named.url)
    if parts.scheme == "amqp" and not settings.insecure and not _is_this_machine(parts.hostname or ""):
        raise _wrong(file, "broker.url", *_IN_CLEAR)
    return settings._replace(broker=named)


def _own_broker(table: Mapping[str, Any], host: str, file: Path) -> OwnBrokerConfig:
    found = _checked(table, _OWN_BROKER_KEYS, "broker.", file)
    del found["start"]
    if "host" not in found:
        if host in ("0.0.0.0", "::"):
            raise _wrong(
                file, "broker.host", "is missing", "write the name of this machine as parties dial it"
            )
        found["host"] = host
    return OwnBrokerConfig(file.parent / "broker", **found)


def _broker(table: Mapping[str, Any], file: Path) -> BrokerConfig:
    found = _checked(table, _BROKER_KEYS, "broker.", file)
    if secret := os.environ.get("GCREF_HUB_BROKER_PASSWORD"):
        found["password"] = secret
    for key in ("url", "management_url", "user", "password"):
        if key not in found:
            raise _wrong(file, f"broker.{key}", "is missing", "write it into the table [broker]")
    parts = urlsplit(found.pop("url"))
    vhost = unquote(parts.path.removeprefix("/")) or "/"
    return BrokerConfig(f"{parts.scheme}://{parts.netloc}", vhost, **found)


def _database(value: str, file: Path) -> str:
    if "://" not in value:
        return f"sqlite:///{file.parent / Path(value).expanduser()}"
    if value.startswith("postgresql://"):
        value = value.replace("postgresql://", "postgresql+psycopg://", 1)
    if not value.startswith(("sqlite:///", "postgresql+psycopg://")):
        raise _wrong(
            file,
            "database",
            "is of an unknown kind",
            "write a file's name, or postgresql+psycopg://user:password@host/name",
        )
    return value


def _checked(
    table: Mapping[str, Any], keys: Mapping[str, tuple[Callable[[Any], bool], str]], under: str, file: Path
) -> dict[str, Any]:
    for key, value in table.items():
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            remedy = f"did you mean {near[0]}?" if near else f"remove it; known are {', '.join(keys)}"
            raise _wrong(file, under + key, "is not a known setting", remedy)
        fits, remedy = keys[key]
        if not fits(value):
            # Not the value itself: it may be a secret in the wrong place.
            raise _wrong(
                file, under + key, f"has a value of type {type(value).__name__} that does not fit", remedy
            )
    return dict(table)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0.05 <= value <= 3650 * 86_400


def _is_amqp(value: Any) -> bool:
    try:
        parts = urlsplit(value)
        return (
            parts.scheme in ("amqp", "amqps")
            and bool(parts.hostname)
            and (parts.port or 1) > 0
            and "@" not in parts.netloc
        )
    except (ValueError, AttributeError, TypeError):
        return False


_IN_CLEAR: Final = (
    "can be reached from elsewhere without TLS: tokens and passwords would travel in clear",
    "set cert and key (and amqps:// for a broker), or insecure = true in a network that you trust",
)
_SECONDS: Final = (_is_seconds, "write a number of seconds, at least 0.05")
_TEXT: Final = (_is_text, "write a text in quotes")
_KEYS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "host": _TEXT,
    "port": (lambda value: type(value) is int and 0 <= value < 65536, "write a port's number"),
    "cert": _TEXT,
    "key": _TEXT,
    "insecure": (lambda value: type(value) is bool, "write true or false"),
    "database": _TEXT,
    "heartbeat_s": _SECONDS,
    "lease_s": _SECONDS,
    "sweep_s": _SECONDS,
}
_BYTES: Final = (lambda value: type(value) is int and value >= 2 * 1024 * 1024, "write at least 2097152")
_OWN_BROKER_KEYS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "start": (
        lambda value: value is True,
        "write true; a broker that runs is named by url, management_url, user, password",
    ),
    "host": _TEXT,
    "port": _KEYS["port"],
    "mailbox_bytes": _BYTES,
}
_BROKER_KEYS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "url": (_is_amqp, "write amqp://host:port or amqps://host:port, without a user"),
    "management_url": (
        lambda value: _is_text(value) and value.startswith(("http://", "https://")) and "@" not in value,
        "write http://host:port, without a user",
    ),
    "user": _TEXT,
    "password": _TEXT,
    "mailbox_bytes": _BYTES,
}


def _wrong(file: Path, key: str | None, problem: str, remedy: str) -> ConfigError:
    subject = f"{file}" if key is None else f"{file}: {key}"
    return ConfigError(f"{subject} {problem}; {remedy}", file=str(file), key=key, remedy=remedy)
