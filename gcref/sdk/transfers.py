"""Large blobs on their way to and from a client: what the bulk thread finds here.

    submit, put ── Upload ──► Uploads (provider) ◄── FETCH ── the endpoint
    result()    ── Pull ◄──── Arrivals (sink)    ◄── CHUNK ── the home

A value that comes from another machine is written into memory of this process; one of this machine is mapped from the
file that its home exposes, read-only, and stays mapped as long as an array lies in it.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from gcref.errors import AuthError
from gcref.objects import blob

Buffer = memoryview

PAGE_BYTES: Final = mmap.PAGESIZE


class Upload:
    """A blob that an endpoint will fetch from here. It is a copy: the user may change the original.

    Attributes:
        id: of the object, 16 bytes.
        size: its bytes.
        reader: the party that may fetch it.
        data: the bytes; empty once the endpoint has them.
    """

    __slots__ = ("__weakref__", "data", "id", "reader", "size")

    def __init__(self, id: bytes, encoded: blob.Encoded, reader: bytes) -> None:
        self.id = id
        self.reader = reader
        self.data = blob.join(encoded)
        self.size = len(self.data)


class Range(NamedTuple):
    """A range that is being sent.

    Attributes:
        buffer: its bytes.
    """

    buffer: memoryview

    def release(self) -> None:
        """The network has let go of it."""


class Uploads:
    """The provider: serves uploads to the endpoints that they are for. The entries live as long as somebody else keeps them."""

    def __init__(self) -> None:
        self._items: weakref.WeakValueDictionary[bytes, Upload] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()  # held while entries come or are counted; they vanish without it

    def add(self, upload: Upload) -> None:
        """Makes an upload available."""
        with self._lock:
            self._items[upload.id] = upload

    def ids(self) -> list[bytes]:
        """All that endpoints do not have yet."""
        with self._lock:
            return list(self._items)

    def __contains__(self, id: bytes) -> bool:
        return id in self._items

    def forget(self, id: bytes) -> None:
        """The endpoint has it."""
        with self._lock:
            upload = self._items.pop(id, None)
        if upload is not None:
            upload.data = b""

    def _find(self, id: bytes, requester: Any) -> bytes:
        upload = self._items.get(id)
        if upload is None or not upload.data:
            raise LookupError("no upload of that id (any more)")
        if requester.party != upload.reader:
            raise AuthError("this upload is for another endpoint")
        return upload.data

    def read(
        self, id: bytes, attempt: int, offset: int, length: int, requester: Any, token: bytes | None
    ) -> Range:
        """A range of an upload."""
        return Range(memoryview(self._find(id, requester))[offset : offset + length])

    def expose(self, id: bytes, attempt: int, requester: Any, token: bytes | None) -> tuple[str, int]:
        """Uploads lie in this process, not in a file: they are written into the endpoint's (`fill`)."""
        raise LookupError("an upload has no path")

    def fill(self, id: bytes, attempt: int, path: str, requester: Any, token: bytes | None) -> int:
        """Writes an upload into a file of the endpoint's, on the same machine."""
        data = self._find(id, requester)
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            done = 0
            view = memoryview(data)
            while done < len(data):
                done += os.pwrite(descriptor, view[done:], done)
        finally:
            os.close(descriptor)
        return len(data)


class Memory:
    """Room for a value that comes over the network.

    Attributes:
        buffer: all of it, writable.
    """

    def __init__(self, size: int, done: Callable[[memoryview], None]) -> None:
        self.buffer = memoryview(bytearray(size) if size < PAGE_BYTES else mmap.mmap(-1, size))
        self._done = done

    def write(self, offset: int, data: Any) -> None:
        """Puts bytes in their place."""
        self.buffer[offset : offset + len(data)] = data

    def share(self) -> None:
        """Nobody else can see this memory."""
        return

    def seal(self) -> None:
        """It is complete."""
        self._done(self.buffer.toreadonly())

    def abort(self) -> None:
        """It will not be complete."""


class Arrivals:
    """The sink: keeps what has arrived until it is taken."""

    def __init__(self) -> None:
        self._done: dict[tuple[bytes, int], memoryview] = {}

    def begin(self, id: bytes, attempt: int, size: int) -> Memory:
        """Room for a value."""
        key = (id, attempt)
        return Memory(size, lambda buffer: self._done.__setitem__(key, buffer))

    def adopt(self, id: bytes, attempt: int, path: str, size: int) -> None:
        """Maps a file of its home, on the same machine.

        Raises:
            OSError: it is not there (any more), or is not as large as it should be.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_size < size:
                raise OSError(f"{path} has less than {size} bytes")
            mapped = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._done[id, attempt] = memoryview(mapped)

    def take(self, id: bytes, attempt: int) -> memoryview | None:
        """What has arrived; it is the caller's from now on."""
        return self._done.pop((id, attempt), None)


class Pull:
    """A fetch under way. Many may wait for it."""

    __slots__ = ("_buffer", "_callbacks", "_done", "_error", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._buffer: memoryview | None = None
        self._error: Callable[[], BaseException] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the next one has to try again."""
        return self._error is not None

    def wait(self, timeout: float | None) -> memoryview:
        """The blob, read-only.

        Raises:
            TimeoutError: it is not here in time.
            LostError: it cannot be had.
        """
        if not self._done.wait(timeout):
            raise TimeoutError("the value is not here yet; it is being fetched")
        if self._error is not None:
            raise self._error()
        assert self._buffer is not None
        return self._buffer

    def when_done(self, fn: Callable[[], None]) -> None:
        """Calls `fn`, on any thread, once `wait` would not block; at once if that is so now."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(fn)
                return
        fn()

    def finish(self, buffer: memoryview | None, error: Callable[[], BaseException] | None = None) -> None:
        """Ends it, with the bytes or with what makes the error; each waiter raises one of its own."""
        with self._lock:
            self._buffer = buffer
            self._error = error
            self._done.set()
            callbacks, self._callbacks = self._callbacks, []
        for fn in callbacks:
            fn()
