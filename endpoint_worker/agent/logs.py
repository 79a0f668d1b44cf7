"""The agent's log: one JSON object a line on stderr, which is the endpoint's `agent.log`."""

from __future__ import annotations

import json
import logging
import sys
import time


class JsonLines(logging.Formatter):
    """Formats a record as one JSON line: time (UTC), level, endpoint, logger, text, and a traceback where there is one."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self._endpoint = endpoint

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "endpoint": self._endpoint,
            "from": record.name,
            "text": record.getMessage(),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


def log_to_stderr(endpoint: str, level: str) -> None:
    """Send everything of `gcref` at or above `level` to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(endpoint))
    logger = logging.getLogger("gcref")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
