"""What an endpoint is told: the settings of its `config.toml`, and what they are when not said.

    config.toml ── load ──► table ── from_table ──► EndpointConfig ──► agent
    LocalEndpoint(config=…) ──┘ (the same table, by way of the agent's standard input)

Rules:
    - Everything is checked when an endpoint starts, never later. A wrong key or value is a `ConfigError` that
      names the file, the key, the nearest known key and the remedy.
    - What each key may hold is the matter of `config_keys`. An absent key is the same as one at its default.
    - Defaults that depend on the machine (cores, shared memory) are taken when the table is read, on the
      machine where the endpoint runs: login nodes and compute nodes share these files.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endpoint_worker.config_keys import BY_NAME, STORE_SHARE
from gcref import config
from gcref.errors import ConfigError


def cpu_count() -> int:
    """The cores that this process may use: a batch job or a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0))


def default_store_limit() -> int:
    """The store's limit in bytes when none is set: a share of this machine's shared memory."""
    found = os.statvfs("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp")
    return int(found.f_blocks * found.f_frsize * STORE_SHARE)


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointConfig:
    """The checked settings of one endpoint, one attribute for each key; durations are in seconds.

    Attributes:
        workers: processes that run tasks.
        carriers: the ways this endpoint may use; `None`: as `GCREF_CARRIERS` or the client's configuration
            say, else all.
        bind: the address, or the name of the network interface, that it listens on.
        port: TCP port for messages; 0: any that is free.
        bulk_port: TCP port for the bytes of large objects; 0: any that is free.
        advertise: host names or addresses that others are told to dial; empty: found out from `bind`.
        store_limit_bytes: what the object store may hold in shared memory.
        spill_dir: where objects go that do not fit; `None`: the endpoint's folder on this machine's disk.
        store_wait_s: how long results and pulls wait for room while memory and disk are full.
        journal: write the log from which a restarted agent recovers.
        journal_fsync: survive power loss too, at the price of a disk flush for each batch.
        heartbeat_s: silence after which a link is asked for a sign of life.
        endpoint_lost_s: how long another endpoint may be out of reach before tasks that need it fail.
        lease_s: how long a vanished client's results are kept.
        unknown_object_s: how long a reference may wait for the submit that makes its object.
        adopt_s: how long workers outlive a dead agent.
        worker_memory_bytes: what the tasks of one worker may take of memory; `None`: no limit.
        worker_env: environment variables of the workers.
        omp_threads: `OMP_NUM_THREADS` of a worker; `None`: as the environment says, else an equal share of
            the cores.
        gpus: the devices, dealt out to the workers in turn; empty: visibility is left as it is.
        trust_hub: also let in those whom the hub names as the owner's or as users it is shared with.
        log_level: one of `LOG_LEVELS`.
    """

    workers: int = dataclasses.field(default_factory=cpu_count)
    carriers: frozenset[str] | None = None
    bind: str = "127.0.0.1"
    port: int = 0
    bulk_port: int = 0
    advertise: tuple[str, ...] = ()
    store_limit_bytes: int = dataclasses.field(default_factory=default_store_limit)
    spill_dir: Path | None = None
    store_wait_s: float = config.STORE_WAIT_S
    journal: bool = True
    journal_fsync: bool = False
    heartbeat_s: float = config.HEARTBEAT_S
    endpoint_lost_s: float = config.ENDPOINT_LOST_S
    lease_s: float = config.LEASE_S
    unknown_object_s: float = config.UNKNOWN_OBJECT_S
    adopt_s: float = config.ADOPT_S
    worker_memory_bytes: int | None = None
    # May hold secrets, and a repr ends up in a log.
    worker_env: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    omp_threads: int | None = None
    gpus: tuple[str, ...] = ()
    trust_hub: bool = False
    log_level: str = "info"

    @classmethod
    def from_table(
        cls, table: Mapping[str, Any], file: str | Path = "the endpoint's configuration"
    ) -> EndpointConfig:
        """The settings that a table holds, as TOML or JSON gave it.

        Args:
            table: keys to plain values; what is absent keeps its default.
            file: where the table came from, for the error.

        Raises:
            ConfigError: an unknown key, or a value that the key cannot take.
        """
        values: dict[str, Any] = {}
        for key, value in table.items():
            known = BY_NAME.get(key)
            if known is None:
                raise _wrong(file, key, "is not a known key", _nearest(key))
            try:
                values[key] = known.check(value)
            except ValueError as error:
                raise _wrong(file, key, f"is {value!r}", f"it must be {error}") from None
        checked = cls(**values)
        if checked.port and checked.port == checked.bulk_port:
            raise _wrong(
                file, "bulk_port", f"is {checked.port}, the same as port", "choose two ports, or 0 for any"
            )
        if checked.heartbeat_s >= checked.endpoint_lost_s:
            raise _wrong(
                file,
                "endpoint_lost_s",
                f"is {checked.endpoint_lost_s:g}, which is not above heartbeat_s ({checked.heartbeat_s:g})",
                "silence is noticed after three heartbeats: make it a few times heartbeat_s",
            )
        return checked

    @classmethod
    def load(cls, path: Path) -> EndpointConfig:
        """The settings in a file.

        Raises:
            ConfigError: the file is missing, is no TOML, or holds a wrong key or value.
        """
        return cls.from_table(read_table(path), path)

    def listen_address(self, port: int = 0) -> str:
        """Where the socket for messages is to listen, as ZeroMQ writes it; on `port`, if any will do."""
        return _tcp(self.bind, self.port or port or "*")

    def bulk_listen_address(self, port: int = 0) -> str:
        """Where the socket for bulk is to listen, as ZeroMQ writes it; on `port`, if any will do."""
        return _tcp(self.bind, self.bulk_port or port or "*")

    def advertised(self, bound: str) -> tuple[str, ...]:
        """What others are to dial, best first.

        Args:
            bound: the address that a socket was bound to, with its real port: `tcp://0.0.0.0:41234`.
        """
        host, _, port = bound.removeprefix("tcp://").rpartition(":")
        if self.advertise:
            return tuple(_tcp(name, port) for name in self.advertise)
        if host in ("0.0.0.0", "*", "[::]"):
            return tuple(_tcp(address, port) for address in interface_addresses())
        return (bound,)

    def environment(self, worker: int) -> dict[str, str]:
        """The variables that a worker gets beside those of its agent.

        Args:
            worker: its number, from 1; devices are dealt out by it.
        """
        # What the agent was started with is not ours to judge: "4,2" is a number of threads too.
        found = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(self._share())}
        found.update(self.worker_env)
        if self.omp_threads is not None:
            found["OMP_NUM_THREADS"] = str(self.omp_threads)
        if self.gpus:
            device = self.gpus[(worker - 1) % len(self.gpus)]
            # In this order for NVIDIA's, AMD's and Intel's runtimes.
            found.update(CUDA_VISIBLE_DEVICES=device, HIP_VISIBLE_DEVICES=device, ZE_AFFINITY_MASK=device)
        return found

    def _share(self) -> int:
        """An equal share of the cores."""
        return max(1, cpu_count() // self.workers)


def interface_addresses() -> tuple[str, ...]:
    """The IPv4 addresses of this machine that others may reach it by; the loopback's if there is no other.

    Bridges of containers and virtual machines are left out: they have the same address on many machines.
    """
    import fcntl
    import socket
    import struct

    siocgifaddr = 0x8915
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            if name.startswith(("docker", "virbr", "br-", "veth")):
                continue
            try:
                answer = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface that is down or has no IPv4 address
            found.append(socket.inet_ntoa(answer[20:24]))
    outside = [address for address in found if not address.startswith("127.")]
    return tuple(outside) or ("127.0.0.1",)


def read_table(path: Path) -> dict[str, Any]:
    """The plain table in a TOML file.

    Raises:
        ConfigError: the file is missing, cannot be read, or is no TOML.
    """
    import tomllib

    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        name = path.parent.name
        raise _wrong(path, None, "is missing", f"'endpoint-worker init {name}' writes one") from error
    except OSError as error:
        raise _wrong(path, None, f"cannot be read: {error.strerror}", "make it readable for you") from error
    try:
        return tomllib.loads(data.decode())
    except ValueError as error:
        raise _wrong(path, None, f"is no TOML: {error}", "correct it there") from error


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key, BY_NAME, n=1, cutoff=0.5) or [
        name for name in BY_NAME if key and (name.startswith(key) or name.endswith(key))
    ]
    if near:
        return f"did you mean {near[0]!r}? Otherwise remove it"
    return f"remove it; known are {', '.join(BY_NAME)}"


def _wrong(file: str | Path, key: str | None, problem: str, remedy: str) -> ConfigError:
    subject = str(file) if key is None else f"{file}: {key}"
    return ConfigError(f"{subject} {problem}; {remedy}", file=str(file), key=key, remedy=remedy)


def _tcp(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"
