"""`python -m endpoint_worker.agent`: start an endpoint's agent as one JSON line on stdin says (see `start`)."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from endpoint_worker.agent.boot import Agent
from endpoint_worker.agent.start import MAX_LINE_BYTES, Order
from gcref.errors import ConfigError, GcrefError


def _read_line() -> bytes:
    """The first line of stdin, unbuffered: what follows it belongs to the agent's loop."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an error that JSON can carry."""
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, (str, int, float, bool, type(None)))
    }


def main() -> int:
    """Start the agent and serve until it is told to stop."""
    try:
        try:
            told = json.loads(_read_line())
        except ValueError as error:
            raise ConfigError(f"the agent expects one JSON line on stdin: {error}") from error
        agent = Agent(Order.from_json(told))
    except GcrefError as error:
        told = {"error": type(error).__name__, "message": str(error), "fields": _plain(error.__dict__)}
        print(json.dumps(told), flush=True)  # noqa: T201 - the answer that our starter reads
        return 1
    return agent.serve()


if __name__ == "__main__":
    sys.exit(main())
