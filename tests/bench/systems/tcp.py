"""The measuring stick of transfers: a copy over loopback TCP, `sendall` → `recv_into`, warm buffers."""

from __future__ import annotations

import mmap
import multiprocessing
import socket
import time
from multiprocessing.connection import Connection

from tests.bench.system import Setting, System, WrongAnswerError

CHUNK_BYTES = 4 << 20


class Adapter(System):
    name = "tcp"
    is_cold_once = False

    def start(self, setting: Setting) -> None:
        self._control, theirs = multiprocessing.Pipe()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._socket = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        fork = multiprocessing.get_context("fork")
        self._receiver = fork.Process(target=_receive, args=(theirs, accepted), daemon=True)
        self._receiver.start()
        accepted.close()
        theirs.close()
        self._buffer = memoryview(b"")

    def carry(self, size_bytes: int, seed: int, to_site: int) -> float:
        if len(self._buffer) < size_bytes:
            self._buffer = _warm_buffer(size_bytes)
        self._buffer[size_bytes - 1] = seed
        self._control.send(size_bytes)
        self._control.recv()  # the receiver's buffer is warm
        start = time.perf_counter()
        self._socket.sendall(self._buffer[:size_bytes])
        last = self._control.recv()
        seconds = time.perf_counter() - start
        if last != seed:
            raise WrongAnswerError("the copy differs")
        return seconds

    def stop(self) -> None:
        self._control.send(None)
        self._receiver.join()


def _warm_buffer(size_bytes: int) -> memoryview:
    buffer = memoryview(mmap.mmap(-1, size_bytes))
    for start in range(0, size_bytes, CHUNK_BYTES):
        part = buffer[start : start + CHUNK_BYTES]
        part[:] = b"\1" * len(part)
    return buffer


def _receive(control: Connection, connection: socket.socket) -> None:
    buffer = memoryview(b"")
    while size_bytes := control.recv():
        if len(buffer) < size_bytes:
            buffer = _warm_buffer(size_bytes)
        control.send(None)
        position = 0
        while position < size_bytes:
            end = min(size_bytes, position + CHUNK_BYTES)
            position += connection.recv_into(buffer[position:end])
        control.send(buffer[size_bytes - 1])
