"""What an agent is told when it starts, and what it answers: one JSON line each way.

    stdin   {"name", "id", "home", "private", "workers", "carriers", "sys_path", "config", "watch_stdin", "hub_url", "token"}
    stdout  {"ready": true, "id", "pid", "control", "bulk"}   or   {"error": class name, "message": …}

It comes over stdin and not in the arguments, because arguments can be read by everybody on the machine. With
`watch_stdin` the end of stdin ends the agent: whoever started it is gone.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from gcref import ids
from gcref.errors import ConfigError

MAX_LINE_BYTES: Final = 1 << 20  # of the order on stdin


class Order(NamedTuple):
    """What to start.

    Attributes:
        name: the endpoint's name.
        id: its id, 16 bytes.
        home: its `GCREF_HOME`; None for a private endpoint, which has no record, key or TCP port.
        private: it belongs to one client on this machine, over ipc only, and keeps no journal.
        workers: number of worker processes, overriding the configuration; None: as configured.
        carriers: ways it may use, overriding the configuration; None: as configured.
        sys_path: import path of the workers; empty: the agent's own.
        config: the endpoint's configuration, as a table.
        watch_stdin: end when stdin ends.
        hub_url: the hub's address; None: there is no hub.
        token: proves to it whose endpoint this is. A secret.
    """

    name: str
    id: bytes
    home: str | None
    private: bool
    workers: int | None
    carriers: list[str] | None
    sys_path: list[str]
    config: dict[str, Any]
    watch_stdin: bool
    hub_url: str | None = None
    token: str | None = None

    def __repr__(self) -> str:
        # Representations end up in logs; the configuration may hold secrets too.
        return f"Order(name={self.name!r}, id={ids.text(self.id)})"

    @classmethod
    def from_json(cls, told: Any) -> Order:
        """The order that a JSON line holds.

        Raises:
            ConfigError: it is not one.
        """
        try:
            return cls(
                name=told.get("name") or "private",
                id=ids.parse(told["id"]),
                home=told.get("home"),
                private=bool(told.get("private")),
                workers=told.get("workers"),
                carriers=told.get("carriers"),
                sys_path=list(told.get("sys_path") or ()),
                config=dict(told.get("config") or {}),
                watch_stdin=bool(told.get("watch_stdin")),
                hub_url=told.get("hub_url"),
                token=told.get("token"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the agent was not told what to start: {error!r}") from error
