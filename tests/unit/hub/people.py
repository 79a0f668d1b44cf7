"""Users and parties for the tests of the hub's rooms."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from gcref import ids
from gcref.hub import parties, users
from gcref.hub.database import Database, Party
from gcref.hub.parties import Described
from gcref.hub.who import Who

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyz"


def key_of(seed: int) -> str:
    """A key that looks like one."""
    return "".join(_Z85[(seed // 36**place) % 36] for place in range(40))


def user(database: Database, name: str) -> Who:
    """A new user."""
    who = users.authenticate(database, users.add(database, name).secret)
    assert who is not None
    return who


def described(kind: str, name: str, key: str, **more: Any) -> Described:
    """What a party says of itself."""
    id = more.pop("id", None) or ids.new_id()
    record = None
    if kind == "endpoint":
        control = more.pop("control", ["tcp://10.0.0.1:1", "ipc:///x/y"])
        record = {
            "id": ids.text(id),
            "name": name,
            "public_key": key,
            "control": control,
            "running": True,
            "host_nonce": "secret",
        }
    said = {"trust_hub": kind == "endpoint", "wants_mailbox": True, **more}
    return Described(id, kind, name, key, record, **said)


def party(database: Database, who: Who, kind: str, name: str, seed: int, **more: Any) -> bytes:
    """A new party; gives its id."""
    said = described(kind, name, key_of(seed), **more)
    parties.register(database, who, said)
    return said.id


def allowed(database: Database, who: Who, endpoint: bytes) -> dict[str, str]:
    """Keys that an endpoint may let in."""
    return parties.standing(database, who, endpoint).allowed


def let_pass(database: Database, id: bytes, seconds: float) -> None:
    """So much time has passed since a party was heard."""
    database.write(
        lambda session: session.execute(
            sa.update(Party).where(Party.id == id).values(seen=Party.seen - seconds)
        )
    )
