"""References: the address of an object, which can be written down before the object exists.

A reference is the object's id, the id of its home, and a token that proves the right to read it. The token is
derived from a secret of the task group, so nobody computes or stores it before a reference really crosses a
border.

    read_token(secret, id) ── 16 bytes ──▶ ObjectRef(id, home, token) ── pack() ──▶ 48 bytes in blobs and messages

A reference alone fetches nothing: `get` and its kin go through `opener`, which the package root sets, so that
this room does not know the SDK.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from gcref import ids
from gcref.errors import LocalProtocolError, ProtocolError
from gcref.objects import blob
from gcref.objects.notes import here

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOKEN_BYTES: Final = 16
SECRET_BYTES: Final = 32

# Gives the future that stands for a reference here; set by the package root.
opener: Callable[[ObjectRef], Any] | None = None


class ObjectRef:
    """A reference to an object: handed over as it is, never resolved. Use `get` where the value is wanted.

    One that was found in a result works as long as it lives, also when the future of the result is gone. A copy that
    somebody has unpickled elsewhere is an address, and keeps nothing.

    Two references are equal if they name the same object at the same home; the token does not count.

    Args:
        id: id of the object, 16 bytes.
        home: id of the endpoint that owns it, 16 bytes.
        token: proves the right to read it, 16 bytes.
        pin: whatever keeps the object alive as long as this reference lives in this process. It stays here. None: what the
            value that is just being unpickled was given for that.

    Raises:
        ValueError: one of these is not 16 bytes long.
    """

    # `_pin` is for whoever keeps the object alive as long as this reference lives in this process. It does
    # not travel.
    __slots__ = ("__weakref__", "_home", "_id", "_pin", "_token")

    def __init__(self, id: bytes, home: bytes, token: bytes, pin: object = None) -> None:
        if len(id) != ids.ID_BYTES or len(home) != ids.ID_BYTES or len(token) != TOKEN_BYTES:
            raise ValueError("the id, the home and the token of a reference are 16 bytes each")
        self._id = id
        self._home = home
        self._token = token
        self._pin = here.notes.keeper if pin is None else pin

    @property
    def id(self) -> str:
        """The object's id, as text."""
        return ids.text(self._id)

    @property
    def home(self) -> str:
        """The id of the endpoint that owns the object, as text."""
        return ids.text(self._home)

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the object and give its value.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises:
            TimeoutError: it took longer.
            Exception: the task that was to make it failed with this.
            LostError: the object, or its home, is gone.
        """
        return self._open().result(timeout)

    def done(self) -> bool:
        """Tell whether the object is done at its home, as far as is known here."""
        return bool(self._open().done())

    @property
    def size_bytes(self) -> int | None:
        """Size of the object's blob; None while that is not known here."""
        size: int | None = self._open().size_bytes
        return size

    def ref(self) -> ObjectRef:
        """Give the reference itself: futures and references are asked for their reference alike."""
        return self

    def pack(self) -> bytes:
        """Give the 48 bytes that stand for this reference in blobs and messages. They hold the token: a secret."""
        return self._id + self._home + self._token

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> ObjectRef:
        """Make a reference from its 48 bytes.

        Raises:
            ProtocolError: these are not 48 bytes.
        """
        if len(data) != blob.REF_BYTES:
            raise ProtocolError(f"a reference is {blob.REF_BYTES} bytes, not {len(data)}")
        data = bytes(data)
        return cls(data[:16], data[16:32], data[32:])

    def _open(self) -> Any:
        if opener is None:
            raise LocalProtocolError(f"no client is loaded that could open the reference to {self.id}")
        return opener(self)

    def __reduce__(self) -> tuple[Any, ...]:
        notes = here.notes
        if notes.kind:
            notes.add_reference(self._id, self)
        return ObjectRef, (self._id, self._home, self._token)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ObjectRef):
            return NotImplemented
        return self._id == other._id and self._home == other._home

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"ObjectRef(id={self.id!r}, home={self.home!r})"


def read_token(secret: bytes, id: bytes) -> bytes:
    """Make the token that gives the right to read an object.

    Args:
        secret: of the object's task group, 32 bytes.
        id: of the object.
    """
    return blake2b(id, digest_size=TOKEN_BYTES, key=secret).digest()


def split(packed: bytes) -> Iterator[bytes]:
    """Cut a run of packed references into the 48 bytes of each.

    Raises:
        ProtocolError: the run does not end where a reference ends.
    """
    if len(packed) % blob.REF_BYTES:
        raise ProtocolError(f"{len(packed)} bytes are not a whole number of references")
    return (packed[at : at + blob.REF_BYTES] for at in range(0, len(packed), blob.REF_BYTES))
