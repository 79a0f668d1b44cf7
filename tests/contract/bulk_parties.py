"""Parties of the bulk thread for its tests: each with a key, a place for bytes, and a mailbox at the same post."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gcref.carriers import keys
from gcref.carriers.bulk.link import BulkIdentity, Requester
from gcref.carriers.bulk.ports import Completion, Pulled, PullFailed
from gcref.carriers.bulk.thread import BulkThread
from gcref.carriers.keys import KeyPair
from gcref.carriers.mail.memory import MemoryMailbox, Post
from gcref.carriers.mail.post import Mailbox, address_of
from gcref.errors import AuthError
from tests.support.waiting import patience, wait_until

MB = 1024 * 1024
X, Y = b"x" * 16, b"y" * 16
TOKEN = b"t" * 16


def blob(size: int, seed: int = 1) -> bytes:
    """Bytes whose ranges all differ."""
    block = bytes((at * seed + at // 251) % 256 for at in range(65_521))
    return (block * (size // len(block) + 1))[:size]


class Place:
    """Provider and sink of one party: objects in memory, received ones in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[tuple[bytes, int], bytes] = {}
        self.received: dict[bytes, bytes] = {}
        self.token: bytes | None = None
        self.requesters: list[Requester] = []
        self.readings: list[Range] = []
        self.aborted: list[Path] = []
        self.shared: list[Path] = []
        self.reads = 0
        self.raises: BaseException | None = None
        self.is_far = False
        self.on_read: Callable[[], None] = lambda: None
        self.on_write: Callable[[], None] = lambda: None

    def find(self, id: bytes, attempt: int, requester: Requester, token: bytes | None) -> bytes:
        self.requesters.append(requester)
        if self.raises is not None:
            raise self.raises
        if self.token is not None and requester.role == "peer" and token != self.token:
            raise AuthError("the token is wrong")
        return self.objects[id, attempt]

    def read(
        self, id: bytes, attempt: int, offset: int, length: int, requester: Requester, token: bytes | None
    ) -> Range:
        self.reads += 1
        reading = Range(memoryview(self.find(id, attempt, requester, token))[offset : offset + length])
        self.readings.append(reading)
        self.on_read()
        return reading

    def expose(self, id: bytes, attempt: int, requester: Requester, token: bytes | None) -> tuple[str, int]:
        data = self.find(id, attempt, requester, token)
        path = self.folder / f"{id.hex()}.exposed"
        path.write_bytes(data)
        return str(path), len(data)

    def fill(self, id: bytes, attempt: int, path: str, requester: Requester, token: bytes | None) -> int:
        data = self.find(id, attempt, requester, token)
        if self.is_far:
            raise FileNotFoundError(path)
        with open(path, "r+b") as file:
            return file.write(data)

    def begin(self, id: bytes, attempt: int, size: int) -> Incoming:
        return Incoming(self, id, size)

    def adopt(self, id: bytes, attempt: int, path: str, size: int) -> None:
        if self.is_far:
            raise FileNotFoundError(path)
        os.link(path, self.folder / f"{id.hex()}.linked")
        self.received[id] = Path(path).read_bytes()


class Range:
    """A reading that can tell whether it was released, and how often."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.released = 0
        self.thread = ""

    def release(self) -> None:
        self.released += 1
        self.thread = threading.current_thread().name


class Incoming:
    """An object on its way into a file."""

    count = 0

    def __init__(self, place: Place, id: bytes, size: int) -> None:
        Incoming.count += 1
        self.place = place
        self.id = id
        self.size = size
        self.path = place.folder / f"{id.hex()}.{Incoming.count}"
        self.file = open(self.path, "x+b")  # noqa: SIM115 - closed by seal or abort
        self.file.truncate(size)

    def write(self, offset: int, data: Any) -> None:
        self.place.on_write()
        self.file.seek(offset)
        self.file.write(data)

    def share(self) -> str | None:
        self.place.shared.append(self.path)
        return str(self.path)

    def seal(self) -> None:
        self.file.close()
        data = self.path.read_bytes()
        assert len(data) == self.size
        self.place.received[self.id] = data

    def abort(self) -> None:
        self.file.close()
        self.path.unlink()
        self.place.aborted.append(self.path)


class Party:
    """A bulk thread with its place, its key, its mailbox and somebody who waits for completions."""

    def __init__(
        self,
        name: bytes,
        folder: Path,
        allowed: Mapping[bytes, str],
        mailbox_for: Callable[[bytes, KeyPair], Mailbox],
        **settings: float,
    ) -> None:
        self.id = name * 16
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.place = Place(folder)
        self.keys: KeyPair = keys.generate()
        self.woken = threading.Event()
        me = BulkIdentity(self.id, "endpoint", self.keys)
        self.mailbox = mailbox_for(self.id, self.keys)
        self.bulk = BulkThread(
            me, self.place, self.place, wake=self.woken.set, allowed=allowed, mailbox=self.mailbox, **settings
        )
        self.bulk.start()
        self.done: list[Completion] = []

    def listen(self, carrier: str) -> str:
        if carrier == "broker":
            return address_of(self.id)
        return self.bulk.listen("tcp://127.0.0.1:*" if carrier == "direct" else f"ipc://{self.folder}/bulk")

    def connect(self, other: Party, address: str, carrier: str = "direct", role: str | None = None) -> None:
        key = None if carrier == "ipc" else other.keys.public
        self.bulk.connect(other.id, address, key, carrier, role)

    def wait_link(self, other: Party, state: str = "up") -> None:
        wait_until(
            lambda: any(link["state"] == state for link in self.bulk.describe(other.id)),
            what=lambda: f"{state}: {self.bulk.describe(other.id)}",
        )

    def next(self, timeout_s: float = 20.0) -> Completion:
        if not self.done:
            assert self.woken.wait(patience(timeout_s)), "no completion"
            self.woken.clear()
            self.done += self.bulk.take()
        return self.done.pop(0)

    def pulled(self) -> Pulled:
        done = self.next()
        assert isinstance(done, Pulled), done
        return done

    def failed(self) -> PullFailed:
        done = self.next()
        assert isinstance(done, PullFailed), done
        return done

    def close(self) -> None:
        self.bulk.close()
        self.mailbox.close()


@contextlib.contextmanager
def some_parties(folder: Path, post: Post) -> Iterator[Callable[..., Party]]:
    """Makes parties with mailboxes at this post; they end with the test."""
    made: list[Party] = []

    def mailbox_for(party: bytes, pair: KeyPair) -> Mailbox:
        mailbox = MemoryMailbox(post, party, pair)
        mailbox.use(post.access(party))
        return mailbox

    def make(
        name: bytes,
        allowed: Mapping[bytes, str] | None = None,
        mailbox_for: Callable[[bytes, KeyPair], Mailbox] = mailbox_for,
        **settings: float,
    ) -> Party:
        place = folder / f"{name.decode()}{len(made)}"
        made.append(Party(name, place, allowed or {}, mailbox_for, **settings))
        return made[-1]

    try:
        yield make
    finally:
        for party in made:
            party.close()
