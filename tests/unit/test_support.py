"""The tests' own tools: a tool that cannot fail finds nothing."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.leaks import Traces
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                held.append(connection)
                try:
                    while data := connection.recv(65536):
                        connection.sendall(data)
                except OSError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()
        thread.join(timeout=5)


def _dial(proxy: Proxy) -> socket.socket:
    port = int(proxy.address.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def _is_broken(link: socket.socket) -> bool:
    try:
        return link.recv(16) == b""
    except ConnectionResetError:
        return True


def test_wait_until_gives_the_answer_and_says_what_did_not_come() -> None:
    answers = iter([0, 0, 7])
    assert wait_until(lambda: next(answers)) == 7
    with pytest.raises(AssertionError, match="in vain for rain"):
        wait_until(lambda: False, timeout_s=0.01, what="rain")


def test_the_proxy_passes_counts_delays_and_cuts(echo: str) -> None:
    with Proxy(echo) as proxy:
        with _dial(proxy) as link:
            link.sendall(b"hello")
            assert link.recv(16) == b"hello"
            wait_until(lambda: (proxy.bytes_up, proxy.bytes_down) == (5, 5))
            proxy.delay_s = 0.05
            started = time.monotonic()
            link.sendall(b"again")
            assert link.recv(16) == b"again"
            assert time.monotonic() - started >= 0.1
            proxy.delay_s = 0
            proxy.cut()
            wait_until(lambda: _is_broken(link))
        with pytest.raises(ConnectionRefusedError):
            _dial(proxy)
        proxy.restore()
        with _dial(proxy) as link:
            link.sendall(b"back")
            assert link.recv(16) == b"back"
        assert proxy.connections == 2


def test_a_frozen_proxy_holds_bytes_and_keeps_the_connection(echo: str) -> None:
    with Proxy(echo) as proxy, _dial(proxy) as link:
        proxy.freeze()
        link.sendall(b"held")
        link.settimeout(0.1)
        with pytest.raises(TimeoutError):
            link.recv(16)
        proxy.thaw()
        link.settimeout(5)
        assert link.recv(16) == b"held"


def test_the_end_of_one_side_reaches_the_other(echo: str) -> None:
    with Proxy(echo) as proxy, _dial(proxy) as link:
        link.sendall(b"last")
        link.shutdown(socket.SHUT_WR)
        got = b""
        try:
            while piece := link.recv(16):
                got += piece
        except ConnectionResetError:
            pass
        assert got in (b"", b"last")


def test_traces_of_a_process_a_thread_a_file_a_mapping_and_a_folder(tmp_path: Path) -> None:
    before = Traces.take()
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="left-over")
    thread.start()
    # Its own session, and its parent gone: found by the mark in its environment.
    code = "import os, sys; os.fork() and os._exit(0); os.setsid(); sys.stdin.read()"
    reader, writer = os.pipe()
    subprocess.run([sys.executable, "-c", code], stdin=reader, check=True)
    os.close(reader)
    folder = Path(f"/dev/shm/gcref-{os.geteuid()}") / ("f" * 31 + "e")
    folder.mkdir(parents=True, mode=0o700)
    segment = folder / "segment"
    segment.write_bytes(b"x" * 4096)
    try:
        with segment.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
            found = wait_until(lambda: _kinds(Traces.take().beyond(before)))
            assert found == {"process", "thread", "open file", "mapped segment", "folder in shared memory"}
    finally:
        os.close(writer)
        done.set()
        thread.join()
        segment.unlink()
        folder.rmdir()
    wait_until(lambda: not Traces.take().beyond(before))


def _kinds(lines: list[str]) -> set[str]:
    return {line.partition(":")[0] for line in lines}
