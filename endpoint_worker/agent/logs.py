"""The agent's log: one JSON object a line on stderr, which is the endpoint's `agent.log`."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any


class JsonLines(logging.Formatter):
    """Formats a record as one JSON line: time (UTC), level, endpoint, logger, text, and a traceback where there is one."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self._endpoint = endpoint

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        more = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        level, text = record.levelname.lower(), record.getMessage()
        return line(self._endpoint, level, record.name, text, unix=record.created, **more)


def line(endpoint: str, level: str, source: str, text: str, *, unix: float | None = None, **more: Any) -> str:
    """One line of the log.

    Args:
        endpoint: its name.
        level: `info`, `warning`, …
        source: the logger's name.
        text: what happened.
        unix: when, in seconds; None: now.
        more: further facts that JSON can carry.
    """
    unix = time.time() if unix is None else unix
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix))
    told = {
        "time": f"{moment}.{int(unix % 1 * 1000):03d}Z",
        "level": level,
        "endpoint": endpoint,
        "from": source,
        "text": text,
    }
    return json.dumps(told | more)


def log_to_stderr(endpoint: str, level: str) -> None:
    """Send everything of `gcref` at or above `level` to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(endpoint))
    logger = logging.getLogger("gcref")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
