"""What the bulk thread asks of those who use it, and what it tells them: provider, sink, completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from gcref.brains.transfer_events import PullReason
    from gcref.carriers.bulk.link import Requester


class Pulled(NamedTuple):
    """An object is here.

    Attributes:
        id: the object.
        attempt: the attempt that made it.
        source: the party that it came from.
        size: its bytes.
        carriers: how many of them came by which carrier. An object that was linked or mapped counts with its size.
    """

    id: bytes
    attempt: int
    source: bytes
    size: int
    carriers: dict[str, int]


class PullFailed(NamedTuple):
    """An object could not be had.

    Attributes:
        id: the object.
        attempt: the attempt that was asked for.
        source: the party that was asked.
        reason: why: a member of `gcref.brains.transfer_events.PullReason`.
        message: the same for people.
        cause: for the reason `store`: what the sink raised.
    """

    id: bytes
    attempt: int
    source: bytes
    reason: PullReason
    message: str
    cause: BaseException | None


Completion: TypeAlias = Pulled | PullFailed


class Reading(Protocol):
    """Bytes that are about to be sent. They must not change, nor be used for anything else, until `release`."""

    @property
    def buffer(self) -> Any:
        """Exactly the range asked for: C-contiguous, of bytes."""

    def release(self) -> None:
        """Called once, on the bulk thread, when the network has let go of the buffer."""


class Provider(Protocol):
    """Where other parties' questions are answered. Called on the bulk thread.

    All three raise `LookupError` for an object, or an attempt of it, that is not here, `AuthError` for one that this
    requester may not have, and anything else for a failure to read it. `requester.role` says what he is; a `peer` is
    let through to here only with a token, which is the provider's to verify.
    """

    def read(
        self, id: bytes, attempt: int, offset: int, length: int, requester: Requester, token: bytes | None
    ) -> Reading:
        """A range of an object."""

    def expose(self, id: bytes, attempt: int, requester: Requester, token: bytes | None) -> tuple[str, int]:
        """Path and size of an object in a file that a process of this machine and user may map or link.

        The file must keep its bytes for ever: it may be unlinked, never written again. `OSError`,
        `NotImplementedError`: it has no such file; it is then asked for the bytes.
        """

    def fill(self, id: bytes, attempt: int, path: str, requester: Requester, token: bytes | None) -> int:
        """Write a whole object into this file, which exists, and return how many bytes that were.

        Nothing else is sent or received by this side meanwhile; a GB takes about a second.

        `OSError`, `NotImplementedError`: not possible here; it is then asked for the bytes.
        """


class Writable(Protocol):
    """An object that is being received. Nobody sees it before `seal`."""

    def write(self, offset: int, data: Any) -> None:
        """Put bytes in their place. Each place is written once, in any order. `data` is valid during the call."""

    def share(self) -> str | None:
        """A path where another process of this user may write the object; None: not possible.

        After this, `abort` must give the file up for good: somebody may go on writing to it.
        """

    def seal(self) -> None:
        """All bytes are here: make the object visible."""

    def abort(self) -> None:
        """Forget it. Not called after a `seal` that returned."""


class Sink(Protocol):
    """Where pulled objects go. Called on the bulk thread. Whatever it raises ends that pull with reason `store`."""

    def begin(self, id: bytes, attempt: int, size: int) -> Writable:
        """Make room for an object."""

    def adopt(self, id: bytes, attempt: int, path: str, size: int) -> object:
        """Take in an object that is in this file of another party of this machine: link or map it.

        `OSError`, `NotImplementedError`: not possible; the bytes are pulled instead.
        """
