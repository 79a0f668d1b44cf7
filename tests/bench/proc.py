"""What Linux tells about processes: memory, descendants, wake-ups. No library, for the peers have none."""

from __future__ import annotations

import os
from pathlib import Path


def rss_bytes(pid: int) -> int:
    """Resident memory of one process."""
    return _rollup(pid, "Rss:")


def pss_bytes(pid: int) -> int:
    """Proportional memory of one process: a page that n processes share counts 1/n."""
    return _rollup(pid, "Pss:")


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, without itself."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            # The name in parentheses may hold anything: count from its end. State, then parent.
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found: list[int] = []
    ahead = [pid]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def command(pid: int) -> str:
    """The command line, for a report."""
    try:
        words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        return b" ".join(words).decode(errors="replace").strip()
    except OSError:
        return "?"


def sleeps(pid: int, *, but_main: bool = False) -> int:
    """How often the threads of a process went to sleep by themselves: each wake-up ends in one of these.

    Args:
        pid: the process.
        but_main: leave out its main thread (the one that is measuring).
    """
    total = 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            if but_main and int(thread) == pid:
                continue
            for line in Path("/proc", str(pid), "task", thread, "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
    except OSError:
        pass  # it ended meanwhile
    return total


def _rollup(pid: int, field: str) -> int:
    for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in smaps_rollup of process {pid}")
