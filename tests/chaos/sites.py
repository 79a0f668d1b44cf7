"""Real endpoints, each in a `GCREF_HOME` of its own, and a link of its own for each pair that talks.

    client ──► proxies client>a ──► a ◄── proxies b>a ◄── b
           └─► proxies client>b ──► b ◄── proxies a>b ◄── a

Endpoints are made, started and stopped by the command `endpoint-worker`, as their owner would. They know each other only by
records that lead through the proxies; only the client's records also have the `ipc` addresses, for the runs that use them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil

from endpoint_worker import status
from gcref import config, ids
from gcref.carriers import keys
from gcref.directory import records
from gcref.directory.records import EndpointRecord
from gcref.errors import GcrefError
from tests.support.ports import free_ports
from tests.support.proxy import Proxy
from tests.support.waiting import patience, wait_until

CLIENT: Final = "client"
NAMES: Final = ("a", "b", "c")
WORKERS: Final = 2

MARK: Final = "GCREF_CHAOS_SITE"
"""The environment variable by which a site's processes are known, also those that outlive their agent."""

_ROOT: Final = Path(__file__).resolve().parents[2]
_COMMAND_S: Final = 60.0


class Link:
    """The way from one party to a site: a proxy for messages and one for bulk.

    Args:
        control: where the site listens for messages.
        bulk: where it listens for bulk.
    """

    def __init__(self, control: str, bulk: str) -> None:
        self.control = Proxy(control)
        self.bulk = Proxy(bulk)

    def of(self, plane: str) -> tuple[Proxy, ...]:
        """The proxies of a plane: `control`, `bulk` or `both`."""
        return {"control": (self.control,), "bulk": (self.bulk,), "both": (self.control, self.bulk)}[plane]

    def heal(self) -> None:
        """Make it a good link again."""
        for proxy in self.of("both"):
            proxy.delay_s = 0.0
            proxy.thaw()
            proxy.restore()

    def close(self) -> None:
        """End it."""
        for proxy in self.of("both"):
            proxy.close()


