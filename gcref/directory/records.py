"""The records of endpoints in `$GCREF_HOME/endpoints`: who they are and where they listen.

An agent writes its record when it starts and marks it when it stops; clients and other agents read it to find
their way:

    agent ── write ──► $GCREF_HOME/endpoints/NAME/record.json ── resolve ──► client, agent ── candidates ──► dial

Rules:
    - That folder may lie on a network file system, so a record is replaced as a whole (write beside, then
      rename) and nothing here locks. Whether the agent lives is asked of the host-local lock, and only on its
      own host.
    - Same machine and user is *proven*: the record's nonce must equal the text of the file `nonce` in the
      endpoint's host-local folder. Only then is an ipc address worth dialling.
    - What is read is checked; a damaged record is a `ConfigError` that names the file, never a crash further in.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any, Final

from gcref import config, ids
from gcref.carriers.mail import post
from gcref.errors import ConfigError, NotFoundError

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What an endpoint may be called: a file name everywhere, and short enough for a log line."""

MAX_RECORD_BYTES: Final = 64 * 1024
"""A record is read whole; one that is larger is damaged."""

_CARRIER_OF_SCHEME: Final = {"ipc": "ipc", "tcp": "direct"}

Candidate = tuple[str, str, bytes | None]
"""A way to try: carrier name, address, the server's public key (`None` where the socket needs none)."""


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointRecord:
    """What an endpoint says of itself.

    Attributes:
        id: the endpoint's id, 16 bytes.
        name: its name in this `GCREF_HOME`.
        public_key: its owner key, the public half, as Z85 text.
        control: addresses of the control socket, `ipc://…` and `tcp://host:port`.
        bulk: the same for the bulk socket.
        host_nonce: the text that only the endpoint's own machine and user can read.
        pid: process id of the agent, on its machine.
        started: when the agent started, Unix seconds.
        protocol: the protocol version that it speaks.
        running: False once the agent has stopped in order. After a crash it is still True: see `alive`.
        ephemeral: it was made for the lifetime of one process (`LocalEndpoint`).
        host: names the machine that it was started on; a hint, no proof.
        mailbox: it has a mailbox at the broker.
    """

    id: bytes
    name: str
    public_key: str
    control: tuple[str, ...] = ()
    bulk: tuple[str, ...] = ()
    host_nonce: str = ""
    pid: int = 0
    started: float = 0.0
    protocol: int = config.PROTOCOL_VERSION
    running: bool = False
    ephemeral: bool = False
    host: str = dataclasses.field(default_factory=lambda: this_host())
    mailbox: bool = False

    def __post_init__(self) -> None:
        if len(self.id) != 16:
            raise ValueError(f"an endpoint id has 16 bytes, not {len(self.id)}")
        check_name(self.name)
        for address in (*self.control, *self.bulk):
            if address.partition("://")[0] not in _CARRIER_OF_SCHEME:
                raise ValueError(f"an address starts with ipc:// or tcp://, not {address!r}")

    def same_host(self) -> bool:
        """Whether the endpoint lives on this machine, under this user (proven by the nonce)."""
        if not self.host_nonce:
            return False
        try:
            text = (config.host_dir(None) / self.id.hex() / "nonce").read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return False
        return text == self.host_nonce

    def alive(self) -> bool | None:
        """Whether the agent runs: True or False on its own host, `None` where that cannot be known."""
        if not self.running:
            return False
        if not self.same_host():
            return None
        return self._holds_lock()

    def alive_here(self) -> bool | None:
        """As `alive`, but the record is believed about its machine.

        What a dead agent leaves may have been swept by the next one that started, and the nonce with it. That is not to look
        like an agent on another machine, for which a client has much more patience.
        """
        alive = self.alive()
        if alive is None and self.host and self.host == this_host():
            return self._holds_lock()
        return alive

    def _holds_lock(self) -> bool:
        return lock_is_held(config.host_dir(None) / self.id.hex() / "lock")

    def candidates(self, allowed: frozenset[str]) -> list[Candidate]:
        """The ways to reach the control socket from here, best first.

        Args:
            allowed: carriers that the caller may use.
        """
        return self._candidates(self.control, allowed)

    def bulk_candidates(self, allowed: frozenset[str]) -> list[Candidate]:
        """The ways to reach the bulk socket from here, best first."""
        return self._candidates(self.bulk, allowed)

    def local_socket(self) -> Candidate | None:
        """The control socket for questions from this machine and user: it is there whatever carriers the endpoint may use."""
        if not self.same_host():
            return None
        return "ipc", f"ipc://{config.host_dir(None) / self.id.hex() / 'control.sock'}", None

    def _candidates(self, addresses: tuple[str, ...], allowed: frozenset[str]) -> list[Candidate]:
        same_host = self.same_host() if "ipc" in allowed else False
        found: list[Candidate] = []
        for address in addresses:
            carrier = _CARRIER_OF_SCHEME[address.partition("://")[0]]
            if carrier not in allowed:
                continue
            if carrier == "direct":
                found.append((carrier, address, self.public_key.encode("ascii")))
            elif same_host:
                found.append((carrier, address, None))
        found.sort(key=lambda candidate: candidate[0] != "ipc")
        # Whom we can reach within this machine needs no broker.
        if self.mailbox and "broker" in allowed and not (found and found[0][0] == "ipc"):
            found.append(("broker", post.address_of(self.id), self.public_key.encode("ascii")))
        return found

    def as_json(self) -> dict[str, Any]:
        """The record as it stands in its file."""
        table = dataclasses.asdict(self)
        table["id"] = ids.text(self.id)
        return table

    @classmethod
    def from_json(cls, table: Any) -> EndpointRecord:
        """The record that a file holds; unknown keys are ignored.

        Raises:
            ValueError: a key is missing or has the wrong type.
        """
        if not isinstance(table, dict):
            raise ValueError("a record is a table")
        values: dict[str, Any] = {"host": ""}
        for field in dataclasses.fields(cls):
            if field.name not in table:
                if field.name in ("id", "name", "public_key"):
                    raise ValueError(f"the key {field.name!r} is missing")
                continue
            values[field.name] = _checked(field.name, table[field.name])
        return cls(**values)


