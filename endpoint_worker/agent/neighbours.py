"""Who else there is: the records of other endpoints, and whose keys may come in.

Both are read from `GCREF_HOME`, which other processes write while we run: an endpoint that started after us, a key that was
added or removed. So an unknown key makes us look again, and while there is anything to do the files' dates are looked at
now and then: a key that was taken out loses its open connections too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from gcref.carriers import keys
from gcref.directory import records
from gcref.directory.records import Candidate
from gcref.errors import ConfigError

LOOK_AGAIN_S: Final = 1.0  # the shortest time between two looks at the dates of the files
UNKNOWN_LOOK_AGAIN_S: Final = (
    0.01  # between two reads of them for unknown keys: strangers must not keep us reading
)


class Found(NamedTuple):
    """How to reach an endpoint: candidates for its control and its bulk socket."""

    control: list[Candidate]
    bulk: list[Candidate]


class Neighbours:
    """Finds other endpoints in the directory of `GCREF_HOME`.

    Args:
        home: the folder, or None when this endpoint is private and knows nobody.
        carriers: the ways this endpoint may use.
    """

    def __init__(self, home: Path | None, carriers: frozenset[str]) -> None:
        self._home = home
        self._carriers = carriers
        self._known: dict[bytes, Found] = {}

    def known(self, endpoint: bytes) -> bool:
        """Whether it was found before."""
        return endpoint in self._known

    def find(self, endpoint: bytes) -> Found | None:
        """Look it up; None when there is no record of it."""
        record = records.find(endpoint, self._home) if self._home is not None else None
        if record is None:
            return None
        found = Found(record.candidates(self._carriers), record.bulk_candidates(self._carriers))
        self._known[endpoint] = found
        return found

    def forget(self, endpoint: bytes) -> bool:
        """It is to be found again when it is needed. Returns whether it was known."""
        return self._known.pop(endpoint, None) is not None

    def find_again(self, endpoint: bytes) -> Found | None:
        """Look up one that was found before; None when nothing has changed, or there is no record now."""
        before = self._known[endpoint]
        try:
            found = self.find(endpoint)
        except ConfigError:
            return None  # it is being written, or damaged: the next look tells
        return found if found != before else None


class KeyRing(Mapping[bytes, str]):
    """Which owner keys may come in, and as what ("user" or "peer"): always the current state of the files.

    These are: the endpoint's `authorized_keys`, the user key of its `GCREF_HOME` (user), and the keys of the endpoints
    whose records lie there (user: they belong to the same owner, on the same disk).

    Args:
        authorized: the endpoint's `authorized_keys`; it need not exist.
        home: its `GCREF_HOME`, or None for a private endpoint, which lets nobody in over TCP.
    """

    def __init__(self, authorized: Path | None, home: Path | None) -> None:
        self._authorized = authorized
        self._home = home
        self._keys: dict[bytes, str] = {}
        self._dates: tuple[int, ...] = ()
        self._read_at = self._dated_at = float("-inf")
        self._given: dict[bytes, str] = {}  # every right that was given since `revoked` was last asked
        self._read()

    def revoked(self, now: float) -> list[bytes]:
        """Look at the files if it is time to, and say which keys have lost their rights since.

        Args:
            now: seconds of the monotonic clock.
        """
        if now - self._dated_at < LOOK_AGAIN_S:
            return []
        self._dated_at = now
        if self._dates_now() != self._dates:
            self._read()
        given, self._given = self._given, dict(self._keys)
        return [key for key, role in given.items() if self._keys.get(key) != role]

    def _dates_now(self) -> tuple[int, ...]:
        if self._home is None:
            return ()
        paths = [records.endpoints_dir(self._home), self._home / "keys" / "user.key"]
        if self._authorized is not None:
            paths.append(self._authorized)
        return tuple(_date(path) for path in paths)

    def _read(self) -> None:
        self._dates = self._dates_now()  # before the files: what changes while we read is read again
        found: dict[bytes, str] = {}
        if self._home is not None:
            for record in records.list_records(self._home):
                found[record.public_key.encode()] = "user"
            user = keys.public_of(self._home / "keys" / "user.key")
            if user is not None:
                found[user] = "user"
        if self._authorized is not None and self._authorized.exists():
            try:
                found.update(keys.read_authorized(self._authorized))
            except ConfigError:
                # Somebody is in the middle of editing it: those who were let in stay, nobody is added.
                found.update({key: role for key, role in self._keys.items() if key not in found})
        self._keys = found
        self._given = found | self._given
        self._read_at = time.monotonic()

    def __getitem__(self, key: bytes) -> str:
        if key not in self._keys and time.monotonic() - self._read_at >= UNKNOWN_LOOK_AGAIN_S:
            self._read()
        return self._keys[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _date(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
