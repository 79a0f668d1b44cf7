"""Sites in networks of their own, on one machine: network namespaces, and a firewall between them.

    this process ── here ──┐                    ┌── polaris
    hub, RabbitMQ, client  │      router        │
                           ├── forwards what ───┤
                           │   was allowed      └── midway

    with Net() as net:                       # nothing passes between the sites; both can dial us
        net.open("polaris", "midway")        # what polaris dials at midway passes, and the answers to it
        net.close("polaris", "midway")       # nothing passes any more, of open connections neither
        subprocess.run(net.polaris.command("endpoint-worker", "start", "polaris"))

A firewall drops silently, as real ones do: who dials waits for an answer that never comes. Everything is made by `ip` and `nft`
as root, carries this process's id in its name, and goes with it; what a killed run left is swept by the next one.
"""

from __future__ import annotations

import ipaddress
import os
import random
import re
import subprocess
from collections.abc import Iterator
from types import TracebackType
from typing import Final, NamedTuple, Self

HERE: Final = "here"
SITES: Final = ("polaris", "midway")

_PREFIX: Final = "gcref-net-"  # namespaces: gcref-net-PID-PLACE; the interface beside us: gcrPID
_LINK_HERE: Final = "gcr"


class Place(NamedTuple):
    """One end of the network.

    Attributes:
        name: `here`, or the site's.
        address: its IP address, which everybody else may be told.
        namespace: its network namespace; empty: this process's own.
    """

    name: str
    address: str
    namespace: str

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command there; its process is the very command."""
        return ["ip", "netns", "exec", self.namespace, *command] if self.namespace else list(command)


class Net:
    """Two sites, this process, and a router between them that drops what nobody has allowed.

    Attributes:
        here: where this process is. The sites can always dial it, as they would dial a hub.
        polaris, midway: the sites.
    """

    def __init__(self) -> None:
        if (why := missing()) is not None:
            raise RuntimeError(why)
        self._open: dict[tuple[str, str], int | None] = {}
        self._made = False
        self._router = f"{_PREFIX}{os.getpid()}-router"
        self._link = f"{_LINK_HERE}{os.getpid()}"
        _sweep()
        self._subnet = _free_subnet()
        places = [
            Place(name, str(self._addresses(number)[1]), "" if name == HERE else self._name_of(name))
            for number, name in enumerate((HERE, *SITES))
        ]
        self.here, self.polaris, self.midway = places
        self._places = {place.name: place for place in places}

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.close_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_all()

    def open(self, caller: str, called: str, mbytes_per_s: int | None = None) -> None:
        """Let pass what `caller` dials at `called` (names of places), and the answers to it.

        Args:
            caller: who may dial.
            called: whom.
            mbytes_per_s: no more than that passes in a second, in each direction; None: whatever comes.
        """
        self._open[self._places[caller].name, self._places[called].name] = mbytes_per_s
        self._apply()

    def close(self, one: str, other: str) -> None:
        """Let nothing pass between two places any more, whoever dialled, also of connections that are open."""
        self._open.pop((one, other), None)
        self._open.pop((other, one), None)
        self._apply()

    def close_all(self) -> None:
        """Take everything down. What runs there loses its network. Idempotent."""
        for place in (*SITES, "router"):
            # Its end of each pair goes with a namespace, and so does the other.
            subprocess.run(["ip", "netns", "del", self._name_of(place)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._link], capture_output=True, check=False)

    # --------------------------------------------------------------------------------------------------- making

    def _name_of(self, place: str) -> str:
        return f"{_PREFIX}{os.getpid()}-{place}"

    def _addresses(self, number: int) -> list[ipaddress.IPv4Address]:
        """Two addresses: the router's end of a place's link, and the place's own."""
        (first, second) = list(list(self._subnet.subnets(new_prefix=30))[number].hosts())
        return [first, second]

    def _make(self) -> None:
        _ip("netns", "add", self._router)
        in_router = ("-n", self._router)
        _ip(*in_router, "link", "set", "lo", "up")
        for number, place in enumerate(self._places.values()):
            gateway, address = self._addresses(number)
            if place.namespace:
                _ip("netns", "add", place.namespace)
                inside: tuple[str, ...] = ("-n", place.namespace)
                link = "wan"
                _ip(
                    *in_router,
                    "link",
                    "add",
                    place.name,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    link,
                    "netns",
                    place.namespace,
                )
                _ip(*inside, "link", "set", "lo", "up")
            else:
                inside, link = (), self._link
                _ip("link", "add", link, "type", "veth", "peer", "name", place.name, "netns", self._router)
            _ip(*in_router, "addr", "add", f"{gateway}/30", "dev", place.name)
            _ip(*in_router, "link", "set", place.name, "up")
            _ip(*inside, "addr", "add", f"{address}/30", "dev", link)
            _ip(*inside, "link", "set", link, "up")
            _ip(*inside, "route", "add", str(self._subnet), "via", str(gateway))
        self._apply()
        _run("ip", "netns", "exec", self._router, "sysctl", "-qw", "net.ipv4.ip_forward=1")

    def _apply(self) -> None:
        """Have the router's firewall be as we want it, in one step."""
        rules = []
        ways = dict.fromkeys(((site, HERE) for site in SITES), None) | self._open
        for (caller, called), most in ways.items():
            if most is not None:
                over = f"limit rate over {most} mbytes/second burst 1 mbytes drop"
                rules += [
                    f'iifname "{a}" oifname "{b}" {over}' for a, b in ((caller, called), (called, caller))
                ]
            rules.append(f'iifname "{caller}" oifname "{called}" accept')
            rules.append(f'iifname "{called}" oifname "{caller}" ct state established,related accept')
        text = "\n".join(
            (
                "table ip sites",
                "delete table ip sites",
                "table ip sites {",
                "  chain between { type filter hook forward priority 0; policy drop;",
                *(f"    {rule};" for rule in rules),
                "  }",
                "}\n",
            )
        )
        _run("ip", "netns", "exec", self._router, "nft", "-f", "-", told=text)


def missing() -> str | None:
    """What this machine lacks for such networks, in a sentence; None: nothing."""
    if os.geteuid() != 0:
        return "network namespaces are made by root, which this is not"
    for command in ("ip", "nft"):
        if not _is_there(command):
            return f"the command {command!r} is missing (packages iproute2 and nftables)"
    return None


def _is_there(command: str) -> bool:
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return any(os.access(os.path.join(folder, command), os.X_OK) for folder in folders)


def _sweep() -> None:
    """Take down what runs left that were killed."""
    shown = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for line in shown.splitlines():
        name = line.partition(" ")[0]
        if (found := re.fullmatch(rf"{_PREFIX}(\d+)-\w+", name)) and not os.path.exists(f"/proc/{found[1]}"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _free_subnet() -> ipaddress.IPv4Network:
    """A network of 16 addresses that no route of this machine leads to, nor another run uses."""
    taken = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout
    for _ in range(1000):
        found = ipaddress.ip_network(f"10.{random.randrange(64, 128)}.{random.randrange(256)}.0/28")
        assert isinstance(found, ipaddress.IPv4Network)
        if not any(found.overlaps(network) for network in _networks_in(taken)):
            return found
    raise RuntimeError("no network of 10.64.0.0/10 is free here")


def _networks_in(routes: str) -> Iterator[ipaddress.IPv4Network]:
    for line in routes.splitlines():
        try:
            yield ipaddress.IPv4Network(line.split()[0])
        except (ValueError, IndexError):
            continue  # "default", "unreachable", …


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str, told: str | None = None) -> None:
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
