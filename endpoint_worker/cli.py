"""The command `endpoint-worker`: init, start, stop, status, list, logs.

It reads arguments and writes for people; what it does is in `daemon` and `status`. An error of gcref's becomes one
sentence on stderr, never a traceback.

Exit codes: 0 done · 1 it could not be done, stderr says why · 2 the command line is wrong · 3 `status`: it does not run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from endpoint_worker import daemon, status
from gcref import ids
from gcref.directory import records
from gcref.errors import ConfigError, GcrefError, NotFoundError

FAILED: Final = 1
NOT_RUNNING: Final = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those behind the command's name; `None`: this process's own.

    Returns:
        The exit code.
    """
    said = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = said.command
    try:
        return command(said)
    except GcrefError as error:
        print(f"endpoint-worker: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`): no reason for a traceback, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="endpoint-worker",
        description="Run gcref endpoints on this machine. An endpoint is a named place where functions run.",
        epilog="An endpoint's files lie in $GCREF_HOME/endpoints/NAME (GCREF_HOME is ~/.gcref if not set).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    init = add("init", _init, "Make an endpoint: its folder, a commented config.toml, a key and an id.")
    init.add_argument("name")
    init.add_argument(
        "--workers", type=int, help="processes that run tasks (default: the cores of the machine)"
    )
    init.add_argument(
        "--bind",
        default="0.0.0.0",
        help="address or network interface to listen on (default: %(default)s, every network; only allowed keys get in)",
    )
    init.add_argument("--port", type=int, help="port for messages (default: any that is free)")
    init.add_argument(
        "--bulk-port", type=int, help="port for the bytes of large objects (default: any that is free)"
    )
    init.add_argument(
        "--advertise", action="append", metavar="HOST", help="what others are to dial; may be repeated"
    )

    start = add("start", _start, "Start an endpoint as a daemon, and wait until it serves.")
    start.add_argument("name")
    start.add_argument(
        "--foreground", action="store_true", help="stay until it ends; it ends with this command"
    )
    start.add_argument(
        "--timeout",
        type=float,
        default=daemon.READY_S,
        metavar="S",
        help="seconds to wait (default: %(default)g)",
    )

    stop = add("stop", _stop, "Stop an endpoint. Tasks that have not ended go on when it is started again.")
    stop.add_argument("name")
    stop.add_argument(
        "--timeout",
        type=float,
        default=daemon.STOP_S,
        metavar="S",
        help="seconds until it is killed (default: %(default)g)",
    )

    shown = add("status", _status, "Show how an endpoint is: workers, queue, store, links.")
    shown.add_argument("name")
    shown.add_argument("--json", action="store_true", help="everything, as JSON")

    add("list", _list, "List the endpoints of this GCREF_HOME.")

    logs = add("logs", _logs, "Show an endpoint's log: one JSON object per line.")
    logs.add_argument("name")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    logs.add_argument(
        "-n", "--lines", type=int, default=50, metavar="N", help="the last N lines (default: %(default)d)"
    )
    return parser


def _init(said: argparse.Namespace) -> int:
    wanted = {key: getattr(said, key) for key in ("workers", "bind", "port", "bulk_port", "advertise")}
    record = daemon.init(said.name, **{key: value for key, value in wanted.items() if value is not None})
    folder = daemon.folder_of(said.name)
    print(f"endpoint {said.name}, id {ids.text(record.id)}")
    print(f"settings: {folder / 'config.toml'}")
    print(f"who may use it: you, and the keys in {folder / 'authorized_keys'}")
    print(f"start it with: endpoint-worker start {said.name}")
    return 0


def _start(said: argparse.Namespace) -> int:
    running = daemon.start(said.name, watch=said.foreground, timeout_s=said.timeout)
    if said.foreground:
        # Before a word is said: whoever reads it may answer with a signal.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: running.process.send_signal(signal.SIGTERM))
    if running.note:
        print(f"note: {running.note}", file=sys.stderr)
    record = running.record
    print(f"endpoint {said.name} runs, process {record.pid}, id {ids.text(record.id)}")
    for address in record.control:
        print(f"  {address}")
    sys.stdout.flush()
    if not said.foreground:
        running.process.returncode = 0  # it goes on without us: no child that was forgotten
        return 0
    code = running.process.wait()
    print(f"endpoint {said.name} has ended")
    return 0 if code in (0, -signal.SIGTERM) else FAILED


def _stop(said: argparse.Namespace) -> int:
    print(daemon.stop(said.name, timeout_s=said.timeout))
    return 0


def _status(said: argparse.Namespace) -> int:
    record = daemon.existing(said.name)
    facts: dict[str, Any] | None = None
    problem = ""
    if record.alive() is not False:
        try:
            facts = status.ask(record)
        except GcrefError as error:
            if record.alive():
                raise
            problem = str(error)
    if said.json:
        print(status.as_json(record, facts))
    else:
        print("\n".join(status.lines(record, daemon.state_of(record), facts)))
        if problem:
            print(f"it does not answer: {problem}", file=sys.stderr)
    return 0 if facts is not None else NOT_RUNNING


def _list(said: argparse.Namespace) -> int:
    rows = [("NAME", "ID", "STATE")]
    folder = records.endpoints_dir()
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for name in names:
        try:
            record = daemon.existing(name)
        except (ConfigError, NotFoundError) as error:
            rows.append((name, "?", f"damaged: {error}"))
        else:
            kind = " (of a LocalEndpoint)" if record.ephemeral else ""
            rows.append((name, ids.text(record.id), daemon.state_of(record) + kind))
    if len(rows) == 1:
        print(f"no endpoints in {folder}; 'endpoint-worker init NAME' makes one", file=sys.stderr)
        return 0
    width = max(len(row[0]) for row in rows)
    for name, id, state in rows:
        print(f"{name:<{width}}  {id:<36}  {state}")
    return 0


def _logs(said: argparse.Namespace) -> int:
    path = daemon.folder_of(said.name) / "agent.log"
    if not path.exists():
        daemon.existing(said.name)
        raise NotFoundError(
            f"endpoint {said.name} has no log yet: it has not been started, see {path.parent}"
        )
    sys.stdout.flush()
    follow = ["-F"] if said.follow else []
    os.execvp("tail", ["tail", "-n", str(max(0, said.lines)), *follow, str(path)])