class Site:
    """One endpoint.

    Args:
        name: what to call it.
        home: its `GCREF_HOME`.
        ports: for messages and for bulk; it has the same ones after each restart.
        settings: keys of its `config.toml`.
    """

    def __init__(self, name: str, home: Path, ports: tuple[int, int], settings: dict[str, Any]) -> None:
        self.name = name
        self.home = home
        self.mark = f"{name}-{uuid.uuid4().hex}"
        self._port, self._bulk_port = ports
        self.settings = dict(settings)
        self._restart: threading.Thread | None = None
        self.problems: list[str] = []

    def make(self, client_key: bytes) -> None:
        """Make its folder; `client_key` may use it."""
        ports = ("--port", str(self._port), "--bulk-port", str(self._bulk_port))
        self.command("init", "--workers", str(WORKERS), "--bind", "127.0.0.1", *ports)
        folder = records.endpoint_dir(self.name, self.home)
        with (folder / "config.toml").open("a", encoding="utf-8") as file:
            file.writelines(f"{key} = {json.dumps(value)}\n" for key, value in self.settings.items())
        with (folder / "authorized_keys").open("a", encoding="ascii") as file:
            file.write(f"{client_key.decode()} user {CLIENT}\n")

    def command(self, verb: str, *arguments: str) -> None:
        """Run `endpoint-worker VERB NAME`.

        Raises:
            AssertionError: it failed.
        """
        environment = {
            **os.environ,
            "GCREF_HOME": str(self.home),
            MARK: self.mark,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        }
        done = subprocess.run(
            [sys.executable, "-m", "endpoint_worker", verb, self.name, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience(_COMMAND_S),
            check=False,
        )
        assert done.returncode == 0, f"endpoint-worker {verb} {self.name}: {done.stdout}{done.stderr}"

    @property
    def record(self) -> EndpointRecord:
        """What it says of itself."""
        found = records.read(self.name, self.home)
        assert found is not None
        return found

    @property
    def addresses(self) -> tuple[str, str]:
        """Where it listens, now and after each restart: for messages, for bulk."""
        return f"tcp://127.0.0.1:{self._port}", f"tcp://127.0.0.1:{self._bulk_port}"

    def is_alive(self) -> bool:
        """Whether its agent runs."""
        return self.record.alive() is True

    def workers(self) -> list[psutil.Process]:
        """Its workers, in the order of their age, whether their agent lives or not."""
        found = [process for process in self.processes() if _is_worker(process.pid)]
        return sorted(found, key=lambda process: process.pid)

    def processes(self) -> Iterator[psutil.Process]:
        """All of its processes."""
        needle = f"{MARK}={self.mark}".encode()
        for pid in psutil.pids():
            try:
                process = psutil.Process(pid)
                if needle in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    yield process
            except (OSError, psutil.Error):
                continue

    def signal_agent(self, number: int) -> int:
        """Send its agent a signal; gives the process id."""
        pid = self.record.pid
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(number)
        return pid

    def await_death(self) -> None:
        """Wait until its agent is gone."""
        wait_until(lambda: not self.is_alive(), what=f"the death of the agent of {self.name}")

    def restart(self, then: Any) -> None:
        """Start its agent in the background, and call `then` when it serves."""

        def start() -> None:
            try:
                self.command("start")
                then()
            except (AssertionError, GcrefError, subprocess.TimeoutExpired) as error:
                self.problems.append(f"it cannot be started again: {error}")

        self._restart = threading.Thread(target=start, name=f"restart-{self.name}")
        self._restart.start()

    def is_restarting(self) -> bool:
        """Whether a restart is under way."""
        return self._restart is not None and self._restart.is_alive()

    def await_restart(self) -> None:
        """Wait for the restart that is under way."""
        if self._restart is not None:
            self._restart.join()

    def complaints(self) -> Iterator[tuple[str, str]]:
        """What its log holds that ought not to be there: level and text."""
        log = records.endpoint_dir(self.name, self.home) / "agent.log"
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
            try:
                told = json.loads(line)
            except ValueError:
                yield "raw", line
                continue
            if told["level"] in ("error", "critical") or "traceback" in told:
                yield told["level"], f"{told['text']}\n{told.get('traceback', '')}"

    def dumped(self) -> list[str]:
        """Have its agent write its state into its log, and give that, line by line."""
        log = records.endpoint_dir(self.name, self.home) / "agent.log"

        def lines() -> list[str]:
            return [line for line in log.read_text(errors="replace").splitlines() if '"gcref.dump"' in line]

        before = len(lines())
        self.signal_agent(signal.SIGUSR1)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: any("state of resolver" in line for line in lines()[before:]), what="the dump")
        return lines()[before:]

    def kill_all(self) -> None:
        """End what is left of it, whatever that is."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class World:
    """A client's view of some sites, with a link for each pair of parties.

    Args:
        folder: where everything goes.
        count: how many sites.
        settings: keys of the sites' configuration.
    """

    def __init__(self, folder: Path, count: int, settings: dict[str, Any]) -> None:
        self.home = folder / CLIENT
        self.disks = folder / "disks"
        self.effects = folder / "effects"
        self.effects.mkdir()
        self.links: dict[str, Link] = {}
        ports = free_ports(2 * count)
        settings = {**settings, "carriers": ["ipc", "direct"]}
        self.sites = [
            Site(name, folder / name, (ports.pop(), ports.pop()), settings) for name in NAMES[:count]
        ]
        self._mounted: list[Path] = []

    def open(self, *, small_disks: int = 0) -> None:
        """Make and start everything.

        Args:
            small_disks: bytes of a disk of its own for each site's store; 0: the machine's.
        """
        client = keys.load_or_create(self.home / "keys" / "user.key")
        if small_disks:
            self._mount(small_disks)
        _all_at_once([lambda site=site: self._make(site, client.public) for site in self.sites])
        for site in self.sites:
            for who in (CLIENT, *(other.name for other in self.sites if other is not site)):
                self.links[f"{who}>{site.name}"] = Link(*site.addresses)
            self.introduce(site)

    def _make(self, site: Site, client_key: bytes) -> None:
        site.make(client_key)
        site.command("start")

    def _mount(self, size: int) -> None:
        for site in self.sites:
            place = self.disk_of(site)
            place.mkdir(parents=True)
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "gcref-chaos", str(place)],
                check=True,
            )
            self._mounted.append(place)
            site.settings["spill_dir"] = str(place)

    def disk_of(self, site: Site) -> Path:
        """Where the disk of a site's store is, if it has one of its own."""
        return self.disks / site.name

    def introduce(self, site: Site) -> None:
        """Tell the others how to reach a site: as it is now, and through their own links."""
        record = site.record
        for who, home in ((CLIENT, self.home), *((o.name, o.home) for o in self.sites if o is not site)):
            link = self.links[f"{who}>{site.name}"]
            is_client = who == CLIENT
            told = dataclasses.replace(
                record,
                control=(*(_ipc_of(record.control) if is_client else ()), link.control.address),
                bulk=(*(_ipc_of(record.bulk) if is_client else ()), link.bulk.address),
                host_nonce=record.host_nonce if is_client else "",
            )
            records.write(told, home)

    def site(self, name: str) -> Site:
        """The site of that name."""
        return self.sites[NAMES.index(name)]

    def ask(self, site: Site) -> dict[str, Any]:
        """What `endpoint-worker status` shows."""
        return status.ask(site.record)

    def heal(self) -> None:
        """Undo what is broken: links are good, whoever was frozen goes on, every agent runs."""
        for link in self.links.values():
            link.heal()
        for site in self.sites:
            for process in site.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
            site.await_restart()

    def close(self) -> list[str]:
        """Stop everything, in order where that is possible.

        Returns:
            What went wrong with that.
        """
        wrong: list[str] = []
        for site in self.sites:
            site.await_restart()
            try:
                if records.read(site.name, site.home) is not None and site.is_alive():
                    site.command("stop")
            except (AssertionError, GcrefError, subprocess.TimeoutExpired) as error:
                wrong.append(f"{site.name}: {error}")
        for link in self.links.values():
            link.close()
        for place in self._mounted:
            subprocess.run(["umount", "-l", str(place)], check=False)
        return wrong

    def sweep(self) -> None:
        """Take away what a run leaves that went wrong, and the journals, which wait for a next start."""
        for site in self.sites:
            site.kill_all()
            record = records.read(site.name, site.home)
            if record is not None:
                for root in (config.host_dir(None), config.disk_dir(None)):
                    shutil.rmtree(root / record.id.hex(), ignore_errors=True)

    def ids(self) -> list[str]:
        """The ids of the sites, as text."""
        return [ids.text(site.record.id) for site in self.sites]


def _ipc_of(addresses: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(address for address in addresses if address.startswith("ipc://"))


def _is_worker(pid: int) -> bool:
    # Each leads a process group of its own, in the session that the one leads who forks them all.
    try:
        return os.getpgid(pid) == pid != os.getsid(pid)
    except OSError:
        return False


def _all_at_once(works: list[Any]) -> None:
    """Do some slow things side by side; raises the first error."""
    errors: list[BaseException] = []

    def do(work: Any) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that asked
            errors.append(error)

    threads = [threading.Thread(target=do, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
