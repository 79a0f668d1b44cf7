"""The commands `gcref hub …`, `gcref share` and `gcref unshare`.

    gcref hub start [--config hub.toml]                  serve
    gcref hub user add NAME | remove NAME | list         on the database itself: whoever may read it may do this
    gcref hub token new NAME | revoke ID | list NAME
    gcref share ENDPOINT USER · gcref unshare ENDPOINT USER     over the hub, with the user's own token

What the hub stands on is imported only when one of the first three runs.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcref import config as client_settings
from gcref.errors import ConfigError

if TYPE_CHECKING:
    from gcref.hub.config import HubConfig
    from gcref.hub.database import Database


def add_parsers(commands: Any) -> None:
    """Add the commands to the parser of `gcref`.

    Args:
        commands: what `add_subparsers` gave.
    """
    hub = commands.add_parser(
        "hub", help="Run a hub, and keep its users.", description="Run a hub, and keep its users."
    )
    verbs = hub.add_subparsers(required=True, metavar="COMMAND")
    _add(verbs, "start", _start, "Serve until it is stopped; prints one line once it can be reached.")
    user = _group(verbs, "user", "The hub's users.")
    _add(user, "add", _user_add, "Make a user, and print their first token: it is shown once.").add_argument(
        "name", metavar="NAME"
    )
    text = "Remove a user with tokens, parties, mailboxes, shares and functions."
    _add(user, "remove", _user_remove, text).add_argument("name", metavar="NAME")
    _add(user, "list", _user_list, "List the users.")
    token = _group(verbs, "token", "The users' tokens.")
    _add(token, "new", _token_new, "Make one more token for a user: it is shown once.").add_argument(
        "name", metavar="NAME"
    )
    text = "Make a token worthless; parties that were registered with it lose their mailboxes."
    _add(token, "revoke", _token_revoke, text).add_argument("id", metavar="ID", type=int)
    _add(token, "list", _token_list, "List a user's tokens.").add_argument("name", metavar="NAME")
    for name, command, text in (
        ("share", _share, "Let a user of the hub use an endpoint of yours."),
        ("unshare", _unshare, "Take that back."),
    ):
        parser = commands.add_parser(name, help=text, description=text)
        parser.add_argument("endpoint", metavar="ENDPOINT", help="its name or id")
        parser.add_argument("user", metavar="USER", help="the user's name at the hub")
        parser.set_defaults(command=command)


def _group(verbs: Any, name: str, text: str) -> Any:
    return verbs.add_parser(name, help=text, description=text).add_subparsers(
        required=True, metavar="COMMAND"
    )


def _add(
    verbs: Any, name: str, command: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the hub's settings (default: hub.toml in GCREF_HOME)"
    )
    parser.set_defaults(command=command)
    return parser


def _settings(said: argparse.Namespace) -> HubConfig:
    # Looked for and not loaded: only `start` needs them all, and loading takes a second.
    missing = [name for name in ("alembic", "fastapi", "sqlalchemy", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"a hub needs {', '.join(missing)}, not installed here: pip install 'gcref[hub]'",
            key=missing[0],
            remedy="pip install 'gcref[hub]'",
        )
    from gcref.hub import config

    return config.load(said.config)


def _start(said: argparse.Namespace) -> None:
    settings = _settings(said)
    from gcref.hub import app

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Both tell of each step they take.
    for library in ("alembic", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)
    app.serve(settings, lambda url: print(f"gcref hub: ready at {url}", flush=True))


def _with_database(said: argparse.Namespace, work: Callable[[Database], list[bytes] | None]) -> None:
    """Work on the database; what mailboxes it makes superfluous are removed, now or by the hub later."""
    settings = _settings(said)
    from gcref.hub import rabbitmq
    from gcref.hub.broker import Broker
    from gcref.hub.database import Database
    from gcref.hub.mailboxes import Mailboxes

    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    database = Database(settings.database)
    try:
        gone = work(database)
        there = settings.broker
        if there is None and settings.own_broker is not None:
            there = rabbitmq.running(settings.own_broker)
        if gone and there is not None:
            broker = Broker(there)
            left = Mailboxes(database, broker, settings.lease_s).clear(gone)
            broker.close()
            if left:
                print(
                    "gcref: mailboxes are still at the broker, which does not answer; the hub removes them when it does",
                    file=sys.stderr,
                )
    finally:
        database.close()


def _user_add(said: argparse.Namespace) -> None:
    def work(database: Database) -> None:
        from gcref.hub import users

        made = users.add(database, said.name)
        print(made.secret)
        print(f"gcref: user {said.name}, token {made.id}: it is not shown again", file=sys.stderr)

    _with_database(said, work)


def _user_remove(said: argparse.Namespace) -> None:
    def work(database: Database) -> list[bytes]:
        from gcref.hub import users

        return users.remove(database, said.name)

    _with_database(said, work)


def _user_list(said: argparse.Namespace) -> None:
    def work(database: Database) -> None:
        from gcref.hub import users

        rows = [(row.name, _time(row.created), row.tokens, row.endpoints) for row in users.listed(database)]
        _table(("NAME", "SINCE", "TOKENS", "ENDPOINTS"), rows)

    _with_database(said, work)


def _token_new(said: argparse.Namespace) -> None:
    def work(database: Database) -> None:
        from gcref.hub import users

        made = users.new_token(database, said.name)
        print(made.secret)
        print(f"gcref: token {made.id} of user {said.name}: it is not shown again", file=sys.stderr)

    _with_database(said, work)


def _token_revoke(said: argparse.Namespace) -> None:
    def work(database: Database) -> list[bytes]:
        from gcref.hub import users

        return users.revoke(database, said.id)

    _with_database(said, work)


def _token_list(said: argparse.Namespace) -> None:
    def work(database: Database) -> None:
        from gcref.hub import users

        rows = [
            (row.id, _time(row.created), "never" if row.last_used is None else _time(row.last_used))
            for row in users.tokens_of(database, said.name)
        ]
        _table(("ID", "SINCE", "LAST USED"), rows)

    _with_database(said, work)


def _share(said: argparse.Namespace) -> None:
    client = _client()
    try:
        client.share(said.endpoint, said.user)
    finally:
        client.close()
    print(f"{said.user} may use {said.endpoint}")


def _unshare(said: argparse.Namespace) -> None:
    client = _client()
    try:
        client.unshare(said.endpoint, said.user)
    finally:
        client.close()
    print(f"{said.user} may not use {said.endpoint} (any more)")


def _client() -> Any:
    from gcref.directory.hub import HubClient

    settings = client_settings.client_config()
    if settings.hub_url is None:
        raise ConfigError(
            "no hub is set: set GCREF_HUB_URL, or hub_url in config.toml",
            key="hub_url",
            remedy="set GCREF_HUB_URL, or hub_url in config.toml",
        )
    return HubClient(settings.hub_url, settings.token)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    texts = [head, *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
    for row in texts:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
