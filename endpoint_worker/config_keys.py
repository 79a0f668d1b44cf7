"""The keys of an endpoint's `config.toml`: what each may hold, and the commented file that explains them.

    KEYS ── check ──► the values of an EndpointConfig (config.py)
         └─ template ──► the file that `endpoint-worker init` writes

One list has every key with its check, its default as a person would write it, and what it is for, so the
file cannot fall behind the code. A check takes a value as TOML or JSON gave it and returns the one that the
program uses; its `ValueError` says what the value must be, as the end of the sentence "it must be …".
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from gcref import config

LOG_LEVELS: Final = ("debug", "info", "warning", "error")

STORE_SHARE: Final = 0.4
"""The part of shared memory that one endpoint's store takes if not said: two of them fit on one machine."""

MAX_WORKERS: Final = 4096
"""More processes than this on one machine is a slip of the finger."""

_UNITS: Final = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B|)\s*")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOST: Final = re.compile(r"[A-Za-z0-9._:%-]+")


class Key(NamedTuple):
    """One key of the file.

    Attributes:
        name: the key, and the attribute of `EndpointConfig`.
        check: turns a plain value into the attribute's; `ValueError` says what the value must be.
        shown: the default, as the file would say it; an example, where the default depends on the machine.
        text: what it is for, one line or more.
    """

    name: str
    check: Callable[[Any], Any]
    shown: str
    text: str


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        # bool is an int to Python, and a slip to a person.
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def _seconds(low: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or value < low:
            raise ValueError(f"a number of seconds, at least {low:g}")
        return float(value)

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _choice(*names: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return str(value)

    return check


def size_bytes(value: Any) -> int:
    """A size: a whole number of bytes, or text such as `"8 GiB"` or `"500 MB"`.

    Raises:
        ValueError: it is neither, or it is 0.
    """
    size = value if type(value) is int else 0
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise ValueError('a size above 0, in bytes or as text such as "8 GiB" or "500 MB"')
    return size


def _carriers(value: Any) -> frozenset[str]:
    known = sorted(config.CARRIERS)
    if not isinstance(value, (list, tuple)) or not value or any(name not in known for name in value):
        raise ValueError(f"a list of at least one of {', '.join(known)}")
    return frozenset(value)


def _host(value: Any) -> str:
    if not isinstance(value, str) or not _HOST.fullmatch(value):
        raise ValueError("a host name, an address or an interface, without a port")
    return value


def _hosts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError("a list of host names or addresses, without ports")
    return tuple(_host(item) for item in value)


def _folder(value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError("the path of a folder")
    found = Path(os.path.expandvars(value)).expanduser()
    if not found.is_absolute():
        raise ValueError("an absolute path, or one that starts with ~ or a variable that is set")
    return found


def _variables(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str) and _VARIABLE.fullmatch(name) and isinstance(text, str) and "\0" not in text
        for name, text in value.items()
    ):
        raise ValueError("a table of variable names to texts")
    return dict(value)


def _devices(value: Any) -> tuple[str, ...]:
    if type(value) is int and 0 <= value <= MAX_WORKERS:
        return tuple(str(number) for number in range(value))
    if isinstance(value, (list, tuple)):
        found = tuple(str(item) for item in value if type(item) is int or (isinstance(item, str) and item))
        if len(found) == len(value):
            return found
    raise ValueError("the number of devices, or a list of their numbers or names")


KEYS: Final = (
    Key(
        "workers",
        _whole(1, MAX_WORKERS),
        "8",
        "Processes that run tasks, one task each at a time. If not said: the cores that the agent may use.",
    ),
    Key(
        "carriers",
        _carriers,
        '["ipc", "direct", "broker"]',
        "The ways it may use: ipc (same machine), direct (ZeroMQ over TCP), broker (AMQP mailbox).",
    ),
    Key(
        "bind",
        _host,
        '"127.0.0.1"',
        "Where to listen: an address or the name of a network interface. Every connection is encrypted, and\n"
        "only allowed keys get in.\n"
        '"127.0.0.1" is for this machine alone, "0.0.0.0" for every network that it is on.',
    ),
    Key(
        "port",
        _whole(0, 65535),
        "0",
        "The port for messages. 0 takes any that is free, which others read from the record; set it where a\n"
        "firewall lets only some ports through.",
    ),
    Key("bulk_port", _whole(0, 65535), "0", "The port for the bytes of large objects; as above."),
    Key(
        "advertise",
        _hosts,
        '["login1.example.org"]',
        "What others are to dial, for example when this machine is behind NAT. If not said: the addresses\n"
        "of this machine's interfaces.",
    ),
    Key(
        "store_limit_bytes",
        size_bytes,
        '"8 GiB"',
        "What the object store may hold in shared memory, in bytes or as text. Above it, objects go to\n"
        f"disk. If not said: {STORE_SHARE:.0%} of /dev/shm.",
    ),
    Key(
        "spill_dir",
        _folder,
        '"/var/tmp"',
        "Where objects go that do not fit in memory: a folder on a fast local disk. It may hold variables,\n"
        "such as $TMPDIR. If not said: the endpoint's own folder in /var/tmp.",
    ),
    Key(
        "store_wait_s",
        _seconds(0),
        f"{config.STORE_WAIT_S:g}",
        "How long, in seconds, results and arguments wait for room while memory and disk are full, before\n"
        "their tasks fail.",
    ),
    Key("journal", _flag, "true", "Write the log from which a restarted agent recovers its tasks."),
    Key(
        "journal_fsync",
        _flag,
        "false",
        "Flush the log to disk with each batch: survives power loss, not only the death of the process.",
    ),
    Key(
        "heartbeat_s",
        _seconds(0.05),
        f"{config.HEARTBEAT_S:g}",
        "Silence, in seconds, after which a link is asked for a sign of life; three missed ones end it.",
    ),
    Key(
        "endpoint_lost_s",
        _seconds(0.1),
        f"{config.ENDPOINT_LOST_S:g}",
        "How long, in seconds, another endpoint may be out of reach before tasks that need its data fail.",
    ),
    Key(
        "lease_s",
        _seconds(0.1),
        f"{config.LEASE_S:g}",
        "How long, in seconds, results are kept for a client that went away without a word.",
    ),
    Key(
        "unknown_object_s",
        _seconds(0.1),
        f"{config.UNKNOWN_OBJECT_S:g}",
        "How long, in seconds, a reference may wait for the submit that makes its object.",
    ),
    Key(
        "adopt_s",
        _seconds(0),
        f"{config.ADOPT_S:g}",
        "How long, in seconds, workers outlive a dead agent, for the next one to adopt.",
    ),
    Key(
        "worker_memory_bytes",
        size_bytes,
        '"16 GiB"',
        "What the tasks of one worker may take of memory, in bytes or as text, beside what the worker takes\n"
        "itself; arguments that lie in the store do not count. A task that wants more gets a MemoryError. If\n"
        "not said: no limit.",
    ),
    Key(
        "worker_env",
        _variables,
        '{ MPLBACKEND = "Agg" }',
        "Environment variables of the workers, beside those that the agent was started with.",
    ),
    Key(
        "omp_threads",
        _whole(1, MAX_WORKERS),
        "4",
        "OMP_NUM_THREADS of each worker. If not said: as the agent was started with, else an equal share of\n"
        "the cores.",
    ),
    Key(
        "gpus",
        _devices,
        "[]",
        "Devices, dealt out to the workers in turn: their number, or a list such as [0, 1] or of names.",
    ),
    Key(
        "trust_hub",
        _flag,
        "false",
        "Also let in those whom the hub names as you, or as users you shared this endpoint with.",
    ),
    Key("log_level", _choice(*LOG_LEVELS), '"info"', f"One of {', '.join(LOG_LEVELS)}."),
)
"""Every key there is, in the order in which the file explains them."""

BY_NAME: Final = {key.name: key for key in KEYS}


def template(name: str, **said: Any) -> str:
    """The text of a fresh `config.toml`: every key, explained; those that are said, in force.

    Args:
        name: the endpoint's name.
        said: keys to plain values.
    """
    lines = [
        f"# Endpoint {name}. Every key is optional; a line behind '#' shows its default, or an example.",
        f"# Changes are taken at the next start: endpoint-worker stop {name}; endpoint-worker start {name}",
    ]
    for key in KEYS:
        lines.append("")
        lines.extend(f"# {line}" for line in key.text.splitlines())
        if key.name in said:
            lines.append(f"{key.name} = {_toml(said[key.name])}")
        else:
            lines.append(f"#{key.name} = {key.shown}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # What the command line sets are texts, numbers and lists of them: JSON writes those as TOML does.
    return json.dumps(value)
