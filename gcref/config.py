"""Limits, folders and the client's settings.

Settings come from, in this order: the argument of a call, the environment (`GCREF_HUB_URL`, `GCREF_TOKEN`,
`GCREF_CARRIERS`), the file `$GCREF_HOME/config.toml`, the default. Nothing is read at import, and nothing is
remembered: a change is seen by the next client.

    hub_url  = "https://hub.example.org"
    token    = "…"
    carriers = ["ipc", "direct", "broker"]
    endpoint_lost_s = 600    # how long an endpoint may be out of reach before its futures fail
    heartbeat_s     = 5      # silence after which it is asked for a sign of life; it is down after three times that

Two kinds of folders:

    home()        records, keys, configuration. It may lie on NFS or Lustre, seen by many machines.
    host_dir()    sockets, locks, segments. In shared memory of this very machine; gone after a restart.
    disk_dir()    journal, spilled objects. On a disk of this very machine; stays after a restart.

The folders of the machine are shared with strangers above us (`/dev/shm`, `/var/tmp`), so each is checked: a
real directory, ours, closed to others.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gcref.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

PROTOCOL_VERSION: Final = 1

# What rides inside a message. Above it, one copy through the store costs less than copies through every queue
# on the way.
INLINE_MAX_BYTES: Final = 100 * 1024
# One range of a transfer: large enough that its header and checksum vanish, small enough that many pulls can
# share a link.
CHUNK_BYTES: Final = 4 * 1024 * 1024
# Nothing larger than this is taken from the network as one message.
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
# A pickled exception above this comes back as its text only: exceptions always ride inside messages.
EXCEPTION_MAX_BYTES: Final = 64 * 1024
# What is kept of a traceback or a message of an exception, in characters.
EXCEPTION_TEXT_MAX: Final = 16 * 1024
# Tasks in one SUBMIT.
DEFAULT_BATCH: Final = 128
# The kernel's limit for the path of a Unix socket (`sun_path` without its final zero).
SOCKET_PATH_MAX_BYTES: Final = 107

# Silence after which a link is asked for a sign of life.
HEARTBEAT_S: Final = 5.0
# How long the pins of a vanished client, and tombstones, are kept: a night and a working day.
LEASE_S: Final = 86_400.0
# How long a subscription waits for the SUBMIT that makes its object.
UNKNOWN_OBJECT_S: Final = 600.0
# How long an endpoint may be out of reach before what depends on it is given up.
ENDPOINT_LOST_S: Final = 600.0
# How long workers outlive a dead agent.
ADOPT_S: Final = 60.0
# How long results and arguments wait for room in a full store.
STORE_WAIT_S: Final = 30.0
# How long `cancel` waits for the agent's answer.
CANCEL_WAIT_S: Final = 1.0
# How long the end of the interpreter may be held up by submits that are not acknowledged.
EXIT_FLUSH_S: Final = 5.0
# A task that runs for longer than this is reported as running.
STARTED_AFTER_S: Final = 0.05

CARRIERS: Final = frozenset(("ipc", "direct", "broker"))

_SHARED_MEMORY: Final = "/dev/shm"
_HOST_DISK: Final = "/var/tmp"
# Each starting agent sweeps once, and many may start at a time.
_MAKE_TRIES: Final = 100


class ClientConfig(NamedTuple):
    """The client's settings.

    Attributes:
        hub_url: address of the hub; None: there is no hub, only this machine and what the records name.
        token: proves to the hub who the user is; None: nobody.
        carriers: the ways that may be used.
        endpoint_lost_s: how long an endpoint may be out of reach before what is open there fails, seconds.
        heartbeat_s: silence after which an endpoint is asked for a sign of life, seconds.
    """

    hub_url: str | None
    token: str | None
    carriers: frozenset[str]
    endpoint_lost_s: float = ENDPOINT_LOST_S
    heartbeat_s: float = HEARTBEAT_S

    def __repr__(self) -> str:
        # The token is a secret; representations end up in logs.
        token = None if self.token is None else "…"
        return (
            f"ClientConfig(hub_url={self.hub_url!r}, token={token!r}, carriers={sorted(self.carriers)!r}, "
            f"endpoint_lost_s={self.endpoint_lost_s:g}, heartbeat_s={self.heartbeat_s:g})"
        )


def home() -> Path:
    """Give the folder of records, keys and configuration: `GCREF_HOME`, or `~/.gcref`.

    It is made, with mode 0700, if it is missing.

    Raises:
        ConfigError: it cannot be made, or is no directory.
    """
    named = os.environ.get("GCREF_HOME")
    folder = Path(named).expanduser() if named else Path.home() / ".gcref"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        remedy = "set GCREF_HOME to a folder that you can write to"
        raise _wrong(folder, "GCREF_HOME", f"cannot be made: {error.strerror}", remedy) from error
    return folder.absolute()


def client_config() -> ClientConfig:
    """Read the client's settings: `$GCREF_HOME/config.toml`, overridden by the environment.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or holds a key or a value that means nothing.
    """
    path = home() / "config.toml"
    table = _read_toml(path)
    unknown = sorted(table.keys() - set(ClientConfig._fields))
    if unknown:
        known = ", ".join(ClientConfig._fields)
        raise _wrong(path, unknown[0], "is not a known setting", f"remove it; known are {known}")
    hub_url = os.environ.get("GCREF_HUB_URL") or _text_setting(path, table, "hub_url")
    if hub_url is not None and not hub_url.startswith(("http://", "https://")):
        source: Path | str = "environment" if os.environ.get("GCREF_HUB_URL") else path
        raise _wrong(
            source, "hub_url", f"is {hub_url!r}", "write an address that starts with https:// or http://"
        )
    token = os.environ.get("GCREF_TOKEN") or _text_setting(path, table, "token")
    return ClientConfig(
        hub_url,
        token,
        _carriers_from_environment() or _carriers_from_file(path, table),
        _seconds_setting(path, table, "endpoint_lost_s", ENDPOINT_LOST_S),
        _seconds_setting(path, table, "heartbeat_s", HEARTBEAT_S),
    )


def carriers_allowed(explicit: Iterable[str] | None = None) -> frozenset[str]:
    """Decide which ways a party may use.

    The argument decides, else `GCREF_CARRIERS`, else the configuration; else all are allowed.

    Args:
        explicit: names out of `ipc`, `direct` and `broker`; None: not said.

    Raises:
        ConfigError: a name is unknown, or none is left.
    """
    if explicit is not None:
        names = (explicit,) if isinstance(explicit, str) else explicit
        return _check_carriers("argument", "carriers", names)
    allowed = _carriers_from_environment()
    if allowed is not None:
        return allowed
    path = home() / "config.toml"
    return _carriers_from_file(path, _read_toml(path))


def host_dir(party: bytes | None = None) -> Path:
    """Give the folder of a party in this machine's memory, made and checked.

    Until the party has its lock, a sweep takes a folder that is empty for one that is left; `claim` makes it again.

    Args:
        party: its id; None: the folder that holds the folders of all parties of this user.

    Raises:
        ConfigError: somebody else made it first, or it cannot be made.
    """
    return _own_dir(_memory_root(), party)


def disk_dir(party: bytes | None = None) -> Path:
    """Give the folder of a party on this machine's disk. Arguments and errors are those of `host_dir`."""
    return _own_dir(_HOST_DISK if _is_usable(_HOST_DISK) else _temporary_root(), party)


