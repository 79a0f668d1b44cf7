"""The systems' processes as seen from outside, and the taking of turns."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.bench.peers import cache_dir
from tests.bench.workloads import Workload

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0
TURN_S = 300.0
"""Longer than any turn takes; a system that hangs ends here."""
STOP_S = 30.0

Samples = dict[str, list[float]]
"""Figure → one value per turn."""


class ChildError(Exception):
    """A system's process failed. `wrong`: it gave a wrong answer."""

    def __init__(self, message: str, *, wrong: bool = False) -> None:
        super().__init__(message)
        self.wrong = wrong


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """A system that takes part.

    Attributes:
        name: its module in `tests.bench.systems`.
        python: the interpreter that has it.
        quiet: idle, it disturbs nobody, so its process is kept between turns.
        params: which of a workload's parameter sets apply to it.
    """

    name: str
    python: str = sys.executable
    quiet: bool = True
    is_peer: bool = False


class Child:
    """One process that measures one system."""

    def __init__(
        self, contender: Contender, workload: Workload, more: Mapping[str, str] | None = None
    ) -> None:
        self._name = contender.name
        self._home = tempfile.TemporaryDirectory(prefix="gcref-bench-", ignore_cleanup_errors=True)
        self._log = Path(self._home.name, "log")
        environment = os.environ | {
            # A peer's commands lie beside its interpreter.
            "PATH": os.pathsep.join([str(Path(contender.python).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "GCREF_HOME": str(Path(self._home.name, "home")),
            # As after an installation: every system's code is compiled once, not at every start.
            "PYTHONPYCACHEPREFIX": str(cache_dir() / "pycache"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            **(more or {}),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [contender.python, "-m", "tests.bench.child", contender.name],
                cwd=self._home.name,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            setting = None if workload.setting is None else dataclasses.asdict(workload.setting)
            self.version = self._ask({"start": setting}, START_S)["version"]
        except BaseException:
            self.stop()
            raise

    def measure(self, workload: Workload, params: Mapping[str, Any]) -> dict[str, float]:
        answer = self._ask({"measure": workload.name, "params": dict(params)}, TURN_S)
        figures: dict[str, float] = answer["figures"]
        return figures

    def stop(self) -> None:
        """End the process, in order if it still obeys; then whatever is left of its process group."""
        try:
            if self._process.poll() is None:
                self._ask({"stop": True}, STOP_S)
                self._process.wait(STOP_S)
        except (ChildError, subprocess.TimeoutExpired):
            pass  # it is ended the hard way below
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._home.cleanup()

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def _ask(self, order: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(f"{self._name} died\n{self.log_tail()}") from None
        line = b""
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise ChildError(f"{self._name}: no answer in {timeout_s:.0f} s\n{self.log_tail()}")
                piece = os.read(self._process.stdout.fileno(), 65536)
                if not piece:
                    raise ChildError(f"{self._name} died\n{self.log_tail()}")
                line += piece
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(f"{self._name}: {answer['error']}\n{self.log_tail()}", wrong=answer["wrong"])
        return answer


def take_turns(
    workload: Workload,
    contenders: list[Contender],
    *,
    quick: bool,
    tell: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> tuple[dict[str, Samples], dict[str, str], dict[str, ChildError]]:
    """Measure all contenders, one after the other, as often as the workload asks.

    Args:
        workload: what to measure.
        contenders: those that can do it.
        quick: take the workload's quick form.
        tell: hears a line of progress at a time.
        environment: more variables for the systems' processes.

    Returns:
        Samples, versions, and errors, each by system. One that failed is left out of the turns that follow.
    """
    samples: dict[str, Samples] = {contender.name: {} for contender in contenders}
    versions: dict[str, str] = {}
    failed: dict[str, ChildError] = {}
    kept: dict[str, Child] = {}
    turns = {contender.name: workload.turns_of(contender.name, quick=quick) for contender in contenders}
    try:
        for turn in range(max(turns.values(), default=0)):
            for contender in contenders:
                if contender.name in failed or turn >= turns[contender.name]:
                    continue
                tell(f"{workload.name}: {contender.name} {turn + 1}/{turns[contender.name]}")
                params = dict(workload.params)
                params |= workload.quick if quick else {}
                params |= workload.peers if contender.is_peer else {}
                try:
                    child = kept.pop(contender.name, None) or Child(contender, workload, environment)
                    kept[contender.name] = child
                    versions[contender.name] = child.version
                    for figure, value in child.measure(workload, params).items():
                        samples[contender.name].setdefault(figure, []).append(value)
                except ChildError as error:
                    failed[contender.name] = error
                if contender.name in kept and (not contender.quiet or contender.name in failed):
                    kept.pop(contender.name).stop()
    finally:
        for child in kept.values():
            child.stop()
    return samples, versions, failed
