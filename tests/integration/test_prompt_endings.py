"""Whatever its endpoint does, a client ends promptly: `shutdown`, `with`, `close` and the end of the interpreter.

The endpoint is frozen, out of reach, silent, dead, or does not let it in. What is lost by that is said, by typed errors or
warnings.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import psutil
import pytest

from gcref import Client, Executor, LocalEndpoint, errors
from gcref.directory import records
from gcref.sdk import executor as executors
from tests.support.leaks import run_processes
from tests.support.programs import environment
from tests.support.proxy import Proxy, proxied
from tests.support.tasks import inc
from tests.support.waiting import patience, wait_until

EXIT_S: Final = patience(5 + 4)
"""What is not acknowledged may hold up the end of an interpreter for 5 s; the rest is for many of them on a busy machine."""

PROGRAM: Final = """
import sys, threading, time, warnings
import gcref
from tests.support.tasks import *

client = gcref.Client(carriers=("direct",))
e = gcref.Executor("site", client)
warm = sys.argv[1] == "warm"
if warm:
    assert e.submit(inc, 1).result(30) == 2
    old = e.submit(blob_of, 2_000_000)
    assert old.exception(30) is None
print("ready", flush=True)
sys.stdin.readline()
fs = [e.submit(inc, n) for n in range(3)]
up = e.submit(len, bytes(500_000))

def name_of(call):
    try:
        return type(call()).__name__
    except BaseException as error:
        return type(error).__name__

def wait(call):
    threading.Thread(target=lambda: print("heard", name_of(call), flush=True)).start()
    time.sleep(0.05)

"""

ENDINGS: Final = {
    "exit": "",
    "shutdown": "e.shutdown(wait=False)",
    "cancelled": "e.shutdown(wait=False, cancel_futures=True)",
    "closed": "client.close(); print('heard', name_of(fs[0].exception), flush=True)",
    "sys.exit": "raise SystemExit(3)",
    "a thread waits": "wait(fs[0].exception)",
    "a thread waits for a large value": "wait(old.result)",
}


class Ended(NamedTuple):
    """How a program ended."""

    code: int
    out: list[str]
    err: str
    took_s: float


def ended(strike: Callable[[], object], folder: Path) -> dict[tuple[str, str], Ended]:
    """Runs a program for each ending, with an endpoint that it has met ("warm") or not ("cold"), all at once.

    They submit and end when the blow has been struck.
    """
    running: dict[tuple[str, str], subprocess.Popen[str]] = {}
    with contextlib.ExitStack() as stack:
        for number, (name, ending) in enumerate(ENDINGS.items()):
            path = folder / f"program{number}.py"
            path.write_text(PROGRAM + ending + "\n")
            for met in ("warm",) if "old" in ending else ("warm", "cold"):
                running[name, met] = process = stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, str(path), met],
                        cwd=folder,
                        env=environment(),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
                stack.callback(process.kill)
        for process in running.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        strike()
        since = time.monotonic()
        for process in running.values():
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found: dict[tuple[str, str], Ended] = {}
        for which, process in running.items():
            out, err = process.communicate(timeout=patience(30))
            found[which] = Ended(process.returncode, out.split(), err, time.monotonic() - since)
    return found


class Site:
    """An endpoint that can be struck."""

    def __init__(self, local: LocalEndpoint, proxies: tuple[Proxy, Proxy]) -> None:
        self._local = local
        self._proxies = proxies

    def frozen(self) -> None:
        os.kill(self._local.pid, signal.SIGSTOP)

    def silent(self) -> None:
        for proxy in self._proxies:
            proxy.freeze()

    def cut(self) -> None:
        for proxy in self._proxies:
            proxy.cut()

    def dead(self) -> None:
        os.kill(self._local.pid, signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def _swept(_nothing_left: None) -> Iterator[None]:
    """What killed agents leave behind goes with the next start of an endpoint (L4)."""
    yield
    wait_until(lambda: not run_processes(), what=lambda: f"the end of {run_processes()}")
    with LocalEndpoint("sweeper", workers=1):
        pass


@pytest.fixture
def site(home: Path) -> Iterator[Site]:
    """An endpoint that is reached over TCP only, through proxies."""
    with LocalEndpoint("site", workers=1) as local, proxied("site") as proxies:
        yield Site(local, proxies)
        with contextlib.suppress(ProcessLookupError):
            os.kill(local.pid, signal.SIGCONT)


@pytest.mark.parametrize("blow", ["frozen", "silent", "cut", "dead"])
def test_programs_end_promptly_whatever_their_endpoint_does(site: Site, tmp_path: Path, blow: str) -> None:
    found = ended(getattr(site, blow), tmp_path)
    for which, end in found.items():
        name, _ = which
        assert end.took_s < EXIT_S, (which, end)
        assert "Traceback" not in end.err, (which, end)
        assert end.code == (3 if name == "sys.exit" else 0), (which, end)
        if "thread" in name or name == "closed":
            assert end.out == ["heard", "EndpointLostError"], (which, end)
    if blow == "dead":
        return  # they have heard that it is, and that their tasks are lost
    for met in ("warm", "cold"):
        assert "4 tasks may not have reached their endpoints" in found["exit", met].err, found["exit", met]
    assert found["cancelled", "cold"].err == "", "what was not sent is cancelled here"


@pytest.mark.parametrize("blow", ["frozen", "silent", "cut"])
def test_a_with_block_waits_until_the_endpoint_is_given_up_and_says_so(
    site: Site, home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, blow: str
) -> None:
    monkeypatch.setattr(executors, "SAY_SO_AFTER_S", 0.2)
    (home / "config.toml").write_text("endpoint_lost_s = 1.5\nheartbeat_s = 0.2\n")
    with Client(carriers=("direct",)) as client:
        with Executor("site", client) as executor:
            assert executor.submit(inc, 1).result(patience(30)) == 2
            getattr(site, blow)()
            f = executor.submit(inc, 1)
            since = time.monotonic()
        assert time.monotonic() - since < patience(6)
        with pytest.raises(errors.EndpointLostError, match=r"out of reach for 1\.5 s"):
            f.result(0)
    assert [r.getMessage() for r in caplog.records if "shutdown waits for 1 tasks" in r.getMessage()]


def test_an_endpoint_that_does_not_let_us_in_is_a_typed_error_at_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "stranger"
    record = records.resolve("site")
    records.write(record, stranger)
    monkeypatch.setenv("GCREF_HOME", str(stranger))
    with Client(carriers=("direct",)) as client:
        since = time.monotonic()
        with Executor("site", client) as executor:
            f = executor.submit(inc, 1)
        with pytest.raises(errors.AuthError, match="authorized_keys"):
            f.result(0)
        assert time.monotonic() - since < patience(6)


def test_an_endpoint_that_never_was_is_a_typed_error(home: Path) -> None:
    with pytest.raises(errors.NotFoundError, match="nowhere"):
        Executor("nowhere")


# ---------------------------------------------------------------------------------------------------- private endpoints

PRIVATE: Final = """
import os, signal, sys, time
import gcref
from tests.support.tasks import *

