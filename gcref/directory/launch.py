"""Starting an agent: the process, the order that it is given, the answer that it gives.

    order_for ── one JSON line ──► stdin    `python -m endpoint_worker.agent`    stdout ── one JSON line ──► read_answer

What the lines hold is told in `endpoint_worker.agent.start`. Who starts an agent decides where its standard error goes, how
long to wait, and whether it outlives them: an executor's endpoint ends with its client, `endpoint-worker start` leaves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from gcref import errors
from gcref.errors import EndpointLostError, GcrefError


class Ready(NamedTuple):
    """An agent that serves.

    Attributes:
        control: address of its control socket.
        bulk: address of its bulk socket.
    """

    control: str
    bulk: str


def order_for(
    id: bytes,
    *,
    name: str | None,
    home: Path | None,
    config: Mapping[str, Any],
    watch_stdin: bool,
    workers: int | None = None,
    carriers: list[str] | None = None,
    sys_path: Iterable[str] = (),
    hub_url: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """What an agent is to be told.

    Args:
        id: the endpoint's id, 16 bytes.
        name: its name; None for a private endpoint.
        home: its `GCREF_HOME`; None for a private endpoint.
        config: its configuration, a table as in its TOML.
        watch_stdin: it ends when its stdin does.
        workers: worker processes; None: as configured.
        carriers: the ways that it may use; None: as configured.
        sys_path: import path of the workers; empty: the agent's own.
        hub_url: the hub that it is to register with; None: there is none.
        token: its owner's, for the hub.
    """
    return {
        "name": name,
        "id": id.hex(),
        "home": None if home is None else str(home),
        "private": name is None,
        "workers": workers,
        "carriers": carriers,
        "sys_path": list(sys_path),
        "config": dict(config),
        "watch_stdin": watch_stdin,
        "hub_url": hub_url,
        "token": token,
    }


def start_process(stderr: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """A new agent, which waits for its order. Its stdin and stdout are unbuffered pipes.

    Args:
        stderr: where it writes its log.
    """
    return subprocess.Popen(
        # -P: a file that happens to lie in the working directory must not stand in for one of our modules.
        [sys.executable, "-P", "-m", "endpoint_worker.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        bufsize=0,
        env=_environment(),
        start_new_session=True,  # a Ctrl-C at the terminal is for the user's program
    )


def tell(stdin: IO[bytes], message: Mapping[str, Any]) -> None:
    """Give an agent its order, or a word later. One that is gone hears nothing: whoever waits for its answer is told."""
    line = json.dumps(message).encode() + b"\n"
    try:
        while line:
            line = line[stdin.write(line) or 0 :]
    except (BrokenPipeError, ValueError):
        pass


def read_answer(line: bytes) -> Ready:
    """What an agent says of its start.

    Args:
        line: the first line of its stdout.

    Raises:
        GcrefError: it could not start; this is its own error.
        ValueError: the line is no answer.
    """
    try:
        told = json.loads(line)
        if told.get("ready"):
            return Ready(str(told["control"]), str(told["bulk"]))
        kind, text, fields = str(told["error"]), str(told["message"]), dict(told.get("fields") or {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer of an agent: {line!r}") from error
    found = getattr(errors, kind, None)
    if not isinstance(found, type) or not issubclass(found, GcrefError):
        raise EndpointLostError(f"the agent could not start: {kind}: {text}")
    raise found(text, **fields)


def how_it_ended(code: int) -> str:
    """An exit code in words: "exited with code 1", "was killed by signal 9"."""
    return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"


def _environment() -> dict[str, str]:
    """Ours; where gcref is not installed, with the folder that holds it on the import path, which -P takes away.

    The owner's token is in the order: tasks, which inherit the agent's environment, may be somebody else's.
    """
    environment = dict(os.environ)
    environment.pop("GCREF_TOKEN", None)
    folder = str(Path(errors.__file__).resolve().parent.parent)
    if os.path.basename(folder) not in ("site-packages", "dist-packages"):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = folder if not known else f"{folder}{os.pathsep}{known}"
    return environment
