"""Who else there is: the records of other endpoints, and whose keys may come in.

Both are read from `GCREF_HOME`, which other processes write while we run: an endpoint that started after us, a key that was
added or removed. So an unknown key makes us look again, and while there is anything to do the files' dates are looked at
now and then: a key that was taken out loses its open connections too. Where there is a hub, it adds to both: records of
endpoints that this machine does not know, and, if the owner trusts it so far, keys.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from gcref.carriers import keys
from gcref.directory import pins, records
from gcref.directory.records import Candidate, EndpointRecord
from gcref.errors import ConfigError

log = logging.getLogger("gcref.agent")

LOOK_AGAIN_S: Final = 1.0  # the shortest time between two looks at the dates of the files
UNKNOWN_LOOK_AGAIN_S: Final = 0.01  # between two reads of them for unknown keys: strangers can ask often


class Found(NamedTuple):
    """How to reach an endpoint: candidates for its control and its bulk socket."""

    control: list[Candidate]
    bulk: list[Candidate]


class Neighbours:
    """Other endpoints: as the directory of `GCREF_HOME`, the hub, and they themselves say.

    Args:
        home: the folder, or None when this endpoint is private and knows nobody.
        carriers: the ways this endpoint may use.
    """

    def __init__(self, home: Path | None, carriers: frozenset[str]) -> None:
        self._home = home
        self._carriers = carriers
        self._known: dict[bytes, tuple[EndpointRecord, Found]] = {}
        self._here: set[bytes] = set()
        self._told: dict[bytes, Found] = {}
        self._pins: dict[bytes, pins.Pin] = {}
        self._pins_date = 0

    def known(self, endpoint: bytes) -> bool:
        """Whether it was found before."""
        return endpoint in self._known

    def is_here(self, endpoint: bytes) -> bool:
        """Whether its record lies in our `GCREF_HOME`: it belongs to our own owner."""
        return endpoint in self._here

    def is_proven(self, endpoint: bytes) -> bool:
        """Whether its owner key is known: whoever comes in as that endpoint has shown that key."""
        return self._key_of(endpoint) is not None

    def is_somebody_else(self, endpoint: bytes, key: bytes) -> bool:
        """Whether an endpoint is known to have another owner key (z85) than this one."""
        return self._key_of(endpoint) not in (None, key)

    def _key_of(self, endpoint: bytes) -> bytes | None:
        """As its record says, or as it was at first contact; None: nobody has told."""
        known = self._known.get(endpoint)
        if known is not None:
            return known[0].public_key.encode()
        if self._home is None:
            return None
        record = records.find(endpoint, self._home)
        if record is not None:
            return record.public_key.encode()
        date = _date(pins.path_of(self._home))
        if date != self._pins_date:
            try:
                self._pins = pins.read(self._home)
            except ConfigError as error:
                log.warning("%s", error)
            self._pins_date = date
        pin = self._pins.get(endpoint)
        return pin.key if pin is not None else None

    def find(self, endpoint: bytes) -> bool:
        """Look for its record in `GCREF_HOME`. Returns whether there is one."""
        record = records.find(endpoint, self._home) if self._home is not None else None
        if record is not None:
            self._here.add(endpoint)
            self.use(record)
        return record is not None

    def use(self, record: EndpointRecord) -> bool:
        """This is its record. Returns whether that changes how it is reached."""
        found = Found(record.candidates(self._carriers), record.bulk_candidates(self._carriers))
        before = self._known.get(record.id)
        self._known[record.id] = (record, found)
        return before is None or before[1] != found

    def find_again(self, endpoint: bytes) -> bool:
        """Look again for one of ours that was found before. Returns whether it is to be reached in other ways now."""
        before = self._known[endpoint]
        try:
            return self.find(endpoint) and self._known[endpoint][1] != before[1]
        except ConfigError:
            return False  # it is being written, or damaged: the next look tells

    def has_told(self, endpoint: bytes, key: bytes, control: tuple[str, ...], bulk: tuple[str, ...]) -> bool:
        """A party has named the TCP addresses where it listens. Returns whether that adds to how it is reached.

        Args:
            endpoint: the party.
            key: the owner key that it must show there, z85.
            control, bulk: the addresses of its sockets.
        """
        if "direct" not in self._carriers:
            return False
        before = self.ways(endpoint)
        self._told[endpoint] = Found(
            [("direct", address, key) for address in control], [("direct", address, key) for address in bulk]
        )
        return self.ways(endpoint) != before

    def ways(self, endpoint: bytes) -> Found:
        """All the ways to it, best first."""
        _, found = self._known.get(endpoint, (None, Found([], [])))
        told = self._told.get(endpoint, Found([], []))
        # The order of the list says nothing to those who dial: they try all, and rank what answers by its carrier.
        return Found(
            list(dict.fromkeys([*found.control, *told.control])),
            list(dict.fromkeys([*found.bulk, *told.bulk])),
        )

    def forget(self, endpoint: bytes) -> bool:
        """It is to be found again when it is needed. Returns whether there were ways to it."""
        self._here.discard(endpoint)
        known, told = self._known.pop(endpoint, None), self._told.pop(endpoint, None)
        return known is not None or told is not None


class KeyRing(Mapping[bytes, str]):
    """Which owner keys may come in, and as what ("user" or "peer"): always the current state of the files.

    These are: the endpoint's `authorized_keys`, the user key of its `GCREF_HOME` (user), and the keys of the endpoints
    whose records lie there (user: they belong to the same owner, on the same disk). To these, the hub may add others.

    Args:
        authorized: the endpoint's `authorized_keys`; it need not exist.
        home: its `GCREF_HOME`, or None for a private endpoint, which lets nobody in over TCP.

    Attributes:
        when_unknown: called, on whichever thread, when somebody comes with a key that is not known; quick.
    """

    def __init__(self, authorized: Path | None, home: Path | None) -> None:
        self.when_unknown: Callable[[], None] = lambda: None
        self._from_hub: Mapping[bytes, str] = {}
        self._from_files: dict[bytes, str] = {}
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

    def set_from_hub(self, found: Mapping[bytes, str]) -> None:
        """These, and no others any more, come in because the hub says so; what the files say goes before."""
        if found != self._from_hub:
            self._from_hub = dict(found)
            self._read()
            self._dated_at = float("-inf")  # who is not among them any more is put out now

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
                found = self._from_files | found
        self._from_files = found
        self._keys = {**self._from_hub, **found}
        self._given = self._keys | self._given
        self._read_at = time.monotonic()

    def __getitem__(self, key: bytes) -> str:
        if key not in self._keys:
            if time.monotonic() - self._read_at >= UNKNOWN_LOOK_AGAIN_S:
                self._read()
            if key not in self._keys:
                self.when_unknown()
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