e = gcref.Executor(user_endpoint_config={"workers": 1})
pid = e._core.private.process.pid
if sys.argv[1] == "warm":
    assert e.submit(inc, 1).result(30) == 2
fs = []
def strike(number):
    os.kill(pid, number)
    fs.extend([e.submit(inc, n) for n in range(3)])
"""

PRIVATE_ENDINGS: Final = {
    "exit": "",
    "shutdown": "e.shutdown()",
    "at once": "e.shutdown(wait=False)",
    "cancelled": "e.shutdown(cancel_futures=True)",
    "closed": "e._core.client.close()",
}


@pytest.mark.parametrize("warm", ["warm", "cold"])
@pytest.mark.parametrize("blow", ["SIGSTOP", "SIGKILL"])
def test_a_private_endpoint_that_is_suspended_or_killed_does_not_hold_up_its_program(
    home: Path, tmp_path: Path, blow: str, warm: str
) -> None:
    """A suspended one goes on, as its tasks are to be finished; for a dead one there is nothing to wait for."""
    running: dict[str, subprocess.Popen[str]] = {}
    since = time.monotonic()
    for number, (name, ending) in enumerate(PRIVATE_ENDINGS.items()):
        path = tmp_path / f"program{number}.py"
        told = f"""
            strike(signal.{blow})
            {ending}
            print(pid, *[f._state for f in fs], flush=True)
            """
        path.write_text(PRIVATE + textwrap.dedent(told))
        running[name] = subprocess.Popen(
            [sys.executable, str(path), warm],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    for name, process in running.items():
        out, err = process.communicate(timeout=patience(30))
        pid, *states = out.split()
        assert (process.returncode, err) == (0, ""), (name, out, err)
        if name in ("shutdown", "closed", "cancelled"):
            assert all(state in ("FINISHED", "CANCELLED_AND_NOTIFIED") for state in states), (name, states)
        wait_until(lambda pid=pid: not psutil.pid_exists(int(pid)), what="the agent to be gone")  # type: ignore[misc]
    assert time.monotonic() - since < patience(20)
