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

    Args:
        target: where to pass it on to, `tcp://host:port`.
        at: where to listen, `tcp://127.0.0.2:port`; None: at any port of 127.0.0.1.
        delay_s: seconds by which every piece is held back.

    Attributes:
        target: where new connections are passed on to. It may be changed at any time.
        address: what to dial. It stays the same when the link is cut and restored.
        delay_s: seconds by which every piece is held back, in both directions. It may be changed at any time.
        bytes_up: bytes passed from those who dial to the target.
        bytes_down: bytes passed back.
        connections: how many were accepted, ever.
    """

    def __init__(self, target: str, *, at: str | None = None, delay_s: float = 0.0) -> None:
        self.target = target
        self.delay_s = delay_s
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        self._listener: socket.socket | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        # Bound for the whole time and never listening: the port stays ours while the link is cut.
        wanted_host, wanted_port = _host_and_port(at or "tcp://127.0.0.1:0")
        self._reserved = _bound_socket(wanted_host, wanted_port)
        self._place: tuple[str, int] = self._reserved.getsockname()
        self.address = f"tcp://{wanted_host}:{self._place[1]}"
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
        if self._listener is None:
            # Not a server of asyncio: one that is closed while it accepts leaves a socket open.
            self._listener = _bound_socket(*self._place)
            self._listener.setblocking(False)
            self._listener.listen(100)
            self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _shut(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        # Also those that were accepted a moment ago, whose tasks have not begun: only once they have, they can be ended.
        ended: set[asyncio.Task[None]] = set()
        while len(asyncio.all_tasks()) > 1:
            for link in self._links - ended:
                link.cancel()
            ended |= self._links
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # what was aborted is closed in the next turn of the loop

    async def _set_flowing(self, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    def _accept(self, listener: socket.socket) -> None:
        try:
            taken, _ = listener.accept()
        except OSError:
            return  # whoever came has gone again
        self.connections += 1
        link = self._loop.create_task(self._pass_on(taken))
        self._links.add(link)
        link.add_done_callback(self._links.discard)
        link.add_done_callback(lambda _: taken.close())  # it may be cancelled before it begins

    async def _pass_on(self, taken: socket.socket) -> None:
        writer: asyncio.StreamWriter | None = None
        there: asyncio.StreamWriter | None = None
        try:
            taken.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=taken)
            back, there = await asyncio.open_connection(*_host_and_port(self.target))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, there, "bytes_up"))
                group.create_task(self._pump(back, writer, "bytes_down"))
        except (asyncio.CancelledError, OSError, ExceptionGroup):
            pass  # cut, or one side went away: both connections end
        finally:
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


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def _bound_socket(host: str, port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found.bind((host, port))
    return found
