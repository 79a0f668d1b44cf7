"""The seam of the mail: messages that a broker keeps in a mailbox until their receiver comes for them.

    control loop ─┐  post            ┌─ publish, sealed ─►  mailbox of the receiver
                  ├──────► Mailbox ──┤
    bulk thread ──┘ ◄────── take     └─ consume, opened ◄─  our own mailbox

One mailbox serves both lanes of a process: control messages, and the ranges of large objects. A party writes into
everybody's mailbox and reads from its own alone, so it needs to dial nobody but the broker.

    mailbox.attach(CONTROL, carrier.wake)
    … wake() is called; then …
    for event in mailbox.take(CONTROL): match event: Mail(…) | MailUp() | MailDown(…) | Returned(…)
    … handled, and journalled …
    mailbox.done(CONTROL)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

CONTROL: Final = 0
BULK: Final = 1

SCHEME: Final = "mailbox://"
"""How the address of a mailbox begins: `mailbox://` and the party's id in hexadecimal."""


class MailboxAccess(NamedTuple):
    """Where a party's mailbox is, and what opens it: handed out by the hub.

    Attributes:
        url: of the broker, with user and password: `amqp://` or `amqps://`. A secret.
        queue: the name of our mailbox there.
    """

    url: str
    queue: str

    def __repr__(self) -> str:
        # Representations end up in logs.
        return f"MailboxAccess(url=…, queue={self.queue!r})"


class Mail(NamedTuple):
    """Somebody's message.

    Attributes:
        sender: the party that says it sent it.
        key: the owner key, z85, that it was sealed with: proven.
        data: as it was posted.
    """

    sender: bytes
    key: bytes
    data: Buffer


class MailUp(NamedTuple):
    """The broker can be reached: mail can be posted, and comes."""


class MailDown(NamedTuple):
    """The broker cannot be reached (any more), or we have no mailbox yet. It is tried again by itself."""

    reason: str


class Returned(NamedTuple):
    """Mail came back.

    Attributes:
        to: whose mailbox it was for.
        reason: `NO_MAILBOX`: it was dropped; `FULL`: it waits here, and this is told once until something leaves.
    """

    to: bytes
    reason: str


NO_MAILBOX: Final = "it has no mailbox (any more)"
FULL: Final = "its mailbox is full"
"""The reasons of `Returned`."""

MailEvent: TypeAlias = Mail | MailUp | MailDown | Returned


class Mailbox(Protocol):
    """Our mailbox, and the way to everybody else's.

    Promises, each one a test in `tests/contract`:
        - Mail of one lane from one sender arrives in the order posted, whole, or not at all; each at most once.
        - `Mail.key` has been proven: the mail was sealed with it, for us, and was not changed, nor delivered before.
        - What is foreign, forged, replayed or too large is dropped and counted: nothing is raised.
        - The state is told to each lane when it attaches, and whenever it changes.

    Threads: any thread may call anything. No method waits.
    """

    def attach(self, lane: int, wake: Callable[[], None]) -> None:
        """From now on this lane is served.

        Args:
            lane: `CONTROL` or `BULK`.
            wake: called, on a thread of the mailbox, when `take` has something; quick, and never raises.
        """
        ...

    def post(
        self, to: bytes, key: bytes, lane: int, frame: Sequence[Buffer], keep_s: float | None = None
    ) -> bool:
        """Send, sealed for the owner of `key`. The parts of the frame must not be changed afterwards.

        Args:
            to: the party whose mailbox it goes to.
            key: its owner key, z85.
            lane: `CONTROL` or `BULK`.
            frame: its parts; they arrive as one.
            keep_s: after so many seconds it is of no use any more, and the broker may drop it; None: it keeps.

        Returns:
            False: it was dropped, because the broker cannot be reached or too much is waiting to leave.
        """
        ...

    def take(self, lane: int) -> list[MailEvent]:
        """Take what has come, in order."""
        ...

    def done(self, lane: int) -> None:
        """All that was taken on this lane has been dealt with: the broker need not keep it any longer."""
        ...

    def describe(self) -> dict[str, object]:
        """Plain facts for status and explanations: up, since, error, counts of what was dropped."""
        ...

    def close(self) -> None:
        """Let go of the broker. What has been posted just before still leaves, if that takes no time. Idempotent."""
        ...


def address_of(party: bytes) -> str:
    """The address of a party's mailbox, as candidates name it."""
    return SCHEME + party.hex()


def queue_of(party: bytes) -> str:
    """The name that a party's mailbox has at the broker."""
    return f"mailbox.{party.hex()}"


def party_of(address: str) -> bytes:
    """The party whose mailbox it is.

    Raises:
        ValueError: it is no such address.
    """
    if not address.startswith(SCHEME):
        raise ValueError(f"{address!r} is no address of a mailbox")
    party = bytes.fromhex(address.removeprefix(SCHEME))
    if len(party) != 16:
        raise ValueError(f"{address!r} is no address of a mailbox")
    return party
