"""What happened, one JSON object a line, in the order in which it was noted.

| what | fields, beside `at` (seconds of the machine's monotonic clock) |
|---|---|
| `run` | seed and settings |
| `submitted` | node, task (id) |
| `refused` | node, type, text: `submit` itself raised |
| `cancel` | node, force, answer, took_s |
| `dropped` | node |
| `told` | node: its callback was called |
| `end` | node, outcome (`value`, `error`, `cancelled`, `pending`), digest; type, text, roots, named; attempts |
| `changed` | node: a value that was kept is not what it was |
| `blow`, `healed` | fault, target; site (index), killed (process ids of workers); done: when, after a search that began `at` |
| `stopped` | site: its agent has ended in order, and all of its workers with it; since: when it was told to |
| `effect` | node, effect, pid |
| `log` | site, level, text: what an agent complained of |
| `left` | text: something that is still there |
| `agent` | site, text: it is not as it should be |
| `explained` | node, text |
| `dumped` | site, lines: what an agent told of its state, because something was left |
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class History:
    """The entries of one run, kept in a file and here. Any thread may note something.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.entries: list[Entry] = []
        self._lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8")

    def note(self, what: str, *, at: float | None = None, **fields: Any) -> None:
        """Add an entry.

        Args:
            what: see the table above.
            at: when, if not now.
            fields: plain values.
        """
        with self._lock:
            entry = {"at": round(time.monotonic() if at is None else at, 6), "what": what, **fields}
            self.entries.append(entry)
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def close(self) -> None:
        """No more entries."""
        self._file.close()


def load(path: Path) -> list[Entry]:
    """The entries of a run that was kept."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
