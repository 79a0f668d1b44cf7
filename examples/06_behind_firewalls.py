"""Two sites that cannot reach each other, and the pipeline of example 01 all the same.

Everything runs on this machine. As root on Linux each site gets a network of its own (a network namespace): it can dial
the hub and its broker, and nobody else; nobody can dial it. Without root the same is said to the sites in words:
`carriers = ["broker"]`. The broker is RabbitMQ, which the hub starts for itself (Debian, Ubuntu:
apt-get install rabbitmq-server; the hub's own packages: pip install 'gcref[hub]').

    this process, hub, broker  10.77.0.1 ──┬── 10.77.1.2  polaris
                                           └── 10.77.2.2  midway          no way from 10.77.1.0 to 10.77.2.0

    python3 examples/06_behind_firewalls.py [--files N]
"""

import argparse
import collections
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

INSIDE = "--inside"
"""Said by this program to itself, once it runs in a network of its own."""


def load_example(name: str) -> ModuleType:
    """An example as a module, whose name begins with a number."""
    spec = importlib.util.spec_from_file_location("two_sites", Path(__file__).with_name(name))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["two_sites"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------ networks


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def can_make_networks() -> bool:
    """Root may, if the kernel and a container around us let it."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    probe = f"gcref-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode == 0
    if made:
        run("ip", "netns", "del", probe)
    return made


@contextlib.contextmanager
def network_of(site: str, number: int) -> Iterator[list[str]]:
    """A network with one way out, to us. Gives the beginning of a command that runs there."""
    space = f"gcref-{os.getpid()}-{site}"
    run("ip", "netns", "add", space)
    try:
        run("ip", "link", "add", site, "type", "veth", "peer", "name", "wan", "netns", space)
        run("ip", "addr", "add", f"10.77.{number}.1/24", "dev", site)
        run("ip", "link", "set", site, "up")
        run("ip", "-n", space, "addr", "add", f"10.77.{number}.2/24", "dev", "wan")
        for device in ("lo", "wan"):
            run("ip", "-n", space, "link", "set", device, "up")
        run("ip", "-n", space, "route", "add", "default", "via", f"10.77.{number}.1")
        yield ["ip", "netns", "exec", space]
    finally:
        run("ip", "netns", "del", space)


# ------------------------------------------------------------------------------------ hub and sites


@contextlib.contextmanager
def hub(folder: Path, host: str) -> Iterator[dict[str, str]]:
    """A hub with a broker and one user. Gives the settings with which everybody finds it."""
    settings = folder / "hub.toml"
    settings.write_text(f'host = "{host}"\nport = 0\ninsecure = true\n\n[broker]\nstart = true\nport = 0\n')
    gcref = [sys.executable, "-m", "gcref.cli"]
    with open(folder / "hub.log", "w") as log:
        process = subprocess.Popen(
            [*gcref, "hub", "start", "--config", str(settings)], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # gcref hub: ready at http://…
            if not line:
                sys.exit(f"the hub did not start:\n{(folder / 'hub.log').read_text()}")
            token = subprocess.run(
                [*gcref, "hub", "user", "add", "you", "--config", str(settings)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                check=True,
            ).stdout
            yield {"GCREF_HUB_URL": line.split()[-1], "GCREF_TOKEN": token.strip()}
        finally:
            process.terminate()
            process.communicate()


@contextlib.contextmanager
def endpoint(
    name: str, home: Path, settings: dict[str, str], carriers: list[str], prefix: list[str]
) -> Iterator[None]:
    """An endpoint as its owner runs it, with a GCREF_HOME of its own: of others it knows what the hub says."""
    worker = [*prefix, sys.executable, "-m", "endpoint_worker"]
    environment = os.environ | settings | {"GCREF_HOME": str(home)}

    def do(*arguments: str) -> None:
        subprocess.run([*worker, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)

    do("init", name, "--workers", "1")
    with open(home / "endpoints" / name / "config.toml", "a") as config:
        config.write(f"carriers = {carriers}\ntrust_hub = true\njournal = false\n".replace("'", '"'))
    do("start", name)
    try:
        yield
    finally:
        do("stop", name)


def wait_for(*names: str) -> None:
    """Until the hub knows the endpoints, which tell it a moment after their start."""
    import time

    from gcref.directory.hub import HubClient
    from gcref.errors import NotFoundError

    directory = HubClient(os.environ["GCREF_HUB_URL"], os.environ["GCREF_TOKEN"])
    for name in names:
        while True:
            try:
                if directory.find(name).running:
                    break
            except NotFoundError:
                time.sleep(0.1)
    directory.close()


# ------------------------------------------------------------------------------------ the pipeline


def pipeline(limit: int | None) -> None:
    """Example 01 again: nothing in it knows where the sites are."""
    from gcref import Client, Executor

    example = load_example("01_two_sites.py")
    root = sysconfig.get_path("stdlib")
    shards = example.deal(example.find_files(root, limit))
    with (
        Client() as client,
        Executor("polaris", client, ship_modules=[example]) as polaris,
        Executor("midway", client, ship_modules=[example]) as midway,
    ):
        ran = example.by_reference(polaris, midway, root, shards)
        example.tell("\n")
        print("\n".join(["", *ran.answer, ""]))
        show(ran, client.payload_bytes())
        print("\nWhy this way:", *ran.summaries[-1].explain().splitlines()[1:], sep="\n")


def show(ran: Any, carried: dict[str, int]) -> None:
    """Bytes by carrier."""
    between: collections.Counter[str] = collections.Counter()
    for future in ran.summaries:
        between.update(future.record.pulled_bytes)
    print(f"{'':10}{'polaris → midway':>20}{'through the client':>22}")
    for carrier in ("ipc", "direct", "broker"):
        print(f"{carrier:10}{between[carrier] / 1e6:>17.1f} MB{carried.get(carrier, 0) / 1e6:>19.1f} MB")
    print(f"{len(ran.tables)} tasks at polaris, {len(ran.summaries)} at midway, {ran.seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, metavar="N", help="read only so many files")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if not said.inside and can_make_networks():
        # In a network of our own: whatever is made there goes with it, and this machine's is not touched.
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv, INSIDE])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gcref-")))
        prefixes: list[list[str]] = [[], []]
        host, carriers = "127.0.0.1", ["broker"]
        if said.inside:
            host, carriers = "10.77.0.1", ["direct", "broker"]
            run("ip", "link", "set", "lo", "up")
            run("ip", "addr", "add", f"{host}/32", "dev", "lo")
            prefixes = [
                stack.enter_context(network_of(site, number))
                for number, site in enumerate(("polaris", "midway"), 1)
            ]
            print(
                "polaris and midway each have a network of their own, from which only the hub can be dialled"
            )
        else:
            print('no root: polaris and midway are told to use the broker alone (carriers = ["broker"])')
        settings = stack.enter_context(hub(folder, host))
        os.environ.update(settings, GCREF_HOME=str(folder / "home"), GCREF_CARRIERS=",".join(carriers))
        for site, prefix in zip(("polaris", "midway"), prefixes, strict=True):
            stack.enter_context(endpoint(site, folder / site, settings, carriers, prefix))
        wait_for("polaris", "midway")
        pipeline(said.files)


if __name__ == "__main__":
    main()
