"""An agent as a child process: how an embedded or a local endpoint is started, watched and stopped.

Order and answer are the matter of `gcref.directory.launch`. Starting does not wait: the executor makes the process, goes on,
and hears of its address later. The agent ends when its stdin does, so it never outlives whoever started it. What it writes
to standard error lands in an unlinked file, for error texts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

from gcref import ids
from gcref.directory import launch
from gcref.directory.launch import Ready
from gcref.errors import EndpointLostError

STOP_WAIT_S: Final = 10.0
"""How long an agent may take to stop in order, before it is killed."""

OBITUARY_WAIT_S: Final = 0.25
"""How long to wait for the exit code of an agent that has closed its output."""

STDERR_TAIL_BYTES: Final = 4096

_ANSWER_MAX_BYTES: Final = 64 * 1024


class AgentProcess:
    """An agent that was started here.

    Args:
        id: the endpoint's id, 16 bytes.
        name: its name; None for a private endpoint.
        home: its `GCREF_HOME`; None for a private endpoint.
        workers: worker processes; None: as many as it thinks fit.
        carriers: the ways that it may use; None: as configured.
        config: its configuration, a table as in its TOML.
        hub_url: the hub that it is to register with; None: there is none.
        token: its owner's, for the hub.

    Attributes:
        fd: descriptor of its stdout: readable when it has answered, or ended; until `stop`.
    """

    def __init__(
        self,
        id: bytes,
        *,
        name: str | None = None,
        home: Path | None = None,
        workers: int | None = None,
        carriers: list[str] | None = None,
        config: Mapping[str, Any] | None = None,
        hub_url: str | None = None,
        token: str | None = None,
    ) -> None:
        self.id = id
        self.name = name
        self._answer = b""
        self._stderr = _unnamed_file()
        try:
            self._process = launch.start_process(self._stderr)
        except BaseException:
            os.close(self._stderr)
            raise
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._stdin: IO[bytes] = stdin
        self._stdout: IO[bytes] = stdout
        self._abandoned = False
        self.fd: Final = stdout.fileno()
        os.set_blocking(self.fd, False)
        order = launch.order_for(
            id,
            name=name,
            home=home,
            config=config or {},
            watch_stdin=True,
            workers=workers,
            carriers=carriers,
            sys_path=[os.path.abspath(entry) for entry in sys.path],
            hub_url=hub_url,
            token=token,
        )
        launch.tell(self._stdin, order)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def read_answer(self) -> Ready | None:
        """Takes what it has said so far; None while that is not a whole answer.

        Raises:
            GcrefError: it could not start (its own error), or it ended without a word (`EndpointLostError`).
        """
        while b"\n" not in self._answer:
            chunk = self._read()
            if chunk is None:
                return None
            if not chunk or len(self._answer) > _ANSWER_MAX_BYTES:
                raise EndpointLostError(self.obituary(), endpoint_id=ids.text(self.id))
            self._answer += chunk
        try:
            return launch.read_answer(self._answer.partition(b"\n")[0])
        except ValueError as error:
            raise EndpointLostError(
                f"the agent of {self._who()} answered what cannot be understood",
                endpoint_id=ids.text(self.id),
            ) from error

    def is_open(self) -> bool:
        """Whether its stdout is open still; to be asked when there is something to read after the answer."""
        return self._read() != b""

    def _read(self) -> bytes | None:
        """What it has said; None if nothing, empty at the end."""
        try:
            return os.read(self.fd, _ANSWER_MAX_BYTES)
        except BlockingIOError:
            return None

    def wait_ready(self, timeout: float) -> Ready:
        """Waits for the answer.

        Raises:
            GcrefError: it could not start, or took too long.
        """
        import select

        poller = select.poll()
        poller.register(self.fd, select.POLLIN | select.POLLHUP)
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise EndpointLostError(
                    f"the agent of {self._who()} did not start within {timeout:g} s{self._stderr_tail()}",
                    endpoint_id=ids.text(self.id),
                )
            ready = self.read_answer()
            if ready is not None:
                return ready

    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def obituary(self) -> str:
        """How it ended, for an error."""
        try:
            code = self._process.wait(OBITUARY_WAIT_S)
        except subprocess.TimeoutExpired:
            return f"the agent of {self._who()} has closed its output{self._stderr_tail()}"
        return f"the agent of {self._who()} {launch.how_it_ended(code)}{self._stderr_tail()}"

    def _who(self) -> str:
        return "the private endpoint" if self.name is None else f"endpoint {self.name!r}"

    def _stderr_tail(self) -> str:
        try:
            size = os.fstat(self._stderr).st_size
            tail = os.pread(self._stderr, STDERR_TAIL_BYTES, max(0, size - STDERR_TAIL_BYTES))
        except OSError:
            return ""
        text = tail.decode(errors="replace").strip()
        return f"; its last words:\n{text}" if text else ""

    def resume(self) -> None:
        """Has it go on, should somebody have suspended it."""
        if not self._abandoned and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)

    def request_stop(self) -> None:
        """Asks it to stop; returns at once."""
        self.resume()  # what is suspended cannot stop in order
        launch.tell(self._stdin, {"stop": True, "wait": False})
        try:
            self._stdin.close()
        except OSError:
            pass

    def stop(self, timeout: float = STOP_WAIT_S) -> None:
        """Stops it, by force if need be, and waits until it is gone. Can be called again."""
        if self._abandoned:
            return
        self.request_stop()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1

    def abandon(self) -> None:
        """In a forked child: lets go of the pipes, so that the parent's death is noticed."""
        self._abandoned = True
        self._process.returncode = 0  # it is no child of this process, and nobody is to miss it
        for file in (self._stdin, self._stdout):
            try:
                file.close()
            except OSError:
                pass


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("gcref-agent-stderr", os.MFD_CLOEXEC)
    import tempfile

    descriptor, path = tempfile.mkstemp()
    os.unlink(path)
    return descriptor
