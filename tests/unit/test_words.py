"""How amounts are said to people."""

from __future__ import annotations

import pytest

from gcref.words import count, duration, size


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1, "0.0 ms"),
        (0.000_21, "0.2 ms"),
        (0.34, "340 ms"),
        (1.26, "1.3 s"),
        (9.96, "10 s"),
        (59.9, "60 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7511, "2 h 5 min"),
        (3600 * 24 * 3 + 3600 * 4 + 61, "3 d 4 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("size_bytes", "said"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 << 30, "2.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes(size_bytes: int, said: str) -> None:
    assert size(size_bytes) == said


def test_counts() -> None:
    assert count(1, "task") == "1 task"
    assert count(12_000, "task") == "12,000 tasks"
    assert count(2, "copy", "copies") == "2 copies"