def _memory_root() -> str:
    return _SHARED_MEMORY if _is_usable(_SHARED_MEMORY) else _temporary_root()


def _temporary_root() -> str:
    # /tmp before $TMPDIR: the latter differs from job to job, and is often too long to hold a socket.
    if _is_usable("/tmp"):
        return "/tmp"
    import tempfile

    return tempfile.gettempdir()


def _is_usable(folder: str) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _own_dir(root: str, party: bytes | None) -> Path:
    folder = os.path.join(root, f"gcref-{os.geteuid()}")
    _make_own(folder)
    if party is not None:
        folder = os.path.join(folder, party.hex())
        _make_own(folder)
    return Path(folder)


def _make_own(folder: str) -> None:
    for _ in range(_MAKE_TRIES):
        with suppress(FileNotFoundError):  # it was empty, and swept as one that is left: made again
            _make(folder)
            _check_own(folder)
            return
    raise ConfigError(
        f"the folder {folder} is removed by others as often as it is made",
        file=folder,
        remedy="find who clears away there, and have this user's folders left alone",
    )


def _make(folder: str) -> None:
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder}: {error.strerror}",
            file=folder,
            remedy="make room or rights for this user there",
        ) from error


def _check_own(folder: str) -> None:
    # lstat: a symbolic link to a folder of ours is not a folder of ours.
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ConfigError(
            f"the folder {folder} belongs to somebody else; have it removed by them or by an administrator",
            file=folder,
            remedy="have it removed by its owner or by an administrator",
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        os.chmod(folder, 0o700)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _wrong(path, None, f"cannot be read: {error.strerror}", "make it readable for you") from error
    import tomllib

    try:
        return tomllib.loads(data.decode())
    except ValueError as error:
        raise _wrong(path, None, f"is no TOML: {error}", "correct it there") from error


def _text_setting(path: Path, table: dict[str, Any], key: str) -> str | None:
    value = table.get(key)
    if value is None or (isinstance(value, str) and value):
        return value
    raise _wrong(path, key, "must be a text that is not empty", "write it in quotes, or remove it")


def _seconds_setting(path: Path, table: dict[str, Any], key: str, default: float) -> float:
    value = table.get(key, default)
    if type(value) in (int, float) and 0.05 <= value < float("inf"):
        return float(value)
    raise _wrong(path, key, f"is {value!r}", "write a number of seconds, at least 0.05")


def _carriers_from_environment() -> frozenset[str] | None:
    names = os.environ.get("GCREF_CARRIERS")
    if not names:
        return None
    return _check_carriers("environment", "GCREF_CARRIERS", [name.strip() for name in names.split(",")])


def _carriers_from_file(path: Path, table: dict[str, Any]) -> frozenset[str]:
    names = table.get("carriers")
    if names is None:
        return CARRIERS
    if not isinstance(names, list):
        raise _wrong(path, "carriers", "must be a list", 'write for example carriers = ["direct", "broker"]')
    return _check_carriers(path, "carriers", names)


def _check_carriers(source: Path | str, key: str, names: Iterable[Any]) -> frozenset[str]:
    remedy = f"choose from {', '.join(sorted(CARRIERS))}"
    chosen = list(names)
    for name in chosen:
        if not isinstance(name, str) or name not in CARRIERS:
            raise _wrong(source, key, f"names {name!r}, which is no carrier", remedy)
    if not chosen:
        raise _wrong(source, key, "names no carrier", remedy)
    return frozenset(chosen)


def _wrong(source: Path | str, key: str | None, problem: str, remedy: str) -> ConfigError:
    subject = f"{source}" if key is None else f"{source}: {key}"
    return ConfigError(f"{subject} {problem}; {remedy}", file=str(source), key=key, remedy=remedy)
