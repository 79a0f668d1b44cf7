"""A TCP link that tests can slow down, freeze and cut, and that counts what passes.

    with Proxy("tcp://127.0.0.1:4001") as proxy:
        … dial proxy.address …
        proxy.cut()        # connections break, new ones are refused
        proxy.restore()
        proxy.freeze()     # nothing passes, and nobody is told: no FIN, no RST
        proxy.thaw()
        proxy.delay_s = 0.05

One thread with an event loop of its own moves the bytes; the methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from gcref.directory import records

T = TypeVar("T")

_PIECE_BYTES: Final = 256 * 1024
_QUEUE_PIECES: Final = 64


class Proxy:
    """Listens on a port of this machine and passes everything on to `target`, until told otherwise.

    Attributes:
        address: what to dial, `tcp://127.0.0.1:port`. It stays the same when the link is cut and restored.
        delay_s: seconds by which every piece is held back, in both directions. It may be changed at any time.
        bytes_up: bytes passed from those who dial to the target.
        bytes_down: bytes passed back.
        connections: how many were accepted, ever.
    """

    def __init__(self, target: str, *, delay_s: float = 0.0) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self.delay_s = delay_s
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        self._links: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        # Bound for the whole time and never listening: the port stays ours while the link is cut.
        self._reserved = _bound_socket(0)
        self._port: int = self._reserved.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self._port}"
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-proxy", daemon=True)
        self._thread.start()
        self._do(self._listen)

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        self._do(self._shut)

    def restore(self) -> None:
        """Take connections again."""
        self._do(self._listen)

    def freeze(self) -> None:
        """Let nothing pass, silently: connections stay up."""
        self._do(self._set_flowing, False)

    def thaw(self) -> None:
        """Let pass what was held, and everything after it."""
        self._do(self._set_flowing, True)

    def close(self) -> None:
        """End the link for good."""
        if self._loop.is_closed():
            return
        self._do(self._shut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, work: Callable[..., Coroutine[Any, Any, T]], *args: object) -> T:
        return asyncio.run_coroutine_threadsafe(work(*args), self._loop).result(timeout=10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, sock=_bound_socket(self._port))

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _set_flowing(self, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.current_task()
        assert link is not None
        self._links.add(link)
        self.connections += 1
        there: asyncio.StreamWriter | None = None
        try:
            back, there = await asyncio.open_connection(*self._target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, there, "bytes_up"))
                group.create_task(self._pump(back, writer, "bytes_down"))
        except (asyncio.CancelledError, OSError, ExceptionGroup):
            pass  # cut, or one side went away: both connections end
        finally:
            self._links.discard(link)
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counter: str) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUE_PIECES)

        async def take() -> None:
            while True:
                data = await source.read(_PIECE_BYTES)
                await pieces.put((self._loop.time() + self.delay_s, data))
                if not data:
                    return

        async def give() -> None:
            while True:
                due, data = await pieces.get()
                if due > self._loop.time():
                    await asyncio.sleep(due - self._loop.time())
                await self._flowing.wait()
                if not data:
                    raise ConnectionAbortedError  # the end of one direction ends the link
                sink.write(data)
                await sink.drain()
                setattr(self, counter, getattr(self, counter) + len(data))

        async with asyncio.TaskGroup() as group:
            group.create_task(take())
            group.create_task(give())


@contextlib.contextmanager
def proxied(endpoint: str) -> Iterator[tuple[Proxy, Proxy]]:
    """Lead all TCP traffic to an endpoint through two proxies, by way of its record.

    Whoever reads the record from now on dials the proxies; what is connected already is not touched.

    Args:
        endpoint: its name or id.

    Yields:
        The proxies of the control socket and of the bulk socket.
    """
    record = records.resolve(endpoint)
    with Proxy(_tcp_of(record.control)) as control, Proxy(_tcp_of(record.bulk)) as bulk:
        records.write(dataclasses.replace(record, control=(control.address,), bulk=(bulk.address,)))
        try:
            yield control, bulk
        finally:
            if records.read(record.name) is not None:
                records.write(record)


def _tcp_of(addresses: tuple[str, ...]) -> str:
    return next(address for address in addresses if address.startswith("tcp://"))


def _bound_socket(port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found.bind(("127.0.0.1", port))
    return found
