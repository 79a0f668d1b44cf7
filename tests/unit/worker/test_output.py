"""Standard streams of a worker: nothing is lost to the log, the record has the end of it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import cast

from endpoint_worker.worker import output
from endpoint_worker.worker.output import LOG_MAX_BYTES, TAIL_BYTES, Tail


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)


def test_everything_is_in_the_log_and_the_end_in_the_tail(tmp_path: Path) -> None:
    fd = opened(tmp_path / "log")
    tail = Tail(fd)
    text = io.TextIOWrapper(cast("io.BufferedWriter", tail), encoding="utf-8", write_through=True)
    assert tail.take() is None
    text.write("ä")
    text.write("b\nno newline")
    assert tail.take() == "äb\nno newline"
    for n in range(3000):
        text.write(f"{n}\n")
    kept = tail.take()
    assert kept is not None
    assert len(kept) == TAIL_BYTES
    assert kept.endswith("2998\n2999\n")
    text.write("x" * (3 * TAIL_BYTES) + "end")
    assert tail.take() == "x" * (TAIL_BYTES - 3) + "end"
    assert (tmp_path / "log").stat().st_size == 14 + sum(
        len(f"{n}\n") for n in range(3000)
    ) + 3 * TAIL_BYTES + 3
    assert tail.fileno() == fd
    os.close(fd)


def test_a_log_that_cannot_be_written_does_not_fail_the_task(tmp_path: Path) -> None:
    fd = opened(tmp_path / "log")
    tail = Tail(fd)
    os.close(fd)
    assert tail.write(b"lost") == 4
    assert tail.take() == "lost"


def test_a_log_that_has_grown_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = opened(path)
    os.write(fd, b"x" * LOG_MAX_BYTES)
    os.write(fd, b"the end")
    output._cut(fd, os.fstat(fd).st_size)
    assert path.stat().st_size < LOG_MAX_BYTES / 100
    assert path.read_bytes().endswith(b"xthe end")
    os.write(fd, b", and more")
    assert path.read_bytes().endswith(b"xthe end, and more")
    os.close(fd)
