"""The command `gcref`: what a user asks on the client's side.

    gcref endpoints       the endpoints that this GCREF_HOME knows, and those that the hub knows for you
    gcref explain TASK    where a task is, what it waits for, since when, and which attempts failed
    gcref doctor A [B]    which ways lead to an endpoint, or between two; how fast they are, and why others fail
    gcref trust NAME      believe the hub that an endpoint has another key than at first contact
    gcref key             the user's public key, for somebody's authorized_keys
    gcref hub …           run a hub, and keep its users
    gcref share E USER    let a user of the hub use an endpoint of yours; `unshare` takes it back
    gcref version         versions, for a report

Exit codes: 0 done · 1 it could not be done, stderr says why · 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final

from gcref import config, ids
from gcref.directory import records
from gcref.directory.records import EndpointRecord
from gcref.errors import ConfigError, GcrefError
from gcref.hub import cli as hub_cli

if TYPE_CHECKING:
    from gcref.directory.hub import HubClient

FAILED: Final = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those behind the command's name; `None`: this process's own.

    Returns:
        The exit code.
    """
    said = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = said.command
    try:
        command(said)
    except GcrefError as error:
        print(f"gcref: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`): no reason for a traceback, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gcref", description="Futures over several sites: the client's side."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        (
            "endpoints",
            _endpoints,
            "List the endpoints that this GCREF_HOME or the hub knows, and how they can be reached.",
        ),
        (
            "key",
            _key,
            "Print your public key, as a line for an endpoint's authorized_keys; makes the key if needed.",
        ),
        ("version", _version, "Print the versions of gcref and of what it stands on."),
    ):
        commands.add_parser(name, help=text, description=text).set_defaults(command=command)
    text = "Tell where a task is, what it waits for, since when, and which attempts failed."
    explain = commands.add_parser("explain", help=text, description=text)
    explain.add_argument("task", metavar="TASK", help="the task's id, as `future.task_id` gives it")
    explain.add_argument("--endpoint", metavar="NAME", help="ask this endpoint alone (default: all that run)")
    explain.add_argument("--json", action="store_true", help="what the endpoints say, as JSON")
    explain.set_defaults(command=_explain)
    text = (
        "Try every way to an endpoint, or between two: which works, how fast it is, and why the others fail."
    )
    doctor = commands.add_parser("doctor", help=text, description=text)
    doctor.add_argument("one", metavar="A", help="an endpoint: its name, OWNER/NAME or id")
    doctor.add_argument("other", metavar="B", nargs="?", help="another one (default: this client)")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    doctor.set_defaults(command=_doctor)
    text = "Trust the key that the hub names for an endpoint from now on, whatever it was at first contact."
    trust = commands.add_parser("trust", help=text, description=text)
    trust.add_argument("name", metavar="NAME", help="the endpoint: its id, its name, or owner/name")
    trust.set_defaults(command=_trust)
    hub_cli.add_parsers(commands)
    return parser


def _endpoints(said: argparse.Namespace) -> None:
    found = [(record, _state(record)) for record in records.list_records()]
    settings = config.client_config()
    allowed, where = settings.carriers, str(records.endpoints_dir())
    problem: GcrefError | None = None
    if settings.hub_url is None:
        allowed -= {"broker"}  # nobody to ask for a mailbox
    else:
        where += f", and none that you may use at the hub {settings.hub_url}"
        try:
            with closing(_hub(settings)) as hub:
                here = {record.id for record, _said in found}
                more = [record for record in hub.endpoints() if record.id not in here]
        except GcrefError as error:
            problem = error
        else:
            found += [(record, "at hub" if record.running else "stopped") for record in more]
    if found:
        _print_endpoints(found, allowed)
    elif problem is None:
        print(f"no endpoints in {where}; 'endpoint-worker init NAME' makes one", file=sys.stderr)
    if problem is not None:
        raise problem


def _print_endpoints(found: Sequence[tuple[EndpointRecord, str]], allowed: frozenset[str]) -> None:
    width = max(len("NAME"), *(len(record.name) for record, _said in found))
    print(f"{'NAME':<{width}}  {'ID':<36}  {'STATE':<8}  REACHED BY")
    for record, state in found:
        ways = [f"{carrier} {address}" for carrier, address, _key in record.candidates(allowed)]
        shown = ", ".join(ways) or "no way that your settings allow"
        print(
            f"{record.name:<{width}}  {ids.text(record.id)}  {state:<8}  {shown if state != 'stopped' else '-'}"
        )


def _hub(settings: config.ClientConfig) -> HubClient:
    if settings.hub_url is None:
        remedy = "set GCREF_HUB_URL and GCREF_TOKEN, or hub_url and token in config.toml"
        raise ConfigError(f"no hub is configured; {remedy}", key="hub_url", remedy=remedy)
    from gcref.directory.hub import HubClient

    return HubClient(settings.hub_url, settings.token)


def _trust(said: argparse.Namespace) -> None:
    from gcref.directory import pins

    with closing(_hub(config.client_config())) as hub:
        record = hub.find(said.name)
    key = record.public_key
    old = pins.replace(record.id, key.encode("ascii"), record.name)
    print(f"{record.name} ({ids.text(record.id)}): {key} is trusted from now on")
    if old is not None:
        was = old.decode("ascii")
        print("it was before" if was == key else f"before, it was {was}")


def _state(record: EndpointRecord) -> str:
    alive = record.alive()
    if alive is None:
        return "away"  # on another machine: only a connection would tell
    return "running" if alive else "stopped"


def _explain(said: argparse.Namespace) -> None:
    from gcref.sdk import inquiry

    found = inquiry.inquire(said.task, said.endpoint)
    print(inquiry.as_json(found) if said.json else inquiry.text(found))
    for problem in found.problems:
        print(f"gcref: {problem}", file=sys.stderr)


def _doctor(said: argparse.Namespace) -> None:
    from gcref.directory import doctor

    found = doctor.examine(said.one, said.other)
    print(doctor.as_json(found) if said.json else doctor.text(found))
    if not all(direction.chosen for direction in found):
        raise GcrefError("no way works, or not in both directions; see above")


def _key(said: argparse.Namespace) -> None:
    # Here and not above: `gcref version` is to work where ZeroMQ is broken.
    from gcref.carriers import keys

    pair = keys.load_or_create(config.home() / "keys" / "user.key")
    print(f"{pair.public.decode('ascii')} user {_user()}")


def _user() -> str:
    import getpass

    try:
        return f"{getpass.getuser()}@{platform.node()}"
    except (KeyError, OSError):  # no name for this user id: usual in containers
        return f"{os.getuid()}@{platform.node()}"


def _version(said: argparse.Namespace) -> None:
    from importlib import metadata

    for name in ("gcref", "pyzmq", "msgpack", "cloudpickle"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = (
                "not installed" if name != "gcref" else f"not installed, run from {os.path.dirname(__file__)}"
            )
        print(f"{name} {version}")
    print(f"protocol {config.PROTOCOL_VERSION}")
    print(f"Python {platform.python_version()} on {platform.platform()}")


if __name__ == "__main__":
    sys.exit(main())
