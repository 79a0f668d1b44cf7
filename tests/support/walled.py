"""Two sites behind firewalls, a hub and a broker that both can dial, and this process as their user.

    with WalledSites(folder) as sites:
        sites.net.open("polaris", "midway")
        sites.polaris.start(); sites.midway.start()
        with sites.client() as client, Executor("polaris", client) as a, Executor("midway", client) as b: …

Each site has a `GCREF_HOME` of its own, and so has this process: what they know of each other they know from the hub. They
share this machine's memory, so that `ipc` is taken from their ways.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from endpoint_worker.config_keys import template
from endpoint_worker.store.sweep import sweep
from gcref.config import disk_dir, host_dir
from gcref.directory import records
from tests.support.hub import Hub
from tests.support.netns import Net, Place
from tests.support.programs import environment
from tests.support.rabbit import Rabbit
from tests.support.waiting import patience, wait_until

if TYPE_CHECKING:
    from gcref import Client

USER: Final = "ada"
WAYS: Final = ("direct", "broker")


class Site:
    """One endpoint behind its firewall.

    Args:
        place: where it runs.
        home: its `GCREF_HOME`.
        hub: where it registers.
        settings: keys of its `config.toml`.

    Attributes:
        name: the endpoint's name, that of the place.
        id: its id, 16 bytes.
    """

    def __init__(self, place: Place, home: Path, hub: Hub, **settings: Any) -> None:
        self.name = place.name
        self.home = home
        self._place = place
        self._environment = environment() | {
            "GCREF_HOME": str(home),
            "GCREF_HUB_URL": hub.url,
            "GCREF_TOKEN": hub.token(USER),
        }
        self.run("endpoint_worker", "init", self.name)
        config = {"workers": 1, "carriers": list(WAYS), "trust_hub": True, "advertise": [place.address]}
        (home / "endpoints" / self.name / "config.toml").write_text(
            template(self.name, **{"bind": "0.0.0.0", **config, **settings})
        )
        record = records.read(self.name, home)
        assert record is not None
        self.id = record.id

    @property
    def pid(self) -> int:
        """Of its agent, while it runs."""
        record = records.read(self.name, self.home)
        assert record is not None
        return record.pid

    def run(self, module: str, *arguments: str, code: int = 0) -> str:
        """Run one of the commands at the site, and give what it prints.

        Args:
            module: `endpoint_worker` or `gcref.cli`.
            arguments: the command's own.
            code: the exit code that it is to have.
        """
        done = subprocess.run(
            self._place.command(sys.executable, "-m", module, *arguments),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=patience(60),
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self) -> None:
        """`endpoint-worker start`."""
        self.run("endpoint_worker", "start", self.name)

    def stop(self) -> None:
        """`endpoint-worker stop`, if it runs."""
        self.run("endpoint_worker", "stop", self.name)

    def kill(self) -> None:
        """`kill -9` of its agent."""
        os.kill(self.pid, signal.SIGKILL)

    def log(self) -> str:
        """What its agent has logged."""
        return (self.home / "endpoints" / self.name / "agent.log").read_text()

    def close(self) -> None:
        """Stop it, and take away what it would find at its next start."""
        import shutil

        self.stop()
        shutil.rmtree(disk_dir(self.id), ignore_errors=True)
        shutil.rmtree(host_dir(self.id), ignore_errors=True)
        sweep(host_dir(), disk_dir())


class WalledSites:
    """The whole scene. Nothing passes between polaris and midway, until `net.open`.

    Args:
        folder: for homes, settings and logs.
        settings: keys of both sites' `config.toml`.

    Attributes:
        net: the firewalls.
        rabbit, hub: run beside us.
        polaris, midway: made, and started.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._closing = ExitStack()
        try:
            self.net = self._closing.enter_context(Net())
            here = self.net.here.address
            self.rabbit = self._closing.enter_context(Rabbit(folder / "rabbit", here))
            self.hub = self._closing.enter_context(
                Hub(folder / "hub", self.rabbit, host=here, insecure=True, heartbeat_s=1)
            )
            self.polaris, self.midway = (
                Site(place, folder / place.name, self.hub, **settings)
                for place in (self.net.polaris, self.net.midway)
            )
            for site in (self.polaris, self.midway):
                self._closing.callback(site.close)
                site.start()
            directory = self.hub.client(USER)

            def are_known() -> bool:
                found = directory.endpoints()
                return len(found) == 2 and all(record.running and record.mailbox for record in found)

            wait_until(are_known, what="both endpoints to be registered, with mailboxes")
        except BaseException:
            self._closing.close()
            raise

    def client(self, user: str = USER, ways: tuple[str, ...] = WAYS) -> Client:
        """A client of this process, known to the hub by the user's token."""
        from gcref import Client

        return Client(self.hub.url, self.hub.token(user), carriers=ways)

    def close(self) -> None:
        """Take everything down."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