def _checked(key: str, value: Any) -> Any:
    if key == "id":
        if not isinstance(value, str):
            raise ValueError("the key 'id' is not text")
        return ids.parse(value)
    if key in ("control", "bulk"):
        if not isinstance(value, list) or not all(isinstance(address, str) for address in value):
            raise ValueError(f"the key {key!r} is not a list of addresses")
        return tuple(value)
    kinds: type | tuple[type, ...]
    if key in ("running", "ephemeral", "mailbox"):
        kinds = bool
    elif key in ("pid", "protocol"):
        kinds = int
    elif key == "started":
        kinds = (int, float)
    else:
        kinds = str
    if not isinstance(value, kinds):
        raise ValueError(f"the key {key!r} has a value of type {type(value).__name__}")
    return value


def check_name(name: str) -> str:
    """The name, if an endpoint may be called so.

    Raises:
        ValueError: it is not a plain file name of at most 64 characters, or it reads like a UUID.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name an endpoint: use letters, digits, '.', '_' and '-' (at most 64)"
        )
    try:
        uuid.UUID(name)
    except ValueError:
        return name
    raise ValueError(f"{name!r} cannot name an endpoint: it reads like an endpoint id")


def this_host() -> str:
    """A name for this machine since it was started, as seen from here: containers that share no memory have different ones."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = os.uname().nodename
    return f"{boot}/{os.stat(config.host_dir(None)).st_dev}"


def lock_is_held(path: Path) -> bool:
    """Whether a living process holds the lock file (`flock`); a missing file is held by nobody."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def endpoints_dir(home: Path | None = None) -> Path:
    """The folder that holds a folder for each endpoint.

    Args:
        home: a `GCREF_HOME`; `None` is the one of this process.
    """
    return (config.home() if home is None else home) / "endpoints"


def endpoint_dir(name: str, home: Path | None = None) -> Path:
    """The folder of one endpoint: its configuration, keys, record and log. It need not exist."""
    return endpoints_dir(home) / check_name(name)


def record_path(name: str, home: Path | None = None) -> Path:
    """The file that holds an endpoint's record."""
    return endpoint_dir(name, home) / "record.json"


def write(record: EndpointRecord, home: Path | None = None) -> Path:
    """Puts the record in its place, as a whole; makes the endpoint's folder where needed.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = record_path(record.name, home)
    beside = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(record.as_json(), file, indent=1)
                file.write("\n")
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(
            f"the record of endpoint {record.name!r} cannot be written to {path}: {error}"
        ) from error
    return path


def read(name: str, home: Path | None = None) -> EndpointRecord | None:
    """The record of the endpoint of that name; `None` when there is none.

    Raises:
        ConfigError: the file is there, but it is not a record.
    """
    path = record_path(name, home)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"it has more than {MAX_RECORD_BYTES} bytes")
        return EndpointRecord.from_json(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not the record of an endpoint: {error}. Remove it, and start the endpoint again."
        ) from error


def remove(name: str, home: Path | None = None) -> None:
    """Takes the record away; the endpoint's folder goes too when nothing else is in it."""
    path = record_path(name, home)
    path.unlink(missing_ok=True)
    try:
        path.parent.rmdir()
    except OSError:
        pass  # keys, a configuration or a log are kept there


def list_records(home: Path | None = None) -> list[EndpointRecord]:
    """Every readable record, by name. Damaged ones are left out: `read` tells of them when asked."""
    try:
        names = sorted(entry.name for entry in os.scandir(endpoints_dir(home)))
    except OSError:
        return []
    found: list[EndpointRecord] = []
    for name in names:
        try:
            record = read(name, home)
        except (ConfigError, ValueError):
            continue
        if record is not None:
            found.append(record)
    return found


def find(id: bytes, home: Path | None = None) -> EndpointRecord | None:
    """The record of the endpoint with that id (16 bytes); `None` when there is none."""
    for record in list_records(home):
        if record.id == id:
            return record
    return None


def resolve(endpoint: str | uuid.UUID | bytes, home: Path | None = None) -> EndpointRecord:
    """The record of an endpoint, given its name, its id, or the id's text.

    Raises:
        NotFoundError: there is none; the message names those that are known.
        ConfigError: its record is damaged.
    """
    if isinstance(endpoint, str) and NAME_PATTERN.fullmatch(endpoint):
        try:
            record = read(endpoint, home)
        except ValueError:  # it reads like an id
            record = None
        if record is not None:
            return record
    try:
        id = ids.parse(endpoint)
    except (ValueError, TypeError, AttributeError):
        pass
    else:
        record = find(id, home)
        if record is not None:
            return record
    known = [record.name for record in list_records(home)]
    listed = f"known here: {', '.join(known)}" if known else "none is known here"
    wanted = ids.text(endpoint) if isinstance(endpoint, bytes) and len(endpoint) == 16 else str(endpoint)
    raise NotFoundError(
        f"there is no endpoint {wanted!r} in {endpoints_dir(home)} ({listed}). Start it with "
        f"'endpoint-worker start NAME', or set GCREF_HOME to the folder that has its record."
    )
